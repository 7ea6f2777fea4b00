"""Files of the safetensors format, written tensor by tensor from parts: the library itself wants all of them in memory.

A file is the length of the header (8 bytes, little endian), the header (JSON: dtype, shape, and place among the bytes
that follow, of each tensor by name) and the tensors' bytes. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""In the order in which the library writes them: wide ones first, so that the bytes of every tensor are aligned."""
_ALIGNMENT = 8
"""Of the first tensor; the header ends with as many spaces as that takes."""


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]],
    parts: Callable[[str], Iterable[Tensor]],
    about: Mapping[str, str],
) -> None:
    """Writes the file that ``safetensors.torch.save_file`` would.

    Args:
        tensors: shape and dtype by name.
        parts: the elements of a tensor by its name, in parts along its first dimension, in that dtype.
        about: metadata in the header.

    Raises ValueError for a dtype of another format, OSError where the disk is full.
    """
    rank = {dtype: number for number, dtype in enumerate(DTYPES)}
    foreign = [name for name, (_, dtype) in tensors.items() if dtype not in rank]
    if foreign:
        raise ValueError(f"{foreign[0]} is {tensors[foreign[0]][1]}: expected one of {', '.join(map(str, DTYPES))}")
    names = sorted(tensors, key=lambda name: (rank[tensors[name][1]], name))
    header: dict[str, object] = {"__metadata__": dict(about)}
    end = 0
    for name in names:
        shape, dtype = tensors[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in parts(name):
                assert part.dtype == tensors[name][1]
                file.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        written = file.tell() - 8 - len(text)
    if written != end:
        raise ValueError(f"the parts of {path.name} have {written:,} bytes, expected {end:,}")
