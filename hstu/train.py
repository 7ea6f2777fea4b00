"""Training, and the command ``hstu-train``.

    hstu-train experiment=ml-1m/hstu [optim.lr=3e-4] [seed=1] [seeds=[0,1,2]] [run.dir=FOLDER]

Trains an experiment of conf/experiment, evaluates it and prints the result beside the baselines and the
published row. Repeating the command with the same run.dir resumes. Sweeps: add -m, as in
``hstu-train -m optim.lr=1e-3,3e-4``. ``hstu-train --cfg job`` prints the composed config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import sys
import time
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
from hstu.config import Config, to_dict
from hstu.data.batches import Prefetcher
from hstu.distributed import World
from hstu.errors import UserError
from hstu.evaluate import run_device
from hstu.loggers import MetricsFile, make_loggers
from hstu.optim import WeightAverage, clip_gradients, gradient_norm, learning_rate, make_optimizer, set_learning_rate
from hstu.problem import make_problem
from hstu.progress import Display
from hstu.runs import describe, load_run, lock_folder, open_store, run_folder
from hstu.seeding import derive
from kernels._backend import OPS, choose, set_backend
from kernels._launch import set_autotune

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

__all__ = ["Interrupted", "Trainer", "load_run", "main", "train"]

STEP_SEED = 12
"""Purpose number of the seed of each step."""


class Interrupted(BaseException):
    """A signal asked the run to stop; it has saved. No Exception, so that a sweep stops with its job."""

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; saved. Resume with run.dir={folder}")
        self.number, self.folder = number, folder
        self.exit_code = 128 + number


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
    metrics_size: int = 0
    """Bytes of metrics.jsonl."""


@dataclass(frozen=True)
class StepInput:
    """What one optimizer step consumes: micro-batches and their attention plans."""

    batches: list[tuple[Any, Any]]

    @property
    def num_events(self) -> int:
        return sum(b.num_events for b, _ in self.batches)


class Trainer:
    """One run: one config, one seed, one folder."""

    def __init__(self, config: Config, store: SequenceStore, folder: Path, display: Display) -> None:
        self.config, self.store, self.folder, self.display = config, store, folder, display
        self.device = run_device(config.run.device)
        if config.run.precision == "bfloat16" and self.device.type != "cuda":
            raise UserError("run.precision=bfloat16: expected a CUDA device; use float32 on the CPU")
        self._set_up_torch()
        self.problem = make_problem(config, store, self.device, folder)
        self.split, self.data, self.model = self.problem.split, self.problem.data, self.problem.model
        names = self.problem.metric_names
        if config.run.select_metric not in names:
            raise UserError(f"run.select_metric={config.run.select_metric}: expected one of {', '.join(names)}")
        self.sign = 1.0 if self.problem.higher_is_better(config.run.select_metric) else -1.0
        self.optimizer = make_optimizer(self.model, config.optim)
        decay = config.optim.average_decay
        self.average = None if decay is None else WeightAverage(self.model, decay)
        run = config.run
        self.total_steps = run.epochs * self._num_steps(0)
        self.progress = Progress()
        self.checkpoints = folder / "checkpoints"
        self.stop_signal: int | None = None
        self._last_save = time.monotonic()
        self._lock = lock_folder(folder)
        parameters = self.model.num_parameters()
        describe(folder, config, store, {"parameters": parameters, "device": str(self.device)})
        self.saver = checkpoint.Saver(self.checkpoints, run.keep_last, background=run.save_in_background)
        self._restore()
        self.metrics_file = MetricsFile(folder / "metrics.jsonl", self.progress.metrics_size)
        self.loggers = make_loggers(run.loggers, folder, to_dict(config), self.progress.global_step)
        display.start_run(config, store, self.data, parameters, self.device, folder, self.progress.global_step)

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
            torch.use_deterministic_algorithms(True, warn_only=True)

    # State

    def _state(self) -> checkpoint.State:
        self.progress.metrics_size = self.metrics_file.size()
        progress = dataclasses.asdict(self.progress)
        return run_state(self.model, self.optimizer, self.average, progress, World.current(self.device))

    def _save(self) -> None:
        self._check_parameters()
        self.saver.save(self._state(), self.progress.global_step)
        if self.progress.finished or self.stop_signal is not None:
            self.saver.wait()
        self._last_save = time.monotonic()

    def _restore(self) -> None:
        world = World.current(self.device)
        saved = checkpoint.load_last(self.checkpoints, world, set_aside=True)
        if saved is None:
            return
        self.progress = Progress(**restore_run(saved, self.model, self.optimizer, self.average, world))
        stopped = self.progress.finished and not self._stopped_early()
        if stopped and self.progress.epoch < self.config.run.epochs:
            self.progress.finished = False  # run.epochs was raised

    # The loop

    def run(self) -> Progress:
        """Trains to the end. Raises Interrupted after a signal, UserError on a non-finite value or a full disk."""
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self.progress.finished:
                self._epoch()
            if self.stop_signal is not None:
                raise Interrupted(self.stop_signal, self.folder)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.saver.close()
            self.metrics_file.close()
            self._lock.close()
            for logger in self.loggers:
                logger.close()
            self.display.end_run()
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
        with Prefetcher(lambda step: self._make_input(epoch, step), progress.step, num_steps) as inputs:
            last = time.perf_counter()
            for step_input in inputs:
                loss = self._step(step_input)
                now = time.perf_counter()
                self._after_step(step_input, loss, now - last)
                last = time.perf_counter()
        self._end_epoch()

    def _step(self, step_input: StepInput) -> float:
        """One optimizer step; returns the loss, the mean over all positions of the step."""
        seed = derive(self.config.seed, STEP_SEED, self.progress.global_step)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index, (batch, plan) in enumerate(step_input.batches):
            self.problem.observe(batch, plan)
            share = batch.num_events / step_input.num_events
            loss = self._loss(batch, derive(seed, index), plan) * share
            loss.backward()
            total += float(loss.detach())
        norm = gradient_norm(self.model)
        if not math.isfinite(total) or not bool(torch.isfinite(norm)):
            self._stop_non_finite(step_input, seed, total)
        if self.config.optim.clip_norm is not None:
            clip_gradients(self.model, norm, self.config.optim.clip_norm)
        set_learning_rate(self.optimizer, self._rate())
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return total

    def _rate(self) -> float:
        return learning_rate(self.config.optim, self.progress.global_step, self.total_steps)

    def _loss(self, batch: Any, seed: int, plan: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16"):
            return self.model.loss(batch, seed, plan)  # type: ignore[no-any-return]

    def _stop_non_finite(self, step_input: StepInput, seed: int, loss: float) -> None:
        from hstu.nonfinite import first_non_finite

        name = None
        for index, (batch, plan) in enumerate(step_input.batches):
            found = partial(self._loss, batch, derive(seed, index), plan)
            name = name or first_non_finite(self.model, found)
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
        events_per_s = step_input.num_events / seconds
        self.display.step(progress.loss_sum / progress.loss_events, events_per_s)
        if progress.global_step % run.log_every_steps == 0:
            num_batches = min(progress.step * self.config.optim.accumulate_steps, self.data.num_steps(progress.epoch))
            saved = self.data.savings(progress.epoch, num_batches)
            self._log({"loss": loss, "lr": rate, "events_per_s": events_per_s, **saved})
        if self.stop_signal is not None:
            self._save()
            raise Interrupted(self.stop_signal, self.folder)
        due = run.save_every_steps is not None and progress.global_step % run.save_every_steps == 0
        if run.save_every_minutes is not None:
            due = due or time.monotonic() - self._last_save >= 60.0 * run.save_every_minutes
        if due:
            self._save()

    def _log(self, values: dict[str, float], **extra: Any) -> None:
        step = self.progress.global_step
        self.metrics_file.write(step=step, epoch=self.progress.epoch, **extra, **values)
        for logger in self.loggers:
            logger.log(step, values)

    def _check_parameters(self) -> None:
        """An update can overflow though its gradients were finite: seen here, before anything is saved."""
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                self._fail_non_finite(f"parameter {name}", "not computed yet")

    def _end_epoch(self) -> None:
        progress, run = self.progress, self.config.run
        self._check_parameters()
        epoch_loss = progress.loss_sum / max(1, progress.loss_events)
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum, progress.loss_events = 0.0, 0
        done = progress.epoch >= run.epochs
        if progress.epoch % run.eval_every_epochs == 0 or done:
            self._validate(epoch_loss)
            done = done or self._stopped_early()
        progress.finished = done
        stopping = self.stop_signal
        if done or stopping or (run.save_every_epochs is not None and progress.epoch % run.save_every_epochs == 0):
            self._save()
        if stopping is not None and not done:
            raise Interrupted(stopping, self.folder)

    def _stopped_early(self) -> bool:
        limit = self.config.run.early_stop_evals
        return limit is not None and self.progress.evals_since_best >= limit

    def _validate(self, epoch_loss: float) -> None:
        """Evaluates the weights, or their average where the config asks for one; keeps them if they are the best."""
        with contextlib.nullcontext() if self.average is None else self.average.applied():
            self._validate_weights(epoch_loss)

    def _validate_weights(self, epoch_loss: float) -> None:
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
        self._log({"epoch_loss": epoch_loss, **values, **saved}, kind=part)
        shown = [n for n in dict.fromkeys([name, *self.problem.shown]) if n in values]
        self.display.validation(progress.epoch, epoch_loss, part, {n: values[n] for n in shown}, improved, saved)
        if improved:
            self.saver.save_best(checkpoint.State(model_state(self.model), {"progress": dataclasses.asdict(progress)}))


def train(config: Config, display: Display | None = None) -> Path:
    """Trains one run (one seed, no variants), evaluates its best checkpoint on test; returns its folder.

    The folder then holds ``result.json`` and ``evaluation.json``. A finished run is not repeated.

    Raises:
        UserError: a wrong config, data or run folder, a non-finite value, a full disk.
        Interrupted: a signal came; the run has saved and can be resumed.
    """
    from hstu.results import evaluate_finished

    keep_freed_memory()
    folder = run_folder(config)
    display = display or Display(config.run.progress)
    store = open_store(config)
    trainer = Trainer(config, store, folder, display)
    progress = trainer.run()
    evaluate_finished(trainer, progress)
    report.plot_curves(folder)
    return folder


def run_command(options: dict[str, Any]) -> None:
    """What ``hstu-train`` does with the composed options: all variants and seeds, then the table."""
    from hstu.results import expand_runs, show_results

    plan = expand_runs(options)
    display = Display(plan[0].config.run.progress)
    finished = []
    for entry in plan:
        try:
            finished.append(dataclasses.replace(entry, folder=train(entry.config, display)))
        except Interrupted as stop:
            raise Interrupted(stop.number, entry.parent or stop.folder) from None
    show_results(finished, display.console)


@command
def main() -> int:
    """Entry point of ``hstu-train``."""
    from omegaconf import OmegaConf

    try:
        run_hydra(lambda cfg: run_command(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))), "config")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
