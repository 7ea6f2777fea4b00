"""hstu-evaluate over ranks: the result of one process, with whole tables and with sharded ones."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hstu import evaluate as ev
from hstu import launch
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
        weight = next(v for n, v in model.state_dict().items() if n in ("table.weight", "table.rows.weight"))
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


def table_of(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if "written to" not in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders trained on one process, one of them with clipped gradients."""
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


def copied(folder: Path, to: Path, group: str, **changes: Any) -> Path:
    """The run folder again, with other values in a group of its config."""
    shutil.copytree(folder, to)
    values = yaml.safe_load((to / "config.yaml").read_text())
    values[group] |= changes
    (to / "config.yaml").write_text(yaml.safe_dump(values))
    return to


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_with_narrow_sharded_rows_is_evaluated_so(runs: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    """As trained, without being asked to; on CPUs, where there is no bfloat16, with wide rows."""
    pytest.importorskip("torchrec")
    wide = run_ranks(1, evaluate_on_rank, options_of(runs["retrieval"]))[0][2]
    narrow = {"kind": "sharded", "dtype": dtype, "comm_dtype": dtype, "pipeline": True}
    folder = copied(runs["retrieval"], tmp_path / "run", "embedding", **narrow)
    first, second = run_ranks(2, evaluate_on_rank, options_of(folder))
    assert first[0] == second[0] == "" and first[3] + second[3] == 61
    assert first[2] == second[2] == pytest.approx(wide, abs=1.0 if dtype == "float16" else 0.0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("retrieval", {"embedding": "both"}, "embedding='both': expected one of local, sharded"),
        ("retrieval", {"split": "train"}, "split=train: expected test or validation"),
        ("ranking", {"eval": {"ks": [5]}}, "eval.ks=[5]: "),
    ],
    ids=["kind", "split", "option of retrieval"],
)
def test_all_ranks_refuse_alike(runs: dict[str, Path], name: str, changes: dict[str, Any], message: str) -> None:
    (first, shown, *_), (second, *_) = run_ranks(2, evaluate_on_rank, options_of(runs[name], **changes))
    assert first == second and message in first and shown == ""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the launcher would have started: its settings, the command and the options."""
    found: list[Any] = []

    def elastic(launcher: Any, *_: Any) -> Any:
        def run(*args: str) -> None:
            found.append((launcher, args, json.loads((Path(args[2]) / launch.OPTIONS).read_text())))

        return run

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return found


def run_main(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["hstu-evaluate", *options])
    try:
        return ev.main() or 0
    except SystemExit as stop:
        return int(str(stop.code))


def test_the_command_starts_the_ranks(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, "run=X", "ranks=3", "device=cpu", "embedding=sharded", "eval.ks=[5]") == 0
    ((launcher, args, options),) = started
    assert (launcher.nproc_per_node, launcher.max_restarts) == (3, 0)
    assert (*args[:2], args[3]) == ("-m", "hstu.launch", "hstu.evaluate")
    assert [options[n] for n in ("run", "ranks", "embedding", "device", "which")] == ["X", 3, "sharded", "cpu", "best"]
    assert options["eval"]["ks"] == [5]


@pytest.mark.parametrize(
    ("option", "message"),
    [("ranks=0", "ranks=0: expected >= 1 or null"), ("ranks=two", "ranks=two: expected >= 1 or null"),
     ("device=tpu", "device=tpu: expected auto, cpu or cuda")],
)  # fmt: skip
def test_wrong_options_start_nothing(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert run_main(monkeypatch, "run=X", "ranks=2", option) == 1 and not started
    assert capsys.readouterr().err.replace("'", "") == f"error: {message}\n"


def test_an_interrupted_evaluation_ends_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.FOLDER, str(tmp_path))
    assert launch.conclude(KeyboardInterrupt()) == 0
    with pytest.raises(KeyboardInterrupt):
        launch._raise_outcome(tmp_path / launch.OUTCOME, None, None)
