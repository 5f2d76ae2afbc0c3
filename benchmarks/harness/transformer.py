"""Defines a decoder that is sharded over a mesh as trainers do it: its shapes, its shardings and its loss.

The mesh axis "fsdp" shards the batch and one axis of every matrix. The axis "tensor" shards heads, hidden units and the
vocabulary; with size 1 it leaves plain FSDP. The loss works under meshes with Auto and with Explicit axes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

IN, OUT = P("fsdp", "tensor"), P("tensor", "fsdp")  # matrices that read from, or write to, the residual stream
LEAVES = ("out", "down", "embedding")  # parameters that are sharded as OUT


class Transformer(NamedTuple):
    """The sizes of the model. The number of hidden units is not a power of two."""

    width: int = 1024
    hidden: int = 2816
    head: int = 64
    layers: int = 4
    vocabulary: int = 32_000
    keys: int | None = None  # features of keys and of values; None: as many as queries have

    def shapes(self) -> dict[str, Any]:
        """Returns the shapes of the parameters, under the names that Flax uses."""
        square, few = (self.width, self.width), (self.width, self.keys or self.width)
        layer = {"query": square, "key": few, "value": few, "out": square}
        layer |= {"gate": (self.width, self.hidden), "up": (self.width, self.hidden), "down": (self.hidden, self.width)}
        block = {name: {"kernel": shape} for name, shape in layer.items()}
        block |= {name: {"scale": (self.width,)} for name in ("norm_1", "norm_2")}
        model = {f"layer_{i}": block for i in range(self.layers)} | {"norm": {"scale": (self.width,)}}
        model |= {"embedder": {"embedding": (self.vocabulary, self.width)}}
        model |= {"head": {"kernel": (self.width, self.vocabulary)}}
        is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
        return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), model, is_leaf=is_shape)

    def specs(self) -> dict[str, Any]:
        """Returns the partition spec of every parameter."""

        def spec(path, x):
            names = {key.key for key in path}
            return P() if len(x.shape) == 1 else OUT if names & set(LEAVES) else IN

        return jax.tree_util.tree_map_with_path(spec, self.shapes())

    def loss(self, params: Any, ids: jax.Array) -> jax.Array:
        """Returns the loss of predicting each id from the ids before it, computed in bfloat16."""
        x = _rows(params["embedder"]["embedding"], ids)
        for i in range(self.layers):
            layer = params[f"layer_{i}"]
            h = _normalized(x, layer["norm_1"])
            heads = (*ids.shape, -1, self.head)
            q, k, v = (
                _placed(_linear(h, layer[name], IN).reshape(heads), P("fsdp", None, "tensor", None))
                for name in ("query", "key", "value")
            )
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + _linear(mixed.reshape(*ids.shape, -1), layer["out"], OUT)
            h = _normalized(x, layer["norm_2"])
            hidden = jax.nn.silu(_linear(h, layer["gate"], IN)) * _linear(h, layer["up"], IN)
            x = x + _linear(hidden, layer["down"], OUT)
        logits = _linear(_normalized(x, params["norm"]), params["head"], IN)[:, :-1].astype(jnp.float32)
        targets = _placed(jax.nn.one_hot(ids[:, 1:], self.vocabulary), P("fsdp", None, "tensor"))
        return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * targets, -1))


def _is_explicit() -> bool:
    return jax.sharding.get_abstract_mesh().axis_types[0] is AxisType.Explicit


def _placed(x, spec):
    return jax.sharding.reshard(x, spec) if _is_explicit() else jax.lax.with_sharding_constraint(x, spec)


def _linear(x, layer, spec):
    """Returns `x @ kernel`. The kernel is gathered over "fsdp" where it is used."""
    kernel = _placed(layer["kernel"].astype(jnp.bfloat16), P(*(None if name == "fsdp" else name for name in spec)))
    out = P("fsdp", None, "tensor" if spec == IN else None)
    y = jnp.einsum("btd,df->btf", x, kernel, **({"out_sharding": out} if _is_explicit() else {}))
    return _placed(y, out)


def _rows(table, ids):
    table, out = _placed(table.astype(jnp.bfloat16), P()), P("fsdp", None, None)
    return table.at[ids].get(out_sharding=out) if _is_explicit() else _placed(table[ids], out)


def _normalized(x, norm):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
    return (y * norm["scale"][None, None]).astype(jnp.bfloat16)
