"""Jagged copies and the input stage: bytes against the copy bandwidth.

``what`` names the function: positions (the input stage), concat, split, to_dense, to_jagged, interleave.

Legend: B users, S longest user, D width, L events in all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import Absent, AotCase, Problem, Run, Sizes, Work, leaf, make_lengths, make_offsets, nbytes
from kernels import jagged

SEED = 7
DEFAULTS = {"what": "positions", "B": 128, "S": 211, "D": 50, "lengths": "skewed", "dropout": 0.2}
WHAT = ("positions", "concat", "split", "to_dense", "to_jagged", "interleave")
ML_1M = {"B": 128, "S": 211, "D": 50}
ML_20M = {"B": 128, "S": 211, "D": 256}
LARGE = {"B": 32, "S": 4096, "D": 512, "lengths": "full"}
SIZES: dict[str, list[Sizes]] = {
    "toy": [{"what": what, "B": 8, "S": 20, "D": 50} for what in WHAT],
    "quick": [{"name": f"ml-20m-{what}", "what": what, **ML_20M} for what in WHAT],
    "full": [
        {"name": f"{name}-{what}", "what": what, **sizes}
        for name, sizes in (("ml-1m", ML_1M), ("ml-20m", ML_20M), ("large", LARGE))
        for what in WHAT
    ],
}


def _plain_positions(events: Tensor, table: Tensor, offsets: Tensor, scale: float, dropout: float) -> Tensor:
    """What a user would write."""
    position = torch.arange(events.shape[0], device=events.device) - torch.repeat_interleave(
        offsets[:-1], offsets.diff(), output_size=events.shape[0]
    )
    return torch.nn.functional.dropout(scale * events + table[position], dropout)


def _plain_to_dense(values: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    index = offsets[:-1, None] + torch.arange(max_len, device=values.device)
    inside = index < offsets[1:, None]
    return torch.where(inside[:, :, None], values[index.clamp(max=values.shape[0] - 1)], 0)


def _plain_to_jagged(dense: Tensor, offsets: Tensor) -> Tensor:
    return dense[torch.arange(dense.shape[1], device=dense.device) < offsets.diff()[:, None]]


def _fbgemm_to_dense(values: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    return torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [max_len], 0.0)  # type: ignore[no-any-return]


def _fbgemm_to_jagged(dense: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    return torch.ops.fbgemm.dense_to_jagged(dense, [offsets], num_rows)[0]  # type: ignore[no-any-return]


def _fbgemm(function: Callable[[], Tensor], leaves: list[Tensor]) -> Run:
    try:
        import fbgemm_gpu  # noqa: F401

        function()
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        raise Absent(f"fbgemm: {str(error).splitlines()[0]}") from error
    return Run(function, leaves)


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    what, dim, longest = sizes["what"], sizes["D"], sizes["S"]
    if what not in WHAT:
        raise ValueError(f"what={what!r}: expected one of {', '.join(WHAT)}")
    lengths = make_lengths(sizes["B"], longest, sizes["lengths"], generator)
    offsets = make_offsets(lengths)
    rows = int(offsets[-1])
    a, b = (leaf((rows, dim), device, dtype, generator) for _ in range(2))
    both = leaf((2 * rows, dim), device, dtype, generator)
    dense = leaf((sizes["B"], longest, dim), device, dtype, generator)
    table = leaf((longest, dim), device, dtype, generator)
    scale, dropout = dim**0.5, sizes["dropout"]
    one, two, padded, added = nbytes(a), 2 * nbytes(a), nbytes(dense), nbytes(table)
    runs: dict[str, tuple[Callable[[], Any], list[Tensor], int]] = {
        "positions": (
            lambda: jagged.add_positions(a, table, offsets, scale, longest, dropout, SEED), [a, table], two + added
        ),
        "concat": (lambda: jagged.concat_jagged(a, offsets, b, offsets)[0], [a, b], 2 * two),
        "split": (lambda: jagged.split_jagged(both, offsets, offsets, rows), [both], 2 * two),
        "to_dense": (lambda: jagged.jagged_to_dense(a, offsets, longest), [a], one + padded),
        "to_jagged": (lambda: jagged.dense_to_jagged(dense, offsets, rows), [dense], one + one),
        "interleave": (lambda: jagged.interleave(a, b, offsets)[0], [a, b], 2 * two),
    }  # fmt: skip
    competitors: dict[str, dict[str, Callable[[], Run]]] = {
        "positions": {
            "torch": lambda: Run(lambda: _plain_positions(a, table, offsets, scale, dropout), [a, table])
        },
        "to_dense": {
            "torch": lambda: Run(lambda: _plain_to_dense(a, offsets, longest), [a]),
            "fbgemm": lambda: _fbgemm(lambda: _fbgemm_to_dense(a, offsets, longest), [a]),
        },
        "to_jagged": {
            "torch": lambda: Run(lambda: _plain_to_jagged(dense, offsets), [dense]),
            "fbgemm": lambda: _fbgemm(lambda: _fbgemm_to_jagged(dense, offsets, rows), [dense]),
        },
    }  # fmt: skip
    function, leaves, moved = runs[what]
    backward = one + padded if what == "to_jagged" else moved
    return Problem(
        Run(function, leaves),
        forward=Work(0.0, moved),
        backward=Work(0.0, backward),
        competitors=competitors.get(what, {}),
        tokens=rows,
    )


def _launch(dim: int, dtype: torch.dtype, rows: Tensor | None = None) -> None:
    from kernels._dropout_kernel import seeded_dropout_fwd
    from kernels.jagged import kernel

    offsets = torch.tensor([0, 30, 30, 70])
    a, table = torch.randn(70, dim).to(dtype), torch.randn(211, dim)
    joined = kernel.concat_jagged_fwd(a, offsets, a, offsets)
    kernel.split_jagged_fwd(joined, offsets, offsets, 70)
    kernel.dense_to_jagged_fwd(kernel.jagged_to_dense_fwd(a, offsets, 40, 0.0), offsets, 70)
    kernel.add_positions_fwd(a, table, offsets, 7.0, 0.2, SEED, torch.float32, rows)
    kernel.add_positions_bwd(torch.randn(70, dim), offsets, 211, 40, 7.0, 0.2, SEED, dtype, torch.float32, rows)
    seeded_dropout_fwd(a, 0.2, SEED, rows)


def aot_cases() -> list[AotCase]:
    return [
        ("ml-1m float32", partial(_launch, 50, torch.float32)),
        ("ml-1m bfloat16", partial(_launch, 50, torch.bfloat16)),
        ("ml-20m bfloat16", partial(_launch, 256, torch.bfloat16)),
        ("large bfloat16", partial(_launch, 512, torch.bfloat16)),
        ("ml-1m bfloat16, random rows", partial(_launch, 50, torch.bfloat16, torch.arange(70))),
        ("large bfloat16, random rows", partial(_launch, 512, torch.bfloat16, torch.arange(70))),
    ]
