"""Lookup and update of a rank's shards in torch, for optimizers that fbgemm has on the GPU only (Adam, row-wise Adam).

The update happens in the backward, as in fbgemm's fused kernels: the gradients of equal rows are summed, then the rows
move. Weights stay in fbgemm's module, so that torchrec's state dicts and lookups see them.

Legend: n rows of a shard, d its width, E ids looked up.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hstu.sharded_width import own_columns
from hstu.table_optim import Rule


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, shard: Shard) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shard = shard
        return nn.functional.pad(shard.weight[ids].float(), (0, shard.padding))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.shard.learn(ctx.saved_tensors[0], own_columns(grad, ctx.shard.weight.shape[1]))
        return grad.new_zeros((), device="cpu"), None, None


class Shard:
    """A part of a table on this rank: weight [n, d], its optimizer's state, and what its next step is.

    Args:
        stored: [n, d + padding], of which weight is a view.
        dim: d.
    """

    def __init__(self, stored: Tensor, rule: Rule, dim: int) -> None:
        self.weight, self.padding = own_columns(stored, dim), stored.shape[1] - dim
        self.rule, self.state = rule, rule.state(self.weight)
        self.lr, self.step = 0.0, 0

    def learn(self, ids: Tensor, grad: Tensor) -> None:
        """Sums the gradients [E, d] of equal rows and moves those of which something is left."""
        rows, place = ids.unique(return_inverse=True)
        total = grad.new_zeros(len(rows), grad.shape[1]).index_add_(0, place, grad)
        moved = (total != 0).any(dim=1)
        self.rule.update(self.weight, rows[moved], total[moved], self.state, self.lr, self.step)


class TorchKernel(nn.Module):
    """Takes the place of the forward of torchrec's ``BatchedFusedEmbedding``, table by table.

    Args:
        kernel: torchrec's.
        dim: of the tables; what is stored may be wider.
    """

    def __init__(self, kernel: Any, rule: Rule, dim: int) -> None:
        super().__init__()
        firsts = [table.local_metadata.shard_offsets[1] for table in kernel.config.embedding_tables]
        stored = zip(kernel.split_embedding_weights(), firsts, strict=True)
        self.shards = [Shard(weight, rule, min(weight.shape[1], dim - first)) for weight, first in stored]
        self.num_features = [config.num_features() for config in kernel.config.embedding_tables]
        self.anchor = torch.zeros((), requires_grad=True)
        """A leaf without meaning: autograd asks for one to come to the backward."""

    def forward(self, features: Any) -> Tensor:
        counts = iter(features.length_per_key())  # the features of a table stand together
        ids = features.values().long().split([sum(islice(counts, number)) for number in self.num_features])
        parts = [_Lookup.apply(self.anchor, part, shard) for part, shard in zip(ids, self.shards, strict=True)]
        return torch.cat(parts)
