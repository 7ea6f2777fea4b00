"""The live bar: where a run stands, by epoch or by day."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hstu.progress import Display


@pytest.mark.parametrize(
    ("by_day", "expected"),
    [(False, [("1/2", 5, 10), ("2/2", 10, 10)]), (True, [("1", 5, 5), ("2", 9, 9)])],
    ids=["epochs", "days"],
)
def test_how_far_a_run_is(by_day: bool, expected: list[tuple[str, int, int]]) -> None:
    display = Display(by_day=by_day)
    display.console, display._live = Console(file=io.StringIO(), force_terminal=True), True
    found = []
    for epoch, (num_epochs, num_steps) in enumerate([(1, 5), (1, 9)] if by_day else [(2, 5), (2, 5)]):
        display.start_epoch(epoch, num_epochs, num_steps, 0)
        for _ in range(num_steps):
            display.step(0.5, 10.0)
        assert display._bar is not None
        task = display._bar.tasks[0]
        found.append((task.fields["epoch"], task.completed, task.total))
    display.end_run()
    assert found == expected
