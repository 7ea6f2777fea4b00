"""The one exception that a person at the command line is meant to read, and the checks that raise it."""

from __future__ import annotations


class UserError(ValueError):
    """A config, file, path or argument is wrong and the person who gave it can mend it.

    The message is one line: what is wrong, the value got, the value expected and, where known,
    what to do. The commands print it without a traceback and exit with status 1.
    """


def check(ok: bool, name: str, got: object, expected: str) -> None:
    """Raises UserError ``name=got: expected ...`` unless ``ok``."""
    if not ok:
        raise UserError(f"{name}={got!r}: expected {expected}")


def one_of(name: str, got: object, allowed: tuple[str, ...]) -> None:
    """Raises UserError unless ``got`` is one of ``allowed``."""
    check(got in allowed, name, got, "one of " + ", ".join(allowed))
