"""Two data-parallel ranks give the gradients of one process on both batches, on either backend.

The ranks have equally many events, so the mean of their mean losses is the mean over all events.
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from hstu.config import LossConfig
from hstu.data.batches import Batch
from hstu.model.retrieval import RetrievalModel
from kernels._backend import set_backend
from tests.model.test_encoders import NUM_ITEMS, TOY, make_batch

LENGTHS = [[3, 4], [1, 6]]
"""Of the users of each rank: 7 events on both."""


class Loss(nn.Module):
    """The model with its loss as the forward, which is what DistributedDataParallel wraps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = RetrievalModel(TOY, NUM_ITEMS, LossConfig(name="full_softmax"))

    def forward(self, batch: Batch) -> Tensor:
        return self.model.loss(batch, 0)


def joined(batches: list[Batch]) -> Batch:
    """All users of all batches in one."""
    lengths = torch.cat([b.offsets.diff() for b in batches])
    parts = {n: torch.cat([getattr(b, n) for b in batches])
             for n in ("item_ids", "timestamps", "request_times", "labels")}  # fmt: skip
    return dataclasses.replace(
        batches[0], offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        users=torch.arange(len(lengths)), max_len=int(lengths.max()), **parts,
    )  # fmt: skip


def train_on_rank(rank: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    set_backend(backend)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    module = nn.parallel.DistributedDataParallel(Loss())
    module(make_batch(LENGTHS[rank], seed=rank)).backward()
    torch.save({n: p.grad for n, p in module.module.named_parameters()}, f"{folder}/{rank}.pt")
    del module  # its reducer, before the group that it uses
    dist.barrier()  # a rank that leaves while the other still talks to it can abort at its exit
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_ranks_give_the_gradients_of_one(backend, tmp_path):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("gloo ranks run on CPU tensors, which Triton takes under its interpreter only")
    mp.spawn(train_on_rank, (backend, str(tmp_path)), nprocs=2)
    set_backend(backend)
    one = Loss()
    one(joined([make_batch(lengths, seed=rank) for rank, lengths in enumerate(LENGTHS)])).backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, parameter in one.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        scale = parameter.grad.abs().max()
        assert scale > 0, name
        assert (ranks[0][name] - parameter.grad).abs().max() <= 2e-5 * scale, name
