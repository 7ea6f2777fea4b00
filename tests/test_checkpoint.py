"""Checkpoints: whole or not at all, the last k kept, clear errors."""

import os

import pytest
import torch

from hstu import checkpoint
from hstu.config import OptimConfig
from hstu.errors import UserError
from hstu.optim import clip_gradients, gradient_norm, learning_rate, make_optimizer


def test_the_last_k_and_the_best_are_kept(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, {"model": {"w": torch.tensor(step)}}, step, keep_last=2)
    checkpoint.save_best(tmp_path, {"model": {"w": torch.tensor(9)}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "step-000000003.pt", "step-000000004.pt"]
    assert checkpoint.load_last(tmp_path)["model"]["w"] == 4
    assert checkpoint.load(tmp_path / checkpoint.BEST)["model"]["w"] == 9


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"model": {}}, 1, keep_last=1)

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, {"model": {}}, 2, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.pt"]


def test_a_full_disk_is_reported_as_one(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "step-000000001.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, {"model": {"w": torch.zeros(10_000)}}, 1, keep_last=1)
    assert list(tmp_path.iterdir()) == []


def test_broken_missing_and_foreign_files_are_one_clear_line(tmp_path):
    assert checkpoint.load_last(tmp_path / "none") is None
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "best.pt")
    (tmp_path / "best.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path / "best.pt")
    torch.save({"format": 99}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(tmp_path / "best.pt")


def test_learning_rates():
    constant = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(constant, s, 10) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = OptimConfig(lr=1.0, schedule="cosine", min_lr_fraction=0.1)
    assert [learning_rate(cosine, s, 10) for s in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])


def test_gradient_norm_and_clipping():
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    norm = gradient_norm(model)
    assert norm.item() == pytest.approx(5.0)
    clip_gradients(model, norm, 1.0)
    assert model.weight.grad.tolist() == [[pytest.approx(0.6), 0.0]]
    clip_gradients(model, gradient_norm(model), 10.0)
    assert model.bias.grad.item() == pytest.approx(0.8)
    model.bias.grad[0] = float("inf")
    assert not torch.isfinite(gradient_norm(model))


def test_weight_decay_spares_vectors():
    optimizer = make_optimizer(torch.nn.Linear(2, 1), OptimConfig(weight_decay=0.1))
    assert [(g["weight_decay"], g["params"][0].dim()) for g in optimizer.param_groups] == [(0.1, 2), (0.0, 1)]
