"""Lookup and update of a rank's shards in torch, where fbgemm's fused update in the backward cannot serve.

That is where something comes between the gradients and the rows (the norm of all gradients, those of other batches of
the step), and for optimizers that fbgemm has on the GPU only (Adam, row-wise Adam). The backward keeps the gradients of
what was looked up; at the end of the step those of equal rows are summed and the rows move, each once. Weights stay in
fbgemm's module, so that torchrec's state dicts and lookups see them.

Legend: n rows of a shard, d its width, E ids looked up, t different ones among them.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hstu.sharded.width import own_columns
from hstu.table_optim import Rule


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, shard: Shard) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shard = shard
        return nn.functional.pad(shard.weight[ids].float(), (0, shard.padding))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.shard.keep(ctx.saved_tensors[0], own_columns(grad, ctx.shard.weight.shape[1]))
        return grad.new_zeros((), device="cpu"), None, None


class Shard:
    """A part of a table on this rank: weight [n, d], its optimizer's state, and the gradients of the step so far.

    Args:
        stored: [n, d + padding], of which weight is a view.
        dim: d.
    """

    def __init__(self, stored: Tensor, rule: Rule, dim: int) -> None:
        self.weight, self.padding = own_columns(stored, dim), stored.shape[1] - dim
        self.rule, self.state = rule, rule.state(self.weight)
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._is_summed = False

    def begin(self) -> None:
        """A step begins."""
        self._parts, self._is_summed = [], False

    def keep(self, ids: Tensor, grad: Tensor) -> None:
        """Takes the gradients [E, d] of a lookup of ids [E]. What is kept is summed where it has more rows than n."""
        self._parts.append((ids, grad))
        self._is_summed = False
        if len(self._parts) > 1 and sum(len(part) for part, _ in self._parts) > len(self.weight):
            self.gradient()

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Rows [t] int64, ascending, and the sums [t, d] of their gradients of the step so far."""
        if not self._is_summed:
            ids = [part for part, _ in self._parts] or [torch.zeros(0, dtype=torch.int64, device=self.weight.device)]
            rows, places = torch.cat(ids).unique(return_inverse=True)
            total = torch.zeros(len(rows), self.weight.shape[1], device=self.weight.device)
            for place, (_, grad) in zip(places.split([len(part) for part in ids]), self._parts, strict=False):
                total.index_add_(0, place, grad)
            self._parts, self._is_summed = [(rows, total)], True
        return self._parts[0]

    def move(self, lr: float, step: int) -> None:
        """Moves the rows of whose gradients something is left; step: 1, 2, ..."""
        rows, total = self.gradient()
        moved = (total != 0).any(dim=1).nonzero()[:, 0]
        self.rule.update(self.weight, rows[moved], total[moved], self.state, lr, step)
        self.begin()


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
        ids = [features.values().long()]
        if len(self.shards) > 1:  # the features of a table stand together; on a GPU their counts are waited for
            counts = iter(features.length_per_key())
            ids = list(ids[0].split([sum(islice(counts, number)) for number in self.num_features]))
        parts = [_Lookup.apply(self.anchor, part, shard) for part, shard in zip(ids, self.shards, strict=True)]
        return torch.cat(parts)
