"""Keys and values of encoded histories, so that new tokens are encoded against them and not with them.

M-FALCON (Zhai et al. 2024, section 3.4): the history is encoded once, candidates are then scored in micro-batches
against its cached keys and values.

Legend: n tokens of the history, r new tokens, H heads, A query/key width, V value width, D model width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hstu.errors import UserError
from hstu.model.encoder import Encoder, HSTUEncoder, Layout
from hstu.model.layer import LayerCache
from kernels.attention import AttentionPlan

FINGERPRINT_VALUES = 4096
"""At most so many values of each tensor, evenly spread, go into a model's fingerprint."""
SPARE_ROWS = 64
"""Rows that a cache has beyond its tokens when it is made or grows; more are added by doubling."""


def model_version(model: nn.Module, settings: Any) -> str:
    """16 hex digits that change when the weights do, or ``settings``, whose ``repr`` tells how they are used."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // FINGERPRINT_VALUES)
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[::step].cpu().to(torch.float64).numpy().tobytes())
        digest.update(str(float(flat.sum(dtype=torch.float64))).encode())
    return digest.hexdigest()[:16]


@dataclass
class TokenCache:
    """Encoded tokens of one user: their times and each layer's keys and values."""

    version: str
    """Of the model, see :func:`model_version`."""
    length: int
    """n, tokens kept."""
    times: Tensor
    """[capacity] int64, s."""
    keys: list[Tensor]
    """A layer each: [capacity, H, A]."""
    values: list[Tensor]
    """A layer each: [capacity, H, V]."""
    history: Any = None
    """What the owner needs to encode the tokens again."""

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return int(self.times.shape[0])

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.times, *self.keys, *self.values))

    def reserve(self, rows: int) -> None:
        """Makes room for so many tokens in all."""
        if rows > self.capacity:
            size = max(rows + SPARE_ROWS, 2 * self.capacity)
            self.times, *rest = (_grown(t, size, self.length) for t in (self.times, *self.keys, *self.values))
            self.keys, self.values = rest[: len(self.keys)], rest[len(self.keys) :]

    def copy_from(self, other: TokenCache) -> None:
        """Takes over the other's tokens; there must be room for them."""
        pairs = zip((self.times, *self.keys, *self.values), (other.times, *other.keys, *other.values), strict=True)
        for mine, theirs in pairs:
            mine[: other.length] = theirs[: other.length]
        self.version, self.length, self.history = other.version, other.length, other.history


def _grown(x: Tensor, rows: int, used: int) -> Tensor:
    larger = x.new_zeros(rows, *x.shape[1:])
    larger[:used] = x[:used]
    return larger


def why_not_cached(encoder: Encoder) -> str | None:
    """Why keys and values of the encoder's tokens cannot be kept; None where they can."""
    if not isinstance(encoder, HSTUEncoder):
        return f"model.name={encoder.name}: only hstu models keep keys and values of a history"
    if any(layer.divisor == "max_len" for layer in encoder.layers):
        return "model.divisor=max_len: outputs depend on the batch, so they cannot be cached; " \
               "train with padded or row_count"  # fmt: skip
    return None


class CachedEncoder:
    """Runs an HSTU encoder on new tokens of one user against the cached ones. For one thread at a time.

    Args:
        encoder: its weights may not change from here on.
        version: of the model, see :func:`model_version`.
        contextual: prefix tokens that see all of the history.

    Raises UserError for an encoder that keeps no keys and values, or whose outputs depend on the batch.
    """

    def __init__(self, encoder: Encoder, version: str, contextual: int = 0) -> None:
        reason = why_not_cached(encoder)
        if reason is not None:
            raise UserError(reason)
        assert isinstance(encoder, HSTUEncoder)
        self.encoder, self.version, self.contextual = encoder, version, contextual
        self._workspace: TokenCache | None = None

    @property
    def appends(self) -> bool:
        """Whether tokens can be added to a cache: not where earlier tokens see later ones."""
        return self.contextual == 0 and self.encoder.mask.causal and self.encoder.mask.full_rows == 0

    @property
    def max_tokens(self) -> int:
        """Most tokens, history and one target, that the model has positions for."""
        return int(self.encoder.input.position.shape[0])

    @property
    def device(self) -> torch.device:
        """Of the weights, and of the caches."""
        return self.encoder.input.position.device

    def empty(self) -> TokenCache:
        """A cache of no token."""
        like = self.encoder.input.position
        layers: list[Any] = list(self.encoder.layers)
        keys = [like.new_zeros(SPARE_ROWS, layer.num_heads, layer.qk_dim) for layer in layers]
        values = [like.new_zeros(SPARE_ROWS, layer.num_heads, layer.v_dim) for layer in layers]
        times = torch.zeros(SPARE_ROWS, dtype=torch.int64, device=like.device)
        return TokenCache(self.version, 0, times, keys, values)

    def check(self, cache: TokenCache) -> None:
        """Raises ValueError for a cache of another model or of other weights."""
        if cache.version != self.version:
            raise ValueError(
                f"cache: made by model version {cache.version}, this model is {self.version}; encode the history again"
            )

    @torch.inference_mode()
    def append(self, cache: TokenCache, tokens: Tensor, times: Tensor, request_times: Tensor | None = None) -> Tensor:
        """Encodes the tokens that follow the cached ones and keeps them; returns their outputs [r, D].

        tokens: [r, D]; times, request_times: [r] int64, s (None: requests at the tokens' own times).
        Raises ValueError where the cache cannot be appended to (see :attr:`appends`) or is another model's.
        """
        if cache.length and not self.appends:
            raise ValueError("cache: earlier tokens of this model see later ones; encode the whole history again")
        out = self._run(cache, tokens, times, times if request_times is None else request_times, None)
        cache.length += tokens.shape[0]
        return out

    @torch.inference_mode()
    def peek(self, cache: TokenCache, tokens: Tensor, times: Tensor, request_times: Tensor | None = None,
             targets: bool = False) -> Tensor:  # fmt: skip
        """As :meth:`append`, but the cache stays as it was. targets: the tokens see the history and themselves only."""
        requests = times if request_times is None else request_times
        room = self.with_room(cache, tokens.shape[0])
        return self._run(room, tokens, times, requests, tokens.shape[0] if targets else None)

    @torch.inference_mode()
    def with_room(self, cache: TokenCache, new: int) -> TokenCache:
        """The cache itself where its spare rows hold ``new`` tokens, else its tokens in a workspace that is overwritten
        by the next call: candidates do not make the caches that are kept larger."""
        if cache.length + new <= cache.capacity:
            return cache
        if self._workspace is None:
            self._workspace = self.empty()
        self._workspace.length = 0
        self._workspace.reserve(cache.length + new)
        self._workspace.copy_from(cache)
        return self._workspace

    def _run(
        self, cache: TokenCache, tokens: Tensor, times: Tensor, requests: Tensor, num_targets: int | None
    ) -> Tensor:
        self.check(cache)
        new, first = tokens.shape[0], cache.length
        places = first + (new if num_targets is None else 1)
        if places > self.max_tokens:
            raise ValueError(f"cache: {places} tokens, the model has positions for {self.max_tokens}")
        cache.reserve(first + new)
        cache.times[first : first + new] = times
        plan = self._plan(cache, new, times, requests, num_targets)
        caches = [LayerCache(k, v, first) for k, v in zip(cache.keys, cache.values, strict=True)]
        return self.encoder(tokens, plan, None, caches)  # type: ignore[no-any-return]

    def _plan(self, cache: TokenCache, new: int, times: Tensor, requests: Tensor,
              num_targets: int | None) -> AttentionPlan:  # fmt: skip
        def one(value: int) -> Tensor:
            return torch.full((1,), value, device=times.device)

        total, targets = cache.length + new, None if num_targets is None else one(num_targets)
        offsets = torch.arange(2, device=times.device) * new
        positions = cache.length + (new if num_targets is None else 1)
        if cache.length == 0:
            layout = Layout(offsets, new, times, requests, targets, self.contextual, num_positions=positions)
        else:
            layout = Layout(offsets, total, times, requests, targets, self.contextual, one(0), one(total),
                            cache.times, new, positions)  # fmt: skip
        return self.encoder.plan_tokens(layout)


class CacheStore:
    """Caches by key, the least recently used ones dropped beyond a limit.

    Args:
        max_mib: memory of all caches; a single one larger than that is not kept, and drops no other.
    """

    def __init__(self, max_mib: float) -> None:
        if not max_mib > 0:
            raise ValueError(f"max_mib={max_mib}: expected > 0")
        self.max_bytes = max_mib * 2**20
        self.num_bytes = self.hits = self.misses = self.evictions = 0
        self._caches: OrderedDict[Hashable, tuple[TokenCache, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._caches)

    def get(self, key: Hashable) -> TokenCache | None:
        """The cache of ``key``, now the most recently used one, or None. Counts in ``hits`` or ``misses``."""
        found = self._caches.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._caches.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, cache: TokenCache) -> None:
        """Keeps ``cache`` under ``key``; say it again after it has grown. What is dropped counts in ``evictions``."""
        self.drop(key)
        size = cache.num_bytes
        if size > self.max_bytes:
            self.evictions += 1
            return
        self._caches[key] = cache, size
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, (_, dropped) = self._caches.popitem(last=False)
            self.num_bytes -= dropped
            self.evictions += 1

    def drop(self, key: Hashable) -> None:
        """Forgets ``key``, if it is there."""
        found = self._caches.pop(key, None)
        if found is not None:
            self.num_bytes -= found[1]
