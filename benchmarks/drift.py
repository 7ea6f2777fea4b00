"""A log in which items come and go, streamed day by day with a row for each item, hashed rows and managed rows.

    python -m benchmarks.drift folder=drift-runs [rows=200] [days=16] [seeds=[0,1]] [ids=[exact,hash,managed]]

Every day ``new`` items appear and as many are given up; an item lives ``live / new`` days. What a user takes next is,
with probability ``follow``, what follows the last item in a fixed order, else any item of the day. Printed as a table
for docs/log.md: means over days, each model having trained on the days before, of the first event of every user.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from hstu.config import Config, DataConfig, EvalConfig, HSTUConfig, LossConfig, OptimConfig, RunConfig, build
from hstu.config_embedding import EmbeddingConfig
from hstu.config_stream import StreamConfig
from hstu.report import read_json
from hstu.stream_train import stream_train

DAY_S = 86_400
START = 1_772_323_200
"""2026-03-01, UTC."""


@dataclass
class Drift:
    """The log and what is tried on it."""

    folder: str
    days: int = 16
    users: int = 600
    events: int = 8
    """Of a user on a day."""
    live: int = 150
    """Items of a day."""
    new: int = 50
    """Of these, how many were not there the day before."""
    follow: float = 0.7
    rows: int = 200
    evict_every: int = 1
    policy: str = "lru"
    seed: int = 0
    seeds: list[int] | None = None
    ids: list[str] | None = None

    @property
    def num_items(self) -> int:
        return self.live + self.new * (self.days - 1)


def write_log(drift: Drift, path: Path) -> Path:
    """user,item,timestamp as CSV; raw ids of items say nothing of when they live."""
    rng = np.random.default_rng(drift.seed)
    names = rng.permutation(drift.num_items) + 1
    lines, last = ["user,item,timestamp"], np.full(drift.users, -1)
    for day in range(drift.days):
        first, stop = day * drift.new, day * drift.new + drift.live
        for event in range(drift.events):
            drawn = rng.integers(first, stop, drift.users)
            follows = (rng.random(drift.users) < drift.follow) & (last >= first) & (last + 1 < stop)
            last = np.where(follows, last + 1, drawn)
            times = START + day * DAY_S + event * 3600 + rng.integers(0, 3600, drift.users)
            lines += [f"{u},{names[i]},{t}" for u, (i, t) in enumerate(zip(last, times, strict=True))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_config(drift: Drift, ids: str, seed: int) -> Config:
    """A small HSTU on the log, whose item table is as ``ids`` says."""
    folder = Path(drift.folder)
    raw = folder / "raw" / "log.csv"
    if not raw.exists():
        write_log(drift, raw)
    rows = None if ids == "exact" else drift.rows
    return Config(
        experiment=f"drift-{ids}", seed=seed,
        data=DataConfig(name="log", source="log", raw=str(raw), root=str(folder / "data")),
        model=HSTUConfig(dim=32, num_blocks=1, num_heads=1, qk_dim=32, v_dim=32, max_len=20, dropout=0.1),
        loss=LossConfig(num_negatives=64),
        optim=OptimConfig(lr=3e-3),
        embedding=EmbeddingConfig(ids=ids, policy=drift.policy, evict_every=drift.evict_every,
                                  optimizer="rowwise_adagrad", lr=0.05, rows=rows),
        eval=EvalConfig(ks=[10], bootstrap=0, filter_history="none"),
        run=RunConfig(dir=str(folder / f"{ids}-{seed}"), batch_users=64, loggers=[], progress=False, threads=1,
                      save_every_minutes=None, log_every_steps=5),
    )  # fmt: skip


def measure(drift: Drift, ids: str, seed: int) -> dict[str, Any]:
    """Mean next-day metrics, of all days and of the second half, and of the map where there is one."""
    config, start = make_config(drift, ids, seed), time.perf_counter()
    folder = stream_train(config, StreamConfig(eval_users=0))
    days = read_json(folder / "days.json", "run it again")["days"]
    late = [day for day in days[drift.days // 2 :] if day.get("targets")]
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in logged if "oov_labels" in line and "kind" not in line]
    found: dict[str, Any] = {"ids": ids, "seed": seed}
    result = read_json(folder / "result.json", "run it again")["next_day"]
    for name in ("hr@10", "mrr"):
        found[name] = result[name]
        found[f"{name} late"] = float(np.mean([day[name] for day in late]))
    for name in ("oov_inputs", "oov_labels"):
        found[name] = float(np.mean([line[name] for line in steps])) if steps else None
        found[f"{name} next day"] = float(np.mean([d[name] for d in late])) if steps else None
    found["evictions"] = steps[-1]["evictions"] if steps else None
    found["seconds"] = time.perf_counter() - start
    return found


def main() -> None:
    """Prints one row of Markdown for each kind of ids and each seed."""
    values = OmegaConf.to_container(OmegaConf.from_dotlist(sys.argv[1:]))
    assert isinstance(values, dict)
    drift = build(Drift, {str(k): v for k, v in values.items()}, "")
    print(f"{drift.num_items} items, {drift.live} alive on a day, {drift.rows} rows, policy {drift.policy}")
    for seed in drift.seeds or [0]:
        for ids in drift.ids or ["exact", "hash", "managed"]:
            found = measure(drift, ids, seed)
            if ids == "exact" and seed == (drift.seeds or [0])[0]:
                print("| " + " | ".join(found) + " |")
            print("| " + " | ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in found.values()) + " |")


if __name__ == "__main__":
    main()
