"""SASRec, the reference code's variant (PROTOCOL section 3).

Legend: L total events, D model width, H heads, A = D / H head width, F feed-forward width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hstu.config import SASRecConfig
from hstu.model.encoder import Encoder, InputStage, layer_seed
from hstu.model.softmax_attention import causal_softmax_attention
from kernels._dropout import seeded_dropout
from kernels.attention import AttentionPlan

NORM_EPS = 1e-8
"""Of all norms (reference code); none has an affine part."""


class SASRecBlock(nn.Module):
    """``z = LN(Q + MHA(Q, x, x))`` with ``Q = LN(x)``, then ``z + FFN(z)``; x itself has no skip connection."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        dim, ffn = config.dim, config.ffn_dim
        self.qkv_weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(3 * dim, dim)))
        self.qkv_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, ffn)  # a convolution of width 1 is a linear map
        self.down = nn.Linear(ffn, dim)
        for linear in (self.out, self.up, self.down):
            nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, plan: AttentionPlan, seed: int | None, rows: Tensor | None = None) -> Tensor:
        """x: [L, D]; rows: of the dropout. Returns [L, D]."""
        dim = x.shape[1]
        query_input = torch.nn.functional.layer_norm(x, (dim,), eps=NORM_EPS)
        linear = torch.nn.functional.linear
        q = linear(query_input, self.qkv_weight[:dim], self.qkv_bias[:dim])
        k, v = linear(x, self.qkv_weight[dim:], self.qkv_bias[dim:]).split(dim, dim=1)
        q, k, v = (t.unflatten(1, (self.num_heads, -1)) for t in (q, k, v))  # [L, H, A]
        attended = causal_softmax_attention(q, k, v, plan, self.dropout, layer_seed(seed, 0), rows).flatten(1)
        z = torch.nn.functional.layer_norm(query_input + self.out(attended), (dim,), eps=NORM_EPS)
        hidden = seeded_dropout(torch.relu(self.up(z)), self.dropout, layer_seed(seed, 1), rows)
        return z + seeded_dropout(self.down(hidden), self.dropout, layer_seed(seed, 2), rows)


class SASRecEncoder(Encoder):
    """SASRec blocks over the input stage; no norm after the last one."""

    name = "sasrec"

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        positions = torch.empty(config.max_len + config.extra_slots, config.dim)
        std = math.sqrt(1.0 / config.dim)
        nn.init.trunc_normal_(positions, std=std, a=-2 * std, b=2 * std)
        self.input = InputStage(positions, config.dropout)
        self.layers = nn.ModuleList(SASRecBlock(config) for _ in range(config.num_blocks))

    def forward(self, events: Tensor, plan: AttentionPlan, seed: int | None, *, rows: Tensor | None = None) -> Tensor:
        x = self.input(events, plan, layer_seed(seed, 0), rows)
        for index, layer in enumerate(self.layers):
            x = layer(x, plan, layer_seed(seed, index + 1), rows)
        return x
