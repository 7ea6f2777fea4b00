"""FuXi-Linear: three causal mixers of linear cost side by side, gated, and a two-stage feed-forward part.

Each mixer is a sum over earlier events whose weights decay, so that a chunk of events needs only the events of that
chunk and one matrix per head, which holds all earlier ones.

Legend: B users, L total events, S chunks of C events, N longest input, D model width, H heads, A query/key width,
V value width per head, T periods of the temporal mixer.
Source: Ye et al. 2026 (arXiv 2602.23671); what the paper leaves open follows the code its authors published with it
(USTC-StarTeam/fuxi-linear, the MovieLens-20M settings). PROTOCOL section 3 writes it down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad, rms_norm, silu, softplus

from hstu.config import FuXiLinearConfig
from hstu.model.encoder import Encoder, InputStage, Layout, layer_seed
from kernels._dropout import seeded_dropout
from kernels.attention import AttentionPlan
from kernels.jagged import dense_to_jagged, jagged_to_dense
from kernels.norm_linear_silu import norm_linear_silu

NORM_EPS = 1e-6
"""Of all norms (published code); none has an affine part."""
INIT_STD = 0.02
"""Initial standard deviation of all weights but the values of the temporal and the positional mixer."""
SINUSOID_BASE = 10_000.0
"""Of the wavelengths that the positional mixer starts from."""
KEPT_PER_RADIAN = 0.5
"""The temporal mixer's weights halve with every radian of a period (published code: sigmoid(0) to the power of the
angle): one period leaves 1/78."""


@dataclass(frozen=True)
class Weights:
    """Weights of a causal sum in the form that :func:`attend` takes; a first or second size of 1 stands for all.

    Attributes:
        inside: [B, S, H, C, C]. Weight of each key of the same chunk, 0 for later ones.
        query: [B, S, C, H, A]. Queries, decayed from the start of their chunk.
        key: [B, S, C, H, A]. Keys, decayed to the start of the next chunk.
        carry: [B, S, H]. Decay from the start of each chunk to that of the next one.
    """

    inside: Tensor
    query: Tensor
    key: Tensor
    carry: Tensor


def attend(weights: Weights, v: Tensor) -> Tensor:
    """Sum over each event's own and earlier events: [B, S, C, H, V] of v [B, S, C, H, V], in time linear in S."""
    out = torch.einsum("bshnm,bsmhv->bsnhv", weights.inside, v)
    num_chunks = v.shape[1]
    if num_chunks == 1:
        return out
    added = torch.einsum("bsmha,bsmhv->bshav", weights.key, v)
    carry = weights.carry.expand(-1, num_chunks, -1)[..., None, None]  # [B, S, H, 1, 1]
    states = [torch.zeros_like(added[:, 0])]
    for chunk in range(num_chunks - 1):
        states.append(states[-1] * carry[:, chunk] + added[:, chunk])
    return out + torch.einsum("bsnha,bshav->bsnhv", weights.query, torch.stack(states, dim=1))


def semantic_weights(q: Tensor, k: Tensor, rate: Tensor) -> Weights:
    """``q_i . k_j exp(-rate (i - j + 1))`` for j <= i (a retention).

    Args:
        q, k: [B, S, C, H, A].
        rate: [H], > 0.
    """
    size = q.shape[2]
    place = torch.arange(size, device=q.device)
    steps = (place[:, None] - place).clamp(min=0) + 1  # [C, C]
    decay = torch.exp(-rate[:, None, None] * steps).tril()  # [H, C, C]
    from_start = torch.exp(-rate * (place[:, None] + 1))[..., None]  # [C, H, 1]
    to_next = torch.exp(-rate * (size - place)[:, None])[..., None]
    inside = torch.einsum("bsnha,bsmha->bshnm", q, k) * decay
    return Weights(inside, q * from_start, k * to_next, torch.exp(-rate * size)[None, None])


def temporal_weights(query_time: Tensor, key_time: Tensor, periods_s: Tensor, dtype: torch.dtype) -> Weights:
    """``sin(w gap) 2^(-w gap)`` (heads 0..T-1) and ``cos(w gap) 2^(-w gap)`` (heads T..2T-1), w = 2 pi / period.

    Args:
        query_time, key_time: [B, S, C] int64, s. gap = query_time - key_time, 0 where it would be negative.
        periods_s: [T] int64, s.
        dtype: of the result. Gaps and phases are formed in whole seconds before they are rounded to it.
    """
    frequency = (2 * math.pi / periods_s.to(torch.float64)).to(dtype)  # [T], radians per second
    rate = frequency * -math.log(KEPT_PER_RADIAN)

    def decay(gap: Tensor) -> Tensor:
        factor = torch.exp(-gap.clamp(min=0).to(dtype)[..., None] * rate)
        return torch.cat([factor, factor], dim=-1)

    query_angle = (query_time[..., None] % periods_s).to(dtype) * frequency  # [B, S, C, T]
    key_angle = (key_time[..., None] % periods_s).to(dtype) * frequency
    sin, cos = query_angle.sin(), query_angle.cos()
    query = torch.cat([torch.stack([sin, -cos], dim=-1), torch.stack([cos, sin], dim=-1)], dim=3)  # [B, S, C, 2T, 2]
    key = torch.stack([key_angle.cos(), key_angle.sin()], dim=-1).repeat(1, 1, 1, 2, 1)
    start = key_time[:, :, 0]
    following = torch.cat([start[:, 1:], start[:, -1:]], dim=1)  # the last chunk has none, and its state no reader
    gaps = decay(query_time[..., None] - key_time[:, :, None]).permute(0, 1, 4, 2, 3)  # [B, S, 2T, C, C]
    inside = torch.einsum("bsnha,bsmha->bshnm", query, key) * gaps.tril()
    from_start = decay(query_time - start[..., None])[..., None]
    to_next = decay(following[..., None] - key_time)[..., None]
    return Weights(inside, query * from_start, key * to_next, decay(following - start))


def positional_weights(table: Tensor, num_chunks: int, size: int) -> Weights:
    """``2 table_i . table_j / A`` for j <= i, no decay; table: [N, A], positions beyond N have weight 0."""
    rows = num_chunks * size
    query = pad(table[:rows], (0, 0, 0, max(0, rows - table.shape[0]))).view(1, num_chunks, size, 1, -1)
    key = query * (2.0 / table.shape[1])
    inside = torch.einsum("bsnha,bsmha->bshnm", query, key).tril()
    return Weights(inside, query, key, torch.ones(1, 1, 1, dtype=table.dtype, device=table.device))


def sinusoids(num_positions: int, width: int) -> Tensor:
    """[num_positions, width]: sines, then cosines, of positions at geometric wavelengths."""
    half = width // 2
    angle = torch.arange(num_positions)[:, None] * SINUSOID_BASE ** (-torch.arange(half) / half)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class FuXiLinearBlock(nn.Module):
    """``x + W_m (u * [LN(semantic), LN(temporal), LN(positional)])``, then a SwiGLU feed-forward part with RMSNorm."""

    def __init__(self, config: FuXiLinearConfig) -> None:
        super().__init__()
        dim, self.num_heads, self.num_periods = config.dim, config.num_heads, config.num_periods
        self.dropout = config.dropout
        qk_width = config.num_heads * config.qk_dim
        self.gate_width, self.widths = 3 * dim, [qk_width, qk_width, dim, dim, dim]
        self.silu_columns = (0, 4 * dim + 2 * qk_width)
        values = nn.init.uniform_(torch.empty(dim, 2 * dim), -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        gated = torch.randn(dim, self.silu_columns[1]) * INIT_STD
        self.projection = nn.Parameter(torch.cat([gated, values], dim=1))
        """[D, 6D + 2 H A]: u (3D), q, k, v through SiLU; temporal and positional values, linear."""
        self.decay = nn.Parameter(torch.randn(config.num_heads) * INIT_STD)
        self.position = nn.Parameter(sinusoids(config.max_len + config.extra_slots, config.position_dim))
        self.position_scale = nn.Parameter(torch.randn(1) * INIT_STD)
        self.position_skip = nn.Parameter(torch.ones(1))
        self.mix = nn.Linear(3 * dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, dim, bias=False)
        for linear in (self.mix, self.gate_up, self.down):
            nn.init.normal_(linear.weight, std=INIT_STD)

    def forward(
        self, x: Tensor, plan: AttentionPlan, temporal: Weights, seed: int | None, rows: Tensor | None = None
    ) -> Tensor:
        """x: [L, D]; temporal: of the batch, shared by all blocks; rows: of the dropout. Returns [L, D]."""
        projected = norm_linear_silu(x, self.projection, NORM_EPS, silu_columns=self.silu_columns)
        u, rest = projected.split([self.gate_width, sum(self.widths)], dim=1)
        mixed = self._mix_events(rest, plan, temporal).unflatten(1, (3, -1))  # [L, 3, D]
        gated = u * layer_norm(mixed, (x.shape[1],), eps=NORM_EPS).flatten(1)
        x = x + self.mix(seeded_dropout(gated, self.dropout, layer_seed(seed, 0), rows))
        normed = seeded_dropout(rms_norm(x, (x.shape[1],), eps=NORM_EPS), self.dropout, layer_seed(seed, 1), rows)
        gate, up = self.gate_up(normed).chunk(2, dim=1)
        return x + self.down(silu(gate) * up)

    def _mix_events(self, rest: Tensor, plan: AttentionPlan, temporal: Weights) -> Tensor:
        """[L, 3D]: the three mixers side by side; rest: [L, 2 H A + 3D] q, k and the three values."""
        num_chunks, size = temporal.query.shape[1:3]
        dense = jagged_to_dense(rest, plan.offsets, num_chunks * size).unflatten(1, (num_chunks, size))
        q, k, v, time_value, place_value = dense.split(self.widths, dim=3)
        q, k, v = (t.unflatten(3, (self.num_heads, -1)) for t in (q, k, v))  # [B, S, C, H, A or V]
        rate = torch.exp(-softplus(self.decay).cumsum(0))  # later heads reach further back
        semantic = attend(semantic_weights(q, k, rate), v).flatten(3)
        by_time = attend(temporal, time_value.unflatten(3, (2 * self.num_periods, -1))).flatten(3)
        by_place = attend(positional_weights(self.position, num_chunks, size), place_value.unsqueeze(3)).flatten(3)
        by_place = self.position_scale * by_place + self.position_skip * place_value
        mixed = torch.cat([semantic, by_time, by_place], dim=3).flatten(1, 2)  # [B, S * C, 3D]
        return dense_to_jagged(mixed, plan.offsets, rest.shape[0])


class FuXiLinearEncoder(Encoder):
    """FuXi-Linear blocks over the input stage; no norm after the last one."""

    name = "fuxi_linear"
    periods_s: Tensor

    def __init__(self, config: FuXiLinearConfig) -> None:
        super().__init__()
        positions = torch.empty(config.max_len + config.extra_slots, config.dim)
        self.input = InputStage(nn.init.xavier_normal_(positions), config.dropout)
        self.layers = nn.ModuleList(FuXiLinearBlock(config) for _ in range(config.num_blocks))
        periods_s = [config.first_period_s * config.period_ratio**i for i in range(config.num_periods)]
        self.register_buffer("periods_s", torch.tensor(periods_s), persistent=False)
        self.chunk_size, self.request_time = config.chunk_size, config.request_time

    def plan_tokens(self, layout: Layout) -> AttentionPlan:
        asked = layout.request_times if self.request_time else layout.timestamps
        offsets = layout.offsets.to(torch.int64)
        return AttentionPlan(offsets, layout.max_len, query_time=asked, key_time=layout.timestamps)

    def forward(self, events: Tensor, plan: AttentionPlan, seed: int | None, *, rows: Tensor | None = None) -> Tensor:
        x = self.input(events, plan, layer_seed(seed, 0), rows)
        temporal = self._temporal(plan, torch.promote_types(events.dtype, torch.float32))
        for index, layer in enumerate(self.layers):
            x = layer(x, plan, temporal, layer_seed(seed, index + 1), rows)
        return x

    def _temporal(self, plan: AttentionPlan, dtype: torch.dtype) -> Weights:
        """Weights of the temporal mixer: they have no parameters, so all blocks share them."""
        size = max(1, min(self.chunk_size, plan.max_len))
        num_chunks = max(1, -(-plan.max_len // size))
        asked, happened = (
            jagged_to_dense(time, plan.offsets, num_chunks * size).unflatten(1, (num_chunks, size))
            for time in (plan.query_time, plan.key_time)
            if time is not None
        )
        return temporal_weights(asked, happened, self.periods_s, dtype)
