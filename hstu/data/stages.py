"""What a person sees of a long preparation: one bar for each stage, on a terminal only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class Stages:
    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._hidden = quiet or not self._console.is_terminal

    def track(self, values: Sequence[T], what: str) -> Iterator[T]:
        """The values, with a bar that says how many are done."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True, disable=self._hidden) as bar:
            yield from bar.track(values, description=what)
