"""hstu-doctor: healthy on this machine, silent about what is optional, loud about what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hstu import doctor, parity
from kernels._backend import OPS

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

WITHOUT_OPTIONAL = """
import importlib.abc, importlib.metadata, sys
MODULES = {"triton", "fbgemm_gpu", "torchrec", "polars"}
DISTRIBUTIONS = {"triton", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "polars"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
real = importlib.metadata.version
def version(name):
    if name in DISTRIBUTIONS:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
from hstu.doctor import main
raise SystemExit(main(["--device", "cpu"]))
"""


@pytest.fixture
def no_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the parity check, for the tests that are about something else."""
    monkeypatch.setattr(doctor, "check_ops", lambda report, backend, device: None)


def test_every_op_has_a_parity_check() -> None:
    assert set(parity.CASES) == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_ops_agree_with_their_specification(op: str) -> None:
    outcomes = parity.check_op(op, CPU)
    assert outcomes and all(o.error is None for o in outcomes), outcomes


PUBLIC = {
    "attention": ["attention"],
    "norm_linear_silu": ["norm_linear_silu"],
    "gate_norm_linear": ["gate_norm_linear"],
    "sampled_softmax": ["sampled_softmax", "bank_softmax"],
    "linear_cross_entropy": ["linear_cross_entropy"],
    "rank_and_topk": ["rank", "topk"],
    "jagged": ["interleave", "concat_jagged", "split_jagged", "jagged_to_dense", "dense_to_jagged", "add_positions"],
}


@pytest.mark.parametrize("op", OPS)
def test_a_zeroed_output_fails(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__(f"kernels.{op}", fromlist=["x"])
    for name in PUBLIC[op]:
        real = getattr(module, name)

        def zeroed(*args: object, real: object = real, **kwargs: object) -> object:
            out = real(*args, **kwargs)  # type: ignore[operator]
            return tuple(t * 0 for t in out) if isinstance(out, tuple) else out * 0

        monkeypatch.setattr(module, name, zeroed)
    outcomes = parity.check_op(op, CPU)
    assert outcomes and all(o.error is not None for o in outcomes), outcomes


def test_a_gradient_off_by_one_percent_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels.norm_linear_silu as module

    real = module.norm_linear_silu
    # Same output, 0.99 of the gradient.
    monkeypatch.setattr(module, "norm_linear_silu", lambda x, w: (y := real(x, w)) * 0.99 + y.detach() * 0.01)
    (outcome,) = parity.check_op("norm_linear_silu", CPU)
    assert outcome.error is not None and "gradient of input" in outcome.error


def test_an_op_that_raises_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels.norm_linear_silu as module

    def broken(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(module, "norm_linear_silu", broken)
    (outcome,) = parity.check_op("norm_linear_silu", CPU)
    assert outcome.error == "RuntimeError: no kernel image is available"


def test_comparison_allows_rounding_and_nothing_more() -> None:
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert parity.compare(truth + 10 * eps, truth, truth) < 1.0
    assert parity.compare(truth + 100 * eps, truth, truth) > 1.0
    assert parity.compare(truth * float("nan"), truth, truth) == float("inf")
    assert parity.compare(truth[:1], truth, truth) == float("inf")
    assert parity.compare(torch.zeros(2), torch.zeros(2), torch.zeros(2)) == 0.0


def test_healthy_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HSTU_DATA_DIR", raising=False)
    status = doctor.main(["--device", "cpu"])
    text = capsys.readouterr().out
    assert status == 0, text
    assert text.rstrip().endswith("findings\n  none")
    for word in ("Python", "torch", "triton", "fbgemm", "torchrec", "matrix", "CUDA", "GPU", "polars"):
        assert f"\n  {word} " in text, word
    for op in OPS:
        lines = [line for line in text.splitlines() if line.startswith(f"  {op} ")]
        assert len(lines) >= 2 and " torch " in lines[0] and " ok " in lines[1], lines


@pytest.mark.slow
def test_without_optional_packages_there_is_no_finding() -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_OPTIONAL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("triton", "fbgemm", "torchrec", "polars"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"  {name} "))
        assert "not installed" in line
    assert done.stdout.count(" ok ") >= len(OPS)


def test_versions_that_do_not_fit(no_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda *names: "1.2.0" if "torchrec" in names else real(*names))
    report = doctor.diagnose(device="cpu")
    assert any(finding.startswith("torchrec 1.2.0 does not belong to torch") for finding in report.findings)
    assert "does not fit" in report.text()


def test_both_builds_of_fbgemm(no_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda *names: "1.8.0" if "fbgemm" in names[0] else real(*names))
    report = doctor.diagnose(device="cpu")
    assert any("overwrite each other" in finding for finding in report.findings)


def test_a_package_that_cannot_be_imported(no_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.try_import
    monkeypatch.setattr(doctor, "installed_version", lambda *names: "1.8.0" if "fbgemm-gpu-cpu" in names else None)
    monkeypatch.setattr(doctor, "try_import", lambda m: "OSError: undefined symbol" if m == "fbgemm_gpu" else real(m))
    findings = doctor.diagnose(device="cpu").findings
    assert any("fbgemm 1.8.0 cannot be imported (OSError: undefined symbol)" in finding for finding in findings)


def test_a_cuda_build_without_a_driver(no_ops: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_driver.py").write_text(
        "try:\n    raise OSError('libnvidia-ml.so.1: cannot open shared object file')\n"
        "except OSError as error:\n    raise OSError('Could not load this library: x.so') from error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    failure = doctor.try_import("needs_driver")
    assert failure is not None and failure.startswith("OSError: Could not load this library: x.so; libnvidia-ml.so.1:")
    monkeypatch.setattr(doctor, "installed_version", lambda *names: "1.8.0" if "fbgemm-gpu-cpu" in names else None)
    real = doctor.try_import
    monkeypatch.setattr(doctor, "try_import", lambda m: failure if m == "fbgemm_gpu" else real(m))
    findings = doctor.diagnose(device="cpu").findings
    assert any("finds no NVIDIA driver" in f and "make install BUILD=cpu" in f for f in findings)


def test_torch_missing_is_one_finding_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.try_import
    monkeypatch.setattr(doctor, "installed_version", lambda *names: None)
    monkeypatch.setattr(doctor, "try_import", lambda m: "ModuleNotFoundError: torch" if m == "torch" else real(m))
    report = doctor.diagnose()
    assert len(report.findings) == 1 and report.findings[0].startswith("torch is not installed: make install")


def test_gpu_machine_with_a_cpu_build(no_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: "NVIDIA H100, 580.00")
    monkeypatch.setattr(torch.version, "cuda", None)
    report = doctor.diagnose(device="cpu")
    assert any("torch is a CPU build" in f and "BUILD=cuda" in f for f in report.findings)


def test_gpu_that_torch_cannot_use(no_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: "NVIDIA H100, 470.00")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = doctor.diagnose()
    assert any("update the NVIDIA driver" in f for f in report.findings)


def test_data_folder_that_is_not_there(
    no_ops: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HSTU_DATA_DIR", str(tmp_path / "nowhere"))
    assert doctor.main(["--device", "cpu"]) == 1
    assert f"1. HSTU_DATA_DIR={tmp_path / 'nowhere'} is no folder" in capsys.readouterr().out


def test_explicit_backend_that_cannot_be_met_is_a_finding_per_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = doctor.Report()
    doctor.check_ops(report, "triton", CPU)
    assert len(report.findings) == len(OPS)
    assert all(op in finding for op, finding in zip(OPS, report.findings, strict=True))


def test_the_backend_is_put_back() -> None:
    from kernels._backend import get_backend, set_backend

    set_backend("torch")
    doctor.check_ops(doctor.Report(), "auto", CPU)
    assert get_backend() == "torch"


def test_installed_version_takes_the_first_that_is_there() -> None:
    assert doctor.installed_version("no-such-distribution") is None
    assert doctor.installed_version("no-such-distribution", "torch") == doctor.installed_version("torch") is not None
