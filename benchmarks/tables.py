"""Tables on the screen: Markdown whose columns line up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = ("ms", "p20 .. p80", "wall ms", "TFLOP/s", "GB/s", "of ceiling", "peak MiB")


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded to even columns; numbers are set to the right."""
    lines = [[str(c).replace("|", "\\|") for c in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    numeric = [bool(rows) and all(_is_number(line[i]) for line in lines[1:]) for i in range(len(head))]
    rule = ["-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric, strict=True)]
    out = []
    for line in (lines[0], rule, *lines[1:]):
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, numeric, strict=True)]
        out.append("| " + " | ".join(padded) + " |")
    return "\n".join(out)


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text in ("-", "n/a")


def number(value: Any, digits: int = 4) -> str:
    """A number as a person reads it; ``-`` for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The measured rows of one op, and below them what could not be measured and why."""
    head = ("point", "pass", "implementation", *SHOWN)
    body, absent = [], []
    for row in rows:
        if "absent" in row:
            absent.append(f"{row['implementation']} at {row['point']}, {row['pass']}: {row['absent']}")
            continue
        body.append([
            row["point"], row["pass"], row["implementation"], number(row["ms"]),
            f"{number(row['ms_p20'], 3)} .. {number(row['ms_p80'], 3)}", number(row["wall_ms"]),
            number(row["tflop_s"]), number(row["gb_s"]), f"{100 * row['share_of_ceiling']:.1f} % {row['ceiling']}",
            number(row.get("peak_mib"), 3),
        ])  # fmt: skip
    text = text_table(head, body)
    return text if not absent else "\n".join([text, "", "not measured:", *absent])
