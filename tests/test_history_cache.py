"""Caches of keys and values: what they keep, how they grow, when they are refused, how a store of them is limited.

Legend: n tokens of the history, r new tokens.
"""

import copy
import dataclasses

import pytest
import torch

from hstu.config import BiasConfig, FuXiLinearConfig, HSTUConfig, SASRecConfig, TransformerConfig
from hstu.errors import UserError
from hstu.history_cache import SPARE_ROWS, CachedEncoder, CacheStore, model_version
from hstu.model.encoder import Layout, make_encoder
from tests.oracle import assert_close, assert_zero_fails

CONFIG = HSTUConfig(dim=8, num_blocks=2, num_heads=2, qk_dim=3, v_dim=5, max_len=200, extra_slots=2)


def encoder_of(seed=0, **changes):
    """An HSTU whose weights are large enough for the history to matter."""
    torch.manual_seed(seed)
    encoder = make_encoder(dataclasses.replace(CONFIG, **changes)).eval()
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.5)
    return encoder


def cached(encoder, contextual=0):
    return CachedEncoder(encoder, model_version(encoder, contextual), contextual)


def tokens_of(n, seed=1):
    """Tokens [n, D], their times and the times of their requests."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 10**5, (n,), generator=generator).cumsum(0)
    return torch.randn(n, CONFIG.dim, generator=generator), times, times + 30


def plain(encoder, x, times, requests, num_targets=None, contextual=0):
    """Outputs of one pass over all tokens."""
    targets = None if num_targets is None else torch.tensor([num_targets])
    layout = Layout(torch.tensor([0, len(x)]), len(x), times, requests, targets, contextual)
    with torch.inference_mode():
        return encoder(x, encoder.plan_tokens(layout), None)


def compare(encoder, got, *arguments, rows):
    """``got`` against the plain pass in both precisions."""
    x, *rest = arguments
    truth = plain(copy.deepcopy(encoder).double(), x.double(), *rest)[rows]
    assert_close("outputs", got, plain(encoder, x, *rest)[rows], truth)
    assert_zero_fails("outputs", got, plain(encoder, x, *rest)[rows], truth)


APPENDED = {
    "bias": {}, "window": {"window": 4}, "row count": {"divisor": "row_count"},
    "per head": {"bias": BiasConfig(per_head=True)}, "power law": {"bias": BiasConfig(time_kind="power_law")},
    "position only": {"bias": BiasConfig(time=False)}, "time only": {"bias": BiasConfig(position=False)},
    "no bias": {"bias": BiasConfig(position=False, time=False)},
    "own times": {"bias": BiasConfig(request_time=False)},
}  # fmt: skip


@pytest.mark.parametrize("changes", APPENDED.values(), ids=APPENDED)
@pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1, 1, 1), (3, 4), (6, 0, 1), (7,)], ids=str)
def test_appended_in_parts_is_one_pass(changes, parts):
    encoder = encoder_of(**changes)
    x, times, requests = tokens_of(sum(parts))
    one, found, at = cached(encoder), [], 0
    cache = one.empty()
    for size in parts:
        part = slice(at, at + size)
        found.append(one.append(cache, x[part], times[part], requests[part]))
        at += size
    assert cache.length == 7
    compare(encoder, torch.cat(found), x, times, requests, rows=slice(None))


@pytest.mark.parametrize("targets", [False, True], ids=["next tokens", "targets"])
@pytest.mark.parametrize("new", [3, SPARE_ROWS + 3], ids=["spare rows", "workspace"])
def test_peeking_leaves_the_cache_as_it_was(targets, new):
    encoder = encoder_of()
    x, times, requests = tokens_of(9 + new)
    one = cached(encoder)
    cache = one.empty()
    one.append(cache, x[:9], times[:9], requests[:9])
    size, rows = cache.num_bytes, [k[:9].clone() for k in (*cache.keys, *cache.values)]
    for _ in range(2):  # the second time what the first one left behind lies in the rows
        got = one.peek(cache, x[9:], times[9:], requests[9:], targets=targets)
        compare(encoder, got, x, times, requests, new if targets else None, rows=slice(9, None))
    assert (cache.length, cache.num_bytes) == (9, size)
    assert all(torch.equal(a[:9], b) for a, b in zip((*cache.keys, *cache.values), rows, strict=True))
    got = one.append(cache, x[9:], times[9:], requests[9:])
    compare(encoder, got, x, times, requests, rows=slice(9, None))


def test_the_workspace_of_one_user_does_not_reach_the_next():
    encoder = encoder_of()
    one, caches = cached(encoder), []
    for n in (30, 9):
        x, times, requests = tokens_of(n, seed=n)
        caches.append(one.empty())
        one.append(caches[-1], x, times, requests)
    new, new_times, _ = tokens_of(SPARE_ROWS, seed=3)
    new_times = new_times + 10**8
    alone = cached(encoder).peek(caches[1], new, new_times, targets=True)
    one.peek(caches[0], new, new_times, targets=True)
    torch.testing.assert_close(one.peek(caches[1], new, new_times, targets=True), alone, rtol=0, atol=0)


def test_spare_rows_are_never_read():
    encoder = encoder_of()
    x, times, requests = tokens_of(9)
    one = cached(encoder)
    cache = one.empty()
    one.append(cache, x[:7], times[:7], requests[:7])
    for tensor in (*cache.keys, *cache.values):
        tensor[7:] = float("nan")
    cache.times[7:] = torch.iinfo(torch.int64).max
    got = one.peek(cache, x[7:], times[7:], requests[7:], targets=True)
    compare(encoder, got, x, times, requests, 2, rows=slice(7, None))
    got = one.append(cache, x[7:], times[7:], requests[7:])
    compare(encoder, got, x, times, requests, rows=slice(7, None))


def test_growth_keeps_what_is_there_and_counts_bytes():
    one = cached(encoder_of())
    cache = one.empty()
    row_bytes = 8 + 2 * 2 * (3 + 5) * 4  # a time; 2 layers, 2 heads, keys of 3 and values of 5 float32
    assert cache.num_bytes == SPARE_ROWS * row_bytes
    x, times, _ = tokens_of(SPARE_ROWS + 10)
    one.append(cache, x[:SPARE_ROWS], times[:SPARE_ROWS])
    before = cache.keys[1].clone()
    assert cache.capacity == SPARE_ROWS
    one.append(cache, x[SPARE_ROWS:], times[SPARE_ROWS:])
    assert cache.capacity == 2 * SPARE_ROWS + 10 and cache.num_bytes == cache.capacity * row_bytes
    assert torch.equal(cache.keys[1][:SPARE_ROWS], before)


# Refusals


@pytest.mark.parametrize(
    ("changes", "contextual", "appends"),
    [({}, 0, True), ({"window": 4}, 0, True), ({"window": 4, "full_rows": 2}, 0, False), ({}, 2, False)],
    ids=["causal", "window", "semi-local", "contextual"],
)
def test_appending_needs_that_earlier_tokens_do_not_see_later_ones(changes, contextual, appends):
    one = cached(encoder_of(**changes), contextual)
    assert one.appends is appends
    x, times, _ = tokens_of(3)
    cache = one.empty()
    one.append(cache, x[:2], times[:2])
    if appends:
        one.append(cache, x[2:], times[2:])
        return
    with pytest.raises(ValueError, match="earlier tokens of this model see later ones; encode the whole history again"):
        one.append(cache, x[2:], times[2:])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SASRecConfig(dim=8), r"^model.name=sasrec: only hstu models keep keys and values of a history$"),
        (TransformerConfig(dim=8), r"^model.name=transformer: only hstu models keep keys and values of a history$"),
        (FuXiLinearConfig(dim=16), r"^model.name=fuxi_linear: only hstu models keep keys and values of a history$"),
        (dataclasses.replace(CONFIG, divisor="max_len"), r"^model.divisor=max_len: outputs depend on the batch"),
    ],
    ids=["sasrec", "transformer", "fuxi_linear", "max_len"],
)
def test_encoders_that_cannot_be_cached(config, message):
    with pytest.raises(UserError, match=message) as raised:
        CachedEncoder(make_encoder(config), "v")
    assert "\n" not in str(raised.value)


def test_a_history_beyond_the_positions_is_refused():
    one = cached(encoder_of(max_len=4, extra_slots=1))
    x, times, _ = tokens_of(6)
    cache = one.empty()
    one.append(cache, x[:4], times[:4])
    assert len(one.peek(cache, x[4:], times[4:], targets=True)) == 2  # targets share one position
    with pytest.raises(ValueError, match="cache: 6 tokens, the model has positions for 5"):
        one.append(cache, x[4:], times[4:])
    assert cache.length == 4


# Versions


def test_a_version_is_of_weights_and_settings():
    encoder = encoder_of()
    version = model_version(encoder, "a")
    assert version == model_version(copy.deepcopy(encoder), "a") and len(version) == 16
    assert version != model_version(encoder, "b")
    encoder.layers[1].out_bias.data[3] += 1e-3
    assert version != model_version(encoder, "a")


def test_a_cache_of_another_model_is_refused():
    old, new = cached(encoder_of(seed=0)), cached(encoder_of(seed=1))
    x, times, _ = tokens_of(2)
    cache = old.empty()
    old.append(cache, x, times)
    message = f"cache: made by model version {old.version}, this model is {new.version}; encode the history again"
    for call in (new.append, new.peek):
        with pytest.raises(ValueError, match=message):
            call(cache, x, times)


# The store


@pytest.fixture
def caches():
    """Three caches of one size, and that size in MiB."""
    one = cached(encoder_of())
    found = [one.empty() for _ in range(3)]
    return found, found[0].num_bytes / 2**20


def test_the_store_drops_the_least_recently_used(caches):
    (a, b, c), mib = caches
    store = CacheStore(2 * mib)
    store.put("a", a)
    store.put("b", b)
    assert store.get("a") is a  # now b is the one used longest ago
    store.put("c", c)
    assert (store.get("a"), store.get("b"), store.get("c")) == (a, None, c)
    assert (len(store), store.num_bytes) == (2, 2 * a.num_bytes)
    assert (store.hits, store.misses, store.evictions) == (3, 1, 1)


def test_the_store_counts_a_cache_again_when_it_has_grown(caches):
    (a, b, _), mib = caches
    store = CacheStore(3 * mib)
    store.put("a", a)
    store.put("b", b)
    b.reserve(SPARE_ROWS + 1)  # more than twice the size
    store.put("b", b)
    assert store.get("a") is None and store.get("b") is b
    assert store.num_bytes == b.num_bytes and store.evictions == 1


def test_a_cache_larger_than_the_limit_is_not_kept_and_drops_no_other(caches):
    (a, b, _), mib = caches
    store = CacheStore(1.5 * mib)
    store.put("a", a)
    b.reserve(SPARE_ROWS + 1)
    store.put("b", b)
    assert store.get("a") is a and store.get("b") is None and store.evictions == 1
    a.reserve(SPARE_ROWS + 1)
    store.put("a", a)  # outgrew the limit: the old entry goes too
    assert (len(store), store.num_bytes) == (0, 0)


def test_dropping_and_limits(caches):
    (a, *_), mib = caches
    store = CacheStore(mib)
    store.put("a", a)
    store.drop("a")
    store.drop("nobody")
    assert (len(store), store.num_bytes, store.evictions) == (0, 0, 0)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="max_mib=.*expected > 0"):
            CacheStore(wrong)
