"""Checkpoints: written whole or not at all, the last k and the best kept.

A checkpoint is one file read by ``torch.load(weights_only=True)``: a dict with ``model``, ``optimizer``,
``progress`` (where the run is) and ``rng`` (torch's generator states).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from hstu.errors import UserError

FORMAT = 1
BEST = "best.pt"
_STEP_FILE = re.compile(r"step-(\d{9})\.pt")


def save(folder: Path, state: dict[str, Any], step: int, keep_last: int) -> Path:
    """Writes ``step-<step>.pt`` and removes all but the last ``keep_last`` step files.

    Raises OSError where the disk is full; the earlier checkpoints are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    _write(path, {"format": FORMAT, **state})
    for old in steps(folder)[:-keep_last]:
        old.unlink(missing_ok=True)
    return path


def save_best(folder: Path, state: dict[str, Any]) -> Path:
    """Writes ``best.pt`` in place of an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / BEST, {"format": FORMAT, **state})
    return folder / BEST


def _write(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # torch.save's own report of a failed write hides the OSError
        partial.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def steps(folder: Path) -> list[Path]:
    """Step files, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _STEP_FILE.fullmatch(p.name))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint.

    Raises UserError where the file is missing, unreadable or of another format.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: the run has not saved one yet")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"checkpoint {path} cannot be read ({reason}): delete it to fall back to an older one"
        ) from None
    if state.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {state.get('format')}, expected {FORMAT}: use the release that wrote it"
        )
    return state


def load_last(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The newest step checkpoint, or None where there is none."""
    found = steps(folder)
    return load(found[-1], device) if found else None
