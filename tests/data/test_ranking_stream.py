"""Ranking batches of a rank's own shards: what drawing from all users gives, each label once, any stop continued."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import Config, StochasticLengthConfig
from hstu.data import features, ranking
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import RankingBatch, RankingBatches
from hstu.data.ranking_stream import RankingStreamBatches
from hstu.data.sharded_store import JoinedColumn
from hstu.data.share import Ranks
from hstu.data.splits import make_event_split
from hstu.data.store import SequenceStore
from hstu.distributed import World
from hstu.errors import UserError
from tests.data.logs import prepare_log
from tests.ranking import config_of, ranking_config
from tests.ranks import run_ranks

COLUMNS = {"values": ["click", "rating", "watch_s"], "features": ["tab"], "optional": ["rating"],
           "numeric": ["age", "length_s"]}  # fmt: skip
NUM_USERS, NUM_ITEMS, MAX_LEN = 60, 20, 6
CONTINUED = [(0, 0), (0, 1), (0, 5), (1, 0), (1, 4)]


def write_ranking_log(folder: Path) -> dict[str, str]:
    """Users with 1 to 29 events; whether they click follows from item and tab. Some users and items have no attributes.
    Returns the settings of the files."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    lines = ["user,item,timestamp,click,rating,watch_s,tab"]
    for user in range(NUM_USERS):
        for place in range(1 + user % 29):
            item, tab = int(rng.integers(NUM_ITEMS)), int(rng.integers(3))
            rating = "" if rng.random() < 0.3 else str(rng.integers(1, 4))
            click = int((item + tab) % 2 == 0)
            lines.append(
                f"u{user},{item},{10**9 + 1000 * place + user},{click},{rating},{rng.integers(60)},{'abc'[tab]}"
            )
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    users = [f"u{u},{'fm'[u % 2]},{10 + u}" for u in range(0, NUM_USERS, 3)]
    items = [f"{i},{('a', 'a|b', 'c', '')[i % 4]},{10 * i}" for i in range(NUM_ITEMS - 2)]
    (folder / "users.csv").write_text("\n".join(["user,gender,age", *users]) + "\n")
    (folder / "items.csv").write_text("\n".join(["item,genres,length_s", *items]) + "\n")
    return {"users_file": str(folder / "users.csv"), "items_file": str(folder / "items.csv")}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SequenceStore]:
    folder = tmp_path_factory.mktemp("ranking")
    files = write_ranking_log(folder / "raw")
    by_time = {"split": "global-time", "split_time": "0.8q"}
    kinds: dict[str, Any] = {"last": {"shards": 5}, "time": {"shards": 5, **by_time}, "single": {}}
    return {n: prepare_log(folder, folder / "raw/log.csv", COLUMNS, **files, **v) for n, v in kinds.items()}


def config(form: str = "interleaved", **changes: Any) -> Config:
    run = {"run_reader": "stream", "run_batch_users": 8, "run_buffer_users": 20, "run_selection": "validation"}
    return config_of(ranking_config(form), MAX_LEN, **(run | changes))


def make(store: SequenceStore, settings: Config, world: World | None = None) -> RankingStreamBatches:
    assert settings.ranking is not None
    return RankingStreamBatches(RankingData(store, settings.ranking), settings, world or World())


def rows_of_features(batch: Any) -> list[list[Any]]:
    """Codes of each feature and the numbers, as text, of each row."""
    lengths, found, at, start = batch.lengths.tolist(), [], 0, 0
    columns: list[list[Any]] = [[] for _ in range(batch.num_rows)]
    for count in batch.counts:
        codes = batch.values[start : start + count].tolist()
        start += count
        done = 0
        for row in range(batch.num_rows):
            columns[row].append(codes[done : done + lengths[at]])
            done, at = done + lengths[at], at + 1
    for row, numbers in zip(columns, batch.numbers.tolist(), strict=True):
        found.append([*row, *map(str, numbers)])
    return found


def contents(batch: RankingBatch) -> tuple[dict[int, Any], dict[int, Any], list[tuple[int, ...]]]:
    """Predicted event row -> its labels and everything of its token; user -> prefix; of each sequence (user, first
    predicted row, events, predicted ones)."""
    tokens = list(zip(batch.item_ids.tolist(), batch.timestamps.tolist(), batch.action_bits.tolist(),
                      rows_of_features(batch.item_features), strict=True))  # fmt: skip
    labels = {task: [str(v) for v in values.tolist()] for task, values in batch.labels.items()}
    predicted = {
        row: (tokens[at], [labels[task][i] for task in labels])
        for i, (row, at) in enumerate(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True))
    }
    users = dict(zip(batch.users.tolist(), rows_of_features(batch.user_features), strict=True))
    ends = batch.num_targets.cumsum(0).tolist()
    firsts = [batch.rows[end - n].item() for end, n in zip(ends, batch.num_targets.tolist(), strict=True)]
    shapes = zip(batch.users.tolist(), firsts, batch.offsets.diff().tolist(), batch.num_targets.tolist(), strict=True)
    return predicted, users, list(shapes)


def epoch_of(data: Any, epoch: int = 0) -> tuple[dict[int, Any], dict[int, Any], list[tuple[int, ...]]]:
    """:func:`contents` of all batches; no event is predicted twice."""
    found: dict[int, Any] = {}
    users: dict[int, Any] = {}
    sequences: list[tuple[int, ...]] = []
    for step in range(data.num_steps(epoch)):
        rows, prefixes, shapes = contents(data.share(epoch, step, Ranks()).batch)
        assert not set(rows) & set(found)
        found, users, sequences = found | rows, users | prefixes, sequences + shapes
    return found, users, sequences


@pytest.mark.parametrize("form", ["interleaved", "fused"])
@pytest.mark.parametrize("kind", ["last", "time"])
@pytest.mark.parametrize("selection", ["validation", "reference"])
def test_an_epoch_holds_what_drawing_from_all_users_holds(
    stores: dict[str, SequenceStore], form: str, kind: str, selection: str
) -> None:
    store, settings = stores[kind], config(form, run_selection=selection)
    stream = make(store, settings)
    whole = RankingBatches(stream.data, make_event_split(store, selection), settings)
    assert (len(stream.users), stream.num_skipped) == (len(whole.users), whole.num_skipped)
    found, users, sequences = epoch_of(stream)
    expected, expected_users, expected_sequences = epoch_of(whole)
    assert len(found) > 300 and found == expected and users == expected_users
    assert stream.num_steps(0) == -(-len(sequences) // 8)
    alike = [{u for u, n in Counter(s[0] for s in part).items() if n == 1} for part in (sequences, expected_sequences)]
    once = alike[0] & alike[1]  # who is whole in both, wherever the cuts lie
    assert len(once) > 3
    assert {s for s in sequences if s[0] in once} == {s for s in expected_sequences if s[0] in once}


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_every_sequence_sees_as_much_as_fits(stores: dict[str, SequenceStore], form: str) -> None:
    store, settings = stores["last"], config(form)
    assert settings.ranking is not None
    cuts = []
    for epoch in range(2):
        _, _, sequences = epoch_of(make(store, settings), epoch)
        for user, first, events, predicted in sequences:
            before = first - int(store.offsets[user])
            room = MAX_LEN if form == "fused" else MAX_LEN - predicted
            assert events - predicted == min(before, room)
            assert predicted <= (settings.ranking.targets if form == "fused" else MAX_LEN)
        cuts.append({(user, first) for user, first, *_ in sequences})
    assert cuts[0] != cuts[1], "cuts move from epoch to epoch"


def batches_of_rank(path: Path, settings: Config, epoch: int) -> tuple[list[int], list[tuple[RankingBatch, int]]]:
    """Shards that this rank reads; its batch of every step, and the predicted events of all ranks."""
    world = World.current()
    data = make(SequenceStore.open(path), settings, world)
    shares = [data.share(epoch, s, Ranks(world.rank, world.size)) for s in range(data.num_steps(epoch))]
    return data.own, [(share.batch, share.num_events) for share in shares]


@pytest.mark.parametrize("form", ["interleaved", "fused"])
@pytest.mark.parametrize(("size", "alpha"), [(2, None), (3, 1.2)], ids=["whole", "cut"])
def test_ranks_share_the_batches_of_one(
    stores: dict[str, SequenceStore], form: str, size: int, alpha: float | None
) -> None:
    """Sequences of a batch of one rank with all they have are each on one rank, with the places of their tokens."""
    store, cut = stores["last"], StochasticLengthConfig(alpha, "recency")
    settings = config(form, run_stochastic_length=cut)
    shards, ranks = zip(*run_ranks(size, batches_of_rank, store.path, settings, 1), strict=True)
    assert sorted(sum(shards, [])) == [0, 1, 2, 3, 4]
    alone = make(store, settings)
    for step, parts in enumerate(zip(*ranks, strict=True)):
        expected = alone.share(1, step, Ranks()).batch
        batches = [batch for batch, _ in parts]
        assert {num_events for _, num_events in parts} == {expected.num_events}
        for batch in batches:
            assert (batch.max_len, batch.max_targets) == (expected.max_len, expected.max_targets)
        targets = torch.cat([batch.random_targets for batch in batches])
        rows = torch.cat([batch.rows for batch in batches])
        assert torch.equal(rows[targets.argsort()], expected.rows), "drawn as on one rank"
        tokens = torch.cat([batch.random_rows for batch in batches])
        assert sorted(tokens.tolist()) == list(range(len(tokens)))
        merged: list[Any] = [{}, {}, []]
        for batch in batches:
            predicted, users, shapes = contents(batch)
            merged = [merged[0] | predicted, merged[1] | users, merged[2] + shapes]
        whole = contents(expected)
        assert merged[:2] == list(whole[:2]) and sorted(merged[2]) == sorted(whole[2])
    assert step + 1 == alone.num_steps(1)


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_cut_sequences(stores: dict[str, SequenceStore], form: str) -> None:
    """A dropped event is not predicted in the interleaved form; the fused form predicts all, from less."""
    settings = config(form, run_stochastic_length=StochasticLengthConfig(1.2, "uniform"))
    whole, cut = make(stores["last"], config(form)), make(stores["last"], settings)
    assert whole.num_steps(0) == cut.num_steps(0)
    lengths, dropped = [0, 0], 0
    for step in range(whole.num_steps(0)):
        before, after = (data.share(0, step, Ranks()).batch for data in (whole, cut))
        (rows, users, _), (kept_rows, kept_users, _) = contents(before), contents(after)
        assert users == kept_users and kept_rows.items() <= rows.items()
        assert before.users.tolist() == after.users.tolist()
        assert torch.all(after.offsets.diff() <= before.offsets.diff())
        assert torch.equal(after.rows, before.rows) or form == "interleaved"
        tokens = [list(zip(b.item_ids.tolist(), b.timestamps.tolist(), strict=True)) for b in (before, after)]
        left = iter(tokens[0])
        assert all(token in left for token in tokens[1]), "in the order of the log"
        lengths = [n + len(t) for n, t in zip(lengths, tokens, strict=True)]
        dropped += len(rows) - len(kept_rows)
    assert lengths[1] < lengths[0] and (dropped > 0) == (form == "interleaved")
    assert 1 - lengths[1] / lengths[0] == pytest.approx(cut.savings(0)["tokens_dropped"], rel=0.1)


def test_any_step_continues_as_if_never_stopped(stores: dict[str, SequenceStore]) -> None:
    settings = config()
    undisturbed = make(stores["last"], settings)
    steps = [(e, s) for e in range(2) for s in range(undisturbed.num_steps(e))]
    expected = {at: undisturbed.share(*at, Ranks()).batch for at in steps}
    for begin in CONTINUED:
        fresh = make(stores["last"], settings)
        for at in steps[steps.index(begin) :]:
            found = fresh.share(*at, Ranks()).batch
            assert contents(found) == contents(expected[at])
            assert torch.equal(found.targets, expected[at].targets)


def test_the_cuts_of_past_epochs_are_forgotten(stores: dict[str, SequenceStore]) -> None:
    stream = make(stores["last"], config())
    totals = [stream.totals(epoch).tolist() for epoch in range(5)]
    assert set(stream.cuts._counts) == {3, 4} and totals[0] != totals[1]
    assert stream.totals(0).tolist() == totals[0]


def test_more_shards_than_users(tmp_path: Path) -> None:
    files = write_ranking_log(tmp_path / "raw")
    rows = (tmp_path / "raw/log.csv").read_text().splitlines()
    few = [line for line in rows if line.startswith(("user", "u28,", "u27,", "u26,"))]
    (tmp_path / "few.csv").write_text("\n".join(few) + "\n")
    store = prepare_log(tmp_path, tmp_path / "few.csv", COLUMNS, shards=8, **files)
    held_out = 2 * 3
    assert len(epoch_of(make(store, config()))[0]) == len(few) - 1 - held_out
    ranks = run_ranks(3, batches_of_rank, store.path, config(), 0)
    assert sum(len(batch.rows) for _, batches in ranks for batch, _ in batches) == len(few) - 1 - held_out


def test_no_column_is_read_as_a_whole(stores: dict[str, SequenceStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of users and events are looked at in parts, and batches come from the shards' own files."""
    sizes: list[int] = []
    joined, gathered = JoinedColumn._between, JoinedColumn.take

    def between(column: JoinedColumn, start: int, stop: int) -> np.ndarray:
        sizes.append(stop - start)
        return joined(column, start, stop)

    def take(column: JoinedColumn, rows: np.ndarray) -> np.ndarray:
        sizes.append(rows.size)
        return gathered(column, rows)

    expected = epoch_of(make(stores["last"], config()))
    monkeypatch.setattr(features, "_PART_BYTES", 256)
    monkeypatch.setattr(ranking, "_CHUNK_ROWS", 50)
    monkeypatch.setattr(JoinedColumn, "_between", between)
    monkeypatch.setattr(JoinedColumn, "take", take)
    found = epoch_of(make(stores["last"], config()))
    assert len(sizes) > 100 and max(sizes) <= 256
    for was, now in zip(expected, found, strict=True):
        assert was.keys() == now.keys() if isinstance(was, dict) else was == now
    assert [label for _, label in expected[0].values()] == [label for _, label in found[0].values()]


def test_features_of_shards_and_of_one_store(stores: dict[str, SequenceStore]) -> None:
    found = []
    settings = config()
    assert settings.ranking is not None
    for name in ("last", "single"):
        store = stores[name]
        data, order = RankingData(store, settings.ranking), np.argsort(store.user_raw_ids)
        rows = np.concatenate([np.arange(store.offsets[u], store.offsets[u + 1]) for u in order])
        coded, numbers = data.prefix_features(order)
        tokens, _ = data.token_features(
            np.asarray(store.item_ids[rows]), np.asarray(store.timestamps[rows]), data.event_values(rows)
        )
        codes = {k: [v.tolist() for v in pair] for k, pair in {**coded, **tokens}.items()}
        found.append((codes, numbers, data.token_feature_sizes, data.user_feature_sizes))
    assert found[0][0] == found[1][0] and found[0][2:] == found[1][2:]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda s: make(s["last"], config(), World(0, 6)), "6 ranks and 5 shards"),
        (lambda s: make(s["single"], config()), "run.reader=stream: .* is one store; prepare it with data.shards=S"),
        (lambda s: config_of(ranking_config(mode="progressive"), run_reader="stream"),
         "ranking.mode='progressive': expected epochs with run.reader=stream, .* hstu-stream"),
    ],
    ids=["ranks", "one store", "progressive"],
)  # fmt: skip
def test_what_a_stream_cannot_do_is_refused(stores: dict[str, SequenceStore], make_it: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_it(stores)
