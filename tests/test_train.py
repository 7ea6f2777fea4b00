"""Training: loss falls, resume is bit-identical, accumulation, non-finite values, seeds, variants."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from hstu import checkpoint, runs
from hstu.config import (
    Config,
    DataConfig,
    EvalConfig,
    HSTUConfig,
    KernelsConfig,
    LossConfig,
    OptimConfig,
    PublishedConfig,
    RunConfig,
    SASRecConfig,
    published_row,
    to_dict,
)
from hstu.distributed import World
from hstu.errors import UserError
from hstu.model.retrieval import RetrievalModel
from hstu.nonfinite import first_non_finite
from hstu.optim import WeightAverage, make_optimizer, set_learning_rate
from hstu.progress import Display
from hstu.results import Planned, expand_runs, show_results
from hstu.runs import load_run, lock_folder, open_store
from hstu.train import Trainer, ask_for_determinism, run_command, train
from tests.imports import fresh_processes
from tests.stopping import stopped_at

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("events_per_s",)
"""Logged values that differ between runs."""


def make_config(root: Path, name: str = "run", **changes) -> Config:
    """A run of a few seconds on 150 synthetic users."""
    values = {
        "experiment": "tiny",
        "data": DataConfig(root=str(root / "data"), num_users=150, num_items=60),
        "model": HSTUConfig(dim=8, num_blocks=1, qk_dim=8, v_dim=8, max_len=20, dropout=0.1),
        "loss": LossConfig(num_negatives=16),
        "optim": OptimConfig(lr=3e-3),
        "eval": EvalConfig(ks=[10], bootstrap=0, filter_history="none"),
        "run": RunConfig(dir=str(root / name), epochs=2, batch_users=16, loggers=[], progress=False,
                         save_every_minutes=None, log_every_steps=1),
    }  # fmt: skip
    run_changes = {k[4:]: v for k, v in changes.items() if k.startswith("run_")}
    rest = {k: v for k, v in changes.items() if not k.startswith("run_")}
    values["run"] = dataclasses.replace(values["run"], **run_changes)
    return Config(**{**values, **rest})


def logged(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def final_state(folder: Path) -> checkpoint.Saved:
    saved = checkpoint.load_last(folder / "checkpoints")
    assert saved is not None
    return saved


def assert_same_run(a: Path, b: Path) -> None:
    """Parameters, optimizer state, generator states, position and every logged number are equal, bit for bit."""
    one, two = final_state(a), final_state(b)
    tensors, others = one.tensors(), two.tensors()
    assert tensors.keys() == others.keys() and {name.split(".")[0] for name in tensors} >= {"model", "optimizer", "rng"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    ignored = ("seconds", "eval_seconds", "metrics_size")  # the file's size holds the digits of a rate
    position = [{k: v for k, v in s.values["progress"].items() if k not in ignored} for s in (one, two)]
    assert position[0] == position[1]
    assert logged(a) == logged(b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Config, Path]:
    """One uninterrupted run."""
    config = make_config(tmp_path_factory.mktemp("finished"))
    return config, train(config)


def test_loss_falls_and_the_run_folder_is_complete(finished):
    _, folder = finished
    losses = [line["loss"] for line in logged(folder) if "loss" in line]
    fifth = len(losses) // 5
    assert sum(losses[-fifth:]) / fifth < 0.9 * sum(losses[:fifth]) / fifth
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "curves.png",
                     "result.json", "evaluation.json"}  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    assert result["selected_by"] == "ndcg@10 on validation" and 0 <= result["test"]["hr@10"] <= 1
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["split_hash"] and environment["versions"]["torch"]


def test_the_average_of_the_weights_is_evaluated_kept_and_resumed(tmp_path):
    optim = OptimConfig(lr=3e-3, average_decay=0.9)
    half = train(make_config(tmp_path, "half", optim=optim, run_epochs=1))
    last = final_state(half)
    best = checkpoint.load(half / "checkpoints" / checkpoint.BEST).tensors("model.")
    model, average = last.tensors("model."), last.tensors("average.")
    assert average.keys() == dict(load_run(half)[2].named_parameters()).keys()
    for name, value in average.items():
        assert torch.equal(best[name], value), name
        assert not torch.equal(model[name], value), name
    resumed = train(make_config(tmp_path, "half", optim=optim))
    whole = train(make_config(tmp_path, "whole", optim=optim))
    a, b = final_state(whole), final_state(resumed)
    assert a.values["average_updates"] == b.values["average_updates"] > last.values["average_updates"]
    others = b.tensors("average.")
    assert all(torch.equal(value, others[name]) for name, value in a.tensors("average.").items())


def test_tables_have_a_rate_and_a_decay_of_their_own():
    model = RetrievalModel(HSTUConfig(dim=8, num_blocks=1, qk_dim=8, v_dim=8, max_len=5), num_items=7)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, table_lr=0.02, weight_decay=0.3, table_weight_decay=4.0))
    set_learning_rate(optimizer, 0.05)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        decay = 4.0 if name == "table.weight" else 0.3 if parameter.dim() >= 2 else 0.0
        assert found[id(parameter)] == pytest.approx((0.01 if name == "table.weight" else 0.05, decay)), name


def test_average_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average = WeightAverage(model, decay=0.5)
    for value in (1.0, 2.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
    first = 0.0 * 2 / 11 + 1.0 * 9 / 11  # (1 + 1) / (10 + 1) is the first decay, (1 + 2) / (10 + 2) the second
    expected = first * 3 / 12 + 2.0 * 9 / 12
    with average.applied():
        assert float(model.weight) == pytest.approx(expected, rel=1e-6)
    assert float(model.weight) == 2.0


def test_load_run_gives_the_best_model(finished):
    config, folder = finished
    loaded, store, model = load_run(folder)
    assert to_dict(loaded) == to_dict(config) and store.num_items == 60
    best = checkpoint.load(folder / "checkpoints" / checkpoint.BEST).tensors("model.")
    assert all(torch.equal(v, best[n]) for n, v in model.state_dict().items())


def test_same_seed_same_run_other_seed_other_run(finished, tmp_path):
    config, folder = finished
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "again")))
    assert_same_run(folder, train(again))
    other = dataclasses.replace(again, seed=1, run=dataclasses.replace(config.run, dir=str(tmp_path / "other")))
    assert logged(train(other)) != logged(folder)


def test_saving_beside_the_training_changes_nothing(finished, tmp_path):
    config, folder = finished
    run = dataclasses.replace(config.run, dir=str(tmp_path / "r"), save_in_background=False, save_every_steps=1)
    assert_same_run(folder, train(dataclasses.replace(config, run=run)))


def wait_for_steps(folder: Path, count: int, process: BaseProcess) -> None:
    """Until the run has logged ``count`` lines since it began."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.002)
    assert process.is_alive() or count == 0, f"it ended with {process.exitcode}"


@pytest.mark.slow
def test_killed_at_random_points_the_run_ends_bit_identical(tmp_path, capsys):
    whole = train(make_config(tmp_path, "whole", run_epochs=4, run_threads=1))
    killed = make_config(tmp_path, "killed", run_epochs=4, run_threads=1, run_save_every_steps=2)
    rng, reached = random.Random(7), 0
    for _ in range(2):
        process = fresh_processes().Process(target=train, args=(killed,))
        process.start()  # once step 5 is logged, the save of step 4 has waited for that of step 2
        wait_for_steps(Path(killed.run.dir), min(20, reached + rng.randint(5, 8)), process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        path = Path(killed.run.dir) / "metrics.jsonl"
        reached = len(path.read_text().splitlines())
    assert 0 < reached < 44, "the run was not killed midway"
    capsys.readouterr()
    assert_same_run(whole, train(killed))
    assert "resumed at step" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_first_and_the_run_resumes(finished, tmp_path, number):
    config, folder = finished
    stopped = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "stopped")))
    with stopped_at(4, number) as raised:
        train(stopped)
    assert raised.value.exit_code == 128 + number
    after = final_state(Path(stopped.run.dir))
    assert after.values["progress"]["global_step"] == 5
    assert_same_run(folder, train(stopped))


def test_a_finished_run_is_not_repeated_and_more_epochs_continue_it(finished, tmp_path):
    config, _ = finished
    short = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "r"), epochs=1))
    folder = train(short)
    before = (folder / "result.json").read_bytes()
    train(short)
    assert (folder / "result.json").read_bytes() == before
    longer = dataclasses.replace(short, run=dataclasses.replace(short.run, epochs=2))
    train(longer)
    assert json.loads((folder / "result.json").read_text())["epochs"] == 2
    assert_same_run(folder, Path(config.run.dir))


def test_resuming_with_another_config_is_refused(finished):
    config, folder = finished
    other = dataclasses.replace(config, optim=OptimConfig(lr=1.0))
    with pytest.raises(UserError, match=r"optim\.lr=0\.003, now 1\.0"):
        train(other)


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    # Full softmax without dropout has no randomness, so two batches of 75 must step like one of 150.
    model = HSTUConfig(dim=8, num_blocks=1, qk_dim=8, v_dim=8, max_len=20, dropout=0.0)
    common = {"model": model, "loss": LossConfig(name="full_softmax"), "run_epochs": 1}
    large = train(make_config(tmp_path, "large", run_batch_users=150, **common))
    optim = OptimConfig(lr=3e-3, accumulate_steps=2)
    small = train(make_config(tmp_path, "small", run_batch_users=75, **{**common, "optim": optim}))
    assert logged(large)[0]["loss"] == pytest.approx(logged(small)[0]["loss"], rel=1e-6)
    one, two = (final_state(f).tensors("optimizer.") for f in (large, small))
    moments = [name for name in one if name.endswith(".exp_avg")]
    assert moments
    for name in moments:  # Adam's first moment after one step is the gradient times 0.1
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "model, loss",
    [
        (SASRecConfig(dim=8, num_blocks=1, ffn_dim=8, max_len=20), "shared_bank"),
        (HSTUConfig(dim=8, num_blocks=1, qk_dim=8, v_dim=8, max_len=20), "in_batch"),
    ],
    ids=["sasrec-shared_bank", "hstu-in_batch"],
)
def test_other_models_and_losses_learn(tmp_path, model, loss):
    loss_config = LossConfig(name=loss, num_negatives=32, logq_correction=loss == "in_batch")
    folder = train(make_config(tmp_path, model=model, loss=loss_config))
    losses = [line["loss"] for line in logged(folder) if "loss" in line]
    assert losses[-1] < losses[0]


def test_non_finite_values_stop_the_run_and_keep_the_checkpoint(tmp_path, monkeypatch):
    config = make_config(tmp_path, run_save_every_steps=2)
    step = Trainer._step

    def poisoned(self, step_input):
        if self.progress.global_step == 5:
            with torch.no_grad():
                self.model.encoder.layers[0].bias.time[0, 0] = float("nan")
        return step(self, step_input)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    with pytest.raises(UserError, match=r"step 5 .*parameter encoder\.layers\.0\.bias\.time.*step-000000004;"):
        train(config)
    assert all(torch.isfinite(t).all() for t in final_state(Path(config.run.dir)).tensors("model.").values())


def test_first_non_finite_names_module_loss_and_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(1e30)
        model[0].bias.zero_()
    big, small = torch.full((1, 2), 1e30), torch.ones(1, 2)
    assert first_non_finite(model, lambda: model(big).sum()) == "output of 0 (Linear)"
    assert first_non_finite(model, lambda: model(small).square().sum()) == "the loss"
    zero = torch.zeros(1, 2)
    assert first_non_finite(model, lambda: model[0](zero).sum().sqrt()) == "gradient of 0.weight"


def test_early_stopping(tmp_path):
    optim = OptimConfig(lr=1e-12)  # nothing improves after the first evaluation
    folder = train(make_config(tmp_path, run_epochs=9, run_early_stop_evals=2, optim=optim))
    result = json.loads((folder / "result.json").read_text())
    assert result["epochs"] < 9 and result["epochs"] - result["best_epoch"] == 2


def test_seeds_and_variants_in_one_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = to_dict(make_config(tmp_path, run_epochs=1))
    options |= {"seeds": [3, 4], "variants": {"no bias": ["model.bias.time=false", "model.bias.position=false"]}}
    plan = expand_runs(options)
    assert [(p.variant, p.config.seed, p.config.model.bias.time) for p in plan] == [
        ("hstu", 3, True), ("hstu", 4, True), ("no bias", 3, False), ("no bias", 4, False),
    ]  # fmt: skip
    assert len({p.config.run.dir for p in plan}) == 4
    run_command(options)
    shown = capsys.readouterr().out
    for text in ("±", "no bias", "most popular", "last-item", "oracle"):
        assert text in shown


def test_wrong_variants_and_devices_are_one_clear_line(tmp_path):
    options = to_dict(make_config(tmp_path))
    with pytest.raises(UserError, match="variants: x: "):
        expand_runs({**options, "variants": {"x": ["model.nothing=1"]}})
    with pytest.raises(UserError, match="float32 on the CPU"):
        train(make_config(tmp_path, run_precision="bfloat16", run_device="cpu"))
    with pytest.raises(UserError, match="select_metric=hr@7"):
        train(make_config(tmp_path, "other", run_select_metric="hr@7", run_epochs=1))


def test_published_row_of_another_protocol_is_not_shown(finished, tmp_path):
    config, folder = finished
    evaluation = json.loads((folder / "evaluation.json").read_text())
    plan = expand_runs(to_dict(config))
    published = dataclasses.replace(
        config.published, source="them", dataset="synthetic", model="hstu", protocol="stable", metrics={"hr@10": 0.9}
    )
    shown = io.StringIO()
    run = dataclasses.replace(plan[0], folder=folder, config=dataclasses.replace(config, published=published))
    show_results([run], Console(file=shown, width=160))
    assert evaluation["protocol"] != "stable"
    assert "another way" in shown.getvalue() and "0.9000" not in shown.getvalue()


def test_the_published_row_stands_beside_the_run_it_belongs_to():
    base = Config(data=DataConfig(name="d", source="log"), model=HSTUConfig())
    row = PublishedConfig(source="them", dataset="d", model="hstu", metrics={"hr@10": 0.5})
    config = dataclasses.replace(base, published=row)
    assert published_row(config) is row
    others = [
        {"data": DataConfig(name="e", source="log")},
        {"data": DataConfig(name="d", source="log", protocol="stable")},
        {"data": DataConfig(name="d", source="log", split="global-time", split_time="0.9q")},
        {"model": SASRecConfig()},
        {"eval": EvalConfig(filter_history="full")},
        {"published": PublishedConfig()},
    ]
    assert [published_row(dataclasses.replace(config, **change)) for change in others] == [None] * len(others)


@pytest.mark.parametrize("device, autotune, times", [("cuda", True, 1), ("cuda", False, 0), ("cpu", True, 0)])
def test_the_start_says_once_that_autotune_is_not_repeatable(capsys, device, autotune, times):
    config = Config(kernels=KernelsConfig(autotune=autotune))
    store = SimpleNamespace(meta={}, num_items=5)
    data = SimpleNamespace(users=[1], num_skipped=0, num_steps=lambda epoch: 1)
    parameters = {"total": 1, "without_embeddings": 1}
    Display(False).start_run(config, store, data, parameters, World(device=torch.device(device)), Path("run"), 0)
    assert capsys.readouterr().out.count("results differ in the last bits between runs and ranks") == times


def test_a_run_folder_is_for_one_process(finished):
    _, folder = finished
    held = lock_folder(folder)
    with pytest.raises(UserError, match="another process"):
        lock_folder(folder)
    held.close()
    lock_folder(folder).close()


def test_a_restarted_run_waits_for_the_lock_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_INTERVAL_S", 0.02)
    held = lock_folder(tmp_path)
    with pytest.raises(UserError, match="another process"):
        lock_folder(tmp_path, patience_s=0.1)
    threading.Timer(0.1, held.close).start()
    lock_folder(tmp_path, patience_s=20.0).close()


@pytest.mark.parametrize("again, patience_s", [("", 0.0), ("restart 1: a rank ended", runs.LOCK_PATIENCE_S)])
def test_only_a_restarted_run_waits(finished, monkeypatch, again, patience_s):
    config, folder = finished

    def refused(folder, patience_s):
        raise UserError(f"patience {patience_s}")

    monkeypatch.setattr("hstu.train.lock_folder", refused)
    with pytest.raises(UserError, match=f"patience {patience_s}"):
        Trainer(config, open_store(config), folder, Display(False, shown=False), World(again=again))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_not_another_process(tmp_path, monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    with pytest.raises(UserError, match=rf"cannot be locked \({os.strerror(number)}\): expected a file system with"):
        lock_folder(tmp_path, patience_s=60.0)


def test_several_runs_resume_by_their_common_folder(tmp_path):
    options = to_dict(make_config(tmp_path, "several", run_epochs=1)) | {"seeds": [0, 1]}
    with stopped_at(2, seed=1, match=f"run.dir={tmp_path / 'several'}$"):
        run_command(options)
    run_command(options)
    results = sorted((tmp_path / "several").glob("*/result.json"))
    assert [p.parent.name for p in results] == ["tiny-seed0", "tiny-seed1"]
    with pytest.raises(UserError, match="holds a single run"):
        run_command({**options, "run": {**options["run"], "dir": str(results[0].parent)}})


@pytest.mark.parametrize(
    "key, value",
    [
        ("run.log_every_steps", 0), ("run.eval_every_epochs", 0), ("run.save_every_steps", 0), ("eval.bootstrap", -1),
        ("model.qk_dim", 0), ("optim.eps", 0.0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_before_anything_runs(tmp_path, key, value):
    options = to_dict(make_config(tmp_path))
    group, name = key.split(".")
    options[group][name] = value
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        expand_runs(options)


def test_brackets_in_a_folder_are_no_markup(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "a[b] [/c"
    config = make_config(tmp_path, run_epochs=1, run_dir=str(folder))
    show_results([Planned("hstu", config, train(config))], Display(False).console)
    assert capsys.readouterr().out.count(str(folder)) == 2


def test_determinism_on_cuda(monkeypatch):
    """What torch and cuBLAS are asked for; memory that the kernels write is not filled before."""
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    was = torch.utils.deterministic.fill_uninitialized_memory
    try:
        ask_for_determinism()
        assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = was
