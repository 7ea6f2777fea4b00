"""Every kernel compiles ahead of time for A100, H100 and B200: no spills, matrix instructions, memory that fits.

The compilation runs in processes of its own without Triton's interpreter. The rules themselves are tested on made-up
findings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import aot
from benchmarks.aot import Compiled, findings, wanted_matrix
from benchmarks.ops import Expect
from hstu.errors import UserError
from kernels._backend import OPS

SAMPLE = 3
"""Cases per op that the suite compiles, one for each architecture: all of attention's alone take several minutes."""
EVERYTHING = os.environ.get("HSTU_AOT") == "all"
"""``HSTU_AOT=all`` compiles every case for every architecture, as ``hstu-bench aot`` does."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_compile_as_they_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of the processes that compile, which are started anew
    target = tmp_path / "aot.json"
    size = ["sample=0"] if EVERYTHING else [f"sample={SAMPLE}", "jobs=1"]  # other tests run beside this one
    status = aot.main([f"out={target}", *size])
    assert status == 0, "".join(capfd.readouterr())
    outcomes = json.loads(target.read_text())["outcomes"]
    assert {o["op"] for o in outcomes} == set(OPS)
    assert all({o["arch"] for o in outcomes if o["op"] == op} == set(aot.ARCHS) for op in OPS)
    assert all(o["kernels"] for o in outcomes)


def test_a_sample_is_spread_over_cases_and_architectures() -> None:
    names = list("abcdefghi")
    assert aot.deal(names, aot.ARCHS, 4) == [("a", 90), ("d", 80), ("f", 100), ("i", 90)]
    assert aot.deal(names[:2], aot.ARCHS, 4) == [("a", 90), ("b", 80)]
    assert aot.deal(names, (80, 90), 1) == [("a", 90)]
    assert len(aot.deal(names, aot.ARCHS, 0)) == 27
    assert aot.deal([], aot.ARCHS, 4) == []


# The rules


def compiled(arch: int = 90, **more: object) -> Compiled:
    values = {"kernel": "k", "arch": arch, "config": "", "registers": 100, "spill_bytes": 0, "shared_bytes": 1024,
              "matrix": "wgmma", "num_warps": 4, "wanted": "wgmma"}  # fmt: skip
    return Compiled(**{**values, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "expect", "problem"),
    [
        (compiled(), Expect(), None),
        (compiled(spill_bytes=8), Expect(), "k spills 8 bytes, allowed are 0"),
        (compiled(shared_bytes=227 * 1024 + 1), Expect(), "KiB shared memory, sm_90 has 227"),
        (compiled(arch=80, shared_bytes=164 * 1024, matrix="mma", wanted="mma"), Expect(), "sm_80 has 163"),
        (compiled(matrix="mma"), Expect(), "k uses mma where its products call for wgmma"),
        (compiled(matrix="none", wanted="none"), Expect(), None),
        (compiled(matrix="none", wanted="none"), Expect(matrix=["k"]), "k must use a matrix instruction"),
        (compiled(), Expect(matrix=["other"]), "other must use a matrix instruction and has not been compiled"),
        (compiled(arch=100, matrix="mma", wanted="tcgen05"), Expect(), None),
        (compiled(arch=100, matrix="none", wanted="tcgen05"), Expect(), "k uses none"),
    ],
    ids=["fine", "spills", "shared memory", "shared memory of sm_80", "no wgmma", "no product", "asked for", "missing",
         "mma on sm_100", "none on sm_100"],
)  # fmt: skip
def test_findings(kernel: Compiled, expect: Expect, problem: str | None) -> None:
    found = findings("case", kernel.arch, [kernel], expect)
    if problem is None:
        assert found == []
    else:
        (line,) = found
        assert problem in line


def test_a_case_without_kernels_is_a_finding() -> None:
    assert findings("case", 90, [], Expect()) == ["launches no kernel"]


def test_allowances_name_kernel_case_and_arch(monkeypatch: pytest.MonkeyPatch) -> None:
    allowance = aot.Allowance("k", 16, "measured to be faster", case="wide-*", archs=(90,))
    monkeypatch.setattr(aot, "ALLOWANCES", (allowance,))
    assert findings("wide-bf16", 90, [compiled(spill_bytes=16)], Expect()) == []
    assert findings("wide-bf16", 90, [compiled(spill_bytes=17)], Expect())
    assert findings("narrow", 90, [compiled(spill_bytes=16)], Expect())
    assert findings("wide-bf16", 80, [compiled(80, spill_bytes=16, matrix="mma", wanted="mma")], Expect())


DOT = "%9 = tt.dot %7, %8, %cst{} : tensor<{}x32x{}> * tensor<32x64x{}> -> tensor<{}x64xf32> loc(#loc1)\n"


@pytest.mark.parametrize(
    ("dots", "wanted"),
    [
        ([], "none"),
        ([(128, "bf16", "")], "wgmma"),
        ([(64, "f16", "")], "wgmma"),
        ([(32, "bf16", "")], "mma"),
        ([(32, "bf16", ""), (64, "bf16", "")], "wgmma"),
        ([(128, "f32", "")], "none"),
        ([(128, "f32", ", inputPrecision = tf32")], "wgmma"),
    ],
    ids=["no product", "bf16", "fp16", "small tile", "one of two", "float32", "tf32"],
)
def test_which_matrix_instruction_products_call_for(dots: list[tuple[int, str, str]], wanted: str) -> None:
    ttir = "".join(DOT.format(precision, rows, dtype, dtype, rows) for rows, dtype, precision in dots)
    assert wanted_matrix(ttir, 90) == wanted


def test_the_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET=1 is set"):
        aot.run_all(aot.AotConfig())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("op=atention", "expected all or one of attention"),
        ("archs=[70]", "archs=70"),
        ("cases=none-*", "no ahead-of-time"),
    ],
    ids=["op", "arch", "case"],
)
def test_wrong_options_are_one_line(
    option: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        aot.main([option])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
