"""Ranks without processes: threads that wait for each other, and the share of a batch that each of them has."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hstu.data.batches import Batch
from hstu.data.random_rows import rows_of

TIMEOUT_S = 60.0
"""Ranks that do not come to the same sums fail instead of waiting."""


class ThreadWorld:
    """What a loss asks of :class:`hstu.distributed.World`, among threads of one process.

    One runs at a time, the others wait for it to come to a sum: Triton's interpreter knows one program only.
    """

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier, turn: threading.Lock) -> None:
        self.rank, self.size, self._slots, self._barrier, self._turn = rank, len(slots), slots, barrier, turn

    def _all(self, tensor: Tensor) -> list[Tensor]:
        self._slots[self.rank] = tensor.detach().clone()
        self._turn.release()
        try:
            self._barrier.wait(TIMEOUT_S)
            found = list(self._slots)
            self._barrier.wait(TIMEOUT_S)
        finally:
            self._turn.acquire()
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        parts = self._all(tensor)
        assert len({(p.shape, p.dtype) for p in parts}) == 1, parts
        return torch.stack(parts).sum(0).to(tensor.dtype)

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._all(tensor))


def on_threads(function: Callable[[Any], Any], num_ranks: int) -> list[Any]:
    """``function(world)`` of every rank."""
    slots, barrier, turn = [None] * num_ranks, threading.Barrier(num_ranks), threading.Lock()
    found: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with turn:
                found[rank] = function(ThreadWorld(rank, slots, barrier, turn))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return found


def step(model: nn.Module, batch: Any, seed: int = 5, world: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a copy of the model; every parameter must have one."""
    model = copy.deepcopy(model).train()
    loss = model.loss(batch, seed, world=world)
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.numel() and p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.numel()}


def summed_step(model: nn.Module, shares: Sequence[Any], seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums over ranks of their losses and gradients."""
    ranks = on_threads(lambda world: step(model, shares[world.rank], seed, world), len(shares))
    loss = torch.stack([loss for loss, _ in ranks]).sum()
    return loss, {name: sum(gradients[name] for _, gradients in ranks) for name in ranks[0][1]}  # type: ignore[misc]


def assert_same_step(model: nn.Module, whole: Any, shares: Sequence[Any], rtol: float = 1e-9) -> None:
    """Fails unless the ranks' steps sum to that of one rank: ``rtol`` of the loss, and of each gradient's own scale."""
    (loss, gradients), (total, sums) = step(model, whole), summed_step(model, shares)
    assert torch.isfinite(total) and abs(total - loss) <= rtol * abs(loss), (float(total), float(loss))
    for name, expected in gradients.items():
        error, scale = (sums[name] - expected).abs().max(), expected.abs().max()
        assert error <= rtol * scale, f"{name}: {error:.2e} of {scale:.2e}"


def share_of(batch: Batch, users: Sequence[int]) -> Batch:
    """The share of a rank that has ``users`` of the batch."""
    lengths, chosen = batch.offsets.diff().numpy(), np.asarray(users, np.int64)
    rows = torch.from_numpy(rows_of(lengths, chosen))
    names = ("item_ids", "timestamps", "request_times", "labels", "weights", "actions")
    parts = {n: None if getattr(batch, n) is None else getattr(batch, n)[rows] for n in names}
    if batch.counted is not None:
        parts["counted"] = torch.isin(rows, batch.counted).nonzero()[:, 0]
    return dataclasses.replace(
        batch, offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths[chosen])])).long(),
        users=batch.users[torch.from_numpy(chosen)], random_rows=rows, **parts,
    )  # fmt: skip
