"""norm_linear_silu, gate_norm_linear and the seeded dropout on Triton: interpreted without a GPU, compiled with one.

Legend: L total events, D model width, W = H*V gate width, O projection width.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels import _projection
from kernels._backend import set_backend
from kernels._dropout import dropped_levels, keep_scale, kept_factor, philox_draws, seeded_dropout
from kernels._projection import Products, columns_per_program, products
from kernels.gate_norm_linear import gate_norm_linear
from kernels.gate_norm_linear.reference import gate_norm_linear_reference
from kernels.jagged import add_positions
from kernels.norm_linear_silu import norm_linear_silu
from kernels.norm_linear_silu.reference import norm_linear_silu_reference
from tests.kernels.test_layer_ops import gate_inputs, randn
from tests.oracle import compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    """Makes the launchers run their products one way, whatever the sizes; not in float32 on a GPU, where the tiles of
    the other ways are too large without TF32 and products() never asks for them."""

    def force(way: str, device: str = "cpu", dtype: torch.dtype = torch.float16) -> None:
        if device == "cuda" and dtype == torch.float32:
            return
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
    force(way, device, dtype)
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
    force(way, device, dtype)
    options = {"norm": norm, "dropout": dropout, "seed": 5}
    compare(
        partial(gate_norm_linear, **options),
        partial(gate_norm_linear_reference, **options),
        on(device, gate_inputs(length, width, dim, dtype)),
    )


@pytest.mark.parametrize("device, dtype", DEVICES[1:])
@pytest.mark.parametrize("way", ["one", "fused", "split", "blas"])
def test_a_float32_stream_under_autocast(way, device, dtype, force):
    # x and residual in float32, products in dtype: as the float32 reference on values rounded once.
    if dtype == torch.float32:
        pytest.skip("autocast has no float32")
    force(way, device, dtype)
    x, weight = randn(35, 25), randn(25, 70)
    gate = gate_inputs(35, 20, 25)
    x, weight, gate = x.to(device), weight.to(device), on(device, gate)
    with torch.autocast(device, dtype):
        y = norm_linear_silu(x, weight)
        z = gate_norm_linear(**{**gate, "av": gate["av"].to(dtype), "u": gate["u"].to(dtype)}, dropout=0.3, seed=4)
    assert (y.dtype, z.dtype) == (dtype, torch.float32)
    truth_y = norm_linear_silu_reference(x.double(), weight.double())
    truth_z = gate_norm_linear_reference(**{n: t.double() for n, t in gate.items()}, dropout=0.3, seed=4)
    for found, truth in ((y, truth_y), (z, truth_z)):
        error = (found.double() - truth).abs().max() / truth.abs().max()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("device, dtype", DEVICES)
@pytest.mark.parametrize("way", ["one", "fused", "split", "blas"])
def test_strided_rows_and_gradients(way, device, dtype, force):
    force(way, device, dtype)
    x = randn(33, 60, dtype=dtype)[:, 3:40]
    weight = randn(30, 37, dtype=dtype).T
    compare(norm_linear_silu, norm_linear_silu_reference, on(device, {"x": x, "weight": weight}))
    inputs = gate_inputs(33, 37, 24, dtype)
    fused = torch.cat([inputs["u"]] * 3, dim=1)
    inputs |= {
        "u": fused[:, 37:74],
        "av": inputs["av"].T.contiguous().T,
        "weight": inputs["weight"].T.contiguous().T,
        "residual": torch.cat([inputs["residual"]] * 2, dim=1)[:, 5:29],
        "bias": torch.stack([inputs["bias"]] * 2, dim=1)[:, 0],
    }
    compare(
        partial(gate_norm_linear, dropout=0.3, seed=4),
        partial(gate_norm_linear_reference, dropout=0.3, seed=4),
        on(device, inputs),
    )
    leaves = [t.to(device).requires_grad_() for t in (x, weight)]
    expanded = norm_linear_silu(*leaves).sum()  # an upstream gradient without strides
    wanted = norm_linear_silu_reference(*leaves).sum()
    for found, expected in zip(torch.autograd.grad(expanded, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("device, dtype", DEVICES)
def test_a_large_mean_does_not_swamp_the_deviation(device, dtype, force):
    # 8 is exact in float16, and the deviation is a tenth of it; 200 columns take the chunked statistics.
    force("fused", device, dtype)
    inputs = gate_inputs(19, 200, 24, dtype)
    inputs["av"] = (inputs["av"].float() * 0.8 + 8).to(dtype)
    compare(gate_norm_linear, gate_norm_linear_reference, on(device, inputs))


@pytest.mark.parametrize("way", ["one", "fused", "split", "blas"])
def test_no_events(way, force):
    force(way)
    x, weight = (t.to(DEVICE).requires_grad_() for t in (torch.zeros(0, 8), torch.ones(8, 3)))
    y = norm_linear_silu(x, weight)
    y.sum().backward()
    assert y.shape == (0, 3) and x.grad.shape == (0, 8) and not weight.grad.any()
    inputs = {n: t.requires_grad_() for n, t in on(DEVICE, gate_inputs(0, 8, 4)).items()}
    z = gate_norm_linear(**inputs, dropout=0.5, seed=1)
    z.sum().backward()
    assert z.shape == (0, 4)
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs.values())


@pytest.mark.parametrize("device, dtype", DEVICES)
@pytest.mark.parametrize("shape", [(5, 50), (7, 16), (3, 4, 25), (13,), (1, 1), ()], ids=str)
def test_seeded_dropout_draws_the_stream(shape, device, dtype):
    x = (torch.rand(shape) + 0.5).to(device, dtype).requires_grad_()
    for seed in (0, 1, 2**40 + 3, 2**62 - 1):
        keep = philox_draws(x.shape, seed, x.device) >= dropped_levels(0.3)
        expected = torch.where(keep, x.float() * kept_factor(0.3), 0.0).to(dtype)
        y = seeded_dropout(x, 0.3, seed)
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0] != 0, keep)


@pytest.mark.parametrize("device, dtype", DEVICES)
def test_every_kernel_draws_the_same_mask(device, dtype, force):
    # Identity weight, no bias, no residual, gate 1: what is not zero was kept.
    x = (randn(37, 50).abs() + 0.1).to(dtype).to(device)
    keep = keep_scale(x.shape, 0.4, 77, x) != 0
    assert torch.equal(seeded_dropout(x, 0.4, 77) != 0, keep)
    assert not torch.equal(seeded_dropout(x, 0.4, 78) != 0, keep)
    offsets = torch.tensor([0, 30, 37], device=device)
    assert torch.equal(add_positions(x, torch.zeros_like(x), offsets, 1.0, 30, 0.4, 77) != 0, keep)
    eye, zero = torch.eye(50, device=device, dtype=dtype), torch.zeros(50, device=device, dtype=dtype)
    for way in ("one", "blas"):
        force(way, device, dtype)
        gated = gate_norm_linear(x, x, eye, zero, torch.zeros_like(x), dropout=0.4, seed=77, norm="rms")
        assert torch.equal(gated != 0, keep)


def test_rate_close_to_one():
    x = torch.ones(64, 8, device=DEVICE)
    assert torch.isfinite(seeded_dropout(x, 0.999999, 3)).all()


@pytest.mark.parametrize("device, dtype", DEVICES[:1] + DEVICES[2:3])
def test_opcheck(device, dtype):
    options = (1e-6, False, 0, 5, torch.float32, True)
    x, w = randn(4, 3).to(device).requires_grad_(), randn(3, 5).to(device).requires_grad_()
    torch.library.opcheck(torch.ops.hstu.norm_linear_silu.default, (x, w, *options))
    inputs = {n: t.requires_grad_() for n, t in on(device, gate_inputs(4, 3, 5)).items()}
    rest = (1e-6, False, 0.4, 3, torch.float32, True)
    torch.library.opcheck(torch.ops.hstu.gate_norm_linear.default, (*inputs.values(), *rest))
    torch.library.opcheck(torch.ops.hstu.seeded_dropout.default, (x, 0.5, 7, True))
    torch.library.opcheck(torch.ops.hstu.seeded_dropout.default, (x.detach().T.requires_grad_(), 0.5, 7, True))


def layer(x, w, gate, seed):
    u = norm_linear_silu(x, w, norm="rms", silu_columns=(0, 6))[:, :6]
    return seeded_dropout(gate_norm_linear(u, u, *gate, dropout=0.4, seed=seed), 0.1, seed)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
def test_compiled_and_fake_agree_with_eager(backend, autocast):
    if backend == "triton" and autocast == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter's bfloat16 products are wrong")
    set_backend(backend)
    torch._dynamo.reset()  # a compiled graph keeps the backend it was traced with
    device = DEVICE
    x, w, gate = randn(9, 8).to(device), randn(8, 12).to(device), [*on(device, gate_inputs(9, 6, 8)).values()][2:]
    leaves = [t.requires_grad_() for t in (x, w, *gate)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        for seed in (5, 2**50 + 1, 7):
            eager, graph = layer(x, w, gate, seed), compiled(x, w, gate, seed)
            assert eager.dtype == graph.dtype == torch.float32 and torch.equal(eager, graph)
        inner = norm_linear_silu(x, w)
        mode = FakeTensorMode()
        fake = norm_linear_silu(mode.from_tensor(x.detach()), mode.from_tensor(w.detach()))
    assert inner.dtype == fake.dtype == (autocast or torch.float32)
    assert (inner.shape, inner.stride()) == (fake.shape, fake.stride())
    gradients = [torch.autograd.grad(y.sum(), leaves) for y in (eager, graph)]
    for leaf, one, other in zip(leaves, *gradients, strict=True):
        assert one.dtype == leaf.dtype and torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["one", "fused", "split", "blas"])
def test_gradients_are_the_same_in_every_run(way, force):
    force(way)
    x, w = (t.to("cuda", torch.bfloat16).requires_grad_() for t in (randn(5000, 50), randn(50, 200)))
    gate = [t.to("cuda", torch.bfloat16).requires_grad_() for t in gate_inputs(5000, 50, 50).values()]

    def gradients():
        outputs = norm_linear_silu(x, w).sum() + gate_norm_linear(*gate, dropout=0.2, seed=1).square().sum()
        return torch.autograd.grad(outputs, (x, w, *gate))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize(
    "op, width, out, dtype, arch, expected",
    [
        ("norm_linear_silu", 50, 200, torch.bfloat16, 90, ("fused", "one")),
        ("norm_linear_silu", 64, 256, torch.float16, 80, ("fused", "one")),
        ("norm_linear_silu", 64, 260, torch.bfloat16, 90, ("fused", "fused")),
        ("norm_linear_silu", 256, 1024, torch.bfloat16, 90, ("fused", "fused")),
        ("norm_linear_silu", 257, 1024, torch.bfloat16, 90, ("split", "split")),
        ("norm_linear_silu", 50, 200, torch.float32, 90, ("blas", "blas")),
        ("gate_norm_linear", 50, 50, torch.bfloat16, 90, ("fused", "one")),
        ("gate_norm_linear", 64, 64, torch.bfloat16, 80, ("fused", "one")),
        ("gate_norm_linear", 100, 100, torch.bfloat16, 90, ("fused", "blas")),
        ("gate_norm_linear", 256, 256, torch.bfloat16, 90, ("fused", "blas")),
        ("gate_norm_linear", 4096, 4096, torch.bfloat16, 90, ("fused", "blas")),
        ("gate_norm_linear", 50, 50, torch.float32, 90, ("blas", "blas")),
    ],
)
def test_where_products_run(op, width, out, dtype, arch, expected):
    assert products(op, width, out, dtype, arch) == expected


def test_where_tf32_products_run(monkeypatch):
    monkeypatch.setattr(_projection, "dot_precision", lambda: "tf32")
    wide = ("norm_linear_silu", 50, 200, torch.float32)
    assert products(*wide, 90) == ("fused", "one")
    assert products(*wide, 80) == ("fused", "fused")  # not enough shared memory for the weight in float32
    assert products("norm_linear_silu", 256, 1024, torch.float32, 90) == ("split", "split")
    assert products("gate_norm_linear", 50, 50, torch.float32, 80) == ("fused", "one")


@pytest.mark.parametrize("programs, expected", [(1, 256), (100, 256), (264, 128), (1000, 64)])
def test_columns_are_split_only_where_rows_are_few(programs, expected):
    assert columns_per_program(100, 200, 64, programs) == expected
