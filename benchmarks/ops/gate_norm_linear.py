"""gate_norm_linear: the exit of the HSTU layer at the published widths, training (dropout) and not.

Legend: L events, W = H*V gate width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import Absent, AotCase, Expect, Problem, Run, Sizes, Work, leaf, nbytes
from benchmarks.ops._tf32 import with_tf32
from kernels.gate_norm_linear import gate_norm_linear

SEED = 7
ML_1M = {"name": "ml-1m", "L": 20_000, "W": 50, "D": 50, "dropout": 0.2}
ML_20M = {"name": "ml-20m", "L": 20_000, "W": 256, "D": 256, "dropout": 0.2}
BOOKS = {"name": "books", "L": 4_000, "W": 64, "D": 64, "dropout": 0.5}
LARGE = {"name": "large", "L": 98_304, "W": 512, "D": 512, "dropout": 0.2}
"""Issue 530 of the reference code: B=32, 1024 + 2048 rows, 4 heads of 128."""
DEFAULTS = {"L": 20_000, "W": 50, "D": 50, "dropout": 0.0}
SIZES: dict[str, list[Sizes]] = {
    "toy": [{"L": 200}, {"L": 100, "W": 64, "D": 64, "dropout": 0.5}],
    "quick": [ML_1M, ML_20M, LARGE],
    "full": [ML_1M, BOOKS, ML_20M, LARGE, {**LARGE, "name": "large-no-dropout", "dropout": 0.0}],
}


def plain(av: Tensor, u: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, dropout: float) -> Tensor:
    """What a user would write."""
    functional = torch.nn.functional
    gated = functional.dropout(u * functional.layer_norm(av, av.shape[1:], eps=1e-6), dropout)
    return torch.addmm(bias, gated, weight) + residual


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    length, width, dim, dropout = sizes["L"], sizes["W"], sizes["D"], sizes["dropout"]
    shapes = [(length, width), (length, 4 * width), (width, dim), (dim,), (length, dim)]
    av, fused, weight, bias, residual = (leaf(shape, device, dtype, generator) for shape in shapes)
    u = fused.detach()[:, :width].requires_grad_()  # a view into the fused projection, as in the layer
    tensors = [av, u, weight, bias, residual]
    product, value = 2.0 * length * width * dim, av.element_size()

    def run(function: Callable[..., Tensor]) -> Run:
        return Run(lambda: function(*tensors), tensors)

    def compiled() -> Run:
        if device.type != "cuda":
            raise Absent("torch.compile: timed on CUDA only")
        return run(torch.compile(partial(plain, dropout=dropout), dynamic=False))

    return Problem(
        run(partial(gate_norm_linear, dropout=dropout, seed=SEED)),
        forward=Work(product, 2 * length * width * value + nbytes(weight) + 2 * nbytes(residual)),
        backward=Work(2 * product, 4 * length * width * value + 2 * nbytes(weight) + nbytes(residual)),
        competitors={
            "torch": lambda: run(partial(plain, dropout=dropout)),
            "torch.compile": compiled,
        },
        tokens=length,
    )


def _launch(
    width: int, dim: int, dtype: torch.dtype, stream: torch.dtype, rate: float, rms: bool = False,
    rows: Tensor | None = None,
) -> Any:  # fmt: skip
    from kernels.gate_norm_linear.kernel import gate_norm_linear_bwd, gate_norm_linear_fwd

    av, u = torch.randn(70, width).to(dtype), torch.randn(70, 4 * width).to(dtype)[:, :width]
    weight, bias, residual = torch.randn(width, dim), torch.randn(dim), torch.randn(70, dim).to(stream)
    gate_norm_linear_fwd(av, u, weight, bias, residual, 1e-6, rms, rate, SEED, dtype, rows)
    return gate_norm_linear_bwd(residual, av, u, weight, 1e-6, rms, rate, SEED, dtype, rows)


def aot_cases() -> list[AotCase]:
    half, full = torch.bfloat16, torch.float32
    one = Expect(matrix=("_gate_norm_linear_fwd_kernel", "_gate_norm_linear_bwd_kernel"))
    fused = Expect(matrix=("_gate_norm_linear_fwd_kernel",))
    wide = Expect(matrix=("_gate_norm_linear_wide_fwd_kernel",))
    return [
        ("ml-1m bfloat16", partial(_launch, 50, 50, half, half, 0.2), one),
        ("ml-1m bfloat16, evaluation", partial(_launch, 50, 50, half, half, 0.0), one),
        ("ml-1m bfloat16 of float32", partial(_launch, 50, 50, half, full, 0.2, True), one),
        ("books bfloat16", partial(_launch, 64, 64, half, half, 0.5), one),
        ("ml-20m bfloat16", partial(_launch, 256, 256, half, half, 0.2), fused),
        ("ml-20m bfloat16 of float32", partial(_launch, 256, 256, half, full, 0.2), fused),
        ("ml-1m bfloat16, random rows", partial(_launch, 50, 50, half, half, 0.2, rows=torch.arange(70)), one),
        ("ml-20m bfloat16, random rows", partial(_launch, 256, 256, half, half, 0.2, rows=torch.arange(70)), fused),
        ("large bfloat16, random rows", partial(_launch, 512, 512, half, half, 0.2, rows=torch.arange(70)), wide),
        ("large bfloat16", partial(_launch, 512, 512, half, half, 0.2), wide),
        ("large bfloat16 of float32", partial(_launch, 512, 512, half, full, 0.0), wide),
        ("ml-1m float32", partial(_launch, 50, 50, full, full, 0.2)),
        ("ml-1m tf32", with_tf32(partial(_launch, 50, 50, full, full, 0.2))),
        ("ml-20m tf32", with_tf32(partial(_launch, 256, 256, full, full, 0.2))),
        ("d-100 tf32", with_tf32(partial(_launch, 100, 100, full, full, 0.2))),
        ("d-100 bfloat16", partial(_launch, 100, 100, half, half, 0.2), fused),
    ]
