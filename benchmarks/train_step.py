"""Times whole training steps of an experiment on its real data. ``python benchmarks/train_step.py ml-1m/hstu``

One step is what ``hstu-train`` does for one batch: gather the batch, plan, forward, loss, backward, AdamW. Here they
run one after the other, without the loader thread. Medians with the 20th and 80th percentile, and peak memory.
``--peer FILE`` puts another implementation's figures, measured on the same machine and data, beside ours: a JSON
object with ``source`` and ``rows``, a list of ``{"implementation": name, "values": [seconds, ...]}``.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hstu import report
from hstu.allocator import keep_freed_memory
from hstu.cli import conf_dir, register_schemas
from hstu.config import Config, from_dictconfig, to_dict
from hstu.evaluate import dataset_label
from hstu.progress import Display
from hstu.runs import open_store
from hstu.train import Trainer

WARM_UP_STEPS = 5


def compose(experiment: str, overrides: list[str]) -> Config:
    """The experiment's config."""
    import hydra

    register_schemas()
    with hydra.initialize_config_dir(str(conf_dir()), version_base=None):
        return from_dictconfig(hydra.compose("config", overrides=[f"experiment={experiment}", *overrides]))


def time_steps(config: Config, num_steps: int) -> tuple[list[float], list[int], Any]:
    """Seconds and events of each timed step, and the store."""
    store = open_store(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, store, Path(folder), Display(enabled=False))
        trainer.model.train()
        seconds, events = [], []
        for index in range(WARM_UP_STEPS + num_steps):
            step = index % trainer.data.num_steps(0)
            start = time.perf_counter()
            step_input = trainer._make_input(0, step)
            trainer._step(step_input)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            if index >= WARM_UP_STEPS:
                seconds.append(time.perf_counter() - start)
                events.append(step_input.num_events)
            trainer.progress.global_step += 1
    return seconds, events, store


def row(name: str, values: list[float], ours: float) -> dict[str, Any]:
    """One line of the table; ``ours`` is our median."""
    low, median, high = np.percentile(values, [20, 50, 80])
    return {
        "implementation": name,
        "s/step median": float(median),
        "20 %": float(low),
        "80 %": float(high),
        "steps/s": float(1 / median),
        "ours is faster by": f"{median / ours:.1f}x",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", help="as for hstu-train, e.g. data.root=FOLDER run.threads=2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peer", type=Path, help="JSON file with another implementation's figures")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    keep_freed_memory()
    config = compose(options.experiment, [*options.overrides, "run.loggers=[]"])
    seconds, events, store = time_steps(config, options.steps)
    median = float(np.median(seconds))
    name = f"step-{options.experiment.replace('/', '-')}"
    rows = [row("this project", seconds, median)]
    published = None
    if options.peer:
        peer = json.loads(options.peer.read_text(encoding="utf-8"))
        rows += [row(r["implementation"], r["values"], median) for r in peer["rows"]]
        values = {r["implementation"]: float(np.median(r["values"])) for r in peer["rows"]}
        published = {"source": peer["source"], "protocol": store.meta["protocol"], "metrics": values}
    for line in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k}: {v}" for k, v in line.items()))
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{np.mean(events):,.0f} events a step, peak memory {peak_gib:.2f} GiB, {torch.get_num_threads()} threads")
    if options.no_record:
        return
    metrics = report.aggregate([{"s_per_step": s, "events_per_s": n / s} for s, n in zip(seconds, events, strict=True)])
    metrics |= report.aggregate([{"peak_memory_gib": peak_gib}])
    record = report.Record(
        name=name, kind="training", dataset=dataset_label(store), protocol=store.meta["protocol"],
        split_hash=store.meta["split_hash"], model=config.model.name, seeds=[config.seed], metrics=metrics,
        timing={"rows": rows}, published=published, config=report.without_paths(to_dict(config)),
    )  # fmt: skip
    print(f"written to {report.write_record(record)}")


if __name__ == "__main__":
    main()
