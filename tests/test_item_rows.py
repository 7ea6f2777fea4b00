"""Maps from items to rows: worked by hand, ranks and recommendations among items, one and two ranks, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.config import LossConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.data.order import mix64
from hstu.data.predicted import Predicted
from hstu.embedding import LocalItemTable
from hstu.errors import UserError
from hstu.feature_tables import has_torchrec
from hstu.item_rows import HashedRows, ItemRows, ManagedRows, MappedTable, hash_rows, make_item_rows
from tests.ranks import run_ranks

needs_torchrec = pytest.mark.skipif(not has_torchrec(), reason="torchrec is not installed")
A, B, C, D, E = 5, 7, 9, 11, 12


def managed(policy: str = "lru", rows: int = 4, every: int = 1, num_items: int = 20, decay: float = 1.0) -> ManagedRows:
    return ManagedRows(num_items, rows, policy, decay, every)


def given(rows: ManagedRows) -> set[int]:
    """Items that have a row."""
    return set(rows.items().tolist()) - {0}


def take(rows: ManagedRows, *steps: list[int]) -> list[list[int]]:
    return [rows.take_in(torch.tensor(step)).tolist() for step in steps]


# Hash


def test_hash_is_that_of_the_documented_rule() -> None:
    ids = np.concatenate([np.arange(1000), [2**31 - 1, 2**40 + 3, 2**62]])
    expected = (mix64(ids.astype(np.uint64)) >> np.uint64(1)) % np.uint64(97)
    assert hash_rows(torch.from_numpy(ids), 97).tolist() == expected.tolist()
    assert HashedRows(1000, 97).rows(torch.tensor([0, 1, 2])).tolist() == [
        0,
        1 + int(expected[1]),
        1 + int(expected[2]),
    ]


def test_hash_counts_the_items_that_share_a_row() -> None:
    rows = HashedRows(60, 20)
    own = rows.rows(torch.arange(61)).tolist()
    counts = rows.counts().tolist()
    assert counts == [0, *(own.count(row) for row in range(1, 21))] and sum(counts) == 60
    shared, expected = rows.sharing()
    assert shared == sum(own.count(row) > 1 for row in own[1:]) and expected == pytest.approx(1 - 0.95**59)
    items, offsets = rows.items()
    for row in range(1, 21):
        assert items[offsets[row] : offsets[row + 1]].tolist() == [i for i in range(1, 61) if own[i] == row]


# Managed


@needs_torchrec
def test_items_get_rows_as_they_come_and_the_others_share_the_first() -> None:
    rows = managed()
    assert rows.num_live == 1 and rows.rows(torch.tensor([0, A, B])).tolist() == [0, 1, 1]
    assert take(rows, [A, A, B]) == [[]]
    assert rows.items().tolist() == [0, 0, B, A, 0] and rows.num_live == 3
    assert take(rows, [A, C]) == [[]]
    assert rows.items().tolist() == [0, 0, B, A, C] and rows.num_known == 3
    assert rows.rows(torch.tensor([[0, A], [C, D]])).tolist() == [[0, 3], [4, 1]]
    assert rows.counts().tolist() == [0, 17, 1, 1, 1]


@needs_torchrec
@pytest.mark.parametrize(
    ("policy", "decay", "last"),
    [
        # Before the last step A was seen 4 times, last in step 1; B twice, in step 2; C once, in step 3.
        ("lru", 1.0, {B, C, D}),
        ("lfu", 1.0, {A, B, D}),
        # In step 4: A 4 / 4 = 1, B 2 / 3, C 1 / 2, D 2 / 1.
        ("distance_lfu", 1.0, {A, B, D}),
        # A 4 / 16, B 2 / 9 = 0.22, C 1 / 4, D 2.
        ("distance_lfu", 2.0, {A, C, D}),
    ],
    ids=["lru", "lfu", "distance", "distance-squared"],
)
def test_who_loses_the_row(policy: str, decay: float, last: set[int]) -> None:
    rows = managed(policy, decay=decay)
    assert take(rows, [A, A, A, A], [B, B], [C]) == [[], [], []] and given(rows) == {A, B, C}
    old = rows.items().tolist()
    (changed,) = take(rows, [D, D])
    assert given(rows) == last and rows.evicted == 1
    assert changed == [row for row in range(2, 5) if old[row] not in last], "the row that D took over"
    assert rows.items()[changed].tolist() == [D]


@needs_torchrec
def test_a_new_item_that_is_rarer_than_all_gets_no_row() -> None:
    rows = managed("lfu")
    take(rows, [A, A, A, B, B, B, C, C, C], [D, D])
    assert given(rows) == {A, B, C} and rows.evicted == 0


@needs_torchrec
def test_between_updates_ids_wait_and_none_is_forgotten() -> None:
    rows = managed("lfu", every=3)
    take(rows, [A])  # the first step updates at once
    assert given(rows) == {A}
    take(rows, [B], [C] * 50)
    assert given(rows) == {A} and rows.waiting.tolist() == [B] + [C] * 50
    take(rows, [D, D])
    assert given(rows) == {A, C, D} and len(rows.waiting) == 0, "B and A are level, and what is there stays"


@needs_torchrec
@pytest.mark.parametrize("policy", ["lru", "lfu", "distance_lfu"])
def test_saved_and_read_it_goes_on_alike(policy: str) -> None:
    rng = np.random.default_rng(0)
    steps = [rng.integers(1, 30, 12).tolist() for _ in range(20)]
    whole, first = managed(policy, 8, 3, 30), managed(policy, 8, 3, 30)
    expected = take(whole, *steps)
    found = take(first, *steps[:10])
    state = {name: value.clone() for name, value in first.state_dict().items()}
    second = managed(policy, 8, 3, 30)
    second.fit({name: value.shape for name, value in state.items()})
    for name, value in second.state_dict().items():  # as a checkpoint is read, in place
        value.copy_(state[name])
    assert found + take(second, *steps[10:]) == expected and any(expected)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


@needs_torchrec
def test_the_order_of_ids_in_a_step_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    one, two = managed("distance_lfu", 6, 2, 30), managed("distance_lfu", 6, 2, 30)
    for _ in range(12):
        step = rng.integers(1, 30, 10)
        assert take(one, step.tolist()) == take(two, rng.permutation(step).tolist())
    assert one.items().tolist() == two.items().tolist()


# The table


def scored_items(table: MappedTable, queries: Tensor) -> Tensor:
    """Scores [B, V + 1] of every item, by the embedding that it looks up."""
    items = table.lookup(torch.arange(table.num_items + 1)).detach()
    queries, items = (torch.nn.functional.normalize(x, dim=-1, eps=1e-6) for x in (queries, items))
    scores = queries @ items.mT
    return scores


def ranked_by_hand(scores: Tensor, targets: list[int], seen: list[list[int]]) -> list[float]:
    found = []
    for row, target, hidden in zip(scores, targets, seen, strict=True):
        others = [i for i in range(1, len(row)) if i != target and i not in hidden]
        found.append(1 + sum(float(row[i] > row[target]) + 0.5 * float(row[i] == row[target]) for i in others))
    return found


def make_table(kind: str, num_items: int = 20, num_rows: int = 6) -> MappedTable:
    rows: ItemRows = HashedRows(num_items, num_rows) if kind == "hash" else managed(rows=num_rows, num_items=num_items)
    if isinstance(rows, ManagedRows):
        take(rows, [3, 4, 9, 20])
    return MappedTable(rows, LocalItemTable(num_rows, 4, generator=torch.Generator().manual_seed(3)))


KINDS = ["hash", pytest.param("managed", marks=needs_torchrec)]


@pytest.mark.parametrize("chunk_mib", [64, 1e-4], ids=["one-chunk", "user-by-user"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_those_among_items(kind: str, chunk_mib: float) -> None:
    table = make_table(kind)
    queries = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    targets, seen = [3, 9, 1, 20, 7], [[], [3, 3, 4, 0], [1, 2, 2], [5, 6, 7, 8, 9, 19], list(range(1, 21))]
    ids = torch.tensor([i for row in seen for i in row])
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in seen]).tolist()])
    # As scores are made once a row, those of items that share one are equal to the last bit; so they are by hand.
    expected = ranked_by_hand(scored_items(table, queries), targets, seen)
    assert table.rank(queries, torch.tensor(targets), ids, offsets, chunk_mib).tolist() == expected
    alone = ranked_by_hand(scored_items(table, queries), targets, [[]] * 5)
    assert table.rank(queries, torch.tensor(targets)).tolist() == alone
    assert len(set(alone)) > 1 and any(rank % 1 for rank in alone), "ties count half"


@needs_torchrec
def test_items_without_a_row_tie() -> None:
    table = make_table("managed")  # 3, 4, 9 and 20 have a row; the 16 others score as row 1
    table.rows.weight.data[:] = torch.tensor([[0, 0], [1, 0], [0, 1], [0, 2], [0, 3], [0, 4], [9, 9]]).repeat(1, 2)
    query = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert table.rank(query, torch.tensor([1])).tolist() == [1 + 15 / 2]
    assert table.rank(query, torch.tensor([3])).tolist() == [1 + 16 + 3 / 2], "row 6 has no item and does not count"


@pytest.mark.parametrize("kind", KINDS)
def test_recommended_are_the_best_unseen_items(kind: str) -> None:
    table = make_table(kind)
    queries = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    seen = [[], [3, 9], list(range(1, 20))]
    ids = torch.tensor([i for row in seen for i in row])
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in seen]).tolist()])
    scores, items = table.topk(queries, 7, ids, offsets)
    all_scores = scored_items(table, queries)
    known = {3, 4, 9, 20} if kind == "managed" else set(range(1, 21))
    for user in range(3):
        left = sorted(known - set(seen[user]), key=lambda i: -float(all_scores[user, i]))
        count = min(7, len(left))
        found = items[user, :count].tolist()
        assert len(set(found)) == count and set(found) <= set(left)
        torch.testing.assert_close(scores[user, :count], all_scores[user, left[:count]])
        torch.testing.assert_close(scores[user, :count], all_scores[user, found])
        assert items[user, count:].tolist() == [0] * (7 - count)
        assert scores[user, count:].tolist() == [-torch.inf] * (7 - count)


@needs_torchrec
def test_a_step_trains_on_rows_in_use_and_on_labels_that_have_one() -> None:
    table = make_table("managed")  # rows 1..5 of 6 are in use
    every = torch.tensor([3, 1, 20])
    inner, found = table.for_loss(Predicted(every, every, torch.tensor([0.5, 0.5, 1.0])))
    labels = found.labels
    assert inner is table.rows and labels.tolist() == table.item_rows.rows(every[[0, 2]]).tolist()
    assert found.weights is not None and found.weights.tolist() == [0.5, 1.0]
    assert [found.places.tolist(), found.random_rows.tolist()] == [[0, 2], [0, 2]]  # type: ignore[union-attr]
    queries = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    for name in ("sampled", "full"):
        loss = inner.full_softmax(queries, labels)
        if name == "sampled":
            loss = inner.sampled_softmax(queries, labels, num_negatives=300)
        inner.weight.grad = None  # type: ignore[assignment]
        loss.sum().backward()
        touched = inner.weight.grad.abs().sum(1) > 0  # type: ignore[operator, union-attr]
        assert touched.tolist() == [False, True, True, True, True, True, False], name


def test_full_softmax_over_hashed_rows_by_hand() -> None:
    table = make_table("hash")
    queries, labels = torch.randn(2, 4, generator=torch.Generator().manual_seed(4)), torch.tensor([3, 9])
    rows = torch.nn.functional.normalize(table.rows.weight.detach()[1:], dim=-1)  # type: ignore[arg-type]
    logits = torch.nn.functional.normalize(queries, dim=-1) @ rows.mT / 0.05
    expected = torch.nn.functional.cross_entropy(logits, table.item_rows.rows(labels) - 1, reduction="none")
    torch.testing.assert_close(table.full_softmax(queries, labels).detach(), expected)


# Ranks


def scored_on_ranks(kind: str) -> tuple[list[float], list[list[int]], list[list[int]]]:
    """Ranks, best items and the map of a sharded table whose users are spread over the ranks."""
    from hstu.config import Config, HSTUConfig
    from hstu.distributed import World
    from hstu.model.retrieval import RetrievalModel
    from hstu.sharded.tables import shard
    from hstu.vocabulary import Vocabulary

    world = World.current()
    torch.manual_seed(0)
    model_config = HSTUConfig(dim=4, num_blocks=1, qk_dim=4, v_dim=4, max_len=8)
    embedding = EmbeddingConfig(kind="sharded", optimizer="sgd", ids=kind, rows=6, sharding="row_wise")
    model = RetrievalModel(model_config, 20, LossConfig(), embedding)
    shard(model, Config(model=model_config, embedding=embedding), world)
    table: Any = model.table
    vocabulary = Vocabulary(model, 0, world)
    mine = slice(world.rank, None, world.size)
    for step in torch.tensor([[3, 4, 9, 20], [3, 9, 2, 9], [8, 8, 8, 2]]):
        batch: Any = SimpleNamespace(item_ids=step[mine], predicted_items=step[mine])
        vocabulary.begin_step([batch], [], None)
    queries = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 9, 1, 20])
    seen = torch.tensor([4, 9])[mine]
    offsets = torch.tensor([0, 1] + [1] * (len(targets[mine]) - 1)) if world.size > 1 else torch.tensor([0, 1, 2, 2, 2])
    ranks = table.rank(queries[mine], targets[mine], seen, offsets)
    items = table.topk(queries[mine], 4, seen, offsets)[1]
    of_items = table.item_rows.rows(torch.arange(21)).tolist()
    return ranks.tolist(), items.tolist(), of_items


@needs_torchrec
@pytest.mark.parametrize("kind", ["hash", "managed"])
def test_two_ranks_are_one(kind: str) -> None:
    ((ranks, items, rows),) = run_ranks(1, scored_on_ranks, kind)
    (ranks_0, items_0, rows_0), (ranks_1, items_1, rows_1) = run_ranks(2, scored_on_ranks, kind)
    assert rows == rows_0 == rows_1
    assert [ranks_0[0], ranks_1[0], ranks_0[1], ranks_1[1]] == ranks
    assert [items_0[0], items_1[0], items_0[1], items_1[1]] == items


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": "managed", "rows": 1}, r"embedding.rows=1: expected >= 2 with embedding.ids=managed"),
        ({"ids": "hash"}, r"embedding.rows=None: expected >= 1 with embedding.ids=hash"),
        ({"ids": "hash", "rows": 0}, r"embedding.rows=0: expected >= 1"),
        ({"rows": 10}, r"embedding.rows=10: expected null with embedding.ids=exact"),
        ({"ids": "bloom", "rows": 10}, r"embedding.ids='?bloom'?: expected.*exact, hash, managed"),
        ({"ids": "managed", "rows": 9, "policy": "fifo"}, r"embedding.policy='?fifo'?: expected.*lru, lfu"),
        ({"ids": "managed", "rows": 9, "evict_every": 0}, r"embedding.evict_every=0: expected >= 1"),
        ({"ids": "managed", "rows": 9, "policy_decay": -1.0}, r"embedding.policy_decay=-1.0: expected >= 0"),
    ],
    ids=["no-row-left", "rows-missing", "no-rows", "rows-unused", "ids", "policy", "interval", "decay"],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingConfig(**changes)


def test_managed_needs_torchrec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu.item_rows.has_torchrec", lambda: False)
    assert make_item_rows(20, EmbeddingConfig()) is None
    with pytest.raises(UserError, match="embedding.ids=managed: expected torchrec and fbgemm-gpu.*take hash"):
        make_item_rows(20, EmbeddingConfig(ids="managed", rows=4))
