"""The model on Triton gives the loss curve it gives on torch: interpreted at toy size, compiled where there is a GPU.

Full softmax and no dropout: nothing is drawn, so both backends compute the same function.
"""

import dataclasses

import pytest
import torch

from hstu.config import BiasConfig, HSTUConfig, LossConfig
from hstu.model.retrieval import RetrievalModel
from kernels._backend import set_backend
from tests.model.test_encoders import NUM_ITEMS, make_batch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = HSTUConfig(
    dim=8,
    num_blocks=1,
    num_heads=2,
    qk_dim=4,
    v_dim=5,
    max_len=20,
    dropout=0.0,
    bias=BiasConfig(num_buckets=16, bucket_width=1.3),
)


def curve(backend: str, loss: LossConfig, steps: int = 2) -> list[float]:
    """Loss of each step, and the last validation scores' sum, of a short seeded training run."""
    set_backend(backend)
    torch.manual_seed(0)
    model = RetrievalModel(CONFIG, NUM_ITEMS, loss).to(DEVICE)
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


@pytest.mark.parametrize("name", ["full_softmax"])
def test_the_loss_curve_does_not_depend_on_the_backend(name):
    loss = LossConfig(name=name)
    torch_curve, triton_curve = curve("torch", loss), curve("triton", loss)
    assert torch_curve[-1] != torch_curve[0]
    assert triton_curve == pytest.approx(torch_curve, rel=2e-5)
