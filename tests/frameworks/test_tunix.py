"""Tests tunix: its helpers that walk the optimizer state, and the real PeftTrainer where tunix is installed.

The helpers are those of https://github.com/google/tunix, `tunix/sft/peft_trainer.py` (_opt_state_dtypes,
_restore_opt_state_float_dtypes, _align_opt_state_dtypes, _shard_optimizer) and `tunix/sft/checkpoint_manager.py`
(_fix_sharding), written again here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import flax_stable_embed as fse
from tests.frameworks.tools import (
    assert_8bit,
    assert_codes_are_sharded_like_parameters,
    assert_same_numbers,
    batch_of,
    build,
    every_format,
    every_optimizer,
    loss_of,
    without_framework,
)
from tests.tools import as_pure, may_straddle

IDS = np.arange(32).reshape(4, 8)


class Model(nnx.Module):
    """An embedder and a layer with metadata as in tunix."""

    def __init__(self, rngs, dtype=jnp.float32):
        ones = nnx.initializers.ones
        metadata = {"out_sharding": ("tp", "fsdp")}
        self.embedder = fse.nnx.Embed(
            128, 64, param_dtype=dtype, embedding_init=ones, embedding_metadata=metadata, rngs=rngs
        )
        metadata = {"out_sharding": ("fsdp", "tp")}
        self.gate = nnx.Linear(
            64, 768, use_bias=False, param_dtype=dtype, kernel_init=ones, kernel_metadata=metadata, rngs=rngs
        )

    def __call__(self, ids):
        return self.gate(self.embedder(ids))


def mesh_of(shape):
    return jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


def opt_state(optimizer):
    return nnx.state(optimizer, nnx.optimizer.OptState)


def is_variable(x):
    return isinstance(x, nnx.Variable)


def dtypes(optimizer):
    return jax.tree.map(lambda v: v.get_value().dtype, opt_state(optimizer), is_leaf=is_variable)


def restore_float_dtypes(optimizer, wanted):
    def restore(v, dtype):
        x = v.get_value()
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != dtype:
            v.set_value(x.astype(dtype))

    jax.tree.map(restore, opt_state(optimizer), wanted, is_leaf=is_variable)


def assert_an_update_keeps_dtypes(model, optimizer):
    """Otherwise tunix would cast the state before the first step, to the dtypes that an update returns."""
    params, state = (
        jax.tree.map(lambda v: v.get_value(), tree, is_leaf=is_variable)
        for tree in (nnx.state(model, nnx.Param), optimizer.opt_state)
    )
    after = jax.eval_shape(optimizer.tx.update, params, state, params)[1]
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def shard(optimizer, mesh):
    def place(x, spec):
        spec = P() if spec is None else spec
        return jax.device_put(x, NamedSharding(mesh, spec))  # raises unless it divides

    state = opt_state(optimizer)
    nnx.update(optimizer, jax.tree.map(place, state, nnx.get_partition_spec(state)))


def restore_targets(state):
    """As `_fix_sharding` of the checkpoint manager: puts all arrays on the mesh of the arrays that are on one."""
    mesh = next(x.sharding.mesh for x in jax.tree.leaves(state) if isinstance(x.sharding, NamedSharding))
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec or P())),
        state,
        nnx.get_partition_spec(state),
    )


@nnx.jit(donate_argnames="optimizer")
def step(model, optimizer, batch):
    grads = nnx.grad(lambda model: loss_of(nnx.state(model, nnx.Param), batch))(model)
    before = dtypes(optimizer)
    optimizer.update(model, grads)
    restore_float_dtypes(optimizer, before)


def made(tx, shape):
    with jax.set_mesh(mesh_of(shape)):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        shard(optimizer, mesh_of(shape))
    return model, optimizer


@every_optimizer
@every_format
@pytest.mark.one_in(7)
@may_straddle
def test_the_helpers_accept_the_state_and_a_checkpoint_opens_on_another_mesh(name, state_format, tmp_path):
    tx = build(name, state_format)
    model, optimizer = made(tx, (2, 4))
    before = dtypes(optimizer)
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with jax.set_mesh(mesh_of((2, 4))):
        for i in range(3):
            step(model, optimizer, batch_of(shapes, i))
    assert dtypes(optimizer) == before
    params, state = nnx.to_pure_dict(nnx.state(model, nnx.Param)), as_pure(optimizer.opt_state)
    assert_codes_are_sharded_like_parameters(state, params)
    assert_same_numbers((params, state), without_framework(tx, shapes))

    ocp.save(tmp_path / "state", opt_state(optimizer))
    _, other = made(tx, (4, 2))
    targets = restore_targets(opt_state(other))
    nnx.update(other, ocp.load(tmp_path / "state", targets))
    assert_same_numbers(as_pure(other.opt_state), state)
    (codes, _), *_ = assert_8bit(as_pure(other.opt_state), params)
    assert codes.sharding.mesh.shape == {"fsdp": 4, "tp": 2}


@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_update_keeps_the_dtypes_of_the_state(name, dtype):
    with nnx.use_eager_sharding(False):
        model = Model(nnx.Rngs(0), dtype)
        optimizer = nnx.Optimizer(model, build(name), wrt=nnx.Param)
    assert_8bit(as_pure(optimizer.opt_state), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert_an_update_keeps_dtypes(model, optimizer)


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_trainer_trains_and_continues_from_its_checkpoint(tmp_path):
    trainers = pytest.importorskip("tunix.sft.peft_trainer", reason="needs google-tunix", exc_type=ImportError)
    tx = build("adamw8bit")
    batches = [trainers.TrainingInput(input_tokens=IDS, input_mask=np.ones_like(IDS)) for _ in range(4)]

    def trained(steps):
        config = trainers.TrainingConfig(
            eval_every_n_steps=100, max_steps=steps, checkpoint_root_directory=str(tmp_path)
        )
        with jax.set_mesh(mesh_of((2, 4))):
            model = Model(nnx.Rngs(0))
            trainer = trainers.PeftTrainer(model, tx, config)
            trainer = trainer.with_loss_fn(
                lambda model, ids, ones: jnp.mean((0.01 * model(ids) - ones[..., None]) ** 2)
            )
            trainer = trainer.with_gen_model_input_fn(lambda x: {"ids": x.input_tokens, "ones": x.input_mask})
            trainer.train(batches)
        state = as_pure(trainer.optimizer.opt_state)
        assert_codes_are_sharded_like_parameters(state, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return int(state[0].count), float(jnp.mean((0.01 * model(IDS) - 1.0) ** 2))

    (steps, loss), (more_steps, lower) = trained(2), trained(4)  # the second continues from step 2 of the checkpoint
    assert (steps, more_steps) == (2, 4) and lower < loss
