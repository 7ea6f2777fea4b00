"""Signs of life of the ranks, by which one that hangs or dies is named.

Each rank writes its own into a store from a thread, and watches those of the others. A thread beats on while its main
thread computes, however long; it stops with its process (SIGSTOP, a lost machine).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

LONGEST_INTERVAL_S = 5.0
GRACE_S = 10.0
"""A rank that has heard of a failure elsewhere has so long to come to an end by itself."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Another one each time that Linux starts."""
_ENDED, _FAILED = -1, -2


@cache
def this_machine() -> str:
    """Names the machine, as it has been since it was switched on, and the processes that a number means in it.

    Host names alone do not: those of machines made from one image, or of containers, can be equal. Containers of one
    machine have its boot id, and numbers of processes of their own.
    """
    parts = [socket.gethostname()]
    try:
        parts.append(BOOT_ID.read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # not on Linux
        pass
    return " ".join(parts)


@dataclass
class Beat:
    """What is known of a rank. machine: as from :func:`this_machine`."""

    host: str
    pid: int
    machine: str
    count: int = 0
    """Rises while the process lives; negative: it has ended, or failed and said so."""
    position: int = 0
    """How far the rank has come in the run; the same numbers on all ranks."""
    changed: float = 0.0
    """Our own clock, s, when ``count`` last rose."""


class Pulse:
    """The sign of life of one rank, and what it knows of the others.

    Args:
        store: of its own: calls of others must not hold it up.
        on_lost: called in the thread, once, with why another rank is given up.
        timeout_s: without a sign of life for so long a rank is given up.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout_s: float, on_lost: Callable[[str], None]
    ) -> None:
        self.store, self.rank, self.timeout_s, self.on_lost = store, rank, timeout_s, on_lost
        self.interval_s = min(LONGEST_INTERVAL_S, timeout_s / 4)
        self.position = 0
        self.others: dict[int, Beat] = {}
        self._peers = [r for r in range(size) if r != rank]
        self._count = 0
        self._stopping = threading.Event()
        self._beat(0)
        self._look()  # returns when every rank has given its first
        self._thread = threading.Thread(target=self._run, daemon=True, name="pulse")
        self._thread.start()

    def _beat(self, count: int) -> None:
        value = [socket.gethostname(), os.getpid(), this_machine(), count, self.position]
        self.store.set(f"beat/{self.rank}", json.dumps(value))

    def _look(self) -> None:
        now = time.monotonic()
        for rank, value in zip(self._peers, self.store.multi_get([f"beat/{r}" for r in self._peers]), strict=True):
            host, pid, machine, count, position = json.loads(value)
            beat = self.others.setdefault(rank, Beat(host, pid, machine, changed=now))
            if count != beat.count:
                beat.changed = now
            beat.count, beat.position = count, position

    def _run(self) -> None:
        while not self._stopping.wait(self.interval_s):
            self._count += 1
            try:
                self._beat(self._count)
                self._look()
            except (RuntimeError, ValueError):  # the store has gone, with the launcher or the rank that held it
                if not self._stopping.is_set():
                    self.on_lost("the launcher, or the rank that held the store of the run, has ended")
                return
            lost = self.silent()
            if lost is not None:
                self.on_lost(lost)
                return
            failed = [r for r, beat in self.others.items() if beat.count == _FAILED]
            if failed and not self._stopping.wait(GRACE_S):
                self.on_lost(f"rank {failed[0]} has failed")
                return

    def silent(self) -> str | None:
        """Why a rank is given up, where one has been silent for too long."""
        for rank, beat in self.others.items():
            age = time.monotonic() - beat.changed
            if beat.count >= 0 and age > self.timeout_s:
                return self._silence(rank, age)
        return None

    def _silence(self, rank: int, age: float) -> str:
        return (
            f"{self.name(rank)} has given no sign of life for {age:.0f} s (run.timeout_s={self.timeout_s:g}): "
            "it is stopped, or its machine is lost"
        )

    def explain(self, error: BaseException) -> str:
        """Which rank is to blame for a collective that failed with ``error``."""
        try:
            self._look()
        except (RuntimeError, ValueError):
            pass
        gone = [r for r, beat in self.others.items() if beat.count < 0 or not self._lives(beat)]
        if gone:
            return f"{' and '.join(map(self.name, gone))} ended while the others went on"
        oldest = max(self.others, key=lambda r: time.monotonic() - self.others[r].changed)
        age = time.monotonic() - self.others[oldest].changed
        if age > 2.5 * self.interval_s:
            return (
                f"{self.name(oldest)} has given no sign of life for {age:.0f} s: it is stopped, or its machine is lost"
            )
        behind = min(beat.position for beat in self.others.values())
        late = [r for r, beat in self.others.items() if beat.position == behind < self.position]
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if late:
            return f"{' and '.join(map(self.name, late))} did not come to what the others wait for ({reason})"
        return f"the ranks lost contact with each other ({reason})"

    @staticmethod
    def _lives(beat: Beat) -> bool:
        """False where the process is known to have ended; that of another machine is taken to live."""
        if beat.machine != this_machine():
            return True
        try:
            with open(f"/proc/{beat.pid}/stat", encoding="utf-8") as file:
                return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
        except FileNotFoundError:
            return not os.path.isdir("/proc/self")

    def name(self, rank: int) -> str:
        """Rank and process, for messages."""
        return f"rank {rank} (process {self.others[rank].pid} on {self.others[rank].host})"

    def kill_silent(self) -> None:
        """Ends the silent ranks of this machine: a stopped process does not heed the launcher, which would wait."""
        for beat in self.others.values():
            here = beat.machine == this_machine() and beat.count >= 0
            if here and time.monotonic() - beat.changed > 2.5 * self.interval_s:
                try:
                    os.kill(beat.pid, 9)
                except ProcessLookupError:
                    pass

    def stop(self, failed: bool = False) -> None:
        """Tells the others that this rank has ended. failed: with an error that it has reported."""
        self._stopping.set()
        self._thread.join()
        try:
            self._beat(_FAILED if failed else _ENDED)
        except (RuntimeError, ValueError):  # the others have gone first
            pass

    def __enter__(self) -> Pulse:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.stop(failed=kind is not None)
