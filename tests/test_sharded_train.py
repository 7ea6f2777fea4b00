"""Training with sharded tables from end to end: the run of local tables, on any number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.config import Config, LossConfig, OptimConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.distributed import World
from hstu.runs import load_run, open_store
from tests.ranks import run_ranks
from tests.test_ranking_train import make_config as make_ranking_config
from tests.test_ranking_train import planted_store
from tests.test_train import final_state, logged, make_config
from tests.test_train_ranks import narrow, run_steps

pytest.importorskip("torchrec")

STEPS = 10
LOCAL = EmbeddingConfig(optimizer="rowwise_adagrad", lr=0.05)
CASES: dict[str, dict[str, Any]] = {
    "sampled": {},
    "full-sgd": {"loss": LossConfig(name="full_softmax"), "embedding": dataclasses.replace(LOCAL, optimizer="sgd")},
    "in-batch-adam": {"loss": LossConfig(name="in_batch"), "embedding": dataclasses.replace(LOCAL, optimizer="adam")},
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    return {"retrieval": open_store(make_config(root)).path, "ranking": planted_store(root / "planted").path}


def configure(tmp_path: Path, name: str, kind: str, **changes: Any) -> Config:
    if kind == "ranking":
        return narrow(tmp_path / name, make_ranking_config(tmp_path, **changes))
    return narrow(tmp_path / name, make_config(tmp_path, run_save_every_epochs=None, run_epochs=2, **changes))


def losses(config: Config) -> list[float]:
    return [line["loss"] for line in logged(Path(str(config.run.dir))) if "loss" in line]


def sharded(embedding: EmbeddingConfig, sharding: str) -> EmbeddingConfig:
    return dataclasses.replace(embedding, kind="sharded", sharding=sharding)


def compare(tmp_path: Path, store: Path, kind: str, runs: list[tuple[int, str]], tables: dict[str, str] | None = None,
            **changes: Any) -> None:  # fmt: skip
    changes = {"optim": OptimConfig(lr=3e-3), "embedding": LOCAL} | changes
    local = configure(tmp_path, "local", kind, **changes)
    assert run_ranks(1, run_steps, local, store, STEPS) == ["Stop: "]
    expected = losses(local)
    assert len(set(expected)) == STEPS
    for number, sharding in runs:
        embedding = dataclasses.replace(sharded(changes["embedding"], sharding), tables=tables or {})
        config = configure(tmp_path, f"{sharding}-{number}", kind, **(changes | {"embedding": embedding}))
        assert run_ranks(number, run_steps, config, store, STEPS) == ["Stop: "] * number
        assert losses(config) == pytest.approx(expected, rel=2e-5), (number, sharding)


@pytest.mark.parametrize("case", list(CASES))
def test_same_loss_curve_as_local_tables(case, stores, tmp_path):
    runs = [(1, "row_wise"), (2, "row_wise"), (4, "table_wise")]
    compare(tmp_path, stores["retrieval"], "retrieval", runs, **CASES[case])


def test_columns(stores, tmp_path):
    compare(tmp_path, stores["retrieval"], "retrieval", [(2, "column_wise")],
            embedding=dataclasses.replace(LOCAL, optimizer="adagrad"))  # fmt: skip


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_ranking_with_its_feature_tables(form, stores, tmp_path):
    compare(tmp_path, stores["ranking"], "ranking", [(1, "auto"), (2, "row_wise"), (4, "table_wise")], form=form,
            run_batch_users=5, run_save_every_epochs=None)  # fmt: skip


@pytest.mark.parametrize("features", [["item.parity"], ["item.parity", "event.hour_of_day"]], ids=["one", "all"])
def test_feature_tables_that_stay_whole(features, stores, tmp_path):
    tables = dict.fromkeys(features, "data_parallel")
    compare(tmp_path, stores["ranking"], "ranking", [(2, "row_wise")], tables, run_batch_users=5,
            run_save_every_epochs=None)  # fmt: skip


def test_an_item_table_that_stays_whole_beside_spread_features(stores, tmp_path):
    compare(tmp_path, stores["ranking"], "ranking", [(2, "row_wise")], {"item": "data_parallel"}, run_batch_users=5,
            run_save_every_epochs=None)  # fmt: skip


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("retrieval", {"optim": OptimConfig(lr=3e-3, clip_norm=0.2, accumulate_steps=2, average_decay=0.9)}),
        ("ranking", {"run_save_every_epochs": None}),
    ],
    ids=["retrieval", "ranking"],
)
def test_tables_that_all_stay_whole(kind, changes, stores, tmp_path):
    compare(tmp_path, stores[kind], kind, [(2, "data_parallel")], run_batch_users=5, **changes)


def evaluate_on_ranks(folder):
    """Ranks of three users by the run in ``folder``, its tables as they lay."""
    _, _, model = load_run(folder, "last", World.current())
    queries = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return type(model.table).__name__, model.table.rank(queries, torch.tensor([3, 9, 27]))


def test_a_run_with_a_whole_item_table_is_that_of_a_local_one(stores, tmp_path):
    changes = {"optim": OptimConfig(lr=3e-3), "run_epochs": 1, "run_batch_users": 40}
    for name, embedding in (("local", LOCAL), ("whole", sharded(LOCAL, "data_parallel"))):
        config = narrow(tmp_path / name, make_config(tmp_path, embedding=embedding, **changes))
        assert run_ranks(2, run_steps, config, stores["retrieval"]) == ["", ""]
    one, two = (final_state(tmp_path / name).tensors() for name in ("local", "whole"))
    assert one.keys() == two.keys() and "optimizer.table.weight.momentum1" in two
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    (kind, ranks), (_, again) = run_ranks(2, evaluate_on_ranks, tmp_path / "whole")
    assert kind == "LocalItemTable" and torch.equal(ranks, again)


def test_the_whole_run_validates_and_saves_as_with_local_tables(stores, tmp_path):
    changes = {"optim": OptimConfig(lr=3e-3), "run_epochs": 1}
    local = narrow(tmp_path / "local", make_config(tmp_path, embedding=LOCAL, **changes))
    assert run_ranks(1, run_steps, local, stores["retrieval"]) == [""]
    config = narrow(tmp_path / "two", make_config(tmp_path, embedding=sharded(LOCAL, "row_wise"), **changes))
    assert run_ranks(2, run_steps, config, stores["retrieval"]) == ["", ""]
    one, two = (final_state(tmp_path / name) for name in ("local", "two"))
    tensors, others = one.tensors(), two.tensors()
    assert others.keys() - tensors.keys() == {"rng.cpu.1"} and "optimizer.table.weight.momentum1" in tensors
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            assert (tensor - others[name]).abs().max() <= 2e-4 * tensor.abs().max(), name
    last = [logged(tmp_path / name)[-1] for name in ("local", "two")]
    assert last[1]["ndcg@10"] == pytest.approx(last[0]["ndcg@10"], abs=0.01)  # one user of 150 at a tie
    served = load_run(tmp_path / "two", "last")[2]  # on one process, the whole table
    assert torch.equal(served.table.weight, others["model.table.weight"])
