"""Kept histories of retrieval models: results of the plain pass, and only what is new is encoded."""

import dataclasses

import numpy as np
import pytest

from hstu.config import BiasConfig, FuXiLinearConfig, SASRecConfig, TransformerConfig
from hstu.errors import UserError
from hstu.recommend import Recommender
from tests.serving import NUM_ITEMS, small_config, small_model, small_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("queries") / "store")


def pair(store, **model):
    """A recommender that keeps histories and one that does not, of one model with weights that make history matter.

    Two layers: what the second one makes of an event depends on when the next one happened.
    """
    config = small_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_blocks=2, **model))
    trained = small_model(config, store)
    for parameter in trained.encoder.parameters():
        parameter.data.normal_(std=0.5)
    return Recommender(config, store, trained, "cpu"), Recommender(config, store, trained, "cpu", cache_mib=0)


def same(a, b):
    """The same items in the same order; scores are cosines of order 1, so their noise in float32 is about 1e-6."""
    assert [i.item for i in a.items] == [i.item for i in b.items]
    np.testing.assert_allclose([i.score for i in a.items], [i.score for i in b.items], rtol=0, atol=3e-6)


MODELS = {
    "request time": {}, "own times": {"bias": BiasConfig(request_time=False)}, "window": {"window": 3},
    "row count": {"divisor": "row_count"}, "no bias": {"bias": BiasConfig(position=False, time=False)},
    "power law": {"bias": BiasConfig(time_kind="power_law", per_head=True)}, "not normalised": {"l2_normalize": False},
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_growing_history_event_by_event(store, model):
    """Ten events, the most that the model reads, then more; each time asked an hour and a day later."""
    kept, plain = pair(store, **model)
    items = (np.asarray(store.item_ids[-40:]) + 10).tolist()  # user 1006
    times = np.asarray(store.timestamps[-40:]).tolist()
    for n in range(1, 13):
        for wait_s in (3_600, 86_400):
            request = times[n - 1] + wait_s
            asked = {"history": items[:n], "history_times": times[:n], "request_time": request, "k": NUM_ITEMS}
            if model.get("l2_normalize", True):
                same(kept.recommend(**asked), plain.recommend(**asked))
            else:
                a, b = kept.recommend(**asked).items, plain.recommend(**asked).items
                np.testing.assert_allclose([i.score for i in a], [i.score for i in b], rtol=1e-5, atol=1e-7)
    assert plain.queries is None
    # At 1 event 1, then 1 again; at n events up to 10 the last two of them, then the last one; 10 more in each window
    # that moved, then the last one.
    assert kept.queries.num_encoded == 2 + 9 * (2 + 1) + 2 * (10 + 1)


def test_repeated_requests_of_users(store):
    kept, plain = pair(store)
    for _ in range(2):
        for user in (1000, 1003, 1006, 1004):
            same(kept.recommend(user=user, k=NUM_ITEMS), plain.recommend(user=user, k=NUM_ITEMS))
    assert kept.queries.num_encoded == (10 + 7 + 10 + 1) + 4
    assert (kept.queries.caches.hits, kept.queries.caches.misses) == (4, 4)


def test_the_last_event_is_encoded_for_the_request_that_is_made(store):
    """With a time bias that knows the request time an event's outputs change once its successor has happened."""
    kept, plain = pair(store)
    early = {"history": [11, 12], "history_times": [0, 60], "request_time": 61, "k": NUM_ITEMS}
    late = {"history": [11, 12, 13], "history_times": [0, 60, 10**8], "request_time": 10**9, "k": NUM_ITEMS}
    kept.recommend(**early)
    same(kept.recommend(**late), plain.recommend(**late))
    other = plain.recommend(**late | {"history_times": [0, 60, 61]})
    assert [i.score for i in other.items] != [i.score for i in plain.recommend(**late).items]


@pytest.mark.parametrize(
    ("items", "times", "num_encoded"),
    [
        ([11, 12, 13], [1, 2, 3], 1),  # a prefix: the third is the last one now
        ([11, 12, 20, 14, 15], [1, 2, 3, 4, 5], 4),  # 12's successor is another item
        ([11, 12, 13, 14, 15], [1, 2, 3, 9, 10], 3),  # 13's successor came later
        ([16, 12, 13, 14, 15], [1, 2, 3, 4, 5], 5),  # another beginning is another history
    ],
    ids=["shorter", "another item", "another time", "another beginning"],
)
def test_histories_that_share_a_part(store, items, times, num_encoded):
    kept, plain = pair(store)
    kept.recommend(history=[11, 12, 13, 14, 15], history_times=[1, 2, 3, 4, 5])
    kept.queries.num_encoded = 0
    asked = {"history": items, "history_times": times, "k": NUM_ITEMS}
    same(kept.recommend(**asked), plain.recommend(**asked))
    assert kept.queries.num_encoded == num_encoded


def test_the_limit_of_memory(store):
    _, plain = pair(store)
    small = Recommender(plain.config, store, plain.model, "cpu", cache_mib=0.04)
    users = [1000, 1001, 1002, 1003, 1004, 1006]
    for user in users * 2:
        same(small.recommend(user=user), plain.recommend(user=user))
    caches = small.queries.caches
    assert caches.num_bytes <= 0.04 * 2**20 and caches.evictions > 0 and 0 < len(caches) < len(users)
    with pytest.raises(UserError, match="cache_mib=-1: expected >= 0"):
        Recommender(plain.config, store, plain.model, "cpu", cache_mib=-1)


@pytest.mark.parametrize(
    "model",
    [
        SASRecConfig(dim=8, num_blocks=1, num_heads=1, ffn_dim=8, max_len=10),
        TransformerConfig(dim=8, num_blocks=1, num_heads=1, ffn_dim=8, max_len=10),
        FuXiLinearConfig(dim=16, num_blocks=1, num_heads=1, ffn_dim=8, max_len=10),
        dataclasses.replace(small_config().model, divisor="max_len"),
        dataclasses.replace(small_config().model, window=3, full_rows=2),
    ],
    ids=["sasrec", "transformer", "fuxi_linear", "max_len", "semi-local"],
)
def test_other_models_take_the_plain_way(store, model):
    config = dataclasses.replace(small_config(), model=model)
    recommender = Recommender(config, store, small_model(config, store), "cpu")
    assert recommender.queries is None
    assert recommender.recommend(user=1000).items == recommender.recommend(user=1000).items


def test_the_batch_form_keeps_nothing(store):
    kept, _ = pair(store)
    list(kept.recommend_many(np.array([0, 3, 6]), batch_users=1))
    assert len(kept.queries.caches) == 0
