"""Jagged tensors: tokens interleaved, two joined and parted user by user, dense and back, positions added."""

from kernels.jagged.op import (
    add_positions,
    concat_jagged,
    deinterleave,
    dense_to_jagged,
    interleave,
    jagged_to_dense,
    positions_of,
    split_jagged,
)

__all__ = [
    "add_positions",
    "concat_jagged",
    "deinterleave",
    "dense_to_jagged",
    "interleave",
    "jagged_to_dense",
    "positions_of",
    "split_jagged",
]
