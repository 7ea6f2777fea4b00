"""The targets of the GPU report, on made-up records whose verdicts a person can redo; and the README's kernel table."""

import pytest

from benchmarks.targets import NOT_MEASURED, verdicts
from hstu import readme, report

MACHINE = {"cpu": "Some CPU", "cores": 2, "memory_gib": 15.6, "gpu": "Some GPU", "driver": "1"}
SIZES = {"B": 32, "H": 4, "A": 128, "V": None, "S": 1024, "lengths": "full", "rab": False}


def row(one, ms, point="p", implementation="hstu", **more):
    values = {"point": point, "pass": one, "implementation": implementation, "dtype": "bf16", "device": "cuda",
              "ms": ms, "tflop_s": 1.0, "gb_s": 2.0, "share_of_ceiling": 0.25, "ceiling": "copy", **SIZES}  # fmt: skip
    return {**values, **more}


def record(model, rows, name="gpu-bench", **more):
    values = {"name": name, "kind": "kernel", "dataset": "random", "protocol": None, "split_hash": None, "model": model,
              "seeds": [0], "metrics": {}, "timing": {"rows": rows}, "machine": MACHINE, "versions": {}, "commit": None,
              "config": {"device": "cuda"}}  # fmt: skip
    return {**values, **more}


def verdict(records, text):
    (found,) = [v for v in verdicts({r["name"]: r for r in records}) if text in v.target]
    return found


def test_without_records_nothing_is_measured():
    lines = verdicts({})
    assert len(lines) == 16
    assert {v.measured for v in lines} == {NOT_MEASURED}


@pytest.mark.parametrize(
    ("tflops", "met"), [(280.0, "yes"), (279.0, "no")], ids=["0.85 of 329 is 279.65", "just below"]
)
def test_the_published_cutlass_figures(tflops, met):
    found = verdict([record("attention", [row("forward", 1.0, tflop_s=tflops)])], "forward, length >= 1024")
    assert found.met == met and "(p; 1 points)" in found.measured
    other = {"H": 8, "tflop_s": 1.0, "point": "not published"}
    rows = [
        row("forward", 1.0, tflop_s=tflops),
        row("forward", 1.0, **other),
        row("forward", 1.0, rab=True, tflop_s=1.0),
    ]
    assert verdict([record("attention", rows)], "forward, length >= 1024").met == met


def test_short_sequences_must_beat_the_published_figure():
    rows = [row("backward", 1.0, B=512, S=256, tflop_s=107.0), row("backward", 1.0, B=512, S=128, tflop_s=50.0)]
    assert verdict([record("attention", rows[:1])], "backward, length <= 512").met == "yes"
    assert verdict([record("attention", rows)], "backward, length <= 512").met == "no"


@pytest.mark.parametrize(("ms", "met"), [(1.24, "yes"), (1.26, "no")], ids=["1.24 times", "1.26 times"])
def test_what_the_bias_costs(ms, met):
    rows = [row("forward", 1.0), row("forward", ms, point="q", rab=True)]
    assert verdict([record("attention", rows)], "bias inside, forward").met == met


def test_faster_than_a_competitor_at_every_point():
    rows = [row("forward", 1.0), row("forward", 1.5, implementation="flex"), row("forward", 2.0, point="q")]
    assert verdict([record("attention", rows)], "forward faster than flex").met == "yes"
    rows.append(row("forward", 1.9, point="q", implementation="flex"))
    found = verdict([record("attention", rows)], "forward faster than flex")
    assert (found.met, found.measured) == ("no", "0.95 times at worst (q) over 2 points")


def test_layers_gathers_and_training():
    rows = [row("forward", 9.3, "issue-530", tokens_per_s=10.7e6), row("both", 30.0, "issue-530", tokens_per_s=3e6)]
    records = [record("layer", rows), record("sampled_softmax", [row("forward", 1.0, "ml-20m")], name="gpu-sampled")]
    assert verdict(records, "5 HSTU layers, forward").met == "yes"
    assert verdict(records, "training: to be reported").measured == "3.00 M tokens/s"
    assert verdict(records, "ML-20M").met == "no"  # 0.25 of the ceiling, 0.5 is asked for
    run = record("hstu", [], name="gpu-train-ml-1m-hstu", kind="training", timing={"train_s": 40.0, "eval_s": 19.0})
    assert verdict([run], "101 epochs").met == "yes"
    slow = {**run, "timing": {"train_s": 40.0, "eval_s": 21.0}}
    assert verdict([slow], "101 epochs").met == "no"
    assert verdict([{**run, "machine": {**MACHINE, "gpu": None}}], "101 epochs").met == NOT_MEASURED


def test_rows_of_a_cpu_or_of_another_dtype_do_not_count():
    rows = [row("forward", 1.0, tflop_s=500.0, device="cpu"), row("forward", 1.0, tflop_s=500.0, dtype="fp32")]
    assert verdict([record("attention", rows)], "forward, length >= 1024").met == NOT_MEASURED


# README


def table(*records):
    return readme.readme_block("kernels", [(f"{i}.json", report.Record(**r)) for i, r in enumerate(records)])


def test_the_readme_says_not_measured_without_a_gpu():
    assert table() == "On a GPU: not measured."
    on_cpu = record("attention", [row("forward", 1.0)], machine={**MACHINE, "gpu": None})
    toy = record("attention", [row("forward", 1.0)], config={"device": "cuda", "toy": True})
    device = record("device", [{"dtype": "bf16", "copy_gb_s": 1.0}])
    assert table(on_cpu, toy, device) == "On a GPU: not measured."


def test_the_readme_shows_ours_beside_the_others_of_the_same_run():
    rows = [row("forward", 2.0), row("forward", 5.0, implementation="sdpa"), row("backward", 3.0),
            row("forward", 1.0, point="alone")]  # fmt: skip
    newer = record("attention", [row("forward", 1.9)], name="newer")
    lines = table(record("attention", rows), newer).splitlines()
    assert len(lines) == 3  # of an op with competitors only the points that have them; the record that has them wins
    cells = [c.strip() for c in lines[2].strip("|").split("|")]
    assert cells == ["attention", "p", "forward", "bf16", "2", "1", "2", "25 % (copy)", "", "sdpa 2.5x", "Some GPU"]


def test_kernel_records_stay_out_of_the_timing_table():
    kept = report.Record(**record("attention", [row("forward", 1.0)]))
    assert readme.readme_block("timing", [("x.json", kept)]) == "No records yet."


def test_the_readme_shows_the_plots_beside_the_records_of_a_gpu(tmp_path):
    for name in ("gpu-attention-tflops", "gpu-attention-fp32-roofline", "toy-attention-roofline"):
        (tmp_path / f"2026-01-31-{name}.png").touch()
    gpu = report.Record(**record("attention", [row("forward", 1.0)], name="gpu-attention"))
    toy = report.Record(**record("attention", [row("forward", 1.0)], config={"device": "cuda", "toy": True}))
    records = [("2026-01-31-gpu-attention.json", gpu), ("2026-01-31-toy-attention.json", toy)]
    images = [line for line in readme.readme_block("kernels", records, tmp_path).splitlines() if line.startswith("!")]
    assert images == ["![gpu-attention-tflops](benchmarks/results/2026-01-31-gpu-attention-tflops.png)"]
