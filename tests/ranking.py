"""What the tests of ranking share: a store with labels, actions and features of every kind, and small configs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hstu.config import Config, DataConfig, EvalConfig, HSTUConfig, OptimConfig, RunConfig
from hstu.config_ranking import ActionConfig, FeatureConfig, HeadConfig, RankingConfig, TaskConfig
from hstu.data.store import SequenceStore, write_store

NUM_ITEMS = 20
TASKS = {
    "click": TaskConfig("click"),
    "rating": TaskConfig("rating", kind="ordinal", levels=[1, 2, 3]),
    "watch": TaskConfig("watch_s", kind="regression", transform="log1p"),
}
ACTIONS = {
    "click": ActionConfig(),
    "rating": ActionConfig(kind="levels", levels=[1, 2, 3]),
    "watch_s": ActionConfig(kind="thresholds", thresholds=[5, 20]),
}
FEATURES = {
    "user_features": {"gender": FeatureConfig(), "age": FeatureConfig(kind="numeric")},
    "item_features": {"genres": FeatureConfig(separator="|"), "length_s": FeatureConfig(kind="buckets", num_buckets=3)},
    "event_features": {"tab": FeatureConfig(), "hour_of_day": FeatureConfig()},
}


def rich_store(path: Path, lengths=(5, 1, 9, 0, 3), seed: int = 0, **changes) -> SequenceStore:
    """Users with ``lengths`` events; columns click, rating (some missing), watch_s and tab (coded a, b, c)."""
    rng = np.random.default_rng(seed)
    num_users, num_events = len(lengths), int(sum(lengths))
    rating = rng.integers(1, 4, num_events).astype(np.float32)
    rating[rng.random(num_events) < 0.3] = np.nan
    values = {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "item_ids": rng.integers(1, NUM_ITEMS + 1, num_events),
        "timestamps": np.concatenate([np.sort(rng.integers(10**9, 10**9 + 10**6, n)) for n in lengths]),
        "meta": {"name": "rich"},
        "num_items": NUM_ITEMS,
        "columns": {
            "click": rng.integers(0, 2, num_events).astype(np.float32),
            "rating": rating,
            "watch_s": rng.integers(0, 60, num_events).astype(np.float32),
            "tab": rng.integers(0, 4, num_events).astype(np.int32),
        },
        "user_attributes": {
            "gender": rng.choice(["f", "m", ""], num_users),
            "age": rng.integers(10, 70, num_users).astype(np.float32),
        },
        "item_attributes": {
            "genres": rng.choice(["a", "b", "a|b", "a|b|c", ""], NUM_ITEMS),
            "length_s": rng.integers(10, 100, NUM_ITEMS).astype(np.float32),
        },
    } | changes
    store = write_store(path, **values)
    (path / "features").mkdir()
    np.save(path / "features" / "tab.npy", np.array(["a", "b", "c"]))
    return store


def ranking_config(form: str = "interleaved", **changes) -> RankingConfig:
    """All kinds of tasks, actions and features."""
    values = {"tasks": TASKS, "actions": ACTIONS, "targets": 3, "head": HeadConfig([8]), **FEATURES}
    return RankingConfig(form, **(values | changes))


def config_of(ranking: RankingConfig, max_len: int = 6, **changes) -> Config:
    """A small HSTU with ``ranking``; ``run_NAME`` and ``eval_NAME`` set fields of these groups."""
    run = {"loggers": [], "progress": False, "save_every_minutes": None, "log_every_steps": 1, "epochs": 2}
    evaluation = {"bootstrap": 0, "baselines": False, "batch_users": 4}
    run |= {k[4:]: v for k, v in changes.items() if k.startswith("run_")}
    evaluation |= {k[5:]: v for k, v in changes.items() if k.startswith("eval_")}
    rest = {k: v for k, v in changes.items() if not k.startswith(("run_", "eval_"))}
    model = HSTUConfig(dim=8, num_blocks=2, num_heads=2, qk_dim=4, v_dim=4, max_len=max_len, dropout=0.0)
    values = {
        "experiment": "toy",
        "data": DataConfig(name="toy", source="log"),
        "model": model,
        "optim": OptimConfig(lr=5e-3),
        "run": RunConfig(**run),
        "eval": EvalConfig(**evaluation),
        "ranking": ranking,
    }
    return Config(**(values | rest))


def with_columns(store: SequenceStore, path: Path, **columns: np.ndarray) -> SequenceStore:
    """A copy of a :func:`rich_store` with other event columns."""
    attributes = {
        "user_attributes": {n: store.user_attribute(n) for n in ("gender", "age")},
        "item_attributes": {n: store.item_attribute(n) for n in ("genres", "length_s")},
    }
    everything = {n: np.array(c) for n, c in store.columns.items()} | columns
    copy = write_store(
        path, offsets=store.offsets, item_ids=store.item_ids, timestamps=store.timestamps, meta=dict(store.meta),
        num_items=store.num_items, columns=everything, **attributes,
    )  # fmt: skip
    (path / "features").mkdir()
    np.save(path / "features" / "tab.npy", np.array(["a", "b", "c"]))
    return copy
