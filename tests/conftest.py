"""Settings of the whole suite: poisoned torch.empty, few threads, no TF32, GPU tests skipped without a GPU, figures
without their pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.figures import leave_unrendered
from tests.interpreter import scan_slices

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported; without a GPU launchers run interpreted

THREADS = 1
"""Tests are small: more threads would mostly wait for each other, above all beside other work."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    torch.set_num_threads(THREADS)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with torch.device("meta"):  # torch notes here which functions a device context is for: before they are poisoned
        torch.zeros(())
    leave_unrendered()
    if not torch.cuda.is_available():
        scan_slices()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = make(*args, **kwargs)
        if out.is_floating_point() and not out.is_meta:
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return poisoned


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``torch.empty`` and its kin return NaN, so that an output nobody wrote cannot pass."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
    yield


@pytest.fixture(autouse=True)
def auto_backend() -> Iterator[None]:
    """Every test starts and ends with ``kernels.backend=auto``."""
    from kernels._backend import set_backend

    set_backend("auto")
    yield
    set_backend("auto")
