"""Processes of their own for tests, without the seconds that each would import torch for.

    process = fresh_processes().Process(target=train, args=(config,))

They are forks of a server that has imported what is below and done nothing else: no call, no thread, no CUDA.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing.context import BaseContext

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
