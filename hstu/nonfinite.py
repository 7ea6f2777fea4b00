"""Finds where the first non-finite value of a step came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_non_finite(model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
    """Name of the first non-finite tensor: a parameter, else a module's output, else the loss, else a gradient;
    None where all are finite.

    Args:
        model: as it was when the step failed.
        loss: computes the step's loss again.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and not _finite(t) for t in outputs):
                found.append(f"output of {name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules()]
    try:
        model.zero_grad(set_to_none=True)
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    if not _finite(value):
        return "the loss"
    value.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"gradient of {name}"
    return None


def _finite(t: Tensor) -> bool:
    return bool(torch.isfinite(t.detach()).all())
