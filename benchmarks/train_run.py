"""hstu-train in a process that writes how long it took and what it needed; the exit status is that of hstu-train.

python -m benchmarks.train_run OUT.json OPTIONS...
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hstu import report


def main(arguments: list[str]) -> int:
    """arguments: JSON file to write, then the options of hstu-train."""
    from hstu.train import main as train

    target, options = Path(arguments[0]), arguments[1:]
    sys.argv = ["hstu-train", *options]
    started = time.perf_counter()
    status: int | str | None = 1
    try:
        status = train()
    except SystemExit as stop:  # a foreseeable failure: its one line is on stderr
        status = stop.code
    finally:
        import torch

        facts: dict[str, float | int | str | None] = {"wall_s": time.perf_counter() - started, "status": status}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            facts["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
        report.write_json(target, facts)
    return status if isinstance(status, int) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
