"""The table over alpha: one row per variant, saved shares and times in it, quality only from finished runs."""

import json

import pytest

from benchmarks.stochastic_length import compose, main, quality
from hstu.errors import UserError

OPTIONS = [
    "data.num_users=120", "data.num_items=60", "model.dim=8", "model.qk_dim=8", "model.v_dim=8", "model.num_blocks=1",
    "model.max_len=20", "loss.num_negatives=16", "run.threads=1", "run.stochastic_length.alpha=1.2", "run.epochs=2",
    "run.device=cpu", "variants=null", "--steps", "2", "--no-record",
]  # fmt: skip


def test_a_row_has_the_savings_and_the_time_of_a_step(tmp_path, capsys):
    main(["synthetic", f"data.root={tmp_path}", *OPTIONS])
    head, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines()[-3:])
    values = dict(zip(head, row, strict=True))
    assert values["alpha"] == "1.2" and list(values)[3] == "CPU s/step median"
    assert 0 < float(values["tokens_dropped"]) < float(values["attention_work_saved"]) < 1
    assert 0 < float(values["20 %"]) <= float(values["CPU s/step median"]) <= float(values["80 %"])


def test_quality_is_read_from_the_runs_of_the_same_command(tmp_path):
    entry = compose("ml-1m/stochastic-length", [])[3]
    assert entry.variant == "alpha 1.7"
    assert quality(None, entry) == {}
    with pytest.raises(UserError, match="finish hstu-train with run.dir="):
        quality(tmp_path, entry)
    folder = tmp_path / "ml-1m-stochastic-length-alpha-1-7-seed0"
    folder.mkdir()
    result = {"seed": 0, "epochs": entry.config.run.epochs, "test": {"hr@10": 0.25, "ndcg@10": 0.125, "mrr": 0.1}}
    (folder / "result.json").write_text(json.dumps(result))
    assert quality(tmp_path, entry) == {"hr@10": 0.25, "ndcg@10": 0.125}
    (folder / "result.json").write_text(json.dumps(result | {"epochs": 1}))
    with pytest.raises(UserError, match="1 epochs: not a run of this command"):
        quality(tmp_path, entry)


def test_the_variants_differ_in_alpha_only():
    plan = compose("ml-1m/stochastic-length", [])
    alphas = [entry.config.run.stochastic_length.alpha for entry in plan]
    assert alphas == [2.0, 1.9, 1.8, 1.7, 1.6, 1.4, 1.2]
    assert len({entry.config.run.batch_users for entry in plan}) == 1
    assert all(entry.config.model == plan[0].config.model for entry in plan)
