"""The Triton path of rank and topk: the cases of test_rank_and_topk again, and what is its own."""

import pytest
import torch

from kernels._backend import set_backend
from kernels.rank_and_topk import rank, topk
from kernels.rank_and_topk.reference import rank_reference, topk_reference
from tests.kernels.test_rank_and_topk import (  # noqa: F401  these run here on the Triton path
    ONE,
    ONE_ROW_MIB,
    SCORES,
    make,
    test_all_equal_is_the_middle,
    test_errors,
    test_fewer_candidates_than_k,
    test_no_users,
    test_nothing_left,
    test_padding_row_is_no_candidate,
    test_rank_by_hand,
    test_scores_that_are_not_finite_raise,
    test_topk_by_hand,
)

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def triton_backend(auto_backend):
    set_backend("triton")


@pytest.mark.parametrize("chunk_mib", [64, ONE_ROW_MIB], ids=["one-chunk", "row-chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("users, num_items, dim, k", [(1, 1, 8, 1), (11, 31, 3, 7), (17, 67, 25, 9)])
def test_matches_reference_with_ties(users, num_items, dim, k, dtype, chunk_mib):
    users = min(users, 2) if chunk_mib < 1 else users  # the interpreter is slow
    x, targets = make(users, num_items, dim, integer=True)  # sums of small integers: exact, many ties
    x["queries"], x["table"] = x["queries"].to(dtype), x["table"].to(dtype)
    x["seen_ids"], x["seen_offsets"] = x["seen_ids"].int(), x["seen_offsets"].int()
    expected = rank_reference(**x, targets=targets, l2_normalize=False)
    assert torch.equal(rank(**x, targets=targets.int(), l2_normalize=False, chunk_mib=chunk_mib), expected)
    scores, ids = topk(**x, k=k, l2_normalize=False, chunk_mib=chunk_mib)
    expected_scores, expected_ids = topk_reference(**x, k=k, l2_normalize=False)
    assert torch.equal(scores, expected_scores) and torch.equal(ids, expected_ids)  # equal scores: smaller id first


@pytest.mark.parametrize("normalize", [True, False])
def test_matches_reference_on_random_scores(normalize):
    """Scores far apart against rounding: the ranks of float64."""
    x, targets = make(19, 41, 16, seed=1)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}
    expected = rank_reference(**wide, targets=targets, l2_normalize=normalize)
    assert torch.equal(rank(**x, targets=targets, l2_normalize=normalize), expected)
    scores, ids = topk(**x, k=20, l2_normalize=normalize)
    expected_scores, expected_ids = topk_reference(**wide, k=20, l2_normalize=normalize)
    assert torch.equal(ids, expected_ids) and scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equal_rows_tie_exactly(dtype):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(1, 50, generator=g).repeat(100, 1).to(dtype)
    queries = torch.randn(9, 50, generator=g).to(dtype)
    targets = torch.randint(1, 100, (9,), generator=g)
    assert rank(queries, table, targets).tolist() == [1 + 0.5 * 98] * 9


def test_more_than_a_block_of_items_is_kept():
    table = torch.linspace(0, 1, 71)[torch.randperm(71, generator=torch.Generator().manual_seed(0))][:, None]
    for k in (1, 8, 9, 80):  # blocks of 16 items: part of a block, whole blocks, more than there are
        scores, ids = topk(ONE, table, k, l2_normalize=False, chunk_mib=ONE_ROW_MIB)
        best = table[1:, 0].sort(descending=True)
        n = min(k, 70)
        assert torch.equal(scores[0, :n], best.values[:n]) and torch.equal(ids[0, :n], best.indices[:n] + 1)
        assert (ids[0, n:] == 0).all() and (scores[0, n:] == -torch.inf).all()


def test_strided_views():
    x, targets = make(9, 30, 8, seed=3)
    wide = {"queries": torch.zeros(9, 24), "table": torch.zeros(31, 40)}
    for name, start in (("queries", 8), ("table", 16)):
        wide[name][:, start : start + 8] = x[name]
    views = x | {"queries": wide["queries"][:, 8:16], "table": wide["table"][:, 16:24]}
    assert torch.equal(rank(**views, targets=targets), rank(**x, targets=targets))
    turned = x | {"table": x["table"].T.contiguous().T}
    assert all(torch.equal(a, b) for a, b in zip(topk(**turned, k=5), topk(**x, k=5), strict=True))


def test_compile_autocast_and_inference_mode():
    x, targets = make(9, 30, 8)
    both = lambda: (rank(**x, targets=targets), *topk(**x, k=4))  # noqa: E731
    expected = both()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        cast = both()
    for got in (compiled(), cast):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_opcheck():
    x, targets = make(9, 30, 8)
    arguments = (x["queries"], x["table"])
    options = (x["seen_ids"], x["seen_offsets"], True, 1e-6, 1.0)
    torch.library.opcheck(torch.ops.hstu.rank_triton.default, (*arguments, targets, *options))
    torch.library.opcheck(torch.ops.hstu.topk_triton.default, (*arguments, 4, *options))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("users, num_items, dim, k", [(1, 1, 8, 1), (67, 3_001, 50, 10), (130, 20_011, 256, 1000)])
def test_cuda_matches_reference_with_ties(users, num_items, dim, k, dtype):
    x, targets = make(users, num_items, dim, integer=True)
    x["queries"], x["table"] = x["queries"].to(dtype), x["table"].to(dtype)
    expected = rank_reference(**x, targets=targets, l2_normalize=False)
    expected_scores, expected_ids = topk_reference(**x, k=k, l2_normalize=False)
    on_gpu = {name: t.cuda() for name, t in x.items()}
    assert torch.equal(rank(**on_gpu, targets=targets.cuda(), l2_normalize=False).cpu(), expected)
    scores, ids = topk(**on_gpu, k=k, l2_normalize=False)
    assert torch.equal(scores.cpu(), expected_scores.float()) and torch.equal(ids.cpu(), expected_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_equal_rows_tie_exactly(dtype):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(1, 200, generator=g).repeat(5_000, 1).to("cuda", dtype)
    queries = torch.randn(99, 200, generator=g).to("cuda", dtype)
    targets = torch.randint(1, 5_000, (99,), generator=g).cuda()
    assert rank(queries, table, targets).tolist() == [1 + 0.5 * 4_998] * 99
