"""hstu-doctor: what is installed, which backend each op runs on and why, and whether every op computes what it should.

    hstu-doctor [--backend auto|triton|torch] [--device auto|cpu|cuda]

Exit status 1 when something is wrong, with one line of advice per finding. fbgemm, torchrec, triton and polars
are optional: where they are missing that is said, and is no finding.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu._matrix import MATRIX, MAX_PYTHON, MIN_PYTHON, PINNED_TORCH, find_row, mismatches

if TYPE_CHECKING:
    import torch

REQUIRED = {"numpy": "numpy", "hydra-core": "hydra", "omegaconf": "omegaconf", "PyYAML": "yaml", "rich": "rich"}
"""Distribution -> module. Without one of these the commands do not start."""
OPTIONAL = {
    "polars": ("polars", "hstu-prepare and the Parquet form of hstu-recommend need it: pip install polars"),
    "safetensors": ("safetensors", "it reads the weights that hstu-export writes: pip install safetensors"),
    "faiss-cpu": ("faiss", "hstu-export format=faiss needs it: pip install faiss-cpu"),
    "tensorboard": ("tensorboard", "the default logger; without it add run.loggers=[]"),
    "matplotlib": ("matplotlib", "curves.png of a run needs it: pip install matplotlib"),
    "scikit-learn": ("sklearn", "two baselines of ranking models need it: pip install scikit-learn"),
}
"""Distribution -> (module, what it is for)."""
DRIVER_LIBRARY = "libnvidia-ml.so"
"""Comes with NVIDIA's driver; fbgemm's CUDA build cannot be loaded without it."""
MIN_CAPABILITY = (8, 0)
"""Compute capability the Triton kernels are compiled and tested for (A100 and later)."""


@dataclass
class Report:
    """What the doctor says, in order, and what it found wrong."""

    lines: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    """One line each: what is wrong and what to do."""

    def section(self, title: str) -> None:
        self.lines.append(f"\n{title}" if self.lines else title)

    def add(self, name: str, text: str) -> None:
        self.lines.append(f"  {name:<22}{text}")

    def find(self, advice: str) -> None:
        self.findings.append(advice)

    def text(self) -> str:
        verdict = ["\nfindings"]
        verdict += [f"  {i}. {finding}" for i, finding in enumerate(self.findings, 1)] or ["  none"]
        return "\n".join([*self.lines, *verdict])


def installed_version(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def try_import(module: str) -> str | None:
    """Why ``module`` cannot be imported, in one line; None when it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a broken build raises OSError, RuntimeError, AttributeError, ...
        lines = [(str(e).strip().splitlines() or [""])[0] for e in (error, error.__cause__) if e is not None]
        return f"{type(error).__name__}: {'; '.join(dict.fromkeys(lines))}"
    return None


def nvidia_smi() -> str | None:
    """GPU names and driver as nvidia-smi gives them; None where it does not work."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip())
    return names if done.returncode == 0 and names else None


def check_python(report: Report) -> None:
    report.section("versions")
    report.add("Python", f"{platform.python_version()} ({sys.executable})")
    if not MIN_PYTHON <= sys.version_info[:2] <= MAX_PYTHON:
        least, most = (".".join(map(str, version)) for version in (MIN_PYTHON, MAX_PYTHON))
        report.find(
            f"Python {platform.python_version()}: expected {least} to {most}; "
            "make clean-venv, then PYTHON=... make install"
        )


def check_torch(report: Report) -> str | None:
    """Says torch's version; returns it, or None when torch cannot be used."""
    version = installed_version("torch")
    failure = try_import("torch")
    if failure is None:
        import torch

        report.add("torch", f"{torch.__version__}")
        return str(torch.__version__)
    report.add("torch", f"{version or 'not installed'}{'; cannot be imported' if version else ''}")
    if version is None:
        report.find(f"torch is not installed: make install, or pip install torch=={PINNED_TORCH}")
    else:
        report.find(f"torch {version} cannot be imported ({failure}): make clean-venv, then make install")
    return None


def check_companions(report: Report, torch_version: str | None) -> None:
    """triton, fbgemm, torchrec: optional, but what is there must belong to torch and load."""
    versions = {
        "triton": installed_version("triton"),
        "fbgemm": installed_version("fbgemm-gpu", "fbgemm-gpu-cpu"),
        "torchrec": installed_version("torchrec"),
    }
    absent = {
        "triton": "not installed: not needed on a CPU; on a GPU the ops run on plain torch",
        "fbgemm": "not installed: not needed by the local item table",
        "torchrec": "not installed: not needed by the local item table (torch and our own ops instead)",
    }
    if installed_version("fbgemm-gpu") and installed_version("fbgemm-gpu-cpu"):
        report.find("fbgemm-gpu and fbgemm-gpu-cpu overwrite each other's files: uninstall both, then install one")
    matrix = (
        mismatches(torch_version, versions["fbgemm"], versions["torchrec"], versions["triton"]) if torch_version else []
    )
    broken: list[str] = []
    for name, module in (("triton", "triton"), ("fbgemm", "fbgemm_gpu"), ("torchrec", "torchrec")):
        version = versions[name]
        # torchrec imports fbgemm: without fbgemm it cannot load, and nothing of ours needs it to.
        usable = (
            version is not None and torch_version is not None and not (name == "torchrec" and not versions["fbgemm"])
        )
        failure = try_import(module) if usable else None
        text = absent[name] if version is None else version + ("; cannot be imported" if failure else "")
        if name == "torchrec" and version is not None and versions["fbgemm"] is None:
            text = f"{version}; without fbgemm it cannot be used: not needed by the local item table"
        report.add(name, text)
        if failure and DRIVER_LIBRARY in failure:
            broken.append(
                f"{name} {version} is a build for CUDA and finds no NVIDIA driver ({failure}): install the driver, or "
                "for a machine without a GPU make clean-venv and make install BUILD=cpu"
            )
        elif failure:
            broken.append(
                f"{name} {version} cannot be imported ({failure}): uninstall it (the local path needs none), or "
                "make clean-venv and make install"
            )
    if torch_version:
        row = find_row(torch_version)
        wanted = f"torch {row.torch}: fbgemm {row.fbgemm}, torchrec {row.torchrec}, triton {row.triton}" if row else ""
        supported = f"supported: torch {', '.join(r.torch for r in MATRIX)}"
        report.add("matrix", f"{'does not fit' if matrix else 'fits'} ({wanted or supported})")
    report.findings += matrix + broken


def check_packages(report: Report) -> None:
    for name, module in REQUIRED.items():
        failure = try_import(module)
        report.add(name, installed_version(name) or "not installed")
        if failure:
            report.find(f"{name} cannot be imported ({failure}): make install, or pip install {name}")
    for name, (module, purpose) in OPTIONAL.items():
        version = installed_version(name)
        report.add(name, version or f"not installed: {purpose}")
        failure = try_import(module) if version else None
        if failure:
            report.find(f"{name} {version} cannot be imported ({failure}): pip install --force-reinstall {name}")


def check_device(report: Report, wanted: str) -> torch.device:
    """Says CUDA and GPU; returns the device that the ops are checked on."""
    import torch

    report.section("device")
    gpus, built_for = nvidia_smi(), torch.version.cuda
    usable = torch.cuda.is_available()
    report.add("CPU", f"{platform.machine()}, {len(_cores())} cores, {torch.get_num_threads()} torch threads")
    report.add("CUDA", f"torch built for CUDA {built_for}" if built_for else "torch is a CPU build")
    report.add("GPU", gpus or "none (nvidia-smi is absent or finds none)")
    if gpus and not built_for:
        report.find("this machine has a GPU but torch is a CPU build: make clean-venv, then make install BUILD=cuda")
    if gpus and built_for and not usable:
        report.find(
            f"torch (CUDA {built_for}) cannot use the GPU: update the NVIDIA driver, or take a torch for its CUDA"
        )
    if wanted == "cuda" and not usable:
        report.find("--device cuda: torch sees no CUDA device; use --device cpu")
    if not usable or wanted == "cpu":
        return torch.device("cpu")
    capability = torch.cuda.get_device_capability()
    report.add("compute capability", f"{capability[0]}.{capability[1]}")
    if capability < MIN_CAPABILITY:
        needed = ".".join(map(str, MIN_CAPABILITY))
        report.find(
            f"compute capability {capability[0]}.{capability[1]} is below {needed}, which the Triton kernels are made "
            "for: use kernels.backend=torch"
        )
    return torch.device("cuda")


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return list(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def check_files(report: Report) -> None:
    from hstu.cli import conf_dir

    report.section("files")
    try:
        report.add("config folder", str(conf_dir()))
    except ValueError as error:
        report.add("config folder", "missing")
        report.find(str(error))
    data = os.environ.get("HSTU_DATA_DIR")
    report.add("HSTU_DATA_DIR", data or "not set: raw data is downloaded, or given with data.raw=PATH")
    if data and not Path(data).is_dir():
        report.find(f"HSTU_DATA_DIR={data} is no folder: point it at a folder with ml-1m/ and the like, or unset it")


def check_ops(report: Report, backend: str, device: torch.device) -> None:
    """Which backend every op takes, then its numbers against the specification."""
    from hstu.parity import check_op
    from kernels._backend import OPS, choose, get_backend, set_backend

    before = get_backend()
    try:
        set_backend(backend)
        report.section(f"backend of each op on {device.type} (kernels.backend={backend})")
        ready = []
        for op in OPS:
            try:
                choice = choose(op, device)
            except ValueError as error:
                report.add(op, "cannot be met")
                report.find(str(error))
                continue
            report.add(op, f"{choice.backend:<8}{choice.reason}")
            ready.append(op)
        report.section("parity: error of outputs and gradients, as a share of what is allowed")
        for op in ready:
            for outcome in check_op(op, device):
                label = f" ({outcome.case})" if outcome.case else ""
                report.add(op, f"{'ok' if outcome.error is None else 'FAILS':<8}{outcome.share:.2f}{label}")
                if outcome.error is not None:
                    report.find(
                        f"op {op}{label} on {device.type} disagrees with kernels/{op}/reference.py ({outcome.error}): "
                        "reinstall the pinned versions (make clean-venv, make install), or try --backend torch"
                    )
    finally:
        set_backend(before)


def diagnose(backend: str = "auto", device: str = "auto") -> Report:
    """Runs every check.

    Args:
        backend: auto, triton or torch: what the ops are asked to run on.
        device: auto (CUDA where it can be used), cpu or cuda.
    """
    report = Report()
    check_python(report)
    torch_version = check_torch(report)
    check_companions(report, torch_version)
    check_packages(report)
    chosen: Any = None
    if torch_version is not None:
        chosen = check_device(report, device)
    check_files(report)
    if torch_version is not None:
        check_ops(report, backend, chosen)
    return report


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``hstu-doctor``; the exit status is 1 when there is a finding."""
    parser = argparse.ArgumentParser(
        prog="hstu-doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "torch"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)
    report = diagnose(options.backend, options.device)
    print(report.text())
    return 1 if report.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
