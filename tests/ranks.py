"""Functions run on several gloo ranks, for tests of what is distributed.

    results = run_ranks(4, train_two_steps, config)   # [train_two_steps(config) of rank 0, ... of rank 3]

The function must be importable (a module's own), its arguments and results picklable. The processes live on and serve
the next call, as importing torch costs more than most tests; a call that fails or hangs ends them all. They are forks
of a server that has imported everything (:mod:`tests.imports`) and done nothing else.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.figures import leave_unrendered
from tests.imports import fresh_processes

MAX_RANKS = 4
TIMEOUT_S = 120
_ranks: list[tuple[Any, Connection]] = []


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Results of ``function(*args)`` on every rank of a fresh gloo group, in order of rank.

    Raises AssertionError with the first failing rank's trace, or naming the ranks that have not answered in time.
    """
    assert 1 <= num_ranks <= MAX_RANKS
    _start(num_ranks)
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(_ranks[:num_ranks])}
        for pipe, rank in pipes.items():
            pipe.send((rank, num_ranks, f"file://{folder}/store", function, args))
        while pipes:
            ready = wait(list(pipes), timeout_s)
            if not ready:
                stop_ranks()
                raise AssertionError(f"no answer from rank {', '.join(map(str, pipes.values()))} in {timeout_s} s")
            for pipe in ready:
                rank = pipes.pop(pipe)  # type: ignore[call-overload]
                try:
                    failed, result = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    failed, result = True, "the process ended"
                if failed:
                    stop_ranks()
                    raise AssertionError(f"rank {rank} failed:\n{result}")
                results[rank] = result
    return [results[rank] for rank in range(num_ranks)]


def stop_ranks() -> None:
    """Ends the processes; the next call starts new ones."""
    while _ranks:
        process, pipe = _ranks.pop()
        pipe.close()
        process.kill()
        process.join()


def _start(num_ranks: int) -> None:
    context = fresh_processes()
    while len(_ranks) < num_ranks:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _ranks.append((process, ours))


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    leave_unrendered()
    torch.set_num_threads(1)
    while True:
        try:
            rank, size, store, function, args = pipe.recv()
        except EOFError:
            return
        try:
            limit = timedelta(seconds=TIMEOUT_S)
            dist.init_process_group("gloo", store, rank=rank, world_size=size, timeout=limit)
            if (kept := sys.modules.get("torchrec.distributed.collective_utils")) is not None:
                kept._INITIALIZED = False  # torchrec asks once a process, and then the ranks that are new wait for all
            result = function(*args)
            dist.barrier()  # a rank that leaves while another still talks to it can abort
            dist.destroy_process_group()
            pipe.send((False, result))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
            return


atexit.register(stop_ranks)
