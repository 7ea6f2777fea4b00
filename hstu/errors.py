"""The exceptions that a person at the command line is meant to read, and the checks that raise them."""

from __future__ import annotations

import signal
from pathlib import Path


class UserError(ValueError):
    """A config, file, path or argument is wrong and the person who gave it can mend it.

    The message is one line: what is wrong, the value got, the value expected and, where known,
    what to do. The commands print it without a traceback and exit with status 1.
    """


class RankLost(UserError):
    """A rank has died or hangs: started again, the run may succeed."""


class Interrupted(BaseException):
    """A signal asked the run to stop; it has saved. No Exception, so that a sweep stops with its job."""

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; saved. Resume with run.dir={folder}")
        self.number, self.folder = number, folder
        self.exit_code = 128 + number


def check(ok: bool, name: str, got: object, expected: str) -> None:
    """Raises UserError ``name=got: expected ...`` unless ``ok``."""
    if not ok:
        raise UserError(f"{name}={got!r}: expected {expected}")


def one_of(name: str, got: object, allowed: tuple[str, ...]) -> None:
    """Raises UserError unless ``got`` is one of ``allowed``."""
    check(got in allowed, name, got, "one of " + ", ".join(allowed))
