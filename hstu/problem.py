"""What a run trains and evaluates: retrieval or ranking. The trainer, the checkpoints and the loop are the same.

Legend: E events of the store.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from hstu import metrics, ranking_metrics
from hstu.baselines import training_row_blocks
from hstu.config import Config
from hstu.data.batches import EventColumns, TrainBatches
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import ProgressiveBatches, RankingBatches
from hstu.data.ranking_stream import RankingStreamBatches
from hstu.data.shard_stream import ShardBatches, StreamBatches
from hstu.data.share import EVENT_WORK, Ranks, Share
from hstu.data.splits import Split, Targets, make_event_split, make_split
from hstu.distributed import World
from hstu.errors import UserError
from hstu.evaluate import assess, evaluate, evaluation_json
from hstu.model.ranking import RankingModel
from hstu.model.retrieval import RetrievalModel
from hstu.ranking_evaluate import (
    Predictions,
    ProgressivePredictions,
    assess_ranking,
    calibrated,
    intercepts,
    predict,
    summarize,
    undefined_metrics,
)
from hstu.seeding import derive, seed_everything
from hstu.vocabulary import unknown_shares, unknown_shares_of_events

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

INIT_SEED = 11
"""Purpose number of the seed of the initial weights."""


class Problem(ABC):
    """Data, model and evaluation of one run.

    Attributes:
        split: what trains and what is held out.
        data: ``num_steps(epoch)``, ``share(epoch, step, ranks)``, ``users``, ``num_skipped``,
            ``savings(epoch, num_steps)``.
        model: ``loss(batch, seed, plan)``, ``num_parameters()``.
        metric_names: what :meth:`validate` gives; shown: those on the validation line.
    """

    data: Any
    model: Any
    split: Split
    metric_names: list[str]
    shown: list[str]

    def __init__(self, config: Config, store: SequenceStore, world: World, folder: Path) -> None:
        self.config, self.store, self.world, self.folder = config, store, world, folder
        self.device = world.device
        self.ranks = Ranks(world.rank, world.size, EVENT_WORK * config.model.dim)

    @property
    def part(self) -> str:
        """The part that picks the best epoch."""
        return "test" if self.split.validation is None else "validation"

    @property
    def targets(self) -> Targets:
        """The held-out events of that part."""
        return self.split.test if self.split.validation is None else self.split.validation

    def higher_is_better(self, metric: str) -> bool:
        """Direction of a metric."""
        return True

    def close(self) -> None:
        """Training has ended: no batch is made any more."""
        if isinstance(self.data, ShardBatches):
            self.data.close()

    def observe(self, batch: Any, plan: Any) -> None:  # noqa: B027 (most problems do nothing here)
        """Called with the batches of a step before it begins."""

    @abstractmethod
    def input(self, epoch: int, step: int) -> tuple[Share[Any], Any]:
        """This rank's share of a batch, on the device, and its plan. Called in a loader thread."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Metrics of the model as it is, on :attr:`targets`; the same on all ranks, which call it together."""

    @abstractmethod
    def finish(self) -> Callable[[], tuple[dict[str, Any], dict[str, float], int]]:
        """Applies the model as it is to test, with all ranks. What is returned is called on the first rank and gives
        what ``evaluation.json`` holds, the metrics and the number of users."""


class Retrieval(Problem):
    """The next item at every event."""

    def __init__(self, config: Config, store: SequenceStore, world: World, folder: Path) -> None:
        super().__init__(config, store, world, folder)
        self.split = make_split(store, config.run.selection)
        if len(self.targets) == 0:
            raise UserError("no user has enough events to hold one out; loosen the filters or run.selection=reference")
        run = config.run
        if run.reader == "stream":
            self.data: Any = StreamBatches(
                store, config.model.max_len, run, config.seed, world, config.loss.event_weights
            )
        else:
            columns = EventColumns(store, self.device, config.loss.event_weights)
            self.data = TrainBatches(
                columns, store, self.split, config.model.max_len, config.seed, run.batch_users, run.batch_tokens,
                run.stochastic_length,
            )  # fmt: skip
        self.model = build_model(config, store).to(self.device)
        self.metric_names = metrics.metric_names(config.eval.ks)
        self.shown = ["hr@10", "ndcg@10", "hr@50", "hr@200", "mrr"]

    def input(self, epoch: int, step: int) -> tuple[Share[Any], Any]:
        share = self.data.share(epoch, step, self.ranks)
        return share, self.model.encoder.plan(share.batch)

    def validate(self) -> dict[str, float]:
        result = evaluate(self.model, self.store, self.targets, self.config, self.device, self.world)
        kept = Targets(result.users, result.rows)

        def summarized() -> dict[str, float]:
            unknown = unknown_shares(self.model, self.store, kept, self.config.model.max_len)
            return {**metrics.summarize(result.ranks, self.config.eval.ks), **unknown}

        return self.world.on_first(summarized)  # other processors may round otherwise, and all decide by it

    def finish(self) -> Callable[[], tuple[dict[str, Any], dict[str, float], int]]:
        result = evaluate(self.model, self.store, self.split.test, self.config, self.device, self.world)

        def assessed() -> tuple[dict[str, Any], dict[str, float], int]:
            found = assess(self.config, self.store, self.split, result)
            values = metrics.summarize(result.ranks, self.config.eval.ks)
            return evaluation_json(self.config, self.store, found, "test", "best"), values, len(result)

        return assessed


class ActionProblem(Problem):
    """What is common to rankings, whatever they hold out."""

    def __init__(self, config: Config, store: SequenceStore, world: World, folder: Path) -> None:
        super().__init__(config, store, world, folder)
        assert config.ranking is not None
        self.tasks, self.calibrate = config.ranking.tasks, config.ranking.calibrate
        kinds = ranking_metrics.METRICS
        self.metric_names = [f"{n}/{m}" for n, t in self.tasks.items() for m in kinds[t.kind]]
        self.shown = [n for n in self.metric_names if n.rpartition("/")[2] in ("auc", "ne", "rmse")]

    def higher_is_better(self, metric: str) -> bool:
        try:
            return ranking_metrics.higher_is_better(metric)
        except ValueError as error:
            raise UserError(f"run.select_metric: {error}") from None

    def input(self, epoch: int, step: int) -> tuple[Share[Any], Any]:
        share = self.data.share(epoch, step, self.ranks)
        batch = share.batch.to(self.device)
        return replace(share, batch=batch), self.model.plan(batch)

    def _set_calibration(self, shifts: dict[str, float]) -> None:
        """Of the model as it is; kept with its weights."""
        buffer = self.model.heads.calibration
        buffer.copy_(torch.tensor([shifts.get(name, 0.0) for name in self.tasks], dtype=buffer.dtype))


class Ranking(ActionProblem):
    """The actions on every item."""

    def __init__(self, config: Config, store: SequenceStore, world: World, folder: Path) -> None:
        super().__init__(config, store, world, folder)
        assert config.ranking is not None
        self.progressive = config.ranking.mode == "progressive"
        if self.calibrate and config.run.selection != "validation":
            raise UserError(f"ranking.calibrate with run.selection={config.run.selection}: expected validation, whose "
                            "events it is fitted on")  # fmt: skip
        self.ranking_data = RankingData(store, config.ranking)
        if self.progressive:
            if config.run.epochs != 1:
                raise UserError(f"run.epochs={config.run.epochs}: expected 1 with ranking.mode=progressive, one pass")
            nothing = Targets(np.empty(0, np.int64), np.empty(0, np.int64))
            self.split = Split(np.asarray(store.offsets[1:]), None, nothing)
            self.data: Any = ProgressiveBatches(self.ranking_data, config)
        else:
            self.split = make_event_split(store, config.run.selection)
            if len(self.targets) == 0:
                raise UserError("no event is held out; take an earlier data.split_time or run.selection=reference")
            self._check_select_metric()
            if config.run.reader == "stream":
                self.data = RankingStreamBatches(self.ranking_data, config, world)
            else:
                self.data = RankingBatches(self.ranking_data, self.split, config)
        self.model = build_model(config, store, self.ranking_data, self._priors()).to(self.device)
        self.predictions: ProgressivePredictions | None = None
        if self.progressive and world.is_first:
            self.predictions = ProgressivePredictions(self.ranking_data, folder / "predictions.npy", self.data.rows(0))

    @property
    def part(self) -> str:
        return "progressive" if self.progressive else super().part

    def _check_select_metric(self) -> None:
        metric = self.config.run.select_metric
        reason = undefined_metrics(self.ranking_data, self.targets.rows).get(metric)
        if reason is not None:
            raise UserError(
                f"run.select_metric={metric} is not defined on {self.part}: {reason}; choose another metric"
            )

    def _priors(self) -> dict[str, list[float]]:
        """Of the training labels; progressive: of the first step's, whose predictions are not scored."""
        if self.progressive:
            return self.ranking_data.priors(self.data.rows(0), need_all=False)
        return self.ranking_data.priors(training_row_blocks(self.store, self.split.train_end))

    @torch.no_grad()
    def observe(self, batch: Any, plan: Any) -> None:
        """Progressive validation: predictions of the batch by the model that has not seen it."""
        if not self.progressive:
            return
        rows = self.world.gather(batch.rows).cpu().numpy()
        found = {name: self.world.gather(value.float()) for name, value in self.model.predict(batch, plan).items()}
        if self.predictions is not None:
            self.predictions.put(rows, found)

    def _predictions(self, targets: Targets) -> Predictions | None:
        """Of the model as it is, or of the pass; None on the ranks that do not hold those of the pass."""
        if self.progressive:
            return None if self.predictions is None else self.predictions.result()
        return predict(self.model, self.ranking_data, self.config, targets, self.device, self.world)

    def validate(self) -> dict[str, float]:
        if self.calibrate:
            self._set_calibration({})
        found = self._predictions(self.targets)
        if self.calibrate and found is not None:
            shifts = intercepts(self.ranking_data, found)
            self._set_calibration(shifts)
            found = calibrated(found, shifts)

        def summarized() -> dict[str, float]:
            unknown = {}
            if not self.progressive:  # whose predictions were made on the way
                unknown = unknown_shares_of_events(self.model, self.ranking_data, self.config, self.targets)
            return {**summarize(self.ranking_data, cast(Predictions, found)), **unknown}

        return self.world.on_first(summarized)

    def finish(self) -> Callable[[], tuple[dict[str, Any], dict[str, float], int]]:
        predictions = self._predictions(self.split.test)

        def assessed() -> tuple[dict[str, Any], dict[str, float], int]:
            found, part = cast(Predictions, predictions), "progressive" if self.progressive else "test"
            report = assess_ranking(self.config, self.ranking_data, self.split, found, part, "best", self.folder)
            return report, summarize(self.ranking_data, found), len(np.unique(found.users))

        return assessed


def build_model(
    config: Config, store: SequenceStore, data: RankingData | None = None, priors: dict[str, list[float]] | None = None
) -> nn.Module:
    """The model of ``config`` with initial weights by its seed."""
    seed_everything(derive(config.seed, INIT_SEED))
    if config.ranking is None:
        return RetrievalModel(config.model, store.num_items, config.loss, config.embedding)
    data = data or RankingData(store, config.ranking)
    return RankingModel(config.model, config.ranking, data, priors, config.embedding)


def make_problem(config: Config, store: SequenceStore, world: World, folder: Path) -> Problem:
    """What ``config`` trains on the ranks of ``world``. folder: of the run."""
    cls = Retrieval if config.ranking is None else Ranking
    return cls(config, store, world, folder)
