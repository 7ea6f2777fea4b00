"""Where numbers go while a run is on: ``metrics.jsonl`` always; TensorBoard, Weights & Biases, MLflow on request."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from hstu.errors import UserError


class Logger(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """``metrics.jsonl``: one object a line. Resuming cuts it back to where the checkpoint was written.

    Args:
        path: of the file.
        size: bytes to keep (from :meth:`size` at the checkpoint); 0 starts anew.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._file = open(path, "ab")
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()

    def size(self) -> int:
        """Bytes written so far, flushed to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project="hstu", name=folder.name, id=folder.name, dir=str(folder), config=config, resume="allow"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(str(config["experiment"]))
        mlflow.start_run(run_name=folder.name)
        mlflow.log_dict(config, "config.yaml")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def make_loggers(names: list[str], folder: Path, config: dict[str, Any], first_step: int) -> list[Logger]:
    """The loggers named; UserError where the package of one is not installed."""
    made: list[Logger] = []
    for name in names:
        try:
            if name == "tensorboard":
                made.append(TensorBoard(folder, first_step))
            elif name == "wandb":
                made.append(WeightsAndBiases(folder, config))
            else:
                made.append(MLflow(folder, config))
        except ImportError:
            rest = [n for n in names if n != name]
            raise UserError(
                f"run.loggers: {name} is not installed; pip install {name}, or run.loggers={rest}"
            ) from None
    return made
