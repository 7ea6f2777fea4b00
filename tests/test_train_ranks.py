"""Training over ranks: any number gives the run of one; what ranks decide together; evaluation; resume."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hstu.config import Config, LossConfig, OptimConfig, SASRecConfig
from hstu.data.ranking import RankingData
from hstu.data.splits import make_event_split, make_split
from hstu.data.store import SequenceStore
from hstu.distributed import World
from hstu.errors import UserError
from hstu.evaluate import evaluate
from hstu.problem import build_model
from hstu.progress import Display
from hstu.ranking_evaluate import predict
from hstu.runs import open_store
from hstu.train import Interrupted, Trainer
from tests.ranks import run_ranks
from tests.test_ranking_train import make_config as make_ranking_config
from tests.test_ranking_train import planted_store
from tests.test_train import assert_same_run, final_state, logged, make_config

NUM_RANKS = (1, 2, 4)
STEPS = 8


def narrow(path: Path, config: Config) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(path), threads=1))


class Stop(Exception):
    """Ends a training after some steps."""


def run_steps(config: Config, store_path: Path, num_steps: int | None = None, signal_at: dict[int, int] | None = None,
              poison_at: dict[int, int] | None = None) -> str:  # fmt: skip
    """Trains on the ranks that are there; "" or how it ended.

    signal_at, poison_at: rank -> step before which it gets a SIGTERM, or finds a NaN among its parameters.
    """
    rank, step = dist.get_rank(), Trainer._step
    folder = Path(config.run.dir or "")
    trainer = Trainer(config, SequenceStore.open(store_path), folder, Display(False, shown=False))

    def watched(self: Trainer, step_input: Any) -> float:
        if self.progress.global_step == num_steps:
            raise Stop
        if (signal_at or {}).get(rank) == self.progress.global_step:
            os.kill(os.getpid(), signal.SIGTERM)
        if (poison_at or {}).get(rank) == self.progress.global_step:
            with torch.no_grad():
                next(iter(self.model.parameters())).fill_(float("nan"))
        return step(self, step_input)

    Trainer._step = watched  # type: ignore[method-assign]
    try:
        trainer.run()
    except (UserError, Interrupted, Stop) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Trainer._step = step  # type: ignore[method-assign]
    return ""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    synthetic = open_store(make_config(root)).path
    return {"retrieval": synthetic, "ranking": planted_store(root / "planted").path}


RUN = {"run_save_every_epochs": None, "run_epochs": 2}
CASES: dict[str, dict[str, Any]] = {
    "hstu": {"optim": OptimConfig(lr=3e-3, clip_norm=0.5, average_decay=0.9)},
    "hstu, accumulated": {"optim": OptimConfig(lr=3e-3, accumulate_steps=2), "run_batch_users": 3},
    "sasrec, shared bank": {
        "model": SASRecConfig(dim=8, num_blocks=1, ffn_dim=8, max_len=20, dropout=0.1),
        "loss": LossConfig(name="shared_bank", num_negatives=16),
    },
    "hstu, in batch": {"loss": LossConfig(name="in_batch", logq_correction=True)},
    "hstu, layers in parts": {
        "optim": OptimConfig(lr=3e-3, clip_norm=0.5, average_decay=0.9, accumulate_steps=2),
        "run_batch_users": 3,
        "run_dense": "fsdp",
    },
    "hstu, full softmax, cut": {"loss": LossConfig(name="full_softmax"), "run_batch_tokens": 150},
}


def retrieval_config(root: Path, **changes: Any) -> Config:
    return make_config(root, **{**RUN, **changes})


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_trains_the_same(tmp_path: Path, stores: dict[str, Path], case: str) -> None:
    config = retrieval_config(tmp_path, **CASES[case])
    assert_same_for_all(config, stores["retrieval"], tmp_path)


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_any_number_of_ranks_trains_the_same_ranking_model(tmp_path: Path, stores: dict[str, Path], form: str) -> None:
    config = make_ranking_config(tmp_path, form, run_batch_users=5, run_save_every_epochs=None)
    assert_same_for_all(config, stores["ranking"], tmp_path)


def assert_same_for_all(config: Config, store: Path, root: Path) -> None:
    """Losses of the first steps, and dropout and negatives are in them, to float noise."""
    losses = []
    for num_ranks in NUM_RANKS:
        folder = root / f"on{num_ranks}"
        ended = run_ranks(num_ranks, run_steps, narrow(folder, config), store, STEPS)
        assert set(ended) == {"Stop: "}
        lines = [line for line in logged(folder) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))  # one rank writes
        assert all(("imbalance" in line) == (num_ranks > 1) for line in lines)
        losses.append([line["loss"] for line in lines])
    assert losses[0][0] != losses[0][1]
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], rel=3e-6)


@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_the_whole_run_is_the_same_and_validates_the_same(tmp_path: Path, stores: dict[str, Path], dense: str) -> None:
    optim = OptimConfig(lr=3e-3, clip_norm=0.5, average_decay=0.9)
    config = retrieval_config(tmp_path, run_epochs=2, optim=optim, run_dense=dense)
    for n in (1, 2):
        assert set(run_ranks(n, run_steps, narrow(tmp_path / str(n), config), stores["retrieval"])) == {""}
    one, two = (final_state(tmp_path / str(n)) for n in (1, 2))
    for part in ("model.", "average."):
        tensors, others = one.tensors(part), two.tensors(part)
        assert tensors.keys() == others.keys() and len(tensors) > 0
        for name, tensor in tensors.items():
            assert (tensor - others[name]).abs().max() <= 2e-4 * tensor.abs().max(), name
    last = [logged(tmp_path / str(n))[-1] for n in (1, 2)]
    assert last[1]["ndcg@10"] == pytest.approx(last[0]["ndcg@10"], abs=0.01)  # one user of 150 at a tie
    assert last[1].pop("imbalance") > 0
    assert last[0].keys() == last[1].keys()


def test_a_signal_to_one_rank_saves_on_all_and_the_run_resumes_bit_identical(
    tmp_path: Path, stores: dict[str, Path]
) -> None:
    config = retrieval_config(tmp_path, run_epochs=1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_ranks(2, run_steps, narrow(whole, config), stores["retrieval"])
    ended = run_ranks(2, run_steps, narrow(stopped, config), stores["retrieval"], None, {1: 4})
    assert set(ended) == {f"Interrupted: stopped by SIGTERM; saved. Resume with run.dir={stopped}"}
    assert final_state(stopped).values["progress"]["global_step"] == 5
    assert set(run_ranks(2, run_steps, narrow(stopped, config), stores["retrieval"])) == {""}
    assert_same_run(whole, stopped)


def test_a_run_with_layers_in_parts_goes_on_with_them_whole(tmp_path: Path, stores: dict[str, Path]) -> None:
    config = retrieval_config(tmp_path, run_epochs=1, optim=OptimConfig(lr=3e-3, average_decay=0.9))
    apart = dataclasses.replace(config, run=dataclasses.replace(config.run, dense="fsdp"))
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run_ranks(1, run_steps, narrow(whole, config), stores["retrieval"])
    ended = run_ranks(2, run_steps, narrow(moved, apart), stores["retrieval"], None, {0: 4})
    assert ended[0].startswith("Interrupted")
    assert set(run_ranks(1, run_steps, narrow(moved, config), stores["retrieval"])) == {""}
    losses = [[line["loss"] for line in logged(folder) if "loss" in line] for folder in (whole, moved)]
    assert losses[1] == pytest.approx(losses[0], rel=3e-6)


def test_a_non_finite_value_on_one_rank_stops_all(tmp_path: Path, stores: dict[str, Path]) -> None:
    config = retrieval_config(tmp_path, run_save_every_steps=2)
    ended = run_ranks(2, run_steps, narrow(tmp_path / "run", config), stores["retrieval"], None, None, {1: 3})
    assert len(set(ended)) == 1 and ended[0].startswith("UserError: non-finite values at step 3")
    assert "first in parameter" in ended[0] and "step-000000002" in ended[0]


def test_other_config_or_data_on_a_rank_is_named(tmp_path: Path, stores: dict[str, Path]) -> None:
    config = retrieval_config(tmp_path)
    found = run_ranks(3, run_with_own, narrow(tmp_path / "run", config), stores["retrieval"], "optim")
    assert set(found) == {
        "optim.lr differs between ranks: rank 0 has 0.003, rank 2 has 0.1; start all ranks alike"
    }  # fmt: skip
    (found,) = set(run_ranks(3, run_with_own, narrow(tmp_path / "run", config), stores["retrieval"], "split"))
    assert found.startswith("data: split differs between ranks") and "rank 2 has 'other'" in found
    (found,) = set(run_ranks(3, run_with_own, narrow(tmp_path / "run", config), stores["retrieval"], "code"))
    assert found.startswith("code differs between ranks") and "rank 2 has 'changed'" in found
    assert not (tmp_path / "run").exists()


def run_with_own(config: Config, store_path: Path, kind: str) -> str:
    """The error of a run whose rank 2 has another config, split or code."""
    import hstu.runs

    store, source_hash = SequenceStore.open(store_path), hstu.runs.source_hash
    if dist.get_rank() == 2:
        if kind == "optim":
            config = dataclasses.replace(config, optim=OptimConfig(lr=0.1))
        elif kind == "split":
            store.meta["split_hash"] = "other"
        else:
            hstu.runs.source_hash = lambda: "changed"
    try:
        Trainer(config, store, Path(config.run.dir or ""), Display(False, shown=False))
    except UserError as error:
        return str(error)
    finally:
        hstu.runs.source_hash = source_hash
    return ""


# Evaluation


def ranks_of(config: Config, store_path: Path) -> np.ndarray:
    store, world = SequenceStore.open(store_path), World.current()
    targets = make_split(store, "validation").test
    return evaluate(build_model(config, store), store, targets, config, world=world).ranks


def predictions_of(config: Config, store_path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    store, world = SequenceStore.open(store_path), World.current()
    assert config.ranking is not None
    data = RankingData(store, config.ranking)
    targets = make_event_split(store, "validation").test
    found = predict(build_model(config, store, data), data, config, targets, world=world)
    return found.rows, found.values


def test_every_target_is_ranked_once_on_any_number_of_ranks(tmp_path: Path, stores: dict[str, Path]) -> None:
    config = retrieval_config(tmp_path)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_users=32))  # 150: 5 batches
    found = [ranks for n in NUM_RANKS for ranks in run_ranks(n, ranks_of, config, stores["retrieval"])]
    assert found[0].shape == (150,) and len(np.unique(found[0])) > 20
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_every_event_is_predicted_once_on_any_number_of_ranks(tmp_path: Path, stores: dict[str, Path]) -> None:
    config = make_ranking_config(tmp_path, eval_batch_users=9)
    found = [p for n in NUM_RANKS for p in run_ranks(n, predictions_of, config, stores["ranking"])]
    rows, values = found[0]
    assert len(rows) == len(np.unique(rows)) > 50
    for other_rows, others in found[1:]:
        assert np.array_equal(rows, other_rows)
        assert all(np.array_equal(values[task], others[task]) for task in ("click", "watch"))


def test_progressive_predictions_are_those_of_one_rank(tmp_path: Path, stores: dict[str, Path]) -> None:
    config = make_ranking_config(tmp_path, ranking={"mode": "progressive"}, run_epochs=1)
    for n in (1, 2):
        assert set(run_ranks(n, run_steps, narrow(tmp_path / str(n), config), stores["ranking"])) == {""}
    one, two = (np.load(tmp_path / str(n) / "predictions.npy") for n in (1, 2))
    assert not np.isnan(one).any()
    np.testing.assert_allclose(two, one, rtol=1e-3)
    np.testing.assert_allclose(*(logged(tmp_path / str(n))[-1]["click/ne"] for n in (1, 2)), rtol=1e-4)
