"""Tests that a named implementation is used or raises."""

import pytest

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise_step.api import check_implementation


@pytest.mark.parametrize("name", [None, "xla", "pallas_tpu", "pallas_gpu"])
def test_names_of_implementations_are_accepted(name):
    check_implementation(name)


def test_unknown_names_of_implementations_raise():
    with pytest.raises(ValueError, match=r"`implementation` must be None, 'xla', .*got 'cuda'"):
        fse.adamw8bit(1e-3, implementation="cuda")
