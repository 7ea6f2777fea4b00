"""torchrec's pipeline around steps of every kind: the run without it, bit for bit."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from hstu.config import Config, HSTUConfig, LossConfig, OptimConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.config_ranking import RankingConfig, TaskConfig
from hstu.data.store import SequenceStore
from hstu.errors import UserError
from hstu.progress import Display
from hstu.runs import open_store
from hstu.train import Trainer
from tests.ranking import config_of, ranking_config, rich_store
from tests.ranks import run_ranks
from tests.reads import Reads
from tests.test_reads import ONCE, at_the_device
from tests.test_sharded_train import LOCAL, sharded
from tests.test_train import assert_same_run, final_state, logged, make_config
from tests.test_train_ranks import narrow, run_steps

pytest.importorskip("torchrec")

MANAGED = {"ids": "managed", "rows": 12, "evict_every": 2}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For ranking: 4 tables of features of events (one of several values), one of users, one of items."""
    root = tmp_path_factory.mktemp("stores")
    meta = {"name": "rich", "split": {"kind": "global-time", "time": str(10**9 + 800_000)}}
    lengths = np.random.default_rng(5).integers(6, 12, 24)
    rich_store(root / "ranking", lengths, meta=meta)
    return {"retrieval": open_store(make_config(root)).path, "ranking": root / "ranking"}


def ranking(root: Path, form: str = "interleaved", mode: str = "epochs", **changes: Any) -> Config:
    settings = {"mode": mode, "batch_events": 30} if mode == "progressive" else {}
    changes = {"run_epochs": 1, "run_batch_users": 4, "run_select_metric": "click/ne"} | changes
    made = config_of(ranking_config(form, **settings), **changes)
    return dataclasses.replace(made, model=dataclasses.replace(made.model, dropout=0.1))


def retrieval(root: Path, **changes: Any) -> Config:
    return make_config(root, **({"run_epochs": 2, "run_batch_users": 15, "optim": OptimConfig(lr=3e-3)} | changes))


def pipelined(root: Path, made: Config, embedding: EmbeddingConfig, pipeline: bool = True) -> Config:
    embedding = dataclasses.replace(embedding, pipeline=pipeline)
    return narrow(root / ("with" if pipeline else "without"), dataclasses.replace(made, embedding=embedding))


def compare(root: Path, store: Path, made: Config, embedding: EmbeddingConfig, number: int) -> list[dict[str, Any]]:
    """Runs ``made`` without and with the pipeline; they are the same; gives what was logged."""
    for pipeline in (False, True):
        assert run_ranks(number, run_steps, pipelined(root, made, embedding, pipeline), store) == [""] * number
    assert_same_run(root / "without", root / "with")
    return logged(root / "with")


# Ranking

TABLES = {"item": "table_wise", "item.genres": "column_wise", "event.tab": "data_parallel", "gender": "table_wise"}
WAITING = OptimConfig(lr=3e-3, clip_norm=0.2, accumulate_steps=3, average_decay=0.9)
RANKING: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "interleaved": (2, {}, {}),
    "fused, adam, hash": (2, {"form": "fused"}, {"optimizer": "adam", "ids": "hash", "rows": 9}),
    "tables of every kind, averaged": (2, {"optim": OptimConfig(average_decay=0.9)}, {"tables": TABLES}),
    "managed, items whole": (1, {}, MANAGED | {"tables": {"item": "data_parallel"}}),
    "managed, waiting": (2, {"optim": WAITING, "form": "fused"}, MANAGED),
    "waiting": (1, {"optim": WAITING}, {}),
    "progressive": (2, {"mode": "progressive", "optim": OptimConfig(accumulate_steps=2)}, {}),
    "layers in parts": (2, {"optim": WAITING, "run_dense": "fsdp"}, {}),
}


@pytest.mark.parametrize("case", RANKING)
def test_a_ranking_run_is_the_same(case, stores, tmp_path):
    number, changes, options = RANKING[case]
    embedding = dataclasses.replace(sharded(LOCAL, "row_wise"), **options)
    lines = compare(tmp_path, stores["ranking"], ranking(tmp_path, **changes), embedding, number)
    assert len({line["loss"] for line in lines if "loss" in line}) >= 3
    assert "managed" not in case or lines[-2]["evictions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, MANAGED], ids=["exact", "managed"])
def test_four_ranks_some_without_users(options, stores, tmp_path):
    embedding = dataclasses.replace(sharded(LOCAL, "row_wise"), **options)
    made = ranking(tmp_path, run_batch_users=3, optim=OptimConfig(lr=3e-3, accumulate_steps=2))
    assert len(compare(tmp_path, stores["ranking"], made, embedding, 4)) >= 5


# Retrieval

ROWS = {"ids": "managed", "rows": 20}
RETRIEVAL: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "hash": (2, {}, {"ids": "hash", "rows": 20}),
    "managed": (2, {}, ROWS),
    "managed, in batch": (1, {"loss": LossConfig(name="in_batch")}, ROWS | {"evict_every": 2}),
    "managed, full": (1, {"loss": LossConfig(name="full_softmax")}, ROWS | {"policy": "lfu"}),
    "managed, waiting": (2, {"optim": WAITING, "run_batch_users": 5, "run_epochs": 1}, ROWS),
}


@pytest.mark.parametrize("case", RETRIEVAL)
def test_a_retrieval_run_is_the_same(case, stores, tmp_path):
    number, changes, options = RETRIEVAL[case]
    embedding = dataclasses.replace(sharded(LOCAL, "row_wise"), **options)
    lines = compare(tmp_path, stores["retrieval"], retrieval(tmp_path, **changes), embedding, number)
    assert len(lines) == changes.get("run_epochs", 2) * (10 + 1)  # steps of 150 users, and a validation
    assert options["ids"] != "managed" or lines[-2]["evictions"] > 0


# Stopped and resumed


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_saved_in_the_middle_it_goes_on_with_or_without(kind, stores, tmp_path):
    """Saved after step 2, when the next batches have entered: as without a pipeline. Each goes on as the other."""
    make, users, rows = {"retrieval": (retrieval, 4, 20), "ranking": (ranking, 2, 12)}[kind]
    embedding = dataclasses.replace(sharded(LOCAL, "row_wise"), ids="managed", rows=rows, policy="lfu")
    made = make(tmp_path, optim=WAITING, run_epochs=1, run_save_every_steps=2, run_batch_users=users)
    configs, states = [pipelined(tmp_path, made, embedding, on) for on in (False, True)], []
    for config in configs:
        assert run_ranks(2, run_steps, config, stores[kind], 3) == ["Stop: "] * 2
        states.append(final_state(Path(str(config.run.dir))))
    tensors, others = (state.tensors("model.") for state in states)
    assert tensors.keys() == others.keys() and int(tensors["table.item_rows.step"]) == 2
    assert int(tensors["table.item_rows.evicted"]) > 0
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())
    for config, on in zip(configs, (True, False), strict=True):
        other = dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, pipeline=on))
        assert run_ranks(2, run_steps, other, stores[kind], 4) == ["Stop: "] * 2
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert final_state(tmp_path / "with").values["progress"]["global_step"] == 4


def filters_in_steps(config, store):
    """Whether the process's own filters of warnings were in force whenever a batch entered the pipeline."""
    from hstu.sharded import pipeline as sharded_pipeline

    found, scored_by = [], sharded_pipeline.scored_by

    def watched(*args):
        found.append(warnings.filters is own)
        return scored_by(*args)

    own = warnings.filters
    with mock.patch.object(sharded_pipeline, "scored_by", watched):
        run_steps(config, store)
    return found


def test_steps_leave_the_filters_of_warnings_alone(stores, tmp_path):
    made = retrieval(tmp_path, run_epochs=1, run_batch_users=40)
    config = pipelined(tmp_path, made, sharded(LOCAL, "row_wise"))
    assert run_ranks(1, filters_in_steps, config, stores["retrieval"]) == [[True] * 4]


def lookups_of_steps(config, store):
    """How many ids each collection sends to ranks while a step's own computation has not begun."""
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    found, start = [], TrainPipelineSparseDist.start_sparse_data_dist

    def watched(self, batch, context):
        if batch is not None:
            found.append([len(keyed.values()) for keyed in batch.keyed])
        return start(self, batch, context)

    with mock.patch.object(TrainPipelineSparseDist, "start_sparse_data_dist", watched):
        run_steps(config, store)
    return found


def test_the_ids_of_all_tables_go_ahead(stores, tmp_path):
    """Of the item table, of the four features of events in one collection and of the user's feature in another."""
    made = ranking(tmp_path, run_batch_users=8)
    (found,) = run_ranks(1, lookups_of_steps, pipelined(tmp_path, made, sharded(LOCAL, "row_wise")), stores["ranking"])
    assert len(found) == 4 and all(len(counts) == 3 for counts in found)
    for items, of_events, of_users in found:
        assert of_events >= 4 * items and of_users in (8, 3)


def reads_of_a_step(config, store):
    """Places where the second step would wait for a device, as of tests/reads.py."""
    trainer = Trainer(config, SequenceStore.open(store), Path(str(config.run.dir)), Display(False, shown=False))
    steps = trainer.pipeline.through([trainer._make_input(0, step) for step in range(3)], 0)
    trainer._step(next(steps))
    with Reads() as reads:
        trainer._step(next(steps))
    steps.close()
    trainer.saver.close()
    return reads.places


def test_a_step_waits_once_beside_torchrec(stores, tmp_path):
    """Which waits for its counts in ``pipeline.py``."""
    made = ranking(tmp_path, "fused", optim=OptimConfig(accumulate_steps=2))
    config = pipelined(tmp_path, made, dataclasses.replace(sharded(LOCAL, "row_wise"), optimizer="adam"))
    for places in run_ranks(2, reads_of_a_step, config, stores["ranking"]):
        found = at_the_device(places)
        assert {place: n for place, n in found.items() if not place.startswith("pipeline.py:")} == ONCE


# Config

SPREAD = EmbeddingConfig(kind="sharded", optimizer="sgd", pipeline=True)
PROGRESSIVE = RankingConfig(tasks={"click": TaskConfig()}, mode="progressive")


@pytest.mark.parametrize(
    "embedding, ranked, message",
    [
        ({"tables": {"item": "data_parallel"}}, None, "false with the item table data_parallel, the only table"),
        ({"ids": "managed", "rows": 9}, PROGRESSIVE, "false with ranking.mode=progressive and embedding.ids=managed"),
    ],
    ids=["whole", "progressive"],
)
def test_what_the_pipeline_cannot_serve(embedding, ranked, message):
    with pytest.raises(UserError, match=f"embedding.pipeline=True: expected {message}"):
        Config(model=HSTUConfig(dim=8), embedding=dataclasses.replace(SPREAD, **embedding), ranking=ranked)
