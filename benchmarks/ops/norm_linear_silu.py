"""norm_linear_silu: the projections of the published models, one product each.

Legend: L events, D model width, O projection width (u, v, q, k side by side).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import Absent, AotCase, Expect, Problem, Run, Sizes, Work, leaf, nbytes
from benchmarks.ops._tf32 import with_tf32
from kernels.norm_linear_silu import norm_linear_silu

ML_1M = {"name": "ml-1m", "L": 20_000, "D": 50, "O": 200}
ML_20M = {"name": "ml-20m", "L": 20_000, "D": 256, "O": 1024}
BOOKS = {"name": "books", "L": 4_000, "D": 64, "O": 256}
LARGE = {"name": "large", "L": 98_304, "D": 512, "O": 2048}
"""Issue 530 of the reference code: B=32, 1024 + 2048 rows, 4 heads of 128."""
DEFAULTS = {"L": 20_000, "D": 50, "O": 200, "norm": "layer"}
SIZES: dict[str, list[Sizes]] = {
    "toy": [{"L": 200, "D": 50, "O": 200}, {"L": 100, "D": 64, "O": 256, "norm": "rms"}],
    "quick": [ML_1M, ML_20M, LARGE],
    "full": [ML_1M, {**ML_1M, "name": "ml-1m-rms", "norm": "rms"}, BOOKS, ML_20M, LARGE],
}


def plain(x: Tensor, weight: Tensor, norm: str) -> Tensor:
    """What a user would write."""
    functional = torch.nn.functional
    layer = functional.layer_norm if norm == "layer" else functional.rms_norm
    return functional.silu(layer(x, x.shape[1:], eps=1e-6) @ weight)


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    length, dim, out, norm = sizes["L"], sizes["D"], sizes["O"], sizes["norm"]
    x, weight = leaf((length, dim), device, dtype, generator), leaf((dim, out), device, dtype, generator)
    product, y_bytes = 2.0 * length * dim * out, length * out * x.element_size()

    def run(function: Callable[..., Tensor]) -> Run:
        return Run(lambda: function(x, weight, norm=norm), [x, weight])

    def compiled() -> Run:
        if device.type != "cuda":
            raise Absent("torch.compile: timed on CUDA only")
        return run(torch.compile(plain, dynamic=False))

    return Problem(
        run(norm_linear_silu),
        forward=Work(product, nbytes(x, weight) + y_bytes),
        backward=Work(2 * product, 2 * nbytes(x, weight) + y_bytes),
        competitors={
            "torch": lambda: run(plain),
            "torch.compile": compiled,
        },
        tokens=length,
    )


def _launch(dim: int, out: int, dtype: torch.dtype, stream: torch.dtype, rms: bool) -> Any:
    from kernels.norm_linear_silu.kernel import norm_linear_silu_bwd, norm_linear_silu_fwd

    x, weight = torch.randn(70, dim).to(stream), torch.randn(dim, out)
    silu = (0, out)
    y = norm_linear_silu_fwd(x, weight, 1e-6, rms, silu, dtype)
    return norm_linear_silu_bwd(torch.zeros_like(y), x, weight, 1e-6, rms, silu)


def aot_cases() -> list[AotCase]:
    half, full = torch.bfloat16, torch.float32
    small, wide = {"ml-1m": (50, 200), "books": (64, 256)}, {"ml-20m": (256, 1024)}
    one = Expect(matrix=("_norm_linear_silu_fwd_kernel", "_norm_linear_silu_bwd_kernel"))
    cases: list[AotCase] = [
        (f"{name} bfloat16", partial(_launch, *sizes, half, half, False), one) for name, sizes in small.items()
    ]
    fused = Expect(matrix=("_norm_linear_silu_fwd_kernel",))
    for name, sizes in wide.items():
        cases.append((f"{name} bfloat16", partial(_launch, *sizes, half, half, False), fused))
        cases.append((f"{name} bfloat16 of float32", partial(_launch, *sizes, half, full, False), fused))
    split = Expect(matrix=("_linear_silu_kernel",))
    cases += [
        ("large bfloat16", partial(_launch, 512, 2048, half, half, False), split),
        ("ml-1m bfloat16 of float32", partial(_launch, 50, 200, half, full, True), one),
        ("ml-1m float32", partial(_launch, 50, 200, full, full, False)),
        ("ml-1m tf32", with_tf32(partial(_launch, 50, 200, full, full, False))),
        ("ml-20m tf32", with_tf32(partial(_launch, 256, 1024, full, full, False))),
        ("d-100 tf32", with_tf32(partial(_launch, 100, 400, full, full, False))),
    ]
    return cases
