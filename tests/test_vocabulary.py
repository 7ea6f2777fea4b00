"""Training with fewer rows than items: evictions, resume, ranks, what is logged, a log whose items come and go."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.drift import DAY_S, START, Drift, measure, write_log
from benchmarks.drift import make_config as make_drift_config
from hstu.config import Config, DataConfig, OptimConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.config_stream import StreamConfig
from hstu.distributed import World
from hstu.embedding import LocalItemTable, initial_rows
from hstu.item_rows import ManagedRows, MappedTable
from hstu.progress import Display
from hstu.recommend import Recommender
from hstu.runs import load_run, open_store
from hstu.seeding import derive
from hstu.stream_train import stream_train
from hstu.train import Trainer, train
from hstu.vocabulary import RESET_SEED, Vocabulary, unknown_shares
from tests.ranks import run_ranks
from tests.reads import Reads
from tests.stopping import stopped_at
from tests.test_train import assert_same_run, final_state, logged, make_config
from tests.test_train_ranks import narrow, run_steps

pytest.importorskip("torchrec")

MANAGED = EmbeddingConfig(ids="managed", rows=20, evict_every=3, optimizer="rowwise_adagrad", lr=0.05)


def managed_config(root: Path, name: str = "run", **changes: Any) -> Config:
    return make_config(root, name, **{"optim": OptimConfig(lr=1e-2), "embedding": MANAGED, **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    return train(managed_config(root))


def test_between_updates_the_map_reads_the_number_of_the_step_alone() -> None:
    """A step asks it for the rows of what it reads and predicts, and counts those without one."""
    table = MappedTable(ManagedRows(60, 20, "lru", 1.0, every=2), LocalItemTable(20, 4))
    vocabulary, ids = Vocabulary(SimpleNamespace(table=table), 0, World()), torch.arange(1, 41)  # type: ignore[arg-type]
    batch: Any = SimpleNamespace(item_ids=ids, predicted_items=ids[:30])
    vocabulary.begin_step([batch], [], None)
    with Reads() as reads:
        vocabulary.begin_step([batch], [], None)
        rows = table.item_rows.rows(ids)
    assert reads.places == {"item_rows.py:take_in _local_scalar_dense": 1}
    assert sorted(rows.tolist()) == [1] * 21 + list(range(2, 21)), "19 rows of their own"
    assert vocabulary.report()["oov_labels"] == 11 / 30


def test_rows_are_those_of_torchrec() -> None:
    rows, generator = ManagedRows(60, 20, "lru", 1.0, every=1), torch.Generator().manual_seed(0)
    from torchrec.sparse.jagged_tensor import JaggedTensor

    for _ in range(5):
        ids = torch.randint(1, 61, (16,), generator=generator)
        rows.take_in(ids)
        wanted = torch.arange(1, 61)
        slots = rows.module.remap({"item": JaggedTensor(wanted, lengths=torch.tensor([60]))})["item"].values()
        assert torch.equal(rows.rows(wanted), 20 - slots)
    assert rows.rows(torch.tensor([[0, 1], [2, 0]], dtype=torch.int32))[[0, 1], [0, 1]].tolist() == [0, 0]


def test_told_in_every_step_and_at_validation(finished: Path) -> None:
    lines = logged(finished)
    steps = [line for line in lines if "kind" not in line]
    names = {"oov_inputs", "oov_labels", "rows_used", "evictions"}
    assert all(names <= line.keys() for line in steps)
    assert steps[0]["rows_used"] > 0 and steps[-1]["rows_used"] == 19
    evictions = [line["evictions"] for line in steps]
    assert evictions == sorted(evictions) and evictions[-1] > evictions[0] == 0
    config, store, model = load_run(finished, "last")
    saved = final_state(finished).tensors("model.")
    assert int(saved["table.item_rows.evicted"]) == evictions[-1]
    # The shares at validation, by the map that the run ended with.
    from hstu.data.splits import make_split

    targets = make_split(store, "validation").validation
    assert targets is not None
    known = set(model.table.item_rows.items().tolist())
    histories = [
        store.item_ids[max(store.offsets[u], r - 20) : r] for u, r in zip(targets.users, targets.rows, strict=True)
    ]
    asked, read = store.item_ids[targets.rows], np.concatenate(histories)
    expected = {
        "oov_inputs": np.mean([i not in known for i in read]), "oov_labels": np.mean([i not in known for i in asked])
    }  # fmt: skip
    assert unknown_shares(model, store, targets, 20) == pytest.approx(expected)
    assert {name: lines[-1][name] for name in expected} == pytest.approx(expected) and lines[-1]["kind"] == "validation"


@pytest.mark.parametrize("stop", [2, 7, 14], ids=["between updates", "later", "in the second epoch"])
def test_resumed_bit_identical(root: Path, finished: Path, tmp_path: Path, stop: int) -> None:
    config = narrow_dir(managed_config(root, "unused"), tmp_path / "stopped")
    with stopped_at(stop - 1):
        train(config)
    waiting = final_state(tmp_path / "stopped").tensors("model.")["table.item_rows.waiting"]
    assert (len(waiting) > 0) == (stop % 3 != 1), "the map is renewed in steps 0, 3, 6, ..."
    assert_same_run(finished, train(config))


def narrow_dir(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))


RESETS = [("adamw", "local"), *((o, k) for o in ("rowwise_adagrad", "adam") for k in ("local", "sharded"))]


@pytest.mark.parametrize(("optimizer", "kind"), RESETS, ids=["-".join(case) for case in RESETS])
def test_a_row_that_changes_its_item_starts_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, kind: str
) -> None:
    embedding = dataclasses.replace(MANAGED, kind=kind, optimizer=optimizer, rows=8, policy="lfu")
    config = managed_config(root, embedding=embedding, optim=OptimConfig(lr=1e-2, average_decay=0.9))
    trainer = Trainer(config, open_store(config), tmp_path / kind, Display(False, shown=False))
    taken: list[torch.Tensor] = []
    take_in, loss, found = ManagedRows.take_in, trainer._loss, {}

    def watched(*args: Any) -> Any:
        if len(taken[-1]):  # the rows began anew and have not moved yet
            found.update(table_and_state(trainer), taken=taken[-1], step=int(trainer.model.table.item_rows.step))
        return loss(*args)

    monkeypatch.setattr(ManagedRows, "take_in", lambda self, ids: taken.append(take_in(self, ids)) or taken[-1])
    monkeypatch.setattr(trainer, "_loss", watched)
    for step in range(10):
        trainer._step(trainer._make_input(0, step))
        trainer.progress.global_step += 1
    trainer.world.on_first(trainer._lock.close)
    assert found, "some row changed its item"
    values = initial_rows(len(found["taken"]), 8, derive(config.seed, RESET_SEED, found["step"]))
    values = values.to(trainer.device)
    assert torch.equal(found["weight"][found["taken"]], values)
    assert torch.equal(found["average"][found["taken"]], values)
    kept = sorted(set(range(2, 9)) - set(found["taken"].tolist()))
    assert found["state"], "the optimizer has a state by row"
    for state in found["state"]:
        assert not state[found["taken"]].any() and state[kept].any()


def table_and_state(trainer: Trainer) -> dict[str, Any]:
    """The rows of the item table, their average where there is one, and the optimizer's tensors by row."""
    if trainer.config.embedding.kind == "local":
        weight = trainer.model.table.rows.weight
        fields = next(o.state[weight] for o in trainer.optimizers if o.state.get(weight))
    else:
        weight = trainer.model.state_dict()["table.rows.weight"].local_shards()[0].tensor
        states = trainer.optimizers[1].states()["table.rows.weight"]  # type: ignore[attr-defined]
        fields = {n: v.local_shards()[0].tensor for n, v in states.items() if hasattr(v, "local_shards")}
    by_row = [v.detach().clone() for v in fields.values() if v.dim() and len(v) == len(weight)]
    kept = {"weight": weight.detach().clone(), "state": by_row}
    if trainer.average is not None:
        averaged = trainer.average.tensors()["table.rows.weight"]
        parts = [part.tensor for part in averaged.local_shards()] if hasattr(averaged, "local_shards") else [averaged]
        kept["average"] = parts[0].clone()
    return kept


RANKS = [
    ("local", "rowwise_adagrad"),
    ("row_wise", "rowwise_adagrad"),
    ("column_wise", "adam"),
    ("data_parallel", "rowwise_adagrad"),
]


@pytest.mark.parametrize(("sharding", "optimizer"), RANKS, ids=["-".join(case) for case in RANKS])
def test_two_ranks_train_the_run_of_one(root: Path, tmp_path: Path, sharding: str, optimizer: str) -> None:
    store = open_store(managed_config(root)).path

    def config(name: str, **changes: Any) -> Config:
        embedding = dataclasses.replace(MANAGED, optimizer=optimizer, **changes)
        return narrow(tmp_path / name, managed_config(root, embedding=embedding, run_save_every_epochs=None))

    one = config("one")
    two = config("two", **({} if sharding == "local" else {"kind": "sharded", "sharding": sharding}))
    assert run_ranks(1, run_steps, one, store, 10) == ["Stop: "]
    assert run_ranks(2, run_steps, two, store, 10) == ["Stop: "] * 2
    expected, found = (
        [{k: v for k, v in line.items() if k != "imbalance"} for line in logged(Path(str(c.run.dir)))]
        for c in (one, two)
    )
    assert len(expected) == len(found) == 11 and expected[9]["evictions"] > 0
    assert expected[10]["kind"] == "validation"
    for a, b in zip(expected, found, strict=True):
        assert {k: b[k] for k in a if isinstance(a[k], str)} == {k: a[k] for k in a if isinstance(a[k], str)}
        a, b = ({k: v for k, v in line.items() if not isinstance(v, str)} for line in (a, b))
        assert a == pytest.approx(b, rel=2e-5)


def test_a_finished_run_recommends_items(finished: Path) -> None:
    config, store, model = load_run(finished)
    assert isinstance(model.table, MappedTable) and config.embedding.rows == 20
    recommender = Recommender(config, store, model, "cpu")
    known = {store.item_raw_ids[i - 1].item() for i in model.table.item_rows.items().tolist() if i}
    found = {
        item.item for item in recommender.recommend(store.user_raw_ids[0].item(), k=10, filter_history="full").items
    }
    seen = {store.item_raw_ids[i - 1].item() for i in store.item_ids[: store.offsets[1]]}
    assert found == found & known - seen and len(found) == min(10, len(known - seen))


def test_export_and_evaluation_know_which_items_have_rows(finished: Path, tmp_path: Path) -> None:
    import polars as pl

    from hstu.evaluate import evaluate_run
    from hstu.export import export_run

    config, store, model = load_run(finished)
    export_run({"run": str(finished), "which": "best", "out": str(tmp_path), "format": ["parquet"]})
    items = pl.read_parquet(tmp_path / "items.parquet")
    known = sorted(set(model.table.item_rows.items().tolist()) - {0})
    assert items["item"].to_list() == store.item_raw_ids[np.array(known) - 1].tolist() and 0 < len(known) <= 19
    recommender = Recommender(config, store, model, "cpu")
    user = store.user_raw_ids[3].item()
    scores = items["vector"].to_numpy() @ recommender.query(user=user)[0]
    answer = recommender.recommend(user, k=5, filter_history="none").items
    best = np.argsort(-scores)[:5]
    assert [item.item for item in answer] == items["item"].to_numpy()[best].tolist()
    assert [item.score for item in answer] == pytest.approx(scores[best].tolist(), rel=1e-5)

    options = {"run": str(finished), "which": "best", "split": "validation", "eval": {}, "device": "cpu"}
    evaluate_run(options)
    written = json.loads((finished / "evaluation-validation-best.json").read_text())
    lines = [line for line in logged(finished) if line.get("kind") == "validation"]
    best_line = max(lines, key=lambda line: line["ndcg@10"])
    assert {n: written[n] for n in ("oov_inputs", "oov_labels")} == {
        n: best_line[n] for n in ("oov_inputs", "oov_labels")
    }
    assert written["rows"][0]["metrics"]["ndcg@10"] == best_line["ndcg@10"]


def test_a_watched_folder_needs_no_more_rows_than_items_in_use(tmp_path: Path) -> None:
    drift = Drift(str(tmp_path), days=3, users=120, live=60, new=20, rows=80)
    header, *lines = write_log(drift, tmp_path / "raw" / "log.csv").read_text().splitlines()
    for day in range(drift.days):
        folder = tmp_path / "in" / f"dt=2026-03-0{day + 1}"
        folder.mkdir(parents=True)
        kept = [line for line in lines if (int(line.split(",")[2]) - START) // DAY_S == day]
        (folder / "part-0.csv").write_text("\n".join([header, *kept]) + "\n")
        (folder / "_SUCCESS").touch()
    config = make_drift_config(drift, "managed", 0)
    config = dataclasses.replace(config, data=DataConfig(name="log", source="log", root=str(tmp_path / "data")))
    stream = StreamConfig(eval_users=0, watch=str(tmp_path / "in"), item_rows=100_000, timeout_s=0, settle_s=0)
    folder = stream_train(config, stream)
    days = json.loads((folder / "days.json").read_text())["days"]
    assert len(days) == 3 and days[-1]["hr@10"] > 0.25, "by chance 10 of the 60 alive, and of 100,000 candidates"


def test_where_items_come_and_go_managed_rows_beat_hashed_ones(tmp_path: Path) -> None:
    drift = Drift(str(tmp_path), days=6, users=150, live=60, new=20, rows=80)
    write_log(drift, tmp_path / "raw" / "log.csv")
    hashed, managed = measure(drift, "hash", 0), measure(drift, "managed", 0)
    assert drift.num_items == 160, "twice the rows"
    assert managed["hr@10 late"] > 1.5 * hashed["hr@10 late"]
    assert managed["evictions"] >= 160 - 80 - drift.live
    days = json.loads((tmp_path / "managed-0" / "days.json").read_text())["days"]
    assert 0 < days[-1]["oov_labels"] < 0.5 and 0 <= days[-1]["oov_inputs"] < 0.5
