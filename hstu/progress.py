"""What a person sees while training: a live bar, one line per evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hstu.data.stochastic_length import savings_text

if TYPE_CHECKING:
    from hstu.config import Config
    from hstu.data.store import SequenceStore
    from hstu.distributed import World


class Display:
    """A live progress bar on a terminal; plain lines where the output is a file.

    enabled: show the bar. shown: print anything at all; false on all ranks but the first. by_day: epochs are days, each
    of its own length, and nobody knows how many come.
    """

    def __init__(self, enabled: bool = True, shown: bool = True, by_day: bool = False) -> None:
        self.console, self.by_day = Console(quiet=not shown), by_day
        self._live = enabled and shown and self.console.is_terminal
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start_run(self, config: Config, store: SequenceStore, data: Any, parameters: dict[str, int],
                  world: World, folder: Path, global_step: int) -> None:  # fmt: skip
        model, run = config.model, config.run
        size = f"{run.batch_tokens:,} events" if run.batch_tokens else f"{run.batch_users} users"
        few = "without training events" if config.ranking else "with fewer than two training events"
        skipped = f", {data.num_skipped:,} {few} left out" if data.num_skipped else ""
        objective = config.loss.name
        if config.ranking is not None:
            objective = f"{config.ranking.form} ranking of {', '.join(config.ranking.tasks)}"
            if config.ranking.mode == "progressive":
                size = f"{config.ranking.batch_events:,} events in time order"
        span = "on the first day" if self.by_day else f"an epoch, {run.epochs} epochs"
        name = str(store.meta.get("name", config.data.name))
        ranks = f" on {world.size} ranks" if world.size > 1 else ""
        without = f"{parameters['without_embeddings']:,} without embeddings"
        lines = [
            f"[bold]{escape(config.experiment)}[/bold]: {model.name}, {parameters['total']:,} parameters ({without}), "
            f"{objective}, {world.device.type}{ranks}, seed {config.seed}",
            f"{escape(name)}: {len(data.users):,} users{skipped}, {store.num_items:,} items, {data.num_steps(0)} "
            f"batches of {size} {span}, split {store.meta.get('split_hash')}",
            f"run folder {escape(str(folder))}" + (f", resumed at step {global_step:,}" if global_step else ""),
        ]
        if config.kernels.autotune and world.device.type == "cuda":
            lines.append("kernels.autotune=true goes by timing: results differ in the last bits between runs and ranks")
        if world.again:
            lines.append(escape(world.again))
        self.console.print("\n".join(lines), highlight=False, soft_wrap=True)

    def start_epoch(self, epoch: int, num_epochs: int, num_steps: int, step: int) -> None:
        if not self._live:
            return
        if self._bar is None:
            unit, end = ("day", "the end of the day") if self.by_day else ("epoch", "the end")
            self._bar = Progress(
                TextColumn(unit + " {task.fields[epoch]}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[rate]} events/s"),
                TimeRemainingColumn(elapsed_when_finished=True), TextColumn(f"to {end}"),
                console=self.console, transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", epoch="", loss="-", rate="-")
        done, total, number = epoch * num_steps + step, num_epochs * num_steps, f"{epoch + 1}/{num_epochs}"
        if self.by_day:
            done, total, number = step, num_steps, str(epoch + 1)
        self._bar.update(self._task, completed=done, total=total, epoch=number)

    def step(self, loss: float, events_per_s: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=1, loss=f"{loss:.4f}", rate=f"{events_per_s:,.0f}")

    def validation(self, epoch: int, training: dict[str, float], part: str, values: dict[str, float], improved: bool,
                   saved: dict[str, float]) -> None:  # fmt: skip
        """training: ``epoch_loss``, and ``imbalance`` of the ranks' work where there are several."""
        uneven = f"  slowest rank {training['imbalance']:+.1%} of the mean work" if "imbalance" in training else ""
        numbers = "  ".join(f"{n} {value:.4f}" for n, value in values.items() if not math.isnan(value))
        star = "  best so far" if improved else ""
        loss, rest = training["epoch_loss"], f"{savings_text(saved, '  ')}{uneven}"
        line = f"epoch {epoch:3d}  loss {loss:.4f}  {part} {numbers}{star}{rest}"
        self.console.print(line, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def end_run(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
