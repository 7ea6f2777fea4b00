"""Writes docs/config.md from the dataclasses of ``hstu/config*.py`` and the choices under ``conf/``.

python -m hstu.config_docs            write docs/config.md
python -m hstu.config_docs --check    exit status 1 when it is not what would be written (a test does this)
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "config.md"
SECTIONS = {
    "Config": ("", "Top level"),
    "DataConfig": ("data.", "data"),
    "ColumnsConfig": ("data.columns.", "data.columns"),
    "HSTUConfig": ("model.", "model: hstu"),
    "BiasConfig": ("model.bias.", "model.bias (hstu)"),
    "SASRecConfig": ("model.", "model: sasrec"),
    "TransformerConfig": ("model.", "model: transformer"),
    "FuXiLinearConfig": ("model.", "model: fuxi_linear"),
    "MixtureConfig": ("model.mixture.", "model.mixture (every model)"),
    "LossConfig": ("loss.", "loss"),
    "OptimConfig": ("optim.", "optim"),
    "EmbeddingConfig": ("embedding.", "embedding"),
    "RunConfig": ("run.", "run"),
    "StochasticLengthConfig": ("run.stochastic_length.", "run.stochastic_length"),
    "EvalConfig": ("eval.", "eval"),
    "KernelsConfig": ("kernels.", "kernels"),
    "PublishedConfig": ("published.", "published"),
    "RankingConfig": ("ranking.", "ranking"),
    "TaskConfig": ("ranking.tasks.NAME.", "ranking.tasks"),
    "ActionConfig": ("ranking.actions.COLUMN.", "ranking.actions"),
    "FeatureConfig": ("ranking.user_features.NAME.", "ranking.user_features, item_features, event_features"),
    "StreamConfig": ("stream.", "stream (hstu-stream)"),
    "HeadConfig": ("ranking.head.", "ranking.head"),
}
"""Dataclass -> (prefix of its options on the command line, heading)."""
GROUPS = ("data", "model", "ranking", "loss", "optim", "embedding", "run", "experiment")
"""Folders of conf/ whose members are chosen by name."""
INTRODUCTION = """# Configuration

<!-- Written by `make docs` (python -m hstu.config_docs) from hstu/config.py and conf/: change those, not this file. -->

`hstu/config.py` defines every option, its type, default and range; the YAML files under `conf/` only pick values.
An option is set on the command line as `name=value`, such as `optim.lr=3e-4` or `model.bias.time=false`; an unknown
name, a wrong type and a value out of range each stop the command with one line. `hstu-train --cfg job` prints the
composed config, and every run folder holds the resolved one in `config.yaml`.

A group is chosen by the name of a file, such as `model=sasrec` or `experiment=ml-1m/hstu`; an experiment picks the
groups and values of one published number, and further options on the command line win over it.
"""


@dataclass(frozen=True)
class Option:
    """One field of a config dataclass."""

    name: str
    type: str
    default: str
    meaning: str


def read_classes(source: str) -> dict[str, tuple[str, list[Option]]]:
    """Docstring and options of every dataclass in a source file, in the order of the file."""
    found: dict[str, tuple[str, list[Option]]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = (ast.get_docstring(node) or "", list(_options(node)))
    return found


def _options(node: ast.ClassDef) -> Iterator[Option]:
    for index, statement in enumerate(node.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        follower = node.body[index + 1] if index + 1 < len(node.body) else None
        meaning = ""
        if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
            meaning = str(follower.value.value)
        yield Option(statement.target.id, ast.unparse(statement.annotation), _default(statement.value), meaning)


def _default(value: ast.expr | None) -> str:
    """A field's default as it is written on the command line; empty for a nested section."""
    if value is None:
        return "required"
    if isinstance(value, ast.Call):  # field(default_factory=...)
        factory = next((k.value for k in value.keywords if k.arg == "default_factory"), None)
        if isinstance(factory, ast.Lambda):
            return ast.unparse(factory.body).replace("'", "")
        name = factory.id if isinstance(factory, ast.Name) else ""
        return {"list": "[]", "dict": "{}"}.get(name, "")
    if isinstance(value, ast.Constant):
        if value.value is None or isinstance(value.value, bool):
            return {None: "null", True: "true", False: "false"}[value.value]
        return str(value.value) or '""'
    return ast.unparse(value)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def _table(prefix: str, options: list[Option], sections: set[str]) -> list[str]:
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for option in options:
        if option.type.removesuffix(" | None") in {*sections, "ModelConfig"}:
            continue  # a section of its own
        kind = option.type.replace(" | None", " or null").replace("|", "\\|")
        lines.append(f"| `{prefix}{option.name}` | {kind} | `{option.default}` | {_one_line(option.meaning)} |")
    return lines


def choices(conf: Path) -> list[str]:
    """One line per group of ``conf/``: its members."""
    lines = ["| group | choices |", "|---|---|"]
    for group in GROUPS:
        names = sorted(p.relative_to(conf / group).with_suffix("").as_posix() for p in (conf / group).rglob("*.yaml"))
        lines.append(f"| `{group}` | {', '.join(f'`{name}`' for name in names)} |")
    return lines


def render(root: Path = ROOT) -> str:
    """The whole text of docs/config.md."""
    sources = [
        (root / "hstu" / name).read_text(encoding="utf-8")
        for name in (
            "config.py",
            "config_model.py",
            "config_similarity.py",
            "config_embedding.py",
            "config_ranking.py",
            "config_stream.py",
        )  # fmt: skip
    ]
    classes = {name: found for source in sources for name, found in read_classes(source).items()}
    missing = [name for name in classes if name not in SECTIONS]
    if missing:
        raise ValueError(f"hstu/config_docs.py: SECTIONS lacks {', '.join(missing)}")
    parts = [INTRODUCTION, "## Choices\n", "\n".join(choices(root / "conf")), ""]
    for name, (prefix, heading) in SECTIONS.items():
        docstring, options = classes[name]
        parts += [f"## {heading}\n", *([f"{_one_line(docstring)}\n"] if docstring else [])]
        parts += ["\n".join(_table(prefix, options, set(classes))), ""]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args(arguments).check
    text = render()
    if not check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        print(f"error: {TARGET.relative_to(ROOT)} is not up to date: run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
