"""Scores of candidates: cached as plain, as the ranking model's own predictions, each on its own; growing histories."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from hstu.config import BiasConfig, TransformerConfig
from hstu.config_ranking import TaskConfig
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import gather, target_sequences
from hstu.errors import UserError
from hstu.history_cache import CacheStore
from hstu.model.ranking import RankingModel
from hstu.scoring import REQUEST_GAP_S, History, Scorer
from tests.oracle import assert_close, assert_zero_fails
from tests.ranking import FEATURES, NUM_ITEMS, config_of, ranking_config, rich_store

TASKS = {
    "click": TaskConfig("click"),
    "rating": TaskConfig("rating", kind="ordinal", levels=[1, 2, 3]),
    "watch": TaskConfig("watch_s", kind="regression"),
}
FORMS = ("interleaved", "fused")
NO_PREFIX = {**FEATURES, "user_features": {}}
LATE = 10**9 + 10**6
"""A second after every event."""
CANDIDATES = np.array([4, 1, 20, 7, 7, 13, 2, 9])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return rich_store(tmp_path_factory.mktemp("scoring") / "store", lengths=(5, 1, 9, 0, 3))


def scorer_of(store, form="interleaved", micro_batch=1024, prefix=True, max_len=12, seed=0, tasks=TASKS, **model):
    """A scorer whose weights are large enough for the history to matter."""
    config = config_of(ranking_config(form, tasks=tasks, **({} if prefix else NO_PREFIX)), max_len=max_len)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    data = RankingData(store, config.ranking)
    torch.manual_seed(seed)
    ranking_model = RankingModel(config.model, config.ranking, data)
    for parameter in ranking_model.parameters():
        parameter.data.normal_(std=0.5)
    return Scorer(config, data, ranking_model, micro_batch=micro_batch)


def in_float64(scorer):
    """The same scorer in float64."""
    return Scorer(scorer.config, scorer.data, copy.deepcopy(scorer.model).double(), micro_batch=scorer.micro_batch)


def check(got, plain, truth):
    """Every task by the suite's comparison rule."""
    assert set(got) == set(TASKS)
    for task in TASKS:
        values = [torch.from_numpy(scores[task]) for scores in (got, plain, truth)]
        assert_close(task, *values[:2], values[2].double())
        assert_zero_fails(task, *values[:2], values[2].double())


def same(a, b):
    """Equal to the noise of float32: predictions of order 1, sums of a few hundred terms."""
    assert a.keys() == b.keys()
    for task in a:
        np.testing.assert_allclose(a[task], b[task], rtol=2e-5, atol=2e-6)


def differ(a, b):
    return any(np.abs(a[task] - b[task]).max() > 1e-3 for task in a)


MODELS = {
    "plain": {}, "window": {"window": 3}, "semi-local": {"window": 3, "full_rows": 2},
    "row count": {"divisor": "row_count"}, "per head": {"bias": BiasConfig(per_head=True)},
    "power law": {"bias": BiasConfig(time_kind="power_law")}, "position only": {"bias": BiasConfig(time=False)},
    "time only": {"bias": BiasConfig(position=False)}, "no bias": {"bias": BiasConfig(position=False, time=False)},
    "own times": {"bias": BiasConfig(request_time=False)},
    "everything": {"window": 3, "full_rows": 2, "divisor": "row_count", "bias": BiasConfig(per_head=True)},
}  # fmt: skip


# Cached and plain


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_cached_scores_are_plain_scores(store, form, model):
    scorer = scorer_of(store, form, **model)
    wide = in_float64(scorer)
    history = scorer.history(2)
    truth, plain = (s.score_plain(history, CANDIDATES) for s in (wide, scorer))
    for scorer.micro_batch in (1, 3, 64):
        check(scorer.score(scorer.encode(history), CANDIDATES), plain, truth)
    scorer.micro_batch = 3
    check(scorer.score_plain(history, CANDIDATES), plain, truth)
    others = scorer.score(scorer.history(0), CANDIDATES, LATE), scorer.score(history, CANDIDATES, LATE)
    assert differ(*others)  # the history matters


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("user", [0, 1, 3, -1], ids=["five events", "one event", "none", "nobody"])
def test_short_histories_and_cold_users(store, form, prefix, user):
    scorer = scorer_of(store, form, prefix=prefix)
    history = scorer.history(user) if user >= 0 else dataclasses.replace(scorer.history(3), user=-1)
    cache = scorer.encode(history)
    values = [s.score_plain(history, CANDIDATES, request_time=LATE) for s in (scorer, in_float64(scorer))]
    for _ in range(2):
        check(scorer.score(cache, CANDIDATES, request_time=LATE), *values)
    if len(history) == 0:
        assert cache.length == 0  # the prefix happens with the first event, which is not known yet


def test_cold_users_differ_by_their_features(store):
    scorer = scorer_of(store)
    nothing = scorer.history(3)
    assert differ(scorer.score(nothing, CANDIDATES), scorer.score(dataclasses.replace(nothing, user=2), CANDIDATES))


@pytest.mark.parametrize("form", FORMS)
def test_more_candidates_than_spare_rows(store, form):
    scorer = scorer_of(store, form)
    many = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, 300)
    cache = scorer.encode(scorer.history(2))
    size = cache.num_bytes
    found = scorer.score(cache, many)
    assert cache.num_bytes == size
    each = scorer.score(cache, np.arange(1, NUM_ITEMS + 1))
    same(found, {task: values[many - 1] for task, values in each.items()})


# What the model itself predicts


@pytest.mark.parametrize("model", [m for n, m in MODELS.items() if n not in ("semi-local", "everything")],
                         ids=[n for n in MODELS if n not in ("semi-local", "everything")])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_a_score_is_the_prediction_of_the_event_that_follows(store, form, model):
    """Every event of user 2 as the candidate after those before it; the model reads the last 6 events."""
    scorer = scorer_of(store, form, max_len=6, **model)
    first = int(store.offsets[2])
    for number in range(9):
        row = np.array([first + number])
        batch = gather(scorer.data, target_sequences(scorer.data, scorer.config, row), with_labels=False)
        with torch.inference_mode():
            predicted = {task: x.numpy() for task, x in scorer.model.predict(batch).items()}
        scored = scorer.score(
            scorer.history(2, number), np.asarray(store.item_ids[row]), request_time=int(store.timestamps[row[0]]),
            event_values=scorer.data.event_values(row),
        )  # fmt: skip
        same(scored, predicted)


def test_a_semi_local_score_is_the_prediction_of_a_target(store):
    """In the fused form the model predicts targets, which see everything, as candidates do."""
    scorer = scorer_of(store, "fused", **MODELS["semi-local"])
    row = np.array([int(store.offsets[3]) - 1])
    batch = gather(scorer.data, target_sequences(scorer.data, scorer.config, row), with_labels=False)
    with torch.inference_mode():
        predicted = {task: x.numpy() for task, x in scorer.model.predict(batch).items()}
    item, time = np.asarray(store.item_ids[row]), int(store.timestamps[row[0]])
    same(scorer.score(scorer.history(2, 8), item, time, scorer.data.event_values(row)), predicted)


# Candidates on their own


@pytest.mark.parametrize("form", FORMS)
def test_candidates_do_not_influence_each_other(store, form):
    scorer = scorer_of(store, form)
    cache = scorer.encode(scorer.history(2))
    all_items = np.arange(1, NUM_ITEMS + 1)
    together = scorer.score(cache, all_items)
    order = np.random.default_rng(1).permutation(NUM_ITEMS)
    same(scorer.score(cache, all_items[order]), {task: x[order] for task, x in together.items()})
    same(scorer.score(cache, np.array([5, 5, 8])), {task: x[[4, 4, 7]] for task, x in together.items()})
    for item in (3, 17):
        same(scorer.score(cache, np.array([item])), {task: x[[item - 1]] for task, x in together.items()})
    assert np.ptp(together["click"]) > 0.01


def test_event_features_of_candidates_count(store):
    scorer = scorer_of(store)
    cache, items = scorer.encode(scorer.history(2)), np.array([3, 3, 3])
    tabs = {"tab": np.array([0, 1, 2])}
    found = scorer.score(cache, items, event_values=tabs)
    assert len(np.unique(found["click"])) == 3
    scorer.micro_batch = 2
    same(scorer.score(cache, items, event_values=tabs), found)
    same(scorer.score(cache, items[:1]), {task: x[:1] for task, x in found.items()})  # left out: missing, code 0


def test_the_request_time_counts(store):
    scorer = scorer_of(store)
    cache = scorer.encode(scorer.history(2))
    last = int(cache.history.timestamps[-1])
    same(scorer.score(cache, CANDIDATES), scorer.score(cache, CANDIDATES, request_time=last + REQUEST_GAP_S))
    assert differ(scorer.score(cache, CANDIDATES), scorer.score(cache, CANDIDATES, request_time=last + 10**7))


# Histories that grow


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("form", "prefix"), [("interleaved", True), ("fused", False), ("fused", True)],
                         ids=["interleaved", "fused", "fused with prefix"])  # fmt: skip
def test_extended_is_encoded_at_once(store, form, prefix, model):
    """One event at a time, and in chunks of 0, 3, 1 and 5; with whatever must be encoded again."""
    scorer = scorer_of(store, form, prefix=prefix, **model)
    whole = scorer.history(2)
    plain, truth = (s.score_plain(whole, CANDIDATES) for s in (scorer, in_float64(scorer)))
    for sizes in ([1] * 9, [0, 3, 1, 5]):
        cache, at = scorer.encode(whole[:0]), 0
        for size in sizes:
            cache = scorer.extend(cache, whole[at : at + size])
            at += size
        assert len(cache.history) == 9
        check(scorer.score(cache, CANDIDATES), plain, truth)


def encoded_tokens(scorer, monkeypatch):
    """Gets the number of tokens of each pass of the encoder."""
    counts = []
    forward = scorer.model.encoder.forward

    def counting(events, *arguments):
        counts.append(len(events))
        return forward(events, *arguments)

    monkeypatch.setattr(scorer.model.encoder, "forward", counting)
    return counts


@pytest.mark.parametrize(
    ("form", "prefix", "model", "counts"),
    [
        ("interleaved", True, {}, [2 + 2 * 7, 2, 2]),
        ("interleaved", False, {"window": 3}, [2 * 7, 2, 2]),
        ("interleaved", False, {"window": 3, "full_rows": 2}, [2 * 7, 2 * 8, 2 * 9]),
        ("fused", False, {}, [7, 1, 1]),
        ("fused", True, {}, [2 + 7, 2 + 8, 2 + 9]),
    ],
    ids=["interleaved", "window", "semi-local", "fused", "fused with prefix"],
)
def test_only_new_events_are_encoded_where_the_model_allows_it(store, monkeypatch, form, prefix, model, counts):
    scorer = scorer_of(store, form, prefix=prefix, **model)
    whole, seen = scorer.history(2), encoded_tokens(scorer, monkeypatch)
    cache = scorer.encode(whole[:7])
    for at in (7, 8):
        cache = scorer.extend(cache, whole[at : at + 1])
    assert seen == counts
    scorer.extend(cache, whole[:0])
    assert seen == counts  # nothing new, nothing encoded


@pytest.mark.parametrize(("form", "limit"), [("interleaved", 7), ("fused", 8)])
def test_a_history_that_outgrows_the_model_loses_its_oldest_quarter(store, monkeypatch, form, limit):
    """model.max_len=8: interleaved histories have 7 events and the candidate is the eighth; then 6 of 7 or of 8 stay
    (a quarter of either is 1 or 2), and growth goes on from there."""
    scorer = scorer_of(store, form, prefix=False, max_len=8)
    whole = scorer.history(2)
    assert scorer.max_events == limit
    cache = scorer.encode(whole)
    assert len(cache.history) == limit
    np.testing.assert_array_equal(cache.history.timestamps, whole.timestamps[-limit:])
    cache = scorer.encode(whole[:limit])
    full = scorer.extend(cache, whole[limit : limit + 1])
    assert len(full.history) == 6
    same(scorer.score(full, CANDIDATES), scorer.score(whole[limit - 5 : limit + 1], CANDIDATES))
    later = dataclasses.replace(whole[:1], timestamps=whole.timestamps[-1:] + 100)
    seen = encoded_tokens(scorer, monkeypatch)
    grown = scorer.extend(full, later)
    assert seen == [2 if form == "interleaved" else 1] and len(grown.history) == 7


def test_a_model_of_one_event_scores_without_history(store):
    scorer = scorer_of(store, max_len=1)
    assert scorer.max_events == 0
    same(scorer.score(scorer.history(2), CANDIDATES, LATE), scorer.score(scorer.history(2, 0), CANDIDATES, LATE))


def test_spare_rows_do_not_leak(store):
    scorer = scorer_of(store, micro_batch=3)
    whole = scorer.history(2)
    cache = scorer.encode(whole[:5])
    expected = scorer.score(cache, CANDIDATES), scorer.score(whole, CANDIDATES)
    for tensor in (*cache.keys, *cache.values):
        tensor[cache.length :] = float("nan")
    cache.times[cache.length :] = -1
    same(scorer.score(cache, CANDIDATES), expected[0])
    same(scorer.score(scorer.extend(cache, whole[5:]), CANDIDATES), expected[1])


def test_histories_join_with_the_event_features_that_one_of_them_lacks(store):
    scorer = scorer_of(store)
    whole = scorer.history(2)
    bare = dataclasses.replace(whole[5:], event_values={})
    joined = whole[:5] + bare
    np.testing.assert_array_equal(joined.event_values["tab"], [*whole.event_values["tab"][:5], 0, 0, 0, 0])
    same(scorer.score(scorer.extend(scorer.encode(whole[:5]), bare), CANDIDATES), scorer.score(joined, CANDIDATES))


def test_caches_of_many_users_in_a_store(store):
    scorer, caches = scorer_of(store), CacheStore(1.0)
    for user in (0, 2, 4):
        caches.put(user, scorer.encode(scorer.history(user)))
    for user in (4, 0, 2):
        same(scorer.score(caches.get(user), CANDIDATES), scorer.score(scorer.history(user), CANDIDATES))
    assert (caches.hits, caches.misses, len(caches)) == (3, 0, 3)


# What is refused, and what is defined


def test_no_candidates_have_no_scores(store):
    tasks = {**TASKS, "class": TaskConfig("rating", kind="multiclass", levels=[1, 2, 3])}
    scorer = scorer_of(store, tasks=tasks)
    for found in (scorer.score(scorer.history(2), []), scorer.score_plain(scorer.history(2), np.array([], int))):
        shapes = {task: x.shape for task, x in found.items()}
        assert shapes == {"click": (0,), "rating": (0, 3), "watch": (0,), "class": (0, 3)}
    some = scorer.score(scorer.history(2), [3, 4])
    assert {task: x.shape for task, x in some.items()} == {
        "click": (2,), "rating": (2, 3), "watch": (2,), "class": (2, 3),
    }  # fmt: skip
    assert all(x.dtype == np.float32 for x in some.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": [0, 3]}, r"candidates holds item 0: expected 1..20"),
        ({"candidates": [3, 21]}, r"candidates holds item 21: expected 1..20"),
        ({"candidates": [1.0, 2.0]}, r"candidates: expected integers \[n\], got float64 \[2\]"),
        ({"candidates": [[1, 2]]}, r"candidates: expected integers \[n\], got int64 \[1, 2\]"),
        ({"candidates": ["1"]}, r"candidates: expected integers"),
        ({"candidates": [True]}, r"candidates: expected integers"),
        ({"request_time": 5}, r"request_time=5: expected no earlier than the last event, 1000"),
        ({"event_values": {"tab": np.array([1])}}, r"event_values tab \[1\]: expected \[2\] of tab"),
        ({"event_values": {"colour": np.array([1, 1])}}, r"event_values colour \[2\]: expected \[2\] of tab"),
        ({"event_values": {"tab": np.array([1, 99])}}, r"event_values tab: expected codes 0..\d, got 1..99"),
    ],
    ids=["padding", "unknown", "floats", "2-d", "text", "bools", "too early", "length", "name", "code"],
)
def test_bad_requests(store, arguments, message):
    scorer = scorer_of(store)
    values = {"candidates": [3, 4], **arguments}
    for score, history in ((scorer.score, scorer.encode(scorer.history(2))), (scorer.score_plain, scorer.history(2))):
        with pytest.raises(ValueError, match=message):
            score(history, **values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_ids": np.array([1, 2, 21])}, r"history holds item 21: expected 1..20"),
        ({"item_ids": np.array([1.0, 2.0, 3.0])}, r"history: expected integers"),
        ({"timestamps": np.array([3, 2, 1])}, r"history: expected times that do not descend"),
        ({"timestamps": np.array([3])}, r"timestamps: expected \[3\], got \[1\]"),
        ({"action_bits": np.zeros((3, 2), bool)}, r"action_bits: expected \[3, \d+\], got \[3, 2\]"),
        ({"event_values": {"tab": np.array([7])}}, r"event_values tab \[1\]: expected \[3\]"),
    ],
    ids=["unknown", "floats", "order", "times", "bits", "features"],
)
def test_bad_histories(store, changes, message):
    scorer = scorer_of(store)
    history = dataclasses.replace(scorer.history(4), **changes)
    with pytest.raises(ValueError, match=message):
        scorer.encode(history)


def test_events_before_the_last_one_are_refused(store):
    scorer = scorer_of(store)
    whole = scorer.history(2)
    with pytest.raises(ValueError, match="events begin at .*, before the last one"):
        scorer.extend(scorer.encode(whole[:5]), whole[2:3])


def test_a_cache_of_another_model_or_of_other_weights_is_refused(store):
    scorer = scorer_of(store)
    cache = scorer.encode(scorer.history(2))
    same(scorer_of(store).score(cache, CANDIDATES), scorer.score(cache, CANDIDATES))  # the same model, loaded again
    others = (scorer_of(store, seed=1), scorer_of(store, window=3), scorer_of(store, divisor="row_count"))
    for other in others:
        message = f"cache: made by model version {scorer.version}, this model is {other.version}"
        for call in (lambda one: one.score(cache, CANDIDATES), lambda one: one.extend(cache, scorer.history(2)[:0])):
            with pytest.raises(ValueError, match=message):
                call(other)


def test_models_that_cannot_be_cached(store):
    with pytest.raises(UserError, match="model.divisor=max_len: outputs depend on the batch"):
        scorer_of(store, divisor="max_len")
    config = config_of(ranking_config())
    config = dataclasses.replace(config, model=TransformerConfig(dim=8, ffn_dim=8, max_len=6))
    data = RankingData(store, config.ranking)
    with pytest.raises(UserError, match="model.name=transformer: only hstu models keep keys and values") as raised:
        Scorer(config, data, RankingModel(config.model, config.ranking, data))
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="micro_batch=0: expected >= 1"):
        scorer_of(store, micro_batch=0)


def test_users_outside_the_store(store):
    with pytest.raises(UserError, match=r"user=5: expected a user row 0..4"):
        scorer_of(store).history(5)


def test_a_history_knows_its_events(store):
    history = scorer_of(store).history(2)
    assert isinstance(history, History) and len(history) == 9 and history.user == 2
    np.testing.assert_array_equal(history.item_ids, store.item_ids[store.offsets[2] : store.offsets[3]])
    assert len(scorer_of(store).history(2, 4)) == 4 and len(scorer_of(store).history(2, 99)) == 9
