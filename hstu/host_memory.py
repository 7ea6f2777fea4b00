"""Memory of the host: all that there is, and what is free.

A process that is limited by a control group has that group's.
"""

from __future__ import annotations

import os
from pathlib import Path

GROUP, MACHINE = Path("/sys/fs/cgroup"), Path("/proc/meminfo")


def host_bytes() -> int:
    """All that there is."""
    total, limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _group_limit()
    return total if limit is None else min(total, limit)


def free_bytes() -> int:
    """What the process may still take; file pages, which the kernel gives up, are free. Off Linux all that there is."""
    if not MACHINE.is_file():
        return host_bytes()
    found = dict(line.split(":") for line in MACHINE.read_text(encoding="utf-8").splitlines())
    free, limit = int(found["MemAvailable"].split()[0]) * 1024, _group_limit()
    if limit is None:
        return free
    held = dict(line.split() for line in (GROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
    taken = int((GROUP / "memory.current").read_text(encoding="utf-8")) - int(held["file"])
    return min(free, limit - taken)


def _group_limit() -> int | None:
    """Bytes that the control group may take; None: it is not limited."""
    limit = GROUP / "memory.max"
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else ""
    return int(text) if text.isdigit() else None
