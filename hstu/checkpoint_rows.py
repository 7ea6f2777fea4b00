"""Rows of a checkpoint's tensors, read where they lie: memory is that of the rows asked for, not of a tensor.

Files are mapped and only what is asked for is copied. A block on disk is what ``torch.save`` writes; its head is
unpickled by ``torch.load(weights_only=True)`` without its data, and says where in the file the numbers are. As
everywhere in :mod:`hstu.checkpoint_dcp`, nothing that is read executes code.

Legend: V rows of a tensor, n rows asked for.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from hstu.checkpoint import Saved
from hstu.checkpoint_dcp import first_line, read_metadata
from hstu.errors import UserError

PART_BYTES = 8 * 2**20
"""Read at once; what is made of it (in float32, normalised, compressed) takes some times that."""


@dataclass(frozen=True)
class _Block:
    """A block of a tensor. offset, length: in bytes, of what ``torch.save`` wrote into ``file``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int


class _Mapped(mmap.mmap):
    """A mapped file, with the method by which torch reads."""

    def readinto(self, target: Any) -> int:
        found = self.read(len(target))
        target[: len(found)] = found
        return len(found)


class StoredRows:
    """Reads rows of tensors of a checkpoint; used in a ``with``.

    The files are opened at once, so that a checkpoint that is replaced meanwhile is read as it was.

    Args:
        prefix: names of the tensors begin with it.

    Raises UserError where the checkpoint cannot be read.
    """

    def __init__(self, saved: Saved, prefix: str = "") -> None:
        self.saved = saved
        self._blocks: dict[str, list[_Block]] = {}
        self._starts: dict[str, np.ndarray] = {}
        self._files: dict[str, _Mapped] = {}
        self._views: dict[_Block, np.ndarray] = {}
        self._opened = ExitStack()
        if saved.held is not None:
            return
        metadata = read_metadata(saved.path, saved.files)
        for name in (name for name in saved.sizes if name.startswith(prefix)):
            self._blocks[name] = _blocks(metadata, name)
            self._starts[name] = np.array([block.offsets[0] for block in self._blocks[name]])
        with ExitStack() as opened:
            for name in {block.file for blocks in self._blocks.values() for block in blocks}:
                self._files[name] = opened.enter_context(_mapped(saved.path / name))
            self._opened = opened.pop_all()

    def __enter__(self) -> StoredRows:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._views.clear()
        self._opened.close()

    def num_rows(self, name: str) -> int:
        """V; 1 of a tensor without dimensions."""
        size, _ = self.saved.sizes[name]
        return size[0] if size else 1

    def parts(self, name: str) -> Iterator[Tensor]:
        """The rows of a tensor in order, in parts [n, ...] of at most ``PART_BYTES``, or of one row."""
        size, dtype = self.saved.sizes[name]
        total = self.num_rows(name)
        step = rows_at_once(math.prod(size[1:]) * dtype.itemsize)
        for first in range(0, total, step):
            yield self.read(name, np.arange(first, min(first + step, total)))

    def read(self, name: str, rows: np.ndarray) -> Tensor:
        """[n, ...] in the tensor's dtype of rows [n] int64 in any order.

        Raises UserError where the checkpoint does not hold them.
        """
        if self.saved.held is not None:
            held = self.saved.held[name]
            return held[torch.from_numpy(rows)] if held.dim() else held[None]
        if len(rows) > 1 and not (np.diff(rows) > 0).all():
            once, places = np.unique(rows, return_inverse=True)
            return self.read(name, once)[torch.from_numpy(places)]
        size, dtype = self.saved.sizes[name]
        found = np.empty((len(rows), *size[1:], dtype.itemsize), dtype=np.uint8)
        scattered = len(rows) > 0 and rows[-1] - rows[0] >= len(rows)
        for file in self._files.values():  # scattered: without the pages around, which would be read in vain
            file.madvise(mmap.MADV_RANDOM if scattered else mmap.MADV_NORMAL)
        num_bytes = sum(self._copy(block, rows, found) for block in self._near(name, rows))
        for file in self._files.values():
            file.madvise(mmap.MADV_DONTNEED)  # else pages that were read count as this process's until it ends
        if num_bytes != found.nbytes:
            raise UserError(f"checkpoint {self.saved.path} cannot be read ({name} has no values for some rows)")
        return torch.from_numpy(found.reshape(-1)).view(dtype).view(len(rows), *size[1:])

    def _near(self, name: str, rows: np.ndarray) -> list[_Block]:
        """Blocks that may hold some of rows [n], ascending."""
        if len(rows) == 0 or not self._blocks[name]:
            return []
        starts, tallest = self._starts[name], max(block.sizes[0] for block in self._blocks[name])
        first = np.searchsorted(starts, rows[0] - tallest, side="right")
        return self._blocks[name][first : np.searchsorted(starts, rows[-1], side="right")]

    def _copy(self, block: _Block, rows: np.ndarray, target: np.ndarray) -> int:
        """Copies what ``block`` holds of rows [n], strictly ascending, into ``target``; returns the bytes."""
        first, stop = np.searchsorted(rows, (block.offsets[0], block.offsets[0] + block.sizes[0]))
        if first == stop:
            return 0
        own: Any = rows[first:stop] - block.offsets[0]
        if own[-1] - own[0] == len(own) - 1:
            own = slice(own[0], own[-1] + 1)
        inner = tuple(slice(o, o + s) for o, s in zip(block.offsets[1:], block.sizes[1:], strict=True))
        part = target[(slice(first, stop), *inner)]
        part[:] = self._view(block)[own]
        return part.nbytes

    def _view(self, block: _Block) -> np.ndarray:
        """The bytes [*sizes, bytes of a number] of a block, in the mapped file."""
        if block not in self._views:
            file = self._files[block.file]
            try:
                with FakeTensorMode():
                    stream: Any = _create_file_view(file, block.offset, block.length)  # type: ignore[arg-type]
                    head = torch.load(stream, map_location="cpu", weights_only=True)
                if (tuple(head.shape) or (1,), head.dtype) != (block.sizes, block.dtype):
                    raise ValueError(f"a block is {tuple(head.shape)} {head.dtype}, not {block.sizes} {block.dtype}")
                begin = block.offset + head.untyped_storage()._checkpoint_offset
                strides = [stride * head.itemsize for stride in head.stride() or (1,)]
                self._views[block] = np.ndarray(
                    (*block.sizes, head.itemsize), np.uint8, file,
                    begin + head.storage_offset() * head.itemsize, (*strides, 1),
                )  # fmt: skip
            except Exception as error:  # damaged pickles raise nearly anything
                raise UserError(f"checkpoint {self.saved.path} cannot be read ({first_line(error)})") from None
        return self._views[block]


def rows_at_once(row_bytes: int) -> int:
    """How many rows of ``row_bytes`` are read at once."""
    return max(1, PART_BYTES // max(1, row_bytes))


def _mapped(path: Path) -> _Mapped:
    """Read only. The file may be larger than memory."""
    with open(path, "rb") as file:
        return _Mapped(file.fileno(), 0, access=mmap.ACCESS_READ)


def _blocks(metadata: Metadata, name: str) -> list[_Block]:
    """Of a tensor, by their first rows; one without dimensions as if it had one."""
    tensor: Any = metadata.state_dict_metadata[name]
    found = []
    for chunk in tensor.chunks:
        info = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
        offsets, sizes = tuple(chunk.offsets) or (0,), tuple(chunk.sizes) or (1,)
        if info is not None and math.prod(sizes):
            found.append(_Block(offsets, sizes, tensor.properties.dtype, info.relative_path, info.offset, info.length))
    return sorted(found, key=lambda block: block.offsets)
