"""The shuffle buffers and the batches of shards: everybody once, any stop continued exactly, on any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import RunConfig, StochasticLengthConfig
from hstu.data.batches import Batch, EventColumns, TrainBatches
from hstu.data.shard_source import PieceTable, _read_in_sequence
from hstu.data.shard_stream import ShardUsers, StreamBatches, apportion
from hstu.data.sharded_store import ShardedStore
from hstu.data.share import Ranks
from hstu.data.shuffle_buffer import ShuffleBuffer, Users, joined_ranges
from hstu.data.splits import make_split
from hstu.data.store import SequenceStore
from hstu.distributed import World
from hstu.errors import UserError
from tests.data.logs import prepare_log
from tests.data.test_sharded import write_files
from tests.ranks import run_ranks

MAX_LEN = 9
WHOLE, CUT = StochasticLengthConfig(), StochasticLengthConfig(1.1, "recency")


class Counting:
    """A source of the users 0..n-1; user u has u % 3 + 1 events with the value u."""

    def __init__(self, num_users: int) -> None:
        self.num_users, self.fetched = num_users, 0

    def begin(self, epoch: int) -> int:
        return self.num_users

    def refs(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    def fetch(self, refs: np.ndarray) -> Users:
        self.fetched += len(refs)
        lengths = refs % 3 + 1
        return Users(refs, refs, lengths, {"value": np.repeat(refs, lengths)})


def drain(buffer: ShuffleBuffer, size: int = 7) -> list[int]:
    found: list[int] = []
    while len(users := buffer.take(size)):
        assert np.array_equal(users.columns["value"], np.repeat(users.refs, users.refs % 3 + 1))
        found += users.refs.tolist()
    return found


@pytest.mark.parametrize("num_users", [0, 1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize("buffer_users", [1, 2, 16, 1000])
def test_everybody_leaves_once(num_users: int, buffer_users: int) -> None:
    assert sorted(drain(ShuffleBuffer(Counting(num_users), buffer_users, seed=0))) == list(range(num_users))


def test_order_is_random_bounded_and_of_its_epoch() -> None:
    buffer = ShuffleBuffer(Counting(1000), 100, seed=0)
    first = drain(buffer)
    assert first != sorted(first)
    assert all(user < place + 100 for place, user in enumerate(first)), "nobody leaves before entering"
    buffer.start(1)
    second = drain(buffer)
    assert second != first and sorted(second) == sorted(first)
    assert drain(ShuffleBuffer(Counting(1000), 100, seed=1)) != first
    assert drain(ShuffleBuffer(Counting(1000), 100, seed=0), size=64) == first, "the size of a step changes no order"


@pytest.mark.parametrize("stop", [0, 1, 49, 50, 51, 99, 150, 420, 499, 500])
def test_stopped_anywhere_and_continued(stop: int) -> None:
    undisturbed = ShuffleBuffer(Counting(500), 100, seed=4)
    undisturbed.start(2)
    order = drain(undisturbed)
    source = Counting(500)
    after = ShuffleBuffer(source, 100, seed=4)
    after.seek(2, stop)
    assert source.fetched <= 100, "only the buffer is read again"
    assert drain(after) == order[stop:]


def test_joined_ranges() -> None:
    assert joined_ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert joined_ranges(np.array([], np.int64), np.array([], np.int64)).tolist() == []


# Batches of a store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SequenceStore]:
    folder = tmp_path_factory.mktemp("stream")
    raw = write_files(folder / "raw")
    columns = {"action": "stars"}
    by_time = {"split": "global-time", "split_time": "0.7q"}
    return {
        "last": prepare_log(folder, raw, columns, shards=5),
        "time": prepare_log(folder, raw, columns, shards=5, **by_time),
        "single": prepare_log(folder, raw, columns),
    }


def make(
    store: SequenceStore, selection: str = "validation", world: World | None = None, seed: int = 3,
    cut: StochasticLengthConfig = WHOLE, event_weights: str = "none", batch_users: int = 16, buffer_users: int = 40,
) -> StreamBatches:  # fmt: skip
    run = RunConfig(reader="stream", selection=selection, batch_users=batch_users, buffer_users=buffer_users,
                    stochastic_length=cut)  # fmt: skip
    return StreamBatches(store, MAX_LEN, run, seed, world or World(), event_weights)


def histories(batch: Any) -> dict[int, tuple[list[int], ...]]:
    """User row -> its inputs, labels, times, request times, actions."""
    columns = (batch.item_ids, batch.labels, batch.timestamps, batch.request_times, batch.actions)
    bounds = batch.offsets.tolist()
    return {
        user: tuple(c[a:b].tolist() for c in columns)
        for user, a, b in zip(batch.users.tolist(), bounds, bounds[1:], strict=False)
    }


@pytest.mark.parametrize("kind", ["last", "time"])
@pytest.mark.parametrize("selection", ["validation", "reference"])
def test_an_epoch_holds_what_drawing_from_all_users_holds(
    stores: dict[str, SequenceStore], kind: str, selection: str
) -> None:
    store = stores[kind]
    stream = make(store, selection)
    whole = TrainBatches(EventColumns(store), store, make_split(store, selection), MAX_LEN, seed=3, batch_users=16)
    assert (len(stream.users), stream.num_skipped) == (len(whole.users), whole.num_skipped)
    assert stream.num_steps(0) == whole.num_steps(0)
    found: dict[int, Any] = {}
    for step in range(stream.num_steps(0)):
        part = histories(stream.share(0, step, Ranks()).batch)
        assert not set(part) & set(found)
        found |= part
    expected: dict[int, Any] = {}
    for step in range(whole.num_steps(0)):
        expected |= histories(whole.batch(0, step))
    assert found == expected


def shares_of_rank(
    path: Path, epoch: int, cut: StochasticLengthConfig
) -> tuple[set[str], list[tuple[Batch, int, list[float]]]]:
    """Shards that this rank reads; of every step its batch, the events of all ranks and their work."""
    world = World.current()
    store = SequenceStore.open(path)
    assert isinstance(store, ShardedStore)
    data = make(store, world=world, cut=cut, event_weights="actions")
    shares = [data.share(epoch, s, Ranks(world.rank, world.size, 2.0)) for s in range(data.num_steps(epoch))]
    return {store.shards[n].path.name for n in data.own}, [(s.batch, s.num_events, s.work.tolist()) for s in shares]


@pytest.mark.parametrize(("size", "cut"), [(2, WHOLE), (4, WHOLE), (3, CUT)], ids=["2", "4", "3, cut"])
def test_ranks_share_the_batches_of_one(
    stores: dict[str, SequenceStore], size: int, cut: StochasticLengthConfig
) -> None:
    """Every event of a batch of one rank is on one rank, in its place; users are divided by work."""
    store = stores["last"]
    files, ranks = zip(*run_ranks(size, shares_of_rank, store.path, 1, cut), strict=True)
    assert sum(map(len, files)) == len(set.union(*files)) == 5, "every file is read by one rank"
    alone = make(store, cut=cut, event_weights="actions")
    for step, parts in enumerate(zip(*ranks, strict=True)):
        expected = alone.share(1, step, Ranks()).batch
        batches = [batch for batch, _, _ in parts]
        places = torch.cat([batch.random_rows for batch in batches])
        assert sorted(places.tolist()) == list(range(expected.num_events))
        for name in ("item_ids", "timestamps", "request_times", "labels", "actions", "weights"):
            found = torch.cat([getattr(batch, name) for batch in batches])
            assert torch.equal(found[places.argsort()], getattr(expected, name)), name
        owners, work = Ranks(0, size, 2.0).divide_all(expected.offsets.diff().numpy())
        for rank, (batch, num_events, work_of_ranks) in enumerate(parts):
            assert batch.users.tolist() == expected.users[torch.from_numpy(owners == rank)].tolist()
            assert (batch.max_len, num_events) == (expected.max_len, expected.num_events)
            assert work_of_ranks == work.tolist()
    assert step + 1 == alone.num_steps(1)


def test_a_cut_user_keeps_some_inputs_each_with_what_follows_in_the_log(stores: dict[str, SequenceStore]) -> None:
    whole, cut = make(stores["last"]), make(stores["last"], cut=CUT)
    dropped, total = np.zeros(2), 0
    for epoch in range(2):
        every = [histories(whole.share(epoch, s, Ranks()).batch) for s in range(whole.num_steps(epoch))]
        some = [histories(cut.share(epoch, s, Ranks()).batch) for s in range(cut.num_steps(epoch))]
        for before, after in zip(every, some, strict=True):
            assert list(before) == list(after), "the same users in the same batches"
            for user, events in after.items():
                left = iter(zip(*before[user], strict=True))
                assert all(event in left for event in zip(*events, strict=True))
                assert len(events[0]) in (len(before[user][0]), 3), "9 events at most: cut to 9^0.55"
                dropped[epoch] += len(before[user][0]) - len(events[0])
                total += len(before[user][0])
    assert dropped.min() > 0 and dropped[0] != dropped[1]
    assert dropped.sum() / total == pytest.approx(cut.savings(0)["tokens_dropped"], rel=0.2)
    assert whole.savings(0) == {}


def weights_of(data: Any) -> dict[tuple[int, int], float]:
    """(user, time) -> weight, of an epoch; those of weight 0 are not counted."""
    found = {}
    for step in range(data.num_steps(0)):
        batch = data.share(0, step, Ranks()).batch
        users = batch.users.repeat_interleave(batch.offsets.diff()).tolist()
        found |= dict(zip(zip(users, batch.timestamps.tolist(), strict=True), batch.weights.tolist(), strict=True))
        assert batch.counted.tolist() == batch.weights.nonzero()[:, 0].tolist()
    return found


def test_events_weigh_by_the_action_that_follows(tmp_path: Path) -> None:
    lines = [f"u{u},{i},{1000 + i},{(u + i) % 3}" for u in range(30) for i in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp,stars", *lines]) + "\n")
    store = prepare_log(tmp_path, tmp_path / "log.csv", {"action": "stars"}, shards=2)
    columns = EventColumns(store, event_weights="actions")
    found = weights_of(make(store, event_weights="actions"))
    assert found == weights_of(TrainBatches(columns, store, make_split(store), MAX_LEN, seed=3, batch_users=16))
    assert set(found.values()) == {0.0, 1.0, 2.0} and len(found) == 30 * 3, "the mean action is 1"


def test_every_batch_mixes_all_shards_in_their_shares(stores: dict[str, SequenceStore]) -> None:
    stream = make(stores["last"])
    assert isinstance(stores["last"], ShardedStore)
    totals = stream.totals(0)
    for step in range(stream.num_steps(0)):
        users = stream.share(0, step, Ranks()).batch.users.numpy()
        counts = np.bincount(np.searchsorted(stores["last"].first_users, users, side="right") - 1, minlength=5)
        assert np.all(np.abs(counts - len(users) * totals / totals.sum()) < 2)


def test_pieces_are_read_in_an_order_of_the_epoch(
    stores: dict[str, SequenceStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {u: h for e in [make(stores["last"])] for s in range(e.num_steps(0))
             for u, h in histories(e.share(0, s, Ranks()).batch).items()}  # fmt: skip
    monkeypatch.setattr("hstu.data.shard_source.PIECE_USERS", 4)
    stream, found, orders = make(stores["last"]), {}, []
    for epoch in range(2):
        for step in range(stream.num_steps(epoch)):
            found |= histories(stream.share(epoch, step, Ranks()).batch)
        orders.append([buffer.source._order.tolist() for buffer in stream.buffers])  # type: ignore[attr-defined]
    assert found == whole
    assert max(map(len, orders[0])) > 3 and orders[0] != orders[1]


def test_a_shard_that_gives_nobody_keeps_its_place(
    stores: dict[str, SequenceStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hstu.data.shard_source.PIECE_USERS", 4)
    made, usual = [], ShardUsers.make_table

    def counted(self: ShardUsers, users: slice, piece: int, epoch: int) -> PieceTable:
        made.append((self.number, piece))
        return usual(self, users, piece, epoch)

    monkeypatch.setattr(ShardUsers, "make_table", counted)
    stream = make(stores["last"], batch_users=1, buffer_users=1)
    for step in range(stream.num_steps(0)):
        stream.share(0, step, Ranks())
    assert len(made) <= len(set(made)) + len(stream.buffers), "but for the first of the next epoch"
    assert len(set(made)) > 20


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_file_is_named(
    stores: dict[str, SequenceStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    shutil.copytree(stores["last"].path, tmp_path / "store")
    stream, said = make(SequenceStore.open(tmp_path / "store")), ".* ends before row [0-9]+: it has been cut"
    if how == "cut":
        usual = np.fromfile
        monkeypatch.setattr(np, "fromfile", lambda *args, **options: usual(*args, **options)[:-1])
    else:
        (tmp_path / "store/shards/00002/timestamps.npy").unlink()
        said = "/shards/00002/timestamps.npy cannot be read .No such file or directory."
    with pytest.raises(UserError, match=f"{said}.* prepare the data again"):
        for step in range(stream.num_steps(0)):
            stream.share(0, step, Ranks())


def test_wide_texts_are_read_in_fewer_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.array([f"{n:010d}" for n in range(100)])  # 40 bytes each
    np.save(tmp_path / "words.npy", words)
    column, sizes, usual = np.load(tmp_path / "words.npy", mmap_mode="r"), [], np.fromfile

    def read(*args: Any, **options: Any) -> np.ndarray:
        found = usual(*args, **options)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr("hstu.data.shard_source._READ_BYTES", 400)
    monkeypatch.setattr(np, "fromfile", read)
    found = _read_in_sequence(column, np.array([0, 4, 9, 50]), np.array([3, 2, 30, 1]))
    assert found.tolist() == words[[*range(3), 4, 5, *range(9, 39), 50]].tolist()
    assert sizes == [6 * 40, 30 * 40, 40], "a user is read whole"


@pytest.mark.parametrize(
    ("counts", "total", "expected"),
    [
        ([1, 1, 1], 2, [1, 1, 0]),  # the turn of all is at 1/2
        ([4, 2], 3, [2, 1]),  # 1/8 3/8 5/8 7/8 and 1/4 3/4: a b a
        ([4, 2], 4, [3, 1]),
        ([0, 5, 0], 3, [0, 3, 0]),
        ([3, 2], 5, [3, 2]),
        ([3, 2], 0, [0, 0]),
        ([0, 0], 0, [0, 0]),
        ([10**13, 10**13], 0, [0, 0]),  # memory for nobody
        ([10**13, 10**13], 10**13, [10**13 // 2] * 2),
    ],
)
def test_apportion(counts: list[int], total: int, expected: list[int]) -> None:
    assert apportion(np.array(counts), total).tolist() == expected


def test_apportion_gives_the_earliest_turns_and_takes_none_back() -> None:
    counts = np.random.default_rng(0).integers(0, 200, 40)
    before = np.zeros(40, np.int64)
    for total in range(1, int(counts.sum()) + 1):
        given = apportion(counts, total)
        assert given.sum() == total and np.all(given >= before) and np.all(given <= counts)
        with np.errstate(divide="ignore"):
            last = np.where(given > 0, (2 * given - 1) / (2 * counts), 0).max()
            following = np.where(given < counts, (2 * given + 1) / (2 * counts), 1).min()
        assert last <= following * (1 + 1e-15), "but for turns that differ by rounding"
        before = given


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 1), (0, 5), (1, 0), (1, 8)])
def test_any_step_continues_as_if_never_stopped(stores: dict[str, SequenceStore], epoch: int, step: int) -> None:
    undisturbed, fresh = make(stores["last"]), make(stores["last"])
    steps = [(e, s) for e in range(2) for s in range(undisturbed.num_steps(e))]
    expected = {at: histories(undisturbed.share(*at, Ranks()).batch) for at in steps}
    for at in steps[steps.index((epoch, step)) :]:
        assert list(histories(fresh.share(*at, Ranks()).batch).items()) == list(expected[at].items())


def test_epochs_differ_and_seeds_differ(stores: dict[str, SequenceStore]) -> None:
    first = make(stores["last"]).share(0, 0, Ranks()).batch.users.tolist()
    assert make(stores["last"]).share(1, 0, Ranks()).batch.users.tolist() != first
    assert make(stores["last"], seed=4).share(0, 0, Ranks()).batch.users.tolist() != first


def test_more_ranks_than_shards_and_single_stores_are_refused(stores: dict[str, SequenceStore]) -> None:
    with pytest.raises(UserError, match="6 ranks and 5 shards"):
        make(stores["last"], world=World(0, 6))
    with pytest.raises(UserError, match=r"run.reader=stream: .* is one store; prepare it with data.shards=S"):
        make(stores["single"])


def test_nobody_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\na,1,5\nb,2,6\n")
    with pytest.raises(UserError, match="no user has two training events"):
        make(prepare_log(tmp_path, tmp_path / "log.csv", shards=2))


# Every other path reads a sharded store as it reads one store


def test_drawing_from_all_users_of_shards(stores: dict[str, SequenceStore]) -> None:
    """Batches of the joined view against those of one store with the same users in the same order."""
    sharded, single = stores["last"], stores["single"]
    assert isinstance(sharded, ShardedStore)
    row = {raw: u for u, raw in enumerate(single.user_raw_ids.tolist())}
    rows = np.array([row[raw] for raw in sharded.user_raw_ids.tolist()])
    whole = TrainBatches(EventColumns(sharded), sharded, make_split(sharded), MAX_LEN, seed=3, batch_users=16)
    found = whole.batch(0, 0)
    columns, ends = EventColumns(single), make_split(single).train_end
    users = rows[found.users.numpy()]
    lengths = np.minimum(ends[users] - single.offsets[users] - 1, MAX_LEN)
    expected = columns.gather(users, ends[users] - 1 - lengths, lengths)
    for name in ("offsets", "item_ids", "timestamps", "request_times", "labels", "actions"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
