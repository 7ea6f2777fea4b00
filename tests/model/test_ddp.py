"""Two data-parallel ranks give the gradients of one process on both shares, on either backend."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hstu.config import LossConfig
from hstu.data.batches import Batch
from hstu.distributed import Engine, World
from hstu.model.retrieval import RetrievalModel
from kernels._backend import set_backend
from tests.model.test_encoders import NUM_ITEMS, TOY, make_batch
from tests.ranks import run_ranks

LENGTHS = [[3, 4], [1, 2]]
"""Of the users of each rank: 7 events and 3."""


def make_model() -> RetrievalModel:
    torch.manual_seed(0)
    return RetrievalModel(TOY, NUM_ITEMS, LossConfig(name="full_softmax"))


def joined(batches: list[Batch]) -> Batch:
    """All users of all batches in one."""
    lengths = torch.cat([b.offsets.diff() for b in batches])
    parts = {n: torch.cat([getattr(b, n) for b in batches])
             for n in ("item_ids", "timestamps", "request_times", "labels")}  # fmt: skip
    return dataclasses.replace(
        batches[0], offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        users=torch.arange(len(lengths)), max_len=int(lengths.max()), **parts,
    )  # fmt: skip


def gradients_on_rank(backend: str) -> dict[str, Tensor]:
    rank, model = dist.get_rank(), make_model()
    engine = Engine(model, World.current())
    set_backend(backend)
    try:
        loss = engine.loss(make_batch(LENGTHS[rank], seed=rank), 0, None)
        (loss * dist.get_world_size()).backward()
    finally:
        set_backend("auto")
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_ranks_give_the_gradients_of_one(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("gloo ranks run on CPU tensors, which Triton takes under its interpreter only")
    ranks = run_ranks(2, gradients_on_rank, backend)
    set_backend(backend)
    one = make_model()
    one.loss(joined([make_batch(lengths, seed=rank) for rank, lengths in enumerate(LENGTHS)]), 0).backward()
    for name, parameter in one.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert parameter.grad is not None
        scale = parameter.grad.abs().max()
        assert scale > 0, name
        assert (ranks[0][name] - parameter.grad).abs().max() <= 2e-5 * scale, name
