"""Tensors of a run in the format of torch.distributed.checkpoint: written and read by any number of ranks.

A tensor of the state is whole on every rank, or sharded (DTensor, ShardedTensor). Either way it becomes
:class:`Pieces`, blocks with their offsets, which DCP places: equal blocks of several ranks are written once, and what a
rank needs is read from whichever blocks hold it. Every file written has its size and checksum taken on the way.

Nothing that is read executes code: DCP's own metadata goes through an unpickler that knows its classes only, and
tensors through ``torch.load(weights_only=True)``. There is no other kind of data in the files.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hstu.errors import UserError

METADATA_FILE = ".metadata"
PIECE_BYTES = 64 * 2**20
"""A block on disk: what a reader holds beside its own tensors."""
READ_BYTES = 4 * 2**20
"""Read at once while a checksum is taken."""
_FILE_RESULT = "file:"
"""Begins the index of a write result that is a file's checksum and no tensor."""


# Tensors and their blocks

Block = tuple[str, tuple[int, ...]]
"""Name of a tensor and the offsets of one of its blocks."""


class Pieces:
    """What this rank holds of one tensor: blocks with their offsets. Has the methods by which DCP plans.

    Args:
        size: of the whole tensor.
        blocks: offsets and local tensor of each; several ranks may hold the same one.
    """

    def __init__(self, size: torch.Size, blocks: list[tuple[tuple[int, ...], Tensor]]) -> None:
        self._size, self.blocks = size, blocks
        self._by_offsets = dict(blocks)

    def size(self) -> torch.Size:
        return self._size

    def at(self, offsets: Any) -> Tensor:
        """The block that begins at ``offsets``."""
        return self._by_offsets[tuple(offsets)]

    def only(self, offsets: Collection[tuple[int, ...]]) -> Pieces:
        """The same with the blocks at ``offsets`` alone."""
        return Pieces(self._size, [(o, block) for o, block in self.blocks if o in offsets])

    def copied(self, into: dict[Block, Tensor], name: str) -> Pieces:
        """The same with blocks copied to the host, into the tensors that ``into`` holds from an earlier call.

        One of another shape or dtype is let go.
        """
        copies = []
        for offsets, block in self.blocks:
            held = into.get((name, offsets))
            if held is None or (held.shape, held.dtype) != (block.shape, block.dtype):
                held = torch.empty(block.shape, dtype=block.dtype, pin_memory=block.is_cuda)
                into[name, offsets] = held
            _copy(held, block.detach())
            copies.append((offsets, held))
        return Pieces(self._size, copies)

    def split(self, limit: int = PIECE_BYTES) -> Pieces:
        """The same with blocks of at most ``limit`` bytes (or one row), which are views."""
        small = []
        for offsets, block in self.blocks:
            if block.nbytes <= limit or not block.dim():
                small.append((offsets, block))
                continue
            step = max(1, limit * len(block) // block.nbytes)
            for first in range(0, len(block), step):
                small.append(((offsets[0] + first, *offsets[1:]), block[first : first + step]))
        return Pieces(self._size, small)

    def __create_write_items__(self, name: str, value: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(offsets), block.shape),
                    TensorProperties(dtype=block.dtype),
                    self._size,
                ),
            )
            for offsets, block in self.blocks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), block.shape) for offsets, block in self.blocks]


def _copy(target: Tensor, source: Tensor) -> None:
    """Piece by piece where the source is not contiguous, as it then passes through other memory of its GPU."""
    if source.is_contiguous():
        target.copy_(source, non_blocking=source.is_cuda)
        return
    rows = max(1, PIECE_BYTES * len(source) // source.nbytes)
    for ours, theirs in zip(target.split(rows), source.split(rows), strict=True):
        ours.copy_(theirs, non_blocking=source.is_cuda)


def pieces_of(value: Tensor) -> Pieces:
    """Blocks of ``value`` on this rank, without a copy: one for a plain tensor, the local ones of a sharded one."""
    if isinstance(value, ShardedTensor):
        local = [(tuple(s.metadata.shard_offsets), s.tensor) for s in value.local_shards()]
    elif hasattr(value, "__create_chunk_list__"):  # DTensor
        sharded = cast(Any, value)
        chunks = sharded.__create_chunk_list__()
        local = [
            (tuple(chunk.offsets), sharded.__get_tensor_shard__(MetadataIndex("", chunk.offsets, index)))
            for index, chunk in enumerate(chunks)
        ]
    else:
        local = [((0,) * value.dim(), value)]
    if math.prod(value.size()) > 0:  # a rank beyond the last row holds an empty block
        local = [(offsets, block) for offsets, block in local if block.numel() > 0]
    return Pieces(value.size(), [(offsets, block.detach()) for offsets, block in local])


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return cast(Pieces, self.state_dict[index.fqn]).at(index.offset)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is no tensor; a checkpoint holds nothing else")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return cast(Pieces, self.state_dict[index.fqn]).at(index.offset)


# Files and their checksums


@dataclass(frozen=True)
class FileSum:
    """Size and checksum of a file: enough to see that a disk or a copy damaged it, no protection against intent."""

    size: int
    crc32: int


def file_sum(path: Path) -> FileSum:
    """Of the file as it is now."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return FileSum(size, crc)


class _SummedStream(io.RawIOBase):
    """A file being written from its begin to its end."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.size, self.crc = file, 0, 0

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def fileno(self) -> int:
        self.file.flush()  # DCP takes the number for fsync
        return self.file.fileno()


class _SummedFiles(FileSystem):
    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:  # type: ignore[override]
        with open(path, mode) as file:
            stream = _SummedStream(cast(io.BufferedWriter, file))
            yield stream
        self.sums[Path(path).name] = FileSum(stream.size, stream.crc)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        os.replace(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Writer(FileSystemWriter):
    """Writes into a folder; rank 0 calls ``publish`` with the sums of the files of all ranks when all have written."""

    def __init__(self, folder: Path, publish: Callable[[dict[str, FileSum]], None]) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True)
        self.publish, self.files = publish, _SummedFiles()
        self.fs = self.files

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # no path: the folder is renamed, and may be copied

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        try:
            results = super().write_data(plan, planner).value()
        except RuntimeError as error:  # torch.save's own report of a failed write hides the OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        sums = [WriteResult(MetadataIndex(_FILE_RESULT + n), s.size, s.crc32) for n, s in self.files.sums.items()]
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, *sums])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        sums = {}
        for result in (r for of_rank in results for r in of_rank if r.index.fqn.startswith(_FILE_RESULT)):
            sums[result.index.fqn[len(_FILE_RESULT) :]] = FileSum(result.size_in_bytes, result.storage_data)
        written = [[r for r in of_rank if not r.index.fqn.startswith(_FILE_RESULT)] for of_rank in results]
        super().finish(metadata, written)
        self.publish(sums | self.files.sums)


def write(
    folder: Path,
    tensors: Mapping[str, Pieces],
    publish: Callable[[dict[str, FileSum]], None],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes tensors into ``folder``; all ranks of ``group`` take part (None: this process alone).

    publish: called on rank 0 when every rank's files and the metadata are on disk.

    Raises, on every rank, what went wrong on one: OSError where the disk is full.
    """
    state = {name: value.split() for name, value in tensors.items()}
    _quiet()
    try:
        dcp.save(
            cast(Any, state),
            storage_writer=_Writer(folder, publish),
            planner=_SavePlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        cause = _cause(error)
        if isinstance(cause, OSError) and cause.filename is None:
            cause = OSError(cause.errno, cause.strerror, str(folder))
        raise cause from None


def _quiet() -> None:
    """One rank without a process group is what was meant: DCP need not say so each time."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's failure: as it was where the command line knows it, else with the rank."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, OSError | UserError):
        return cause
    return RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}")


# Reading

_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                 "StorageMeta", "_MEM_FORMAT_ENCODING")
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata and torch's dtypes; anything else is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


def read_metadata(folder: Path, files: Collection[str]) -> Metadata:
    """What tensors ``folder`` holds, and where their blocks lie; ``files``: names of the files they may lie in.

    Raises UserError saying what is wrong with the metadata.
    """
    path = folder / METADATA_FILE
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        if not all(isinstance(value, TensorStorageMetadata) for value in metadata.state_dict_metadata.values()):
            raise ValueError("it holds values that are no tensors")
        foreign = {info.relative_path for info in metadata.storage_data.values()} - set(files)
        if foreign:
            raise ValueError(f"it names {min(foreign)}, which is not among the files of the checkpoint")
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{METADATA_FILE} cannot be read ({first_line(error)})") from None
    return metadata


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, files: Collection[str]) -> None:
        super().__init__(folder)
        self.folder, self.files = folder, files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(self.folder, self.files)


def read(folder: Path, files: Collection[str], targets: Mapping[str, Tensor]) -> None:
    """Reads tensors by name into ``targets``, in place: what this rank holds of them. Ranks need not wait for another.

    Raises UserError where a tensor is missing, has another size or cannot be read.
    """
    _quiet()
    try:
        dcp.load(
            cast(Any, {name: pieces_of(value) for name, value in targets.items()}),
            storage_reader=_Reader(folder, files),
            planner=_LoadPlanner(),
            no_dist=True,
        )
    except CheckpointException as error:
        raise UserError(f"checkpoint {folder} cannot be read ({first_line(_cause(error))})") from None


def first_line(error: BaseException) -> str:
    """Of its message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
