"""What a run trains and evaluates: retrieval or ranking. The trainer, the checkpoints and the loop are the same.

Legend: E events of the store.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hstu import metrics, ranking_metrics
from hstu.baselines import training_rows
from hstu.config import Config
from hstu.data.batches import EventColumns, TrainBatches
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import ProgressiveBatches, RankingBatches
from hstu.data.splits import Split, Targets, make_event_split, make_split
from hstu.errors import UserError
from hstu.evaluate import assess, evaluate, evaluation_json
from hstu.model.ranking import RankingModel
from hstu.model.retrieval import RetrievalModel
from hstu.ranking_evaluate import (
    ProgressivePredictions,
    assess_ranking,
    predict,
    summarize,
    undefined_metrics,
)
from hstu.seeding import derive, seed_everything

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

INIT_SEED = 11
"""Purpose number of the seed of the initial weights."""


class Problem(ABC):
    """Data, model and evaluation of one run.

    Attributes:
        split: what trains and what is held out.
        data: ``num_steps(epoch)``, ``batch(epoch, step)``, ``users``, ``num_skipped``, ``savings(epoch, num_steps)``.
        model: ``loss(batch, seed, plan)``, ``num_parameters()``.
        metric_names: what :meth:`validate` gives; shown: those on the validation line.
    """

    data: Any
    model: Any
    split: Split
    metric_names: list[str]
    shown: list[str]

    def __init__(self, config: Config, store: SequenceStore, device: torch.device, folder: Path) -> None:
        self.config, self.store, self.device, self.folder = config, store, device, folder

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

    def observe(self, batch: Any, plan: Any) -> None:  # noqa: B027 (most problems do nothing here)
        """Called with each batch before it is trained on."""

    @abstractmethod
    def input(self, epoch: int, step: int) -> tuple[Any, Any]:
        """A batch on the device, and its plan. Called in a loader thread."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Metrics of the model as it is, on :attr:`targets`."""

    @abstractmethod
    def finish(self) -> tuple[dict[str, Any], dict[str, float], int]:
        """Evaluation of the model as it is on test: what ``evaluation.json`` holds, the metrics, the users."""


class Retrieval(Problem):
    """The next item at every event."""

    def __init__(self, config: Config, store: SequenceStore, device: torch.device, folder: Path) -> None:
        super().__init__(config, store, device, folder)
        self.split = make_split(store, config.run.selection)
        if len(self.targets) == 0:
            raise UserError("no user has enough events to hold one out; loosen the filters or run.selection=reference")
        run = config.run
        columns = EventColumns(store, device, config.loss.event_weights)
        self.data = TrainBatches(
            columns, store, self.split, config.model.max_len, config.seed, run.batch_users, run.batch_tokens,
            run.stochastic_length,
        )  # fmt: skip
        self.model = build_model(config, store).to(device)
        self.metric_names = metrics.metric_names(config.eval.ks)
        self.shown = ["hr@10", "ndcg@10", "hr@50", "hr@200", "mrr"]

    def input(self, epoch: int, step: int) -> tuple[Any, Any]:
        batch = self.data.batch(epoch, step)
        return batch, self.model.encoder.plan(batch)

    def validate(self) -> dict[str, float]:
        result = evaluate(self.model, self.store, self.targets, self.config, self.device)
        return metrics.summarize(result.ranks, self.config.eval.ks)

    def finish(self) -> tuple[dict[str, Any], dict[str, float], int]:
        result = evaluate(self.model, self.store, self.split.test, self.config, self.device)
        found = assess(self.config, self.store, self.split, result)
        values = metrics.summarize(result.ranks, self.config.eval.ks)
        return evaluation_json(self.config, self.store, found, "test", "best"), values, len(result)


class Ranking(Problem):
    """The actions on every item."""

    def __init__(self, config: Config, store: SequenceStore, device: torch.device, folder: Path) -> None:
        super().__init__(config, store, device, folder)
        assert config.ranking is not None
        self.tasks = config.ranking.tasks
        self.progressive = config.ranking.mode == "progressive"
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
            self.data = RankingBatches(self.ranking_data, self.split, config)
        self.model = build_model(config, store, self.ranking_data, self._priors()).to(device)
        kinds = ranking_metrics.METRICS
        self.metric_names = [f"{n}/{m}" for n, t in self.tasks.items() for m in kinds[t.kind]]
        self.shown = [n for n in self.metric_names if n.rpartition("/")[2] in ("auc", "ne", "rmse")]
        self.predictions: ProgressivePredictions | None = None
        if self.progressive:
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
        return self.ranking_data.priors(training_rows(self.store, self.split.train_end)[0])

    def higher_is_better(self, metric: str) -> bool:
        try:
            return ranking_metrics.higher_is_better(metric)
        except ValueError as error:
            raise UserError(f"run.select_metric: {error}") from None

    def input(self, epoch: int, step: int) -> tuple[Any, Any]:
        batch = self.data.batch(epoch, step).to(self.device)
        return batch, self.model.plan(batch)

    @torch.no_grad()
    def observe(self, batch: Any, plan: Any) -> None:
        """Progressive validation: predictions of the batch by the model that has not seen it."""
        if self.predictions is not None:
            self.predictions.put(batch.rows.cpu().numpy(), self.model.predict(batch, plan))

    def validate(self) -> dict[str, float]:
        if self.predictions is not None:
            return summarize(self.ranking_data, self.predictions.result())
        found = predict(self.model, self.ranking_data, self.config, self.targets, self.device)
        return summarize(self.ranking_data, found)

    def finish(self) -> tuple[dict[str, Any], dict[str, float], int]:
        if self.predictions is not None:
            found, part = self.predictions.result(), "progressive"
        else:
            found, part = predict(self.model, self.ranking_data, self.config, self.split.test, self.device), "test"
        assessed = assess_ranking(self.config, self.ranking_data, self.split, found, part, "best", self.folder)
        return assessed, summarize(self.ranking_data, found), len(np.unique(found.users))


def build_model(
    config: Config, store: SequenceStore, data: RankingData | None = None, priors: dict[str, list[float]] | None = None
) -> nn.Module:
    """The model of ``config`` with initial weights by its seed."""
    seed_everything(derive(config.seed, INIT_SEED))
    if config.ranking is None:
        return RetrievalModel(config.model, store.num_items, config.loss)
    return RankingModel(config.model, config.ranking, data or RankingData(store, config.ranking), priors)


def make_problem(config: Config, store: SequenceStore, device: torch.device, folder: Path) -> Problem:
    """What ``config`` trains. folder: of the run."""
    cls = Retrieval if config.ranking is None else Ranking
    return cls(config, store, device, folder)
