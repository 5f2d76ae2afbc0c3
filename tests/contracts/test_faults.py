"""Tests that functions of states give the right result for random inputs, or an error that says why.

`make fuzz` tries more of them.
"""

import pytest

from tests import fuzz


@pytest.mark.parametrize("seed", fuzz.CORPUS)
@pytest.mark.filterwarnings("ignore")
def test_what_failed_once_does_not_fail_again(seed):
    assert fuzz.run(seed) is None


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.filterwarnings("ignore")
def test_random_inputs_give_a_result_or_a_clear_error(seed):
    assert fuzz.run(seed) is None
