"""torchrec's pipeline around a training step: ids of the next batches go to their ranks while this one computes.

    for step_input in pipeline.through(inputs):
        loss = pipeline.progress()     # forward and backward of step_input

TrainPipelineSparseDist traces a module that calls the collection with an attribute of its batch. That module is made
here: the item table's collection, then the whole model with the rows that came. A batch enters up to two steps ahead:
what its loss will score is known from its labels and its seed.

Managed rows change from step to step, by the ids of the steps alone. A copy of the map runs ahead: it takes ids in when
they enter. The model's own map takes them in when their step begins, and only then rows begin anew. So every step finds
the rows that it was sent for, and what is saved, logged and evaluated between steps is as of that step.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.streamable import Pipelineable

from hstu.data.batches import Batch
from hstu.data.predicted import Predicted
from hstu.errors import UserError
from hstu.item_rows import ItemRows, ManagedRows, MappedTable
from hstu.model.retrieval import NEGATIVES_SEED, RetrievalModel
from hstu.seeding import derive
from hstu.sharded.losses import Scored, scored_by
from hstu.sharded.plan import quiet
from hstu.sharded.tables import ShardedItemTable

if TYPE_CHECKING:
    from hstu.train import StepInput


class _Batch(Pipelineable):
    """What the pipeline carries: the ids in torchrec's form, and everything else of the step."""

    def __init__(self, keyed: Any, scored: Scored, step_input: StepInput, seed: int) -> None:
        self.keyed, self.scored, self.step_input, self.seed = keyed, scored, step_input, seed

    def to(self, device: torch.device, non_blocking: bool = False) -> _Batch:
        return self  # the loader has put it there

    def record_stream(self, stream: torch.Stream) -> None:
        self.keyed.record_stream(stream)
        scored = self.scored
        for tensor in (scored.ids, scored.labels, scored.candidates, scored.bank):
            if tensor is not None:
                tensor.record_stream(stream)


class _Model(nn.Module):
    """The model for rows that are there. It has no part that torchrec would trace into."""

    def __init__(self, table: ShardedItemTable, loss: Callable[[StepInput, int], Tensor]) -> None:
        super().__init__()
        self.keep = (table, loss)  # in a tuple, where no module is looked for

    def forward(self, found: Any, batch: Any) -> Tensor:
        table, loss = self.keep
        with table.given(found, batch.scored):
            return loss(batch.step_input, batch.seed)


class _Step(nn.Module):
    def __init__(self, table: ShardedItemTable, loss: Callable[[StepInput, int], Tensor]) -> None:
        super().__init__()
        self.collection, self.model = table.collection, _Model(table, loss)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        loss = self.model(self.collection(batch.keyed), batch)
        return loss, loss.detach()


class _NoOptimizer:
    """In place of one: the trainer has set the rates, and makes the step when it has seen the gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def step(self) -> None:
        pass


class Pipeline:
    """Forward and backward of the steps of a run, one batch each, with the next one's ids under way.

    Args:
        model: a retrieval model with a sharded item table.
        loss: of a step and its seed, times the number of ranks.
        seed_of: the seed that ``loss`` gets with the step that comes so many steps after the next.

    Raises UserError for another model.
    """

    def __init__(
        self, model: Any, loss: Callable[[StepInput, int], Tensor], seed_of: Callable[[int], int]
    ) -> None:  # fmt: skip
        table: Any = model.table
        self.item_rows: ItemRows | None = None
        if isinstance(model.table, MappedTable):
            table, self.item_rows = model.table.rows, model.table.item_rows
        if not isinstance(model, RetrievalModel) or not isinstance(table, ShardedItemTable):
            raise UserError("embedding.pipeline=true: expected a retrieval model whose item table is sharded")
        self.model, self.table, self.seed_of = model, table, seed_of
        self.ahead = self.item_rows
        """The map as of the batch that entered last; None: every item has its own row."""
        with quiet():
            self.pipeline: Any = TrainPipelineSparseDist(
                _Step(table, loss), _NoOptimizer(), table.world.device  # type: ignore[arg-type]
            )  # fmt: skip
        self.attached = True
        self._waiting: deque[StepInput] = deque()

    def through(self, inputs: Iterable[StepInput]) -> Iterator[StepInput]:
        """The inputs one by one; each has to be followed by :meth:`progress`.

        In between the collection is the pipeline's; before and after, lookups are as ever.
        """
        self._source, self._fed = iter(inputs), 0
        self._waiting.clear()
        if isinstance(self.item_rows, ManagedRows):
            self.ahead = copy.deepcopy(self.item_rows)
            self._kept = self.ahead.waiting  # the copy lets go of it while the pipeline's stream may still read it
        self._batches = self._make_batches()  # a new object: the pipeline remembers that the last one ended
        if not self.attached:
            self.pipeline.attach()
            self.attached = True
        try:
            while self._waiting or self._pull():
                yield self._waiting[0]
        finally:
            self.detach()

    def detach(self) -> None:
        """Gives the collection back."""
        if self.attached:
            self.pipeline.detach()
            self.attached = False

    def progress(self) -> Tensor:
        """Forward and backward of the input last yielded; its loss."""
        loss = self.pipeline.progress(self._batches)
        assert self.pipeline._pipelined_modules  # where torchrec finds none, it goes on without
        self._waiting.popleft()
        self._fed -= 1
        return loss  # type: ignore[no-any-return]

    def _pull(self) -> bool:
        found = next(self._source, None)
        if found is not None:
            self._waiting.append(found)
        return found is not None

    def _make_batches(self) -> Iterator[_Batch]:
        """The batches as they enter the pipeline. All ranks come here at the same places."""
        while self._fed < len(self._waiting) or self._pull():
            step_input, seed = self._waiting[self._fed], self.seed_of(self._fed)
            self._fed += 1
            if self.table.world.device.type == "cuda":  # the loader made the batch on the stream of the training
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            ((share, _),) = step_input.parts
            batch, table, loss = share.batch, self.table, self.model.loss_config
            assert loss is not None
            own_seed = derive(seed, NEGATIVES_SEED)
            ids, predicted, num_live = self._mapped(batch)
            scored = scored_by(
                loss, table.world, predicted.labels, predicted.random_rows, num_live, own_seed, predicted.every
            )
            yield _Batch(table.keyed(ids, scored.ids), scored, step_input, seed)

    def _mapped(self, batch: Batch) -> tuple[Tensor, Predicted, int]:
        """Rows [L] of the inputs of the batch that enters, what counts of it, and how many rows are in use then."""
        rows, predicted = self.ahead, batch.predicted()
        if rows is None:
            return batch.item_ids, predicted, self.table.num_items
        if isinstance(rows, ManagedRows):
            rows.take_in(self.table.world.gather(predicted.labels))
        return rows.rows(batch.item_ids), rows.for_loss(predicted), rows.num_live
