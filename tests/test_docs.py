"""README and docs: they are what would be generated, their links lead somewhere, and their examples run."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hstu import config, config_docs
from tests.imports import run_module

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs").glob("*.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_config_reference_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_docs.main(["--check"]) == 0, capsys.readouterr().err


def test_config_reference_names_every_option_with_its_meaning() -> None:
    lines = (ROOT / "docs" / "config.md").read_text(encoding="utf-8").splitlines()
    rows = {found.group(1): line for line in lines if (found := re.match(r"\| `([a-z0-9_.]+)` \|", line))}

    def check(cls: type, prefix: str) -> None:
        for field in dataclasses.fields(cls):
            if field.name in nested.get(cls, {}):
                check(nested[cls][field.name], f"{prefix}{field.name}.")
            elif not (cls is config.Config and field.name in sections):
                assert f"{prefix}{field.name}" in rows, f"{prefix}{field.name}"
                assert not rows[f"{prefix}{field.name}"].endswith("|  |"), f"{prefix}{field.name} has no meaning"

    sections = {
        "data": config.DataConfig,
        "loss": config.LossConfig,
        "optim": config.OptimConfig,
        "run": config.RunConfig,
        "eval": config.EvalConfig,
        "kernels": config.KernelsConfig,
        "published": config.PublishedConfig,
        "model": config.HSTUConfig,
    }
    nested = {
        config.DataConfig: {"columns": config.ColumnsConfig},
        config.HSTUConfig: {"bias": config.BiasConfig, "mixture": config.MixtureConfig},
        config.SASRecConfig: {"mixture": config.MixtureConfig},
        config.TransformerConfig: {"mixture": config.MixtureConfig},
        config.FuXiLinearConfig: {"mixture": config.MixtureConfig},
        config.RunConfig: {"stochastic_length": config.StochasticLengthConfig},
    }
    check(config.Config, "")
    for name, cls in sections.items():
        check(cls, f"{name}.")
    for cls in config.MODELS.values():
        check(cls, "model.")


@pytest.mark.parametrize(
    ("source", "shown"),
    [("x: int = 0", "0"), ("x: int = 1", "1"), ("x: bool = True", "true"), ("x: str | None = None", "null"),
     ('x: str = ""', '""'), ("x: list[int] = field(default_factory=lambda: [1, 5])", "[1, 5]"),
     ("x: list[str] = field(default_factory=list)", "[]")],
    ids=["zero", "one", "true", "none", "empty text", "list", "empty list"],
)  # fmt: skip
def test_defaults_are_shown_as_they_are_typed(source: str, shown: str) -> None:
    classes = config_docs.read_classes(f'class C:\n    """Doc."""\n    {source}\n    """Meaning."""\n')
    docstring, (option,) = classes["C"]
    assert (docstring, option.default, option.meaning) == ("Doc.", shown, "Meaning.")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in DOCS)])
def test_links_lead_to_files(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert missing == []


def test_readme_names_only_make_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    documents = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:`|^|&& )make ([a-z-]+)", documents, re.MULTILINE))
    assert {"train", "test", "help", "install"} <= named <= targets


def test_readme_has_no_package_index() -> None:
    assert not re.search(r"https?://\S*(simple|whl|pypi)", README)


def run_python(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    (example,) = code_blocks("python", README)
    assert 15 <= len(example.splitlines()) <= 22
    output = run_python(example, tmp_path)
    assert "recommended" in output
    assert len(list(tmp_path.glob("runs/first-look/*/result.json"))) == 1


def write_log(folder: Path) -> None:
    start = datetime(2024, 3, 1, 9, tzinfo=UTC)
    with open(folder / "clicks.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["visitor", "article", "seen_at"])
        for user in range(40):
            for i in range(6 + user % 7):
                seen_at = start + timedelta(minutes=17 * i + user)
                writer.writerow([f"v{user}", f"a{(user + 3 * i) % 30}", seen_at.strftime("%Y-%m-%dT%H:%M:%S")])
    with open(folder / "articles.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["article", "title"], *([f"a{i}", f"Article {i}"] for i in range(30))])


@pytest.mark.slow
def test_the_walkthrough_with_an_own_log_runs(tmp_path: Path) -> None:
    pytest.importorskip("polars", reason="hstu-prepare needs polars")
    section = README.split("## Bring your own log")[1].split("\n## ")[0]
    (script,) = code_blocks("bash", section)
    assert script.count("hstu-train experiment=log/hstu") == 1
    script = script.replace("run.dir=runs/clicks", "run.dir=runs/clicks run.epochs=2 run.loggers=[]", 1)
    write_log(tmp_path)
    commands = ("prepare", "train", "evaluate", "recommend")
    environment = {name: value for name, value in os.environ.items() if name != "HSTU_DATA_DIR"}
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    said, ran = "", []
    for line in script.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            ran.append(words[0].removeprefix("hstu-"))
            done = run_module(f"hstu.{ran[-1]}", *words[1:], folder=tmp_path, environment=environment)
            said += done.stdout
            assert done.returncode == 0, said + done.stderr
    assert ran == [*commands, "recommend"]
    assert "user v17: recommended" in said and "Article " in said
    assert (tmp_path / "recommendations.parquet").stat().st_size > 0
    assert (tmp_path / "runs" / "clicks" / "result.json").exists()
