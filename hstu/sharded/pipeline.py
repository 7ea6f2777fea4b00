"""torchrec's pipeline around training: ids of the next batches go to their ranks while this one computes.

    for step_input in pipeline.through(inputs, first_step):
        for _ in step_input.parts:
            loss = pipeline.progress()     # forward and backward of one batch of the step

TrainPipelineSparseDist traces a module that calls collections with attributes of its batch. That module is made here:
the collections of all sharded tables (items, features of events, features of users), then the whole model with the rows
that came. A batch enters up to two batches ahead, be they of this step or the next: what its loss will score is known
from its labels and its seed.

Managed rows change from step to step, by the ids of the steps alone. A copy of the map runs ahead: it takes a step's
ids in when its first batch enters. The model's own map takes them in when the step begins, and only then rows begin
anew. So every step finds the rows that it was sent for, and what is saved, logged and evaluated between steps is as of
that step.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.streamable import Pipelineable

from hstu.config import LossConfig
from hstu.data.batches import Batch
from hstu.distributed import World
from hstu.errors import UserError
from hstu.item_rows import ItemRows, ManagedRows, MappedTable
from hstu.model.ranking import RankingModel
from hstu.model.retrieval import NEGATIVES_SEED, RetrievalModel
from hstu.seeding import derive
from hstu.sharded.losses import Scored, scored_by
from hstu.sharded.plan import quiet
from hstu.sharded.tables import ShardedItemTable, sharded_modules

if TYPE_CHECKING:
    from hstu.train import StepInput


class _Batch(Pipelineable):
    """What the pipeline carries: for each collection the ids in torchrec's form; what the loss scores, or None; and the
    loss, of the model with the rows of those ids."""

    def __init__(self, keyed: list[Any], scored: Scored | None, loss: Callable[[], Tensor]) -> None:
        self.keyed, self.scored, self.loss = keyed, scored, loss

    def to(self, device: torch.device, non_blocking: bool = False) -> _Batch:
        return self  # the loader has put it there

    def record_stream(self, stream: torch.Stream) -> None:
        for keyed in self.keyed:
            keyed.record_stream(stream)
        scored = self.scored
        for tensor in () if scored is None else (scored.ids, scored.labels, scored.candidates, scored.bank):
            if tensor is not None:
                tensor.record_stream(stream)


class _Model(nn.Module):
    """The model for rows that are there. It has no part that torchrec would trace into."""

    def __init__(self, owners: Sequence[Any], num_ranks: int) -> None:
        super().__init__()
        self.keep = (tuple(owners), num_ranks)  # in a tuple, where no module is looked for

    def forward(self, found: list[Any], batch: Any) -> tuple[Tensor, Tensor]:
        owners, num_ranks = self.keep
        with ExitStack() as given:
            for owner, rows in zip(owners, found, strict=True):
                scored = (batch.scored,) if isinstance(owner, ShardedItemTable) else ()
                given.enter_context(owner.given(rows, *scored))
            loss = batch.loss()
        return loss * num_ranks, loss.detach()


class _Step(nn.Module):
    def __init__(self, owners: Sequence[Any], num_ranks: int) -> None:
        super().__init__()
        self.collections = nn.ModuleList(owner.collection for owner in owners)
        self.model = _Model(owners, num_ranks)

    def forward(self, batch: Any) -> Any:
        found = [collection(batch.keyed[place]) for place, collection in enumerate(self.collections)]
        return self.model(found, batch)


class _NoOptimizer:
    """In place of one: the trainer has set the rates, and makes the step when it has seen the gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def step(self) -> None:
        pass


class Pipeline:
    """Forward and backward of the batches of a run, with the ids of the next ones under way.

    Args:
        model: of retrieval or ranking, with a sharded table at least.
        loss: this rank's part of the loss of a batch of a step, by the step, the batch's place in it and its seed.
        step_seed: the seed of a step of the run; a batch's is derived from it by its place.

    Raises UserError where no table is sharded.
    """

    def __init__(
        self, model: RetrievalModel | RankingModel, world: World, loss: Callable[[StepInput, int, int], Tensor],
        step_seed: Callable[[int], int],
    ) -> None:  # fmt: skip
        self.model, self.world, self.loss, self.step_seed = model, world, loss, step_seed
        self.owners: list[Any] = [owner for _, owner in sharded_modules(model)]
        if not self.owners:
            raise UserError("embedding.pipeline=true: expected a table that is sharded, all of the model's are whole")
        items = [owner for owner in self.owners if isinstance(owner, ShardedItemTable)]
        self.item_rows: ItemRows | None = (
            model.table.item_rows if items and isinstance(model.table, MappedTable) else None
        )
        self.ahead = self.item_rows
        """The map as of the step that entered last; None: items have rows of their own, or their table is whole."""
        with quiet():
            self.pipeline: Any = TrainPipelineSparseDist(
                _Step(self.owners, world.size), _NoOptimizer(), world.device  # type: ignore[arg-type]
            )  # fmt: skip
        self.attached = True
        self._waiting: deque[StepInput] = deque()

    def through(self, inputs: Iterable[StepInput], first_step: int) -> Iterator[StepInput]:
        """The inputs one by one; each has to be followed by a :meth:`progress` for each of its batches.

        In between the collections are the pipeline's; before and after, lookups are as ever.

        first_step: number of the first input among the steps of the run.
        """
        self._source, self._next_step, self._entered = iter(inputs), first_step, 0
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
                self._waiting.popleft()
                self._entered -= 1
        finally:
            self.detach()

    def detach(self) -> None:
        """Gives the collections back."""
        if self.attached:
            self.pipeline.detach()
            self.attached = False

    def progress(self) -> Tensor:
        """Forward and backward of the next batch of the input last yielded; this rank's part of its loss."""
        loss = self.pipeline.progress(self._batches)
        assert len(self.pipeline._pipelined_modules) == len(self.owners)  # else torchrec goes on without them
        return loss  # type: ignore[no-any-return]

    def _pull(self) -> bool:
        found = next(self._source, None)
        if found is not None:
            self._waiting.append(found)
        return found is not None

    def _make_batches(self) -> Iterator[_Batch]:
        """The batches as they enter the pipeline. All ranks come here at the same places."""
        while self._entered < len(self._waiting) or self._pull():
            step_input, seed = self._waiting[self._entered], self.step_seed(self._next_step)
            self._entered, self._next_step = self._entered + 1, self._next_step + 1
            if self.world.device.type == "cuda":  # the loader made the batches on the stream of the training
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            if isinstance(self.ahead, ManagedRows):
                asked_for = torch.cat([share.batch.predicted_items for share, _ in step_input.parts])
                self.ahead.take_in(self.world.gather(asked_for))
            for index, (share, _) in enumerate(step_input.parts):
                own_seed = derive(seed, index)
                keyed, scored = self._looked_up(share.batch, own_seed)
                yield _Batch(keyed, scored, partial(self.loss, step_input, index, own_seed))

    def _looked_up(self, batch: Any, seed: int) -> tuple[list[Any], Scored | None]:
        """For each of the owners the ids that a batch looks up; and what its loss scores."""
        scored, features = None, {}
        if isinstance(self.model, RetrievalModel):
            assert self.model.loss_config is not None
            scored = self._scored(self.model.loss_config, batch, seed)
        else:
            features = {id(tables): part for tables, part in self.model.looked_up(batch)}
        items = batch.item_ids if self.ahead is None else self.ahead.rows(batch.item_ids)
        keyed = []
        for owner in self.owners:
            if isinstance(owner, ShardedItemTable):
                keyed.append(owner.keyed(items, items[:0] if scored is None else scored.ids))
            else:
                keyed.append(owner.keyed(features[id(owner)]))
        return keyed, scored

    def _scored(self, loss: LossConfig, batch: Batch, seed: int) -> Scored:
        predicted, num_live = batch.predicted(), self.owners[0].num_items
        if self.ahead is not None:
            predicted, num_live = self.ahead.for_loss(predicted), self.ahead.num_live
        return scored_by(
            loss, self.world, predicted.labels, predicted.random_rows, num_live, derive(seed, NEGATIVES_SEED),
            predicted.every,
        )  # fmt: skip
