"""The version matrix: which fbgemm, torchrec and triton belong to which torch. The only place that says so.

``setup.py`` reads its ranges here, ``hstu-doctor`` its verdict, and a test checks that the README's table and
the pinned requirement files agree. Standard library only: setup.py runs this file before anything is installed.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One supported combination. ``torch`` is a minor series, the others are the releases made for it."""

    torch: str
    fbgemm: str
    torchrec: str
    triton: str


MATRIX = (
    Row("2.11", "1.6.0", "1.6.1", "3.6.0"),
    Row("2.12", "1.7.0", "1.7.0", "3.7.0"),
    Row("2.13", "1.8.0", "1.8.0", "3.7.1"),
)
"""Sources: triton from torch's own requirement (``triton==``); fbgemm and torchrec from their release series."""

PINNED_TORCH = "2.13.0"
"""What ``requirements/*.txt`` install and the tests run on."""
MIN_PYTHON = (3, 11)
MAX_PYTHON = (3, 12)
"""The newest minor version anything was tested with. ``requirements/install.sh`` has both once more."""


def series(version: str) -> str:
    """``"2.13.0+cpu"`` -> ``"2.13"``."""
    return ".".join(version.split("+")[0].split(".")[:2])


def find_row(torch_version: str) -> Row | None:
    """The matrix row for an installed torch, or None when that torch is not supported."""
    return next((row for row in MATRIX if row.torch == series(torch_version)), None)


def supported_range(field: str) -> str:
    """Requirement range of one column over the whole matrix, such as ``>=2.11,<2.14``."""
    versions = [series(getattr(row, field)) for row in MATRIX]
    major, minor = versions[-1].split(".")
    return f">={versions[0]},<{major}.{int(minor) + 1}"


def mismatches(torch_version: str, fbgemm: str | None, torchrec: str | None, triton: str | None) -> list[str]:
    """What does not belong together, one line each with its mend; a package that is absent (None) never mismatches."""
    row = find_row(torch_version)
    if row is None:
        known = ", ".join(r.torch for r in MATRIX)
        return [f"torch {torch_version} is outside the version matrix ({known}): install torch=={PINNED_TORCH}"]
    installed = {"fbgemm-gpu": fbgemm, "torchrec": torchrec, "triton": triton}
    wanted = {"fbgemm-gpu": row.fbgemm, "torchrec": row.torchrec, "triton": row.triton}
    found = []
    for package, version in installed.items():
        if version is not None and series(version) != series(wanted[package]):
            found.append(
                f"{package} {version} does not belong to torch {torch_version}: "
                f"install {package} {wanted[package]} with --no-deps, or uninstall it (the local path needs none)"
            )
    return found


def markdown_table() -> str:
    """The matrix as the README shows it."""
    lines = ["| torch | fbgemm-gpu or fbgemm-gpu-cpu | torchrec | triton |", "|---|---|---|---|"]
    lines += [f"| {row.torch} | {row.fbgemm} | {row.torchrec} | {row.triton} |" for row in MATRIX]
    return "\n".join(lines)
