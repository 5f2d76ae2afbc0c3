"""Compares the step in chunks with the reference: in place, without temporaries, and with equal bits on every mesh."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_stable_embed.ops.blockwise.blocks import Blocks, choose_blocks
from flax_stable_embed.ops.blockwise_step import cpu
from flax_stable_embed.ops.blockwise_step.api import step_blockwise
from flax_stable_embed.ops.blockwise_step.reference import plain
from flax_stable_embed.ops.blockwise_step.step import Moment, Operands, Step, UpdateRule, update_rule

COLLECTIVE = re.compile(r"= .*?\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@update_rule()
def adam_like(g, m, v, *, b1, b2):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return m / (jnp.sqrt(v) + 1e-8), (m, v)


def a_step(shape, codec="root", blocks=None, rounding="nearest", **options):
    moments = Moment(True, codec), Moment(False, codec, rounding)
    return Step(adam_like, (("b1", 0.9),), moments, blocks or choose_blocks(shape), **options)


def operands_of(step, shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    g, p = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    codes = tuple(jnp.zeros(shape, m.code.dtype) for m in step.moments)
    absmax = tuple(jnp.zeros(step.blocks.absmax_shape(shape)) for _ in step.moments)
    hyper = {"b2": jnp.float32(0.99), "step_size": jnp.float32(-0.01), "weight_decay": jnp.float32(0.1)}
    return Operands(g, p, codes, absmax, hyper, None if step.rounding == "nearest" else jnp.uint32(5))


def run(function, step, operands, steps=3):
    """Runs a few steps with growing gradients, and returns the results of the last."""
    out = None
    for i in range(steps):
        out, codes, absmax = function(step, operands._replace(g=operands.g * (i + 1)))
        operands = operands._replace(codes=codes, absmax=absmax, p=out if step.fused else operands.p)
    return out, codes, absmax


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes chunks of 1024 elements, so that small arrays take many, with remainders on every axis."""
    monkeypatch.setattr(cpu, "CHUNK", 1 << 10)
    monkeypatch.setattr(cpu, "SMALL", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


SHAPES = [(64, 96), (1024, 40), (3, 5, 700), (7, 2048), (2049,), (5, 33, 9), (40, 3, 3, 64), (1,), (4, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "update"])
@pytest.mark.parametrize("rounding", ["nearest", "dither", "stochastic"])
@pytest.mark.one_in(29)
def test_chunks_give_the_bits_of_the_reference(shape, fused, rounding, small_chunks):
    step = a_step(shape, fused=fused, rounding=rounding)
    operands = operands_of(step, shape)
    out, codes, absmax = run(jax.jit(cpu.run, static_argnums=0), step, operands)
    want_out, want_codes, want_absmax = run(jax.jit(plain, static_argnums=0), step, operands)
    for got, want in zip((*codes, *absmax), (*want_codes, *want_absmax)):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(out, want_out, rtol=2e-7, atol=2e-7)  # one rounding: of p + u, contracted or not


@pytest.mark.parametrize("numbers", [np.nan, np.inf, 1e30, 3e38], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "update"])
def test_chunks_with_non_finite_numbers_equal_the_reference(numbers, fused, small_chunks):
    """NaN, infinities, squares that overflow and sums that overflow, in some chunks and not in others."""
    step = a_step((64, 96), fused=fused)
    operands = operands_of(step, (64, 96))
    operands = operands._replace(g=operands.g.at[3, 5].set(numbers).at[40, 7:90].set(-numbers))
    found = run(jax.jit(cpu.run, static_argnums=0), step, operands)
    for got, want in zip(*map(jax.tree.leaves, (found, run(jax.jit(plain, static_argnums=0), step, operands)))):
        np.testing.assert_allclose(got, want, rtol=2e-7, atol=2e-7 if got.ndim == 2 and got.dtype == np.float32 else 0)


@pytest.mark.parametrize("shape", [(512, 1024), (64, 96), (3, 5, 700)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.one_in(5)
def test_chunks_give_the_bits_of_the_reference_for_16_bit_gradients(shape, dtype):
    step = a_step(shape, fused=True)
    operands = operands_of(step, shape)._replace(g=operands_of(step, shape, seed=1, dtype=dtype).g)
    _, *found = run(jax.jit(cpu.run, static_argnums=0), step, operands)
    _, *wanted = run(jax.jit(plain, static_argnums=0), step, operands)
    for got, want in zip(*map(jax.tree.leaves, (found, wanted))):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("codec", ["root", "dynamic", "linear"])
@pytest.mark.one_in(5)
def test_every_codec_runs_in_chunks(codec, small_chunks):
    shape = (96, 128)
    step = a_step(shape, codec=codec)
    got = run(jax.jit(cpu.run, static_argnums=0), step, operands_of(step, shape))
    want = run(jax.jit(plain, static_argnums=0), step, operands_of(step, shape))
    for a, b in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(want[1:])):
        np.testing.assert_array_equal(a, b)


def test_a_scalar_is_one_block():
    step = a_step((), fused=True)
    out, codes, absmax = step_blockwise(step, operands_of(step, ()))
    assert (out.shape, codes[0].shape, absmax[0].shape) == ((), (), ())
    assert absmax[0] > 0


@pytest.mark.parametrize("shape", [(2048, 2048), (1024, 4000), (300, 50, 256), (1 << 22,), (1000, 4099)], ids=str)
@pytest.mark.one_in(4)
def test_a_fused_step_works_in_place_without_temporaries_of_the_parameters_size(shape):
    step = a_step(shape, fused=True)
    operands = operands_of(step, shape)
    memory = compiled(
        lambda g, p, codes, absmax: operands._replace(g=g, p=p, codes=codes, absmax=absmax), step, operands
    )
    assert memory.temp_size_in_bytes < 0.5 * operands.p.nbytes + 8e6  # a few chunks of 1 MB
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes - memory_of_tuple(step)


def memory_of_tuple(step):
    """Returns the bytes of the pointers in the output tuple, which XLA counts as output: eight per array."""
    return 8 * (1 + 2 * len(step.moments))


def compiled(place, step, operands):
    arrays = operands.g, operands.p, operands.codes, operands.absmax
    function = jax.jit(lambda *arrays: step_blockwise(step, place(*arrays)), donate_argnums=(1, 2, 3))
    return function.lower(*arrays).compile().memory_analysis()


RULES = {
    "adam": adam_like,
    "reads the old moment": UpdateRule(
        lambda g, m, v, b1, b2: (jnp.sign(b1 * m + (1 - b1) * g), (b2 * m + (1 - b2) * g, v))
    ),
    "returns the gradient": UpdateRule(lambda g, m, v, b1, b2: (g, (b1 * m + g, b2 * v + g * g))),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "update"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.one_in(5)
def test_no_iteration_of_the_loop_copies_a_full_array(rule, fused, dtype):
    """In any order that a rule reads overwritten arrays, and for a dtype that XLA on CPU casts."""
    shape = (4096, 4096)
    step = dataclasses.replace(a_step(shape, fused=fused, dtype=np.dtype(dtype)), rule=RULES[rule])
    operands = operands_of(step, shape, dtype=dtype)

    def function(g, p, codes, absmax):
        return step_blockwise(step, operands._replace(g=g, p=p, codes=codes, absmax=absmax))

    arrays = operands.g, operands.p, operands.codes, operands.absmax
    donated = (1, 2, 3) if fused else (0, 2, 3)
    memory = jax.jit(function, donate_argnums=donated).lower(*arrays).compile().memory_analysis()
    as_integers = 0 if dtype == jnp.float32 else operands.g.nbytes + (operands.p.nbytes if fused else 0)
    assert memory.temp_size_in_bytes < as_integers + 10e6  # codes alone have 16.8e6 bytes


def test_an_update_needs_no_memory_beyond_the_updates():
    shape = (2048, 2048)
    step = a_step(shape, fused=False)
    operands = operands_of(step, shape)

    @partial(jax.jit, donate_argnums=(1, 2, 3))
    def update_and_apply(g, p, codes, absmax):
        u, codes, absmax = step_blockwise(step, operands._replace(g=g, p=p, codes=codes, absmax=absmax))
        return p + u, codes, absmax

    memory = update_and_apply.lower(operands.g, operands.p, operands.codes, operands.absmax).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.0 * operands.p.nbytes + 8e6


def test_a_gradient_made_in_the_same_program_is_overwritten_by_the_update():
    shape = (2048, 2048)
    step = a_step(shape, fused=False)
    operands = operands_of(step, shape)

    @partial(jax.jit, donate_argnums=(1, 2, 3))
    def train(x, p, codes, absmax):
        u, codes, absmax = step_blockwise(step, operands._replace(g=jnp.sin(x), p=p, codes=codes, absmax=absmax))
        return p + u, codes, absmax

    memory = train.lower(operands.g, operands.p, operands.codes, operands.absmax).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.0 * operands.p.nbytes + 8e6


# --- on meshes -------------------------------------------------------------------------------------------------------

MESHES = [((8,), ("a",)), ((2, 4), ("a", "b")), ((4,), ("a",)), ((2,), ("a",))]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
PLACES = [  # every mesh, kind and shape, not every combination
    ((512, 256), *MESHES[1], AUTO),
    ((512, 256), *MESHES[1], EXPLICIT),
    ((16, 2048), *MESHES[0], AUTO),
    ((16, 2048), *MESHES[2], EXPLICIT),
    ((2048,), *MESHES[3], AUTO),
    ((2048,), *MESHES[0], EXPLICIT),
    ((3, 3, 1, 2048), *MESHES[2], AUTO),
]
ALL_PLACES = [(s, *m, k) for s in {p[0] for p in PLACES} for m in MESHES for k in (AUTO, EXPLICIT)]


def shards_of(mesh, spec):
    """Returns the number of shards along each axis."""
    return [int(np.prod([mesh.shape[n] for n in ((s,) if isinstance(s, str) else s or ())])) for s in spec]


def placed(operands, mesh, spec):
    """Returns operands on the mesh. An axis of the scales that does not divide is replicated."""

    def put(x):
        if x.ndim != operands.g.ndim:
            return x
        divides = [d % n == 0 for d, n in zip(x.shape, shards_of(mesh, spec))]
        fitting = PartitionSpec(*[names if fits else None for names, fits in zip(spec, divides)])
        return jax.device_put(x, NamedSharding(mesh, fitting))

    return jax.tree.map(put, operands)


def specs_for(names, ndim):
    last = (None,) * (ndim - 1)
    both = tuple(names)
    if len(names) == 2 and ndim >= 2:
        return [(*names, *(None,) * (ndim - 2)), (*(None,) * (ndim - 2), *names[::-1]), (*last, both), (both, *last)]
    return [(names[0], *last), (*last, names[-1])][:ndim]


@pytest.mark.parametrize(
    ("shape", "sizes", "names", "kind"),
    PLACES + [pytest.param(*p, marks=pytest.mark.slow) for p in sorted(ALL_PLACES, key=str) if p not in PLACES],
    ids=str,
)
@pytest.mark.one_in(16)
def test_meshes_change_no_bit_and_add_no_collective(shape, sizes, names, kind, small_chunks):
    step = a_step(shape, fused=True, rounding="dither")
    operands = operands_of(step, shape)
    want = run(jax.jit(step_blockwise, static_argnums=0), step, operands)
    mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))
    tried = 0
    for spec in specs_for(names, len(shape)):
        if any(d % w for d, w in zip(shape, shards_of(mesh, spec))):
            continue
        with jax.set_mesh(mesh):
            there = placed(operands, mesh, spec)
            function = jax.jit(step_blockwise, static_argnums=0)
            got = run(function, step, there)
            assert not COLLECTIVE.findall(function.lower(step, there).compile().as_text())
            for a, b in zip((got[0], *got[1]), (there.p, *there.codes)):
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_array_equal(a, b)
        tried += 1
    assert tried


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_a_block_across_two_shards_gives_the_same_bits(kind):
    shape, blocks = (512, 64), Blocks(0, 256)  # four shards of 128 rows
    step = a_step(shape, blocks=blocks, fused=True, rounding="stochastic")
    operands = operands_of(step, shape)
    want = run(jax.jit(step_blockwise, static_argnums=0), step, operands)
    mesh = jax.make_mesh((4,), ("a",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        got = run(jax.jit(step_blockwise, static_argnums=0), step, placed(operands, mesh, ("a", None)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(a, b)


def test_the_step_runs_in_shard_map_scan_cond_and_remat():
    shape = (256, 64)
    step = a_step(shape, fused=True)
    operands = operands_of(step, shape)
    want = run(jax.jit(step_blockwise, static_argnums=0), step, operands, steps=2)
    function = partial(step_blockwise, step)

    def body(carry, scale):
        out, codes, absmax = function(carry._replace(g=carry.g * scale))
        return carry._replace(p=out, codes=codes, absmax=absmax), None

    last, _ = jax.lax.scan(body, operands, jnp.float32([1, 2]))
    np.testing.assert_array_equal(last.codes[1], want[1][1])
    taken = jax.jit(lambda yes: jax.lax.cond(yes, function, jax.checkpoint(function), operands))(True)
    np.testing.assert_array_equal(taken[1][0], function(operands)[1][0])
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    scalar, sharded = PartitionSpec(), PartitionSpec(None, "a")
    specs = jax.tree.map(lambda x: sharded if x.ndim else scalar, operands)
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.shard_map(function, in_specs=(specs,), out_specs=sharded))(operands)
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(function(operands))):
        np.testing.assert_array_equal(a, b)


def test_vmap_and_derivatives_use_the_reference():
    shape = (64, 32)
    step = a_step(shape, fused=True)
    operands = operands_of(step, shape)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), operands)
    many = jax.jit(jax.vmap(partial(step_blockwise, step)))(stacked)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(step_blockwise(step, operands))):
        np.testing.assert_array_equal(a[1], b)

    def after(step_size):
        return step_blockwise(step, operands._replace(hyper=operands.hyper | {"step_size": step_size}))[0].sum()

    with_decay, _ = adam_like(operands.g, 0.0, 0.0, b1=0.9, b2=0.99)
    expected = (with_decay + 0.1 * operands.p).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(after))(-0.01), expected, rtol=1e-5)
