"""Dropout whose mask is a function of a seed: nothing is stored, the backward draws it again.

Two streams of 16-bit draws, one per element; an element is dropped when its draw is below ``rate * 65536``:

- ``philox``: Philox 4x32-10 (``kernels/_philox.py``), its default stream, the key being the seed. Rows (the last
  dimension) are cut into *octets* of 8 elements, the last one padded; the counter is ``row * octets per row + octet``
  and its 128 bits are the octet's 8 draws, low half of the first word first. The Triton kernels draw this stream
  inside (``kernels/_dropout_kernel.py``); on every device but the CPU plain torch draws the same one here.
- ``sfc64``: numpy's SFC64, faster on a CPU, where it is the default. A CPU run with ``kernels.backend=triton``
  (the interpreter) draws ``philox``.

So the mask is a function of (seed, shape, rate, stream), equal for every dtype. With ``rows`` each row draws what the
row of that number draws in a larger tensor of this width: a rank's share of a batch draws what it would in the whole.
``philox`` counts in 64 bits. ``sfc64`` cannot jump, so all rows up to the largest are drawn; every 2^24 rows have a
stream of their own, so that rows far from the first cost no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels._backend import choose, get_backend
from kernels._philox import MASK, philox_4x32

LEVELS = 65_536
"""The rate is rounded to a multiple of 1/65536: one 16-bit draw per element."""
NEAR_BITS = 24
"""Rows that share a stream of a generator that cannot jump, as a power of two."""
OCTET = 8
"""16-bit draws of one Philox call."""


def dropped_levels(rate: float) -> int:
    """Draws below this number drop their element; never all of them."""
    return min(round(rate * LEVELS), LEVELS - 1)


def kept_factor(rate: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - rate), for the rounded rate."""
    return LEVELS / (LEVELS - dropped_levels(rate))


def keep_scale(shape: torch.Size, rate: float, seed: int, like: Tensor, rows: Tensor | None = None) -> Tensor:
    """Mask of dropout: 0 with probability ``rate``, else 1 / (1 - rate).

    Args:
        shape: of the mask.
        rate: in [0, 1).
        seed: >= 0, below 2^64.
        like: tensor whose dtype and device the mask takes; the device type also chooses the stream.
        rows: ``shape[:-1]`` int64, >= 0. Row whose numbers each row draws; None: its own.
    """
    if like.device.type == "cpu" and get_backend() != "triton":
        keep = keep_mask(shape, rate, seed, rows)
    else:
        keep = philox_draws(shape, seed, like.device, rows) >= dropped_levels(rate)
    return keep.to(like.dtype).mul_(kept_factor(rate))


def keep_mask(shape: torch.Size, rate: float, seed: int, rows: Tensor | None = None) -> Tensor:
    """The ``sfc64`` mask before scaling: uint8 on the CPU, 0 with probability ``rate`` (to 1/65536), else 1."""

    def draw(own_seed: Any, size: Any) -> np.ndarray:
        return np.random.Generator(np.random.SFC64(own_seed)).integers(0, LEVELS, size=size, dtype=np.uint16)

    if rows is None or shape.numel() == 0:
        draws = draw(seed, shape.numel())
    else:
        draws = draw_at(rows, seed, lambda own_seed, count: draw(own_seed, (count, shape[-1])))
    return torch.from_numpy((draws >= dropped_levels(rate)).view(np.uint8)).view(shape)


def draw_at(rows: Tensor, seed: int, draw: Callable[[Any, int], np.ndarray]) -> np.ndarray:
    """Rows of what a generator that cannot jump draws.

    Args:
        rows: int64, >= 0, at least one.
        seed: of the first 2^24 rows; those after them have ``[seed, number of the 2^24]``.
        draw: the first ``count`` rows of a seed, [count, ...].
    """
    places = rows.numpy()
    parts = places >> NEAR_BITS
    found = None
    for part in np.unique(parts).tolist():
        chosen = parts == part
        near = places[chosen] & ((1 << NEAR_BITS) - 1)
        every = draw([seed, part] if part else seed, int(near.max()) + 1)
        if found is None:
            found = np.empty((*places.shape, *every.shape[1:]), every.dtype)
        found[chosen] = every[near]
    assert found is not None
    return found


def philox_draws(shape: torch.Size, seed: int, device: torch.device, rows: Tensor | None = None) -> Tensor:
    """The ``philox`` stream: int64 of ``shape``, each in 0 .. 65535."""
    width = shape[-1] if shape else 1
    if shape.numel() == 0:
        return torch.zeros(shape, dtype=torch.int64, device=device)
    num_rows, octets = shape.numel() // width, -(-width // OCTET)
    index = torch.arange(num_rows * octets, dtype=torch.int64, device=device)
    if rows is not None:
        index = (rows.reshape(-1, 1) * octets + index[:octets]).view(-1)
    words = torch.stack(philox_4x32(index & MASK, index >> 32, seed), dim=1)  # [n, 4]
    draws = torch.stack((words & (LEVELS - 1), words >> 16), dim=2)  # [n, 4, 2]
    return draws.reshape(num_rows, octets * OCTET)[:, :width].reshape(shape)


@torch.library.custom_op("hstu::seeded_dropout", mutates_args=())
def _seeded_dropout(x: Tensor, rate: float, seed: int, triton: bool, rows: Tensor | None = None) -> Tensor:
    if triton:
        from kernels._dropout_kernel import seeded_dropout_fwd

        return seeded_dropout_fwd(x, rate, seed, rows)
    return x * keep_scale(x.shape, rate, seed, x, rows)


@_seeded_dropout.register_fake
def _(x, rate, seed, triton, rows=None):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if triton else torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.rate, ctx.seed, ctx.triton, rows = inputs
    ctx.save_for_backward(rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (rows,) = ctx.saved_tensors
    return torch.ops.hstu.seeded_dropout(grad, ctx.rate, ctx.seed, ctx.triton, rows), None, None, None, None


_seeded_dropout.register_autograd(_backward, setup_context=_setup_context)


def check_rate(rate: float) -> None:
    """Raises ValueError unless rate is in [0, 1)."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate={rate}: expected in [0, 1)")


def check_rows(rows: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError unless rows are None or int64 of ``shape`` on the device of ``like``; on the CPU, where
    reading is free, also where one is negative."""
    if rows is None:
        return
    if tuple(rows.shape) != shape or rows.dtype != torch.int64:
        raise ValueError(f"rows: expected {list(shape)} int64, got {list(rows.shape)} {rows.dtype}")
    if rows.device != like.device:
        raise ValueError(f"rows is on {rows.device}, the values on {like.device}: expected one device")
    if torch.compiler.is_compiling() or rows.device.type != "cpu" or rows.numel() == 0:
        return
    if not isinstance(rows, FAKE) and int(rows.min()) < 0:
        raise ValueError(f"rows: the least is {int(rows.min())}, expected >= 0")


FAKE = torch._subclasses.FakeTensor
"""Has no values to check."""


def seeded_dropout(x: Tensor, rate: float, seed: int | None, rows: Tensor | None = None) -> Tensor:
    """``x`` with dropout from ``seed``; x itself when ``seed`` is None (evaluation) or rate is 0.

    The backend is that of the ``jagged`` ops, which fuse the same mask into the input stage.

    Args:
        x: any shape, floating.
        rate: in [0, 1), rounded to a multiple of 1/65536.
        seed: >= 0 or None.
        rows: ``x.shape[:-1]`` int64, >= 0. Row whose numbers each row draws, in a tensor of this width; None: its own.

    Raises:
        ValueError: rate outside [0, 1); rows that do not fit.
    """
    check_rate(rate)
    check_rows(rows, tuple(x.shape[:-1]), x)
    if seed is None or rate == 0.0:
        return x
    triton = choose("jagged", x.device, x.dtype).backend == "triton"
    return torch.ops.hstu.seeded_dropout(x, rate, seed, triton, rows)
