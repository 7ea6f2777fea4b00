"""The safetensors format: the library reads what was written in parts, which is the file that it would write."""

import json

import pytest
import torch

from hstu.safetensors_file import DTYPES, write_safetensors

library = pytest.importorskip("safetensors.torch")


def tensors_of_all_dtypes():
    found = {}
    for number, dtype in enumerate(DTYPES):
        found[f"z.{number}"] = (torch.arange(15) % 2).reshape(5, 3).to(dtype)
        found[f"a.{number}"] = torch.ones((), dtype=dtype)
    return {**found, "none": torch.empty(0, 4), "odd.Ä": torch.tensor([float("nan"), -0.0, float("inf")])}


def write(path, tensors, about, rows=2):
    sizes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    write_safetensors(path, sizes, lambda name: tensors[name].split(rows) if tensors[name].dim() else [tensors[name]],
                      about)  # fmt: skip


def test_it_is_the_file_of_the_library(tmp_path):
    tensors = tensors_of_all_dtypes()
    for about in ({}, {"run": "größe"}):  # the library gives several entries any order
        write(tmp_path / "ours", tensors, about)
        library.save_file(tensors, tmp_path / "theirs", metadata=about)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_library_reads_every_bit(tmp_path):
    tensors = tensors_of_all_dtypes()
    write(tmp_path / "file", tensors, {"format": "pt", "run": "a"})
    found = library.load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    with library.safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt", "run": "a"}
        assert torch.equal(file.get_slice("z.0")[1:3], tensors["z.0"][1:3])


def test_the_header_by_hand(tmp_path):
    write(tmp_path / "file", {"b": torch.ones(2, dtype=torch.int8), "a": torch.tensor([3])}, {"k": "v"})
    content = (tmp_path / "file").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0 and json.loads(content[8 : 8 + size]) == {
        "__metadata__": {"k": "v"},
        "a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "b": {"dtype": "I8", "shape": [2], "data_offsets": [8, 10]},
    }
    assert content[8 + size :] == b"\x03" + bytes(7) + b"\x01\x01"


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"c is torch.complex64: expected one of torch.int64"):
        write(tmp_path / "file", {"c": torch.ones(1, dtype=torch.complex64)}, {})
    sizes = {"a": (torch.Size([4]), torch.float32)}
    with pytest.raises(ValueError, match=r"the parts of file have 12 bytes, expected 16"):
        write_safetensors(tmp_path / "file", sizes, lambda name: [torch.ones(3)], {})
