"""The stages of a long preparation: one bar for each, on a terminal only, and what is done of them, to go on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hstu.data.store import MARK_ENDING, sync

T = TypeVar("T")


class Stages:
    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._console = quiet, Console(stderr=True)
        self._hidden = quiet or not self._console.is_terminal

    def track(self, values: Sequence[T], what: str) -> Iterator[T]:
        """The values, with a bar that says how many are done."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True, disable=self._hidden) as bar:
            yield from bar.track(values, description=what)

    def say(self, text: str) -> None:
        """A line, unless nothing is to be said."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False)


class Marks:
    """What a preparation has done: a small file for each part of it, written when all that belongs to the part is on
    disk. A preparation that finds a part's mark goes on with what it left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, values: dict[str, Any], *parts: Path) -> None:
        """parts: files, and folders with all that is in them. values: plain."""
        for part in parts:
            for path in [*part.rglob("*"), part] if part.is_dir() else [part]:
                sync(path)
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(values), encoding="utf-8")
        sync(partial)
        os.replace(partial, self.folder / (name + MARK_ENDING))

    def read(self, name: str) -> Any:
        """The values of the part ``name``; None where it is not done."""
        path = self.folder / (name + MARK_ENDING)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
