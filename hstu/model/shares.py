"""A rank's part of a loss: the sum over ranks of the ranks' parts is the loss of one rank that has all positions.

So are the sums of the gradients. Sums over ranks carry none: a rank's gradient is that of its own positions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hstu.distributed import World, in_parts


def several(world: World | None) -> bool:
    """Whether there are other ranks."""
    return world is not None and world.size > 1


def over_ranks(x: Tensor, world: World | None) -> Tensor:
    """Sum over ranks of a tensor of one shape, without gradient; x itself on one rank."""
    return x if world is None or world.size == 1 else world.sum(x.detach())


def over_ranks_with_gradient(x: Tensor, world: World | None) -> Tensor:
    """The sum over ranks, whose gradient is that of this rank's summand alone."""
    return x if world is None or world.size == 1 else x + (world.sum(x.detach()) - x.detach())


def split_evenly(value: Tensor, world: World | None) -> Tensor:
    """A rank's part of a value that all ranks know: an even part of the value, the whole of the gradient.

    For a term that is no sum over positions, made from :func:`over_ranks_with_gradient`.
    """
    if world is None or world.size == 1:
        return value
    return value - value.detach() * (1.0 - 1.0 / world.size)


def reached(loss: Tensor, model: nn.Module, apart: Iterable[nn.Module], num_events: int, world: World | None) -> Tensor:
    """``loss``; of an empty share, with a gradient of zero for every parameter, which data-parallel ranks wait for.

    apart: modules whose parameters need none beyond what the loss gives them: the item table, and sharded tables. Nor
    do layers in parts on the ranks, which the empty share has gone through.
    """
    if num_events > 0 or not several(world):
        return loss
    left_out = {id(p) for module in apart for p in module.parameters()}
    left = [p for p in model.parameters() if id(p) not in left_out and not in_parts(p)]
    zeros = [p.reshape(-1)[:0].sum() for p in left]
    return loss + torch.stack([z.to(loss.dtype) for z in zeros]).sum()
