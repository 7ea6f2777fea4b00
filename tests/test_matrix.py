"""The version matrix: what it answers, and that README and requirement files say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hstu import _matrix

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("version", "triton"),
    [("2.11.0", "3.6.0"), ("2.12.1+cu130", "3.7.0"), ("2.13.0+cpu", "3.7.1")],
    ids=["oldest", "local suffix", "pinned"],
)
def test_row_of_a_supported_torch(version: str, triton: str) -> None:
    row = _matrix.find_row(version)
    assert row is not None and row.triton == triton


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "3.11.0", "2.1.13"])
def test_no_row_for_another_torch(version: str) -> None:
    assert _matrix.find_row(version) is None
    (finding,) = _matrix.mismatches(version, None, None, None)
    assert version in finding and _matrix.PINNED_TORCH in finding


def test_every_row_fits_itself_and_absent_packages_fit_too() -> None:
    for row in _matrix.MATRIX:
        assert _matrix.mismatches(f"{row.torch}.0", row.fbgemm, row.torchrec, row.triton) == []
        assert _matrix.mismatches(f"{row.torch}.0", None, None, None) == []


def test_each_wrong_package_is_named_with_the_right_version() -> None:
    findings = _matrix.mismatches("2.13.0", "1.6.0", "1.7.0", "3.6.0")
    assert len(findings) == 3
    for finding, package, wanted in zip(
        findings, ("fbgemm-gpu", "torchrec", "triton"), ("1.8.0", "1.8.0", "3.7.1"), strict=True
    ):
        assert finding.startswith(package) and f"install {package} {wanted}" in finding


def test_ranges_cover_the_matrix_and_nothing_else() -> None:
    assert _matrix.supported_range("torch") == ">=2.11,<2.14"
    assert _matrix.supported_range("fbgemm") == ">=1.6,<1.9"
    assert _matrix.supported_range("torchrec") == ">=1.6,<1.9"
    assert _matrix.supported_range("triton") == ">=3.6,<3.8"


def test_readme_shows_the_matrix() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- matrix:begin -->\n(.*?)\n<!-- matrix:end -->", readme, re.DOTALL)
    assert found is not None and found.group(1) == _matrix.markdown_table()


def test_the_versions_stand_nowhere_else_in_the_code() -> None:
    others = [p for folder in ("hstu", "kernels") for p in (ROOT / folder).rglob("*.py") if p.name != "_matrix.py"]
    assert len(others) > 20
    pinned = {row.fbgemm for row in _matrix.MATRIX} | {row.triton for row in _matrix.MATRIX} | {_matrix.PINNED_TORCH}
    pattern = re.compile("|".join(rf"['\"]{re.escape(version)}['\"]" for version in sorted(pinned)))
    assert [p.name for p in others if pattern.search(p.read_text(encoding="utf-8"))] == []
