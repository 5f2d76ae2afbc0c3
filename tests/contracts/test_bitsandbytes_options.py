"""Tests every option of bitsandbytes' `StableEmbedding` and `Embedding`. Each test has the option's name there.

(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, device, dtype)

These tests check that each option exists in both APIs and has an effect. tests/golden checks the numbers.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_stable_embed as fse

IDS = jnp.array([1, 2, 2, 4])


class Linen:
    """A Linen module with its parameters, called as an NNX module is."""

    def __init__(self, module, *args, **options):
        self.module = module(*args, **options)
        self.params = self.module.init(jax.random.key(0), jnp.array([0]))["params"]

    @property
    def table(self):
        return self.params["embedding"]

    def loss(self, params, ids):
        return jnp.sum(self.module.apply({"params": params}, ids) ** 2)

    def __call__(self, ids):
        return self.module.apply({"params": self.params}, ids)

    def gradient(self, of=jax.value_and_grad):
        return of(self.loss)(self.params, IDS)[1]["embedding"]


class Nnx:
    """An NNX module, called in the same way."""

    def __init__(self, module, *args, **options):
        self.module = module(*args, **options, rngs=nnx.Rngs(0))

    @property
    def table(self):
        return self.module.embedding[...]

    def __call__(self, ids):
        return self.module(ids)

    def gradient(self, of=nnx.value_and_grad):
        grads = of(lambda module, ids: jnp.sum(module(ids) ** 2))(self.module, IDS)[1]
        return nnx.to_pure_dict(grads)["embedding"]


@pytest.fixture(params=["linen-Embed", "linen-StableEmbed", "nnx-Embed", "nnx-StableEmbed"])
def make(request):
    """`make(*args, **options)` builds a module of one API."""
    api, name = request.param.split("-")
    wrapper = {"linen": Linen, "nnx": Nnx}[api]
    module = getattr(getattr(fse, api), name)

    def make(*args, **options):
        return wrapper(module, *args, **options)

    make.normalizes, make.api = name == "StableEmbed", api
    return make


@pytest.mark.one_in(4)
def test_num_embeddings(make):
    assert make(7, 4).table.shape[0] == 7 and make(num_embeddings=9, features=4).table.shape[0] == 9


@pytest.mark.one_in(4)
def test_embedding_dim(make):
    """`embedding_dim` is `features` in Flax."""
    assert make(7, 4).table.shape[1] == 4 and make(7, features=6)(IDS).shape == (4, 6)


@pytest.mark.one_in(4)
def test_padding_idx(make):
    module = make(7, 4, padding_idx=-3)
    assert not module.table[4].any() and module.table[3].any()
    gradient = module.gradient()
    assert not gradient[4].any() and (gradient[1] != 0).any()


def test_max_norm(make):
    norms = jnp.linalg.norm(make(7, 4, max_norm=0.1)(jnp.arange(7)), axis=-1)
    if make.normalizes:  # rows are about as long as the root of epsilon, so shorter rows give shorter outputs
        np.testing.assert_array_less(norms, jnp.linalg.norm(make(7, 4)(jnp.arange(7)), axis=-1))
    else:
        np.testing.assert_allclose(norms, 0.1, rtol=1e-5)


def test_norm_type(make):
    rows = {p: make(7, 4, max_norm=0.1, norm_type=p)(jnp.arange(7)) for p in (1.0, 2.0, float("inf"))}
    if make.normalizes:
        assert len({float(x.sum().round(6)) for x in map(jnp.abs, rows.values())}) == 3
    else:
        for p, x in rows.items():
            np.testing.assert_allclose(jnp.linalg.norm(x, ord=p, axis=-1), 0.1, rtol=1e-5)


def test_scale_grad_by_freq(make):
    scaled, plain = make(7, 4, scale_grad_by_freq=True).gradient(), make(7, 4).gradient()
    np.testing.assert_allclose(scaled[2], plain[2] / 2, rtol=1e-6)  # id 2 appears twice
    np.testing.assert_allclose(scaled[1], plain[1], rtol=1e-6)


@pytest.mark.one_in(4)
def test_sparse(make):
    rows = make(7, 4, sparse=True).gradient(fse.row_value_and_grad)
    assert isinstance(rows, fse.SparseRows) and rows.indices[:3].tolist() == [1, 2, 4]
    np.testing.assert_allclose(rows.to_dense(), make(7, 4).gradient(), rtol=1e-6)
    tx, table = fse.row_sparse(optax.sgd(0.1)), make(7, 4).table
    updates, _ = tx.update({"embedding": rows}, tx.init({"embedding": table}), {"embedding": table})
    assert isinstance(updates["embedding"], fse.SparseRows)
    with pytest.raises(ValueError, match="`scale_grad_by_freq=True` does not work with a sparse gradient, as in torch"):
        make(7, 4, sparse=True, scale_grad_by_freq=True)


def test_weight(make):
    """`_weight` is `embedding_init=pretrained(table)`, or `from_pretrained` in NNX. Its padding row stays."""
    table = np.arange(28.0, dtype=np.float32).reshape(7, 4)
    np.testing.assert_array_equal(make(7, 4, padding_idx=1, embedding_init=fse.linen.pretrained(table)).table, table)
    if make.api == "nnx":
        module = fse.nnx.StableEmbed.from_pretrained(table, padding_idx=1, rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(module.embedding[...], table)


@pytest.mark.one_in(4)
def test_device(make):
    """`device` is JAX's `default_device`. With bitsandbytes' own `device=`, the table silently does not train."""
    device = jax.devices()[1]
    with jax.default_device(device):
        module = make(7, 4)
    assert module.table.devices() == {device} and module.gradient().any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.one_in(4)
def test_dtype(make, dtype):
    """`dtype` is `param_dtype`. The dtype of the result, by default the same, can be set on its own."""
    module = make(7, 4, param_dtype=dtype)
    assert module.table.dtype == module(IDS).dtype == dtype
    assert make(7, 4, param_dtype=dtype, dtype=jnp.float32)(IDS).dtype == jnp.float32


def test_every_option_has_a_test():
    options = [
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    ]
    for option in [*options, "weight", "device", "dtype"]:
        assert inspect.isfunction(globals()[f"test_{option}"])
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="compared with the installed one")
    there = [name.lstrip("_") for name in inspect.signature(bitsandbytes.nn.StableEmbedding).parameters]
    assert there == [*options, "weight", "device", "dtype"]
