"""Reads tensors of torch and of safetensors files as numpy arrays. torch does not have to be installed.

A safetensors file has three parts: 8 bytes with the length of the header as a little-endian integer; the header, JSON
that maps names to {dtype, shape, data_offsets}; the bytes of all tensors.
Format: https://github.com/huggingface/safetensors
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
    """Returns a tensor of torch, or anything numpy accepts, as a numpy array of the same dtype, including bfloat16."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # torch cannot export it to numpy; float32 holds it exactly
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def open_tensors(source: Any) -> Mapping[str, Any]:
    """Returns `source` itself if it is a state dict, or the tensors of the safetensors file at that path.

    Raises:
        TypeError: If `source` is neither a mapping nor a path.
        ValueError: If the file is not a safetensors file.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"`source` must be a state dict or the path of a safetensors file, got {type(source).__name__}. Open a "
            "torch file (.pt, .bin) with torch.load(path, map_location='cpu', weights_only=True)."
        )
    return SafetensorsFile(source)


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of a file by name. The file is memory-mapped, so a tensor is read only when it is used."""

    def __init__(self, path: str | os.PathLike):
        self.path, size = os.fspath(path), os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"{self.path!r} is not a safetensors file: its header is longer than the file.")
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
            raise ValueError(f"{self.path!r} is damaged: its header describes {name!r} by {entry} only.") from error
        if dtype not in DTYPES:
            raise ValueError(f"{name!r} in {self.path!r} has the dtype {dtype}. Known dtypes are {', '.join(DTYPES)}.")
        itemsize = np.dtype(DTYPES[dtype]).itemsize
        if not 0 <= start <= end <= self._size or end - start != itemsize * prod(shape):
            raise ValueError(f"{self.path!r} is truncated or damaged: {name!r} has {shape} in bytes {start} to {end}.")
        if start == end:
            return np.zeros(shape, DTYPES[dtype])
        content = np.memmap(self.path, np.uint8, mode="r", offset=self._start + start, shape=(end - start,))
        return content.view(DTYPES[dtype]).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
