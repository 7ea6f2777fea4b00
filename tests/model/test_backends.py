"""The model on Triton gives the loss curve it gives on torch: interpreted at toy size, compiled where there is a GPU.

Full softmax and no dropout: nothing is drawn, so both backends compute the same function.
"""

import dataclasses

import pytest
import torch

from hstu.config import LossConfig
from hstu.model.retrieval import RetrievalModel
from kernels._backend import set_backend
from tests.model.test_encoders import NUM_ITEMS, TOY, make_batch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def curve(backend: str, loss: LossConfig, steps: int = 2) -> list[float]:
    """Loss of each step of a short seeded training run."""
    set_backend(backend)
    torch.manual_seed(0)
    model = RetrievalModel(TOY, NUM_ITEMS, loss).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        batch = make_batch([3, 12, 1], seed=step)
        batch = dataclasses.replace(
            batch,
            **{
                f.name: v.to(DEVICE)
                for f in dataclasses.fields(batch)
                if isinstance(v := getattr(batch, f.name), torch.Tensor)
            },
        )
        optimizer.zero_grad()
        value = model.loss(batch, step)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def test_the_loss_curve_does_not_depend_on_the_backend():
    loss = LossConfig(name="full_softmax")
    torch_curve, triton_curve = curve("torch", loss), curve("triton", loss)
    assert torch_curve[-1] != torch_curve[0]
    assert triton_curve == pytest.approx(torch_curve, rel=2e-5)
