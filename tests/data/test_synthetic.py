"""The synthetic log: its true distribution against an enumeration of every hidden path and against its own draws."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hstu.baselines import rank_baselines
from hstu.config import DataConfig
from hstu.data.splits import make_split
from hstu.data.store import SequenceStore, write_store
from hstu.data.synthetic import DAY_S, SyntheticProcess, oracle_metrics, oracle_ranks, process_of, write_synthetic_store
from hstu.errors import UserError
from hstu.metrics import summarize

DAY = int(DAY_S)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    config = DataConfig(num_users=600, num_items=100)
    return write_synthetic_store(config, tmp_path_factory.mktemp("synthetic") / "store")


def probs_at(process: SyntheticProcess, items: list[int], times: list[int], request: int) -> np.ndarray:
    """[num_items] of one history."""
    offsets = np.array([0, len(items)])
    (probs,) = process.next_item_probs(
        offsets, np.array(items, np.int32), np.array(times, np.int64), np.array([request])
    )
    return probs[0]


# ------------------------------------------------------------------ the truth, written a second time


def event_prob(p: SyntheticProcess, item: int, past: list[int], times: list[int], now: int, taste: int, level: float):
    """p(item | past, hidden taste and repeat level), straight from docs/synthetic.md. Items from 1."""
    of_taste = p.taste_probs[item - 1] if p.clusters[item - 1] == taste else 0.0
    if not past or now - times[-1] > p.session_gap_s:
        weights = [math.exp(-0.5 * (math.log((now - t) / p.rhythm_s) / p.rhythm_sigma) ** 2) for t in times]
        total = sum(weights)
        repeat = level * total / (total + p.rhythm_offset)
        of_repeat = sum(w for w, i in zip(weights, past, strict=True) if i == item) / total if total else 0.0
        prob = repeat * of_repeat + (1 - repeat) * of_taste
    else:
        first = len(past) - 1
        while first > 0 and times[first] - times[first - 1] <= p.session_gap_s:
            first -= 1
        session = past[first:]
        repeat = p.session_repeat * level if len(session) > 1 else 0.0
        of_repeat = session[:-1].count(item) / (len(session) - 1) if len(session) > 1 else 0.0
        parents = session[::-1][: p.context_items]
        weights = [p.context_decay**age for age in range(len(parents))]
        follow = 0.0
        for weight, parent in zip(weights, parents, strict=True):
            for place, successor in enumerate(p.successors[parent - 1]):
                if successor == item - 1:
                    follow += weight / sum(weights) * p.successor_probs[place]
        prob = p.session_taste * of_taste + (1 - p.session_taste) * (repeat * of_repeat + (1 - repeat) * follow)
    return (1 - p.noise) * prob + p.noise / p.num_items


def enumerate_probs(p: SyntheticProcess, items: list[int], times: list[int], request: int) -> np.ndarray:
    """Sums over every path of the hidden taste and every level."""
    clusters, total = range(p.num_clusters), np.zeros(p.num_items)
    for level in p.repeat_levels:
        for path in itertools.product(clusters, repeat=len(items) + 1):
            weight = p.cluster_probs[path[0]] / len(p.repeat_levels)
            for t, now in enumerate([*times, request]):
                if t > 0:
                    gap = now - times[t - 1]
                    stay = math.exp(-gap / p.taste_life_s) if gap > p.session_gap_s else 1.0
                    steps = [(path[t - 1] + s) % p.num_clusters for s in (1, -1)]
                    weight *= stay * (path[t] == path[t - 1]) + (1 - stay) * sum(path[t] == s for s in steps) / 2
                if t < len(items) and weight > 0:
                    weight *= event_prob(p, items[t], items[:t], times[:t], now, path[t], level)
            if weight > 0:
                total += weight * np.array(
                    [event_prob(p, i + 1, items, times, request, path[-1], level) for i in range(p.num_items)]
                )
    return total / total.sum()


SMALL = SyntheticProcess(num_items=40, items_per_cluster=10, num_users=5, taste_life_s=3 * DAY_S, context_decay=0.6)
START = 1_600_000_000


@pytest.mark.parametrize("request_gap", [60, 2 * DAY], ids=["inside-session", "after-gap"])
@pytest.mark.parametrize(
    "gaps",
    [[], [0], [0, 60, 60, 90], [0, 50, 5 * DAY, 70, 70], [0, 4 * DAY, 3 * DAY, DAY]],
    ids=["empty", "one-event", "one-session", "two-sessions", "week-old"],
)
def test_filter_equals_enumeration(gaps, request_gap):
    times = (START + np.cumsum(np.array(gaps, np.int64))).tolist()
    items = [3, int(SMALL.successors[2, 0]) + 1, 3, 17, 29][: len(gaps)]
    request = (times[-1] if times else START) + request_gap
    found = probs_at(SMALL, items, times, request)
    np.testing.assert_allclose(found, enumerate_probs(SMALL, items, times, request), rtol=1e-10)


# ------------------------------------------------------------------ the draws follow the truth


def test_draws_follow_the_distribution():
    """Expected against found: log-likelihood, hits of the likeliest item, and hits of the ten likeliest."""
    process = SyntheticProcess(num_items=100, num_users=1500, synthetic_seed=3)
    log = process.generate()
    rows = log.offsets[1:] - 1
    keep = np.ones(len(log.item_ids), bool)
    keep[rows] = False
    offsets = log.offsets - np.arange(len(log.offsets))
    chunks = process.next_item_probs(offsets, log.item_ids[keep], log.timestamps[keep], log.timestamps[rows])
    probs = np.concatenate(list(chunks))
    label = log.item_ids[rows] - 1
    inside = log.timestamps[rows] - log.timestamps[rows - 1] <= process.session_gap_s
    assert 300 < inside.sum() < 1200
    top = np.argsort(-probs, axis=1)
    for part in (inside, ~inside):
        p, m = probs[part], np.arange(part.sum())
        mean, square = (p * np.log(p)).sum(axis=1), (p * np.log(p) ** 2).sum(axis=1)
        score = (np.log(p[m, label[part]]) - mean).sum() / np.sqrt((square - mean**2).sum())
        assert abs(score) < 4
        for k in (1, 10):
            expected = np.take_along_axis(p, top[part, :k], axis=1).sum(axis=1)
            hit = (top[part, :k] == label[part][:, None]).any(axis=1)
            assert abs((hit - expected).sum() / np.sqrt((expected * (1 - expected)).sum())) < 4


def test_log_has_the_promised_form():
    process = SyntheticProcess(num_items=100, num_users=400)
    log = process.generate()
    lengths = np.diff(log.offsets)
    assert lengths.min() >= process.min_events and lengths.max() == process.max_events
    assert log.item_ids.min() >= 1 and log.item_ids.max() <= 100 and len(np.unique(log.item_ids)) == 100
    gaps = np.diff(log.timestamps)
    gaps = np.delete(gaps, log.offsets[1:-1] - 1)  # between users
    assert gaps.min() >= 5
    assert not ((gaps >= process.session_gap_s) & (gaps < 3 * 3600)).any()
    assert np.mean(gaps > process.session_gap_s) == pytest.approx(1 / process.mean_session_events, abs=0.02)


def test_same_seed_same_log_other_seed_other_log():
    first, again = (SyntheticProcess(num_items=60, num_users=50).generate() for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    other = SyntheticProcess(num_items=60, num_users=50, synthetic_seed=1).generate()
    assert len(other.item_ids) != len(first.item_ids) or (other.item_ids != first.item_ids).any()


@pytest.mark.parametrize("num_items", [20, 47, 500])
def test_tables(num_items):
    process = SyntheticProcess(num_items=num_items)
    np.testing.assert_allclose(np.bincount(process.clusters, process.taste_probs), np.ones(process.num_clusters))
    for item, successors in enumerate(process.successors):
        assert item not in successors and len(set(successors.tolist())) == len(successors)
    assert process.successor_probs.sum() == pytest.approx(1)


# ------------------------------------------------------------------ what the process is made for


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(a - b).sum() / 2)


def test_gap_decides_which_process_drives():
    """The gap changes the answer; the last item matters inside a session and hardly after a long gap."""
    process = SyntheticProcess(num_items=100)
    items, times = [5, 9, 9, 40], [START, START + DAY, START + 2 * DAY, START + 2 * DAY + 60]
    other = [*items[:-1], 77]
    soon, late = times[-1] + 60, times[-1] + 2 * DAY
    assert distance(probs_at(process, items, times, soon), probs_at(process, items, times, late)) > 0.5
    assert (
        distance(probs_at(process, items, times, soon), probs_at(process, other, times, soon)) > 0.2
    )  # one of two parents
    assert distance(probs_at(process, items, times, late), probs_at(process, other, times, late)) < 0.01


def test_after_a_gap_the_user_repeats_what_is_a_week_old():
    process = SyntheticProcess(num_items=100)
    items, times = [5, 60, 83], [START, START + 3 * DAY, START + 6 * DAY]
    week = probs_at(process, items, times, START + 7 * DAY)
    assert week.argmax() + 1 == 5
    assert probs_at(process, items, times, START + 10 * DAY).argmax() + 1 == 60


def test_chunks_do_not_matter():
    process = SyntheticProcess(num_items=60, num_users=9)
    log = process.generate()
    args = (log.offsets, log.item_ids, log.timestamps, log.timestamps[log.offsets[1:] - 1] + DAY)
    whole, pieces = (np.concatenate(list(process.next_item_probs(*args, chunk_size=n))) for n in (100, 2))
    np.testing.assert_allclose(whole, pieces, rtol=1e-12)
    np.testing.assert_allclose(whole.sum(axis=1), 1)
    assert whole.min() > 0


# ------------------------------------------------------------------ store and oracle


def test_store_holds_titles_and_the_process(store):
    assert store.item_attribute("title")[11] == f"cluster {process_of(store).clusters[11]:02d} item " + (
        f"{process_of(store).ranks[11]:03d}"
    )
    assert len(set(store.item_attribute("title").tolist())) == 100
    assert store.item_attribute("cluster")[11] == f"{process_of(store).clusters[11]:02d}"
    assert process_of(store) == SyntheticProcess(100, 600, 0)
    np.testing.assert_array_equal(process_of(store).generate().item_ids, store.item_ids)


@pytest.mark.parametrize("filter_history", ["none", "full", "truncated"])
def test_oracle_ranks_against_a_loop(store, filter_history):
    targets = make_split(store).test
    ranks = oracle_ranks(store, targets, filter_history, max_len=5)
    process = process_of(store)
    for m in (0, 1, 250, 599):
        row, first = int(targets.rows[m]), int(store.offsets[targets.users[m]])
        probs = probs_at(process, store.item_ids[first:row], store.timestamps[first:row], int(store.timestamps[row]))
        seen = {"none": [], "full": store.item_ids[first:row], "truncated": store.item_ids[row - 5 : row]}
        gone, item = set(np.asarray(seen[filter_history]).tolist()), int(store.item_ids[row])
        rest = [probs[i - 1] for i in range(1, 101) if i != item and i not in gone]
        expected = 1 + sum(x > probs[item - 1] for x in rest) + 0.5 * sum(x == probs[item - 1] for x in rest)
        assert ranks[m] == pytest.approx(expected)


def test_oracle_needs_the_gap_and_beats_the_baselines(store):
    split = make_split(store)
    metrics = {"oracle": oracle_metrics(store, split.test, [10])}
    ranks = rank_baselines(store, split.train_end, split.test, "none")
    metrics |= {name: summarize(r, [10]) for name, r in ranks.items()}
    popular, transitions = (metrics[name]["ndcg@10"] for name in ranks)
    assert popular + 0.05 < transitions < metrics["oracle"]["ndcg@10"] - 0.05

    # The same oracle, told one gap for every request, loses.
    process, users, rows = process_of(store), split.test.users, split.test.rows
    history = [np.arange(store.offsets[u], r) for u, r in zip(users, rows, strict=True)]
    offsets, joined = np.cumsum([0, *map(len, history)]), np.concatenate(history)
    blind = process.next_item_probs(
        offsets, store.item_ids[joined], store.timestamps[joined], store.timestamps[rows - 1] + 60
    )
    probs = np.concatenate(list(blind))
    label = probs[np.arange(len(rows)), store.item_ids[rows] - 1][:, None]
    hit = np.mean(1 + (probs > label).sum(axis=1) <= 10)
    assert hit < metrics["oracle"]["hr@10"] - 0.1


def test_global_time_split_is_kept(tmp_path):
    config = DataConfig(num_users=60, num_items=40, split="global-time", split_time="0.8q")
    store = write_synthetic_store(config, tmp_path / "s")
    assert store.meta["split"] == {"kind": "global-time", "time": "0.8q"}
    targets = make_split(store).test
    assert len(targets) > 10 and len(oracle_ranks(store, targets)) == len(targets)


@pytest.mark.parametrize(
    ("field", "value"), [("num_items", 19), ("num_users", 0), ("max_events", 20), ("min_item_events", 5)]
)
def test_bad_settings_are_refused(tmp_path, field, value):
    with pytest.raises(UserError, match=f"data.{field}={value}"):
        write_synthetic_store(DataConfig(**{"num_users": 30, "num_items": 40, field: value}), tmp_path / "s")


def test_store_of_another_process_is_refused(store, tmp_path):
    plain = write_store(
        tmp_path / "plain", offsets=np.array([0, 2]), item_ids=np.array([1, 2]), timestamps=np.array([1, 2]), meta={}
    )
    with pytest.raises(UserError, match="no synthetic log"):
        process_of(plain)
    changed = json.loads(json.dumps(store.meta))
    changed["synthetic"]["fingerprint"] = "0"
    with pytest.raises(UserError, match="another version"):
        process_of(SequenceStore(store.path, changed))
    changed = json.loads(json.dumps(store.meta))
    del changed["synthetic"]["process"]["noise"]
    with pytest.raises(UserError, match="another version"):
        process_of(SequenceStore(store.path, changed))


def test_needs_numpy_only():
    code = (
        "import sys; from hstu.data.synthetic import SyntheticProcess; "
        "SyntheticProcess(40, 5).generate(); print({'torch', 'polars'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
