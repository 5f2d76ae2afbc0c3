"""Embeddings of torch and bitsandbytes as parameters of ours, and back.

    nn.Embedding, bnb.nn.Embedding   weight                            embedding
    bnb.nn.StableEmbedding           weight, norm.weight, norm.bias    embedding, norm/scale, norm/bias

Both tables are (num_embeddings, features): nothing is transposed and nothing rounded.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any
from warnings import warn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ... import nnx as modules
from ...ops.dtypes import at_least_float32
from ...optim.boxes import unbox
from .tensors import as_numpy, open_tensors

NORM = {"scale": "norm.weight", "bias": "norm.bias"}


SHOWN = 12  # names of tensors in an error


def load_embedding(
    source: Mapping[str, Any] | str | os.PathLike,
    *,
    key: str = "",
    stable: bool | None = None,
    into: modules.Embed | None = None,
) -> dict[str, Any]:
    """The parameters of a Linen `Embed` or `StableEmbed` from a checkpoint of torch; of an NNX module, in place.

    The table keeps its dtype, bfloat16 too; scale and bias become at least float32, as `StableEmbed` has them.

    Where the checkpoint is of a plain `nn.Embedding` and a `StableEmbed` is asked for, the norm begins with scale 1 and
    bias 0, and a warning says so: a pretrained model does not know that norm and must be trained with it.

    Args:
        source: a state dict of torch tensors or numpy arrays, or the path of a safetensors file.
        key: the name of the embedding in it ("transformer.wte"); "" where the state dict is the embedding's own.
        stable: whether a norm is asked for. None for what the checkpoint has, or what `into` is.
        into: an NNX module whose parameters are set, in their own dtypes and on their devices.

    Returns:
        {"embedding": table} and with a norm {"norm": {"scale": ..., "bias": ...}}.

    Raises:
        ValueError: a tensor is missing or of the wrong shape; the checkpoint has a norm that is not asked for.
        TypeError: `source` or the table is of the wrong kind.

    >>> import numpy as np, flax_stable_embed as fse
    >>> saved = {"wte.weight": np.eye(3, 2), "wte.norm.weight": np.full(2, 0.5), "wte.norm.bias": np.zeros(2)}
    >>> params = load_embedding(saved, key="wte")
    >>> fse.linen.StableEmbed(3, 2).apply({"params": params}, jnp.array([0])).round(2)
    Array([[ 0.5, -0.5]], dtype=float32)
    """
    tensors, prefix = open_tensors(source), f"{key}." if key else ""
    if into is not None:
        if not isinstance(into, modules.Embed):
            raise TypeError(f"`into` must be an Embed of fse.nnx, got {type(into).__name__}; for Linen leave it out.")
        if stable is not None and stable != hasattr(into, "norm"):
            raise ValueError(f"`stable` is {stable}, but `into` is {type(into).__name__}. Leave one of them out.")
        stable = hasattr(into, "norm")
    table = as_numpy(_get(tensors, f"{prefix}weight"))
    if not jnp.issubdtype(table.dtype, jnp.floating):
        raise TypeError(f"{prefix}weight must be floating point, got {table.dtype}; dequantize it first.")
    if table.ndim != 2:
        raise ValueError(f"{prefix}weight must be of shape (num_embeddings, features), got {table.shape}.")
    params: dict[str, Any] = {"embedding": table}
    has_norm = any(f"{prefix}{name}" in tensors for name in NORM.values())
    if stable is False and has_norm:
        raise ValueError(
            f"the checkpoint has {prefix}norm.weight or {prefix}norm.bias, for which an Embed has no place and without "
            "which its table means something else. Use StableEmbed."
        )
    if has_norm:
        params["norm"] = {ours: _norm(tensors, f"{prefix}{theirs}", table) for ours, theirs in NORM.items()}
    elif stable:
        warn(
            f"the checkpoint has no {prefix}norm.weight and {prefix}norm.bias: it is of a plain embedding. The norm of "
            "StableEmbed begins with scale 1 and bias 0, and must be trained with the model.",
            stacklevel=2,
        )
        wide = at_least_float32(table.dtype)
        params["norm"] = {"scale": np.ones(table.shape[1], wide), "bias": np.zeros(table.shape[1], wide)}
    if into is not None:
        _fill(into, params)
    return jax.tree.map(jnp.array, params)  # copies: a training step may donate them


def dump_embedding(
    params: Any, *, key: str = "", tensor: Callable[[np.ndarray], Any] = lambda array: array
) -> dict[str, Any]:
    """The state dict of `nn.Embedding` or `StableEmbedding`: the inverse of `load_embedding`.

    Args:
        params: the parameters of a Linen `Embed` or `StableEmbed`, or an NNX module or its state.
        key: the name of the embedding in the state dict.
        tensor: makes a tensor of a numpy array: torch.from_numpy, which does not take JAX's bfloat16: there
            lambda x: torch.from_numpy(x.view(numpy.int16)).view(torch.bfloat16).

    Raises:
        ValueError: parameters of something else.

    >>> import flax_stable_embed as fse
    >>> module = fse.nnx.StableEmbed(3, 2, rngs=nnx.Rngs(0))
    >>> {name: x.shape for name, x in dump_embedding(module, key="wte").items()}
    {'wte.weight': (3, 2), 'wte.norm.weight': (2,), 'wte.norm.bias': (2,)}
    """
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    params = params.get("params", params)
    norm = params.get("norm", {})
    found = [*params, *(f"norm/{name}" for name in norm)]
    if set(found) not in ({"embedding"}, {"embedding", "norm", "norm/scale", "norm/bias"}):
        raise ValueError(
            "`params` must be those of an Embed (embedding) or a StableEmbed (embedding, norm/scale, norm/bias), got "
            f"{', '.join(map(str, found)) or 'none'}. Give it those of the one module, such as params['wte']."
        )
    prefix = f"{key}." if key else ""
    arrays = {"weight": params["embedding"]} | {theirs: norm[ours] for ours, theirs in NORM.items() if norm}
    return {f"{prefix}{name}": tensor(np.array(unbox(array))) for name, array in arrays.items()}


def _get(tensors: Mapping[str, Any], name: str) -> Any:
    if name in tensors:
        return tensors[name]
    tail = name.rsplit(".", 1)[-1]
    there = sorted(tensors, key=lambda other: not other.endswith(tail))  # the likely ones first
    more = ", ..." if len(there) > SHOWN else ""
    raise ValueError(
        f"the checkpoint has no {name!r}. It has {', '.join(there[:SHOWN]) or 'nothing'}{more}. `key` is what comes "
        "before '.weight'."
    )


def _norm(tensors: Mapping[str, Any], name: str, table: np.ndarray) -> np.ndarray:
    vector = as_numpy(_get(tensors, name))
    if vector.shape != table.shape[1:]:
        raise ValueError(f"{name} must be of shape {table.shape[1:]}, as a row of the table, got {vector.shape}.")
    return vector.astype(at_least_float32(vector.dtype))


def _fill(module: modules.Embed, params: dict[str, Any]) -> None:
    if module.embedding.shape != params["embedding"].shape:
        raise ValueError(
            f"the checkpoint has a table of shape {params['embedding'].shape}, but `into` has {module.embedding.shape}."
        )
    variables = [(module.embedding, params["embedding"])]
    if isinstance(module, modules.StableEmbed):
        variables += [(getattr(module.norm, name), array) for name, array in params["norm"].items()]
    for variable, array in variables:
        before = variable.get_raw_value()
        new = jnp.array(array, before.dtype)
        place = getattr(before, "sharding", None)
        variable.set_raw_value(new if place is None else jax.device_put(new, place))
