"""What the tests of evaluation and recommendation share: a small store, a model, brute-force ranks."""

import dataclasses
import sys
import types

import numpy as np
import torch

from hstu.config import Config, DataConfig, EvalConfig, HSTUConfig, RunConfig
from hstu.data.store import write_store
from hstu.model.retrieval import RetrievalModel

NUM_ITEMS = 30
TITLES = np.array([f"Film {i} (19{i:02d})" for i in range(1, NUM_ITEMS + 1)])


def small_store(path, lengths=(12, 3, 2, 7, 1, 0, 40), seed=0, **more):
    """Users 1000, 1001, ... with ``lengths`` events on items with raw ids 11, 12, ... and titles."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = [np.sort(rng.integers(1_000_000, 3_000_000, n)) for n in lengths]
    values = {
        "offsets": offsets,
        "item_ids": rng.integers(1, NUM_ITEMS + 1, offsets[-1]),
        "timestamps": np.concatenate(times),
        "meta": {"name": "small", "protocol": "reference"},
        "user_raw_ids": np.arange(1000, 1000 + len(lengths)),
        "item_raw_ids": np.arange(11, 11 + NUM_ITEMS),
        "item_attributes": {"title": TITLES},
        "num_items": NUM_ITEMS,
    }
    return write_store(path, **{**values, **more})


def small_config(**eval_values):
    model = HSTUConfig(dim=8, num_blocks=1, num_heads=2, qk_dim=4, v_dim=4, max_len=10)
    values = {"ks": [1, 10], "batch_users": 3, "bootstrap": 20} | eval_values
    data = DataConfig(name="small", source="log")
    return Config(experiment="small", data=data, model=model, eval=EvalConfig(**values), run=RunConfig())


def small_model(config, store, seed=0):
    torch.manual_seed(seed)
    return RetrievalModel(config.model, store.num_items)


def brute_rank(scores, target, seen):
    """Rank by the rule of PROTOCOL section 4, one candidate at a time; ``scores`` maps item to score."""
    rank = 1.0
    for item, score in scores.items():
        if item != target and item not in seen:
            rank += 1.0 if score > scores[target] else 0.5 if score == scores[target] else 0.0
    return rank


def seen_items(store, user, row, filter_history, max_len):
    first = int(store.offsets[user])
    start = {"full": first, "truncated": max(first, row - max_len), "none": row}[filter_history]
    return set(np.asarray(store.item_ids[start:row]).tolist())


def fake_train(monkeypatch, config, store, model):
    """Makes ``hstu.train.load_run`` return these, so that the commands run without a training run."""
    module = types.ModuleType("hstu.train")
    module.load_run = lambda run, which="best", *_: (dataclasses.replace(config), store, model)
    monkeypatch.setitem(sys.modules, "hstu.train", module)
