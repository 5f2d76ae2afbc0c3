"""Tensors of any library as numpy arrays, and those of a safetensors file.

A safetensors file: 8 bytes, little-endian, the length of the header; the header, JSON, from names to {dtype, shape,
data_offsets}; the bytes of all tensors. Format: github.com/huggingface/safetensors. torch is not needed.
"""

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def as_numpy(tensor: Any) -> np.ndarray:
    """A tensor of torch, or anything numpy takes, as a numpy array of the same dtype (bfloat16 too)."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has none, and torch does not know JAX's: exact through float32
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def open_tensors(source: Any) -> Mapping[str, Any]:
    """A state dict as it is, or the safetensors file of that path as one.

    Raises:
        TypeError: neither of them.
        ValueError: a file that is not in that format.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"expected a state dict or the path of a safetensors file, got {type(source).__name__}. A torch file "
            "(.pt, .bin) opens with torch.load(path, map_location='cpu', weights_only=True)."
        )
    return SafetensorsFile(source)


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of a file, by name; the file is mapped into memory, and read where a tensor is used."""

    def __init__(self, path: str | os.PathLike):
        self.path, size = os.fspath(path), os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"{self.path!r} is not a safetensors file: its header does not fit into it.")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise ValueError(f"{self.path!r} is not a safetensors file: its header is not JSON.") from error
        if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
            raise ValueError(f"{self.path!r} is not a safetensors file: its header does not name tensors.")
        self._start, self._size = 8 + length, size - 8 - length
        self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        try:
            dtype, shape, (start, end) = (entry[field] for field in ("dtype", "shape", "data_offsets"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path!r} is damaged: it says of {name!r} only {entry}.") from error
        if dtype not in DTYPES:
            raise ValueError(f"{name!r} in {self.path!r} has the dtype {dtype}; known are {', '.join(DTYPES)}.")
        itemsize = np.dtype(DTYPES[dtype]).itemsize
        if not 0 <= start <= end <= self._size or end - start != itemsize * prod(shape):
            raise ValueError(f"{self.path!r} is cut off or damaged: {name!r} has {shape} in bytes {start} to {end}.")
        if start == end:
            return np.zeros(shape, DTYPES[dtype])
        content = np.memmap(self.path, np.uint8, mode="r", offset=self._start + start, shape=(end - start,))
        return content.view(DTYPES[dtype]).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
