"""A modern Transformer baseline: pre-norm RMSNorm, rotary positions, SwiGLU.

Legend: L total events, D model width, H heads, A = D / H head width, F feed-forward width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hstu.config import TransformerConfig
from hstu.model.encoder import Encoder, layer_seed
from hstu.model.softmax_attention import causal_softmax_attention
from kernels._dropout import seeded_dropout
from kernels.attention import AttentionPlan
from kernels.jagged import positions_of

INIT_STD = 0.02
"""Of all projections; those into the residual stream are divided by sqrt(2 num_blocks) (GPT-2)."""


def rotary(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotates the pairs (i, i + A/2) of each head by position-dependent angles (Su et al. 2021).

    Args:
        x: [L, H, A], A even.
        position: [L] int64.
        base: of the geometric frequencies (published: 10,000).
    """
    half = x.shape[2] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position[:, None].to(torch.float32) * frequency  # [L, A/2]
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class TransformerBlock(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, self.num_heads = config.dim, config.num_heads
        self.dropout, self.rope_base = config.dropout, config.rope_base
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, dim, bias=False)
        for linear in (self.qkv, self.gate_up):
            nn.init.normal_(linear.weight, std=INIT_STD)
        for linear in (self.out, self.down):
            nn.init.normal_(linear.weight, std=INIT_STD / math.sqrt(2 * config.num_blocks))

    def forward(
        self, x: Tensor, plan: AttentionPlan, position: Tensor, seed: int | None, rows: Tensor | None = None
    ) -> Tensor:
        """x: [L, D]; position: [L]; rows: of the dropout. Returns [L, D]."""
        q, k, v = (t.unflatten(1, (self.num_heads, -1)) for t in self.qkv(self.attention_norm(x)).chunk(3, dim=1))
        q, k = rotary(q, position, self.rope_base), rotary(k, position, self.rope_base)
        attended = self.out(causal_softmax_attention(q, k, v, plan).flatten(1))
        x = x + seeded_dropout(attended, self.dropout, layer_seed(seed, 0), rows)
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=1)
        return x + seeded_dropout(
            self.down(torch.nn.functional.silu(gate) * up), self.dropout, layer_seed(seed, 1), rows
        )  # fmt: skip


class TransformerEncoder(Encoder):
    """Pre-norm blocks and a final norm; positions enter by rotation only."""

    name = "transformer"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)

    def forward(self, events: Tensor, plan: AttentionPlan, seed: int | None, *, rows: Tensor | None = None) -> Tensor:
        position = positions_of(plan.offsets, events.shape[0])
        x = seeded_dropout(events * math.sqrt(events.shape[1]), self.dropout, layer_seed(seed, 0), rows)
        for index, layer in enumerate(self.layers):
            x = layer(x, plan, position, layer_seed(seed, index + 1), rows)
        return self.norm(x)  # type: ignore[no-any-return]
