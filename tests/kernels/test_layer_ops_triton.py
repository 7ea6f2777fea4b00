"""norm_linear_silu, gate_norm_linear and the seeded dropout on Triton: interpreted without a GPU, compiled with one.

Legend: L total events, D model width, W = H*V gate width, O projection width.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels._backend import set_backend
from kernels._projection import Products
from kernels.gate_norm_linear import gate_norm_linear
from kernels.gate_norm_linear.reference import gate_norm_linear_reference
from kernels.norm_linear_silu import norm_linear_silu
from kernels.norm_linear_silu.reference import norm_linear_silu_reference
from tests.kernels.test_layer_ops import gate_inputs, randn
from tests.oracle import compare

CPU = torch.device("cpu")
DEVICES = [
    pytest.param("cpu", torch.float32, id="interpreted-float32"),
    pytest.param("cpu", torch.float16, id="interpreted-float16"),
    *(
        pytest.param("cuda", dtype, id=f"cuda-{str(dtype)[6:]}", marks=pytest.mark.gpu)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
]
"""bfloat16 is left out under the interpreter, whose products of it are wrong."""
WAYS = {
    "one": Products("fused", "one"),
    "fused": Products("fused", "fused"),
    "split": Products("split", "split"),
    "blas": Products("blas", "blas"),
}


@pytest.fixture(autouse=True)
def triton_backend(request):
    pytest.importorskip("triton")
    gpu = request.node.get_closest_marker("gpu") is not None
    if torch.cuda.is_available() and not gpu and "interpreted" in request.node.name:
        pytest.skip("the interpreter is off where there is a GPU")
    set_backend("triton")


@pytest.fixture
def force(monkeypatch):
    """Makes the launchers run their products one way, whatever the sizes and the dtype."""

    def force(way: str) -> None:
        import kernels.gate_norm_linear.kernel as gate
        import kernels.norm_linear_silu.kernel as entry

        for module in (gate, entry):
            monkeypatch.setattr(module, "products", lambda *_: WAYS[way])

    return force


def on(device, inputs):
    return {name: x.to(device) for name, x in inputs.items()}


@pytest.mark.parametrize("device, dtype", DEVICES)
@pytest.mark.parametrize(
    "way, length, dim, out, norm, silu_columns",
    [
        ("one", 33, 50, 200, "layer", None),
        ("one", 17, 25, 75, "rms", (0, 25)),
        ("one", 1, 8, 8, "layer", (3, 3)),
        ("fused", 67, 50, 66, "layer", (10, 50)),
        ("fused", 35, 130, 70, "rms", None),
        ("fused", 31, 200, 100, "layer", None),
        ("split", 35, 75, 70, "rms", None),
        ("split", 67, 25, 131, "layer", (10, 50)),
        ("blas", 33, 75, 131, "layer", (7, 100)),
        ("blas", 5, 25, 8, "rms", (0, 0)),
    ],
    ids=str,
)
def test_norm_linear_silu(way, length, dim, out, norm, silu_columns, device, dtype, force):
    force(way)
    options = {"norm": norm, "silu_columns": silu_columns}
    compare(
        partial(norm_linear_silu, **options),
        partial(norm_linear_silu_reference, **options),
        on(device, {"x": randn(length, dim, dtype=dtype) + 0.5, "weight": randn(dim, out, dtype=dtype)}),
    )


@pytest.mark.parametrize("device, dtype", DEVICES)
@pytest.mark.parametrize(
    "way, length, width, dim, norm, dropout",
    [
        ("one", 37, 50, 50, "layer", 0.2),
        ("one", 18, 75, 25, "rms", 0.5),
        ("one", 1, 8, 8, "layer", 0.0),
        ("fused", 33, 130, 70, "layer", 0.3),
        ("fused", 34, 100, 131, "rms", 0.0),
        ("blas", 33, 50, 25, "layer", 0.2),
        ("blas", 7, 200, 8, "rms", 0.0),
    ],
    ids=str,
)
def test_gate_norm_linear(way, length, width, dim, norm, dropout, device, dtype, force):
    force(way)
    options = {"norm": norm, "dropout": dropout, "seed": 5}
    compare(
        partial(gate_norm_linear, **options),
        partial(gate_norm_linear_reference, **options),
        on(device, gate_inputs(length, width, dim, dtype)),
    )
