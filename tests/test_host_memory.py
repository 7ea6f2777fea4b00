"""Memory of the host, of a machine and of a control group that is limited."""

from __future__ import annotations

from pathlib import Path

import pytest

from hstu import host_memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group that has taken 1 MiB, a quarter of it for files, of a machine with 6 MiB free."""
    (tmp_path / "meminfo").write_text("MemTotal:  8192 kB\nMemAvailable:  6144 kB\n")
    (tmp_path / "memory.current").write_text(f"{2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\nfile {2**18}\n")
    monkeypatch.setattr(host_memory, "GROUP", tmp_path)
    monkeypatch.setattr(host_memory, "MACHINE", tmp_path / "meminfo")
    return tmp_path


@pytest.mark.parametrize("limit", [None, "max"], ids=["no group", "no limit"])
def test_a_machine(group: Path, limit: str | None) -> None:
    if limit is not None:
        (group / "memory.max").write_text(f"{limit}\n")
    assert host_memory.free_bytes() == 6 * 2**20


def test_a_group_with_a_limit(group: Path) -> None:
    (group / "memory.max").write_text(f"{3 * 2**20}\n")
    assert host_memory.host_bytes() == 3 * 2**20
    assert host_memory.free_bytes() == 3 * 2**20 - (2**20 - 2**18)


def test_no_linux(group: Path) -> None:
    (group / "meminfo").unlink()
    assert host_memory.free_bytes() == host_memory.host_bytes()
