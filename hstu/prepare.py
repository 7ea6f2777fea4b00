"""hstu-prepare: a raw log becomes a sequence store. ``hstu-prepare data=ml-1m``"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from hstu.cli import command, run_hydra
from hstu.config import DataConfig, build
from hstu.data.store import SCHEMA_VERSION, SequenceStore, new_store
from hstu.errors import UserError

_WHERE_ONLY = ("root", "raw", "url", "checksum", "expected", "memory_mib")
"""Fields of DataConfig that say where the data comes from and how it is worked on, not what becomes of it."""


def prepare(config: DataConfig, quiet: bool = False) -> SequenceStore:
    """The sequence store of ``config``, prepared unless it is already there.

    Needs the network only where neither a store nor raw files are found. quiet: no progress bars.
    """
    started = time.perf_counter()
    stores = Path(config.root).expanduser() / "stores"
    settings = _settings_key(config)
    if config.source == "synthetic":
        from hstu.data.synthetic import write_synthetic_store

        path = stores / f"{config.name}-{settings}"
        if not (path / "meta.json").exists():
            write_synthetic_store(config, path)
        return SequenceStore.open(path)

    if config.source == "amazon-2014" and config.category is None:
        raise UserError("data.category is not set: give the category as in ratings_CATEGORY.csv, e.g. Books")
    from hstu.data.sources import fetch_raw, local_raw

    raw = local_raw(config)
    if raw is None:
        finished = _finished_store(stores, config.name, settings)
        if finished is not None:
            return SequenceStore.open(finished)
        raw = fetch_raw(config, quiet)
    from hstu.data.importers import importer

    files = importer(config).files(config, raw)
    path = stores / f"{config.name}-{_store_key(settings, files)}"
    if (path / "meta.json").exists():
        return SequenceStore.open(path)
    _write(config, files, path, settings, started, quiet)
    return SequenceStore.open(path)


def _settings_key(config: DataConfig) -> str:
    """Hash of every setting that determines the content, apart from the raw files."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in _WHERE_ONLY}
    if config.source != "synthetic":
        values = {k: v for k, v in values.items() if k not in ("num_users", "num_items", "synthetic_seed")}
    if config.shards is None:
        del values["shards"]
    return _hash([SCHEMA_VERSION, values])


def _store_key(settings: str, files: list[Path]) -> str:
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _hash([settings, stats])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _finished_store(stores: Path, name: str, settings: str) -> Path | None:
    """The newest finished store of these settings, for when the raw files are gone."""
    found = []
    for meta_path in stores.glob(f"{name}-*/meta.json"):
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        if meta.get("settings_key") == settings and meta.get("schema_version") == SCHEMA_VERSION:
            found.append((meta_path.stat().st_mtime, meta_path.parent))
    return max(found)[1] if found else None


def _write(config: DataConfig, files: list[Path], path: Path, settings: str, started: float, quiet: bool) -> None:
    from hstu.data.build import build_store
    from hstu.data.importers import importer
    from hstu.data.sharded_build import build_shards
    from hstu.data.sharded_store import finish_shards
    from hstu.data.sources import file_digest
    from hstu.data.stages import Stages
    from hstu.data.tables import Rejects

    with new_store(path) as writer, ThreadPoolExecutor(1) as pool:
        digests: list[Future[str]] = [pool.submit(file_digest, file) for file in files]
        try:
            rejects = Rejects(writer.folder / "rejects.csv", config.on_bad_row)
            raw_files = importer(config).describe(config, files)
            if config.shards is None:
                built = build_store(raw_files, config, writer, rejects)
            else:
                built = build_shards(raw_files, config, writer, rejects, Stages(quiet))
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            if "No space left" in str(error):  # polars has no error class for it
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise
        counts = {"items": built.num_items, "items_with_events": built.num_rated}
        raw: list[dict[str, Any]] = [
            {"file": file.name, "bytes": file.stat().st_size, "sha256": digest.result()}
            for file, digest in zip(files, digests, strict=True)
        ]
        finish = writer.finish if config.shards is None else partial(finish_shards, writer, config.shards)
        finish(
            {
                "name": config.name,
                "source": config.source,
                "raw": raw,
                "checksum": "sha256:" + _hash_texts([r["sha256"] for r in raw]),
                "counts": counts,
                "protocol": config.protocol,
                "protocol_seed": config.protocol_seed,
                "split": {"kind": config.split, "time": config.split_time},
                "filters": {
                    name: getattr(config, name)
                    for name in (
                        "min_user_events",
                        "min_item_events",
                        "filter_mode",
                        "dedup",
                        "max_events",
                        "max_items",
                    )
                },
                "rows_read": built.num_rows + rejects.count,
                "rejects": rejects.reasons,
                "removed": {k: v for k, v in built.removed.items() if v},
                "notes": _notes(config, raw_files.notes),
                "published": _compare(config, {**counts, "users": built.num_users, "events": built.num_events}),
                "settings_key": settings,
                "settings": dataclasses.asdict(config),
                "seconds": round(time.perf_counter() - started, 2),
            }
        )


def _hash_texts(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _notes(config: DataConfig, notes: list[str]) -> list[str]:
    label = {"ml-1m": "ML-1M", "ml-100k": "ML-100K"}.get(config.name, config.name)
    return [f"{label}, {note}" for note in notes]


def _compare(config: DataConfig, counts: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Published counts beside the ones found."""
    unknown = sorted(set(config.expected) - set(counts))
    if unknown:
        raise UserError(f"data.expected.{unknown[0]}: expected one of {', '.join(sorted(counts))}")
    return {
        name: {"expected": value, "found": counts[name], "agrees": counts[name] == value}
        for name, value in config.expected.items()
    }


def print_summary(store: SequenceStore, seconds: float) -> None:
    """The table that hstu-prepare ends with."""
    from rich.console import Console
    from rich.table import Table

    meta = store.meta
    published = meta.get("published", {})
    table = Table(title=f"{meta['name']} ({meta['protocol']} protocol)", show_edge=False)
    table.add_column("")
    table.add_column("here", justify="right")
    table.add_column("published", justify="right")
    table.add_column("agrees")
    for name in ("users", "items", "items_with_events", "events"):
        if name not in meta["counts"]:
            continue
        there = published.get(name)
        verdict = "" if there is None else "yes" if there["agrees"] else "[bold red]NO[/]"
        expected = "" if there is None else f"{there['expected']:,}"
        table.add_row(name.replace("_", " "), f"{meta['counts'][name]:,}", expected, verdict)
    console = Console()
    console.print(table)
    for note in meta.get("notes", []):
        console.print(f"note: {note}", style="yellow", markup=False)
    if any(not entry["agrees"] for entry in published.values()):
        text = "COUNTS DIFFER from the published ones: a subset, another filter or another version of the raw files"
        console.print(text, style="bold red")
    if "shards" in meta:
        events = [entry["events"] for entry in meta["shards"]]
        console.print(f"{len(events)} shards of {min(events):,} to {max(events):,} events")
    for what, number in meta.get("removed", {}).items():
        console.print(f"removed by {what}: {number:,} events")
    rejects = meta.get("rejects", {})
    if rejects:
        console.print(
            f"rejected rows: {sum(rejects.values()):,}, listed in {store.path / 'rejects.csv'}", style="yellow"
        )
        for reason, number in sorted(rejects.items(), key=lambda pair: -pair[1]):
            console.print(f"  {number:,} x {reason}", markup=False)
    console.print(f"split hash {meta['split_hash']}   {seconds:.1f} s   {store.path}", markup=False)


def _task(cfg: Any) -> None:
    from omegaconf import OmegaConf

    started = time.perf_counter()
    values = OmegaConf.to_container(cfg.data, resolve=True)
    store = prepare(build(DataConfig, values, "data."))  # type: ignore[arg-type]
    print_summary(store, time.perf_counter() - started)


@command
def main() -> None:
    """Console script hstu-prepare."""
    run_hydra(_task, "prepare")


if __name__ == "__main__":
    main()
