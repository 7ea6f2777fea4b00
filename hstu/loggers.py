"""Where numbers go while a run is on: ``metrics.jsonl`` always; TensorBoard, Weights & Biases, MLflow on request."""

from __future__ import annotations

import errno
import json
import os
import uuid
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
        self._file.truncate(min(size, path.stat().st_size))
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


class NoMetrics:
    """In place of :class:`MetricsFile` on the ranks that write nothing."""

    def write(self, **values: Any) -> None: ...

    def size(self) -> int:
        return 0

    def close(self) -> None: ...


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
            project="hstu", name=folder.name, id=run_id(folder), dir=str(folder), config=config, resume="allow"
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
        known = folder / "mlflow_run_id"
        if known.exists():
            begun = known.read_text(encoding="utf-8")
            try:
                mlflow.start_run(run_id=begun)
            except mlflow.exceptions.MlflowException:
                raise UserError(
                    f"run.loggers: mlflow has no run {begun} at {mlflow.get_tracking_uri()}: set MLFLOW_TRACKING_URI "
                    f"to where it was begun, or delete {known} to begin another"
                ) from None
            return
        run = mlflow.start_run(run_name=folder.name)
        known.write_text(run.info.run_id, encoding="utf-8")
        mlflow.log_dict(config, "config.yaml")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def run_id(folder: Path) -> str:
    """An id of the run, made once and kept in its folder."""
    path = folder / "run_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")


MENDS = {"wandb": "run `wandb login` or set WANDB_MODE=offline", "mlflow": "check MLFLOW_TRACKING_URI"}
"""What to do where a logger's own library refuses to start."""


def make_loggers(names: list[str], folder: Path, config: dict[str, Any], first_step: int) -> list[Logger]:
    """The loggers named; UserError where the package of one is not installed, or does not start."""
    made: list[Logger] = []
    for name in names:
        try:
            if name == "tensorboard":
                made.append(TensorBoard(folder, first_step))
            elif name == "wandb":
                made.append(WeightsAndBiases(folder, config))
            else:
                made.append(MLflow(folder, config))
        except Exception as error:  # a library of others may raise anything
            if isinstance(error, UserError) or getattr(error, "errno", None) == errno.ENOSPC:
                raise
            rest = ",".join(n for n in names if n != name)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            problem, mend = f"does not start ({lines[0]})", MENDS.get(name, f"reinstall {name}")
            if isinstance(error, ImportError):
                problem, mend = "is not installed", f"pip install {name}"
            raise UserError(
                f"run.loggers: {name} {problem}: {mend}, or leave it out with run.loggers=[{rest}]"
            ) from None
    return made
