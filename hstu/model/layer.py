"""The HSTU layer: three ops. The same layer serves retrieval, ranking, training and inference.

Legend: L total events, D model width, H heads, A query/key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer for cached inference."""

    k: Tensor
    """[rows, H, A]."""
    v: Tensor
    """[rows, H, V]."""
    first: int = 0
    """Row at which the keys and values of this pass are written."""


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

    def forward(
        self, x: Tensor, plan: AttentionPlan, seed: int | None, cache: LayerCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x: [L, D]; seed: of the dropout, None in evaluation. Returns [L, D].

        rows: as of :meth:`hstu.model.encoder.Encoder.forward`.
        cache: keys and values of the rows are written there; a plan in the delta form then reads all of them from it.
        """
        u, v, q, k = norm_linear_silu(x, self.uvqk, NORM_EPS).split(self.widths, dim=1)
        q, k = (t.unflatten(1, (self.num_heads, self.qk_dim)) for t in (q, k))  # [L, H, A]
        v = v.unflatten(1, (self.num_heads, self.v_dim))  # [L, H, V]
        if cache is not None:
            written = slice(cache.first, cache.first + x.shape[0])
            cache.k[written], cache.v[written] = k, v
            if plan.is_delta:
                k, v = cache.k, cache.v
        av = attention(
            q,
            k,
            v,
            plan,
            self.bias.position,
            self.bias.time,
            divisor=self.divisor,
        ).flatten(1)  # [L, H*V]
        return gate_norm_linear(av, u, self.out_weight, self.out_bias, x, NORM_EPS, self.dropout, seed, rows=rows)
