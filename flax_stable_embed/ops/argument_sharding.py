"""How the arguments of a program are sharded, read while the program is lowered.

Under Auto axes, array types do not say how an array is sharded, so a function that is traced cannot know it. But
`jax.jit` writes the shardings of its arguments into the program (MLIR) before it lowers the operations. The lowering
rule of a primitive can read them there. It follows an operand back to an argument through casts, slices, selects and
barriers, or to a sharding constraint. It finds nothing behind other arithmetic, or where the primitive is in a function
of its own: the body of a scan or of a cond, or a nested jit.
"""

from typing import Any

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

_FOLLOWED = {  # operations whose result is sharded like an operand: the index of the operand; None: that of the result
    "stablehlo.optimization_barrier": None,
    "stablehlo.convert": 0,
    "stablehlo.slice": 0,
    "stablehlo.select": 1,
}


def argument_sharding(module: Any, value: Any) -> NamedSharding | None:
    """Returns the sharding of a value that is an argument of the program; None if it is not, or has none.

    Args:
        module: The MLIR module that is built.
        value: An operand of the operation that is lowered.

    Returns:
        A sharding with the axis names and sizes of the argument's mesh, without devices. It divides the value into
        equal shards.
    """
    sharding = _sharding_of(module, value)
    if sharding is None:
        return None
    try:
        sharding.shard_shape(tuple(ir.RankedTensorType(value.type).shape))
    except ValueError:  # the slice of an argument may not divide where the argument did
        return None
    return sharding


def _sharding_of(module: Any, value: Any) -> NamedSharding | None:
    while not isinstance(owner := value.owner, ir.Block):
        operation = owner.operation
        if operation.name == "sdy.sharding_constraint":
            return _named(module, sdy.TensorShardingAttr(operation.attributes["sharding"]))
        if operation.name == "stablehlo.custom_call":
            if "annotate_device_placement" not in str(operation.attributes["call_target_name"]):
                return None
            index = 0
        elif operation.name in _FOLLOWED:
            index = _FOLLOWED[operation.name]
        else:
            return None
        value = operation.operands[ir.OpResult(value).result_number if index is None else index]
    function = owner.owner.operation
    if function.name != "func.func" or "arg_attrs" not in function.attributes:
        return None
    all_attributes: Any = function.attributes["arg_attrs"]
    attributes = all_attributes[ir.BlockArgument(value).arg_number]
    return _named(module, sdy.TensorShardingAttr(attributes["sdy.sharding"])) if "sdy.sharding" in attributes else None


def _named(module: Any, sharding: Any) -> NamedSharding | None:
    """Converts an attribute of the partitioner (Shardy); None for shardings that a PartitionSpec cannot express."""
    axes = [sdy.MeshAxisAttr(axis) for axis in _mesh_of(module, sharding).axes]
    spec = []
    for dimension in map(sdy.DimensionShardingAttr, sharding.dimension_shardings):
        refs = [sdy.AxisRefAttr(axis) for axis in dimension.axes]
        if any(ref.sub_axis_info is not None for ref in refs):
            return None
        spec.append(tuple(ref.name for ref in refs) or None)
    if not axes:
        return None
    sizes, names = zip(*((axis.size, axis.name) for axis in axes))
    return NamedSharding(AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names)), PartitionSpec(*spec))


def _mesh_of(module: Any, sharding: Any) -> Any:
    """Returns the mesh of a sharding, which is inside of it or has a name in the module."""
    mesh = sharding.mesh_or_ref
    if isinstance(mesh, ir.FlatSymbolRefAttr):
        named = [op for op in module.body.operations if op.operation.name == "sdy.mesh"]
        mesh = next(op for op in named if ir.StringAttr(op.attributes["sym_name"]).value == mesh.value).attributes[
            "mesh"
        ]
    return sdy.MeshAttr(mesh)
