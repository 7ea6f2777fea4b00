"""Ranking models with fewer rows than items: what is told, resume, ranks, serving, a log whose items come and go."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import Config, OptimConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import target_sequences
from hstu.data.splits import make_event_split
from hstu.data.store import SequenceStore, write_store
from hstu.errors import UserError
from hstu.evaluate import evaluate_run
from hstu.export import export_run
from hstu.history_cache import model_version
from hstu.item_rows import UNKNOWN
from hstu.progress import Display
from hstu.runs import load_run
from hstu.scoring import Scorer
from hstu.train import Trainer, train
from tests.ranks import run_ranks
from tests.stopping import stopped_at
from tests.test_evaluate_ranks import evaluate_on_rank, options_of
from tests.test_ranking_train import evaluate_options, make_config
from tests.test_train import assert_same_run, final_state, logged
from tests.test_train_ranks import narrow, run_steps

pytest.importorskip("torchrec")

DAY_S = 1000
NUM_ITEMS, ROWS = 36, 16
MANAGED = EmbeddingConfig(ids="managed", rows=ROWS, evict_every=2, optimizer="rowwise_adagrad", lr=0.05)
HASHED = EmbeddingConfig(ids="hash", rows=ROWS, optimizer="rowwise_adagrad", lr=0.05)


def drifting_store(path: Path, num_users: int = 30, num_days: int = 5) -> SequenceStore:
    """Of 12 items alive on a day 6 are new; users like half of the items nearly always, the others hardly ever."""
    rng = np.random.default_rng(0)
    num_items, events = 12 + 6 * (num_days - 1), 6
    good = rng.permutation(np.arange(num_items) % 2 == 0)
    names = rng.permutation(num_items) + 1
    days = np.tile(np.repeat(np.arange(num_days), events), num_users)
    items = 6 * days + rng.integers(0, 12, len(days))
    click = np.where(rng.random(len(days)) < 0.9, good[items], ~good[items])
    times = np.sort(DAY_S * days.reshape(num_users, -1) + rng.integers(0, DAY_S, (num_users, events * num_days)))
    return write_store(
        path, offsets=np.arange(num_users + 1) * events * num_days, item_ids=names[items], timestamps=times.reshape(-1),
        num_items=num_items, meta={"name": "drift", "split": {"kind": "global-time", "time": str(4 * DAY_S)}},
        columns={"click": click.astype(np.float32), "watch_s": 30 * click.astype(np.float32)},
        item_attributes={"parity": np.array(["even", "odd"] * (num_items // 2))},
    )  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    return drifting_store(tmp_path_factory.mktemp("drift") / "store")


@pytest.fixture(scope="module", autouse=True)
def prepared(stored: SequenceStore) -> Iterator[None]:
    """Runs find the drifting log instead of preparing one, and draw no curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.report.plot_curves", lambda folder: None)
        for module in ("hstu.train", "hstu.runs"):
            patch.setattr(f"{module}.open_store", lambda config, world=None: stored)
        yield


def managed_config(folder: Path, name: str = "run", form: str = "interleaved", **changes: Any) -> Config:
    return make_config(folder, form, name, **{"embedding": MANAGED, "run_epochs": 2, "run_batch_users": 4, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(managed_config(tmp_path_factory.mktemp("finished")))


def test_told_in_every_step_and_at_validation(finished: Path) -> None:
    lines = logged(finished)
    steps = [line for line in lines if "kind" not in line]
    assert all({"oov_inputs", "oov_labels", "rows_used", "evictions"} <= line.keys() for line in steps)
    assert steps[-1]["rows_used"] == ROWS - 1 and steps[-1]["evictions"] > steps[0]["evictions"] == 0
    # The shares at validation, by the map that the run ended with.
    config, store, model = load_run(finished, "last")
    targets = make_event_split(store, "validation").validation
    assert targets is not None
    known = set(model.table.item_rows.items().tolist())
    sequences = target_sequences(RankingData(store, config.ranking), config, np.asarray(targets.rows))
    read = np.concatenate(
        [store.item_ids[a:b] for a, b in zip(sequences.first, sequences.stop, strict=True)]
    )  # fmt: skip
    expected = {
        "oov_inputs": np.mean([i not in known for i in read]),
        "oov_labels": np.mean([i not in known for i in store.item_ids[targets.rows]]),
    }
    assert 0 < expected["oov_labels"] < 1 and expected["oov_inputs"] != expected["oov_labels"]
    assert {name: lines[-1][name] for name in expected} == pytest.approx(expected) and lines[-1]["kind"] == "validation"


def test_said_at_the_start_and_at_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(managed_config(tmp_path, run_epochs=1))
    shown = capsys.readouterr().out
    assert "embedding.ids=managed: 36 items, 15 rows for those in use (0 given), one for the others" in shown
    line = logged(folder)[-1]
    taken = logged(folder)[-2]["evictions"]
    assert taken > 0 and f"15 of 15 rows given, taken back {taken:,} times; without a row of their own: " in shown
    assert f"{line['oov_inputs']:.1%} of the inputs, {line['oov_labels']:.1%} of the items asked for" in shown


@pytest.mark.parametrize("stop", [2, 20], ids=["between updates", "in the second epoch"])
def test_resumed_bit_identical(finished: Path, tmp_path: Path, stop: int) -> None:
    config = managed_config(tmp_path)
    with stopped_at(stop - 1):
        train(config)
    assert len(final_state(tmp_path / "run").tensors("model.")["table.item_rows.waiting"]) > 0
    assert_same_run(finished, train(config))


def steps_of(trainer: Trainer, number: int) -> list[float]:
    """Losses of the first steps."""
    losses = []
    for step in range(number):
        losses.append(trainer._step(trainer._make_input(step, 0)))
        trainer.progress.global_step += 1
    trainer.world.on_first(trainer._lock.close)
    return losses


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_with_a_row_for_each_item_it_is_the_exact_table(stored: SequenceStore, tmp_path: Path, form: str) -> None:
    """The first step gives every item its row, and the other table begins with the same values by item."""
    rows = dataclasses.replace(MANAGED, rows=NUM_ITEMS + 1, evict_every=1)
    exact = dataclasses.replace(MANAGED, ids="exact", rows=None)
    options = {"optim": OptimConfig(lr=5e-3), "run_batch_users": 1000}
    trainers = [
        Trainer(
            managed_config(tmp_path, name, form, embedding=embedding, **options), stored, tmp_path / name,
            Display(False, shown=False),
        )
        for name, embedding in (("managed", rows), ("exact", exact))
    ]  # fmt: skip
    managed, other = (trainer.model for trainer in trainers)
    initial = {name: value.clone() for name, value in managed.state_dict().items()}
    losses = steps_of(trainers[0], 5)
    of_item = managed.table.item_rows.rows(torch.arange(NUM_ITEMS + 1, device=trainers[0].device))
    predicted = set(trainers[0]._make_input(0, 0).parts[0][0].batch.predicted_items.tolist())
    assert {i for i, row in enumerate(of_item.tolist()) if row > UNKNOWN} == predicted and len(predicted) > 20
    weight = initial["table.rows.weight"][of_item]
    other.load_state_dict({n: v for n, v in initial.items() if not n.startswith("table.")} | {"table.weight": weight})
    assert steps_of(trainers[1], 5) == losses and len(set(losses)) == 5


RANKS = {
    "managed, interleaved": ("interleaved", MANAGED, "local"),
    "managed, fused, by rows": ("fused", MANAGED, "row_wise"),
    "managed, interleaved, by columns": ("interleaved", dataclasses.replace(MANAGED, optimizer="adam"), "column_wise"),
    "hash, fused": ("fused", HASHED, "local"),
    "hash, interleaved, by rows": ("interleaved", HASHED, "row_wise"),
}


@pytest.mark.parametrize("case", RANKS)
def test_two_ranks_train_the_run_of_one(stored: SequenceStore, tmp_path: Path, case: str) -> None:
    form, embedding, sharding = RANKS[case]
    lay = {} if sharding == "local" else {"kind": "sharded", "sharding": sharding}
    one, two = (
        narrow(tmp_path / name, managed_config(tmp_path, form=form, run_epochs=1,
               embedding=dataclasses.replace(embedding, **changes)))
        for name, changes in (("one", {}), ("two", lay))
    )  # fmt: skip
    assert run_ranks(1, run_steps, one, stored.path) == [""]
    assert run_ranks(2, run_steps, two, stored.path) == ["", ""]
    expected, found = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert expected[-1]["kind"] == found[-1]["kind"] == "validation"
    assert len(expected) == len(found) and (expected[-2].get("evictions", 0) > 0) == (embedding.ids == "managed")
    for a, b in zip(expected, found, strict=True):
        numbers = {name: value for name, value in a.items() if not isinstance(value, str)}
        assert numbers == pytest.approx({name: b[name] for name in numbers}, rel=5e-5, nan_ok=True)


def test_a_run_of_sharded_tables_goes_on_with_local_ones(stored: SequenceStore, tmp_path: Path) -> None:
    config = narrow(tmp_path / "run", managed_config(tmp_path, run_epochs=1, run_save_every_steps=5))
    whole = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "whole")))
    assert run_ranks(1, run_steps, whole, stored.path) == [""]
    lay = dataclasses.replace(MANAGED, kind="sharded", sharding="row_wise")
    assert run_ranks(2, run_steps, dataclasses.replace(config, embedding=lay), stored.path, 5) == ["Stop: "] * 2
    assert run_ranks(1, run_steps, config, stored.path) == [""]
    expected, found = logged(tmp_path / "whole"), logged(tmp_path / "run")
    assert found[-1]["click/ne"] == pytest.approx(expected[-1]["click/ne"], rel=5e-5)
    assert [line["evictions"] for line in found[5:-1]] == [line["evictions"] for line in expected[5:-1]]


# What a finished run is good for


def test_scores_of_candidates_cached_and_plain(finished: Path) -> None:
    scorer = Scorer.load(finished, device="cpu")
    rows = scorer.model.table.item_rows
    unknown = [i for i in range(1, NUM_ITEMS + 1) if int(rows.rows(torch.tensor(i))) == UNKNOWN]
    candidates = np.arange(1, NUM_ITEMS + 1)
    history = scorer.history(3)
    cached, plain = scorer.score(scorer.encode(history), candidates), scorer.score_plain(history, candidates)
    np.testing.assert_allclose(cached["click"], plain["click"], rtol=1e-5)
    # Without rows of their own they differ by their features only, and parity is the only one.
    for parity in (0, 1):
        alike = cached["click"][[i - 1 for i in unknown if i % 2 == parity]]
        assert len(alike) > 1 and np.ptp(alike) < 1e-6
    assert len(np.unique(cached["click"].round(5))) >= NUM_ITEMS - len(unknown) + 1


def test_a_cache_of_another_map_is_refused(finished: Path) -> None:
    scorer, other = (Scorer.load(finished, device="cpu") for _ in range(2))
    cache = scorer.encode(scorer.history(3))
    other.score(cache, np.array([1, 2]))  # the same checkpoint is the same model
    other.model.table.item_rows.take_in(torch.tensor([1, 2, 3]))
    assert model_version(other.model, 0) != model_version(scorer.model, 0)
    changed = Scorer(other.config, other.data, other.model)
    with pytest.raises(ValueError, match="cache"):
        changed.score(cache, np.array([1, 2]))


def test_evaluating_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((finished / "evaluation.json").read_text())["rows"][0]["metrics"]
    found = evaluate_run(evaluate_options(finished))
    assert found["rows"][0]["metrics"] == before  # type: ignore[index]
    shown = capsys.readouterr().out.replace("\n", " ")
    shares = f"{found['oov_inputs']:.1%} of the inputs, {found['oov_labels']:.1%} of the items asked for"  # type: ignore[index]
    assert f"without a row of their own: {shares}" in shown
    written = json.loads((finished / "evaluation.json").read_text())
    assert written["oov_labels"] == found["oov_labels"] > 0  # type: ignore[index]


def test_two_ranks_evaluate_sharded_rows_as_one_process_whole_ones(finished: Path) -> None:
    usual = evaluate_run(evaluate_options(finished))
    # A split of its own in another file.
    expected = evaluate_run(evaluate_options(finished, split="validation"))
    (finished / "evaluation-validation-best.json").unlink()
    options = options_of(finished, split="validation", embedding="sharded")
    (end, shown, _, rows), (_, _, _, others) = run_ranks(2, evaluate_on_rank, options)
    assert end == "" and rows + others == ROWS + 1 and 0 < rows <= ROWS
    assert "without a row of their own: " in shown
    found = json.loads((finished / "evaluation-validation-best.json").read_text())
    for content in (found, expected):
        content.pop("seconds")  # type: ignore[union-attr]
    assert found == json.loads(json.dumps(expected)) and found["oov_labels"] != usual["oov_labels"]  # type: ignore[index]


def test_weights_are_exported_and_vectors_refused(finished: Path, tmp_path: Path) -> None:
    options = {"run": str(finished), "which": "best", "out": str(tmp_path), "format": ["parquet"]}
    with pytest.raises(UserError, match=r"a ranking run has no item vectors that are scored: take format=\[safetens"):
        export_run(options)
    load_file = pytest.importorskip("safetensors.torch").load_file
    export_run({**options, "format": ["safetensors"]})
    tensors = load_file(tmp_path / "model.safetensors")
    model = load_run(finished)[2]
    assert torch.equal(tensors["table.rows.weight"], model.table.rows.weight)
    names = [name for name in tensors if name.startswith("table.item_rows.module._mch_sorted")]
    assert torch.equal(tensors[names[0]], model.table.item_rows.module._mch_sorted_raw_ids)


# A log whose items come and go


def late_auc(store: SequenceStore, folder: Path, embedding: EmbeddingConfig) -> tuple[float, list[dict[str, Any]]]:
    """AUC of the second half of the days, each event predicted before it was trained on; and the logged steps."""
    from hstu.config_ranking import ActionConfig, TaskConfig
    from hstu.ranking_metrics import auc

    ranking = {"mode": "progressive", "batch_events": 60, "actions": {"click": ActionConfig()}, "item_features": {},
               "event_features": {}}  # fmt: skip
    config = make_config(
        folder, name=embedding.ids, tasks={"click": TaskConfig("click")}, ranking=ranking, embedding=embedding,
        run_epochs=1, optim=OptimConfig(lr=5e-3),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.train.open_store", lambda config, world=None: store)
        run = train(config)
    predicted = np.load(run / "predictions.npy")[:, 0]
    late = np.asarray(store.timestamps) >= 5 * DAY_S
    found = auc(np.asarray(store.columns["click"])[late], predicted[late])
    return found, [line for line in logged(run) if "kind" not in line]


def test_where_items_come_and_go_managed_rows_beat_hashed_ones(tmp_path: Path) -> None:
    store = drifting_store(tmp_path / "store", num_users=60, num_days=10)
    table = {"rows": 20, "optimizer": "rowwise_adagrad", "lr": 0.1}
    hashed, _ = late_auc(store, tmp_path, EmbeddingConfig(ids="hash", **table))
    managed, steps = late_auc(store, tmp_path, EmbeddingConfig(ids="managed", **table))
    assert managed > 0.85 > 0.7 > hashed
    assert steps[-1]["evictions"] == 66 - 19, "each item that is gone has given its row up, once"
