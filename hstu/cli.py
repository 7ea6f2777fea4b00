"""What the commands share: where the config folder lies, and one clear line instead of a traceback."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hstu.errors import UserError


def conf_dir() -> Path:
    """The folder with the YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise UserError(f"no conf folder in {package} or {package.parent}: install the project again")


def command(main: Callable[..., Any]) -> Callable[..., int]:
    """Decorates a command's ``main``: a foreseeable failure is one ``error: ...`` line and exit status 1.

    Covers UserError, errors of Hydra's composition, a full disk and denied access. Ctrl-C exits with 130. Any
    other exception keeps its traceback: it is a bug.
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        # Hydra then lets exceptions of the task pass, instead of printing its own trace.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        try:
            result = main(*args, **kwargs)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except Exception as error:
            line = _one_line(error)
            if line is None:
                raise
            return _fail(line, 1)
        return result if isinstance(result, int) else 0

    return run


def _fail(line: str, status: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)


def _one_line(error: BaseException) -> str | None:
    """The message for the person at the command line, or None for a bug."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or 'while writing'}): free some space or set another data.root"
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}: change its rights or choose another place"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra_line(error)
    return None


def _hydra_line(error: BaseException) -> str:
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={name}: no such choice; {group} is one of {', '.join(sorted(error.options))}"
    cause = error.__cause__
    lines = [part.strip() for part in str(error).splitlines() if part.strip()]
    if cause is not None and str(cause):
        lines.append(str(cause).splitlines()[0].strip())
    return " ".join(lines[:3])
