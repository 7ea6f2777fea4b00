"""``rows`` of the ops that draw: a share of a batch draws what it draws in the whole, on torch and on Triton.

Legend: L rows of the whole, W and D widths.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels._backend import set_backend
from kernels._dropout import keep_scale, seeded_dropout
from kernels.gate_norm_linear import gate_norm_linear
from kernels.gate_norm_linear.reference import gate_norm_linear_reference
from kernels.jagged import add_positions
from kernels.jagged.reference import add_positions_reference
from kernels.sampled_softmax import sampled_softmax
from kernels.sampled_softmax.cpu import draw_negatives
from tests.oracle import compare, run

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
L, W, D, NUM_ITEMS = 23, 20, 12, 40
CHOSEN = torch.tensor([20, 3, 4, 5, 6, 11, 22])
"""Rows of the share, none where it would be alone."""
OFFSETS, OWN_OFFSETS = torch.tensor([0, 3, 9, 9, 20, 23]), torch.tensor([0, 6, 6, 9])
"""Of the whole, and of its users 1, 2 and 4."""
OWN = torch.tensor([3, 4, 5, 6, 7, 8, 20, 21, 22])
FAR = 2**33
"""Its octets need more than 32 bits of the counter."""


@pytest.fixture(autouse=True, params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    set_backend(request.param)
    return request.param


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rows(index=CHOSEN):
    return index.to(DEVICE)


def gate_inputs(length=L):
    shapes = {"av": (length, W), "u": (length, W), "weight": (W, D), "bias": (D,), "residual": (length, D)}
    return {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def take(inputs, index, names):
    return {n: x[index.to(x.device)] if n in names else x for n, x in inputs.items()}


def test_own_rows_change_nothing():
    x, every = randn(L, W), torch.arange(L, device=DEVICE)
    assert torch.equal(seeded_dropout(x, 0.4, 7), seeded_dropout(x, 0.4, 7, every))
    assert torch.equal(draw_negatives(L, 5, 9, 3, DEVICE), draw_negatives(L, 5, 9, 3, DEVICE, every))
    gate = gate_inputs()
    assert torch.equal(gate_norm_linear(**gate, dropout=0.4, seed=7),
                       gate_norm_linear(**gate, dropout=0.4, seed=7, rows=every))  # fmt: skip


@pytest.mark.parametrize("width", [5, 16, 20])
def test_seeded_dropout_of_a_share(width):
    x = randn(L, width).requires_grad_()
    whole = seeded_dropout(x, 0.4, 7)
    (expected,) = torch.autograd.grad(whole.square().sum(), x)
    own = x.detach()[rows()].requires_grad_()
    share = seeded_dropout(own, 0.4, 7, rows())
    (got,) = torch.autograd.grad(share.square().sum(), own)
    assert torch.equal(share, whole[rows()]) and torch.equal(got, expected[rows()])
    assert not torch.equal(share, seeded_dropout(own, 0.4, 7))


def test_rows_of_more_dimensions():
    x = randn(3, 4, W)
    place = (torch.arange(3)[:, None] * 10 + torch.arange(4)).to(DEVICE)
    wide = seeded_dropout(torch.ones(24, W, device=DEVICE), 0.4, 7)
    assert torch.equal(seeded_dropout(x, 0.4, 7, place), x * wide[place])


@pytest.mark.parametrize("way", [None, "one", "fused", "split", "blas"])
def test_gate_norm_linear_of_a_share(way, backend, monkeypatch):
    if way is not None:
        if backend == "torch" or DEVICE.type == "cuda":
            pytest.skip("only the Triton path multiplies in several ways; forced under the interpreter")
        import kernels.gate_norm_linear.kernel as gate
        from tests.kernels.test_layer_ops_triton import WAYS

        monkeypatch.setattr(gate, "products", lambda *_: WAYS[way])
    op, inputs = partial(gate_norm_linear, dropout=0.4, seed=5), gate_inputs()
    by_row = ("av", "u", "residual")
    out = op(**inputs)
    share = take(inputs, CHOSEN, by_row)
    torch.testing.assert_close(op(**share, rows=rows()), out[rows()])
    assert (op(**share) - out[rows()]).abs().max() > 0.1
    compare(partial(op, rows=rows()), partial(gate_norm_linear_reference, dropout=0.4, seed=5, rows=rows()), share)


def test_gate_norm_linear_wide_rows(backend):
    """Rows too wide to be held: the statistics come first, the gate chunk by chunk."""
    inputs = {name: x.half() if backend == "triton" else x for name, x in gate_inputs(9).items()}
    wide = {"av": randn(9, 300), "u": randn(9, 300, seed=1), "weight": randn(300, D, seed=2)}
    inputs |= {name: x.to(inputs["bias"].dtype) for name, x in wide.items()}
    place = torch.tensor([8, 0, 1, 2, 30, 31, 4, 5, 6], device=DEVICE)
    options = {"dropout": 0.4, "seed": 5, "rows": place}
    compare(partial(gate_norm_linear, **options), partial(gate_norm_linear_reference, **options), inputs)


def test_add_positions_of_a_share():
    events, table = randn(L, D), randn(12, D, seed=1)
    whole = add_positions(events, table, OFFSETS.to(DEVICE), 2.0, 11, 0.4, 3)
    own = {"events": events[rows(OWN)], "table": table}
    options = {"offsets": OWN_OFFSETS.to(DEVICE), "scale": 2.0, "dropout": 0.4, "seed": 3, "rows": rows(OWN)}
    op = partial(add_positions, max_len=6, **options)
    torch.testing.assert_close(op(**own), whole[rows(OWN)])
    assert not torch.equal(op(**own), op(**own, rows=None))
    compare(op, partial(add_positions_reference, **options), own)


def test_sampled_softmax_of_a_share():
    queries, table = randn(L, D), randn(NUM_ITEMS + 1, D, seed=1)
    labels = torch.arange(1, L + 1, device=DEVICE)
    whole = sampled_softmax(queries, table, labels, num_negatives=7, seed=4)
    share = {"queries": queries[rows()], "table": table}
    op = partial(sampled_softmax, labels=labels[rows()], num_negatives=7, seed=4)
    torch.testing.assert_close(op(**share, rows=rows()), whole[rows()])
    assert not torch.equal(op(**share, rows=rows()), op(**share))
    negatives = draw_negatives(L, 7, NUM_ITEMS, 4, DEVICE)[rows()]
    drawn, given = run(partial(op, rows=rows()), share), run(partial(op, negatives=negatives), share)
    for name, value in given.items():
        torch.testing.assert_close(drawn[name], value)


def test_sparse_gradient_of_a_share(backend):
    if backend == "torch":
        pytest.skip("only the Triton path has a sparse gradient")
    queries, labels = randn(7, D), torch.arange(1, 8, device=DEVICE)
    found = []
    for sparse in (False, True):
        table = randn(NUM_ITEMS + 1, D, seed=1).requires_grad_()
        sampled_softmax(
            queries, table, labels, num_negatives=3, seed=4, sparse_grad=sparse, rows=rows()
        ).sum().backward()
        found.append(table.grad.to_dense())
    torch.testing.assert_close(found[1], found[0])


def test_the_counter_has_64_bits():
    """Rows far beyond 32 bits draw numbers of their own, the same in torch and in Triton, without those before them."""
    places = torch.tensor([1, FAR, FAR + 1, 2**31], device=DEVICE)
    ones = torch.ones(4, 256, device=DEVICE)
    kept = seeded_dropout(ones, 0.5, 7, places)
    assert torch.equal(kept, keep_scale(ones.shape, 0.5, 7, ones, places))
    assert len({tuple(row) for row in kept.tolist()}) == 4
    ids = draw_negatives(4, 8, 10**6, 3, DEVICE, places)
    assert len({tuple(row) for row in ids.tolist()}) == 4
    options = {"labels": torch.ones(4, dtype=torch.int64, device=DEVICE), "num_negatives": 8, "seed": 3}
    table = randn(NUM_ITEMS + 1, D)
    drawn = sampled_softmax(randn(4, D), table, **options, rows=places)
    given = sampled_softmax(randn(4, D), table, options["labels"], draw_negatives(4, 8, NUM_ITEMS, 3, DEVICE, places))
    torch.testing.assert_close(drawn, given)


def test_opcheck(backend):
    triton = backend == "triton"
    x = randn(3, 5).requires_grad_()
    place = torch.tensor([4, 0, 1], device=DEVICE)
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    check(torch.ops.hstu.seeded_dropout.default, (x, 0.5, 7, triton, place))
    gate = [t.requires_grad_() for t in gate_inputs(3).values()]
    check(torch.ops.hstu.gate_norm_linear.default, (*gate, 1e-6, False, 0.5, 7, torch.float32, triton, place))
    if triton:
        table, offsets = randn(4, 5).requires_grad_(), torch.tensor([0, 1, 3], device=DEVICE)
        check(torch.ops.hstu.add_positions.default, (x, table, offsets, 2.0, 2, 0.5, 7, place))
        labels = torch.ones(3, dtype=torch.int64, device=DEVICE)
        check(
            torch.ops.hstu.sampled_softmax_triton.default,
            (x, table, labels, None, None, None, 2, 7, 1.0, True, 1e-6, torch.float32, False, False, place),
        )
    else:
        labels = torch.ones(3, dtype=torch.int64, device=DEVICE)
        check(torch.ops.hstu.draw_negatives.default, (labels, 2, 5, 7, place))


def test_compile_in_one_graph(backend):
    place = rows()

    def function(av, u, weight, bias, residual):
        x = gate_norm_linear(av, u, weight, bias, residual, dropout=0.4, seed=3, rows=place)
        return seeded_dropout(x, 0.4, 3, place)

    inputs = list(take(gate_inputs(), CHOSEN, ("av", "u", "residual")).values())
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.arange(3), r"rows: expected \[7\] int64, got \[3\] torch.int64"),
        (torch.arange(7, dtype=torch.int32), "int64, got .*int32"),
        (torch.arange(7) - 1, "rows: the least is -1"),
    ],
    ids=["length", "dtype", "negative"],
)
def test_wrong_rows_are_named(given, message):
    if "least" in message and DEVICE.type == "cuda":
        pytest.skip("values are not read on a GPU")
    given = given.to(DEVICE)
    offsets = torch.tensor([0, 7], device=DEVICE)
    labels = torch.ones(7, dtype=torch.int64, device=DEVICE)
    calls = [
        lambda: seeded_dropout(randn(7, W), 0.1, 1, given),
        lambda: gate_norm_linear(**gate_inputs(7), rows=given),
        lambda: add_positions(randn(7, D), randn(9, D), offsets, 1.0, 7, rows=given),
        lambda: sampled_softmax(randn(7, D), randn(9, D), labels, rows=given),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
