"""Runs a step as its arrays are sharded on a mesh with Auto axes, where array types do not say it.

In this order: the concrete arrays of an eager call; the arguments of the program, when it is lowered; the sharding that
the caller gives, by `partition_specs` or because `init` saw it. Codes decide before the parameter does, because a step
that moved codes would gather the sharded state of ZeRO-1. The result never depends on it, only time and moved data do.
"""

from functools import partial
from typing import Any
from warnings import warn

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..lowering import Program, primitive
from ..sharding import explicit_sharding
from .capabilities import PLATFORMS, Seen, Spec
from .lowering import LocalStep, run_sharded, types
from .per_shard import axis_names
from .step import Operands

_run = partial(jax.jit, static_argnums=(0, 2))(run_sharded)  # parameters of one shape are traced and lowered once


def run_as_sharded(local: LocalStep, operands: Operands, spec: Spec | None):
    """Runs a step as its arrays are sharded, and returns `(output, codes, absmax)`.

    Args:
        local: The step of one device.
        operands: The global arrays.
        spec: The sharding of the parameter, as far as the caller knows it.
    """
    leaves, codes = jax.tree.leaves(operands), operands.codes[0]
    if explicit_sharding(codes) is not None or AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return _run(local, operands, spec)
    if any(isinstance(x, Tracer) for x in leaves):
        return local.join(_as_sharded.bind(*leaves, local=local, spec=spec))
    return _run(local, operands, _chosen(_named_sharding(codes), _named_sharding(operands.p), spec))


def _named_sharding(x: Any) -> NamedSharding | None:
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _reference(*flat: Any, local: LocalStep, spec: Spec | None):
    return jax.tree.leaves(_run(local, local.tree.unflatten(flat), spec))


def _for_program(program: Program, *, local: LocalStep, spec: Spec | None):
    """Returns the step for the program that it is lowered into. Warns if nothing says how its arrays are sharded."""
    if program.one_device:
        return partial(_reference, local=local, spec=None)
    operands = local.tree.unflatten(program.shardings)
    found = _chosen(operands.codes[0], operands.p, spec)
    if (
        found is None
        and not local.required
        and any(PLATFORMS.get(platform) in local.kernels for platform in program.platforms)
    ):
        warn(UNKNOWN, stacklevel=2)
    elif spec is not None and not isinstance(spec, Seen) and isinstance(found, NamedSharding):
        _warn_if_different(spec, found, operands.p, local.shape)
    return partial(_reference, local=local, spec=found)


UNKNOWN = (
    "An optimizer step with 8-bit moments is lowered for several devices, and nothing says how its parameters are "
    "sharded. So XLA computes it, without the library's kernel, which is slower. Give the optimizer "
    "`partition_specs=jax.tree.map(lambda x: x.sharding, params)`."
)


def _chosen(codes: NamedSharding | None, p: NamedSharding | None, given: Spec | None) -> Spec | None:
    """Returns the sharding that a step runs with.

    Args:
        codes: How the codes of the first moment are sharded, if that is known.
        p: How the parameter is sharded, if that is known.
        given: How the caller says that it is.
    """
    if sharded := [x for x in (codes, p) if x is not None and x.mesh.size > 1 and not x.is_fully_replicated]:
        return sharded[0]
    return given or codes


def _warn_if_different(
    given: NamedSharding | PartitionSpec, found: NamedSharding, p: NamedSharding | None, shape: tuple[int, ...]
) -> None:
    """Warns if `partition_specs` says something else than the arrays of the program."""
    wanted, *others = [axis_names(x, len(shape)) for x in (given, found, p) if x is not None]
    known = set(found.mesh.axis_names)
    if any(wanted) and known.issuperset(name for names in wanted for name in names) and wanted not in others:
        text = given.spec if isinstance(given, NamedSharding) else given
        warn(
            f"`partition_specs` has {text} for a parameter of shape {shape}, but its moments are sharded as "
            f"{found.spec} over {dict(found.mesh.shape)} in this program. The step runs as they are sharded. Correct "
            "`partition_specs`, or drop it.",
            stacklevel=2,
        )


_as_sharded = primitive(
    "step_as_sharded", _reference, choose=_for_program, types=lambda *x, local, spec: types(*x, local=local)
)
