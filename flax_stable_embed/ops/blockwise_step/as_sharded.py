"""Runs a step as its arrays are sharded on a mesh with Auto axes, where array types do not say it.

The sharding is that of the first of these that are sharded: the concrete arrays of an eager call; the arguments of the
program, when it is lowered; the sharding that the caller gives, by `partition_specs` or because `init` saw it. Sharded
codes win over the parameter. In ZeRO-1 the parameter is replicated, and following it would gather the codes.
Results do not depend on it, apart from last bits of kernels. Time and moved data do.
"""

from functools import partial
from typing import Any, cast
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


def run_as_sharded(local: LocalStep, operands: Operands, spec: Spec | None, parameter: Any = None):
    """Runs a step as its arrays are sharded, and returns `(output, codes, absmax)`.

    Args:
        local: The step of one device.
        operands: The global arrays.
        spec: The sharding of the parameter, as far as the caller knows it.
        parameter: The parameter, if the caller has it. Only its sharding is used. The step may not read it.
    """
    leaves, codes = jax.tree.leaves(operands), operands.codes[0]
    if explicit_sharding(codes) is not None or AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return _run(local, operands, spec)
    if any(isinstance(x, Tracer) for x in leaves):
        only_seen = [] if operands.p is not None or parameter is None else [parameter]
        return local.join(_as_sharded.bind(*leaves, *only_seen, local=local, spec=spec))
    return _run(local, operands, _chosen(_named_sharding(codes), _named_sharding(parameter), spec))


def _named_sharding(x: Any) -> NamedSharding | None:
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _reference(*flat: Any, local: LocalStep, spec: Spec | None):
    return jax.tree.leaves(_run(local, local.split(flat)[0], spec))  # without a parameter that is only seen


def _for_program(program: Program, *, local: LocalStep, spec: Spec | None):
    """Returns the step to lower, as the program shards its arguments.

    Warns if nothing says how they are sharded, or if `partition_specs` say something else.
    """
    if program.one_device:
        return partial(_reference, local=local, spec=None)
    operands, only_seen = local.split(program.shardings)
    p: Any = only_seen[0] if only_seen else operands.p
    found = _chosen(cast(Any, operands.codes[0]), p, spec)
    not_known = found is None or (isinstance(found, Seen) and jax.sharding.get_abstract_mesh().empty)
    if (
        not_known
        and not local.required
        and any(PLATFORMS.get(platform) in local.kernels for platform in program.platforms)
    ):
        warn(UNKNOWN, stacklevel=2)
    elif spec is not None and not isinstance(spec, Seen) and isinstance(found, NamedSharding):
        _warn_if_different(spec, found, p, local.shape)
    return partial(_reference, local=local, spec=found)


UNKNOWN = (
    "An optimizer step with 8-bit moments is lowered for several devices, and nothing says how its parameters are "
    "sharded. So XLA computes it, which is slower than the library's kernel. Give the optimizer "
    "`partition_specs=jax.tree.map(lambda x: x.sharding, params)`, or run the step under jax.set_mesh(mesh) if `init` "
    "saw the sharded parameters."
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
