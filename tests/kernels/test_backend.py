"""Backend choice: automatic with a reason, explicit or an error."""

import logging
from pathlib import Path

import pytest
import torch

import kernels
from kernels import _backend
from kernels._backend import OPS, choose, set_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_folder(op):
    folder = Path(kernels.__file__).parent / op
    for name in ("reference.py", "op.py", "__init__.py", "README.md"):
        assert (folder / name).is_file(), f"kernels/{op}/{name} is missing"


@pytest.mark.parametrize("op", OPS)
def test_cpu_runs_torch_and_says_why(op):
    choice = choose(op, CPU)
    assert choice.backend == "torch" and choice.reason


def test_explicit_torch():
    set_backend("torch")
    assert choose("sampled_softmax", CPU) == ("torch", "kernels.backend=torch")


@pytest.mark.parametrize("op", OPS)
def test_explicit_triton_raises_on_cpu(op, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    set_backend("triton")
    with pytest.raises(ValueError, match=f"kernels.backend=triton: op {op}: .*use kernels.backend=auto or torch"):
        choose(op, CPU)


def test_explicit_triton_reaches_the_op(monkeypatch):
    from kernels.sampled_softmax import sampled_softmax

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    set_backend("triton")
    with pytest.raises(ValueError, match="kernels.backend=triton"):
        sampled_softmax(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 2]), num_negatives=2)


def test_triton_is_taken_on_cuda_where_the_kernel_and_triton_are(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: object())
    assert choose("attention", torch.device("cuda")).backend == "triton"
    assert choose("attention", CPU).backend == "torch"
    set_backend("auto")
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    assert choose("attention", torch.device("cuda")) == ("torch", "triton is not installed")


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="op 'matmul': expected one of attention"):
        choose("matmul", CPU)
    with pytest.raises(ValueError, match="kernels.backend='cuda': expected one of auto, triton, torch"):
        set_backend("cuda")


def test_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="kernels._backend"):
        choose("rank_and_topk", CPU)
        choose("rank_and_topk", CPU)
    assert len([r for r in caplog.records if "rank_and_topk" in r.message]) == 1
