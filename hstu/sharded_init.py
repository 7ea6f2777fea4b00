"""Initial values of sharded tables: up to a size those of a local table, and beyond it a rank's part alone.

A local table is filled from torch's CPU generator by an algorithm of torch's that needs the whole of it (a truncated
normal is drawn again where it was out of bounds, round after round). So a table of at most ``MAX_WHOLE`` elements is
drawn whole in host memory, for a moment, and each rank keeps its part: the values are those of a local table. Beyond
that every block of ``BLOCK_ROWS`` rows has a generator of its own, seeded by the table's seed and the block's number,
and a rank draws only the blocks that it needs: memory is that of a block, time that of the rank's own part, and the
values are the same for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def blocks(self, first: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """First row and values of the blocks that hold rows first .. stop - 1."""
        generator = torch.Generator()
        generator.set_state(self.state)
        if self.drawn_whole:
            block = torch.empty(self.num_rows, self.dim)
            self.fill(block, generator)
            yield 0, block
            return
        seed = self._seed(generator)
        for start in range(first // BLOCK_ROWS * BLOCK_ROWS, stop, BLOCK_ROWS):
            block = torch.empty(min(BLOCK_ROWS, self.num_rows - start), self.dim)
            self.fill(block, generator.manual_seed(derive(seed, start // BLOCK_ROWS)))
            yield start, block

    def write(self, target: Tensor, first_row: int, first_column: int) -> None:
        """Fills target [n, d], the rows and columns of the table from there on."""
        rows, columns = target.shape
        stop = first_row + rows
        with torch.no_grad():
            for start, block in self.blocks(first_row, stop):
                low, high = max(start, first_row), min(start + len(block), stop)
                if low < high:
                    part = block[low - start : high - start, first_column : first_column + columns]
                    target[low - first_row : high - first_row].copy_(part)
