"""``hstu-bench compare A B``: what got faster and slower from one record to another.

A row is slower when its median grew by more than the threshold and its 20th percentile now lies above the old 80th:
a difference inside the noise of either measurement is none. Exit status 1 when a row of this project got slower, or was
measured before and no longer is; what became of the competitors is shown too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.config import CompareConfig, from_arguments
from benchmarks.tables import number, text_table
from hstu import report
from hstu.errors import UserError


@dataclass
class Comparison:
    """Rows of both records, sorted into what became of them; a line is ready to be shown."""

    slower: list[list[str]] = field(default_factory=list)
    faster: list[list[str]] = field(default_factory=list)
    same: int = 0
    gone: list[str] = field(default_factory=list)
    """Measured in A, absent in B."""
    new: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    worse: bool = False
    """A row of this project is slower or gone."""


def _rows(record: Mapping[str, Any]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    keys = ("point", "pass", "implementation", "dtype", "device")
    rows = record["timing"].get("rows", [])
    return {(record["model"], *(row.get(k) for k in keys)): row for row in rows if "ms" in row}


def compare(a: Mapping[str, Any], b: Mapping[str, Any], threshold: float) -> Comparison:
    """Compares two records of hstu-bench."""
    before, after = _rows(a), _rows(b)
    result = Comparison()
    for what in ("gpu", "cpu", "driver"):
        if a["machine"].get(what) != b["machine"].get(what):
            result.warnings.append(f"different {what}: {a['machine'].get(what)} and {b['machine'].get(what)}")
    for key, old in before.items():
        new = after.get(key)
        name = " ".join(str(part) for part in key[1:])
        if new is None:
            result.gone.append(name)
            result.worse |= key[3] == report.OURS
            continue
        change = new["ms"] / old["ms"] - 1
        line = [*map(str, key[1:4]), number(old["ms"]), number(new["ms"]), f"{100 * change:+.1f} %"]
        if change > threshold and new["ms_p20"] > old["ms_p80"]:
            result.slower.append(line)
            result.worse |= key[3] == report.OURS
        elif change < -threshold and new["ms_p80"] < old["ms_p20"]:
            result.faster.append(line)
        else:
            result.same += 1
    result.new = [" ".join(map(str, key[1:])) for key in after if key not in before]
    return result


def find_record(name: str, folder: Path) -> dict[str, Any]:
    """A record by path, by file name in ``folder``, or by record name there (the newest)."""
    if not name:
        raise UserError("compare needs two records: hstu-bench compare A B [threshold=0.05]")
    given = [Path(name), folder / name, folder / f"{name}.json"]
    places = [p for p in given if p.is_file()] or sorted(folder.glob(f"????-??-??-{name}.json"), reverse=True)
    if not places:
        raise UserError(f"record {name}: no such file, and none of that name in {folder}")
    record = report.read_json(places[0], "give a record written by hstu-bench")
    if not isinstance(record.get("timing"), dict) or "rows" not in record["timing"]:
        raise UserError(f"record {places[0]}: has no timing rows; give a record written by hstu-bench")
    return record


def main(arguments: Sequence[str]) -> int:
    """``compare A B [threshold=0.05] [out=FOLDER]``; returns the exit status."""
    names = [word for word in arguments if "=" not in word]
    options = [word for word in arguments if "=" in word]
    if len(names) != 2:
        raise UserError(f"compare: expected two records, got {len(names)}: hstu-bench compare A B [threshold=0.05]")
    config = from_arguments(CompareConfig, [f"a={names[0]}", f"b={names[1]}", *options])
    folder = Path(config.out)
    result = compare(find_record(config.a, folder), find_record(config.b, folder), config.threshold)
    head = ("point", "pass", "implementation", "ms before", "ms after", "change")
    for title, lines in (("slower", result.slower), ("faster", result.faster)):
        print(f"\n{len(lines)} {title} by more than {100 * config.threshold:.3g} % beyond the noise")
        if lines:
            print(text_table(head, sorted(lines, key=lambda line: float(line[-1][:-2]), reverse=title == "slower")))
    print(f"\n{result.same} unchanged, {len(result.new)} new, {len(result.gone)} gone")
    for line in result.gone:
        print(f"gone: {line}")
    for line in result.warnings:
        print(f"warning: {line}")
    if not (result.slower or result.faster or result.same):
        raise UserError("the two records have no row in common")
    return 1 if result.worse else 0
