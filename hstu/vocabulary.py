"""What a run does about items that have no row of their own: keeps the map up to date, starts rows anew, and tells.

Legend: n rows, D width, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hstu.baselines import expand
from hstu.data.ranking_batches import sequence_rows, take, target_sequences
from hstu.distributed import World
from hstu.embedding import ItemTable, LocalItemTable, initial_rows
from hstu.item_rows import UNKNOWN, HashedRows, ItemRows, ManagedRows, MappedTable
from hstu.optim import WeightAverage
from hstu.seeding import derive
from hstu.transfer import to_device

if TYPE_CHECKING:
    from hstu.config import Config
    from hstu.data.batches import Batch
    from hstu.data.ranking import RankingData
    from hstu.data.ranking_batches import RankingBatch
    from hstu.data.splits import Targets
    from hstu.data.store import SequenceStore

RESET_SEED = 13
"""Purpose number of the seed of the values of rows that are given to other items."""
_USERS = 4096
"""Users whose histories are looked at at a time."""


class Vocabulary:
    """The items of one training run, on every rank alike."""

    def __init__(self, model: nn.Module, seed: int, world: World) -> None:
        table = model.table
        self.model, self.seed, self.world = model, seed, world
        self.item_rows: ItemRows | None = table.item_rows if isinstance(table, MappedTable) else None

    @torch.no_grad()
    def begin_step(
        self,
        batches: Sequence[Batch | RankingBatch],
        optimizers: Sequence[torch.optim.Optimizer],
        average: WeightAverage | None,
    ) -> None:
        """Before a step on ``batches`` of this rank: takes their ids in, and starts anew the rows given to other items.

        What the step predicts counts (positions of weight 0 predict nothing; of a ranking model the items of predicted
        events): every event once a pass over the log. What it reads would count old events again with every new one of
        their user, and keep the rows of what is gone.
        """
        rows = self.item_rows
        if not isinstance(rows, ManagedRows):
            return
        inputs = torch.cat([batch.item_ids for batch in batches])
        labels = torch.cat([batch.predicted_items for batch in batches])
        taken = rows.take_in(self.world.gather(labels))
        if len(taken):
            seed = derive(self.seed, RESET_SEED, int(rows.step))
            reset_rows(self.model, taken, seed, optimizers, average)
        found = [inputs.new_full((), len(inputs)), num_unknown(rows, inputs)]
        found += [labels.new_full((), len(labels)), num_unknown(rows, labels)]
        rows.since += self.world.sum(torch.stack(found))

    def report(self) -> dict[str, float]:
        """Share of inputs and labels without a row since the last call; rows in use and items that have lost theirs."""
        if not isinstance(self.item_rows, ManagedRows):
            return {}
        inputs, unknown_inputs, labels, unknown_labels = self.item_rows.since.tolist()
        self.item_rows.since.zero_()
        return {
            "oov_inputs": unknown_inputs / max(1, inputs),
            "oov_labels": unknown_labels / max(1, labels),
            "rows_used": self.item_rows.num_known,
            "evictions": int(self.item_rows.evicted),
        }

    def state(self, values: dict[str, float]) -> list[str]:
        """Said at a validation. values: what it found, with :func:`unknown_shares` where they are known."""
        rows = self.item_rows
        if not isinstance(rows, ManagedRows):
            return []
        line = f"{rows.num_known:,} of {rows.num_rows - 1:,} rows given, taken back {int(rows.evicted):,} times"
        return [f"{line}; {unknown_text(values)}" if "oov_labels" in values else line]

    def notes(self) -> list[str]:
        """Said at the start."""
        rows = self.item_rows
        if isinstance(rows, HashedRows):
            sharing, expected = rows.sharing()
            return [
                f"embedding.ids=hash: {rows.num_items:,} items on {rows.num_rows:,} rows; {sharing:,} "
                f"({sharing / rows.num_items:.1%}) share theirs with another, expected {expected:.1%}"
            ]
        if isinstance(rows, ManagedRows):
            return [
                f"embedding.ids=managed: {rows.num_items:,} items, {rows.num_rows - 1:,} rows for those in use "
                f"({rows.num_known:,} given), one for the others"
            ]
        return []


def unknown_text(shares: dict[str, float]) -> str:
    """shares: as of :func:`unknown_shares`."""
    found = "without a row of their own: {oov_inputs:.1%} of the inputs, {oov_labels:.1%} of the items asked for"
    return found.format(**shares)


def num_unknown(rows: ManagedRows, ids: Tensor) -> Tensor:
    """How many ids have no row of their own, a scalar int64 on their device."""
    return (rows.rows(ids) == UNKNOWN).sum()


def unknown_shares(model: nn.Module, store: SequenceStore, targets: Targets, max_len: int) -> dict[str, float]:
    """Shares without a row, as of :meth:`Vocabulary.report`, of what an evaluation of ``targets`` reads and asks for;
    {} where every item has a row."""
    offsets = np.asarray(store.offsets)

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(targets), _USERS):
            users, ends = targets.users[start : start + _USERS], np.asarray(targets.rows[start : start + _USERS])
            yield expand(np.maximum(offsets[users], ends - max_len), ends)[0], ends

    return _shares(model, store, parts())


def unknown_shares_of_events(model: nn.Module, data: RankingData, config: Config, targets: Targets) -> dict[str, float]:
    """As :func:`unknown_shares`, of a ranking model that predicts the events ``targets``."""

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        sequences = target_sequences(data, config, np.asarray(targets.rows))
        for start in range(0, len(sequences), _USERS):
            part = take(sequences, slice(start, start + _USERS))
            rows, owner = sequence_rows(part)
            yield rows, rows[rows >= part.split[owner]]

    return _shares(model, data.store, parts())


def _shares(
    model: nn.Module, store: SequenceStore, parts: Iterator[tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:  # fmt: skip
    """Of event rows that are read and that are asked for, part by part."""
    rows = model.table.item_rows if isinstance(model.table, MappedTable) else None
    if not isinstance(rows, ManagedRows):
        return {}
    counts = np.zeros((2, 2), np.int64)
    for part in parts:
        for place, events in enumerate(part):
            ids = torch.from_numpy(np.asarray(store.item_ids[events], np.int64)).to(rows.waiting.device)
            counts[place] += (len(ids), int(num_unknown(rows, ids)))
    shares = counts[:, 1] / np.maximum(1, counts[:, 0])
    return {"oov_inputs": float(shares[0]), "oov_labels": float(shares[1])}


@torch.no_grad()
def reset_rows(
    model: nn.Module, rows: Tensor, seed: int, optimizers: Sequence[torch.optim.Optimizer],
    average: WeightAverage | None,
) -> None:  # fmt: skip
    """Gives rows [n] of the item table initial values by ``seed``, and its optimizer's state of them zeros."""
    table: ItemTable = model.table.rows  # type: ignore[assignment, union-attr]
    values = initial_rows(len(rows), table.dim, seed)
    if isinstance(table, LocalItemTable):
        values = to_device(values.to(table.weight.dtype), table.weight.device)
        table.weight[rows] = values
        for optimizer in optimizers:
            for state in optimizer.state.get(table.weight, {}).values():
                if isinstance(state, Tensor) and state.dim() and len(state) == len(table.weight):
                    state.index_fill_(0, rows, 0.0)
        if average is not None:
            average.tensors()["table.rows.weight"][rows] = values
        return
    _write(table.state_dict()["weight"], rows, values, table.num_items + 1)
    if average is not None and "table.rows.weight" in (averages := average.tensors()):
        _write(averages["table.rows.weight"], rows, values, table.num_items + 1)
    for optimizer in optimizers:
        states = optimizer.states() if hasattr(optimizer, "states") else {}
        for field in states.get("table.rows.weight", {}).values():
            if hasattr(field, "local_shards"):
                _write(field, rows, None, table.num_items + 1)


def _write(sharded: Any, rows: Tensor, values: Tensor | None, num_rows: int) -> None:
    """Writes rows [n] of what this rank has of a sharded tensor. values: [n, D]; None: zeros.

    Of one number a row, those of the parts of columns stand one after another: each part has all ``num_rows``.
    """
    for part in sharded.local_shards():
        local, offsets = part.tensor.detach(), part.metadata.shard_offsets
        place = rows.to(local.device) - (offsets[0] % num_rows)
        inside = (place >= 0) & (place < len(local))
        if values is None:
            local[place[inside]] = 0.0
        else:
            own = values[:, offsets[1] : offsets[1] + local.shape[1]].to(local)
            local[place[inside]] = own[inside]
