"""The HSTU layer: three ops. The same layer serves retrieval, ranking, training and inference.

Legend: L total events, D model width, H heads, A query/key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hstu.config import HSTUConfig
from hstu.model.bias import RelativeBias
from kernels.attention import AttentionPlan, attention
from kernels.gate_norm_linear import gate_norm_linear
from kernels.norm_linear_silu import norm_linear_silu

NORM_EPS = 1e-6
"""Of both norms (reference code)."""
PROJECTION_STD = 0.02
"""Initial standard deviation of the projection to u, v, q, k (reference code)."""


class HSTULayer(nn.Module):
    """Pointwise projection, pointwise aggregated attention with relative bias, gated output projection.

    Source: Zhai et al. 2024, equations 1 to 3; norms, widths and initial values as in the reference code.
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim = config.num_heads, config.qk_dim, config.v_dim
        self.dropout = config.dropout
        padded = float(config.max_len + config.extra_slots)
        self.divisor: Any = padded if config.divisor == "padded" else config.divisor
        v_width, qk_width = config.num_heads * config.v_dim, config.num_heads * config.qk_dim
        self.widths = [v_width, v_width, qk_width, qk_width]
        self.uvqk = nn.Parameter(torch.randn(config.dim, sum(self.widths)) * PROJECTION_STD)
        self.bias = RelativeBias(config.bias, config.num_heads, config.max_len + config.extra_slots)
        out = nn.Linear(v_width, config.dim)  # for torch's default initial bias, as in the reference code
        self.out_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(config.dim, v_width)).T.contiguous())
        self.out_bias = nn.Parameter(out.bias.detach().clone())

    def forward(self, x: Tensor, plan: AttentionPlan, seed: int | None) -> Tensor:
        """x: [L, D]; seed: of the dropout, None in evaluation. Returns [L, D]."""
        u, v, q, k = norm_linear_silu(x, self.uvqk, NORM_EPS).split(self.widths, dim=1)
        av = attention(
            q.unflatten(1, (self.num_heads, self.qk_dim)),  # [L, H, A]
            k.unflatten(1, (self.num_heads, self.qk_dim)),
            v.unflatten(1, (self.num_heads, self.v_dim)),  # [L, H, V]
            plan,
            self.bias.position,
            self.bias.time,
            divisor=self.divisor,
        ).flatten(1)  # [L, H*V]
        return gate_norm_linear(av, u, self.out_weight, self.out_bias, x, NORM_EPS, self.dropout, seed)
