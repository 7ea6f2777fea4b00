"""Initial values of sharded tables: up to a size those of a local table, and beyond it a rank's part alone.

A local table is filled from torch's CPU generator by an algorithm of torch's that needs the whole of it (a truncated
normal is drawn again where it was out of bounds, round after round). So a table of at most ``MAX_WHOLE`` elements is
drawn whole in host memory, for a moment, and each rank keeps its part: the values are those of a local table. Beyond
that every block of ``BLOCK_ROWS`` rows has a generator of its own, seeded by the table's seed and the block's number,
and a rank draws only the blocks that it needs: memory is that of a block a thread, time that of the rank's own part,
and the values are the same for every number of ranks.

All values are drawn on the host, for tables on a GPU too. What a generator of CUDA draws depends on the model of the
GPU (the number of its multiprocessors decides which thread fills which element), so values drawn there would not be
those of the same run on another GPU, let alone on the CPU. Blocks are drawn by as many threads as torch computes with.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu.distributed import same_gpu
from hstu.seeding import derive

MAX_WHOLE = 2**26
"""Elements: 256 MiB, drawn in a few seconds."""
BLOCK_ROWS = 2**14

Fill = Callable[[Tensor, torch.Generator], object]
"""Fills [n, D] float32 from a generator of the CPU."""


@dataclass(frozen=True)
class InitialValues:
    """Of a table [num_rows, dim]. state: of the generator before the table, as ``torch.get_rng_state`` gives it."""

    num_rows: int
    dim: int
    fill: Fill
    state: Tensor

    @classmethod
    def take(cls, num_rows: int, dim: int, fill: Fill) -> InitialValues:
        """Of the table next in torch's default generator, which then stands where it stands after a local table.

        A table that is not drawn whole takes one number.
        """
        values = cls(num_rows, dim, fill, torch.get_rng_state())
        if values.drawn_whole:
            fill(torch.empty(num_rows, dim), torch.default_generator)
        else:
            values._seed(torch.default_generator)
        return values

    @property
    def drawn_whole(self) -> bool:
        """Whether the values are those of a local table."""
        return self.num_rows * self.dim <= MAX_WHOLE

    @staticmethod
    def _seed(generator: torch.Generator) -> int:
        return int(torch.randint(2**62, (), generator=generator))

    def write(self, target: Tensor, first_row: int, first_column: int) -> None:
        """Fills target [n, d], the rows and columns of the table from there on; on any device."""
        generator = torch.Generator()
        generator.set_state(self.state)
        if self.drawn_whole:
            self._write_block(target, first_row, first_column, 0, self.num_rows, generator)
            return
        seed = self._seed(generator)

        def write_block(start: int) -> None:
            own = torch.Generator().manual_seed(derive(seed, start // BLOCK_ROWS))
            size = min(BLOCK_ROWS, self.num_rows - start)
            self._write_block(target, first_row, first_column, start, size, own)

        starts = range(first_row // BLOCK_ROWS * BLOCK_ROWS, first_row + len(target), BLOCK_ROWS)
        with ThreadPoolExecutor(torch.get_num_threads(), "initial", initializer=same_gpu()) as threads:
            list(threads.map(write_block, starts))

    @torch.no_grad()
    def _write_block(
        self, target: Tensor, first_row: int, first_column: int, start: int, size: int, generator: torch.Generator
    ) -> None:  # fmt: skip
        """Draws rows ``start`` to ``start + size - 1`` of the table, and keeps those that lie in the target."""
        block = torch.empty(size, self.dim)
        self.fill(block, generator)
        low, high = max(start, first_row), min(start + size, first_row + len(target))
        if low < high:
            part = block[low - start : high - start, first_column : first_column + target.shape[1]]
            target[low - first_row : high - first_row].copy_(part)
