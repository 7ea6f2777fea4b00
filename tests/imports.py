"""Processes of their own for tests, without the seconds that each would import torch for.

    process = fresh_processes().Process(target=train, args=(config,))
    done = run_module("hstu.evaluate", "run=runs/clicks", folder=tmp_path)   # python -m hstu.evaluate run=runs/clicks

They are forks of a server that has imported what is below and done nothing else: no call, no thread, no CUDA.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Mapping
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest  # noqa: F401  (a function of a test module is found by importing that module)
import torch
import torch._dynamo  # noqa: F401  (the first step of an optimizer imports it)

import hstu.evaluate  # noqa: F401
import hstu.stream_train  # noqa: F401
import hstu.train  # noqa: F401
import tests.figures  # noqa: F401

with contextlib.suppress(ImportError):
    import matplotlib.pyplot  # noqa: F401
with contextlib.suppress(Exception):  # not installed, or of another build: then the tests that need it say so
    import torchrec  # noqa: F401


def fresh_processes() -> BaseContext:
    """Where processes are started; with a GPU by importing anew, as what a library asks the driver forbids forks."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def run_module(
    module: str, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``python -W ignore -m module arguments`` does in ``folder``; environment: all of it, None: that of now."""
    environment = dict(os.environ if environment is None else environment)
    said = [folder / f".{module}.{name}" for name in ("out", "err")]
    process = fresh_processes().Process(target=_act_as, args=(module, arguments, folder, environment, said))
    process.start()
    process.join()
    output, errors = (path.read_text(encoding="utf-8") for path in said)
    for path in said:
        path.unlink()
    assert process.exitcode is not None
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, output, errors)


def _act_as(
    module: str, arguments: tuple[str, ...], folder: Path, environment: dict[str, str], said: list[Path]
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(said, start=1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = [module, *arguments]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
