"""hstu-evaluate over ranks: the result of one process, with whole tables and with sharded ones."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from hstu import evaluate as ev
from hstu.config import OptimConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.distributed import World
from hstu.errors import UserError
from hstu.evaluate import RankResult, evaluate_run
from hstu.runs import load_run
from hstu.train import train
from tests.ranks import run_ranks
from tests.test_ranking_train import evaluate_options, planted_store
from tests.test_ranking_train import make_config as make_ranking_config
from tests.test_train import make_config

ROWWISE = EmbeddingConfig(optimizer="rowwise_adagrad", lr=0.05)


def options_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return evaluate_options(folder, **{"ranks": None, "embedding": None, **changes})


def evaluate_on_rank(options: dict[str, Any]) -> tuple[str, str, list[float], int]:
    """How it ended ("" if well) on the ranks that are there, what this one printed, the ranks of all targets, and how
    many rows of the item table this one held."""
    shown, seen, rows = io.StringIO(), [], []
    found, loaded = ev.evaluate, load_run

    def watched(model: Any, *args: Any) -> RankResult:
        result = found(model, *args)
        seen.extend(result.ranks.tolist())
        return result

    def counted(*args: Any) -> Any:
        config, store, model = loaded(*args)
        weight = next(value for name, value in model.state_dict().items() if name.startswith("table."))
        parts = weight.local_shards() if hasattr(weight, "local_shards") else None
        rows.append(len(weight) if parts is None else sum(len(part.tensor) for part in parts))
        return config, store, model

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(ev, "evaluate", watched)
        patch.setattr("hstu.train.load_run", counted)
        patch.setenv("COLUMNS", "160")
        try:
            evaluate_run(options, World.current())
        except UserError as error:
            return str(error), shown.getvalue(), seen, 0
    return "", shown.getvalue(), seen, rows[0]


def written(folder: Path) -> dict[str, Any]:
    """evaluation.json without the time it took."""
    return {k: v for k, v in json.loads((folder / "evaluation.json").read_text()).items() if k != "seconds"}


def table_of(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if "written to" not in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders trained on one process. Clipping is what a training with sharded tables would refuse."""
    root = tmp_path_factory.mktemp("runs")
    optim = OptimConfig(lr=3e-3, clip_norm=1.0)
    retrieval = make_config(root, "retrieval", optim=optim, embedding=ROWWISE, run_epochs=1)
    hashed = dataclasses.replace(ROWWISE, ids="hash", rows=30)
    shared = make_config(root, "hash", optim=OptimConfig(lr=3e-3), embedding=hashed, run_epochs=1)
    folders = {"retrieval": train(retrieval), "hash": train(shared)}
    store = planted_store(root / "planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.train.open_store", lambda *_: store)
        folders["ranking"] = train(make_ranking_config(root, name="ranking", run_epochs=1))
    return folders


@pytest.mark.parametrize("kind", ["local", "sharded"])
@pytest.mark.parametrize("name", ["retrieval", "hash", "ranking"])
def test_two_ranks_evaluate_as_one(runs: dict[str, Path], name: str, kind: str) -> None:
    if kind == "sharded":
        pytest.importorskip("torchrec")
    folder, batches = runs[name], {"batch_users": 32, "bootstrap": 10}
    ((end, shown, ranks, rows),) = run_ranks(1, evaluate_on_rank, options_of(folder, eval=batches))
    file = folder / "evaluation-test-best.json"
    one = json.loads(file.read_text())
    file.unlink()
    first, second = run_ranks(2, evaluate_on_rank, options_of(folder, eval=batches, embedding=kind))
    two = json.loads(file.read_text())
    assert end == first[0] == second[0] == ""
    assert one.pop("seconds") > 0 and two.pop("seconds") > 0 and two == one
    assert table_of(first[1]) == table_of(shown) and len(table_of(shown)) > 5 and second[1] == ""
    assert first[2] == second[2] == ranks and (len(ranks) > 64) == (name != "ranking")
    if kind == "local":
        assert first[3] == second[3] == rows
    else:
        assert first[3] + second[3] == rows and 0 < first[3] < rows
