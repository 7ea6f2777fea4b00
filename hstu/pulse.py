"""Signs of life of the ranks, and where they are in the run, by which one that hangs, dies or goes astray is named.

Each rank writes its own into a store from a thread, and watches those of the others. A thread beats on while its main
thread computes, however long; it stops with its process (SIGSTOP, a lost machine).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

LONGEST_INTERVAL_S = 5.0
GRACE_S = 10.0
"""A rank that has heard of a failure elsewhere has so long to come to an end by itself."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Another one each time that Linux starts."""
TRAIL = 1024
"""Places that a rank remembers, to compare them with those at which it sees ranks that are behind."""
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


class Place(NamedTuple):
    """Where a rank is in the run. Ranks that wait for each other are at the same one."""

    step: int = 0
    phase: str = "start"
    number: int = 0
    """Of phases and exchanges that the rank has entered."""
    exchange: str = ""
    """The last one entered in the phase; empty: none yet."""
    patient: bool = False
    """It waits for as long as every rank lives, others until the time-out of the backend."""

    def __str__(self) -> str:
        exchange = f", exchange {self.number} ({self.exchange})" if self.exchange else ""
        return f"step {self.step}, {self.phase}{exchange}"


@dataclass
class Beat:
    """What is known of a rank. machine: as from :func:`this_machine`."""

    host: str
    pid: int
    machine: str
    count: int = 0
    """Rises while the process lives; negative: it has ended, or failed and said so."""
    place: Place = Place()
    loads: int = 0
    """Exchanges that its thread which makes batches has begun."""
    changed: float = 0.0
    """Our own clock, s, when ``count`` last rose."""
    moved: float = 0.0
    """The same, when ``place`` was last seen to be another one."""


def _move(beat: Beat, place: Place, now: float) -> None:
    if place != beat.place:
        beat.place, beat.moved = place, now


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
        self.place = Place()
        self._trail = [self.place] * TRAIL
        """The last places, each at its number modulo the length."""
        self.own = Beat(socket.gethostname(), os.getpid(), this_machine(), moved=time.monotonic())
        self.others: dict[int, Beat] = {}
        self._peers = [r for r in range(size) if r != rank]
        self._count = 0
        self._stopping = threading.Event()
        self._beat(0)
        self._look()  # returns when every rank has given its first
        self._thread = threading.Thread(target=self._run, daemon=True, name="pulse")
        self._thread.start()

    def at(self, step: int, phase: str, patient: bool = False) -> None:
        """This rank comes to a part of the run: training, validation, ..."""
        self._move_to(Place(step, phase, self.place.number + 1, patient=patient))

    def enter(self, exchange: str, patient: bool = False) -> None:
        """This rank begins an exchange with all others; they count the same ones."""
        step, phase, number, _, _ = self.place
        self._move_to(Place(step, phase, number + 1, exchange, patient))

    def load(self) -> None:
        """The thread that makes batches begins an exchange with those of all others."""
        self.own.loads += 1

    def _move_to(self, place: Place) -> None:
        self.place = self._trail[place.number % TRAIL] = place

    def _beat(self, count: int) -> None:
        own = self.own
        self.store.set(f"beat/{self.rank}", json.dumps([own.host, own.pid, own.machine, count, own.loads, *self.place]))

    def _look(self) -> None:
        now = time.monotonic()
        _move(self.own, self.place, now)
        for rank, value in zip(self._peers, self.store.multi_get([f"beat/{r}" for r in self._peers]), strict=True):
            host, pid, machine, count, loads, *place = json.loads(value)
            beat = self.others.setdefault(rank, Beat(host, pid, machine, changed=now, moved=now))
            if count != beat.count:
                beat.changed = now
            beat.count, beat.loads = count, loads
            _move(beat, Place(*place), now)

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
            lost = self.silent() or self.stuck()
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

    def stuck(self) -> str | None:
        """Which ranks wait for each other in vain, where some have for longer than the backend lets them.

        A rank that is behind may compute for long while the others wait for it with patience. So either who is furthest
        does not, or a rank is seen where this one has not been when it had come as far.
        """
        beats = [self.own, *(beat for beat in self.others.values() if beat.count >= 0)]
        last, now = max(beat.place.number for beat in beats), time.monotonic()
        astray = any(self._is_astray(beat.place) for beat in beats)
        waited = [now - b.moved for b in beats if not b.place.patient and (astray or b.place.number == last)]
        apart = self._apart() if max(waited, default=0.0) > self.timeout_s else None
        return apart and f"{apart} (for {max(waited):.0f} s; run.timeout_s={self.timeout_s:g})"

    def _is_astray(self, place: Place) -> bool:
        """Whether this rank has been elsewhere at the number of ``place``; False where it does not know."""
        own = self._trail[place.number % TRAIL]
        return own.number == place.number and own != place

    def _apart(self) -> str | None:
        """Ranks that are elsewhere than most, or behind where there is no most."""
        places = {rank: beat.place for rank, beat in sorted([(self.rank, self.own), *self.others.items()])}
        counts = Counter(places.values())
        usual = max(counts, key=lambda place: (counts[place], place.number))
        apart = [f"{self.name(rank)} at {place}" for rank, place in places.items() if place != usual]
        return f"{' and '.join(apart)} did not come to what the others wait for, {usual}" if apart else None

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
        self._look_anew()
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"{self._apart() or self._loading() or 'the ranks lost contact with each other'} ({reason})"

    def _loading(self) -> str | None:
        """Ranks that still make a batch for which the others wait."""
        beats = {rank: beat for rank, beat in sorted([(self.rank, self.own), *self.others.items()])}
        last = max(beat.loads for beat in beats.values())
        behind = [self.name(rank) for rank, beat in beats.items() if beat.loads < last]
        return f"{' and '.join(behind)} did not read in time the users that the others waited for" if behind else None

    def _look_anew(self) -> None:
        """Returns when every rank has beaten once more, as a place is as old as its beat, or does not any more."""
        before = {rank: beat.count for rank, beat in self.others.items()}
        end = time.monotonic() + 2 * self.interval_s
        while any(beat.count == before[rank] for rank, beat in self.others.items()) and time.monotonic() < end:
            time.sleep(self.interval_s / 20)
            try:
                self._look()
            except (RuntimeError, ValueError):  # the store has gone
                return

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
        beat = self.own if rank == self.rank else self.others[rank]
        return f"rank {rank} (process {beat.pid} on {beat.host})"

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
