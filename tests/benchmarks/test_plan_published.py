"""Published GPU measurements and what the plan says of them: figures as they stand there, the same work."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks import plan_published, published
from benchmarks.plan_published import predict_ms, rows_of, same_work, step_of
from hstu import report
from hstu.errors import UserError
from hstu.plan import NOT_VALIDATED

STEP = published.FULL_STEP


def flops_of(options: tuple[str, ...]) -> dict[str, float]:
    return {part.name: part.flops for part in step_of(options).parts}


# The figures


def test_parts_of_the_full_step_are_its_window() -> None:
    """185.407 ms of GPU time; 187.01 ms a step by the clock."""
    assert sum(STEP.parts_ms.values()) + STEP.other_ms == pytest.approx(185.407, abs=0.0011)  # each is rounded


def test_their_count_of_the_full_step() -> None:
    """32 users of 4,099 tokens, of which 3 are seen by all: 26.41 + 6.60, 30.88 and 0.00645 TFLOP, 63.89 in all."""
    work = published.recsys_tflop(np.full(32, 4099.0), 8, contextual=3)
    assert {name: round(value, 2) for name, value in work.items()} == {
        "linear layers": 33.01, "attention": 30.88, "rest": 0.01,
    }  # fmt: skip
    assert sum(work.values()) == pytest.approx(63.89, abs=0.005)


@pytest.mark.parametrize(("width", "length", "tflops"), [(64, 4096, 389), (128, 1024, 293), (256, 8192, 426)])
def test_times_and_tflops_of_the_heat_map_agree(width: int, length: int, tflops: float) -> None:
    """Two numbers of one cell: forward and backward, 32 users, 4 heads, half of the square."""
    flops = 3.5 * 2 * 32 * 4 * width * length**2
    measured = published.HEATMAP_MS[width][published.HEATMAP_LENGTHS.index(length)]
    assert flops / (1e-3 * measured) / 1e12 == pytest.approx(tflops, rel=0.01)


def test_share_of_the_layers_attention_by_hand() -> None:
    """4,096 tokens: 12.6219 ms more than with CUTLASS attention, which took 9.55; 3.5 * 2 * 32 * 1,024 * 4,096^2."""
    flops = 3.5 * 2 * 32 * 1024 * 4096**2
    assert published.triton_attention_tflops(4096) == pytest.approx(flops / 22.1719e-3 / 1e12, rel=1e-6)


def test_mean_of_cut_zipf_lengths_by_hand() -> None:
    """Exponent 2, cut at 3: shares 6/pi^2 of ones, a quarter of that of twos, the rest threes."""
    ones = 6 / np.pi**2
    twos, threes = ones / 4, 1 - ones - ones / 4
    mean, square = published.zipf_lengths(2.0, 3)
    assert mean == pytest.approx(ones + 2 * twos + 3 * threes, rel=0.01)
    assert square == pytest.approx(ones + 4 * twos + 9 * threes, rel=0.02)


def test_expected_work_of_the_zipf_lengths_is_that_of_the_profiled_step() -> None:
    """Its fastest: 391.5 TFLOP/s over a window of which 3.12 ms are 3.33 %. The work of 512 users scatters by 9 %."""
    profiled = 391.5 * 3.12e-3 / 0.0333
    assert sum(published.zipf_tflop().values()) == pytest.approx(profiled, rel=0.09)


# The plan


def test_our_work_of_the_full_step_is_theirs() -> None:
    """But for the product of u, v, q, k, done four times for their three, and nine products of a pair for seven."""
    ours = flops_of(STEP.options)
    assert ours["linear layers"] / 1e12 == pytest.approx(26.41 * 4 / 3 + 6.60, rel=1e-3)
    assert ours["attention"] / 1e12 == pytest.approx(30.88 * 9 / 7, rel=2e-3)


def test_a_layer_by_hand() -> None:
    """1,024 tokens on an H100: 0.5 and 0.2 of 989 TFLOP/s, 0.6 of 3,350 GB/s; 32,768 rows of width 1,024."""
    (layer,) = (m for m in published.layers() if m.kernels == "Triton" and m.name == "layer, 1,024 tokens")
    linear = 32_768 * (8 * 1024 * 4096 + 6 * 1024 * 1024) / (0.5 * 989e12)
    touched = 6 * 32_768 * 14 * 1024 / (0.6 * 3350e9)
    attention = 9 * 2 * 1024 * (32 * 1024 * 1025 / 2) / (0.2 * 989e12)
    (row,) = rows_of(layer)
    assert row.predicted == pytest.approx(1e3 * (linear + touched + attention))
    assert row.same_work == pytest.approx(1e3 * (linear * 3.75 / 4.75 + touched + attention * 7 / 9), rel=2e-3)
    assert row.their_share is None
    assert row.ratios()["predicted"] == pytest.approx(row.predicted / row.measured)


def test_work_is_scaled_where_they_count_it() -> None:
    predicted = predict_ms(STEP)
    scaled = same_work(STEP, predicted)
    assert {name for name in predicted if scaled[name] != predicted[name]} == {"linear layers", "attention"}
    assert scaled["attention"] / predicted["attention"] == pytest.approx(7 / 9, rel=2e-3)


def test_tables_are_planned_with_their_own_width() -> None:
    """Rows of 128 numbers, not 1,024; gradients of the layers as wide as the model."""
    rows = {t.name: t for t in step_of(STEP.table_options or ()).transfers}
    assert rows["rows of events"].sent == pytest.approx(32 * 2048 * 15 / 16 * 128 * 4)
    wide = {t.name: t.seconds for t in step_of(STEP.options).transfers}
    taken = [rows[name].seconds for name in rows if name not in plan_published.GRADIENTS]
    sent = wide["gradients of dense weights"] + sum(taken)
    assert predict_ms(STEP)["communication"] == pytest.approx(1e3 * sent)


def test_attention_takes_the_share_that_theirs_reached() -> None:
    rows = {row.part: row for row in rows_of(STEP)}
    share = published.cutlass_share(4096)
    assert share == pytest.approx(403 / 989, rel=0.01)  # as the heat map writes it
    assert rows["attention"].their_share == pytest.approx(rows["attention"].same_work * 0.2 / share)
    assert rows["linear layers"].their_share == rows["linear layers"].same_work


# The record and the command


def test_the_committed_record_is_what_the_plan_says() -> None:
    """A change of the cost model needs a new record."""
    path = max(report.RESULTS.glob("*-plan-published.json"))
    kept = json.loads(path.read_text(encoding="utf-8"))["timing"]["rows"]
    for row in rows_of(STEP):
        (found,) = [k for k in kept if (k["point"], k["part"], k["kernels"]) == (row.what, row.part, row.kernels)]
        numbers = {name: value for name, value in row.to_dict().items() if isinstance(value, float)}
        assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-6), row.part


def test_the_plan_says_how_far_its_times_are_off() -> None:
    """The screen's last line: whole trainings, and layers with Triton attention, for the same work."""
    path = max(report.RESULTS.glob("*-plan-published.json"))
    rows = json.loads(path.read_text(encoding="utf-8"))["timing"]["rows"]
    off = [row["same_work_ratio"] for row in rows if row["part"] in ("step", "layer")]
    assert f"{min(off):.1f} to {max(off):.1f} times" in NOT_VALIDATED


def test_command_prints_and_records(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_published, "all_rows", lambda: rows_of(STEP))
    assert plan_published.main(["record=true", f"save={tmp_path}/results"]) == 0
    printed = capsys.readouterr().out
    assert "element-wise" in printed and "attention_fraction" in printed
    ((file, record),) = report.read_records(tmp_path / "results")
    assert file.endswith("-plan-published.json")
    assert record.metrics["predicted_over_measured"]["values"] == [rows_of(STEP)[-1].ratios()["predicted"]]
    assert all(" " in version for version in record.config["sources"].values())


@pytest.mark.parametrize(
    ("arguments", "message"), [(["recrod=true"], "recrod"), (["record"], "expected name=value")], ids=["name", "form"]
)
def test_wrong_words_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        plan_published.main(arguments)
    assert message in capsys.readouterr().err


def test_options_that_the_plan_refuses() -> None:
    with pytest.raises(UserError, match="cluster.gpu='h10': did you mean h100"):
        plan_published.plan_of((*published.ONE_GPU[:3], "cluster.gpu=h10"))
