"""Ranks of a run: joined where torchrun has started them, started here for ``run.ranks=N``.

    hstu-train run.ranks=4 ...                          on this machine; torch's elastic launcher runs in this process
    torchrun --nproc-per-node=4 -m hstu.train ...       the same; on several machines with torchrun's own options

A rank that dies makes the launcher start all of them again, from the last checkpoint. What is wrong with the config or
the data would be wrong again: it ends the run, and is said once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hstu.config import Config, RunConfig, from_dict
from hstu.distributed import World
from hstu.errors import Interrupted, RankLost, UserError
from hstu.evaluate import run_device
from hstu.pulse import Pulse

FOLDER = "HSTU_LAUNCH_FOLDER"
"""Environment of the ranks that :func:`launch` starts: where they leave what the launching process has to say."""
OUTCOME, LOSS, OPTIONS = "outcome.json", "loss-{attempt}.txt", "options.json"
PATIENCE = timedelta(days=30)
"""A rank may work alone for long, as at preparing data; the others watch its signs of life instead of the clock."""
LAUNCHER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
START_TIMEOUT_S = 300.0
"""Ranks start at different times: each imports its libraries and opens its device."""
MEET_INTERVAL_S = 0.1
REPORT_TIMEOUT_S = 5.0
INTERRUPTED = 130
"""Exit status after a Ctrl-C that nothing was saved at."""
STOP_PATIENCE_S = 300
"""A checkpoint of 100 GB takes so long at 0.33 GB/s."""
NCCL_LATER_S = 60.0
"""NCCL ends the process at its time-out without a word, so the pulse comes first and says which rank hangs."""


_meeting = 0
"""Of the ranks of this process, the last one; see :func:`_meet`."""


def attempt() -> int:
    """How often the launcher has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


# A rank


@contextmanager
def join(run: RunConfig) -> Iterator[World]:
    """The ranks that the environment names (torchrun's variables), this process among them; of one without them.

    Raises:
        UserError: the port is in use, no such GPU, another number of ranks than ``run.ranks``.
        RankLost: another rank has died or hangs; says which.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if run.ranks is not None and run.ranks != size:
        raise UserError(f"run.ranks={run.ranks}, but {size} were started: leave run.ranks out, or start as many")
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
    device = run_device(run.device, local_rank if size > 1 else None)
    if size == 1:
        yield World(device=device)
        return
    global _meeting
    store = connect(rank, START_TIMEOUT_S)
    _meeting = meeting = _meet(store, rank, size, device.type)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore(f"group/{meeting}", store), rank=rank,
            world_size=size, timeout=timedelta(seconds=run.timeout_s + (NCCL_LATER_S if cuda else 0.0)),
            device_id=device if cuda else None,
        )  # fmt: skip
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RankLost(f"rank {rank} could not join the {size} ranks in {run.timeout_s:g} s ({reason})") from None
    beats = dist.PrefixStore(f"beats/{meeting}", connect(rank, START_TIMEOUT_S, client=True))
    pulse = Pulse(beats, rank, size, run.timeout_s, on_lost=lambda why: _give_up(pulse, why))
    world = World(rank, size, device, local_rank, patient, pulse, _why_again())
    try:
        yield world
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from the launcher, in the middle of saying why
        lost = pulse.explain(error) if _is_lost_contact(error) else None
        pulse.stop(failed=True)
        if lost is not None:
            raise RankLost(lost) from None
        raise
    else:
        world.barrier()  # a rank that leaves while another still talks to it can make that one fail
        pulse.stop()
        dist.destroy_process_group()


def _meet(store: dist.Store, rank: int, size: int, device: str) -> int:
    """Returns when every rank has started, the same number on all of them: how often ranks have met at this store.

    Launchers of several machines count restarts each for itself, and their store outlives a restart: what is left in it
    must not be taken for a rank of now. So rank 0 counts, and tells the number to every word that it finds; a rank
    says a new word each time.

    Raises UserError naming the ranks that have not started, or have another kind of device.
    """
    word, limit = uuid.uuid4().hex, time.monotonic() + START_TIMEOUT_S
    store.set(f"word/{rank}", word)
    if rank == 0:
        number = store.add("meetings", 1)
        store.set(f"number/{word}", str(number))
    try:
        store.wait([f"number/{word}"], timedelta(seconds=START_TIMEOUT_S))
    except dist.DistError:
        raise UserError(_absent([0], size)) from None
    number = int(store.get(f"number/{word}"))
    keys = [f"started/{number}/{r}" for r in range(size)]
    store.set(keys[rank], device)
    while absent := [r for r in range(size) if not store.check([keys[r]])]:
        if time.monotonic() > limit:
            raise UserError(_absent(absent, size))
        for other in absent if rank == 0 else ():
            if store.check([f"word/{other}"]):
                store.set(f"number/{store.get(f'word/{other}').decode()}", str(number))
        time.sleep(MEET_INTERVAL_S)
    kinds = [kind.decode() for kind in store.multi_get(keys)]
    for other, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise UserError(
                f"rank {other} computes on {kind}, rank 0 on {kinds[0]}: set run.device, and see what torch finds on "
                "each machine"
            )
    return number


def _absent(ranks: list[int], size: int) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names} of {size} did not start within {START_TIMEOUT_S:g} s: see what its machine says"


def connect(rank: int, timeout_s: float, client: bool = False) -> dist.Store:
    """The store of the run at MASTER_ADDR:MASTER_PORT; without a launcher that holds one, rank 0 does.

    Raises UserError where the port is in use, or nobody answers there.
    """
    host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "29500"))
    launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank == 0 and not client and not launcher
    try:
        return dist.TCPStore(
            host, port, is_master=is_master, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except dist.DistError as error:
        reason = str(error).strip().splitlines()[0]
        if is_master:
            raise UserError(
                f"rank 0 cannot listen at port {port} ({reason}): another program has it; set another MASTER_PORT"
            ) from None
        raise UserError(
            f"rank {rank} finds no store of the run at {host}:{port} ({reason}): start rank 0, or check MASTER_ADDR, "
            "MASTER_PORT and the firewall"
        ) from None


def _is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed for want of another rank."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))


def _give_up(pulse: Pulse, why: str) -> None:
    """Ends this process, whose main thread may wait for a rank for ever. Called in the thread of the pulse."""
    status = conclude(RankLost(why))
    pulse.kill_silent()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _why_again() -> str:
    """For the start of a run that the launcher has started again."""
    if attempt() == 0:
        return ""
    folder = os.environ.get(FOLDER)
    note = Path(folder or ".") / LOSS.format(attempt=attempt() - 1)
    why = note.read_text(encoding="utf-8") if folder and note.exists() else "a rank ended"
    return f"restart {attempt()}: {why}"


def remembered(world: World, name: str, make: Callable[[], str]) -> str:
    """What ``make`` gives on the first rank, on all; after a restart what it gave before.

    name: of what is remembered, by the launcher's store.
    """

    def of_first() -> str:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return make()
        store = connect(world.rank, REPORT_TIMEOUT_S, client=True)
        if not store.check([f"remembered/{name}"]):
            store.set(f"remembered/{name}", make())
        return store.get(f"remembered/{name}").decode()

    return world.on_first(of_first)


# What is said of a failure


def first_to_say() -> bool:
    """Whether no other rank has reported a failure of this attempt; True for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        store = connect(int(os.environ.get("RANK", "0")), REPORT_TIMEOUT_S, client=True)
        return store.add(f"reported/{_meeting}" if _meeting else f"reported/start/{attempt()}", 1) == 1
    except (UserError, RuntimeError):
        return os.environ.get("RANK", "0") == "0"


def conclude(error: BaseException) -> int:
    """Reports how this rank failed, if it is the first to; returns its exit status.

    Under :func:`launch` the report goes to the launching process, and a failure that would come again has the status 0,
    for which ranks are not started again.
    """
    folder = os.environ.get(FOLDER)
    outcome: dict[str, Any] = {"status": 1}
    if isinstance(error, UserError):  # told without an import, which the launcher might not wait for
        outcome["line"] = str(error)
    elif isinstance(error, Interrupted):
        outcome = {"status": error.exit_code, "signal": error.number, "folder": str(error.folder)}
    elif isinstance(error, KeyboardInterrupt):
        outcome = {"status": INTERRUPTED, "line": "interrupted"}
    else:
        from hstu.cli import _one_line

        outcome["line"] = _one_line(error)
    if folder is None:
        if first_to_say():
            print(error if isinstance(error, Interrupted) else f"error: {outcome['line']}", file=sys.stderr)
        return int(outcome["status"])
    lost = isinstance(error, RankLost)
    name = LOSS.format(attempt=attempt()) if lost else OUTCOME
    text = str(error) if lost else json.dumps(outcome)
    try:
        with open(Path(folder) / name, "x", encoding="utf-8") as file:
            file.write(text)
        if outcome.get("line") is None and "signal" not in outcome:
            traceback.print_exception(error)
    except FileExistsError:  # another rank was first
        pass
    return 1 if lost and not (Path(folder) / OUTCOME).exists() else 0


# The launching process


def should_launch(options: dict[str, Any]) -> bool:
    """Whether these options ask for ranks that nobody has started yet."""
    ranks = (options.get("run") or {}).get("ranks")
    return ranks is not None and ranks > 1 and "WORLD_SIZE" not in os.environ


def launch(options: dict[str, Any], module: str = "hstu.train", config: Config | None = None) -> None:
    """Starts ``run.ranks`` ranks with the composed ``options`` on this machine and waits for them.

    module: whose ``run_command`` each of them calls with ``options``. config: what these say of the run, where they are
    more than a :class:`Config`.

    Raises what one process would: UserError, or Interrupted after a signal.
    """
    from hstu.runs import run_folder

    config = config or from_dict(options)
    run = config.run
    assert run.ranks is not None
    for local_rank in range(run.ranks):
        run_device(run.device, local_rank)
    folder = str(run_folder(config))
    options = {**options, "run": {**options["run"], "dir": folder}}
    times = {0: "", 1: ", after 1 restart"}.get(run.max_restarts, f", after {run.max_restarts} restarts")
    start_ranks(options, module, run, f"{times} (run.max_restarts={run.max_restarts}); resume with run.dir={folder}")


def start_ranks(options: dict[str, Any], module: str, run: RunConfig, mend: str = "") -> None:
    """Starts ``run.ranks`` ranks, each of which calls ``run_command`` of ``module`` with ``options``; waits for them.

    mend: what is said after how a rank was lost.

    Raises what one process would: UserError, or Interrupted after a signal. UserError also where this torch cannot wait
    for ``run.stop_patience_s``.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    assert run.ranks is not None
    with tempfile.TemporaryDirectory(prefix="hstu-ranks-") as name, _environment(run, name):
        folder = Path(name)
        (folder / OPTIONS).write_text(json.dumps(options), encoding="utf-8")
        launcher = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=run.ranks, run_id="hstu", rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=run.max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=name), **_stop_patience(run, LaunchConfig),
        )  # fmt: skip
        logging.disable(logging.CRITICAL)  # the launcher's own account of what we say in one line
        handlers = {number: signal.getsignal(number) for number in LAUNCHER_SIGNALS}
        failure: str | None = None
        number: int | None = None
        try:
            elastic_launch(launcher, sys.executable)("-m", "hstu.launch", name, module)
        except SignalException as stop:
            number = int(stop.sigval)
        except ChildFailedError as error:
            failure = _last_failure(error, folder) + mend
        finally:
            logging.disable(logging.NOTSET)
            for handled, handler in handlers.items():  # the launcher leaves its own
                signal.signal(handled, handler)
        _raise_outcome(folder / OUTCOME, failure, number)


def _stop_patience(run: RunConfig, launch_config: type) -> dict[str, Any]:
    """How long the launcher waits for its ranks after a signal, as options of torch's ``launch_config``."""
    if "shutdown_timeout" in (f.name for f in dataclasses.fields(launch_config)):
        return {"shutdown_timeout": run.stop_patience_s or STOP_PATIENCE_S}
    if run.stop_patience_s is not None:
        raise UserError(
            f"run.stop_patience_s={run.stop_patience_s}: the launcher of torch {torch.__version__} kills ranks 30 s "
            "after a signal, whatever the number; expected null, or torch 2.13"
        )
    return {}


def _last_failure(error: Any, folder: Path) -> str:
    rank, failed = error.get_first_failure()
    how = f"signal {signal.Signals(-failed.exitcode).name}" if failed.exitcode < 0 else f"status {failed.exitcode}"
    notes = sorted(folder.glob(LOSS.format(attempt="*")), key=lambda p: p.stat().st_mtime)
    said = notes[-1].read_text(encoding="utf-8") if notes else f"rank {rank} ended with {how}"
    if failed.exitcode < 0 and f"rank {rank} " in said and "ended" in said:
        said = f"rank {rank} ended with {how}"
    return said


def _raise_outcome(path: Path, failure: str | None, number: int | None) -> None:
    outcome = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "signal" in outcome:
        raise Interrupted(outcome["signal"], Path(outcome["folder"]))
    if outcome.get("status") == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.get("line"):
        raise UserError(outcome["line"])
    if outcome:
        raise SystemExit(outcome["status"])
    if number is not None:
        print(f"stopped by {signal.Signals(number).name} before the ranks had saved", file=sys.stderr)
        raise SystemExit(128 + number)
    if failure is not None:
        raise UserError(failure)


@contextmanager
def _environment(run: RunConfig, folder: str) -> Iterator[None]:
    """What the ranks inherit: where to report, their share of the threads, one machine's network."""
    assert run.ranks is not None
    values = {
        FOLDER: folder,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // run.ranks)),
    }
    if "lo" in (name for _, name in socket.if_nameindex()):
        values["GLOO_SOCKET_IFNAME"] = "lo"
    before = dict(os.environ)
    os.environ.update({n: v for n, v in values.items() if n == FOLDER or n not in os.environ})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> int:
    """One rank that :func:`launch` has started."""
    folder, module = Path(sys.argv[1]), import_module(sys.argv[2])
    try:
        module.run_command(json.loads((folder / OPTIONS).read_text(encoding="utf-8")))
    except BaseException as error:
        return conclude(error)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of the process group of a failed run may still wait for others
