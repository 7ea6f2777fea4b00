"""Benchmark points of scoring candidates for one user with a ranking model, M-FALCON (``hstu.scoring``).

``hstu`` scores against a cache that is there already; ``cold`` encodes the history first; ``plain`` passes history and
candidates through the model together, once for each micro-batch; ``separate`` makes a pass for each candidate. Times
are of whole calls: item embeddings, the attention's plan, heads, and the predictions back on the host. The model is of
the fused form (one token an event) with both biases and random weights.

Legend: S events of the history, C candidates, M of them in a micro-batch, D model width, H heads, A query/key and value
width per head.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ops import Absent, Problem, Run, Sizes, Work
from hstu.config import Config, HSTUConfig
from hstu.config_ranking import ActionConfig, RankingConfig, TaskConfig
from hstu.data.ranking import RankingData
from hstu.data.store import write_store
from hstu.model.ranking import RankingModel
from hstu.scoring import History, Scorer

NUM_ITEMS = 10_000
GAP_S = 3_600
"""Longest time between two events, s."""
MAX_SEPARATE_ROWS = 16_384
"""Rows of all separate passes together, at most."""
MAX_PASSES = 16
"""Micro-batches of a plain pass, at most."""

_WIDTHS = {
    "ml-1m": {"layers": 2, "D": 50, "H": 1, "A": 50},
    "large": {"layers": 4, "D": 256, "H": 4, "A": 64},
}
HISTORIES, CANDIDATES = (256, 1_024, 4_096), (1, 16, 256, 1_024, 16_384)
MICRO_BATCHES = (64, 256, 4_096)
"""Beside the default of 1,024."""


def _point(width: str, events: int, candidates: int, **more: Any) -> dict[str, Any]:
    tail = "".join(f"-{name}{value}" for name, value in more.items())
    return {"name": f"{width}-S{events}-C{candidates}{tail}", **_WIDTHS[width], "S": events, "C": candidates, **more}


_FULL = [
    *(_point(width, s, c) for width in _WIDTHS for s in HISTORIES for c in CANDIDATES),
    *(_point(width, 1_024, 16_384, M=m) for width in _WIDTHS for m in MICRO_BATCHES),
]
SIZES: dict[str, list[dict[str, Any]]] = {
    "toy": [{"name": "toy", "layers": 2, "D": 8, "H": 2, "A": 4, "S": 12, "C": 5, "M": 2}],
    "quick": [_point(width, s, c) for width in _WIDTHS for s in HISTORIES for c in (1, 1_024, 16_384)],
    "full": _FULL,
}
DEFAULTS: dict[str, Any] = {"layers": 2, "D": 50, "H": 1, "A": 50, "S": 1_024, "C": 1_024, "M": 1_024}


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    """Random weights, a random user and random candidates; see ``benchmarks.ops``."""
    scorer = _scorer(sizes, device, dtype)
    history = _history(sizes["S"], scorer, generator)
    candidates = _random(1, NUM_ITEMS + 1, sizes["C"], generator)
    cache = scorer.encode(history)
    layers, width = sizes["layers"], sizes["H"] * sizes["A"]
    size, dim = torch.finfo(dtype).bits // 8, sizes["D"]
    weights = 5 * dim * width  # u, v, q, k and the output projection
    flops = 2.0 * layers * sizes["C"] * (weights + 2 * width * (sizes["S"] + 1))
    num_bytes = size * (layers * (2 * width * sizes["S"] + weights) + 2 * dim * sizes["C"])
    return Problem(
        _run(lambda: scorer.score(cache, candidates)),
        forward=Work(flops, num_bytes),
        competitors={
            "cold": lambda: _run(lambda: scorer.score(history, candidates)),
            "plain": lambda: _plain(scorer, history, candidates),
            "separate": lambda: _separate(scorer, history, candidates),
        },
        tokens=sizes["C"],
    )


def _scorer(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Scorer:
    ranking = RankingConfig("fused", tasks={"like": TaskConfig("like")}, actions={"like": ActionConfig()})
    model = HSTUConfig(
        dim=sizes["D"], num_blocks=sizes["layers"], num_heads=sizes["H"], qk_dim=sizes["A"], v_dim=sizes["A"],
        max_len=sizes["S"], dropout=0.0,
    )  # fmt: skip
    nothing = np.zeros(1)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(
            Path(folder) / "store", offsets=np.array([0, 1]), item_ids=nothing + 1, timestamps=nothing, meta={},
            columns={"like": nothing.astype(np.float32)}, num_items=NUM_ITEMS,
        )  # fmt: skip
        data = RankingData(store, ranking)
        trained = RankingModel(model, ranking, data).to(device)
    for name, parameter in trained.named_parameters():
        if ".bias." not in name:  # the attention's tables stay in float32
            parameter.data = parameter.data.to(dtype)
    return Scorer(Config(model=model, ranking=ranking), data, trained, device, micro_batch=sizes["M"])


def _history(num_events: int, scorer: Scorer, generator: torch.Generator) -> History:
    bits = np.zeros((num_events, scorer.data.num_action_bits), bool)
    bits[np.arange(num_events), _random(0, 2, num_events, generator)] = True
    times = _random(0, GAP_S, num_events, generator).cumsum()
    return History(_random(1, NUM_ITEMS + 1, num_events, generator), times, bits, {})


def _random(low: int, high: int, size: int, generator: torch.Generator) -> np.ndarray:
    return torch.randint(low, high, (size,), generator=generator, device=generator.device).cpu().numpy()


def _run(call: Any) -> Run:
    return Run(lambda: torch.from_numpy(call()["like"]))


def _plain(scorer: Scorer, history: History, candidates: np.ndarray) -> Run:
    """A pass over history and micro-batch for each micro-batch."""
    if len(candidates) > MAX_PASSES * scorer.micro_batch:
        raise Absent(f"more than {MAX_PASSES} passes")
    return _run(lambda: scorer.score_plain(history, candidates))


def _separate(scorer: Scorer, history: History, candidates: np.ndarray) -> Run:
    """A pass over history and candidate for each candidate."""
    if len(candidates) * (len(history) + 1) > MAX_SEPARATE_ROWS:
        raise Absent(f"more than {MAX_SEPARATE_ROWS:,} rows in all")

    def forward() -> Tensor:
        each = [scorer.score_plain(history, candidates[i : i + 1])["like"] for i in range(len(candidates))]
        return torch.from_numpy(np.concatenate(each))

    return Run(forward)
