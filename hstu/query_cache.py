"""Queries of single users with a retrieval model: what a history shares with a cached one is not encoded again.

Legend: n events of the history, D model width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hstu.history_cache import CachedEncoder, CacheStore, model_version, why_not_cached
from hstu.model.retrieval import RetrievalModel
from hstu.transfer import to_device


class QueryCache:
    """The model's queries from histories, and a store of the histories' keys and values.

    With a time bias that knows the request time, what the model makes of an event depends on when the next one happens.
    So the last event of a history is never kept: it is encoded with every request, and stays once its successor is
    known. A history longer than ``model.max_len`` loses its first event with each new one; its other events then take
    other positions and are all encoded again.

    Args:
        model: retrieval model in evaluation mode; its weights may not change from here on.
        max_mib: memory of all caches.

    Raises UserError for a model that :func:`can_cache` refuses.
    """

    def __init__(self, model: RetrievalModel, max_mib: float) -> None:
        self.model = model
        self.encoder = CachedEncoder(model.encoder, model_version(model, model.config))
        self.caches = CacheStore(max_mib)
        self.num_encoded = 0
        """Events that went through the encoder."""

    @torch.inference_mode()
    def query(self, items: np.ndarray, times: np.ndarray, request_time: int, user: int = -1) -> Tensor:
        """Query [1, ...] of one user at ``request_time``, as of :meth:`RetrievalModel.queries`.

        items, times: [n] int64, the last ``model.max_len`` events at most, oldest first, times in s.
        user: row of the store; -1: not in it.
        """
        key = int(items[0]), int(times[0])  # what grows keeps its first event; users who share one displace each other
        cache = self.caches.get(key)
        if cache is None:
            cache = self.encoder.empty()
        kept = 0 if cache.history is None else max(0, _shared(cache.history, (items, times)) - 1)
        self.caches.drop(key)  # until it is whole again
        cache.length, cache.history = kept, (items.copy(), times.copy())
        device = self.encoder.device
        new_items, new_times, requests = (
            to_device(torch.from_numpy(np.array(x, np.int64)), device)
            for x in (items[kept:], times[kept:], np.append(times[kept + 1 :], request_time))
        )
        out = self.encoder.append(cache, self.model.table.lookup(new_items), new_times, requests)
        self.num_encoded += len(new_items)
        cache.length -= 1  # the last event's request was a guess
        self.caches.put(key, cache)
        return self.model.queries(out[-1:], torch.full((1,), user, device=device))


def _shared(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> int:
    """How many first events two histories (items, times) have in common."""
    size = min(len(a[0]), len(b[0]))
    differs = (a[0][:size] != b[0][:size]) | (a[1][:size] != b[1][:size])
    return int(np.argmax(differs)) if differs.any() else size


def can_cache(model: RetrievalModel) -> bool:
    """Whether the model's histories can be kept and added to: HSTU whose events see earlier ones only, with outputs
    that do not depend on the batch. Other encoders, ``model.divisor=max_len`` and ``model.full_rows``: no."""
    return why_not_cached(model.encoder) is None and CachedEncoder(model.encoder, "").appends
