"""What an op's benchmark module must define, and the rows that come of it."""

import math
import time

import pytest
import torch

from benchmarks import run
from benchmarks.config import BenchConfig
from benchmarks.measure import Ceilings
from benchmarks.ops import BENCHES, PRESETS, Absent, Problem, Run, Work, make_lengths, make_offsets, module
from hstu.errors import UserError

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gb_s=10.0, product_tflop_s=0.1, dtype="float32")


def config(op="attention", **more):
    values = {"sizes": "toy", "device": "cpu", "dtype": "fp32", "time_ms": 0.1, "warmup_ms": 0.1, "memory": False}
    return BenchConfig(op=op, **{**values, **more})


# Every op


@pytest.mark.parametrize("op", BENCHES)
def test_every_op_has_points_in_every_preset(op):
    bench = module(op)
    for preset in PRESETS:
        points = run.points(op, config(op, sizes=preset))
        assert points, preset
        assert all(set(bench.DEFAULTS) <= set(p) for p in points)
    names = {p["name"] for p in run.points(op, config(op, sizes="quick"))}
    assert set(getattr(bench, "VERSUS", names)) <= names


@pytest.mark.parametrize("op", BENCHES)
def test_every_op_is_measured_at_toy_size(op):
    rows = run.measure_op(op, config(op), CEILINGS)
    ours = [row for row in rows if row["implementation"] == run.OURS]
    assert {row["point"] for row in ours} == {p["name"] for p in run.points(op, config(op))}
    assert all(row["ms"] > 0 and row["bytes"] > 0 and math.isfinite(row["share_of_ceiling"]) for row in ours)
    assert all(not row["absent"].startswith("failed") for row in rows if "absent" in row), "a competitor failed"
    for row in ours:
        seconds = max(row["flops"] / 1e11, row["bytes"] / 1e10)
        assert row["share_of_ceiling"] == pytest.approx(seconds / (1e-3 * row["ms"]))


@pytest.mark.parametrize("op", BENCHES)
def test_the_same_generator_gives_the_same_inputs(op):
    (sizes, *_) = run.points(op, config(op))
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)  # weights of a layer
        problem = module(op).make(sizes, CPU, torch.float32, torch.Generator().manual_seed(3))
        result = problem.ours.forward()
        outputs.append(result if isinstance(result, torch.Tensor) else result[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


# Attention and its competitors


def attention_problem(**sizes):
    bench = module("attention")
    sizes = {**bench.DEFAULTS, "B": 3, "H": 2, "A": 8, "S": 20, "lengths": "skewed", **sizes}
    return bench.make(sizes, CPU, torch.float32, torch.Generator().manual_seed(0)), sizes


@pytest.mark.parametrize("rab", [False, True], ids=["no bias", "bias"])
def test_plain_torch_computes_what_the_op_computes(rab):
    problem, sizes = attention_problem(rab=rab)
    offsets = make_offsets(make_lengths(sizes["B"], sizes["S"], "skewed", torch.Generator().manual_seed(0)))
    padded = problem.competitors["torch"]().forward()  # [B, H, S, V]
    expected = torch.cat([padded[b, :, :n].transpose(0, 1) for b, n in enumerate(offsets.diff().tolist())])
    torch.testing.assert_close(problem.ours.forward(), expected, rtol=1e-4, atol=1e-6)


def test_attention_work_counts_the_causal_pairs_of_every_user():
    problem, _ = attention_problem(lengths="full", rab=False, B=3, H=2, A=8, S=20)
    assert problem.forward.flops == 3 * 2 * 20 * 20 * (8 + 8)  # = 2 H S^2 A for each user
    assert problem.backward.flops == 2.5 * problem.forward.flops
    assert problem.forward.bytes == 4 * (3 * 20) * 2 * 8 * 4  # q, k, v and the output in float32
    wide, _ = attention_problem(lengths="full", rab=False, V=24)
    assert wide.forward.flops == 3 * 2 * 20 * 20 * (8 + 24)


@pytest.mark.parametrize("rab", [False, True], ids=["no bias", "bias"])
def test_cached_point_computes_what_the_reference_computes(rab):
    problem, _ = attention_problem(rab=rab, C=4, lengths="full")
    torch.testing.assert_close(problem.ours.forward(), problem.competitors["reference"]().forward())
    # 3 users' 4 candidates each see 20 events and themselves; 2 heads, two products of width 8.
    assert problem.forward.flops == 3 * 4 * 21 * 2 * 2 * (8 + 8)


@pytest.mark.parametrize("name", ["flex", "reference-triton", "cutlass"])
def test_a_competitor_that_cannot_run_says_why(name):
    problem, _ = attention_problem()
    with pytest.raises(Absent, match=r"CUDA"):
        problem.competitors[name]()


def test_materialised_scores_that_do_not_fit_are_refused():
    from benchmarks.ops.attention import _check_room

    _check_room(2.0**30, CPU)
    with pytest.raises(Absent, match="4 GiB do not fit"):
        _check_room(2.0**32, CPU)


# Lengths


def test_skewed_lengths_by_hand():
    generator = torch.Generator().manual_seed(0)
    # Quantiles 1/4, 2/4, 3/4, 1 squared: 1/16, 4/16, 9/16, 1 of 100, rounded up.
    assert sorted(make_lengths(4, 100, "skewed", generator).tolist()) == [7, 25, 57, 100]
    assert make_lengths(2, 9, "full", generator).tolist() == [9, 9]
    assert make_offsets(torch.tensor([2, 0, 3])).tolist() == [0, 2, 2, 5]
    with pytest.raises(ValueError, match="expected full or skewed"):
        make_lengths(2, 9, "short", generator)


# Points and rows


def test_a_point_of_ones_own_takes_defaults_for_the_rest():
    (point,) = run.points("attention", config(sizes={"B": 2, "S": 16, "lengths": "skewed"}))
    assert point == {**module("attention").DEFAULTS, "B": 2, "S": 16, "lengths": "skewed",
                     "name": "B2-S16-lengths=skewed"}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"Q": 3}, "unknown Q"), ([{"S": 8}, {"S": 8}], "several points are named S8")],
    ids=["unknown size", "same name"],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        run.points("attention", config(sizes=sizes))


class FakeModule:
    """A benchmark module whose calls are counted."""

    DEFAULTS = {"L": 4}
    SIZES = {"toy": [{"name": "a"}, {"name": "b"}]}

    def __init__(self, competitor=None, fails=False):
        self.made, self.competitor, self.fails = 0, competitor, fails

    def make(self, sizes, device, dtype, generator):
        self.made += 1
        x = torch.ones(sizes["L"], requires_grad=True)

        def forward():
            if self.fails:
                raise RuntimeError("kernel is wrong")
            return x * 2

        competitors = {"other": self.competitor} if self.competitor else {}
        return Problem(Run(forward, [x]), Work(1.0, 1.0), Work(2.0, 2.0), competitors)


@pytest.fixture
def fake(monkeypatch):
    def install(**options):
        bench = FakeModule(**options)
        monkeypatch.setattr(run, "module", lambda op: bench)
        return bench

    return install


def test_passes_and_work(fake):
    fake()
    rows = run.measure_op("attention", config(), CEILINGS)
    assert [(r["point"], r["pass"], r["flops"]) for r in rows] == [
        (point, one, flops) for point in "ab" for one, flops in (("forward", 1), ("backward", 2), ("both", 3))
    ]  # fmt: skip


def test_an_error_of_ours_comes_out(fake):
    fake(fails=True)
    with pytest.raises(RuntimeError, match="kernel is wrong"):
        run.measure_op("attention", config(), CEILINGS)


def out_of_memory():
    raise torch.OutOfMemoryError("no")


def not_here():
    raise Absent("not installed")


def broken():
    raise KeyError("x")


@pytest.mark.parametrize(
    ("competitor", "absent"),
    [(out_of_memory, "out of memory"), (not_here, "not installed"), (broken, "failed: KeyError: 'x'")],
    ids=["memory", "absent", "broken"],
)
def test_an_error_of_a_competitor_is_a_row(fake, competitor, absent):
    fake(competitor=competitor)
    rows = run.measure_op("attention", config(), CEILINGS)
    assert [r["absent"] for r in rows if r["implementation"] == "other"] == [absent, absent]
    assert not run.measure_op("attention", config(competitors=False), CEILINGS)[-1].get("absent")


def test_out_of_time_and_resuming(fake):
    bench = fake()
    late = run.measure_op("attention", config(), CEILINGS, deadline=time.monotonic() - 1)
    assert {r["absent"] for r in late} == {run.OUT_OF_TIME} and bench.made == 0
    first = run.measure_op("attention", config(), CEILINGS)
    assert bench.made == 2
    mixed = [r for r in first if r["point"] == "a"] + [r for r in late if r["point"] == "b"]
    again = run.measure_op("attention", config(), CEILINGS, known=mixed)
    assert bench.made == 3  # only b
    assert [r for r in again if r["point"] == "a"] == mixed[:3]
    assert run.measure_op("attention", config(), CEILINGS, known=first) == first and bench.made == 3


def test_several_sets_of_inputs_are_made_where_they_fit_the_cache(fake, monkeypatch):
    bench = fake()
    monkeypatch.setattr(run.measure, "num_sets", lambda num_bytes, device: 4)
    run.measure_op("attention", config(points="a"), CEILINGS)
    assert bench.made == 4
