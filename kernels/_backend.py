"""The one place that chooses which backend an op runs on.

``auto`` takes Triton on CUDA where the op has a ``kernel.py`` and triton can be imported, and torch
otherwise. An explicit ``triton`` that cannot be met raises; nothing falls back silently. Under Triton's
interpreter (``TRITON_INTERPRET=1``) an explicit ``triton`` also runs on the CPU, for tests.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import NamedTuple

import torch

from kernels._launch import DTYPES, interpreting

OPS = (
    "attention",
    "norm_linear_silu",
    "gate_norm_linear",
    "sampled_softmax",
    "linear_cross_entropy",
    "rank_and_topk",
    "jagged",
)
BACKENDS = ("auto", "triton", "torch")

_log = logging.getLogger(__name__)
_requested = "auto"
_chosen: dict[tuple[str, str, torch.dtype | None], Choice] = {}


class Choice(NamedTuple):
    """What an op runs on, and why; the doctor prints both."""

    backend: str
    """triton or torch."""
    reason: str


def set_backend(name: str) -> None:
    """Sets the backend that :func:`choose` picks from: auto, triton or torch."""
    global _requested
    if name not in BACKENDS:
        raise ValueError(f"kernels.backend={name!r}: expected one of {', '.join(BACKENDS)}")
    _requested = name
    _chosen.clear()


def get_backend() -> str:
    """The name last given to :func:`set_backend`."""
    return _requested


def choose(op_name: str, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
    """Chooses the backend of an op on a device for inputs of a dtype (None: one that Triton takes).

    Raises ValueError for an unknown op, and for an explicit ``triton`` where the op has no Triton
    kernel, triton cannot be imported, the device is not CUDA or the kernels do not take the dtype.
    """
    key = (op_name, device.type, dtype)
    if key not in _chosen:
        choice = _choose(op_name, device.type, dtype)
        _chosen[key] = choice
        _log.info("op %s on %s: %s (%s)", op_name, device.type, choice.backend, choice.reason)
    return _chosen[key]


# What torch.compiler.assume_constant_result(choose) does, without importing the compiler (2 s) at every start.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(op_name: str, device_type: str, dtype: torch.dtype | None) -> Choice:
    if op_name not in OPS:
        raise ValueError(f"op {op_name!r}: expected one of {', '.join(OPS)}")
    if _requested == "torch":
        return Choice("torch", "kernels.backend=torch")
    obstacle = _obstacle(op_name, device_type, dtype)
    if obstacle is None:
        where = "on CUDA" if device_type == "cuda" else "under the interpreter"
        return Choice("triton", f"kernels.backend={_requested}, Triton kernel {where}")
    if _requested == "triton":
        raise ValueError(f"kernels.backend=triton: op {op_name}: {obstacle}; use kernels.backend=auto or torch")
    return Choice("torch", obstacle)


def _obstacle(op_name: str, device_type: str, dtype: torch.dtype | None) -> str | None:
    """Why the op cannot run on Triton here; None when it can."""
    if not (Path(__file__).parent / op_name / "kernel.py").is_file():
        return "no Triton kernel for this op"
    interpreted = _requested == "triton" and interpreting() and device_type == "cpu"
    if device_type != "cuda" and not interpreted:
        return f"Triton needs a CUDA device, tensors are on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype is not None and dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    return None
