"""Dropout whose mask is a function of a seed: nothing is stored, the backward draws it again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 65_536
"""The rate is rounded to a multiple of 1/65536: one 16-bit draw per element."""


def keep_scale(shape: torch.Size, rate: float, seed: int, like: Tensor) -> Tensor:
    """Mask of dropout: 0 with probability ``rate``, else 1 / (1 - rate).

    Args:
        shape: of the mask.
        rate: in [0, 1).
        seed: >= 0. The mask is a function of (shape, rate, seed, device type).
        like: tensor whose dtype and device the mask takes.
    """
    dropped = round(rate * LEVELS)
    factor = LEVELS / (LEVELS - dropped)
    if like.device.type == "cpu":
        return keep_mask(shape, rate, seed).to(like.dtype).mul_(factor)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    draws_d = torch.randint(0, LEVELS, shape, device=like.device, dtype=torch.int32, generator=generator)
    return (draws_d >= dropped).to(like.dtype) * factor


def keep_mask(shape: torch.Size, rate: float, seed: int) -> Tensor:
    """The CPU mask before scaling: uint8, 0 with probability ``rate`` (to 1/65536), else 1."""
    dropped = round(rate * LEVELS)
    draws = np.random.Generator(np.random.SFC64(seed)).integers(0, LEVELS, size=shape.numel(), dtype=np.uint16)
    return torch.from_numpy((draws >= dropped).view(np.uint8)).view(shape)


@torch.library.custom_op("hstu::seeded_dropout", mutates_args=())
def _seeded_dropout(x: Tensor, rate: float, seed: int) -> Tensor:
    return x * keep_scale(x.shape, rate, seed, x)


@_seeded_dropout.register_fake
def _(x, rate, seed):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.rate, ctx.seed = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.hstu.seeded_dropout(grad, ctx.rate, ctx.seed), None, None


_seeded_dropout.register_autograd(_backward, setup_context=_setup_context)


def seeded_dropout(x: Tensor, rate: float, seed: int | None) -> Tensor:
    """``x`` with dropout from ``seed``; x itself when ``seed`` is None (evaluation) or rate is 0.

    Args:
        x: any shape, floating.
        rate: in [0, 1).
        seed: >= 0 or None.

    Raises:
        ValueError: rate outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate={rate}: expected in [0, 1)")
    if seed is None or rate == 0.0:
        return x
    return torch.ops.hstu.seeded_dropout(x, rate, seed)
