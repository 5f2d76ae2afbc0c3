"""Which implementation runs a step."""

from typing import Literal

from . import xla
from .step import Operands, Step

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]


def step_blockwise(step: Step, operands: Operands, implementation: Implementation | None = None):
    """Runs the step and returns `(output, codes, absmax)`; `implementation=None` works everywhere.

    Raises:
        NotImplementedError: an implementation that is still to be built.
    """
    check_implementation(implementation)
    return xla.step(step, operands)


def check_implementation(implementation: str | None) -> None:
    """Raises unless `implementation` is None or the name of one that exists."""
    if implementation in ("pallas_tpu", "pallas_gpu"):
        raise NotImplementedError(
            f"`implementation={implementation!r}` is not built yet. Use None or 'xla', which run on every backend."
        )
    if implementation not in (None, "xla"):
        raise ValueError(f"`implementation` must be None, 'xla', 'pallas_tpu' or 'pallas_gpu', got {implementation!r}.")
