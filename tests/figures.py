"""Figures of the runs that tests make: built, but an empty file in place of the picture, which takes most of the time.

A test that looks at the picture asks for it:

    with rendered():
        train(config)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_rendering = False


def leave_unrendered() -> None:
    """From now on in this process, outside of :func:`rendered`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    real = Figure.savefig

    def savefig(self: Figure, path: str | Path, **options: Any) -> None:
        if _rendering:
            real(self, path, **options)
        else:
            Path(path).touch()

    Figure.savefig = savefig  # type: ignore[method-assign]


@contextmanager
def rendered() -> Iterator[None]:
    """Pictures are drawn in full inside."""
    global _rendering
    before, _rendering = _rendering, True
    try:
        yield
    finally:
        _rendering = before
