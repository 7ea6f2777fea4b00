"""Full-ranking evaluation against a loop over every candidate, and the command."""

import json
import sys

import numpy as np
import pytest
import torch

from hstu import evaluate as ev
from hstu.config import PublishedConfig
from hstu.data.splits import Targets, make_split
from hstu.errors import UserError
from tests.figures import rendered
from tests.serving import brute_rank, fake_train, seen_items, small_config, small_model, small_store


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "store")


@pytest.mark.parametrize("filter_history", ["truncated", "full", "none"])
def test_ranks_equal_a_loop_over_candidates(store, filter_history):
    config = small_config(filter_history=filter_history)
    model = small_model(config, store)
    split = make_split(store, "validation")
    result = ev.evaluate(model, store, split.test, config)
    assert result.users.tolist() == split.test.users.tolist()
    table = torch.nn.functional.normalize(model.table.weight.detach(), dim=1)
    for m, (user, row) in enumerate(zip(result.users, result.rows, strict=True)):
        from hstu.data.batches import eval_batches

        one = Targets(result.users[m : m + 1], result.rows[m : m + 1])
        ((batch, label),) = eval_batches(store, one, config.model.max_len, 1)
        with torch.inference_mode():
            scores = (table @ model.last(batch)[0]).tolist()
        candidates = {i: scores[i] for i in range(1, store.num_items + 1)}
        seen = seen_items(store, user, row, filter_history, config.model.max_len)
        assert int(label) == store.item_ids[row]
        assert result.ranks[m] == brute_rank(candidates, int(label), seen)


def test_batch_size_does_not_change_ranks(store):
    split = make_split(store, "reference")
    model = small_model(small_config(), store)
    one = ev.evaluate(model, store, split.test, small_config(batch_users=1))
    many = ev.evaluate(model, store, split.test, small_config(batch_users=512))
    assert one.ranks.tolist() == many.ranks.tolist()


def test_equal_scores_share_the_middle_rank(store):
    """A table of equal rows ties all candidates: the rank is the middle of what the filter leaves."""
    config = small_config(filter_history="none")
    model = small_model(config, store)
    with torch.no_grad():
        model.table.weight[1:] = 0.25
    result = ev.evaluate(model, store, make_split(store).test, config)
    assert result.ranks.tolist() == [1 + (store.num_items - 1) / 2] * len(result)


def test_model_is_left_in_its_mode(store):
    model = small_model(small_config(), store)
    for training in (True, False):
        model.train(training)
        ev.evaluate(model, store, make_split(store).test, small_config())
        assert model.training is training


def test_targets_without_history_are_left_out_and_counted(store):
    users = np.array([0, 4])
    targets = Targets(users, np.asarray(store.offsets)[users])  # the first event of each: nothing before it
    more = make_split(store).test
    both = Targets(np.concatenate([targets.users, more.users]), np.concatenate([targets.rows, more.rows]))
    model = small_model(small_config(), store)
    result = ev.evaluate(model, store, both, small_config())
    assert result.num_empty == 2
    assert result.rows.tolist() == more.rows.tolist()
    with pytest.raises(UserError, match="nothing to evaluate: none of the 2 held-out events"):
        ev.evaluate(model, store, targets, small_config())


def test_user_groups_take_whole_users(tmp_path):
    flags = np.zeros(65, dtype=np.float32)
    flags[[0, 13]] = 1  # user 0 (rows 0..11) and user 1 (rows 12..14)
    store = small_store(tmp_path / "flagged", columns={"timestamp_estimated": flags})
    groups = ev.user_groups(store, make_split(store).test.users)
    assert {n: g.tolist() for n, g in groups.items()} == {
        "all users": [True] * 5,
        "users without estimated timestamps": [False, False, True, True, True],  # users 0, 1, 2, 3, 6
    }
    assert ev.dataset_label(store) == "small, 3.1 % of the timestamps estimated"  # 2 of 65


def test_assess_puts_systems_groups_and_breakdowns_together(store):
    config = small_config()
    split = make_split(store)
    result = ev.evaluate(small_model(config, store), store, split.test, config)
    evaluation = ev.assess(config, store, split, result)
    assert [(r.system, r.group) for r in evaluation.rows] == [
        ("hstu", "all users"), ("most popular", "all users"), ("last-item transitions", "all users"),
    ]  # fmt: skip
    ours = evaluation.rows[0]
    assert ours.metrics["hr@10"] == np.mean(result.ranks <= 10)
    low, high = ours.intervals["mrr"]
    assert low <= ours.metrics["mrr"] <= high
    assert [sum(g.count for g in groups) for groups in evaluation.breakdowns.values()] == [len(result)] * 3


def test_oracle_is_the_best_system_and_knows_the_ranks(tmp_path):
    """Ranks under the true distribution equal a loop, and beat both baselines."""
    from hstu.config import DataConfig
    from hstu.data.synthetic import process_of, write_synthetic_store

    data = DataConfig(num_users=120, num_items=60)
    store = write_synthetic_store(data, tmp_path / "synthetic")
    process = process_of(store)
    config = small_config(filter_history="none")
    config.data = data
    split = make_split(store)
    ranks = ev.oracle_ranks(config, store, split.test)
    row, first = int(split.test.rows[7]), int(store.offsets[split.test.users[7]])
    history = np.array([0, row - first])
    (probs,) = process.next_item_probs(
        history, store.item_ids[first:row], store.timestamps[first:row], store.timestamps[row : row + 1]
    )
    scores = dict(enumerate(probs[0].tolist(), 1))
    assert ranks[7] == brute_rank(scores, int(store.item_ids[row]), set())
    from hstu.baselines import rank_baselines

    for name, other in rank_baselines(store, split.train_end, split.test, "none").items():
        assert np.mean(1 / ranks) > np.mean(1 / other), name


def run_command(monkeypatch, *options):
    """Exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["hstu-evaluate", *options])
    try:
        return ev.main() or 0
    except SystemExit as stop:
        return stop.code


def test_command_prints_tables_and_writes_json(store, tmp_path, monkeypatch, capsys):
    config = small_config()
    config.published = PublishedConfig(source="a paper", dataset="small", model="hstu", metrics={"hr@10": 0.5})
    fake_train(monkeypatch, config, store, small_model(config, store))
    monkeypatch.setenv("COLUMNS", "160")
    assert run_command(monkeypatch, f"run={tmp_path}", "eval.ks=[5,10]", "device=cpu") == 0
    out = capsys.readouterr().out
    for text in ("hr@5", "95 %", "interval", "most popular", "last-item transitions", "published", "(a paper)",
                 "0.5000", "hstu on test, by history length", "by item popularity", "by time gap"):  # fmt: skip
        assert text in out
    assert "hr@1 " not in out
    assert not (tmp_path / "evaluation.json").exists()  # it keeps what the run's own options give
    written = json.loads((tmp_path / "evaluation-test-best.json").read_text())
    assert written["split_hash"] == store.meta["split_hash"]
    assert written["eval"]["ks"] == [5, 10]
    assert set(written["rows"][0]["metrics"]) == {"hr@5", "ndcg@5", "hr@10", "ndcg@10", "mrr"}
    assert run_command(monkeypatch, f"run={tmp_path}", "split=validation", "eval.bootstrap=0", "device=cpu") == 0
    assert json.loads((tmp_path / "evaluation-validation-best.json").read_text())["rows"][0]["intervals"] == {}


def test_published_row_of_the_other_protocol_is_not_shown(store, tmp_path, monkeypatch, capsys):
    config = small_config()
    config.published = PublishedConfig(source="a paper", protocol="stable", metrics={"hr@10": 0.5})
    fake_train(monkeypatch, config, store, small_model(config, store))
    assert run_command(monkeypatch, f"run={tmp_path}", "device=cpu") == 0
    assert "a paper" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "run"),
        (["run=X", "eval.kz=[1]"], "kz"),
        (["run=X", "ten"], "option 'ten' cannot be read: expected name=value"),
        (["run=X", "eval.ks=[0]", "device=cpu"], "eval.ks=[0]: expected a list of ranks >= 1"),
        (["run=X", "eval.filter_history=some", "device=cpu"], "one of truncated, full, none"),
        (["run=X", "split=train", "device=cpu"], "split=train: expected test or validation"),
        (["run=X", "device=tpu"], "device=tpu: expected auto, cpu or cuda"),
    ],
    ids=["no-run", "unknown-key", "no-equals", "bad-k", "bad-filter", "bad-split", "bad-device"],
)
def test_wrong_options_give_one_line(store, monkeypatch, capsys, options, message):
    fake_train(monkeypatch, small_config(), store, small_model(small_config(), store))
    assert run_command(monkeypatch, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1


def test_commands_on_a_run_that_was_trained_here(tmp_path, monkeypatch, capsys):
    """Nothing faked: train one epoch, evaluate it, recommend from it."""
    import hstu
    from hstu.config import from_dict
    from hstu.train import train

    run = tmp_path / "run"
    values = {
        "data": {"root": str(tmp_path / "data"), "num_users": 80, "num_items": 60},
        "model": {"name": "hstu", "dim": 8, "num_blocks": 1, "qk_dim": 8, "v_dim": 8, "max_len": 20},
        "run": {"dir": str(run), "epochs": 1, "batch_users": 16, "device": "cpu", "progress": False, "loggers": []},
        "eval": {"ks": [10], "bootstrap": 10, "filter_history": "none"},
    }
    with rendered():
        assert train(from_dict(values)) == run
    trained = json.loads((run / "evaluation.json").read_text())
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "160")
    assert run_command(monkeypatch, f"run={run}", "device=cpu") == 0
    assert "oracle (true process)" in capsys.readouterr().out
    again = json.loads((run / "evaluation.json").read_text())
    assert [row["metrics"] for row in again["rows"]] == [row["metrics"] for row in trained["rows"]]
    result = hstu.load(run, device="cpu").recommend(user=3, k=5)
    assert len(result.items) == 5 and "user 3: recommended" in str(result)
    assert (run / "curves.png").stat().st_size > 5000


def test_validation_part_needs_validation_selection(store):
    with pytest.raises(UserError, match="held out no validation events"):
        ev.split_targets(make_split(store, "reference"), "validation")
