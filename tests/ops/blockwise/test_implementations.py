"""A named implementation runs or raises."""

import pytest

import flax_stable_embed as fse
from flax_stable_embed.ops.blockwise.implementations import check_implementation


@pytest.mark.parametrize("name", [None, "xla"])
def test_what_runs_everywhere_is_accepted(name):
    check_implementation(name)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_what_is_not_built_yet_says_so_when_it_is_named(name):
    with pytest.raises(NotImplementedError, match=f"{name}.* is not built yet. Use None or 'xla'"):
        fse.adamw8bit(1e-3, implementation=name)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"`implementation` must be None, 'xla', .*got 'cuda'"):
        fse.adamw8bit(1e-3, implementation="cuda")
