"""Finds where the first non-finite value of a step came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hstu.distributed import World, own_part


def first_non_finite(
    model: nn.Module, loss: Callable[[], Tensor], world: World | None = None,
    rows: Callable[[], Iterable[tuple[str, Tensor]]] = tuple,
) -> str | None:  # fmt: skip
    """Name of the first non-finite tensor: a parameter, else a module's output, else the loss, else a gradient;
    None where all are finite.

    Args:
        model: as it was when the step failed.
        loss: computes the step's loss again.
        world: all its ranks search together; the first of them that finds something is believed.
        rows: names and gradients of rows of sharded tables, which belong to no parameter.
    """
    world = world or World()

    def first(names: Iterable[str]) -> str | None:
        return next((name for name in world.gather_objects(next(iter(names), None)) if name is not None), None)

    name = first(f"parameter {n}" for n, p in model.named_parameters() if not is_finite(p))
    if name is not None:
        return name
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and not is_finite(t) for t in outputs):
                found.append(f"output of {name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules()]
    try:
        model.zero_grad(set_to_none=True)
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    name = first([*found, *([] if is_finite(value) else ["the loss"])])
    if name is not None:
        return name
    value.backward()
    grads = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    return first(f"gradient of {n}" for n, grad in [*grads, *rows()] if not is_finite(grad))


def is_finite(t: Tensor) -> bool:
    """Whether what of ``t`` lies on this rank is finite. Nothing of its size is made: it may be most of the memory."""
    own = own_part(t.detach())
    if own.numel() == 0 or not own.is_floating_point():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(own))).all())
