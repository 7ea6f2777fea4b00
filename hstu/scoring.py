"""Scoring many candidates for one user with a ranking model: M-FALCON.

    scorer = Scorer.load("runs/kuairand-pure/...")
    cache = scorer.encode(scorer.history(user=42))
    scores = scorer.score(cache, candidates)["click"]

Source: Zhai et al. 2024 (arXiv 2402.17152), section 3.4 and appendix H.

Legend: n events of the history, c candidates, m of a micro-batch, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hstu.config import Config
from hstu.data.features import MISSING, Coded
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import Features, make_features
from hstu.errors import UserError
from hstu.history_cache import CachedEncoder, TokenCache, model_version
from hstu.model.encoder import Layout
from hstu.model.ranking import RankingModel
from hstu.transfer import to_device
from kernels.jagged import interleave

REQUEST_GAP_S = 60
"""Without a request time candidates are scored so long after the last event, s."""
SLACK = 4
"""A history that outgrows the model is encoded again without its oldest 1/SLACK, so that it can grow on."""


@dataclass(frozen=True)
class History:
    """What a user did, oldest first."""

    item_ids: np.ndarray
    """[n] int64, 1..num_items."""
    timestamps: np.ndarray
    """[n] int64, s, ascending."""
    action_bits: np.ndarray
    """[n, bits] bool, see :meth:`hstu.data.ranking.RankingData.action_bits`."""
    event_values: dict[str, np.ndarray]
    """[n] codes or numbers of each event feature; one that is left out counts as missing."""
    user: int = -1
    """User row of the store, for the user features; -1: nobody in it."""

    def __len__(self) -> int:
        return len(self.item_ids)

    def __getitem__(self, part: slice) -> History:
        values = {name: column[part] for name, column in self.event_values.items()}
        return History(self.item_ids[part], self.timestamps[part], self.action_bits[part], values, self.user)

    def __add__(self, other: History) -> History:
        """Both, one after the other, of this one's user."""
        pairs = ((self.item_ids, other.item_ids), (self.timestamps, other.timestamps),
                 (self.action_bits, other.action_bits))  # fmt: skip
        items, times, bits = (np.concatenate(pair) for pair in pairs)
        values = {
            name: np.concatenate([_or_missing(self, name, other), _or_missing(other, name, self)])
            for name in self.event_values | other.event_values
        }
        return History(items, times, bits, values, self.user)


def _or_missing(history: History, name: str, other: History) -> np.ndarray:
    """Values of an event feature, or so many missing ones of the kind that the other history has."""
    if name in history.event_values:
        return history.event_values[name]
    is_code = other.event_values[name].dtype.kind in "iu"
    return np.full(len(history), MISSING if is_code else np.nan, np.int64 if is_code else np.float32)


class Scorer:
    """Predictions of every task for candidates, given a history.

    The history is encoded once; candidates are scored in micro-batches against its keys and values, each seeing the
    history and itself. Cached and plain scores agree to the noise of the dtype. With ``model.full_rows`` the candidate
    counts as a target, which sees everything; in training a predicted item of the interleaved form does so only among
    the last rows of its sequence.

    Args:
        config: of the run.
        data: the run's store.
        model: trained.
        device: where to.
        micro_batch: m, candidates at once.

    Raises UserError for a model that is no HSTU, or whose outputs depend on the batch (``model.divisor=max_len``).
    """

    def __init__(
        self, config: Config, data: RankingData, model: RankingModel, device: torch.device | str = "cpu",
        micro_batch: int = 1024,
    ) -> None:  # fmt: skip
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch}: expected >= 1")
        self.config, self.data, self.device, self.micro_batch = config, data, torch.device(device), micro_batch
        self.model = model.to(self.device).eval()
        self.version = model_version(self.model, (model.config, model.ranking))
        contextual = model.num_prefix if model.fused else 0
        self.encoder = CachedEncoder(model.encoder, self.version, contextual)
        self.max_events = config.model.max_len - (0 if model.fused else 1)
        """Most events of a history; interleaved: the candidate is one of the ``model.max_len``, as in training."""

    @classmethod
    def load(cls, run: str | Path, which: str = "best", device: str = "auto", micro_batch: int = 1024) -> Scorer:
        """Of a run folder; which: ``best`` or ``last``."""
        from hstu.evaluate import run_device
        from hstu.runs import load_run

        config, store, model = load_run(run, which)
        if config.ranking is None:
            raise UserError(f"run={run}: a retrieval run; scoring needs a ranking run (hstu-train ranking=...)")
        return cls(config, RankingData(store, config.ranking), model, run_device(device), micro_batch)

    # Histories

    def history(self, user: int, num_events: int | None = None) -> History:
        """Of user row ``user`` of the store, -1: nobody, no events; the first ``num_events`` events, None: all."""
        offsets = self.data.store.offsets
        if not -1 <= user < len(offsets) - 1:
            raise UserError(f"user={user}: expected a user row 0..{len(offsets) - 2}, or -1 for nobody")
        start, stop = (0, 0) if user == -1 else (int(offsets[user]), int(offsets[user + 1]))
        rows = np.arange(start, stop if num_events is None else min(stop, start + num_events))
        store = self.data.store
        return History(
            store.item_ids[rows].astype(np.int64), np.asarray(store.timestamps[rows]), self.data.action_bits(rows),
            self.data.event_values(rows), user,
        )  # fmt: skip

    def encode(self, history: History) -> TokenCache:
        """Keys and values of the history, of its last :attr:`max_events` where it is longer."""
        kept = _last(self._checked(history), self.max_events)
        cache = self.encoder.empty()
        cache.history = kept
        if len(kept):  # without any, the prefix has no time yet
            with torch.inference_mode():
                self.encoder.append(cache, *self._tokens(kept, int(kept.timestamps[0]), prefix=True))
        return cache

    def extend(self, cache: TokenCache, events: History) -> TokenCache:
        """The cache after further ``events``: what :meth:`encode` would give for all of them.

        Only the new events are encoded where the model allows it; a fused model whose prefix sees the history, a
        semi-local mask and a history that outgrows :attr:`max_events` take a new pass. The latter is then cut to its
        last three quarters, not to all that fit, so that the next events are added and not encoded with everything
        before them. The cache given may not be used afterwards.

        Raises ValueError for a cache of another model version or events before its last one.
        """
        self.encoder.check(cache)
        known: History = cache.history
        if len(known) and len(events) and events.timestamps[0] < known.timestamps[-1]:
            raise ValueError(f"events begin at {events.timestamps[0]}, before the last one, {known.timestamps[-1]}")
        joined, limit = self._checked(known + events), self.max_events
        if len(joined) > limit:
            return self.encode(_last(joined, limit - limit // SLACK))
        if len(events) == 0:
            return cache
        if len(known) == 0 or not self.encoder.appends:
            return self.encode(joined)
        with torch.inference_mode():
            self.encoder.append(cache, *self._tokens(events, int(known.timestamps[0]), prefix=False))
        cache.history = joined
        return cache

    def _checked(self, history: History) -> History:
        _check_items("history", history.item_ids, self.data.store.num_items)
        if history.timestamps.shape != (len(history),):
            raise ValueError(f"timestamps: expected [{len(history)}], got {list(history.timestamps.shape)}")
        if np.any(np.diff(history.timestamps) < 0):
            raise ValueError("history: expected times that do not descend (oldest event first)")
        bits = self.data.num_action_bits
        if history.action_bits.shape != (len(history), bits):
            raise ValueError(f"action_bits: expected [{len(history)}, {bits}], got {list(history.action_bits.shape)}")
        self._check_event_values(history.event_values, len(history))
        return history

    def _check_event_values(self, values: dict[str, np.ndarray], size: int) -> None:
        features = self.data.event_features
        for name, column in values.items():
            if name not in features or len(column) != size:
                expected = ", ".join(features) or "none"
                raise ValueError(f"event_values {name} [{len(column)}]: expected [{size}] of {expected}")
            feature = features[name]
            if isinstance(feature, Coded) and size and not 0 <= column.min() <= column.max() < feature.num_codes:
                raise ValueError(f"event_values {name}: expected codes 0..{feature.num_codes - 1}, "
                                 f"got {column.min()}..{column.max()}")  # fmt: skip

    # Scores

    def score(
        self, history: TokenCache | History, candidates: np.ndarray, request_time: int | None = None,
        event_values: dict[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Predictions of each task for each candidate, [c] or [c, levels] float32.

        Args:
            history: a cache of :meth:`encode` or :meth:`extend`, or a history, which is then encoded first.
            candidates: [c] integer item ids; may be empty.
            request_time: s, when they are shown; None: a minute after the last event.
            event_values: [c] of each event feature; one that is left out counts as missing.

        Raises ValueError for unknown candidates, a request before the last event, or a cache of another model.
        """
        cache = self.encode(history) if isinstance(history, History) else history
        self.encoder.check(cache)
        items, time, values = self._request(cache.history, candidates, request_time, event_values)
        if cache.length == 0 and self.model.num_prefix:
            cache = self._cold(cache, time)
        parts = []
        with torch.inference_mode():
            cache = self.encoder.with_room(cache, min(len(items), self.micro_batch))
            for start in range(0, len(items), self.micro_batch):
                m = slice(start, start + self.micro_batch)
                tokens, item_tokens, times = self._candidates(items[m], time, {k: v[m] for k, v in values.items()})
                states = self.encoder.peek(cache, tokens, times, targets=True)
                parts.append(self._predict(states, item_tokens))
        return self._joined(parts)

    def score_plain(
        self, history: History, candidates: np.ndarray, request_time: int | None = None,
        event_values: dict[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """As :meth:`score`, without a cache: every micro-batch is one pass over the history and its candidates."""
        kept = _last(self._checked(history), self.max_events)
        items, time, values = self._request(kept, candidates, request_time, event_values)
        parts = []
        with torch.inference_mode():
            past, past_times = self._tokens(kept, int(kept.timestamps[0]) if len(kept) else time, prefix=True)
            for start in range(0, len(items), self.micro_batch):
                m = slice(start, start + self.micro_batch)
                tokens, item_tokens, times = self._candidates(items[m], time, {k: v[m] for k, v in values.items()})
                new, total = len(times), len(times) + len(past)
                joined = torch.cat([past_times, times])
                layout = Layout(
                    torch.arange(2, device=self.device) * total, total, joined, joined,
                    torch.full((1,), new, device=self.device), self.encoder.contextual, num_positions=len(past) + 1,
                )  # fmt: skip
                plan = self.model.encoder.plan_tokens(layout)
                states = self.model.encoder(torch.cat([past, tokens]), plan, None)
                parts.append(self._predict(states[len(past) :], item_tokens))
        return self._joined(parts)

    def _request(
        self, history: History, candidates: np.ndarray, request_time: int | None, values: dict[str, np.ndarray] | None
    ) -> tuple[np.ndarray, int, dict[str, np.ndarray]]:
        items = np.asarray(candidates)
        _check_items("candidates", items, self.data.store.num_items)
        last = int(history.timestamps[-1]) if len(history) else 0
        time = last + REQUEST_GAP_S if request_time is None else int(request_time)
        if time < last:
            raise ValueError(f"request_time={time}: expected no earlier than the last event, {last}")
        self._check_event_values(values or {}, len(items))
        return items.astype(np.int64), time, values or {}

    def _cold(self, cache: TokenCache, time: int) -> TokenCache:
        """A cache of the prefix alone, as of the request; the one given stays empty."""
        found = self.encoder.empty()
        found.history = cache.history
        with torch.inference_mode():
            self.encoder.append(found, *self._tokens(cache.history, time, prefix=True))
        return found

    def _tokens(self, history: History, first_time: int, prefix: bool) -> tuple[Tensor, Tensor]:
        """Tokens [r, D] of a history and their times [r]; prefix: with those of the user, at ``first_time``."""
        model, n = self.model, len(history)
        times = to_device(torch.from_numpy(np.array(history.timestamps, np.int64)), self.device)
        items = model.item_tokens(self._ids(history.item_ids), self._features(history))
        actions = model.action_tokens(to_device(torch.from_numpy(history.action_bits.astype(np.float32)), self.device))
        if model.fused:
            x = items + actions
        else:
            offsets = torch.arange(2, device=self.device) * n
            x, times = interleave(items, actions, offsets)[0], times.repeat_interleave(2)
        if not prefix or not model.num_prefix:
            return x, times
        features = _on(make_features(*self.data.prefix_features(np.array([history.user]))), self.device)
        return torch.cat([model.prefix_tokens(features), x]), torch.cat(
            [times.new_full((model.num_prefix,), first_time), times]
        )

    def _candidates(
        self, items: np.ndarray, time: int, values: dict[str, np.ndarray]
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Tokens [m, D], item tokens [m, D] and times [m]."""
        shown = np.full(len(items), time, np.int64)
        features = _on(make_features(*self.data.token_features(items, shown, values)), self.device)
        item_tokens = self.model.item_tokens(self._ids(items), features)
        tokens = item_tokens + self.model.action_token if self.model.fused else item_tokens
        return tokens, item_tokens, to_device(torch.from_numpy(shown), self.device)

    def _features(self, history: History) -> Features:
        found = self.data.token_features(history.item_ids, history.timestamps, history.event_values)
        return _on(make_features(*found), self.device)

    def _ids(self, items: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(np.array(items, np.int64)), self.device)

    def _predict(self, states: Tensor, item_tokens: Tensor) -> dict[str, np.ndarray]:
        found = self.model.heads.predict(self.model.head_outputs(states, item_tokens))
        return {name: value.cpu().numpy() for name, value in found.items()}

    def _joined(self, parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        if not parts:
            tasks = self.model.ranking.tasks.items()
            shapes = {n: (0, len(t.levels)) if t.kind in ("multiclass", "ordinal") else (0,) for n, t in tasks}
            return {n: np.empty(shape, np.float32) for n, shape in shapes.items()}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_items(name: str, items: np.ndarray, num_items: int) -> None:
    """Raises ValueError where ``items`` are no item ids [n]."""
    if items.ndim != 1 or (items.size and items.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected integers [n], got {items.dtype} {list(items.shape)}")
    bad = (items < 1) | (items > num_items)
    if bad.any():
        raise ValueError(f"{name} holds item {items[bad][0]}: expected 1..{num_items}")


def _last(history: History, count: int) -> History:
    """The last ``count`` events at most."""
    return history[max(0, len(history) - count) :]


def _on(features: Features, device: torch.device) -> Features:
    values, lengths, numbers = (to_device(t, device) for t in (features.values, features.lengths, features.numbers))
    return replace(features, values=values, lengths=lengths, numbers=numbers)
