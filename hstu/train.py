"""Training, and the command ``hstu-train``.

    hstu-train experiment=ml-1m/hstu [optim.lr=3e-4] [seed=1] [seeds=[0,1,2]] [run.dir=FOLDER]

Trains an experiment of conf/experiment, evaluates it and prints the result beside the baselines and the
published row. Repeating the command with the same run.dir resumes. Sweeps: add -m, as in
``hstu-train -m optim.lr=1e-3,3e-4``. ``hstu-train --cfg job`` prints the composed config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hstu import checkpoint, report
from hstu.allocator import keep_freed_memory
from hstu.checkpoint_state import model_state, restore_run, run_state
from hstu.cli import command, run_hydra
from hstu.config import Config, from_dict, to_dict
from hstu.data.balance import imbalance
from hstu.data.batches import Prefetcher
from hstu.data.share import Share
from hstu.distributed import Engine, World, spread_layers
from hstu.errors import Interrupted, UserError
from hstu.evaluate import run_device
from hstu.loggers import Logger, MetricsFile, NoMetrics, make_loggers
from hstu.nonfinite import first_non_finite, is_finite
from hstu.optim import (
    WeightAverage,
    clip_gradients,
    gradient_norm,
    learning_rate,
    make_optimizers,
    row_gradients,
    set_learning_rate,
    sum_of_squares,
)
from hstu.problem import Problem, make_problem
from hstu.progress import Display
from hstu.runs import LOCK_PATIENCE_S, agree_on_run, describe, load_run, lock_folder, open_store, run_folder
from hstu.seeding import derive
from hstu.vocabulary import Vocabulary
from kernels._backend import OPS, choose, set_backend
from kernels._launch import set_autotune

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore
    from hstu.sharded.pipeline import Pipeline

__all__ = ["Interrupted", "Trainer", "load_run", "main", "train"]

STEP_SEED = 12
"""Purpose number of the seed of each step."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def ask_for_determinism() -> None:
    """On CUDA, before anything is computed there."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may differ with several streams
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling: Any = torch.utils.deterministic
    filling.fill_uninitialized_memory = False  # every torch.empty would be written twice


@dataclass
class Progress:
    """Where a run is. All of it is in every checkpoint."""

    epoch: int = 0
    step: int = 0
    """Next optimizer step of the epoch."""
    global_step: int = 0
    best: float = math.nan
    """Best value of ``run.select_metric`` so far."""
    best_epoch: int = -1
    evals_since_best: int = 0
    finished: bool = False
    seconds: float = 0.0
    """Training time, evaluation and saving excluded."""
    eval_seconds: float = 0.0
    num_events: int = 0
    loss_sum: float = 0.0
    """Over the epoch so far, weighted by events."""
    loss_events: int = 0
    imbalance_sum: float = 0.0
    """Over the steps of the epoch so far, of the work of ranks."""
    metrics_size: int = 0
    """Bytes of metrics.jsonl."""


@dataclass(frozen=True)
class StepInput:
    """What one optimizer step consumes: this rank's shares of its micro-batches, and their attention plans."""

    parts: list[tuple[Share[Any], Any]]

    @property
    def num_events(self) -> int:
        """Of all ranks."""
        return sum(share.num_events for share, _ in self.parts)

    @property
    def imbalance(self) -> float:
        """Of the ranks' work in the step; 0: even."""
        return imbalance(sum(share.work for share, _ in self.parts))  # type: ignore[arg-type]


class Trainer:
    """One run: one config, one seed, one folder; on every rank of ``world`` (None: those that are there)."""

    def __init__(
        self, config: Config, store: SequenceStore, folder: Path, display: Display, world: World | None = None
    ) -> None:
        self.world = world = world or World.current(run_device(config.run.device))
        self.config, self.store, self.folder, self.display = config, store, folder, display
        self.device = world.device
        if config.run.precision == "bfloat16" and self.device.type != "cuda":
            raise UserError("run.precision=bfloat16: expected a CUDA device; use float32 on the CPU")
        self._set_up_torch()
        agree_on_run(world, config, store)
        self.problem = self._make_problem()
        self.split, self.data, self.model = self.problem.split, self.problem.data, self.problem.model
        self.sign = self._direction()
        parameters = self.model.num_parameters()
        layers = spread_layers(self.model, world) if config.run.dense == "fsdp" else []
        self.optimizers = self._make_optimizers()
        self.engine = Engine(self.model, world, layers)
        self.pipeline = self._make_pipeline()
        self.vocabulary = Vocabulary(self.model, config.seed, world)
        decay = config.optim.average_decay
        self.average = None if decay is None else WeightAverage(self.model, decay, self.optimizers)
        run = config.run
        self.total_steps = run.epochs * self._num_steps(0)
        self.progress = Progress()
        self.checkpoints = folder / "checkpoints"
        self.stop_signal: int | None = None
        """Signal that this rank got."""
        self.stopping: int | None = None
        """Signal that some rank got, known to all."""
        self._save_due = False
        self._last_save = time.monotonic()
        world.on_first(lambda: self._open_folder(parameters))
        self.saver = checkpoint.Saver(self.checkpoints, run.keep_last, world, run.save_in_background)
        self._restore()
        self.metrics_file: MetricsFile | NoMetrics = NoMetrics()
        self.loggers: list[Logger] = []
        world.on_first(self._open_logs)
        display.start_run(config, store, self.data, parameters, world, folder, self.progress.global_step)
        for line in self.vocabulary.notes() if world.is_first else ():
            display.say(line)

    def _make_problem(self) -> Problem:
        return make_problem(self.config, self.store, self.world, self.folder)

    def _direction(self) -> float:
        """1 where a higher ``run.select_metric`` is better, else -1; raises UserError for one that is not measured."""
        metric, names = self.config.run.select_metric, self.problem.metric_names
        if metric not in names:
            raise UserError(f"run.select_metric={metric}: expected one of {', '.join(names)}")
        return 1.0 if self.problem.higher_is_better(metric) else -1.0

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        return make_optimizers(self.model, self.config, self.world)

    def _open_folder(self, parameters: dict[str, int]) -> None:
        self._lock = lock_folder(self.folder, LOCK_PATIENCE_S if self.world.again else 0.0)
        extra = {"parameters": parameters, "device": str(self.device)}
        describe(self.folder, self.config, self.store, extra, self.world.size)

    def _open_logs(self) -> None:
        self.metrics_file = MetricsFile(self.folder / "metrics.jsonl", self.progress.metrics_size)
        step = self.progress.global_step
        self.loggers = make_loggers(self.config.run.loggers, self.folder, to_dict(self.config), step)

    def _set_up_torch(self) -> None:
        run = self.config.run
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        set_backend(self.config.kernels.backend)
        set_autotune(self.config.kernels.autotune)
        try:
            for op in OPS:
                choose(op, self.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        torch.backends.cuda.matmul.allow_tf32 = run.tf32
        torch.backends.cudnn.allow_tf32 = run.tf32
        if self.device.type == "cuda" and run.deterministic:
            ask_for_determinism()

    # State

    def _state(self) -> checkpoint.State:
        self.progress.metrics_size = self.metrics_file.size()
        progress = dataclasses.asdict(self.progress)
        return run_state(self.model, self.optimizers, self.average, progress, self.world)

    def _save(self) -> None:
        self._check_parameters()
        self.world.at(self.progress.global_step, "saving", patient=True)
        self.saver.save(self._state(), self.progress.global_step)
        if self.progress.finished or self.stopping is not None:
            self.saver.wait()
        self._last_save = time.monotonic()

    def _restore(self) -> None:
        saved = checkpoint.load_last(self.checkpoints, self.world, set_aside=True)
        if saved is None:
            return
        self.progress = Progress(**restore_run(saved, self.model, self.optimizers, self.average, self.world))
        stopped = self.progress.finished and not self._stopped_early()
        if stopped and self.progress.epoch < self.config.run.epochs:
            self.progress.finished = False  # run.epochs was raised

    # The loop

    def run(self) -> Progress:
        """Trains to the end. Raises Interrupted after a signal, UserError on a non-finite value or a full disk."""
        handlers = {s: signal.signal(s, self._on_signal) for s in STOP_SIGNALS}
        try:
            while not self.progress.finished:
                self._epoch()
            self.saver.wait()
            self._agree_to_stop()
            if self.stopping is not None:
                raise Interrupted(self.stopping, self.folder)
        finally:
            self.problem.close()
            self.saver.close()
            self.metrics_file.close()
            if self.world.is_first:
                self._lock.close()
            for logger in self.loggers:
                logger.close()
            self.display.end_run()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.progress

    def _on_signal(self, number: int, frame: object) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.stop_signal = number

    def _num_steps(self, epoch: int) -> int:
        return -(-self.data.num_steps(epoch) // self.config.optim.accumulate_steps)

    def _make_input(self, epoch: int, step: int) -> StepInput:
        accumulate = self.config.optim.accumulate_steps
        indices = range(step * accumulate, min((step + 1) * accumulate, self.data.num_steps(epoch)))
        return StepInput([self.problem.input(epoch, i) for i in indices])

    def _epoch(self) -> None:
        progress, run = self.progress, self.config.run
        epoch, num_steps = progress.epoch, self._num_steps(progress.epoch)
        self.model.train()
        self.display.start_epoch(epoch, run.epochs, num_steps, progress.step)
        together = run.reader == "stream" and self.world.size > 1
        make = partial(self._make_input, epoch)
        with Prefetcher(make, progress.step, num_steps, together=together) as inputs:
            last = time.perf_counter()
            for step_input in inputs if self.pipeline is None else self.pipeline.through(inputs, progress.global_step):
                loss = self._step(step_input)
                now = time.perf_counter()
                self._after_step(step_input, loss, now - last)
                last = time.perf_counter()
        self._end_epoch()

    def _step(self, step_input: StepInput) -> float:
        """One optimizer step; returns the loss, the mean over all positions of the step on all ranks."""
        seed = self._seed(self.progress.global_step)
        self.world.at(self.progress.global_step, "training")
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, self._rate())  # sharded tables can move in the backward
            optimizer.zero_grad(set_to_none=True)
        for share, plan in step_input.parts if self.pipeline is None else ():
            self.problem.observe(share.batch, plan)
        self.vocabulary.begin_step([share.batch for share, _ in step_input.parts], self.optimizers, self.average)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in range(len(step_input.parts)):
            is_last = index == len(step_input.parts) - 1
            with contextlib.nullcontext() if is_last else self.engine.local():
                if self.pipeline is None:
                    loss = self._part_loss(step_input, index, derive(seed, index))
                    (loss * self.world.size).backward()
                else:
                    loss = self.pipeline.progress()
            total += loss.detach()
        named_rows = row_gradients(self.optimizers)
        rows = None if named_rows is None else [grad for _, grad in named_rows]
        found, norm, is_finite = self._exchange(total, gradient_norm(self.model), rows)
        if not is_finite:
            self._stop_non_finite(step_input, seed, found)
        if self.config.optim.clip_norm is not None:
            clip_gradients(self.model, norm, self.config.optim.clip_norm, rows or ())
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.average.update()
        return found

    def _exchange(self, loss: Tensor, norm: Tensor, rows: list[Tensor] | None) -> tuple[float, Tensor, bool]:
        """Loss and gradient norm of all ranks and whether they are finite; what ranks decide together after the step.

        One sum over ranks, and the only time in a step that the trainer waits for the device. loss: float64 scalar.
        norm: of the gradients of parameters, which all ranks have alike. rows: those of this rank's rows of sharded
        tables, see :func:`hstu.optim.row_gradients`.
        """
        minutes = self.config.run.save_every_minutes
        due = minutes is not None and time.monotonic() - self._last_save >= 60.0 * minutes
        flags = [float(due and self.world.is_first), *self._stop_flags()]
        own = [loss, torch.isfinite(norm).to(loss), *(torch.full_like(loss, flag) for flag in flags)]
        values = self.world.sum(torch.stack([*own, sum_of_squares(rows or (), self.device)]))
        if rows is not None:
            norm = (norm.double().square() + values[-1]).sqrt().to(norm.dtype)
        total, num_finite, *flags, _, finite = torch.cat([values, torch.isfinite(norm).to(values)[None]]).tolist()
        self._save_due = flags[0] > 0
        self._take_stop_flags(flags[1:])
        return total, norm, math.isfinite(total) and num_finite == self.world.size and finite > 0

    def _stop_flags(self) -> list[float]:
        return [float(self.stop_signal == number) for number in STOP_SIGNALS]

    def _take_stop_flags(self, flags: list[float]) -> None:
        self.stopping = next((n for n, flag in zip(STOP_SIGNALS, flags, strict=True) if flag > 0), None)

    def _agree_to_stop(self) -> None:
        """Sets ``stopping`` where a signal has come to some rank."""
        flags = torch.tensor(self._stop_flags(), dtype=torch.float64, device=self.device)
        self._take_stop_flags(self.world.sum(flags).tolist())

    def _rate(self) -> float:
        return learning_rate(self.config.optim, self.progress.global_step, self.total_steps)

    def _seed(self, step: int) -> int:
        """Of a step of the run; its batches have seeds of their own, by their places."""
        return derive(self.config.seed, STEP_SEED, step)

    def _part_loss(self, step_input: StepInput, index: int, seed: int) -> Tensor:
        """Of a batch of the step, in proportion to its events."""
        share, plan = step_input.parts[index]
        return self._loss(share.batch, seed, plan) * (share.num_events / step_input.num_events)

    def _loss(self, batch: Any, seed: int, plan: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16"):
            return self.engine.loss(batch, seed, plan)

    def _make_pipeline(self) -> Pipeline | None:
        if not self.config.embedding.pipeline:
            return None
        from hstu.sharded.pipeline import Pipeline

        def loss(step_input: StepInput, index: int, seed: int) -> Tensor:
            share, plan = step_input.parts[index]
            self.problem.observe(share.batch, plan)  # by the rows that have come for the step: they move at its end
            return self._part_loss(step_input, index, seed)

        return Pipeline(self.model, self.world, loss, self._seed)

    def _stop_non_finite(self, step_input: StepInput, seed: int, loss: float) -> None:
        if self.pipeline is not None:
            self.pipeline.detach()
        name = None
        for index, (share, plan) in enumerate(step_input.parts):
            found = partial(self._loss, share.batch, derive(seed, index), plan)
            name = name or first_non_finite(self.model, found, self.world, lambda: row_gradients(self.optimizers) or ())
        name = name or "the norm of all gradients (each of them is finite)"
        self._fail_non_finite(name, f"{loss}")

    def _fail_non_finite(self, name: str, loss: str) -> None:
        self.saver.wait()
        saved = checkpoint.steps(self.checkpoints)
        kept = f"last good checkpoint: {saved[-1]}" if saved else "no checkpoint was saved before"
        raise UserError(
            f"non-finite values at step {self.progress.global_step} (epoch {self.progress.epoch}, loss {loss}): "
            f"first in {name}; {kept}; lower optim.lr, or set optim.clip_norm"
        )

    def _after_step(self, step_input: StepInput, loss: float, seconds: float) -> None:
        progress, run = self.progress, self.config.run
        rate = self._rate()
        progress.step += 1
        progress.global_step += 1
        progress.seconds += seconds
        progress.num_events += step_input.num_events
        progress.loss_sum += loss * step_input.num_events
        progress.loss_events += step_input.num_events
        progress.imbalance_sum += step_input.imbalance
        events_per_s = step_input.num_events / seconds
        self.display.step(progress.loss_sum / progress.loss_events, events_per_s)
        if progress.global_step % run.log_every_steps == 0:
            num_batches = min(progress.step * self.config.optim.accumulate_steps, self.data.num_steps(progress.epoch))
            saved = self.data.savings(progress.epoch, num_batches)
            uneven = {"imbalance": step_input.imbalance} if self.world.size > 1 else {}
            known = self.vocabulary.report()
            self._log({"loss": loss, "lr": rate, "events_per_s": events_per_s, **saved, **uneven, **known})
        if self.stopping is not None:
            self._save()
            raise Interrupted(self.stopping, self.folder)
        due = run.save_every_steps is not None and progress.global_step % run.save_every_steps == 0
        if due or self._save_due:
            self._save()

    def _log(self, values: dict[str, float], **extra: Any) -> None:
        step = self.progress.global_step
        self.metrics_file.write(step=step, epoch=self.progress.epoch, **extra, **values)
        for logger in self.loggers:
            logger.log(step, values)

    def _check_parameters(self) -> None:
        """An update can overflow though its gradients were finite: seen here, before anything is saved."""
        bad = (n for n, p in self.model.named_parameters() if not is_finite(p))
        found = [name for name in self.world.gather_objects(next(bad, None)) if name is not None]
        if found:
            self._fail_non_finite(f"parameter {found[0]}", "not computed yet")

    def _end_epoch(self) -> None:
        progress, run = self.progress, self.config.run
        self._check_parameters()
        epoch = {"epoch_loss": progress.loss_sum / max(1, progress.loss_events)}
        if self.world.size > 1:
            epoch["imbalance"] = progress.imbalance_sum / max(1, progress.step)
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum, progress.loss_events, progress.imbalance_sum = 0.0, 0, 0.0
        done = progress.epoch >= run.epochs
        if progress.epoch % run.eval_every_epochs == 0 or done:
            self._validate(epoch)
            done = done or self._stopped_early()
        progress.finished = done
        self._agree_to_stop()
        stopping = self.stopping
        if done or stopping or (run.save_every_epochs is not None and progress.epoch % run.save_every_epochs == 0):
            self._save()
        if stopping is not None and not done:
            raise Interrupted(stopping, self.folder)

    def _stopped_early(self) -> bool:
        limit = self.config.run.early_stop_evals
        return limit is not None and self.progress.evals_since_best >= limit

    def _validate(self, epoch: dict[str, float]) -> None:
        """Evaluates the weights, or their average where the config asks for one; keeps them if they are the best."""
        self.world.at(self.progress.global_step, "validation")
        with contextlib.nullcontext() if self.average is None else self.average.applied():
            self._validate_weights(epoch)

    def _validate_weights(self, epoch: dict[str, float]) -> None:
        progress, started = self.progress, time.perf_counter()
        values = self.problem.validate()
        name = self.config.run.select_metric
        improved = self.sign * values[name] > self.sign * progress.best
        if improved or progress.best_epoch < 0:  # the first one counts even where the metric is not defined
            improved = True
            progress.best, progress.best_epoch, progress.evals_since_best = values[name], progress.epoch, 0
        else:
            progress.evals_since_best += 1
        progress.eval_seconds += time.perf_counter() - started
        part = self.problem.part
        saved = self.data.savings(progress.epoch - 1)
        self._log({**epoch, **values, **saved}, kind=part)
        shown = [n for n in dict.fromkeys([name, *self.problem.shown]) if n in values]
        self.display.validation(progress.epoch, epoch, part, {n: values[n] for n in shown}, improved, saved)
        self._say_state(values)
        if improved:
            self.saver.save_best(checkpoint.State(model_state(self.model), {"progress": dataclasses.asdict(progress)}))

    def _say_state(self, values: dict[str, float]) -> None:
        for line in self.vocabulary.state(values) if self.world.is_first else ():
            self.display.say(line)


def train(config: Config, display: Display | None = None, world: World | None = None) -> Path:
    """Trains one run (one seed, no variants), evaluates its best checkpoint on test; returns its folder.

    The folder then holds ``result.json`` and ``evaluation.json``. A finished run is not repeated. world: the ranks that
    train it together; None: those that are there.

    Raises:
        UserError: a wrong config, data or run folder, a non-finite value, a full disk.
        Interrupted: a signal came; the run has saved and can be resumed.
    """
    from hstu.results import evaluate_finished

    keep_freed_memory()
    world = world or World.current(run_device(config.run.device))
    folder = world.on_first(lambda: run_folder(config))
    display = display or Display(config.run.progress, world.is_first)
    store = open_store(config, world)
    trainer = Trainer(config, store, folder, display, world)
    progress = trainer.run()
    evaluate_finished(trainer, progress)
    world.on_first(lambda: report.plot_curves(folder))
    return folder


def run_command(options: dict[str, Any]) -> None:
    """What ``hstu-train`` does with the composed options: all variants and seeds, then the table.

    With ``run.ranks`` it starts the ranks, which call it again and join.
    """
    from hstu.launch import join, launch, remembered, should_launch
    from hstu.results import expand_runs, show_results

    if should_launch(options):
        return launch(options)
    with join(from_dict(options).run) as world:
        if world.size > 1:  # the same folder on all ranks, and after a restart
            name = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
            folder = remembered(world, name, lambda: str(run_folder(from_dict(options))))
            options = {**options, "run": {**options["run"], "dir": folder}}
        plan = expand_runs(options)
        display = Display(plan[0].config.run.progress, world.is_first)
        finished = []
        for entry in plan:
            try:
                finished.append(dataclasses.replace(entry, folder=train(entry.config, display, world)))
            except Interrupted as stop:
                raise Interrupted(stop.number, entry.parent or stop.folder) from None
        if world.is_first:
            show_results(finished, display.console)


def run_composed(task: Callable[[dict[str, Any]], None], config_name: str) -> int:
    """Calls ``task`` with the composed options of the command line; returns the exit status, also after a signal."""
    from omegaconf import OmegaConf

    from hstu.launch import first_to_say

    try:
        run_hydra(lambda cfg: task(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))), config_name)
    except Interrupted as stop:
        if first_to_say():
            print(stop, file=sys.stderr)
        return stop.exit_code
    return 0


@command
def main() -> int:
    """Entry point of ``hstu-train``."""
    return run_composed(run_command, "config")


if __name__ == "__main__":
    raise SystemExit(main())
