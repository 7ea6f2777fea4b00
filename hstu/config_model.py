"""Configuration of the models. Part of ``hstu/config.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from hstu.config_similarity import SIMILARITIES, MixtureConfig
from hstu.errors import check as _check
from hstu.errors import one_of as _one_of


@dataclass
class BiasConfig:
    """Relative attention bias of HSTU (PROTOCOL section 3)."""

    position: bool = True
    """A weight for each distance in the sequence."""
    time: bool = True
    """A weight for each bucket of the time gap."""
    per_head: bool = False
    """False: one table for all heads (published). True: one per head."""
    num_buckets: int = 129
    """Time buckets, the last one open (0..128 published)."""
    bucket_width: float = 0.301
    """Width of a bucket in ln(seconds); published code divides a natural log by 0.301."""
    time_kind: str = "buckets"
    """buckets: a table (published). power_law: -a ln(1 + gap_s) + b, two weights in place of the table."""
    request_time: bool = True
    """True: gaps are ts[i+1] - ts[j], the model knows when the predicted event happens (published).
    False: gaps are ts[i] - ts[j]."""

    def __post_init__(self) -> None:
        _one_of("model.bias.time_kind", self.time_kind, ("buckets", "power_law"))
        _check(self.num_buckets >= 1, "model.bias.num_buckets", self.num_buckets, ">= 1")
        _check(self.bucket_width >= 0.001, "model.bias.bucket_width", self.bucket_width, ">= 0.001")


@dataclass
class HSTUConfig:
    """HSTU encoder (Zhai et al. 2024)."""

    name: str = "hstu"
    """Picks this dataclass; set by the YAML file."""
    dim: int = 50
    """Model width (D), also of the item embeddings."""
    num_blocks: int = 2
    """Layers."""
    num_heads: int = 1
    """Attention heads (H)."""
    qk_dim: int = 50
    """Query/key width per head (A)."""
    v_dim: int = 50
    """Value width per head (V)."""
    dropout: float = 0.2
    """On the input embeddings and before the output projection."""
    bias: BiasConfig = field(default_factory=BiasConfig)
    max_len: int = 200
    """Most recent events that are the model's input."""
    extra_slots: int = 11
    """Padded width N = max_len + extra_slots; N divides the attention (211 / 61 published)."""
    divisor: str = "padded"
    """What divides the attention. padded: N (published). max_len: the batch's longest user. row_count: how many
    events each row sees."""
    window: int = 0
    """Local attention: each event sees only so many events up to its own. 0: all of them (published)."""
    full_rows: int = 0
    """With a window: a user's last so many events see everything (semi-local attention)."""
    l2_normalize: bool = True
    """L2-normalise outputs and item embeddings before the dot product."""
    similarity: str = "dot"
    """Between outputs and items: dot, or mixture_of_logits (``model.mixture``)."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)

    def __post_init__(self) -> None:
        _check_model(self)
        _one_of("model.divisor", self.divisor, ("padded", "max_len", "row_count"))
        _check(self.window >= 0, "model.window", self.window, ">= 0")
        _check(self.full_rows >= 0, "model.full_rows", self.full_rows, ">= 0")
        _check(not self.full_rows or self.window > 0, "model.full_rows", self.full_rows, "0 without model.window")


@dataclass
class SASRecConfig:
    """SASRec, the reference's variant (PROTOCOL section 3)."""

    name: str = "sasrec"
    """Picks this dataclass; set by the YAML file."""
    dim: int = 50
    """Model width (D), also of the item embeddings."""
    num_blocks: int = 2
    """Layers."""
    num_heads: int = 1
    """Attention heads (H)."""
    ffn_dim: int = 50
    """Width of the feed-forward part."""
    dropout: float = 0.2
    """Rate of every dropout of the encoder."""
    max_len: int = 200
    """Most recent events that are the model's input."""
    extra_slots: int = 11
    """Padded width N = max_len + extra_slots."""
    l2_normalize: bool = True
    """L2-normalise outputs and item embeddings before the dot product."""
    similarity: str = "dot"
    """Between outputs and items: dot, or mixture_of_logits (``model.mixture``)."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)

    def __post_init__(self) -> None:
        _check_model(self)
        _check(self.dim % self.num_heads == 0, "model.num_heads", self.num_heads, f"a divisor of dim={self.dim}")


@dataclass
class TransformerConfig:
    """Modern Transformer baseline: pre-norm RMSNorm, SwiGLU, rotary positions."""

    name: str = "transformer"
    """Picks this dataclass; set by the YAML file."""
    dim: int = 64
    """Model width (D), also of the item embeddings."""
    num_blocks: int = 2
    """Layers."""
    num_heads: int = 2
    """Attention heads (H)."""
    ffn_dim: int = 128
    """Width of the feed-forward part."""
    dropout: float = 0.2
    """Rate of every dropout of the encoder."""
    rope_base: float = 10_000.0
    """Base of the rotary wavelengths."""
    max_len: int = 200
    """Most recent events that are the model's input."""
    l2_normalize: bool = True
    """L2-normalise outputs and item embeddings before the dot product."""
    similarity: str = "dot"
    """Between outputs and items: dot, or mixture_of_logits (``model.mixture``)."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)

    def __post_init__(self) -> None:
        _check_model(self)
        _check(self.dim % (2 * self.num_heads) == 0, "model.dim", self.dim, "a multiple of 2 * num_heads (rotary)")


@dataclass
class FuXiLinearConfig:
    """FuXi-Linear (Ye et al. 2026, PROTOCOL section 3)."""

    name: str = "fuxi_linear"
    """Picks this dataclass; set by the YAML file."""
    dim: int = 64
    """Model width (D), also of the item embeddings."""
    num_blocks: int = 2
    """Layers."""
    num_heads: int = 2
    """Heads of the semantic mixer (H); their values share D."""
    qk_dim: int = 32
    """Query/key width per head (A)."""
    ffn_dim: int = 64
    """Width of the feed-forward part."""
    dropout: float = 0.2
    """On the input embeddings and before both stages of the feed-forward part."""
    num_periods: int = 8
    """Periods of the temporal mixer, which has a head of sines and one of cosines for each."""
    first_period_s: int = 1
    """Shortest period, s."""
    period_ratio: int = 16
    """Each period over the one before."""
    request_time: bool = True
    """True: gaps are ts[i+1] - ts[j], the model knows when the predicted event happens (published).
    False: gaps are ts[i] - ts[j]."""
    position_dim: int = 32
    """Width of the position vectors whose products are the weights of the positional mixer."""
    chunk_size: int = 64
    """Events per chunk of the linear form. Changes speed and memory, results by rounding only."""
    max_len: int = 200
    """Most recent events that are the model's input."""
    extra_slots: int = 11
    """Positions beyond max_len that have vectors (published: 11)."""
    l2_normalize: bool = True
    """L2-normalise outputs and item embeddings before the dot product."""
    similarity: str = "dot"
    """Between outputs and items: dot, or mixture_of_logits (``model.mixture``)."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)

    def __post_init__(self) -> None:
        _check_model(self)
        _check(self.dim % self.num_heads == 0, "model.num_heads", self.num_heads, f"a divisor of dim={self.dim}")
        for name in ("num_periods", "first_period_s", "period_ratio", "chunk_size"):
            _check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), ">= 1")
        heads = 2 * self.num_periods
        _check(self.dim % heads == 0, "model.num_periods", self.num_periods, f"half of a divisor of dim={self.dim}")
        even = self.position_dim >= 2 and self.position_dim % 2 == 0
        _check(even, "model.position_dim", self.position_dim, "an even number >= 2 (sines and cosines)")
        longest = self.first_period_s * self.period_ratio ** (self.num_periods - 1)
        _check(longest < 2**62, "model.period_ratio", self.period_ratio, "a longest period below 2^62 s")


def _check_model(m: HSTUConfig | SASRecConfig | TransformerConfig | FuXiLinearConfig) -> None:
    sizes = ("dim", "num_blocks", "num_heads", "max_len", "qk_dim", "v_dim", "ffn_dim", "extra_slots")
    for name in sizes:
        value = getattr(m, name, 1)
        _check(value >= 1, f"model.{name}", value, ">= 1")
    _check(0.0 <= m.dropout < 1.0, "model.dropout", m.dropout, "in [0, 1)")
    _one_of("model.similarity", m.similarity, SIMILARITIES)
    learned = m.similarity == "mixture_of_logits"
    _check(not learned or not m.l2_normalize, "model.l2_normalize", m.l2_normalize,
           "false with model.similarity=mixture_of_logits, which layer-normalises outputs")  # fmt: skip


ModelConfig = HSTUConfig | SASRecConfig | TransformerConfig | FuXiLinearConfig
MODELS: dict[str, type] = {
    "hstu": HSTUConfig, "sasrec": SASRecConfig, "transformer": TransformerConfig, "fuxi_linear": FuXiLinearConfig,
}  # fmt: skip
