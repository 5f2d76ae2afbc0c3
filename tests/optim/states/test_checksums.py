"""Tests that checksums find every flipped bit, and do not depend on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_stable_embed as fse

TX = fse.adamw8bit(1e-3)
PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (128, 64)), "scale": jnp.ones(64, jnp.bfloat16)}
STATE = TX.update(PARAMS, TX.init(PARAMS), PARAMS)[1]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "bfloat16", "float16", "float32", "int32", "complex64"])
def test_every_single_bit_counts(dtype):
    rng = np.random.default_rng(0)
    x = np.asarray(rng.integers(0, 2, 24) if dtype == "bool" else rng.normal(size=24) * 50).astype(jnp.dtype(dtype))
    want = int(fse.checksums({"x": jnp.asarray(x)})["x"])
    for byte in range(x.nbytes):
        for bit in range(1 if dtype == "bool" else 8):
            raw = bytearray(x.tobytes())
            raw[byte] ^= 1 << bit
            other = np.frombuffer(bytes(raw), x.dtype)
            assert int(fse.checksums({"x": jnp.asarray(other)})["x"]) != want, (byte, bit)


def test_elements_that_change_places_count():
    x = jnp.arange(32.0)
    assert fse.checksums({"x": x})["x"] != fse.checksums({"x": x.at[jnp.array([3, 4])].set(x[jnp.array([4, 3])])})["x"]


def test_eight_bytes_and_random_keys_have_checksums():
    with jax.enable_x64(True):
        x = jnp.arange(4, dtype=jnp.float64)
        assert fse.checksums({"x": x})["x"] != fse.checksums({"x": x + 2.0**-50})["x"]
    assert fse.checksums([jax.random.key(0)])["0"] != fse.checksums([jax.random.key(1)])["0"]
    assert int(fse.checksums({"x": jnp.zeros((0, 3))})["x"]) == 0
    assert fse.checksums({"x": jnp.arange(3, dtype=jnp.int4)})["x"] != fse.checksums({"x": jnp.zeros(3, jnp.int4)})["x"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_checksums_do_not_depend_on_the_mesh(kind):
    want = fse.checksums(STATE)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)

    def place(x):
        divides = x.ndim == 2 and x.shape[0] % 4 == 0 and x.shape[1] % 2 == 0
        return jax.device_put(x, NamedSharding(mesh, P("a", "b") if divides else P()))

    with jax.set_mesh(mesh):
        fse.verify_checksums(jax.tree.map(place, STATE), jax.device_get(want))


def test_a_flipped_bit_in_a_file_is_found(tmp_path):
    saved = {"params": PARAMS, "state": STATE}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "at", {"tree": saved, "checksums": fse.checksums(saved)})
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: {"tree": saved, "checksums": fse.checksums(saved)})
        restored = checkpointer.restore(tmp_path / "at", shapes)
        fse.verify_checksums(restored["tree"], restored["checksums"])
        file = max((f for f in (tmp_path / "at").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 3] ^= 16
        file.write_bytes(bytes(raw))
        try:
            restored = checkpointer.restore(tmp_path / "at", shapes)
        except ValueError:
            return  # the bit was in a part that the loader checks
        with pytest.raises(ValueError, match="have other bits"):
            fse.verify_checksums(restored["tree"], restored["checksums"])


def test_other_trees_and_leaves_are_errors_with_their_paths():
    sums = fse.checksums(STATE)
    with pytest.raises(ValueError, match=r"other paths: .*mu\.kernel"):
        fse.verify_checksums(optax.adamw(1e-3).init({"other": jnp.ones(3)}), sums)
    with pytest.raises(TypeError, match="'a' must be an array, got 'text'"):
        fse.checksums({"a": "text"})
