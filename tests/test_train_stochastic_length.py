"""A training with stochastic length: reported, resumed bit for bit, and evaluated on whole histories."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from hstu.config import StochasticLengthConfig
from hstu.data.batches import EventColumns, TrainBatches, eval_batches
from hstu.data.splits import make_split
from hstu.data.stochastic_length import savings_text
from hstu.evaluate import evaluate
from hstu.progress import Display
from hstu.runs import load_run
from hstu.train import train
from tests.stopping import stopped_at
from tests.test_train import assert_same_run, logged, make_config

ON = StochasticLengthConfig(1.3, "uniform")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Config, folder and printed text of one uninterrupted run of two epochs."""
    config = make_config(tmp_path_factory.mktemp("finished"), run_stochastic_length=ON)
    display = Display(enabled=False)
    display.console = Console(file=io.StringIO(), width=200)
    folder = train(config, display)
    return config, folder, display.console.file.getvalue()


def training_data(config, store):
    run, model = config.run, config.model
    split = make_split(store, run.selection)
    return TrainBatches(EventColumns(store), store, split, model.max_len, config.seed, run.batch_users,
                        run.batch_tokens, run.stochastic_length)  # fmt: skip


def test_what_was_saved_is_logged_and_recorded(finished):
    config, folder, text = finished
    _, store, _ = load_run(folder)
    data = training_data(config, store)
    steps = [line for line in logged(folder) if "loss" in line]
    assert len(steps) == 2 * data.num_steps(0)
    for index, line in enumerate(steps):
        epoch, step = divmod(index, data.num_steps(0))
        expected = data.savings(epoch, step + 1)
        assert {k: line[k] for k in expected} == pytest.approx(expected)
    ends = [line for line in logged(folder) if line.get("kind") == "validation"]
    for epoch, line in enumerate(ends):
        assert 0 < line["tokens_dropped"] < line["attention_work_saved"] < 1
        assert line["tokens_dropped"] == pytest.approx(data.savings(epoch)["tokens_dropped"])
        assert savings_text(line, "  ") in text
    result = json.loads((folder / "result.json").read_text())["timing"]
    for name in ("tokens_dropped", "attention_work_saved"):
        assert result[name] == pytest.approx(np.mean([line[name] for line in ends]))


def test_the_number_of_trained_events_is_what_was_left(finished):
    config, folder, _ = finished
    _, store, _ = load_run(folder)
    result = json.loads((folder / "result.json").read_text())["timing"]
    trainer_events = result["events_per_s"] * result["train_s"]
    data = training_data(config, store)
    assert trainer_events == pytest.approx(2 * data.lengths.sum() * (1 - result["tokens_dropped"]))


def test_stopped_and_resumed_it_ends_bit_identical(finished, tmp_path):
    config, folder, _ = finished
    stopped = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "stopped")))
    with stopped_at(12):
        train(stopped)
    assert_same_run(folder, train(stopped))


def test_off_there_is_nothing_to_say():
    assert savings_text({"s_per_step": 0.1}, "; ") == ""
    some = {"tokens_dropped": 0.25, "attention_work_saved": 0.5}
    assert savings_text(some, "; ") == "; 25.0 % of the events dropped, 50.0 % of the attention work saved"


def test_evaluation_reads_whole_histories(finished):
    config, folder, _ = finished
    _, store, model = load_run(folder)
    targets = make_split(store, config.run.selection).test
    for batch, _ in eval_batches(store, targets, config.model.max_len, 1000):
        history = np.minimum(targets.rows - store.offsets[targets.users], config.model.max_len)
        assert batch.offsets.diff().tolist() == history.tolist()
    off = dataclasses.replace(config, run=dataclasses.replace(config.run, stochastic_length=StochasticLengthConfig()))
    device = model.table.weight.device
    with_it, without = (evaluate(model, store, targets, c, device) for c in (config, off))
    np.testing.assert_array_equal(with_it.ranks, without.ranks)
