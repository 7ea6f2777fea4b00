"""Checkpoints of a run: one folder a step and ``best/``, whole or not at all, written beside the training.

    checkpoints/step-000000123/   .metadata and __<rank>_0.distcp: tensors (torch.distributed.checkpoint),
                                  values.json: what is no tensor, manifest.json: size and checksum of each file
    checkpoints/best/             the same, of the model alone

A checkpoint is written into ``<name>.partial`` and renamed when all ranks have written and all is on disk. Reading
begins by comparing every file with the manifest; a newest checkpoint that is damaged is passed over for the one before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hstu import checkpoint_v1
from hstu.checkpoint_dcp import (
    METADATA_FILE,
    Block,
    FileSum,
    Pieces,
    file_sum,
    pieces_of,
    read,
    read_metadata,
    write,
)
from hstu.distributed import World, same_gpu
from hstu.errors import UserError

FORMAT = 2
BEST = "best"
MANIFEST = "manifest.json"
VALUES = "values.json"
PATIENCE = timedelta(hours=12)
"""How long a rank that has written waits for the others; one that ends is noticed at once."""
_STEP = re.compile(r"step-(\d{9})(\.pt)?")
_PARTIAL, _REPLACED, _REMOVED, _DAMAGED = ".partial", ".replaced", ".removed", ".damaged"


@dataclass
class State:
    """What a checkpoint holds.

    Attributes:
        tensors: by name; plain ones that are equal on all ranks, or sharded ones. A name of one rank alone is fine.
        values: what JSON can hold; that of rank 0 is kept.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)


# Writing


class Saver:
    """Writes the checkpoints of one run, and removes all but the last ``keep_last`` and the best.

    Every rank has one and calls its methods in the same order. A save copies to the host what this rank writes and
    returns; a thread then writes. A tensor that several ranks hold is copied and written by one of them. Steps and the
    best share the memory of the copies, so that the next save of either kind first waits for the one before.

    Args:
        folder: ``checkpoints`` of the run; what a crash left there is cleared away.
        background: False: a save returns when it is on disk.
    """

    def __init__(self, folder: Path, keep_last: int, world: World | None = None, background: bool = True) -> None:
        self.folder, self.keep_last, self.background = folder, keep_last, background
        self.world = world or World.current()
        # Of its own: the thread's collectives must not meet those of the training.
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.world.size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=same_gpu())
        self._running: Future[None] | None = None
        self._copies: dict[Block, Tensor] = {}
        self._held: dict[str, dict[Block, int]] = {}
        """Blocks of this rank in the last save of each kind, with their bytes."""
        self._writers: dict[Block, int] = {}
        if self.world.is_first:
            _clear_leftovers(folder)
        self.world.barrier()

    def save(self, state: State, step: int) -> None:
        """Begins ``step-<step>``. Raises OSError where the save before it met a full disk; older ones are untouched."""
        self._begin(f"step-{step:09d}", state)

    def save_best(self, state: State) -> None:
        """Begins ``best``, in place of an earlier one."""
        self._begin(BEST, state)

    def wait(self) -> None:
        """Returns when everything begun is on disk. Raises what went wrong in the background."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Ends the thread when what is begun is written, and the group of its ranks; raises nothing.

        The saver cannot be used again. A second call does nothing.
        """
        self._thread.shutdown(wait=True)
        self._running = None
        self._copies.clear()
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None

    def _begin(self, name: str, state: State) -> None:
        self.wait()
        kind = BEST if name == BEST else "step"
        tensors = self._of_this_rank(kind, {key: pieces_of(value) for key, value in state.tensors.items()})
        if not self.background:
            self._write(name, tensors, state.values)
            return
        devices = {block.device for value in tensors.values() for _, block in value.blocks if block.is_cuda}
        tensors = {key: value.copied(self._copies, key) for key, value in tensors.items()}
        for device in devices:
            torch.cuda.synchronize(device)
        self._running = self._thread.submit(self._write, name, tensors, dict(state.values))

    def _of_this_rank(self, kind: str, tensors: dict[str, Pieces]) -> dict[str, Pieces]:
        """With the blocks alone that this rank writes. The ranks tell each other theirs where some have new ones."""
        if self.group is None:
            return tensors
        held = {(name, offsets): block.nbytes for name, value in tensors.items() for offsets, block in value.blocks}
        changed = torch.tensor(int(held != self._held.get(kind)))
        dist.all_reduce(changed, dist.ReduceOp.MAX, group=self.group)
        if changed:
            everyone: list[Any] = [None] * self.world.size
            dist.all_gather_object(everyone, held, group=self.group)
            self._held[kind] = held
            self._writers |= writers(everyone, self._writers)
        rank = self.world.rank
        return {
            name: value.only({offsets for offsets, _ in value.blocks if self._writers[name, offsets] == rank})
            for name, value in tensors.items()
        }

    def _write(self, name: str, tensors: Mapping[str, Pieces], values: dict[str, Any]) -> None:
        target, partial = self.folder / name, self.folder / (name + _PARTIAL)

        def publish(sums: dict[str, FileSum]) -> None:
            elsewhere = [name for name in sums if not (partial / name).exists()]
            if elsewhere:
                raise UserError(
                    f"{self.folder}: {elsewhere[0]} of another rank is not there; expected a folder that all ranks "
                    "share: set run.dir to one"
                )
            _write_json(partial / VALUES, values)
            sums[VALUES] = file_sum(partial / VALUES)
            manifest = {"format": FORMAT, "ranks": self.world.size, "files": {n: asdict(s) for n, s in sums.items()}}
            _write_json(partial / MANIFEST, manifest)
            _sync(partial)
            _replace(partial, target)
            for old in steps(self.folder)[: -self.keep_last] + [self.folder / "best.pt"] * (name == BEST):
                _remove(old)

        try:
            write(partial, tensors, publish, self.group)
        except BaseException:
            if self.world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def writers(held: Sequence[Mapping[Block, int]], before: Mapping[Block, int] | None = None) -> dict[Block, int]:
    """Rank that writes each block: of those that hold it the one with the fewest bytes so far, large blocks first.

    held: bytes of the blocks of each rank. before: an earlier answer, which is kept where that rank still holds the
    block. What leaves no choice is counted first.
    """
    holders: dict[Block, list[int]] = {}
    sizes: dict[Block, int] = {}
    for rank, blocks in enumerate(held):
        for block, size in blocks.items():
            holders.setdefault(block, []).append(rank)
            sizes[block] = size
    for block, rank in (before or {}).items():
        if rank in holders.get(block, ()):
            holders[block] = [rank]
    found, load = {}, [0] * len(held)
    for block in sorted(holders, key=lambda b: (len(holders[b]) > 1, -sizes[b], b)):
        found[block] = min(holders[block], key=lambda rank: (load[rank], rank))
        load[found[block]] += sizes[block]
    return found


def _write_json(path: Path, values: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Names in ``folder`` are on disk when this returns."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _replace(partial: Path, target: Path) -> None:
    """Renames ``partial``. Where ``target`` is there, a crash between the steps leaves one of the two to be found."""
    replaced = target.with_name(target.name + _REPLACED)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
    os.rename(partial, target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(path: Path) -> None:
    """Renamed first: nothing half removed is taken for a checkpoint."""
    if path.is_file():
        path.unlink()
    elif path.is_dir():
        removed = path.with_name(path.name + _REMOVED)
        os.rename(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Removes what was being written or removed, and puts back what was being replaced, when a run was ended."""
    for path in list(folder.glob("*")) if folder.is_dir() else []:
        target = path.with_name(path.stem)
        if path.suffix == _REPLACED and not target.exists():
            os.rename(path, target)
        elif path.suffix in (_PARTIAL, _REPLACED, _REMOVED):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


# Reading


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are what was written.

    Attributes:
        sizes: shape and dtype of each tensor, by name.
        ranks: number of ranks that wrote it.
    """

    path: Path
    values: dict[str, Any]
    sizes: dict[str, tuple[torch.Size, torch.dtype]]
    ranks: int = 1
    files: frozenset[str] = frozenset()
    held: dict[str, Tensor] | None = None
    """Of a file of an earlier release, which is read at once."""

    def read(self, targets: Mapping[str, Tensor], world: World | None = None) -> None:
        """Reads tensors by name into ``targets``, in place, whatever number of ranks wrote them.

        world: ranks that read, each what it holds of whole or sharded targets; None: this process alone.

        Raises UserError, on every rank, where a tensor is missing, has another size, or cannot be read.
        """
        problem = ""
        try:
            self._read(targets)
        except UserError as error:
            problem = str(error)
        problems = [p for p in (world or World()).gather_objects(problem) if p]
        if problems:
            raise UserError(problems[0])

    def check(self, targets: Mapping[str, Tensor]) -> None:
        """Raises UserError where a tensor is missing or has another size than the one of its name in ``targets``."""
        for name, target in targets.items():
            if name not in self.sizes or self.sizes[name][0] != target.size():
                found = f"of shape {tuple(self.sizes[name][0])}" if name in self.sizes else "missing"
                raise UserError(
                    f"checkpoint {self.path}: {name} is {found}, expected shape {tuple(target.size())}: "
                    "it is of another model"
                )

    def _read(self, targets: Mapping[str, Tensor]) -> None:
        self.check(targets)
        if self.held is None:
            read(self.path, self.files, targets)
            return
        for name, target in targets.items():
            with torch.no_grad():
                target.copy_(self.held[name])

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Those whose names begin with ``prefix``, whole, on the CPU; by the rest of their names."""
        names = [name for name in self.sizes if name.startswith(prefix)]
        found = {n: torch.empty(self.sizes[n][0], dtype=self.sizes[n][1]) for n in names}
        self.read(found)
        return {name[len(prefix) :]: value for name, value in found.items()}


def steps(folder: Path) -> list[Path]:
    """Step checkpoints, oldest first, whole or damaged."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _STEP.fullmatch(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a step checkpoint."""
    found = _STEP.fullmatch(path.name)
    assert found is not None
    return int(found.group(1))


def load(path: Path, world: World | None = None) -> Saved:
    """Opens one checkpoint. world: ranks that share the work of checking its files; None: this process alone.

    Raises UserError where it is missing, of another format, or damaged: which file, and what is wrong.
    """
    if not path.exists():
        old = path.with_name("best.pt")
        if path.name != BEST or not old.exists():
            raise UserError(f"no checkpoint at {path}: the run has not saved one yet")
        path = old
    found, problem = _open(path, world or World())
    if found is None:
        mend = ": take which=last, or another run" if path.stem == BEST else ""
        raise UserError(f"checkpoint {path} is damaged ({problem}){mend}")
    return found


def load_last(folder: Path, world: World | None = None, set_aside: bool = False) -> Saved | None:
    """The newest step checkpoint that is not damaged, the same on all ranks; None where there is none at all.

    A damaged one is passed over, and rank 0 says so. set_aside: rename it, so that it is not counted as one to keep.

    Raises UserError where all are damaged.
    """
    world = world or World()
    names = world.gather_objects([path.name for path in reversed(steps(folder))])[0]
    damaged: dict[str, str] = {}
    for name in names:
        found, problem = _open(folder / name, world)
        if found is None:
            damaged[name] = f"checkpoint {folder / name} is damaged ({problem})"
            continue
        if damaged and world.is_first:
            print(f"warning: {'; '.join(damaged.values())}; going back to step {step_of(found.path)}", file=sys.stderr)
            for other in damaged if set_aside else ():
                _replace(folder / other, folder / (other + _DAMAGED))
        return found
    if damaged:
        raise UserError(f"{'; '.join(damaged.values())}; no older one is left: remove {folder} to start the run anew")
    return None


def _open(path: Path, world: World) -> tuple[Saved | None, str]:
    """The checkpoint, or None and what is wrong with it. Raises UserError for the format of another release."""
    if path.is_file():
        try:
            held, held_values = checkpoint_v1.read(path)
        except UserError as error:
            return None, str(error)
        return Saved(path, held_values, {n: (t.size(), t.dtype) for n, t in held.items()}, held=held), ""
    manifest, problem = _read_manifest(path)
    files = {name: FileSum(**entry) for name, entry in manifest.get("files", {}).items()}
    share = sorted(files)[world.rank :: world.size]
    problem = problem or next((p for name in share if (p := _compare(path / name, files[name]))), "")
    values: dict[str, Any] = {}
    sizes: dict[str, tuple[torch.Size, torch.dtype]] = {}
    if not problem:
        try:
            values = json.loads((path / VALUES).read_text(encoding="utf-8"))
            metadata: Any = read_metadata(path, files).state_dict_metadata
            sizes = {n: (m.size, m.properties.dtype) for n, m in metadata.items()}
        except (OSError, ValueError) as error:  # UserError is a ValueError
            problem = str(error)
    problems = [p for p in world.gather_objects(problem) if p]
    if problems:
        return None, problems[0]
    return Saved(path, values, sizes, int(manifest["ranks"]), frozenset(files)), ""


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest, or {} and what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        is_known = manifest["format"] == FORMAT
        if is_known:
            missing = {VALUES, METADATA_FILE} - set(manifest["files"])
            foreign = [name for name in manifest["files"] if Path(name).name != name]
            if missing or foreign or not isinstance(manifest["ranks"], int):
                return {}, f"{MANIFEST} is not one of a checkpoint"
            for entry in manifest["files"].values():
                FileSum(**entry)
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, f"{MANIFEST} cannot be read"
    if not is_known:
        raise UserError(
            f"checkpoint {path} has format {manifest['format']}, expected {FORMAT}: use the release that wrote it"
        )
    return manifest, ""


def _compare(path: Path, expected: FileSum) -> str:
    """What is wrong with a file, or nothing."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != expected.size:
        return f"{path.name} has {size:,} bytes, expected {expected.size:,}"
    found = file_sum(path)
    if found != expected:
        return f"{path.name} has checksum {found.crc32:08x}, expected {expected.crc32:08x}"
    return ""
