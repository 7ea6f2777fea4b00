"""Tensors of more than 2^31 elements on Triton: every kernel's addresses are computed in 64 bits.

The interpreter wraps 32-bit products as a GPU does (shown first). So each op reads inputs, and the gradient that comes
in, whose rows lie so far apart that the last ones are more than 2^31 elements away from the first; the memory between
them is never touched and takes none. A wrapped address would read zeros: 2^31 untouched elements lie in front, too.

Not covered: writing. Outputs and gradients are contiguous, so here they are small, and large ones would take the memory
that they span. The code computes their addresses in the same way, ``rows[:, None] * width`` with ``rows`` in int64
before the product (``tl.program_id(0).to(tl.int64) * BLOCK + ...``; in attention's ``store_rows`` ``start`` is int64,
and within a tile 128 rows of a contiguous output are far below 2^31 elements).

Legend: L total rows, D width, V rows of the item table.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import jagged
from kernels._backend import set_backend
from kernels._launch import MAX_ROW_STRIDE, near_rows
from kernels.attention import attention
from kernels.attention.reference import attention_reference
from kernels.gate_norm_linear import gate_norm_linear
from kernels.gate_norm_linear.reference import gate_norm_linear_reference
from kernels.jagged import reference as jagged_reference
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from kernels.norm_linear_silu import norm_linear_silu
from kernels.norm_linear_silu.reference import norm_linear_silu_reference
from kernels.rank_and_topk import rank, topk
from kernels.sampled_softmax import sampled_softmax
from kernels.sampled_softmax.reference import sampled_softmax_reference
from tests.kernels import attention_cases
from tests.kernels.test_layer_ops import gate_inputs, randn
from tests.kernels.test_layer_ops_triton import WAYS
from tests.kernels.test_rank_and_topk import make as make_ranking
from tests.kernels.test_sampled_softmax import make as make_sampled
from tests.oracle import assert_close, assert_zero_fails, run

triton = pytest.importorskip("triton")
tl = triton.language
if torch.cuda.is_available():
    pytest.skip("the interpreter is off where there is a GPU", allow_module_level=True)

LIMIT = 2**31
APART = 2**29
"""Elements from one row to the next: the fifth is beyond the limit."""
ROWS = 6
MAP_NORESERVE = 0x4000
"""Linux: untouched pages count for nothing. Python names it from 3.13 on."""
MAX_GROWTH_MIB = 256
"""Of resident memory over one test; a test spans 10,000 MiB and more."""


def _resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE / 2**20


@pytest.fixture(autouse=True)
def triton_backend_in_little_memory(auto_backend) -> Iterator[None]:
    set_backend("triton")
    before = _resident_mib()
    yield
    assert _resident_mib() - before < MAX_GROWTH_MIB


def untouched(num_elements: int, dtype: torch.dtype) -> Tensor:
    """[num_elements] of zeros that take memory once they are touched, page by page, with LIMIT more in front."""
    size = (LIMIT + num_elements) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # else each row touched would take 2 MiB
    return torch.frombuffer(memory, dtype=dtype)[LIMIT:]


def far_apart(*parts: Tensor, stride: int = APART) -> list[Tensor]:
    """The same values [L, ...] side by side, as in a fused projection, in rows ``stride`` elements apart."""
    num_rows, widths = parts[0].shape[0], [part[0].numel() for part in parts]
    assert (num_rows - 1) * stride >= LIMIT, "no row is beyond the limit"
    buffer = untouched(num_rows * stride, parts[0].dtype)
    fused = buffer.as_strided((num_rows, sum(widths)), (stride, 1), buffer.storage_offset())
    views = [view.unflatten(1, part.shape[1:]) if part.dim() > 1 else view[:, 0]
             for view, part in zip(fused.split(widths, 1), parts, strict=True)]  # fmt: skip
    for view, part in zip(views, parts, strict=True):
        view.copy_(part)
    return views


def check(op: Any, reference: Any, near: dict[str, Any], far: dict[str, Tensor]) -> None:
    """As ``tests.oracle.compare``, but ``op`` reads the views ``far`` in place (no clone) of what ``near`` holds."""
    truth = run(reference, {n: x.double() if x.is_floating_point() else x for n, x in near.items()})
    plain = run(reference, near)
    inputs = {n: x.detach() for n, x in {**near, **far}.items()}
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if x.is_floating_point()}
    out = op(**inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)  # as run() draws it
    [upstream] = far_apart(upstream, stride=-(-LIMIT // (len(upstream) - 2)))
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
    found = {"output 0": out} | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    for name in truth:
        assert_close(name, found[name], plain[name], truth[name])
        assert_zero_fails(name, found[name], plain[name], truth[name])


@triton.jit
def _products_kernel(out, stride, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, (i * stride).to(tl.int64))
    tl.store(out + N + i, i.to(tl.int64) * stride)


def test_the_interpreter_wraps_32_bit_products():
    out = torch.zeros(8, dtype=torch.int64)
    _products_kernel[(1,)](out, 2**30, N=4)
    assert out.tolist() == [0, 2**30, -(2**31), -(2**30), 0, 2**30, 2**31, 3 * 2**30]


# attention


def _attention_case(lengths, heads=1):
    near, plan = attention_cases.make(lengths, heads=heads, qk=8, v=10, dtype=torch.float16, position=0, time=0)
    op = partial(attention, plan=plan, divisor=9.0)
    reference = lambda q, k, v: attention_reference(q, k, v, plan, None, None, 9.0)  # noqa: E731
    return near, op, reference


@pytest.mark.parametrize(
    "lengths, stride",
    [([16] * 8 + [7], MAX_ROW_STRIDE), ([4, 2], APART)],  # the last user begins beyond the limit
    ids=["read-in-place", "gathered-first"],
)
def test_attention_over_a_fused_projection(lengths, stride):
    near, op, reference = _attention_case(lengths)
    far = dict(zip("qkv", far_apart(*(near[n] for n in "qkv"), stride=stride), strict=True))
    check(op, reference, near, far)


def test_attention_with_heads_far_apart():
    near, op, reference = _attention_case([4, 2], heads=3)
    by_head = far_apart(*(near[n].transpose(0, 1) for n in "qkv"), stride=LIMIT // 2)
    check(op, reference, near, dict(zip("qkv", (x.transpose(0, 1) for x in by_head), strict=True)))


def test_attention_over_a_long_cache():
    near, plan = attention_cases.make_delta([(9, 4, 2), (126, 1, 0)], dtype=torch.float16, position=0, time=0)
    near = {n: x.nan_to_num() for n, x in near.items()}
    assert int(plan.key_starts[0]) > LIMIT // MAX_ROW_STRIDE
    k, v = far_apart(near["k"], near["v"], stride=MAX_ROW_STRIDE)
    op = partial(attention, plan=plan, divisor=9.0)
    reference = lambda q, k, v: attention_reference(q, k, v, plan, None, None, 9.0)  # noqa: E731
    check(op, reference, near, {"k": k, "v": v})


def test_near_rows_copies_only_what_a_tile_cannot_span():
    buffer = untouched(2 * MAX_ROW_STRIDE + 8, torch.float16)
    near = buffer.as_strided((2, 4), (MAX_ROW_STRIDE, 1), buffer.storage_offset())
    far = buffer.as_strided((2, 4), (MAX_ROW_STRIDE + 1, 1), buffer.storage_offset())
    assert near_rows(near) is near
    assert near_rows(far).stride() == (4, 1)
    assert 127 * MAX_ROW_STRIDE + 256 < LIMIT  # the largest tile


# projections


def force(monkeypatch, way):
    import kernels.gate_norm_linear.kernel as gate
    import kernels.norm_linear_silu.kernel as entry

    for module in (gate, entry):
        monkeypatch.setattr(module, "products", lambda *_: WAYS[way])


@pytest.mark.parametrize("way", ["one", "fused", "split", "blas"])
def test_norm_linear_silu(way, monkeypatch):
    force(monkeypatch, way)
    near = {"x": randn(ROWS, 25, dtype=torch.float16) + 0.5, "weight": randn(25, 40, dtype=torch.float16)}
    check(norm_linear_silu, norm_linear_silu_reference, near, {"x": far_apart(near["x"])[0]})


@pytest.mark.parametrize("way, width", [("one", 25), ("fused", 25), ("fused", 140), ("blas", 25)])
def test_gate_norm_linear(way, width, monkeypatch):
    force(monkeypatch, way)
    near = gate_inputs(ROWS, width, 20, torch.float16)
    names = ("av", "u", "residual")
    far = dict(zip(names, far_apart(*(near[n] for n in names)), strict=True))
    options = {"dropout": 0.3, "seed": 5}
    check(partial(gate_norm_linear, **options), partial(gate_norm_linear_reference, **options), near, far)


# losses and ranks over the item table


@pytest.mark.parametrize("deterministic", [False, True], ids=["any", "fixed"])
def test_sampled_softmax(deterministic):
    near = make_sampled(ROWS, ROWS - 1, 25, 5, torch.float16)
    queries, table = far_apart(near["queries"], near["table"])
    [negatives] = far_apart(near["negatives"].int())
    op = partial(sampled_softmax, deterministic=deterministic)
    check(op, sampled_softmax_reference, near, {"queries": queries, "table": table, "negatives": negatives})


def test_sampled_softmax_over_a_table_of_two_billion_numbers():
    """A contiguous table, of which the last rows occur; the gradient is sparse, as a dense one would be as large."""
    dim, last = 1024, 2**21 + ROWS
    start = last - ROWS + 1
    near = make_sampled(3, ROWS, dim, 5, torch.float16)
    ids = {n: near[n] + (start - 1) for n in ("labels", "negatives")}
    table = untouched((last + 1) * dim, torch.float16).unflatten(0, (last + 1, dim))
    assert start * dim >= LIMIT
    table[start:] = near["table"][1:]

    def op(queries, table):
        return sampled_softmax(queries, table, **ids, sparse_grad=True)

    inputs = {"queries": near["queries"].clone().requires_grad_(), "table": table.requires_grad_()}
    loss = op(**inputs)
    upstream = torch.randn(3, generator=torch.Generator().manual_seed(0))
    d_queries, d_table = torch.autograd.grad(loss, list(inputs.values()), upstream)
    assert int(d_table.indices().min()) >= start
    rows = torch.zeros_like(near["table"])
    rows[d_table.indices()[0] - (start - 1)] = d_table.values()
    found = {"output 0": loss, "gradient of queries": d_queries, "gradient of table": rows}
    truth = run(sampled_softmax_reference, {n: x.double() if x.is_floating_point() else x for n, x in near.items()})
    plain = run(sampled_softmax_reference, near)
    for name in truth:
        assert_close(name, found[name], plain[name], truth[name])


@pytest.mark.parametrize("l2_normalize", [False, True], ids=["raw", "normalised"])
def test_linear_cross_entropy(l2_normalize):
    near = make_sampled(ROWS, ROWS - 1, 25, 1, torch.float16)
    del near["negatives"]
    queries, table = far_apart(near["queries"], near["table"])
    options = {"l2_normalize": l2_normalize, "temperature": 0.5}
    op, reference = partial(linear_cross_entropy, **options), partial(linear_cross_entropy_reference, **options)
    check(op, reference, near, {"queries": queries, "table": table})


@pytest.mark.parametrize("l2_normalize", [False, True], ids=["raw", "normalised"])
def test_rank_and_topk(l2_normalize):
    near, targets = make_ranking(ROWS, ROWS - 1, 25, seed=1)
    near["queries"], near["table"] = near["queries"].half(), near["table"].half()
    queries, table = far_apart(near["queries"], near["table"])
    far = {**near, "queries": queries, "table": table}
    options = {"l2_normalize": l2_normalize}
    assert torch.equal(rank(**far, targets=targets, **options), rank(**near, targets=targets, **options))
    found, expected = topk(**far, k=3, **options), topk(**near, k=3, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert int(expected[1].max()) > LIMIT // APART


# jagged copies


def test_jagged_copies():
    a_offsets, b_offsets = torch.tensor([0, 1, 1, ROWS]), torch.tensor([0, 0, 2, ROWS])
    near = [randn(ROWS, 5, dtype=torch.float16, seed=seed) for seed in (0, 1)]
    a, b = far_apart(*near)
    joined, _ = jagged_reference.concat_jagged_reference(near[0], a_offsets, near[1], b_offsets)
    assert torch.equal(jagged.concat_jagged(a, a_offsets, b, b_offsets)[0], joined)
    [far_joined] = far_apart(joined)
    for found, expected in zip(jagged.split_jagged(far_joined, a_offsets, b_offsets, ROWS), near, strict=True):
        assert torch.equal(found, expected)
    dense = jagged_reference.jagged_to_dense_reference(near[0], a_offsets, ROWS - 1, 0.0)
    assert torch.equal(jagged.jagged_to_dense(a, a_offsets, ROWS - 1), dense)
    [positions_apart] = far_apart(dense.transpose(0, 1))
    [users_apart] = far_apart(dense, stride=LIMIT // 2)
    for view in (positions_apart.transpose(0, 1), users_apart):
        assert torch.equal(jagged.dense_to_jagged(view, a_offsets, ROWS), near[0])


def test_add_positions():
    offsets = torch.tensor([0, 0, ROWS])
    near = {"events": randn(ROWS, 5, dtype=torch.float16), "table": randn(ROWS, 5, dtype=torch.float16, seed=1)}
    events, table = far_apart(near["events"], near["table"])
    options = {"offsets": offsets, "scale": 2.0}
    op = partial(jagged.add_positions, **options, max_len=ROWS)
    reference = partial(jagged_reference.add_positions_reference, **options)
    check(op, reference, near, {"events": events, "table": table})
