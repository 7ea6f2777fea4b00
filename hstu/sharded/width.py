"""Widths of sharded tables: fbgemm's rows are a multiple of 4 wide, with zeros behind the columns of the model.

A row of D columns is stored with D' >= D. Lookups are cut to D, so that the gradient of the others is zero and every
optimizer leaves them at zero. State dicts and states of optimizers show D columns: views of what is stored.

fbgemm's row-wise optimizers take the mean of a row's squared gradients over D'. With gradients g sqrt(D'/D) that is the
mean of g^2 over D: the state is the one of a row of D columns, and at a rate of lr sqrt(D/D') so is the step. Row-wise
Adam also keeps a mean of the gradients themselves, which would come out larger: there rows are moved in torch.

Legend: V rows of a table, n of a part, D its width, D' its stored width.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

UNIT = 4
"""Columns that fbgemm's kernels read at a time, in float32 as in narrow rows; it refuses other widths."""


def stored_width(dim: int) -> int:
    """D' of D."""
    return -(-dim // UNIT) * UNIT


def is_padded(dim: int) -> bool:
    """Whether rows are stored with more columns than they have."""
    return stored_width(dim) != dim


def stretch_of(dim: int) -> float:
    """What gradients of fbgemm's row-wise Adagrad are multiplied by, and its rate divided by."""
    return math.sqrt(stored_width(dim) / dim)


def own_columns(values: Tensor, dim: int) -> Tensor:
    """[n, D] of values [n, D'], a view."""
    return values if values.shape[1] == dim else values[:, :dim]


def narrowed(stored: Any, dim: int) -> Any:
    """The D columns of a ShardedTensor or tensor [V, D'], in the same memory; one without columns as it is."""
    if not hasattr(stored, "local_shards"):
        return own_columns(stored, dim)
    size = stored.metadata().size
    if size[1:] in ((), (dim,)):
        return stored
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata

    def cut(shard: Any) -> Any:
        (rows, columns), first = shard.shard_sizes, shard.shard_offsets[1]
        return ShardMetadata(list(shard.shard_offsets), [rows, min(columns, dim - first)], shard.placement)

    metadata = copy.deepcopy(stored.metadata())
    metadata.size = torch.Size([size[0], dim])
    metadata.shards_metadata = [cut(shard) for shard in metadata.shards_metadata]
    metadata.tensor_properties.requires_grad = False
    parts = [(part.tensor.detach(), cut(part.metadata)) for part in stored.local_shards()]
    # A ShardedTensor is made of contiguous parts only: of the right shape at first, then of the columns themselves.
    shards = [Shard(part.view(-1)[: math.prod(own.shard_sizes)].view(own.shard_sizes), own) for part, own in parts]
    found = ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)
    for shard, (part, own) in zip(found.local_shards(), parts, strict=True):
        shard.tensor = own_columns(part, own.shard_sizes[1])
    return found


def stretch_gradients(kernel: Any, factor: float) -> None:
    """From now on the gradients that come to torchrec's ``kernel`` are multiplied by ``factor``."""
    lookup = kernel.forward

    def forward(features: Any) -> Tensor:
        found: Tensor = lookup(features)
        if found.requires_grad:
            found.register_hook(lambda grad: grad * factor)
        return found

    kernel.forward = forward
