"""A synthetic log with planted structure whose true next-item distribution is known exactly.

``docs/synthetic.md`` describes the process in words and formulas. In short: inside a session the next item
follows the items just seen; after a long gap the user starts from the long-term taste (a latent cluster that
drifts) or repeats what was done about a week before. How often a user repeats is a latent level. The two latent
variables take few values, so forward filtering sums them out and :meth:`SyntheticProcess.next_item_probs`
is exact: no sampling, no approximation.

Every random number is a uniform double of PCG64, turned into other distributions here, so that a seed gives
the same log with every numpy version.

Shapes: ``U`` users, ``M`` requests, ``T`` padded history, ``C`` clusters, ``R`` repeat levels, ``S`` successors.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hstu.errors import UserError

if TYPE_CHECKING:
    from hstu.config import DataConfig
    from hstu.data.splits import Targets
    from hstu.data.store import SequenceStore

DAY_S = 86_400.0
START_S = 1_600_000_000  # first possible event, 13 September 2020
MIN_LONG_GAP_S = 3 * 3600
MIN_ITEMS = 20
TINY = 1e-300  # keeps 0 / 0 at 0


class Events(NamedTuple):
    """A log in the order of the sequence store: user by user, ascending in time."""

    offsets: np.ndarray  # int64 [U+1]
    item_ids: np.ndarray  # int32 [E], 1..num_items
    timestamps: np.ndarray  # int64 [E], s


@dataclass(frozen=True)
class SyntheticProcess:
    """The generative process. The tables and the log are functions of the fields alone."""

    num_items: int = 200
    num_users: int = 3000
    synthetic_seed: int = 0

    # Items
    items_per_cluster: int = 20
    item_popularity_exponent: float = 1.2
    """Inside a cluster the item of rank r (0 first) has popularity 1 / (r + 1) ** exponent."""
    cluster_popularity_exponent: float = 0.5
    num_successors: int = 5
    """Items that an item leads to in particular."""
    successor_decay: float = 0.7
    """A successor is this much less likely than the one before it."""
    same_cluster_successors: float = 0.2
    """Share of an item's successors that are of its own cluster."""

    # Times
    mean_events: float = 50.0
    min_events: int = 12
    max_events: int = 60
    mean_session_events: float = 3.0
    session_gap_s: int = 1800
    """A longer gap starts a new session."""
    short_gap_median_s: float = 90.0
    long_gap_median_s: float = 1.0 * DAY_S
    long_gap_sigma: float = 0.7
    """Standard deviation of ln(gap between sessions)."""

    # Inside a session
    context_items: int = 3
    """The next item follows from one of this many last items of the session ..."""
    context_decay: float = 1.0
    """... an item one place older being this much less likely to be the one."""
    session_taste: float = 0.05
    """Probability that an item inside a session comes from the taste instead."""
    session_repeat: float = 0.7
    """Times the user's repeat level: probability that an item inside a session repeats one from before its last."""

    # After a long gap
    taste_life_s: float = 20 * DAY_S
    """Over a gap the taste stays with probability exp(-gap / life), else it moves to a neighbouring cluster."""
    repeat_levels: tuple[float, ...] = (0.2, 0.6, 0.95)
    """Repeat intensity of a user: one of these, equally likely."""
    rhythm_s: float = 7 * DAY_S
    """A repeat goes to an event of about this age ..."""
    rhythm_sigma: float = 0.25
    """... with weight exp(-(ln(age / rhythm) / sigma)**2 / 2)."""
    rhythm_offset: float = 0.1
    """Weight of finding nothing to repeat."""

    noise: float = 0.02
    """Probability of an item drawn uniformly, at any event."""

    def __post_init__(self) -> None:
        if self.num_items < MIN_ITEMS:
            raise UserError(f"data.num_items={self.num_items}: the synthetic log needs at least {MIN_ITEMS}")
        if self.num_users < 1:
            raise UserError(f"data.num_users={self.num_users}: expected >= 1")
        if self.synthetic_seed < 0:
            raise UserError(f"data.synthetic_seed={self.synthetic_seed}: expected >= 0")

    # ---------------------------------------------------------------- tables

    @property
    def num_clusters(self) -> int:
        return max(2, round(self.num_items / self.items_per_cluster))

    @cached_property
    def _layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cluster-major order of the items [I] (ids from 0), first place of each cluster [C+1], cluster of item [I]."""
        order = np.argsort(_rng(self.synthetic_seed, 0).random(self.num_items), kind="stable")
        starts = np.arange(self.num_clusters + 1) * self.num_items // self.num_clusters
        clusters = np.empty(self.num_items, np.int64)
        clusters[order] = np.repeat(np.arange(self.num_clusters), np.diff(starts))
        return order, starts, clusters

    @property
    def clusters(self) -> np.ndarray:
        """int64 [num_items]. Cluster of item id i+1."""
        return self._layout[2]

    @cached_property
    def ranks(self) -> np.ndarray:
        """int64 [num_items]. Popularity rank of item id i+1 inside its cluster, 0 the most popular."""
        order, starts, clusters = self._layout
        ranks = np.empty(self.num_items, np.int64)
        ranks[order] = np.arange(self.num_items) - starts[clusters[order]]
        return ranks

    @cached_property
    def cluster_probs(self) -> np.ndarray:
        """float64 [C]. First taste of a user."""
        weights = np.arange(1.0, self.num_clusters + 1) ** -self.cluster_popularity_exponent
        return weights / weights.sum()

    @cached_property
    def taste_probs(self) -> np.ndarray:
        """float64 [num_items]. Probability of item id i+1 given that its cluster is the taste."""
        weights = (self.ranks + 1.0) ** -self.item_popularity_exponent
        return weights / np.bincount(self.clusters, weights)[self.clusters]

    @cached_property
    def successors(self) -> np.ndarray:
        """int64 [num_items, S]. Items (from 0) that follow item i+1 in a session, the likeliest first."""
        order, starts, clusters = self._layout
        rng = _rng(self.synthetic_seed, 1)
        sizes = np.diff(starts)
        num_inside = min(round(self.num_successors * self.same_cluster_successors), int(sizes.min()) - 1)
        num_outside = min(self.num_successors - num_inside, self.num_clusters - 1)
        # Inside: members of the own cluster, itself excluded. The smallest keys are a draw without replacement.
        members = np.arange(sizes.max())
        keys = -np.log1p(-rng.random((self.num_items, len(members)))) * (members + 1.0) ** self.item_popularity_exponent
        keys[(members >= sizes[clusters][:, None]) | (members == self.ranks[:, None])] = np.inf
        inside = order[starts[clusters][:, None] + np.argsort(keys, axis=1, kind="stable")[:, :num_inside]]
        # Outside: one member each of as many other clusters.
        shift = 1 + np.argsort(rng.random((self.num_items, self.num_clusters - 1)), axis=1, kind="stable")
        other = (clusters[:, None] + shift[:, :num_outside]) % self.num_clusters
        outside = self.draw_in_cluster(other.ravel(), rng.random(other.size)).reshape(other.shape)
        both = np.concatenate([inside, outside], axis=1)
        return np.take_along_axis(both, np.argsort(rng.random(both.shape), axis=1, kind="stable"), axis=1)

    @cached_property
    def successor_probs(self) -> np.ndarray:
        """float64 [S]. Probability of the first, second, ... successor."""
        weights = self.successor_decay ** np.arange(self.successors.shape[1])
        return weights / weights.sum()

    def fingerprint(self) -> str:
        """Short hash of the drawn tables: tells a store made by another version of the process."""
        return hashlib.sha256(self.clusters.tobytes() + self.successors.tobytes()).hexdigest()[:16]

    # ---------------------------------------------------------------- the log

    def _times(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths [U] and timestamps [U, T] s; they do not depend on the items."""
        rng = _rng(self.synthetic_seed, 2)
        spread = self.mean_events - self.min_events
        lengths = self.min_events + np.floor(-np.log1p(-rng.random(self.num_users)) * spread)
        lengths = np.minimum(lengths, self.max_events).astype(np.int64)
        shape = (self.num_users, self.max_events)
        new_session = rng.random(shape) < 1 / self.mean_session_events
        short = np.clip(self.short_gap_median_s * np.exp(_normal(rng, shape)), 5, self.session_gap_s - 1)
        long = self.long_gap_median_s * np.exp(self.long_gap_sigma * _normal(rng, shape))
        gaps = np.where(new_session, np.maximum(long, MIN_LONG_GAP_S), short)
        gaps[:, 0] = rng.random(self.num_users) * 60 * DAY_S
        return lengths, START_S + np.cumsum(gaps.astype(np.int64), axis=1)

    def generate(self) -> Events:
        """The log of ``num_users`` users."""
        lengths, times = self._times()
        rng = _rng(self.synthetic_seed, 3)
        items = np.zeros((self.num_users, self.max_events), np.int64)
        taste = _draw(self.cluster_probs, rng.random(self.num_users))
        level = np.asarray(self.repeat_levels)[_draw(np.full(len(self.repeat_levels), 1.0), rng.random(self.num_users))]
        history = _History(self, items, times)
        for t in range(self.max_events):
            u = np.flatnonzero(lengths > t)
            draws = rng.random((8, self.num_users))[:, u]
            new_session, gaps = history.is_new_session(u, t), history.gaps(u, t)
            moved = new_session & (t > 0) & (draws[0] >= np.exp(-gaps / self.taste_life_s))
            step = np.where(draws[1] < 0.5, 1, -1)
            taste[u] = np.where(moved, (taste[u] + step) % self.num_clusters, taste[u])

            taste_share, repeat_share = history.shares(u, t, level[u])
            from_taste = self.draw_in_cluster(taste[u], draws[2])
            repeated = history.draw_repeat(u, t, draws[3])
            following = history.draw_following(u, t, draws[4], draws[5])
            item = np.where(draws[6] < taste_share + repeat_share, repeated, following)
            item = np.where(draws[6] < taste_share, from_taste, item)
            is_noise = draws[7] < self.noise
            item = np.where(is_noise, (draws[7] / self.noise * self.num_items).astype(np.int64) % self.num_items, item)
            items[u, t] = item
        mask = np.arange(self.max_events) < lengths[:, None]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Events(offsets, (items[mask] + 1).astype(np.int32), times[mask])

    def draw_in_cluster(self, clusters: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Item [U] (from 0) drawn by popularity inside each of ``clusters`` [U]."""
        order, starts, _ = self._layout
        sizes = np.diff(starts)
        total = np.cumsum(np.arange(1.0, sizes.max() + 1) ** -self.item_popularity_exponent)
        rank = np.searchsorted(total, uniform * total[sizes[clusters] - 1], side="right")
        return order[starts[clusters] + np.minimum(rank, sizes[clusters] - 1)]

    # ---------------------------------------------------------------- the truth

    def next_item_probs(
        self,
        offsets: np.ndarray,
        item_ids: np.ndarray,
        timestamps: np.ndarray,
        request_times: np.ndarray,
        chunk_size: int = 512,
    ) -> Iterator[np.ndarray]:
        """True p(next item | history, request time), float64 [chunk, num_items], column i being item id i+1.

        offsets: [M+1] int64. Request m has the history rows offsets[m] .. offsets[m+1]; it may be empty.
        item_ids: [L] int, 1..num_items.  timestamps: [L] int64, s, ascending inside a history.
        request_times: [M] int64, s. When the next event happens.
        chunk_size: requests per yielded array.
        """
        lengths = np.diff(offsets)
        for begin in range(0, len(request_times), chunk_size):
            end = min(begin + chunk_size, len(request_times))
            width = int(lengths[begin:end].max(initial=0))
            slots = np.arange(width + 1)
            used = slots[None, :] < lengths[begin:end, None]  # [M, T+1]
            rows = np.minimum(offsets[begin:end, None] + slots, max(len(item_ids) - 1, 0))
            items = np.where(used, np.asarray(item_ids)[rows], 1).astype(np.int64) - 1 if width else np.zeros_like(rows)
            times = np.where(used, np.asarray(timestamps)[rows], 0) if width else np.zeros_like(rows)
            np.put_along_axis(times, lengths[begin:end, None], request_times[begin:end, None], axis=1)
            yield self._predict(items, times, lengths[begin:end])

    def _predict(self, items: np.ndarray, times: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Forward filter over (taste, repeat level), then the predictive distribution at place ``lengths``.

        items: [M, T+1] int64 from 0.  times: [M, T+1] s, at place ``lengths`` the request time.
        """
        num = len(lengths)
        levels = np.asarray(self.repeat_levels)
        history = _History(self, items, times)
        belief = np.tile(self.cluster_probs[:, None] / len(levels), (num, 1, len(levels)))  # [M, C, R]
        out = np.empty((num, self.num_items))
        for t in range(int(lengths.max(initial=0)) + 1):
            u = np.flatnonzero(lengths >= t)
            new_session = history.is_new_session(u, t)
            prior = belief[u]
            if t > 0:
                stay = np.exp(-history.gaps(u, t) / self.taste_life_s)
                stay = np.where(new_session, stay, 1.0)[:, None, None]
                neighbours = (np.roll(prior, 1, axis=1) + np.roll(prior, -1, axis=1)) / 2
                prior = stay * prior + (1 - stay) * neighbours
            taste, repeat = history.shares(u[:, None], t, levels[None, :])  # [u, R]
            taste, repeat = (1 - self.noise) * taste, (1 - self.noise) * repeat
            follow = 1 - self.noise - taste - repeat

            last = lengths[u] == t
            if last.any():
                of_cluster = np.einsum("ucr,ur->uc", prior[last], taste[last])
                of_level = prior[last].sum(axis=1)  # [u, R]
                probs = of_cluster[:, self.clusters] * self.taste_probs + self.noise / self.num_items
                parts = [(of_level * share[last]).sum(axis=1) for share in (repeat, follow)]
                out[u[last]] = history.add_items(probs, u[last], t, *parts)
            go = ~last
            if go.any():
                u, item, prior = u[go], items[u[go], t], prior[go]
                repeated, following = history.probs_of(u, t, item)
                like = repeat[go] * repeated[:, None] + follow[go] * following[:, None] + self.noise / self.num_items
                post = prior * like[:, None, :]
                rows, cluster = np.arange(len(u)), self.clusters[item]
                post[rows, cluster] += prior[rows, cluster] * taste[go] * self.taste_probs[item][:, None]
                belief[u] = post / post.sum(axis=(1, 2), keepdims=True)
        return out


class _History:
    """What the observed past of users says about the event at place ``t``: gap, successors, repeats.

    items: [U, T] int64 from 0; times: [U, T] s. Only places before ``t`` are read of items, up to ``t`` of times.
    """

    def __init__(self, process: SyntheticProcess, items: np.ndarray, times: np.ndarray) -> None:
        self.process, self.items, self.times = process, items, times
        starts = np.diff(times, axis=1, prepend=times[:, :1]) > process.session_gap_s
        self.session = np.cumsum(starts, axis=1)  # [U, T] number of the session, from 0

    def gaps(self, u: np.ndarray, t: int) -> np.ndarray:
        """Seconds since the event before [u]; zero at the first event."""
        return (self.times[u, t] - self.times[u, t - 1]).astype(np.float64) if t else np.zeros(len(u))

    def is_new_session(self, u: np.ndarray, t: int) -> np.ndarray:
        return self.session[u, t] > self.session[u, t - 1] if t else np.ones(len(u), bool)

    def context(self, u: np.ndarray, t: int) -> np.ndarray:
        """Probability [u, context_items] that the next item succeeds the last, the last but one, ... item."""
        depth = min(self.process.context_items, t)
        parents = t - 1 - np.arange(depth)
        same = self.session[u[:, None], parents] == self.session[u, t - 1 : t]
        weights = same * self.process.context_decay ** np.arange(depth)
        return weights / np.maximum(weights.sum(axis=1, keepdims=True), TINY)

    def repeat_weights(self, u: np.ndarray, t: int) -> np.ndarray:
        """Weight [u, t] of each earlier event as the one that is repeated."""
        p = self.process
        age = np.maximum(self.times[u, t][:, None] - self.times[u, :t], 1)
        rhythm = np.exp(-0.5 * (np.log(age / p.rhythm_s) / p.rhythm_sigma) ** 2)
        in_session = self.session[u, :t] == self.session[u, t - 1 : t]
        in_session[:, -1:] = False  # not the last item again
        return np.where(self.is_new_session(u, t)[:, None], rhythm, in_session)

    def shares(self, u: np.ndarray, t: int, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities, noise apart, that the event comes from the taste and that it repeats; else it follows.

        u and level: of shapes that broadcast together, [u] and [u] or [u, 1] and [1, R].
        """
        p = self.process
        flat = u.reshape(-1)
        new_session = self.is_new_session(flat, t).reshape(u.shape)
        total = self.repeat_weights(flat, t).sum(axis=1).reshape(u.shape)
        after_gap = level * total / (total + p.rhythm_offset)
        inside = (1 - p.session_taste) * p.session_repeat * level * (total > 0)
        return np.where(new_session, 1 - after_gap, p.session_taste), np.where(new_session, after_gap, inside)

    def draw_repeat(self, u: np.ndarray, t: int, uniform: np.ndarray) -> np.ndarray:
        return self.items[u, _draw(self.repeat_weights(u, t), uniform)] if t else np.zeros(len(u), np.int64)

    def draw_following(self, u: np.ndarray, t: int, pick: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        if t == 0:
            return np.zeros(len(u), np.int64)
        parents = self.items[u, t - 1 - _draw(self.context(u, t), pick)]
        return self.process.successors[parents, _draw(self.process.successor_probs, uniform)]

    def probs_of(self, u: np.ndarray, t: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probability [u] of ``item`` given that it repeats, and given that it follows."""
        if t == 0:
            return np.zeros(len(u)), np.zeros(len(u))
        p = self.process
        weights = self.repeat_weights(u, t)
        same = self.items[u, :t] == item[:, None]
        repeated = (weights * same).sum(axis=1) / np.maximum(weights.sum(axis=1), TINY)
        context = self.context(u, t)
        parents = self.items[u, t - 1 :: -1][:, : context.shape[1]]  # the last item first
        hit = p.successors[parents] == item[:, None, None]  # [u, context, S]
        return repeated, ((hit * p.successor_probs).sum(axis=2) * context).sum(axis=1)

    def add_items(self, probs: np.ndarray, u: np.ndarray, t: int, repeat: np.ndarray, follow: np.ndarray) -> np.ndarray:
        """Adds the same two distributions over all items, times ``repeat`` [u] and ``follow`` [u], to ``probs``."""
        if t == 0:
            return probs
        p = self.process
        rows = np.arange(len(u))[:, None]
        weights = self.repeat_weights(u, t)
        np.add.at(probs, (rows, self.items[u, :t]), weights * (repeat / np.maximum(weights.sum(axis=1), TINY))[:, None])
        context = self.context(u, t) * follow[:, None]
        for age in range(context.shape[1]):
            np.add.at(
                probs, (rows, p.successors[self.items[u, t - 1 - age]]), context[:, age, None] * p.successor_probs
            )
        return probs


# -------------------------------------------------------------------- store and oracle


def write_synthetic_store(config: DataConfig, path: str | Path) -> SequenceStore:
    """Generates the log of ``config`` and writes it to ``path``, with all that the oracle needs in ``meta.json``.

    Raises UserError for a filter: a log with events taken out no longer has the true distribution it is made for.
    """
    from hstu.data.store import write_store

    allowed = {"min_user_events": 0, "min_item_events": 0, "dedup": "none", "max_events": None, "max_items": None}
    for name, value in allowed.items():
        if getattr(config, name) != value:
            raise UserError(
                f"data.{name}={getattr(config, name)}: the synthetic log takes no filter "
                f"(its true distribution would be lost); leave it at {'null' if value is None else value}"
            )
    process = SyntheticProcess(config.num_items, config.num_users, config.synthetic_seed)
    log = process.generate()
    clusters, ranks = process.clusters, process.ranks
    titles = [f"cluster {c:02d} item {r:03d}" for c, r in zip(clusters.tolist(), ranks.tolist(), strict=True)]
    return write_store(
        path,
        offsets=log.offsets,
        item_ids=log.item_ids,
        timestamps=log.timestamps,
        num_items=process.num_items,
        item_attributes={"title": np.array(titles), "cluster": np.array([f"{c:02d}" for c in clusters.tolist()])},
        meta={
            "name": config.name,
            "source": "synthetic",
            "checksum": None,
            "protocol": config.protocol,  # there are no ties: both protocols are the same log
            "protocol_seed": config.protocol_seed,
            "split": {"kind": config.split, "time": config.split_time},
            "counts": {"items_with_events": len(np.unique(log.item_ids))},
            "synthetic": {"process": dataclasses.asdict(process), "fingerprint": process.fingerprint()},
        },
    )


def process_of(store: SequenceStore) -> SyntheticProcess:
    """The process that ``store`` was drawn from, rebuilt from its ``meta.json`` alone.

    Raises UserError where the store holds another kind of log, or one of another version of the process.
    """
    made = store.meta.get("synthetic")
    if made is None:
        raise UserError(f"{store.path} is no synthetic log: its true next-item distribution is not known")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in made["process"].items()}
    fields = {f.name for f in dataclasses.fields(SyntheticProcess)}
    process = SyntheticProcess(**values) if set(values) == fields else None
    if process is None or process.fingerprint() != made["fingerprint"]:
        raise UserError(
            f"{store.path} was made by another version of the synthetic process: "
            "delete the folder and run hstu-prepare data=synthetic again"
        )
    return process


def oracle_ranks(
    store: SequenceStore, targets: Targets, filter_history: str = "none", max_len: int = 200
) -> np.ndarray:
    """Exact ranks of the targets under the true distribution, float64 [M]. No model reaches better ones on average.

    Rank: 1 + items more likely than the target + half of the other items equally likely.
    filter_history: ``none``, ``truncated`` (the items of the last ``max_len`` events are no candidates) or ``full``.
    The process repeats items, so that ``none`` is the meaningful one; the others are there to match a table.
    """
    from hstu.baselines import expand, seen_range

    process = process_of(store)
    item_ids, times = np.asarray(store.item_ids), np.asarray(store.timestamps)
    users, rows = targets.users, targets.rows
    history, offsets = expand(np.asarray(store.offsets)[users], rows)
    starts, ends = seen_range(store, users, rows, filter_history, max_len)
    ranks, at = np.empty(len(rows)), 0
    for probs in process.next_item_probs(offsets, item_ids[history], times[history], times[rows]):
        m = np.arange(len(probs))
        label = item_ids[rows[at + m]].astype(np.int64) - 1
        target = probs[m, label][:, None]
        seen_rows, seen_offsets = expand(starts[at + m], ends[at + m])
        probs[np.repeat(m, np.diff(seen_offsets)), item_ids[seen_rows].astype(np.int64) - 1] = -1.0
        probs[m, label] = -1.0  # the target is not ranked against itself
        ranks[at + m] = 1 + (probs > target).sum(axis=1) + 0.5 * (probs == target).sum(axis=1)
        at += len(probs)
    return ranks


def oracle_metrics(
    store: SequenceStore, targets: Targets, ks: Sequence[int], filter_history: str = "none", max_len: int = 200
) -> dict[str, float]:
    """HR, NDCG and MRR of :func:`oracle_ranks`: the best that any model can reach on ``targets``."""
    from hstu.metrics import summarize

    return summarize(oracle_ranks(store, targets, filter_history, max_len), ks)


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, stream]))


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers (Box-Muller)."""
    radius = np.sqrt(-2 * np.log1p(-rng.random(shape)))
    return radius * np.cos(2 * np.pi * rng.random(shape))


def _draw(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Index [U] drawn with ``weights`` ([K], or [U, K] one row each); row of zeros: 0."""
    total = np.cumsum(np.broadcast_to(weights, (len(uniform), weights.shape[-1])), axis=1)
    index = (total <= (uniform * total[:, -1])[:, None]).sum(axis=1)
    return np.where(total[:, -1] > 0, np.minimum(index, weights.shape[-1] - 1), 0)
