"""rank and topk: tables small enough to redo by hand, reference, ties, seen items, chunks."""

import pytest
import torch

from kernels.rank_and_topk import rank, topk
from kernels.rank_and_topk.reference import rank_reference, topk_reference

SCORES = torch.tensor([[99.0], [5.0], [3.0], [3.0], [3.0], [1.0]])
"""With a query of one and no normalisation the score of item i is SCORES[i]; row 0 is padding."""
ONE = torch.ones(1, 1)
ONE_ROW_MIB = 1e-6


def one_rank(target, seen=(), table=SCORES):
    seen_ids, offsets = torch.tensor(seen, dtype=torch.int64), torch.tensor([0, len(seen)])
    value = rank(ONE, table, torch.tensor([target]), seen_ids, offsets, l2_normalize=False)
    assert value.dtype == torch.float64 and value.shape == (1,)
    return value.item()


@pytest.mark.parametrize(
    "target, seen, expected",
    [
        pytest.param(1, [], 1.0, id="best"),
        pytest.param(5, [], 5.0, id="last"),
        pytest.param(2, [], 1 + 1 + 0.5 * 2, id="three-way-tie"),
        pytest.param(2, [1], 1 + 0.5 * 2, id="better-one-seen"),
        pytest.param(2, [3], 1 + 1 + 0.5, id="tied-one-seen"),
        pytest.param(2, [3, 3, 3, 4], 2.0, id="repeats-in-seen"),
        pytest.param(2, [2], 1 + 1 + 0.5 * 2, id="seen-target-stays"),
        pytest.param(5, [2, 5, 1], 3.0, id="seen-target-among-others"),
        pytest.param(3, [0, 0], 3.0, id="padding-in-seen"),
        pytest.param(4, [1, 2, 3, 4, 5], 1.0, id="everything-seen"),
    ],
)
def test_rank_by_hand(target, seen, expected):
    assert one_rank(target, seen) == expected


def test_all_equal_is_the_middle():
    assert one_rank(3, table=torch.zeros(6, 1)) == 3.0


def test_padding_row_is_no_candidate():
    table = SCORES.clone()
    table[0] = torch.nan
    assert one_rank(1, table=table) == 1.0
    scores, ids = topk(ONE, table, 2, l2_normalize=False)
    assert ids.tolist() == [[1, 2]] or ids[0, 0] == 1 and ids[0, 1] in (2, 3, 4)
    assert scores.tolist() == [[5.0, 3.0]]


def test_topk_by_hand():
    scores, ids = topk(ONE, SCORES, 3, torch.tensor([2, 3, 3]), torch.tensor([0, 3]), l2_normalize=False)
    assert ids.tolist() == [[1, 4, 5]] and scores.tolist() == [[5.0, 3.0, 1.0]]
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("k", [4, 5, 6, 9])
def test_fewer_candidates_than_k(k):
    scores, ids = topk(ONE, SCORES, k, torch.tensor([2, 3]), torch.tensor([0, 2]), l2_normalize=False)
    assert ids.tolist() == [[1, 4, 5] + [0] * (k - 3)]
    assert scores.tolist() == [[5.0, 3.0, 1.0] + [-torch.inf] * (k - 3)]


def test_nothing_left():
    seen, offsets = torch.arange(1, 6), torch.tensor([0, 5])
    scores, ids = topk(ONE, SCORES, 2, seen, offsets, l2_normalize=False)
    assert ids.tolist() == [[0, 0]] and scores.tolist() == [[-torch.inf] * 2]


def make(users, num_items, dim, seed=0, integer=False):
    """Random users with a jagged seen list, the first without any; integer values make exact ties."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randint(-1, 2, s, generator=g).float() if integer else torch.randn(*s, generator=g)  # noqa: E731
    lengths = torch.randint(0, 9, (users,), generator=g)
    lengths[0] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return {
        "queries": draw(users, dim), "table": draw(num_items + 1, dim),
        "seen_ids": torch.randint(0, num_items + 1, (int(offsets[-1]),), generator=g), "seen_offsets": offsets,
    }, torch.randint(1, num_items + 1, (users,), generator=g)  # fmt: skip


@pytest.mark.parametrize("chunk_mib", [64, ONE_ROW_MIB], ids=["one-chunk", "row-chunks"])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("users, num_items, dim", [(1, 1, 8), (17, 31, 3), (67, 211, 25)])
def test_matches_reference_with_ties(users, num_items, dim, ids, chunk_mib):
    x, targets = make(users, num_items, dim, integer=True)  # sums of small integers: exact in float32, many ties
    x["seen_ids"], x["seen_offsets"], targets = x["seen_ids"].to(ids), x["seen_offsets"].to(ids), targets.to(ids)
    expected = rank_reference(**x, targets=targets, l2_normalize=False)
    assert torch.equal(rank(**x, targets=targets, l2_normalize=False, chunk_mib=chunk_mib), expected)
    assert num_items == 1 or (expected % 1 == 0.5).any()
    scores, best = topk(**x, k=7, l2_normalize=False, chunk_mib=chunk_mib)
    expected_scores, _ = topk_reference(**x, k=7, l2_normalize=False)
    assert torch.equal(scores, expected_scores)
    for row in range(users):  # the ids are distinct unseen items that have those scores
        found = best[row][best[row] > 0].tolist()
        seen = x["seen_ids"][x["seen_offsets"][row] : x["seen_offsets"][row + 1]].tolist()
        assert len(set(found)) == len(found) and not set(found) & set(seen)
        assert (x["table"][found] @ x["queries"][row]).tolist() == scores[row, : len(found)].tolist()


@pytest.mark.parametrize("normalize", [True, False])
def test_matches_reference_on_random_scores(normalize):
    x, targets = make(41, 97, 16, seed=1)
    x = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}  # no two scores are close in float64
    expected = rank_reference(**x, targets=targets, l2_normalize=normalize)
    assert torch.equal(rank(**x, targets=targets, l2_normalize=normalize), expected)
    scores, ids = topk(**x, k=20, l2_normalize=normalize)
    expected_scores, expected_ids = topk_reference(**x, k=20, l2_normalize=normalize)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-12, atol=1e-12)


def test_equal_rows_tie_exactly_in_float32():
    """Equal embeddings give equal scores wherever they stand in the table."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(1, 50, generator=g).repeat(1_000, 1)
    queries = torch.randn(33, 50, generator=g)
    targets = torch.randint(1, 1_000, (33,), generator=g)
    assert rank(queries, table, targets).tolist() == [1 + 0.5 * 998] * 33


def test_topk_agrees_with_rank():
    x, _ = make(29, 83, 12, seed=2)
    _, ids = topk(**x, k=10)
    for place in range(10):
        assert rank(**x, targets=ids[:, place]).tolist() == [place + 1.0] * 29


def test_no_users():
    assert rank(torch.ones(0, 3), torch.ones(5, 3), torch.ones(0, dtype=torch.int64)).shape == (0,)
    scores, ids = topk(torch.ones(0, 3), torch.ones(5, 3), 4)
    assert scores.shape == ids.shape == (0, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["queries", "table"])
def test_scores_that_are_not_finite_raise(where, value):
    x, targets = make(5, 7, 4)
    x[where][3, 1] = value
    with pytest.raises(ValueError, match="scores are not finite"):
        rank(**x, targets=targets)
    with pytest.raises(ValueError, match="scores are not finite"):
        topk(**x, k=2)


def test_compile_autocast_and_inference_mode():
    x, targets = make(9, 30, 8)
    expected = rank(**x, targets=targets), *topk(**x, k=4)
    both = lambda: (rank(**x, targets=targets), *topk(**x, k=4))  # noqa: E731
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        cast = both()
    for got in (compiled(), cast):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_opcheck():
    x, targets = make(9, 30, 8)
    arguments = (x["queries"], x["table"])
    seen = (x["seen_ids"], x["seen_offsets"], 1.0)
    torch.library.opcheck(torch.ops.hstu.rank.default, (*arguments, targets, *seen))
    torch.library.opcheck(torch.ops.hstu.topk.default, (*arguments, 4, *seen))


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"queries": torch.ones(2)}, r"queries has shape \[2\]: expected \[B, D\]", id="rank"),
        pytest.param({"targets": torch.tensor([1, 6])}, "targets range over 1..6: expected 1..5", id="target-range"),
        pytest.param({"targets": torch.tensor([0, 1])}, "targets range over 0..1: expected 1..5", id="padding-target"),
        pytest.param({"targets": torch.tensor([1])}, r"targets has shape \[1\]: expected \[2\]", id="targets"),
        pytest.param({"seen_ids": torch.tensor([6])}, "seen_ids range over 6..6: expected 0..5", id="seen-range"),
        pytest.param({"seen_ids": None}, "seen_ids and seen_offsets: expected both or neither", id="half-seen"),
        pytest.param({"seen_ids": torch.ones(1, 1)}, r"seen_ids has shape \[1, 1\]: expected \[S\]", id="seen-shape"),
        pytest.param(
            {"seen_offsets": torch.tensor([0, 1])}, r"seen_offsets has shape \[2\]: expected \[3\]", id="offsets-shape"
        ),
        pytest.param({"seen_offsets": torch.tensor([0, 0, 2])}, "seen_offsets runs from 0 to 2", id="offsets-end"),
        pytest.param({"seen_offsets": torch.tensor([0, 2, 1])}, "expected ascending 0..1", id="offsets-order"),
        pytest.param({"chunk_mib": 0}, "chunk_mib=0: expected > 0", id="chunk"),
    ],
)
def test_errors(change, message):
    arguments = {
        "queries": torch.ones(2, 3), "table": torch.ones(6, 3), "targets": torch.tensor([1, 2]),
        "seen_ids": torch.tensor([4]), "seen_offsets": torch.tensor([0, 0, 1]),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rank(**arguments)
    if "targets" not in change:
        arguments.pop("targets")
        with pytest.raises(ValueError, match=message):
            topk(**arguments, k=2)


def test_k_below_one_raises():
    with pytest.raises(ValueError, match="k=0: expected > 0"):
        topk(ONE, SCORES, 0)
