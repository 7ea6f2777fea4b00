"""The ranks of a run: who this process is among them, and what they tell each other.

A run on one process has a :class:`World` of size 1, whose methods work without ``torch.distributed``. What is trained
is the same for every number of ranks: each takes its share of the users of a step, and counts are summed.

Legend: R ranks, n rows of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hstu.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run.

    Attributes:
        rank: 0..size-1. size: R, 1 without a process group.
        device: where this rank computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def current(cls, device: torch.device | None = None) -> World:
        """Of the process group that is there, else of one process."""
        device = device or torch.device("cpu")
        if not dist.is_available() or not dist.is_initialized():
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """This rank prints, logs and writes the files of the run."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks of a tensor of one shape, without gradient; the argument stays as it is."""
        total = tensor.detach()
        if self.size > 1:
            total = total.clone()
            dist.all_reduce(total)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks in their order, [sum of n, ...], without gradient. tensor: [n, ...]; n may differ."""
        tensor = tensor.detach()
        if self.size == 1:
            return tensor
        counts = self._counts(tensor)
        longest = max(counts)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def _counts(self, tensor: Tensor) -> list[int]:
        own = torch.tensor([len(tensor)], device=tensor.device)
        counts = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(counts, own)
        return [int(count) for count in counts]

    def gather_arrays(self, array: np.ndarray) -> np.ndarray:
        """As :meth:`gather`, of numpy arrays of numbers."""
        if self.size == 1:
            return array
        return self.gather(torch.from_numpy(np.ascontiguousarray(array))).numpy()

    def gather_objects(self, value: Any) -> list[Any]:
        """The small plain value of every rank, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, name: str, value: Any) -> None:
        """Raises UserError, on every rank, where ``value`` is not the same on all of them. value: small and plain."""
        values = self.gather_objects(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(
                    f"{name} differs between ranks: rank 0 has {values[0]!r}, rank {rank} has {other!r}; "
                    "start all ranks alike"
                )
