"""Table over alpha: events and attention work saved, time of a step, quality.

    python benchmarks/stochastic_length.py ml-1m/stochastic-length [data.root=FOLDER ...] [--runs FOLDER]

The experiment and its variants differ in ``run.stochastic_length`` only. Their steps are timed in turn, the same
users each time, so that whatever else the machine does hits all alike; on the CPU the time is the process's CPU time.
``--runs``: the ``run.dir`` of a finished ``hstu-train`` of the experiment; its test metrics become columns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.train_step import WARM_UP_STEPS
from hstu import report
from hstu.allocator import keep_freed_memory
from hstu.cli import conf_dir, register_schemas
from hstu.config import to_dict
from hstu.errors import UserError
from hstu.evaluate import dataset_label
from hstu.progress import Display
from hstu.results import Planned, expand_runs
from hstu.runs import open_store
from hstu.train import Trainer

QUALITY = ("hr@10", "ndcg@10")


def compose(experiment: str, overrides: list[str]) -> list[Planned]:
    """The experiment and its variants."""
    import hydra
    from omegaconf import OmegaConf

    register_schemas()
    with hydra.initialize_config_dir(str(conf_dir()), version_base=None):
        cfg = hydra.compose("config", overrides=[f"experiment={experiment}", *overrides])
        plan = expand_runs(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    return [entry for entry in plan if entry.config.seed == plan[0].config.seed]


def time_in_turn(trainers: list[Trainer], num_steps: int) -> np.ndarray:
    """[trainers, num_steps] seconds of the same steps of each trainer, one trainer after the other."""
    cuda = trainers[0].device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    seconds = np.zeros((len(trainers), WARM_UP_STEPS + num_steps))
    for trainer in trainers:
        trainer.model.train()
    for index in range(seconds.shape[1]):
        for place, trainer in enumerate(trainers):
            start = clock()
            trainer._step(trainer._make_input(0, index % trainer.data.num_steps(0)))
            if cuda:
                torch.cuda.synchronize()
            seconds[place, index] = clock() - start
            trainer.progress.global_step += 1
    return seconds[:, WARM_UP_STEPS:]


def quality(runs: Path | None, entry: Planned) -> dict[str, float]:
    """Test metrics of the variant's run under ``runs``."""
    if runs is None:
        return {}
    config = entry.config
    folder = runs / f"{config.experiment.replace('/', '-')}-seed{config.seed}"
    result = report.read_json(folder / "result.json", f"finish hstu-train with run.dir={runs}")
    if result["seed"] != config.seed or result["epochs"] != config.run.epochs:
        raise UserError(f"{folder} has seed {result['seed']} and {result['epochs']} epochs: not a run of this command")
    return {name: result["test"][name] for name in QUALITY}


def row(entry: Planned, trainer: Trainer, seconds: np.ndarray, found: dict[str, float]) -> dict[str, Any]:
    """One line of the table."""
    low, median, high = np.percentile(seconds, [20, 50, 80])
    saved = [trainer.data.savings(epoch) for epoch in range(entry.config.run.epochs)]
    mean = {name: float(np.mean([s[name] for s in saved])) for name in saved[0]}
    alpha = entry.config.run.stochastic_length.alpha
    shares = {name: mean.get(name, 0.0) for name in ("tokens_dropped", "attention_work_saved")}
    time_name = "s/step" if trainer.device.type == "cuda" else "CPU s/step"
    return {
        "alpha": "off" if alpha is None else str(alpha), **shares,
        f"{time_name} median": float(median), "20 %": float(low), "80 %": float(high), **found,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", help="as for hstu-train, e.g. data.root=FOLDER run.threads=1")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=Path, help="run.dir of the experiment's training")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    plan = compose(options.experiment, [*options.overrides, "run.loggers=[]"])
    store = open_store(plan[0].config)
    found = [quality(options.runs, entry) for entry in plan]
    with tempfile.TemporaryDirectory() as folder:
        display = Display(enabled=False)
        display.console.quiet = True
        trainers = [Trainer(e.config, store, Path(folder) / str(i), display) for i, e in enumerate(plan)]
        seconds = time_in_turn(trainers, options.steps)
        rows = [row(*line) for line in zip(plan, trainers, seconds, found, strict=True)]
    cells = [[f"{v:.4f}" if isinstance(v, float) else v for v in line.values()] for line in rows]
    print(report.markdown_table(list(rows[0]), cells))
    if options.no_record:
        return
    config = plan[0].config
    record = report.Record(
        name=f"stochastic-length-{store.meta['name']}", kind="training", dataset=dataset_label(store),
        protocol=store.meta["protocol"], split_hash=store.meta["split_hash"], model=config.model.name,
        seeds=[config.seed], metrics={}, timing={"rows": rows}, config=report.without_paths(to_dict(config)),
    )  # fmt: skip
    print(f"written to {report.write_record(record)}")


if __name__ == "__main__":
    main()
