"""Requirement files, setup.py, Makefile: cheap checks that they agree and that a wheel holds what it must."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hstu import _matrix

ROOT = Path(__file__).resolve().parents[1]
ONLY_CPU, ONLY_CUDA = "fbgemm-gpu-cpu", "fbgemm-gpu"


def pins(name: str) -> dict[str, Requirement]:
    """Requirements of ``requirements/<name>.txt`` by canonical name."""
    found: dict[str, Requirement] = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if text:
            requirement = Requirement(text)
            key = canonicalize_name(requirement.name)
            assert key not in found, f"{name}.txt: {key} twice"
            found[key] = requirement
    return found


def version_of(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return specifier.version


def is_cuda_library(name: str) -> bool:
    return name.startswith(("nvidia-", "cuda-"))


@pytest.fixture
def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py passes to setuptools.setup."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return seen


# Requirement files


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_every_line_is_one_exact_pin_without_index_or_local_suffix(name: str) -> None:
    for requirement in pins(name).values():
        version = version_of(requirement)
        assert "*" not in version and "+" not in version, requirement
        assert requirement.url is None
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    assert "index-url" not in text and "find-links" not in text and "://" not in text


def test_cpu_and_cuda_differ_only_in_fbgemm_and_the_cuda_libraries() -> None:
    cpu = {name: version_of(r) for name, r in pins("cpu").items()}
    cuda = {name: version_of(r) for name, r in pins("cuda").items()}
    assert ONLY_CPU in cpu and ONLY_CUDA not in cpu
    assert ONLY_CUDA in cuda and ONLY_CPU not in cuda
    assert cpu.pop(ONLY_CPU) == cuda.pop(ONLY_CUDA)
    libraries = {name for name in cuda if is_cuda_library(name)}
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= libraries
    assert {name: v for name, v in cuda.items() if name not in libraries} == cpu


def test_pins_are_a_row_of_the_matrix() -> None:
    cuda = {name: version_of(r) for name, r in pins("cuda").items()}
    row = _matrix.find_row(cuda["torch"])
    assert row is not None and cuda["torch"] == _matrix.PINNED_TORCH
    assert (cuda["fbgemm-gpu"], cuda["torchrec"], cuda["triton"]) == (row.fbgemm, row.torchrec, row.triton)


def test_the_list_is_complete() -> None:
    """As ``pip check`` reasons: what a pinned and installed package asks for is pinned, at a version it allows."""
    cpu, everything = pins("cpu"), {**pins("cuda"), **pins("cpu")}
    checked, wrong = 0, []
    for name, requirement in cpu.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version.split("+")[0] != version_of(requirement):
            continue
        checked += 1
        for need in map(Requirement, installed.requires or []):
            key = canonicalize_name(need.name)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            if (name, key) == ("torchrec", ONLY_CUDA):
                continue  # fbgemm-gpu-cpu takes its place: why the files are installed with --no-deps
            if key not in everything or not need.specifier.contains(version_of(everything[key])):
                wrong.append(f"{name} asks for {need}")
    if checked < 30:
        pytest.skip(f"only {checked} packages are installed at their pins")
    assert wrong == []


# setup.py


def test_pins_lie_in_the_ranges_of_setup(setup_arguments: dict[str, Any]) -> None:
    needs = list(setup_arguments["install_requires"])
    for extra in setup_arguments["extras_require"].values():
        needs += extra
    pinned = {**pins("cpu"), **pins("cuda")}
    optional = {"wandb", "mlflow", "faiss-cpu"}
    for need in map(Requirement, needs):
        name = canonicalize_name(need.name)
        if name in optional:
            continue
        assert name in pinned, f"setup.py asks for {name}, requirements/*.txt do not pin it"
        assert need.specifier.contains(version_of(pinned[name])), f"{need} against {pinned[name]}"
    assert setup_arguments["python_requires"] == ">=3.11,<3.13"


def test_the_training_path_asks_for_no_optional_package(setup_arguments: dict[str, Any]) -> None:
    names = {canonicalize_name(Requirement(need).name) for need in setup_arguments["install_requires"]}
    assert names.isdisjoint({"polars", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton"})


def test_console_scripts_name_functions_that_exist(setup_arguments: dict[str, Any]) -> None:
    scripts = setup_arguments["entry_points"]["console_scripts"]
    assert len(scripts) == len({s.split("=")[0].strip() for s in scripts}) >= 9
    for script in scripts:
        module, function = script.split("=")[1].strip().split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, script


def test_every_folder_with_code_is_a_package(setup_arguments: dict[str, Any]) -> None:
    folders = {p.parent for top in ("hstu", "kernels", "benchmarks") for p in (ROOT / top).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names | {"hstu.conf"} == set(setup_arguments["packages"])


@pytest.mark.slow
def test_wheel_holds_the_config_and_works_from_another_folder(tmp_path: Path) -> None:
    source, out, site = tmp_path / "source", tmp_path / "out", tmp_path / "site"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("hstu", "kernels", "benchmarks", "conf"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = set(archive.namelist())
        archive.extractall(site)
    configs = {f"hstu/conf/{p.relative_to(ROOT / 'conf').as_posix()}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert len(configs) > 20 and configs <= members
    assert not any(name.startswith(("tests/", "benchmarks/results/")) for name in members)
    assert {"benchmarks/bench.py", "benchmarks/ops/attention.py"} <= members
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-W", "ignore", "-m", "hstu.train", "--cfg", "job", "experiment=ml-1m/hstu"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "experiment: ml-1m/hstu" in done.stdout and "movielens-dat" in done.stdout
    assert list(elsewhere.iterdir()) == []


# Makefile and install.sh

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def fake_command(folder: Path, name: str, status: int) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\nexit {status}\n")
    file.chmod(0o755)


def make(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "BUILD", "VENV")
    }
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@needs_make
def test_make_help_lists_every_target() -> None:
    done = make("help")
    assert done.returncode == 0
    for target in ("train", "test", "lint", "typecheck", "doctor", "clean", "help"):
        assert f"make {target} " in done.stdout


@needs_make
@pytest.mark.parametrize(
    ("status", "arguments", "build"),
    [(0, [], "cuda"), (1, [], "cpu"), (0, ["BUILD=cpu"], "cpu"), (1, ["BUILD=cuda"], "cuda")],
    ids=["gpu", "no gpu", "gpu, cpu wanted", "no gpu, cuda wanted"],
)
def test_build_follows_nvidia_smi_and_can_be_overridden(
    tmp_path: Path, status: int, arguments: list[str], build: str
) -> None:
    fake_command(tmp_path / "bin", "nvidia-smi", status)
    done = make("-n", "install", f"VENV={tmp_path}/venv", *arguments, path=tmp_path / "bin")
    assert done.returncode == 0
    assert f'install.sh "{build}"' in done.stdout


@needs_make
def test_a_second_call_does_not_install_again(tmp_path: Path) -> None:
    first = make("-n", "train", f"VENV={tmp_path}", "BUILD=cpu")
    assert "install.sh" in first.stdout and f"{tmp_path}/bin/hstu-train" in first.stdout
    (tmp_path / ".installed-cpu").touch()
    second = make("-n", "train", f"VENV={tmp_path}", "EXPERIMENT=ml-1m/hstu", "ARGS=optim.lr=3e-4 seed=1")
    assert second.returncode == 0 and "install.sh" not in second.stdout
    assert second.stdout.split() == [f"{tmp_path}/bin/hstu-train", "experiment=ml-1m/hstu", "optim.lr=3e-4", "seed=1"]


def install(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    command = ["bash", str(ROOT / "requirements" / "install.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_install_says_that_there_is_no_python(tmp_path: Path) -> None:
    for name in ("python", "python3", "python3.11", "python3.12"):
        fake_command(tmp_path / "bin", name, 1)
    fake_python(tmp_path / "bin" / "python3.13", (3, 13))
    done = install("cpu", str(tmp_path / "venv"), path=tmp_path / "bin")
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    assert done.stderr.splitlines() == [
        line for line in done.stderr.splitlines() if line.startswith("error: no Python")
    ]
    assert len(done.stderr.splitlines()) == 1 and "PYTHON=" in done.stderr


def fake_python(file: Path, version: tuple[int, int]) -> None:
    """A command that runs ``-c CODE`` as that version would, and fails at everything else."""
    code = f"import sys; sys.version_info = (*{version}, 0, 'final', 0); exec(sys.argv[1])"
    file.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 1\nexec \'{sys.executable}\' -c "{code}" "$2"\n')
    file.chmod(0o755)


@pytest.mark.parametrize("minor", [10, 11, 12, 13, 14])
def test_install_takes_the_pythons_of_the_matrix(tmp_path: Path, minor: int) -> None:
    python = tmp_path / "some-python"
    fake_python(python, (3, minor))
    done = install("cpu", str(tmp_path / "venv"), str(python))
    supported = _matrix.MIN_PYTHON <= (3, minor) <= _matrix.MAX_PYTHON
    refused = f"error: PYTHON={python} does not run or is not Python 3.11 or 3.12: give one of these"
    taken = f"error: '{python} -m venv' failed"  # the next step, which the fake one cannot do
    assert done.returncode == 1 and done.stderr.startswith(taken if supported else refused)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("build", "python", "stamp", "message"),
    [
        ("rocm", "", None, "error: BUILD=rocm: expected cpu or cuda"),
        ("cpu", "/no/such/python", None, "error: PYTHON=/no/such/python does not run or is not Python 3.11 or 3.12"),
        ("cuda", "", ".installed-cpu", "holds the cpu build and BUILD=cuda was asked for: run 'make clean-venv' first"),
    ],
    ids=["unknown build", "bad python", "other build installed"],
)
def test_install_refuses_with_one_line(
    tmp_path: Path, build: str, python: str, stamp: str | None, message: str
) -> None:
    venv = tmp_path / "venv"
    if stamp is not None:
        venv.mkdir()
        (venv / stamp).touch()
    done = install(build, str(venv), python)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_ci_runs_lint_types_and_tests_and_stops_at_the_first_failure() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text and "make lint typecheck test" in text
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
