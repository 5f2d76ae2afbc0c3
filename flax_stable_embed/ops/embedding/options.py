"""Checks the options of the modules when they are built.

A module checks its options once, in its constructor, so that a wrong one is an error there and not in a compiled step.
Errors name the option, its value and the values that it can have.
"""

import operator
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from .gather import Mode
from .layer_norm import NORM_EPSILON

NO_FREQUENCY = (
    "`scale_grad_by_freq=True` does not work with a sparse gradient, as in torch. Scale the loss, or use sparse=False."
)
NO_ONE_HOT = "`lookup='one_hot'` has a dense gradient. For a sparse one, use lookup='take'."
Method = Literal["take", "one_hot"]


def check_options(
    *,
    num_embeddings: int,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    sparse: bool,
    lookup: str,
    mode: str,
) -> int | None:
    """Checks the options of a module and returns `padding_idx` counted from the start.

    Raises:
      TypeError, ValueError: An option is not one of the values that it can have.
    """
    if sparse and scale_grad_by_freq:
        raise ValueError(NO_FREQUENCY)
    if lookup not in get_args(Method):
        raise ValueError(f"`lookup` must be 'take' or 'one_hot', got {lookup!r}.")
    if sparse and lookup == "one_hot":
        raise ValueError(NO_ONE_HOT)
    if mode not in get_args(Mode):
        raise ValueError(f"`mode` must be 'fill', 'clip' or 'promise_in_bounds', got {mode!r}.")
    check_max_norm(max_norm, norm_type)
    return None if padding_idx is None else _count_from_start(padding_idx, num_embeddings)


def check_max_norm(max_norm: float | None, norm_type: float) -> None:
    """Checks the options of a renormalization."""
    if max_norm is not None:
        _check_number("max_norm", max_norm)
        if not max_norm > 0:
            raise ValueError(f"`max_norm` must be positive, got {max_norm}. Use None to leave rows unchanged.")
    _check_number("norm_type", norm_type)
    if not norm_type >= 0:
        raise ValueError(f"`norm_type`, the p of a p-norm, must be 0 or more, got {norm_type}. Try 2.0.")


def check_norm_options(norm_epsilon: float, param_dtype: Any, dtype: Any) -> None:
    """Checks the options that only StableEmbed has: an epsilon, and dtypes that can be normalized."""
    for name, value in (("param_dtype", param_dtype), ("dtype", dtype)):
        if value is not None and not jnp.issubdtype(value, jnp.floating):
            raise TypeError(f"`{name}` of a StableEmbed must be a real floating point dtype, got {jnp.dtype(value)}.")
    _check_number("norm_epsilon", norm_epsilon)
    float32 = np.finfo(np.float32)
    if not float32.tiny <= norm_epsilon <= float32.max:
        raise ValueError(
            f"`norm_epsilon` must be positive and finite in float32, got {norm_epsilon}, because a padding row has "
            f"variance 0. Try {NORM_EPSILON}."
        )


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a Python number, got {value!r}.")


def _count_from_start(padding_idx: int, num_embeddings: int) -> int:
    if isinstance(padding_idx, bool) or not hasattr(padding_idx, "__index__"):
        raise TypeError(f"`padding_idx` must be an integer or None, got {padding_idx!r}.")
    if not -num_embeddings <= operator.index(padding_idx) < num_embeddings:
        raise ValueError(
            f"`padding_idx` must be within {-num_embeddings} .. {num_embeddings - 1}, got {padding_idx}. To add a "
            f"padding row, set num_embeddings={num_embeddings + 1}."
        )
    return operator.index(padding_idx) % num_embeddings
