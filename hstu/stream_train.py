"""One pass over a log in time order, and the command ``hstu-stream``.

    hstu-stream experiment=ml-1m/hstu [stream.day_s=86400] [run.dir=FOLDER]
    hstu-stream experiment=kuairand-pure/hstu-interleaved              a ranking: each day is predicted, then trained on
    hstu-stream data=log stream.watch=FOLDER stream.item_rows=1000000
    hstu-stream ... run.ranks=4                or: torchrun --nproc-per-node=4 -m hstu.stream_train ...

The model goes from day to day: it is evaluated on a day before it trains on it, so that every number is about events
that it has not seen. Each event is trained on once. Repeating the command with the same run.dir resumes. On several
ranks the first one watches, decides when a day is complete and prepares it; all train on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import torch

from hstu import checkpoint, report
from hstu.allocator import keep_freed_memory
from hstu.checkpoint_state import model_state
from hstu.cli import command
from hstu.config import Config, DataConfig, build, from_dict
from hstu.config_ranking import RankingConfig
from hstu.config_stream import FREE_ON_RESUME, StreamConfig
from hstu.data.days import Days, StoreDays
from hstu.distributed import World
from hstu.errors import UserError, check
from hstu.evaluate import run_device
from hstu.problem import Problem
from hstu.progress import Display
from hstu.runs import note_store, open_store, run_folder
from hstu.stream_problem import DayProblem, make_stream_problem
from hstu.stream_report import read_days, write_result
from hstu.train import Interrupted, Trainer, run_composed

NOT_WATCHED = (
    "items_file", "users_file", "min_user_events", "min_item_events", "dedup", "max_events", "max_items", "shards",
)  # fmt: skip
"""Options of ``data`` that need the whole log."""


class StreamTrainer(Trainer):
    """A trainer whose epochs are days."""

    def __init__(self, config: Config, stream: StreamConfig, days: Days, folder: Path, display: Display,
                 world: World) -> None:  # fmt: skip
        self.stream, self.days = stream, days
        super().__init__(config, days.store, folder, display, world)
        assert isinstance(self.problem, DayProblem)
        self.problem.recall(self.world.on_first(lambda: read_days(folder)))
        self.progress.finished = False  # stream.days may have been raised, or further days have come

    def _make_problem(self) -> Problem:
        return make_stream_problem(self.config, self.stream, self.days, self.world, self.folder)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """As in any training, with the tables in groups of their own."""
        optimizers = super()._make_optimizers()
        tables = {id(p) for module in self.model.tables() for p in module.parameters()}
        for place, optimizer in enumerate(optimizers):
            for group in list(optimizer.param_groups):
                inside = [p for p in group["params"] if id(p) in tables]
                group["is_table"] = place > 0 or len(inside) == len(group["params"])
                if inside and not group["is_table"]:
                    group["params"] = [p for p in group["params"] if id(p) not in tables]
                    optimizer.add_param_group({**group, "params": inside, "is_table": True})
            for group in optimizer.param_groups:
                group["first_factor"] = group["lr_factor"]
        return optimizers

    def _direction(self) -> float:
        """Nothing is selected: whatever ``run.select_metric`` is, what is latest counts."""
        return 1.0

    def _decayed(self, decay: float) -> float:
        return max(self.stream.min_lr_fraction, decay**self.progress.epoch)

    def _rate(self) -> float:
        return super()._rate() * self._decayed(self.stream.lr_decay)

    def _set_table_rates(self) -> None:
        factor = self._decayed(self.stream.table_lr_decay) / self._decayed(self.stream.lr_decay)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr_factor"] = group["first_factor"] * (factor if group["is_table"] else 1.0)

    def _epoch(self) -> None:
        assert isinstance(self.problem, DayProblem)
        epoch, limit = self.progress.epoch, self.stream.days
        day = None if limit is not None and epoch >= limit else self.problem.open(epoch, self._is_stopped)
        if day is None:
            self._finish()
            return
        self.world.on_first(lambda: note_store(self.folder, day.store))
        self._set_table_rates()
        if self.progress.step == 0 and self.progress.epoch > 0:  # the first day finds an untrained model
            self._validate({})
        super()._epoch()

    def _is_stopped(self) -> bool:
        """Whether a signal has come to some rank; all ask it together."""
        self._agree_to_stop()
        return self.stopping is not None

    def _validate_weights(self, epoch: dict[str, float]) -> None:
        assert isinstance(self.problem, DayProblem) and self.problem.day is not None
        values = self.problem.validate()
        label = self.problem.day[1].label
        self._log(values, kind="next day", day=label, **self.problem.beside())
        known = {name: values[name] for name in self.problem.shown if not math.isnan(values.get(name, math.nan))}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in known.items())
        self.display.say(f"{label}  before training on it: {shown or 'no event that can be evaluated'}")
        self._say_state(values)

    def _end_epoch(self) -> None:
        progress = self.progress
        assert isinstance(self.problem, DayProblem) and self.problem.day is not None
        self._check_parameters()
        day, loss = self.problem.day[1], progress.loss_sum / max(1, progress.loss_events)
        found = {"train_loss": loss, "trained": progress.loss_events, "events": day.num_events, "users": day.num_users}
        uneven = {"imbalance": progress.imbalance_sum / max(1, progress.step)} if self.world.size > 1 else {}
        self._log({**found, "lr": self._rate(), **uneven}, kind="day", day=day.label, **self.problem.end_day())
        self.display.say(f"{day.label}  {day.num_events:,} events of {day.num_users:,} users, loss {loss:.4f}")
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum, progress.loss_events, progress.imbalance_sum = 0.0, 0, 0.0
        self._agree_to_stop()
        self._save()
        if self.stopping is not None:
            raise Interrupted(self.stopping, self.folder)

    def _finish(self) -> None:
        """After the last day, or a signal while waiting for one. What is best in a stream is what is latest."""
        self.progress.finished = True
        self._save()
        progress = {"progress": dataclasses.asdict(self.progress)}
        with contextlib.nullcontext() if self.average is None else self.average.applied():
            self.saver.save_best(checkpoint.State(model_state(self.model), progress))


def stream_train(
    config: Config, stream: StreamConfig, display: Display | None = None, world: World | None = None
) -> Path:  # fmt: skip
    """Trains day by day to the end of the log, or until no day comes; returns the run folder.

    The folder then holds ``days.json`` (numbers of every day), ``result.json`` and ``days.png``; of a ranking model and
    a finished log also ``evaluation.json``, about all days together. world: the ranks that train together; None: those
    that are there.

    Raises:
        UserError: a wrong config, data or run folder, a non-finite value, a full disk.
        Interrupted: a signal came; the run has saved and can be resumed.
    """
    keep_freed_memory()
    _check(config, stream)
    stream = stream.settled(config.ranking is not None)
    world = world or World.current(run_device(config.run.device))
    folder = world.on_first(lambda: run_folder(config))
    display = display or Display(config.run.progress, world.is_first, by_day=True)
    world.on_first(lambda: _keep_settings(folder, stream))
    days = _make_days(config, stream, folder, display, world)
    number = len(days) if isinstance(days, StoreDays) else stream.days or 1  # not what ends the stream
    run = dataclasses.replace(config.run, epochs=min(number, stream.days or number))
    config = dataclasses.replace(config, run=run)
    trainer = StreamTrainer(config, stream, days, folder, display, world)
    try:
        trainer.run()
    except Interrupted:  # how a stream without an end comes to one
        world.on_first(lambda: write_result(folder, config, display))
        raise
    assert isinstance(trainer.problem, DayProblem)
    assess = trainer.problem.assess
    world.on_first(lambda: write_result(folder, config, display, assess()))
    return folder


def _check(config: Config, stream: StreamConfig) -> None:
    beside = "with hstu-stream"
    if config.ranking is not None:
        check(config.ranking.mode == "epochs", "ranking.mode", config.ranking.mode,
              f"epochs {beside}, where each day is predicted before it is trained on")  # fmt: skip
    check(config.optim.schedule == "constant", "optim.schedule", config.optim.schedule,
          f"constant {beside}, which knows no last step; use stream.lr_decay")  # fmt: skip
    alpha = config.run.stochastic_length.alpha
    check(alpha is None, "run.stochastic_length.alpha", alpha, f"null {beside}")
    check(config.run.reader == "draw", "run.reader", config.run.reader, f"draw {beside}, which reads days")
    check(stream.watch is None or config.data.source == "log", "stream.watch", stream.watch, "null, or data=log")
    if stream.watch is not None:
        check(config.loss.event_weights == "none", "loss.event_weights", config.loss.event_weights,
              "none with stream.watch")  # fmt: skip
        usual = DataConfig()
        for name in NOT_WATCHED:
            value, default = getattr(config.data, name), getattr(usual, name)
            check(value == default, f"data.{name}", value, f"{default!r} with stream.watch, which knows no whole log")
        if config.ranking is not None:
            _check_watched_ranking(config, config.ranking)


def _check_watched_ranking(config: Config, ranking: RankingConfig) -> None:
    """Raises UserError for what cannot be known of files that arrive day by day, or is not read from them."""
    from hstu.data.watch import event_columns

    columns, arriving = config.data.columns, "with stream.watch"
    for name in ("user_features", "item_features"):
        check(not (ranking.use_features and getattr(ranking, name)), f"ranking.{name}", list(getattr(ranking, name)),
              f"none {arriving}; write the attributes into each row of the log, as ranking.event_features")  # fmt: skip
    wanted, hashed = event_columns(ranking)
    for name in wanted:
        feature = ranking.event_features.get(name)
        if feature is not None and feature.kind == "categorical":
            check(name in hashed, f"ranking.event_features.{name}.hash_rows", None,
                  f"a number {arriving}: values keep coming, so none has a code of its own")  # fmt: skip
            check(name in columns.features, "data.columns.features", columns.features, f"{name} among them")
        elif name == "actions":
            check(columns.action is not None, "data.columns.action", None, "a column: ranking reads actions")
        else:
            check(name in columns.values, "data.columns.values", columns.values, f"{name} among them: ranking reads it")


def _make_days(config: Config, stream: StreamConfig, folder: Path, display: Display, world: World) -> Days:
    if stream.watch is None:
        return StoreDays(open_store(config, world), stream.day_s, stream.utc_offset_s)
    from hstu.data.watch import StreamSource, WatchedDays

    source = StreamSource(Path(stream.watch).expanduser(), stream.settle_s, stream.timeout_s, world, display.say)
    return WatchedDays(
        source, config.data, folder / "days", config.model.max_len, stream.item_rows, config.ranking,
        stream.utc_offset_s,
    )  # fmt: skip


def _keep_settings(folder: Path, stream: StreamConfig) -> None:
    """Writes ``stream.json``, or raises UserError where the run being resumed had other settings.

    The days of a start that failed before there was a run are removed: they may be of another config.
    """
    from hstu.data.watch import remove_days

    path, values = folder / "stream.json", dataclasses.asdict(stream)
    if not (folder / "config.yaml").exists():
        remove_days(folder / "days")
    elif path.exists():  # written before an option was there: it was as by default
        old = dataclasses.asdict(StreamConfig()) | report.read_json(path, "delete the run folder")
        for name, value in values.items():
            if name not in FREE_ON_RESUME and old.get(name) != value:
                raise UserError(
                    f"{folder} holds a run with stream.{name}={old.get(name)!r}, now {value!r}: take another run.dir"
                )
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(path, values)


def run_command(options: dict[str, Any]) -> None:
    """What ``hstu-stream`` does with the composed options.

    With ``run.ranks`` it starts the ranks, which call it again and join.
    """
    from hstu.launch import join, launch, remembered, should_launch

    rest = {name: value for name, value in options.items() if name != "stream"}
    stream = build(StreamConfig, dict(options.get("stream") or {}), "stream.")
    config = from_dict(rest)
    check(config.seeds is None, "seeds", config.seeds, "null with hstu-stream; give seed")
    config = dataclasses.replace(config, variants={})
    _check(config, stream)
    if should_launch(options):
        return launch(options, "hstu.stream_train", config)
    with join(config.run) as world:
        if world.size > 1:  # the same folder on all ranks, and after a restart
            folder = remembered(world, "stream", lambda: str(run_folder(config)))
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder))
        stream_train(config, stream, world=world)


@command
def main() -> int:
    """Entry point of ``hstu-stream``."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    return run_composed(run_command, "stream")


if __name__ == "__main__":
    raise SystemExit(main())
