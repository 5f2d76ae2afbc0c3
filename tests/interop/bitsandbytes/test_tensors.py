"""Tests reading of safetensors files and of torch's tensors."""

import numpy as np
import pytest

from flax_stable_embed.interop.bitsandbytes.embedding import load_embedding
from flax_stable_embed.interop.bitsandbytes.tensors import SafetensorsFile, as_numpy
from tests.interop.bitsandbytes.embeddings import assert_same, checkpoint, write_safetensors
from tests.interop.bitsandbytes.tools import live as live


def test_files_of_the_safetensors_library_are_read(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    tensors = checkpoint("wte")
    library.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(dict(SafetensorsFile(tmp_path / "model.safetensors")), tensors)


def test_damaged_safetensors_files_are_refused(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", checkpoint())
    content = path.read_bytes()
    for length, message in ((4, "header is longer"), (20, "header is longer"), (len(content) - 8, "truncated")):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=message):
            load_embedding(path)
    damaged = {"[]": "does not name tensors", '{"weight": 1}': "does not name tensors", '{"weight": {}}': "is damaged"}
    for header, message in damaged.items():
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
        with pytest.raises(ValueError, match=message):
            load_embedding(path)
    path.write_bytes((2).to_bytes(8, "little") + b"no header")
    with pytest.raises(ValueError, match="its header is not JSON"):
        load_embedding(path)
    path.write_bytes(content.replace(b'"F32"', b'"F8!"'))
    with pytest.raises(ValueError, match=r"the dtype F8!. Known dtypes are F64, F32"):
        load_embedding(path)
    with pytest.raises(FileNotFoundError):
        load_embedding(tmp_path / "none.safetensors")


def test_tensors_of_torch_become_arrays_of_the_same_bits(live):
    import torch

    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8):
        tensor = torch.arange(10).to(dtype).requires_grad_(dtype.is_floating_point)
        array = as_numpy(tensor)
        assert array.dtype.name == str(dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(int), np.arange(10))
