"""The speed this project aims at on one H200, bf16, causal, beside what a report measured.

Each target looks at the report's records (``<date>-NAME.json``) and says measured value and verdict; a target whose
figures are missing, or were measured on another kind of machine at toy size, stays "not measured".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.run import OURS, Row

CUTLASS = {
    (32, 64, 1024): (207, 223), (32, 64, 2048): (333, 314), (32, 64, 4096): (416, 383), (32, 64, 8192): (470, 404),
    (32, 128, 1024): (329, 276), (32, 128, 2048): (457, 384), (32, 128, 4096): (528, 440), (32, 128, 8192): (525, 468),
    (512, 128, 128): (83, 51), (512, 128, 256): (163, 106), (512, 128, 512): (287, 201),
}  # fmt: skip
"""Published TFLOP/s, forward and backward, by (users, width of a head, length), 4 heads: NVIDIA's CUTLASS HSTU
attention, one H100 SXM, bf16, causal, not jagged, no bias."""
LONG = 1024
"""From this length on a share of the CUTLASS figures is asked for; below, more than they reach."""
FORWARD_SHARE, BACKWARD_SHARE = 0.85, 0.8
BIAS_FORWARD, BIAS_BACKWARD = 1.25, 1.4
"""Most that the bias may cost, times the time without."""
LAYER_TOKENS_PER_S = 10.63e6
"""Forward, reference repository's issue 530, one H100."""
GATHER_SHARE = 0.5
"""sampled_softmax at the ML-20M shape: at most twice the time of moving its bytes once."""
TRAINING_S = 60.0
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Verdict:
    """One line of the report's last table."""

    target: str
    measured: str
    met: str
    """yes, no or not measured."""


Records = Mapping[str, Mapping[str, Any]]
"""Record name (such as bench-attention-cuda-bf16) to record."""


def _rows(records: Records, op: str) -> list[Row]:
    """bf16 rows on CUDA of an op, over all its records."""
    found = []
    for record in records.values():
        if record["kind"] == "kernel" and record["model"] == op:
            found += [r for r in record["timing"].get("rows", []) if "ms" in r and r["device"] == "cuda"]
    return [r for r in found if r["dtype"] == "bf16"]


def _verdict(target: str, shares: Sequence[tuple[str, float]], least: float, text: str) -> Verdict:
    """Met when every share reaches ``least``; shows the worst one."""
    if not shares:
        return Verdict(target, NOT_MEASURED, NOT_MEASURED)
    name, worst = min(shares, key=lambda s: s[1])
    return Verdict(target, text.format(worst=worst, name=name, count=len(shares)), "yes" if worst >= least else "no")


def _cutlass(rows: Sequence[Row], one: str, long: bool) -> list[tuple[str, float]]:
    """Our TFLOP/s over the published ones at the points that are published."""
    shares = []
    for r in rows:
        published = CUTLASS.get((r["B"], r["A"], r["S"]))
        plain = r["implementation"] == OURS and not r["rab"] and r["lengths"] == "full" and r["H"] == 4
        if published and plain and r["pass"] == one and (r["S"] >= LONG) == long:
            shares.append((r["point"], r["tflop_s"] / published[0 if one == "forward" else 1]))
    return shares


def _bias(rows: Sequence[Row], one: str) -> list[tuple[str, float]]:
    """Time without over time with the bias, same sizes."""
    keys = ("B", "H", "A", "V", "S", "lengths")
    ours = [r for r in rows if r["implementation"] == OURS and r["pass"] == one]
    without = {tuple(r[k] for k in keys): r["ms"] for r in ours if not r["rab"]}
    pairs = [(r, without.get(tuple(r[k] for k in keys))) for r in ours if r["rab"]]
    return [(r["point"], ms / r["ms"]) for r, ms in pairs if ms is not None]


def _versus(rows: Sequence[Row], name: str, one: str) -> list[tuple[str, float]]:
    """Time of a competitor over ours at the same point."""
    ours = {r["point"]: r["ms"] for r in rows if r["implementation"] == OURS and r["pass"] == one}
    theirs = [r for r in rows if r["implementation"] == name and r["pass"] == one and r["point"] in ours]
    return [(r["point"], r["ms"] / ours[r["point"]]) for r in theirs]


def verdicts(records: Records) -> list[Verdict]:
    """Every target with what the records say about it."""
    attention = _rows(records, "attention")
    share, ratio = "{worst:.2f} of it at worst ({name}; {count} points)", "{worst:.2f} times at worst ({name})"
    lines = []
    for one, least in (("forward", FORWARD_SHARE), ("backward", BACKWARD_SHARE)):
        lines.append(_verdict(f"attention {one}, length >= {LONG}: {least} of CUTLASS on an H100",
                              _cutlass(attention, one, True), least, share))  # fmt: skip
    for one in ("forward", "backward"):
        lines.append(_verdict(f"attention {one}, length <= 512: more than CUTLASS on an H100",
                              _cutlass(attention, one, False), 1.0, share))  # fmt: skip
    for one, most in (("forward", BIAS_FORWARD), ("backward", BIAS_BACKWARD)):
        lines.append(_verdict(f"the bias inside, {one}: at most {most} times the time without",
                              _bias(attention, one), 1 / most, "1/{worst:.2f} times at worst ({name})"))  # fmt: skip
    for name in ("sdpa", "flex", "reference-triton"):
        for one in ("forward", "both"):
            lines.append(_verdict(f"attention {one} faster than {name} at every point",
                                  _versus(attention, name, one), 1.0, ratio + " over {count} points"))  # fmt: skip
    lines += _layer(_rows(records, "layer"))
    sampled = [r for r in _rows(records, "sampled_softmax") if r["implementation"] == OURS and r["pass"] == "forward"]
    gather = [(r["point"], r["share_of_ceiling"]) for r in sampled if r["point"].startswith("ml-20m")]
    lines.append(_verdict("sampled_softmax, ML-20M: within 2 times of moving its bytes once", gather, GATHER_SHARE,
                          "{worst:.2f} of that speed at worst ({name})"))  # fmt: skip
    lines.append(_training(records))
    return lines


def _layer(rows: Sequence[Row]) -> list[Verdict]:
    speeds = {(r["point"], r["pass"]): r["tokens_per_s"] for r in rows if r["implementation"] == OURS}
    forward, training = speeds.get(("issue-530", "forward")), speeds.get(("issue-530", "both"))
    target = f"5 HSTU layers, forward: more than {LAYER_TOKENS_PER_S / 1e6:.2f} M tokens/s"
    shares = [] if forward is None else [("issue-530", forward / LAYER_TOKENS_PER_S)]
    text = "" if forward is None else f"{forward / 1e6:.2f} M tokens/s"
    measured = NOT_MEASURED if training is None else f"{training / 1e6:.2f} M tokens/s"
    return [_verdict(target, shares, 1.0, text), Verdict("5 HSTU layers, training: to be reported", measured, "-")]


def _training(records: Records) -> Verdict:
    target = f"ml-1m/hstu, 101 epochs with evaluation: under {TRAINING_S:.0f} s"
    record = records.get("gpu-train-ml-1m-hstu")
    if record is None or not (record["machine"] or {}).get("gpu"):
        return Verdict(target, NOT_MEASURED, NOT_MEASURED)
    seconds = record["timing"]["train_s"] + record["timing"]["eval_s"]
    return Verdict(target, f"{seconds:.1f} s", "yes" if seconds < TRAINING_S else "no")
