"""Jagged tensors: hand-worked numbers, torch and Triton against the reference, gradients, errors.

Legend: B users, L total rows, D width, N table rows.
"""

from __future__ import annotations

import sys

import pytest
import torch

from kernels._backend import get_backend, set_backend
from kernels._dropout import keep_scale
from kernels.jagged import (
    add_positions,
    concat_jagged,
    deinterleave,
    dense_to_jagged,
    interleave,
    jagged_to_dense,
    positions_of,
    split_jagged,
)
from kernels.jagged import cpu as jagged_cpu
from kernels.jagged import reference as ref
from tests.oracle import compare

A_LENGTHS, B_LENGTHS = (3, 0, 1, 33, 0), (0, 2, 1, 31, 0)
"""An empty user in a, in b and in both; one event; lengths around a block edge."""
PATHS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("plain", "cpu"), id="torch-without-fbgemm"),
    pytest.param(("triton", "cpu"), id="interpreted"),
    pytest.param(("triton", "cuda"), id="cuda-triton", marks=pytest.mark.gpu),
    pytest.param(("torch", "cuda"), id="cuda-torch", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool]
WIDTHS = [None, 1, 25, 300]
"""None: one dimension."""


@pytest.fixture
def device(request, monkeypatch):
    backend, device = request.param
    if backend == "triton":
        pytest.importorskip("triton")
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("the interpreter is off where there is a GPU")
    if backend == "plain":
        monkeypatch.setattr(jagged_cpu, "fbgemm", lambda: None)
    set_backend("torch" if backend == "plain" else backend)
    return device


def offsets_of(lengths, dtype=torch.int64, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=dtype)


def rows(length, width, dtype=torch.float32, seed=0, device="cpu"):
    shape = (length,) if width is None else (length, width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + length)) * 9
    return (x > 0 if dtype == torch.bool else x.to(dtype)).to(device)


def same(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(found.cpu(), expected.cpu())


def test_by_hand():
    a, b = torch.tensor([1, 2, 3]), torch.tensor([10, 20, 30])
    offsets = torch.tensor([0, 2, 2, 3])
    values, twice = interleave(a, b, offsets)
    assert (values.tolist(), twice.tolist()) == ([1, 10, 2, 20, 3, 30], [0, 4, 4, 6])
    joined, at = concat_jagged(a, offsets, torch.tensor([7, 8]), torch.tensor([0, 0, 1, 2]))
    assert (joined.tolist(), at.tolist()) == ([1, 2, 7, 3, 8], [0, 2, 3, 5])
    assert jagged_to_dense(a, offsets, 2, padding=-1).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert dense_to_jagged(torch.tensor([[1, 2], [5, 5], [3, 4]]), offsets, 3).tolist() == [1, 2, 3]
    assert positions_of(offsets, 3).tolist() == [0, 1, 0]
    events, table = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.5], [0.25]])
    assert add_positions(events, table, offsets, 10.0, 2).tolist() == [[10.5], [20.25], [30.5]]


@pytest.mark.parametrize("width", [None, 25], ids=["one-dimension", "wide"])
@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_interleave(device, width):
    offsets = offsets_of(A_LENGTHS, torch.int32, device)
    a, b = (rows(sum(A_LENGTHS), width, seed=s, device=device) for s in (0, 1))
    values, twice = interleave(a, b, offsets)
    expected = ref.interleave_reference(a, b, offsets)
    same(values, expected[0]), same(twice, expected[1])
    for found, wanted in zip(deinterleave(values, twice), (a, b, offsets), strict=True):
        same(found, wanted)
    compare(
        lambda a, b: interleave(a, b, offsets)[0],
        lambda a, b: ref.interleave_reference(a, b, offsets)[0],
        {"a": a, "b": b},
    )
    compare(
        lambda v: deinterleave(v, twice)[:2],
        lambda v: ref.deinterleave_reference(v, twice)[:2],
        {"v": values},
    )


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_concat_and_split(device, width, offsets_dtype):
    a_offsets, b_offsets = (offsets_of(n, offsets_dtype, device) for n in (A_LENGTHS, B_LENGTHS))
    inputs = {
        "a": rows(sum(A_LENGTHS), width, device=device),
        "b": rows(sum(B_LENGTHS), width, seed=1, device=device),
    }

    def op(a, b):
        return concat_jagged(a, a_offsets, b, b_offsets)[0]

    joined, offsets = concat_jagged(inputs["a"], a_offsets, inputs["b"], b_offsets)
    assert offsets.tolist() == ref.concat_jagged_reference(inputs["a"], a_offsets, inputs["b"], b_offsets)[1].tolist()
    compare(op, lambda a, b: ref.concat_jagged_reference(a, a_offsets, b, b_offsets)[0], inputs)
    compare(
        lambda v: split_jagged(v, a_offsets, b_offsets, inputs["a"].shape[0]),
        lambda v: ref.split_jagged_reference(v, a_offsets, b_offsets),
        {"v": joined},
    )


@pytest.mark.parametrize("max_len", [33, 40, 5], ids=["longest", "longer", "cut"])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_dense_and_back(device, width, max_len):
    offsets = offsets_of(A_LENGTHS, torch.int32 if width == 25 else torch.int64, device)
    values = rows(sum(A_LENGTHS), width, device=device)
    compare(
        lambda v: jagged_to_dense(v, offsets, max_len, padding=2.5),
        lambda v: ref.jagged_to_dense_reference(v, offsets, max_len, 2.5),
        {"v": values},
    )
    compare(
        lambda d: dense_to_jagged(d, offsets, values.shape[0]),
        lambda d: ref.dense_to_jagged_reference(d, offsets),
        {"d": jagged_to_dense(values, offsets, max_len)},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("width", [None, 3], ids=str)
@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_every_dtype_is_copied(device, width, dtype):
    if get_backend() == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no constants of bfloat16")
    a_offsets, b_offsets = offsets_of(A_LENGTHS, device=device), offsets_of(B_LENGTHS, device=device)
    a, b = rows(sum(A_LENGTHS), width, dtype, device=device), rows(sum(B_LENGTHS), width, dtype, 1, device)
    joined, _ = concat_jagged(a, a_offsets, b, b_offsets)
    same(joined, ref.concat_jagged_reference(a, a_offsets, b, b_offsets)[0])
    for found, wanted in zip(split_jagged(joined, a_offsets, b_offsets, a.shape[0]), (a, b), strict=True):
        same(found, wanted)
    dense = jagged_to_dense(a, a_offsets, 7, padding=1)
    same(dense, ref.jagged_to_dense_reference(a, a_offsets, 7, 1))
    same(dense_to_jagged(dense, a_offsets, a.shape[0]), ref.dense_to_jagged_reference(dense, a_offsets))


@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_strided_values(device):
    a_offsets, b_offsets = offsets_of(A_LENGTHS, device=device), offsets_of(B_LENGTHS, device=device)
    a, b = rows(sum(A_LENGTHS), 12, device=device)[:, 3:8], rows(5, sum(B_LENGTHS), device=device).T
    joined = concat_jagged(a, a_offsets, b, b_offsets)[0]
    same(joined, ref.concat_jagged_reference(a, a_offsets, b, b_offsets)[0])
    dense = torch.randn(9, 5, 12, device=device).transpose(0, 1)[:, :, 2:7]  # [5, 9, 5]
    same(dense_to_jagged(dense, a_offsets, a.shape[0]), ref.dense_to_jagged_reference(dense, a_offsets))
    same(jagged_to_dense(a, a_offsets, 9), ref.jagged_to_dense_reference(a, a_offsets, 9))
    every_other = torch.stack([a_offsets, b_offsets], dim=1)[:, 0]
    same(jagged_to_dense(a, every_other, 9), ref.jagged_to_dense_reference(a, a_offsets, 9))
    same(concat_jagged(a, every_other, b, b_offsets)[0], joined)
    every_second = rows(2 * sum(A_LENGTHS), None, device=device)[::2]
    same(jagged_to_dense(every_second, a_offsets, 9), ref.jagged_to_dense_reference(every_second, a_offsets, 9))


@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_nobody_and_nothing(device):
    for offsets in (offsets_of((), device=device), offsets_of((0, 0), device=device)):
        users, none = offsets.shape[0] - 1, torch.zeros(0, 3, device=device, requires_grad=True)
        assert concat_jagged(none, offsets, none, offsets)[0].shape == (0, 3)
        assert [x.shape for x in split_jagged(none, offsets, offsets, 0)] == [(0, 3), (0, 3)]
        assert torch.equal(jagged_to_dense(none, offsets, 2, 7.0), torch.full((users, 2, 3), 7.0, device=device))
        assert jagged_to_dense(none, offsets, 0).shape == (users, 0, 3)
        assert dense_to_jagged(torch.zeros(users, 2, 3, device=device), offsets, 0).shape == (0, 3)
        table = torch.ones(4, 3, device=device, requires_grad=True)
        out = add_positions(none, table, offsets, 2.0, 0, 0.5, 3)
        out.sum().backward()
        assert out.shape == (0, 3) and torch.equal(table.grad, torch.zeros(4, 3, device=device))
    own, empty = offsets_of((2,), device=device), offsets_of((0,), device=device)
    two = rows(2, 3, device=device)
    same(concat_jagged(two, own, two[:0], empty)[0], two)
    same(concat_jagged(two[:0], empty, two, own)[0], two)


FLOAT, MIXED, HALF = ((torch.float32,) * 2, (torch.float16, torch.float32), (torch.float16,) * 2)


@pytest.mark.parametrize(
    "width, dropout, dtypes", [(50, 0.2, FLOAT), (50, 0.0, MIXED), (8, 0.3, MIXED), (8, 0.0, HALF), (300, 0.5, HALF)]
)
@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_add_positions(device, width, dropout, dtypes):
    lengths = (3, 0, 1, 17, 0, *[2] * 30)  # more users than one block of the backward
    offsets = offsets_of(lengths, torch.int32, device)
    inputs = {
        "events": rows(sum(lengths), width, dtypes[0], device=device),
        "table": rows(19, width, dtypes[1], seed=1, device=device),
    }
    compare(
        lambda events, table: add_positions(events, table, offsets, width**0.5, 17, dropout, 9),
        lambda events, table: ref.add_positions_reference(events, table, offsets, width**0.5, dropout, 9),
        inputs,
    )


@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_add_positions_of_strided_rows_and_gradients(device):
    offsets = offsets_of(A_LENGTHS, device=device)
    events = rows(sum(A_LENGTHS), 12, device=device)[:, 2:10].requires_grad_()
    table = rows(8, 40, device=device).T.requires_grad_()
    out = add_positions(events, table, offsets, 3.0, 33, 0.25, 5)
    keep = keep_scale(out.shape, 0.25, 5, out)
    assert torch.allclose(out, (3.0 * events + table[positions_of(offsets, out.shape[0])]) * keep, atol=1e-4)
    gradients = [torch.autograd.grad(out.sum(), (events, table), retain_graph=True) for _ in range(2)]
    assert torch.allclose(gradients[0][0], 3.0 * keep, rtol=1e-6)
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)  # the sum over users has one order


@pytest.mark.parametrize("device", PATHS[:1], indirect=True)
def test_gradcheck(device):
    a_offsets, b_offsets = offsets_of((2, 0, 1)), offsets_of((1, 2, 0))
    a, b = (rows(3, 2, torch.float64, seed=s).requires_grad_() for s in (0, 1))
    check = torch.autograd.gradcheck
    assert check(lambda a, b: concat_jagged(a, a_offsets, b, b_offsets)[0], (a, b))
    assert check(lambda v: split_jagged(v, a_offsets, b_offsets, 3), rows(6, 2, torch.float64).requires_grad_())
    assert check(lambda v: jagged_to_dense(v, a_offsets, 1), a)
    dense = rows(6, 2, torch.float64).view(3, 2, 2).requires_grad_()
    assert check(lambda d: dense_to_jagged(d, a_offsets, 3), dense)
    table = rows(4, 2, torch.float64).requires_grad_()
    assert check(lambda e, t: add_positions(e, t, a_offsets, 1.5, 2, 0.4, 3), (a, table))
    assert check(lambda a, b: interleave(a, b, a_offsets)[0], (a, b))


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_opcheck(triton):
    if triton:
        pytest.importorskip("triton")
        set_backend("triton")
    device = "cuda" if triton and torch.cuda.is_available() else "cpu"
    a_offsets, b_offsets = offsets_of((2, 0, 1), device=device), offsets_of((1, 2, 0), device=device)
    a, b = (rows(3, 2, seed=s, device=device).requires_grad_() for s in (0, 1))
    ops, check = torch.ops.hstu, torch.library.opcheck
    check(ops.concat_jagged.default, (a, a_offsets, b, b_offsets, triton))
    joined = rows(6, 2, device=device).requires_grad_()
    check(ops.split_jagged.default, (joined, a_offsets, b_offsets, 3, triton))
    check(ops.jagged_to_dense.default, (a, a_offsets, 2, 1.0, triton))
    dense = rows(6, 2, device=device).view(3, 2, 2).detach().requires_grad_()
    check(ops.dense_to_jagged.default, (dense, a_offsets, 3, triton))
    if triton:
        table = rows(4, 2, device=device).requires_grad_()
        check(ops.add_positions.default, (a, table, a_offsets, 1.5, 2, 0.4, 3))


@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_compile_in_one_graph(device):
    a_offsets, b_offsets = (offsets_of(n, device=device) for n in (A_LENGTHS, B_LENGTHS))
    a, b = rows(sum(A_LENGTHS), 4, device=device), rows(sum(B_LENGTHS), 4, seed=1, device=device)
    table = rows(33, 4, device=device)

    def through_all(a, b, table):
        a = add_positions(a, table, a_offsets, 2.0, 33, 0.3, 4)
        joined, offsets = concat_jagged(a, a_offsets, b, b_offsets)
        back = dense_to_jagged(jagged_to_dense(joined, offsets, 70), offsets, joined.shape[0])
        first, second = split_jagged(back, a_offsets, b_offsets, a.shape[0])
        return interleave(first, first, a_offsets)[0].sum() + second.square().sum()

    compiled = torch.compile(through_all, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (a, b, table)]
    eager, graph = through_all(*leaves), compiled(*leaves)
    assert torch.equal(eager, graph)
    for one, other in zip(torch.autograd.grad(eager, leaves), torch.autograd.grad(graph, leaves), strict=True):
        assert torch.equal(one, other)


def test_without_fbgemm_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)
    jagged_cpu.fbgemm.cache_clear()
    try:
        assert jagged_cpu.fbgemm() is None
        offsets = offsets_of(A_LENGTHS)
        values = rows(sum(A_LENGTHS), 3)
        same(jagged_to_dense(values, offsets, 5), ref.jagged_to_dense_reference(values, offsets, 5))
    finally:
        jagged_cpu.fbgemm.cache_clear()


OFFSETS, X = torch.tensor([0, 1, 3]), torch.zeros(3, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: interleave(X, X[:2], OFFSETS), "a and b"),
        (lambda: interleave(X, X, OFFSETS.float()), "offsets: expected"),
        (lambda: interleave(X, X, OFFSETS[:2]), "offsets end at 1: expected 3"),
        (lambda: deinterleave(X, OFFSETS), "2L"),
        (lambda: concat_jagged(X, OFFSETS, X, OFFSETS[:2]), "a_offsets and b_offsets"),
        (lambda: concat_jagged(X, OFFSETS, X[:, :1], OFFSETS), "a and b"),
        (lambda: concat_jagged(X, OFFSETS, X.double(), OFFSETS), "a and b"),
        (lambda: concat_jagged(X, OFFSETS, X[:2], OFFSETS), "b_offsets end at 3: expected 2"),
        (lambda: split_jagged(X, OFFSETS, OFFSETS * 0, 4), "num_a=4"),
        (lambda: split_jagged(X, OFFSETS, OFFSETS * 0, 2), "a_offsets end at 3"),
        (lambda: split_jagged(X[None], OFFSETS, OFFSETS, 3), "values has shape"),
        (lambda: jagged_to_dense(X, OFFSETS, -1), "max_len=-1"),
        (lambda: jagged_to_dense(X, OFFSETS[:2], 2), "offsets end at 1"),
        (lambda: dense_to_jagged(X[0], OFFSETS, 3), "dense has shape"),
        (lambda: dense_to_jagged(X, OFFSETS, 3), "B \\+ 1"),
        (lambda: add_positions(X, X[:, :1], OFFSETS, 1.0, 2), "events \\[L, D\\]"),
        (lambda: add_positions(X.long(), X, OFFSETS, 1.0, 2), "floating"),
        (lambda: add_positions(X, X, OFFSETS, 1.0, 4), "max_len=4"),
        (lambda: add_positions(X, X, OFFSETS, 1.0, 2, 1.0, 1), "rate"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
