"""Tests the conversion of embeddings of torch and bitsandbytes, from state dicts and safetensors files."""

import flax.linen as nn
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_stable_embed import linen, nnx
from flax_stable_embed.interop.bitsandbytes.embedding import dump_embedding, load_embedding
from flax_stable_embed.interop.bitsandbytes.tensors import SafetensorsFile
from tests.interop.bitsandbytes.embeddings import assert_same, checkpoint, write_safetensors
from tests.interop.bitsandbytes.tools import live as live

IDS = jnp.array([[0, 3], [4, 1]])


@pytest.mark.parametrize("stable", [False, True], ids=["embedding", "stable_embedding"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_linen_parameters_are_the_same_after_load_and_dump(stable, dtype):
    saved = checkpoint("wte", dtype, stable)
    params = load_embedding(saved, key="wte")
    module = (linen.StableEmbed if stable else linen.Embed)(5, 4, param_dtype=dtype)
    expected = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert module.apply({"params": params}, IDS).dtype == dtype
    wide = {name: x.astype(np.float32) if "norm" in name else x for name, x in saved.items()}  # as StableEmbed has them
    for given in (params, {"params": params}, jax.tree.map(lambda p: nn.Partitioned(p, (None,) * p.ndim), params)):
        assert_same(dump_embedding(given, key="wte"), wide)
    assert_same(dump_embedding(params), {name.removeprefix("wte."): x for name, x in wide.items()})


@pytest.mark.parametrize("stable", [False, True], ids=["embedding", "stable_embedding"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nnx_modules_are_the_same_after_load_and_dump(stable, dtype):
    saved = checkpoint("wte", dtype, stable)
    module = (nnx.StableEmbed if stable else nnx.Embed)(5, 4, param_dtype=dtype, rngs=flax.nnx.Rngs(0))
    variable = module.embedding
    params = load_embedding(saved, key="wte", into=module)
    assert module.embedding is variable and module.embedding.dtype == dtype
    assert_same({"p": module.embedding[...]}, {"p": params["embedding"]})
    apart = (linen.StableEmbed if stable else linen.Embed)(5, 4, param_dtype=dtype)
    np.testing.assert_array_equal(module(IDS), apart.apply({"params": params}, IDS))
    wide = {name: x.astype(np.float32) if "norm" in name else x for name, x in saved.items()}
    for given in (module, flax.nnx.state(module), flax.nnx.to_pure_dict(flax.nnx.state(module))):
        assert_same(dump_embedding(given, key="wte"), wide)


def test_a_module_keeps_its_dtypes_and_its_sharding():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    module = nnx.StableEmbed(8, 4, param_dtype=jnp.bfloat16, rngs=flax.nnx.Rngs(0))
    module.embedding.set_raw_value(jax.device_put(module.embedding[...], sharding))
    saved = checkpoint(shape=(8, 4))
    params = load_embedding(saved, into=module)
    assert params["embedding"].dtype == jnp.float32 and module.embedding.dtype == jnp.bfloat16
    assert module.embedding[...].sharding == sharding
    np.testing.assert_array_equal(module.embedding[...], jnp.asarray(saved["weight"], jnp.bfloat16))
    np.testing.assert_array_equal(module.norm.bias[...], saved["norm.bias"])


def test_an_abstract_module_gets_arrays():
    module = flax.nnx.eval_shape(lambda: nnx.StableEmbed(5, 4, rngs=flax.nnx.Rngs(0)))
    load_embedding(checkpoint(), into=module)
    assert module(IDS).shape == (2, 2, 4)


def test_a_plain_embedding_gets_a_new_norm_with_a_warning():
    saved = checkpoint(stable=False)
    assert load_embedding(saved).keys() == load_embedding(saved, stable=False).keys() == {"embedding"}
    with pytest.warns(UserWarning, match="starts with scale 1 and bias 0") as warned:
        params = load_embedding(saved, stable=True)
    assert warned[0].filename == __file__
    np.testing.assert_array_equal(params["norm"]["scale"], np.ones(4, np.float32))
    np.testing.assert_array_equal(params["norm"]["bias"], np.zeros(4, np.float32))
    module = nnx.StableEmbed(5, 4, rngs=flax.nnx.Rngs(0))
    module.norm.scale[...] = jnp.full(4, 7.0)
    with pytest.warns(UserWarning, match="plain embedding"):
        load_embedding(saved, into=module)
    np.testing.assert_array_equal(module.norm.scale[...], np.ones(4, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("pad", [0, 1])
def test_an_embedding_is_read_from_a_safetensors_file(dtype, pad, tmp_path):
    """A header of odd length leaves the numbers unaligned."""
    tensors = checkpoint("model.wte", dtype) | {"other": np.arange(3), "empty": np.zeros((0, 2), np.float32)}
    path = write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt" + "x" * pad})
    for given in (path, str(path)):
        params = load_embedding(given, key="model.wte")
        wide = {name: x.astype(np.float32) if "norm" in name else x for name, x in checkpoint("a", dtype).items()}
        assert_same(dump_embedding(params, key="a"), wide)
    file = SafetensorsFile(path)
    assert set(file) == set(tensors) and len(file) == len(tensors)
    assert_same(dict(file), tensors)


def test_errors_name_the_missing_tensor_and_the_ones_that_exist():
    saved = checkpoint("wte") | {"wpe.bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"no 'weight'. It has wte.weight, wte.norm.weight, wte.norm.bias, wpe.bias"):
        load_embedding(saved)
    with pytest.raises(ValueError, match=r"no 'wpe.weight'"):
        load_embedding(saved, key="wpe")
    with pytest.raises(ValueError, match=r"no 'weight'. It has nothing"):
        load_embedding({})
    with pytest.raises(ValueError, match=r"no 'weight'. It has a0, .*, \.\.\."):
        load_embedding({f"a{i}": np.zeros(1) for i in range(100)})
    del saved["wte.norm.bias"]
    with pytest.raises(ValueError, match=r"no 'wte.norm.bias'"):
        load_embedding(saved, key="wte")


def test_tensors_of_wrong_shapes_or_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(num_embeddings, features\), got \(4,\)"):
        load_embedding({"weight": np.zeros(4)})
    with pytest.raises(TypeError, match="floating point, got int8"):
        load_embedding({"weight": np.zeros((5, 4), np.int8)})
    with pytest.raises(ValueError, match=r"'norm.weight' must have the shape \(4,\).*got \(5,\)"):
        load_embedding(checkpoint(stable=False) | {"norm.weight": np.ones(5), "norm.bias": np.ones(5)})
    with pytest.raises(TypeError, match=r"got ndarray.*torch.load"):
        load_embedding(np.zeros((5, 4)))  # pyright: ignore[reportArgumentType]


def test_modules_and_parameters_that_do_not_fit_are_refused():
    plain, stable = (kind(5, 4, rngs=flax.nnx.Rngs(0)) for kind in (nnx.Embed, nnx.StableEmbed))
    with pytest.raises(ValueError, match="Use StableEmbed"):
        load_embedding(checkpoint(), into=plain)
    with pytest.raises(ValueError, match="Use StableEmbed"):
        load_embedding(checkpoint(), stable=False)
    with pytest.raises(ValueError, match="`stable` is False, but `into` is a StableEmbed"):
        load_embedding(checkpoint(), stable=False, into=stable)
    with pytest.raises(ValueError, match=r"of shape \(6, 4\), but `into` has \(5, 4\)"):
        load_embedding(checkpoint(shape=(6, 4)), into=stable)
    with pytest.raises(TypeError, match=r"got Linear"):
        load_embedding(checkpoint(), into=flax.nnx.Linear(5, 4, rngs=flax.nnx.Rngs(0)))  # pyright: ignore
    with pytest.raises(ValueError, match=r"got wte. Pass those"):
        dump_embedding({"wte": {"embedding": jnp.zeros((5, 4))}})
    with pytest.raises(ValueError, match=r"got embedding, norm, norm/scale"):
        dump_embedding({"embedding": jnp.zeros((5, 4)), "norm": {"scale": jnp.ones(4)}})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_live_module_of_bitsandbytes_gives_the_same_rows(dtype, live):
    import bitsandbytes
    import torch

    def to_torch(x):
        return (
            torch.from_numpy(x) if x.dtype != jnp.bfloat16 else torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        )

    theirs = bitsandbytes.nn.StableEmbedding(5, 4)
    with torch.no_grad():
        theirs.norm.weight.copy_(torch.arange(4) + 0.5)
        theirs.norm.bias.copy_(torch.arange(4) - 2.0)
    theirs.weight.data = theirs.weight.data.to(getattr(torch, dtype))
    params = load_embedding(theirs.state_dict())
    assert params["embedding"].dtype == dtype
    ours = linen.StableEmbed(5, 4, param_dtype=jnp.dtype(dtype)).apply({"params": params}, IDS)
    expected = theirs(torch.from_numpy(np.array(IDS))).detach().float().numpy()
    tolerance = 1e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=tolerance, atol=1e-6)

    before = {name: x.clone() for name, x in theirs.state_dict().items()}
    for x in theirs.state_dict().values():
        x.zero_()
    theirs.load_state_dict(dump_embedding(params, tensor=to_torch))
    assert all(torch.equal(x, before[name]) for name, x in theirs.state_dict().items())
