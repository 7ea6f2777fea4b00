"""The run folder: where it is, what describes the run in it, and how a run is loaded again."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import nn

from hstu import checkpoint, report
from hstu.checkpoint_state import restore_model
from hstu.config import Config, OptimConfig, from_dict, to_dict
from hstu.config_embedding import KINDS, EmbeddingConfig
from hstu.data.ranking import RankingData
from hstu.data.store import SequenceStore
from hstu.distributed import World
from hstu.errors import UserError, one_of

FREE_ON_RESUME = {"dir", "epochs", "progress", "loggers", "log_every_steps", "keep_last", "threads",
                  "save_every_steps", "save_every_minutes", "save_every_epochs", "save_in_background",
                  "ranks", "dense", "max_restarts", "timeout_s", "stop_patience_s"}  # fmt: skip
"""Fields of ``run`` that may differ between a run and its continuation."""
FREE_EMBEDDING = {"kind", "sharding", "tables", "hbm_gib", "ddr_gib", "pipeline"}
"""Fields of ``embedding`` that may: where the rows lie and when they travel, not how they learn."""


LOCAL_FIELDS = {"run.dir", "run.threads", "run.ranks", "data.root", "data.raw"}
"""Options that may differ between the machines of a run. The first rank's folder is everyone's."""


def run_folder(config: Config) -> Path:
    """``run.dir``, or a new ``runs/<experiment>/<UTC time>-seed<seed>``."""
    if config.run.dir is not None:
        return Path(config.run.dir).expanduser()
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = stamp if config.seeds or config.variants else f"{stamp}-seed{config.seed}"
    folder, count = Path("runs") / config.experiment / name, 1
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=False)  # taken from here on, also for a command beside this one
            return folder
        except FileExistsError:
            count += 1
            folder = folder.with_name(f"{name}-{count}")


LOCK_PATIENCE_S = 120.0
"""How long a restarted run waits for the lock of its dead first rank: NFS keeps that 90 s after a machine is lost."""
LOCK_INTERVAL_S = 1.0


def lock_folder(folder: Path, patience_s: float = 0.0) -> IO[str]:
    """Holds the run folder for this process until the file returned is closed.

    patience_s: how long to wait for another process that has it.

    Raises UserError where another one has it, or where the file system cannot lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = time.monotonic() + patience_s
    file = open(folder / ".lock", "w", encoding="utf-8")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() < limit:
                time.sleep(LOCK_INTERVAL_S)
                continue
            problem = f"{folder} is being trained by another process: wait for it or take another run.dir"
        except OSError as error:
            problem = (
                f"{folder} cannot be locked ({error.strerror}): expected a file system with flock; mount it with "
                "locks, or take a run.dir on another one"
            )
        file.close()
        raise UserError(problem)


def describe(folder: Path, config: Config, store: SequenceStore, extra: dict[str, Any], ranks: int = 1) -> None:
    """Writes ``config.yaml`` and ``environment.json``, or checks that they are those of the run being resumed.

    ranks: how many train it. Raises UserError where the folder holds a run of another config or of another split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment_path = folder / "environment.json"
    if (folder / "config.yaml").exists():
        check_same(read_config(folder), config, folder)
        if environment_path.exists():
            old = report.read_json(environment_path, "delete the run folder").get("split_hash")
            if old != store.meta.get("split_hash"):
                raise UserError(
                    f"{folder} was trained on split {old}, the store {store.path} holds "
                    f"{store.meta.get('split_hash')}: take another run.dir"
                )
    environment = {
        "versions": report.versions(),
        "machine": report.machine(),
        "commit": report.commit(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "split_hash": store.meta.get("split_hash"),
        "store": str(store.path.resolve()),
        **extra,
    }
    if environment_path.exists():  # what began the run stays; a continuation is added
        begun = report.read_json(environment_path, "delete the run folder")
        now = {key: environment[key] for key in ("versions", "machine", "commit", "threads", "ranks")}
        last = (begun.get("resumed") or [begun])[-1]
        if any(last.get(key) != value for key, value in now.items()):
            begun["resumed"] = [*begun.get("resumed", []), now]
        environment = begun
    report.write_json(environment_path, environment)
    partial = folder / ".config.yaml.partial"
    partial.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    partial.replace(folder / "config.yaml")


def note_store(folder: Path, store: SequenceStore) -> None:
    """From now on the run is loaded with ``store``: a stream that builds one for each day goes on to the next."""
    path = folder / "environment.json"
    environment = report.read_json(path, "delete the run folder")
    latest = {"store": str(store.path.resolve()), "split_hash": store.meta.get("split_hash")}
    if latest != {name: environment.get("latest", environment).get(name) for name in latest}:
        report.write_json(path, {**environment, "latest": latest})


def agree_on_run(world: World, config: Config, store: SequenceStore) -> None:
    """Raises UserError, on all ranks, where they run other code, another config or other data than the first."""
    if world.size == 1:
        return
    here = {"code": source_hash(), "torch": torch.__version__}
    values = {name: value for name, value in flatten(to_dict(config)).items() if name not in LOCAL_FIELDS}
    data = {"split": store.meta.get("split_hash"), "users": store.num_users, "events": store.num_events}
    world.agree({**here, **values, **{f"data: {name}": value for name, value in data.items()}})


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def source_hash() -> str:
    """Of all Python files of this installation, in hex; short."""
    digest = hashlib.sha256()
    for package in ("hstu", "kernels"):
        root = Path(__file__).resolve().parents[1] / package
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def read_config(folder: Path) -> Config:
    """The resolved config of a run."""
    path = folder / "config.yaml"
    if not path.is_file():
        near = sorted(p.parent for p in folder.glob("**/config.yaml"))[:3] if folder.is_dir() else []
        hint = "did you mean " + " or ".join(map(str, near)) if near else "expected a folder written by hstu-train"
        raise UserError(f"run={folder}: no config.yaml there; {hint}")
    return from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def check_same(old: Config, new: Config, folder: Path) -> None:
    """Raises UserError naming the first field that a resumed run may not change."""
    old_values, new_values = to_dict(old), to_dict(new)
    free = {f"run.{k}" for k in FREE_ON_RESUME} | {f"embedding.{k}" for k in FREE_EMBEDDING}
    for group in ("seed", "data", "model", "ranking", "loss", "optim", "embedding", "run", "eval"):
        pairs = [(group, old_values[group], new_values[group])]
        if isinstance(old_values[group], dict) and isinstance(new_values[group], dict):
            keys = sorted(set(old_values[group]) | set(new_values[group]))
            pairs = [(f"{group}.{k}", old_values[group].get(k), new_values[group].get(k)) for k in keys]
        for name, a, b in pairs:
            if a != b and name not in free:
                raise UserError(
                    f"{folder} holds a run with {name}={a!r}, now {b!r}: take another run.dir to start anew"
                )


def open_store(config: Config, world: World | None = None) -> SequenceStore:
    """The prepared store of the config's data; prepares it where it is missing.

    On several ranks the first prepares while the others wait; then, for machines that do not share its disk, the first
    of each machine; then all open it.
    """
    from hstu.prepare import prepare

    world = world or World()
    store: SequenceStore | None = None
    for turn in (world.is_first, world.local_rank == 0, True):
        if turn and store is None:
            store = prepare(config.data)
        world.barrier()
    assert store is not None
    return store


def open_run(
    folder: str | Path, which: str = "best", world: World | None = None
) -> tuple[Config, SequenceStore, checkpoint.Saved]:
    """Config, store and checkpoint of a run folder; its tensors are not read yet.

    Args:
        folder: run folder.
        which: ``best`` (by validation, or by test with run.selection=reference) or ``last``.
        world: ranks that open it together; None: this process alone.

    Raises:
        UserError: no run there, no checkpoint yet or a damaged one, or a store that is gone.
    """
    folder, world = Path(folder).expanduser(), world or World()
    if which not in ("best", "last"):
        raise UserError(f"which={which}: expected best or last")
    config = read_config(folder)
    environment = report.read_json(folder / "environment.json", f"train {folder} first")
    environment.update(environment.get("latest", {}))
    stored = Path(str(environment.get("store", "")))
    is_there = all(world.gather_objects((stored / "meta.json").exists()))
    store = SequenceStore.open(stored) if is_there else open_store(config, world)
    if store.meta.get("split_hash") != environment.get("split_hash"):
        raise UserError(
            f"{folder} was trained on split {environment.get('split_hash')}, {store.path} holds "
            f"{store.meta.get('split_hash')}: prepare the data as it was"
        )
    checkpoints = folder / "checkpoints"
    best = which == "best"
    saved = checkpoint.load(checkpoints / checkpoint.BEST, world) if best else checkpoint.load_last(checkpoints, world)
    if saved is None:
        raise UserError(f"no checkpoint in {checkpoints}: the run has not saved one yet")
    return config, store, saved


def load_run(
    folder: str | Path, which: str = "best", world: World | None = None, kind: str | None = None
) -> tuple[Config, SequenceStore, Any]:
    """Config, store and trained model (in evaluation mode) of a run folder.

    A model with local tables is on the CPU, whose memory has to hold them; one whose tables are sharded is where the
    ranks compute.

    Args:
        folder, which, world: see :func:`open_run`.
        kind: ``embedding.kind`` of the model; None: that of the run on several ranks, local on one.

    Raises:
        UserError: as of :func:`open_run`, or tables that cannot be sharded.
    """
    from hstu.problem import build_model

    world = world or World()
    config, store, saved = open_run(folder, which, world)
    laid = _to_serve(config, kind or (config.embedding.kind if world.size > 1 else "local"), world.device)
    model: nn.Module = build_model(laid, store)
    if laid.embedding.kind == "sharded":
        from hstu.sharded.tables import shard

        shard(model.to(world.device), laid, world, initial=False)
    restore_model(saved, model, world)
    return config, store, model.eval()


def empty_model(config: Config, store: SequenceStore) -> nn.Module:
    """The model that :func:`load_run` fills, with local tables, on torch's meta device: names and sizes alone.

    Of managed rows the map is on the CPU.
    """
    from hstu.problem import build_model

    data = None if config.ranking is None else RankingData(store, config.ranking)
    with torch.device("meta"):
        return build_model(_to_serve(config, "local", torch.device("cpu")), store, data)


def _to_serve(config: Config, kind: str, device: torch.device) -> Config:
    """The config with tables of ``kind`` that do not learn: without the state of an optimizer, and as exact as saved.

    Raises UserError for another kind, or a model that cannot have it.
    """
    one_of("embedding", kind, KINDS)
    if kind == "local":
        kept = ("ids", "rows", "policy", "policy_decay", "evict_every")
        embedding = EmbeddingConfig(**{name: getattr(config.embedding, name) for name in kept})
    else:
        dtype = config.embedding.dtype
        if dtype == "bfloat16" and device.type == "cpu":  # where fbgemm has it not
            dtype = "float32"
        embedding = dataclasses.replace(
            config.embedding, kind=kind, optimizer="sgd", lr=None, dtype=dtype, comm_dtype="float32", pipeline=False
        )
    return dataclasses.replace(config, embedding=embedding, optim=OptimConfig())
