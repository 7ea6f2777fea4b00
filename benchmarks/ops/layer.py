"""Benchmark points of a stack of whole HSTU layers, forward (evaluation) and training (dropout on).

The first point is the one that the reference repository published (its issue 530: 5 layers, D 512, 4 heads of 128,
32 users with 1024 events of history and 2048 candidates, no bias, 9.30 ms forward on one H100). Weights and
activations are in the dtype under test, the bias tables in float32.

Legend: B users, L total events, D model width, H heads, A query/key width, V value width, S longest user.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ops import Problem, Run, Sizes, Work, leaf, make_lengths, make_offsets, nbytes
from benchmarks.ops.attention import BACKWARD_FLOPS, GAP_S
from hstu.config import BiasConfig, HSTUConfig
from hstu.model.layer import HSTULayer
from kernels.attention import AttentionPlan, TimeBuckets, make_plan

DROPOUT_SEED = 1

_ISSUE_530 = {"layers": 5, "B": 32, "D": 512, "H": 4, "A": 128, "S": 3072}
_PUBLIC = [
    {"name": "ml-1m", "layers": 2, "B": 128, "D": 50, "H": 1, "A": 50, "S": 211, "rab": True},
    {"name": "ml-1m-large", "layers": 8, "B": 128, "D": 50, "H": 2, "A": 25, "S": 211, "rab": True},
    {"name": "ml-20m", "layers": 4, "B": 128, "D": 256, "H": 4, "A": 64, "S": 211, "rab": True},
    {"name": "ml-20m-large", "layers": 16, "B": 128, "D": 256, "H": 8, "A": 32, "S": 211, "rab": True},
    {"name": "books", "layers": 4, "B": 128, "D": 64, "H": 4, "A": 16, "S": 61, "rab": True},
]
_QUICK: list[dict[str, Any]] = [
    {"name": "issue-530", **_ISSUE_530, "targets": 2048},
    {"name": "issue-530-causal", **_ISSUE_530},
    {"name": "issue-530-causal-rab", **_ISSUE_530, "rab": True},
    *_PUBLIC,
]
SIZES: dict[str, list[dict[str, Any]]] = {
    "toy": [{"name": "toy", "layers": 2, "B": 2, "D": 8, "H": 2, "A": 4, "S": 12, "targets": 3, "rab": True}],
    "quick": _QUICK,
    "full": [*_QUICK, *({**p, "name": f"{p['name']}-skewed", "lengths": "skewed"} for p in _PUBLIC)],
}
DEFAULTS: dict[str, Any] = {
    "layers": 5, "B": 32, "D": 512, "H": 4, "A": 128, "V": None, "S": 1024, "targets": 0, "lengths": "full",
    "rab": False,
}  # fmt: skip
"""targets: candidates at each user's end, part of S. rab: position and time bias."""


class _Stack(nn.Module):
    def __init__(self, config: HSTUConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(num_layers))

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        seed = DROPOUT_SEED if torch.is_grad_enabled() else None
        for layer in self.layers:
            x = layer(x, plan, seed)
        return x


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    """Random weights and inputs of one point; see ``benchmarks.ops``."""
    heads, qk_dim, v_dim = sizes["H"], sizes["A"], sizes["V"] or sizes["A"]
    bias = BiasConfig(position=sizes["rab"], time=sizes["rab"])
    config = HSTUConfig(
        dim=sizes["D"], num_blocks=sizes["layers"], num_heads=heads, qk_dim=qk_dim, v_dim=v_dim, bias=bias,
        max_len=sizes["S"], extra_slots=1,
    )  # fmt: skip
    stack = _Stack(config, sizes["layers"]).to(device)
    for name, parameter in stack.named_parameters():
        if ".bias." not in name:
            parameter.data = parameter.data.to(dtype)
    lengths = make_lengths(sizes["B"], sizes["S"], sizes["lengths"], generator)
    offsets = make_offsets(lengths)
    total = int(offsets[-1])
    x = leaf((total, sizes["D"]), device, dtype, generator)
    targets = lengths.clamp(max=sizes["targets"])
    timing: tuple[Any, ...] = ()
    if sizes["rab"]:
        times = torch.randint(0, GAP_S, (total,), device=device, generator=generator).cumsum(0)
        timing = (times + 60, times, TimeBuckets())
    plan = make_plan(offsets, sizes["S"], *timing, num_targets=targets if sizes["targets"] else None)

    width = heads * (qk_dim + v_dim)
    history = (lengths - targets).double()
    pairs = float((history.square() / 2 + targets * history).sum())  # of the causal history, and targets seeing it
    attention = 2.0 * pairs * width
    linear = 2.0 * total * sizes["D"] * (2 * width + heads * v_dim)
    weights = nbytes(*stack.layers[0].parameters())
    layers = sizes["layers"]
    return Problem(
        Run(lambda: stack(x, plan), [x, *stack.parameters()]),
        forward=Work(layers * (linear + attention), layers * (2 * nbytes(x) + weights)),
        backward=Work(layers * (2 * linear + BACKWARD_FLOPS * attention), layers * (3 * nbytes(x) + 2 * weights)),
        tokens=total,
    )
