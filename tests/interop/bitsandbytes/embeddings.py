"""Helpers for tests of embeddings: checkpoints of random numbers and files in the safetensors format."""

import json

import numpy as np

from flax_stable_embed.interop.bitsandbytes.tensors import DTYPES


def checkpoint(key="", dtype=np.float32, stable=True, shape=(5, 4)):
    """A state dict with random numbers."""
    rng, prefix = np.random.default_rng(0), f"{key}." if key else ""
    tensors = {"weight": rng.normal(size=shape).astype(dtype)}
    if stable:
        tensors |= {f"norm.{name}": rng.normal(size=shape[1]).astype(dtype) for name in ("weight", "bias")}
    return {f"{prefix}{name}": x for name, x in tensors.items()}


def write_safetensors(path, tensors, metadata=None):
    """Writes the format by hand: the length of the header, the header, the bytes."""
    names, header, content = {np.dtype(dtype): name for name, dtype in DTYPES.items()}, {}, b""
    for name, x in tensors.items():
        offsets = [len(content), len(content) + x.nbytes]
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        content += x.tobytes()
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert np.asarray(x).tobytes() == np.asarray(b[name]).tobytes(), name
