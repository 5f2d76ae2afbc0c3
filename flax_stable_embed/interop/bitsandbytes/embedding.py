"""Converts embeddings of torch and bitsandbytes to parameters of this library, and back.

    nn.Embedding, bnb.nn.Embedding   weight                            embedding
    bnb.nn.StableEmbedding           weight, norm.weight, norm.bias    embedding, norm/scale, norm/bias

The table has the shape (num_embeddings, features) on both sides, so nothing is transposed or rounded.
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
from ...optim.trees import Params
from .tensors import as_numpy, open_tensors

NORM = {"scale": "norm.weight", "bias": "norm.bias"}  # our names and torch's
SHOWN = 12  # names of tensors in an error


def load_embedding(
    source: Mapping[str, Any] | str | os.PathLike,
    *,
    key: str = "",
    stable: bool | None = None,
    into: modules.Embed | None = None,
) -> dict[str, Any]:
    """Loads an embedding of torch or bitsandbytes as parameters of `Embed` or `StableEmbed`.

    The table has the shape (num_embeddings, features) and keeps its dtype, including bfloat16. Scale and bias have the
    shape (features,) and become at least float32, as `StableEmbed` has them. Nothing is transposed, and a quantized
    table is refused.

    If you ask for a `StableEmbed` and the checkpoint has a plain `nn.Embedding`, the norm starts with scale 1 and bias
    0, and a warning says so. The rest of a pretrained model has never seen that norm, so it must be trained with it.

    Args:
        source: A state dict of torch tensors or numpy arrays, or the path of a safetensors file.
        key: The name of the embedding in the state dict, such as "transformer.wte". Leave it empty if the state dict is
            that of the embedding itself.
        stable: True for the parameters of a `StableEmbed`, False for those of an `Embed`. By default, `into` decides,
            or else whether the checkpoint has a norm.
        into: An NNX module whose parameters are replaced in place. They keep their dtypes and shardings. For Linen,
            use the returned dictionary instead.

    Returns:
        The parameters of the Linen module: {"embedding": table}, and {"norm": {"scale": ..., "bias": ...}} as well for
        a `StableEmbed`.

    Raises:
        ValueError: If a tensor is missing or has the wrong shape, or if the checkpoint has a norm and an `Embed` is
            asked for.
        TypeError: If `source`, `into` or the dtype of the table is not supported.

    >>> import numpy as np, flax_stable_embed as fse
    >>> saved = {"wte.weight": np.eye(3, 2), "wte.norm.weight": np.full(2, 0.5), "wte.norm.bias": np.zeros(2)}
    >>> params = load_embedding(saved, key="wte")
    >>> fse.linen.StableEmbed(3, 2).apply({"params": params}, jnp.array([0])).round(2)
    Array([[ 0.5, -0.5]], dtype=float32)
    """
    tensors, prefix = open_tensors(source), f"{key}." if key else ""
    if into is not None:
        if not isinstance(into, modules.Embed):
            raise TypeError(f"`into` must be an fse.nnx.Embed, got {type(into).__name__}. For Linen, leave it out.")
        if stable is not None and stable != hasattr(into, "norm"):
            raise ValueError(f"`stable` is {stable}, but `into` is a {type(into).__name__}. Leave one of them out.")
        stable = hasattr(into, "norm")
    table = as_numpy(_get(tensors, f"{prefix}weight"))
    if not jnp.issubdtype(table.dtype, jnp.floating):
        raise TypeError(f"'{prefix}weight' must be floating point, got {table.dtype}. Dequantize it first.")
    if table.ndim != 2:
        raise ValueError(f"'{prefix}weight' must have the shape (num_embeddings, features), got {table.shape}.")
    params: dict[str, Any] = {"embedding": table}
    has_norm = any(f"{prefix}{name}" in tensors for name in NORM.values())
    if stable is False and has_norm:
        raise ValueError(
            f"The checkpoint has '{prefix}norm.weight' or '{prefix}norm.bias', which an Embed does not have. The table "
            "was trained with that norm. Use StableEmbed."
        )
    if has_norm:
        params["norm"] = {ours: _norm(tensors, f"{prefix}{theirs}", table) for ours, theirs in NORM.items()}
    elif stable:
        warn(
            f"The checkpoint has no '{prefix}norm.weight' and '{prefix}norm.bias': it is of a plain embedding. The "
            "norm of StableEmbed starts with scale 1 and bias 0, and must be trained with the model.",
            stacklevel=2,
        )
        wide = at_least_float32(table.dtype)
        params["norm"] = {"scale": np.ones(table.shape[1], wide), "bias": np.zeros(table.shape[1], wide)}
    if into is not None:
        _fill(into, params)
    return jax.tree.map(jnp.array, params)  # copies: a training step may donate them


def dump_embedding(
    params: Params, *, key: str = "", tensor: Callable[[np.ndarray], Any] = lambda array: array
) -> dict[str, Any]:
    """Returns the state dict of torch's `nn.Embedding` or bitsandbytes' `StableEmbedding`.

    This is the inverse of `load_embedding`. Shapes and dtypes stay the same.

    Args:
        params: The parameters of a Linen `Embed` or `StableEmbed`, or an NNX module or its state.
        key: The name of the embedding in the state dict, such as "transformer.wte". Leave it empty for the state dict
            of the embedding itself.
        tensor: A function that turns a numpy array into a tensor, such as torch.from_numpy. That one does not accept
            JAX's bfloat16. For bfloat16 tables use lambda x: torch.from_numpy(x.view(numpy.int16)).view(torch.bfloat16)
            instead. By default the state dict has numpy arrays.

    Returns:
        A dictionary with "weight", and "norm.weight" and "norm.bias" as well for a `StableEmbed`, each with `key` and a
        dot in front.

    Raises:
        ValueError: If `params` are not the parameters of one embedding.

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
            "`params` must be the parameters of an Embed (embedding) or a StableEmbed (embedding, norm/scale, "
            f"norm/bias), got {', '.join(map(str, found)) or 'none'}. Pass those of one module, such as params['wte']."
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
        f"The checkpoint has no {name!r}. It has {', '.join(there[:SHOWN]) or 'nothing'}{more}. `key` must be the name "
        "in front of '.weight'."
    )


def _norm(tensors: Mapping[str, Any], name: str, table: np.ndarray) -> np.ndarray:
    vector = as_numpy(_get(tensors, name))
    if vector.shape != table.shape[1:]:
        raise ValueError(f"{name!r} must have the shape {table.shape[1:]} of a row of the table, got {vector.shape}.")
    return vector.astype(at_least_float32(vector.dtype))


def _fill(module: modules.Embed, params: dict[str, Any]) -> None:
    if module.embedding.shape != params["embedding"].shape:
        raise ValueError(
            f"The checkpoint has a table of shape {params['embedding'].shape}, but `into` has "
            f"{module.embedding.shape}. Build the module with the sizes of the checkpoint."
        )
    variables = [(module.embedding, params["embedding"])]
    if isinstance(module, modules.StableEmbed):
        variables += [(getattr(module.norm, name), array) for name, array in params["norm"].items()]
    for variable, array in variables:
        before = variable.get_raw_value()
        new = jnp.array(array, before.dtype)
        place = getattr(before, "sharding", None)
        variable.set_raw_value(new if place is None else jax.device_put(new, place))
