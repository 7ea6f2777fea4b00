"""What the commands share: where the config folder lies, and one clear line instead of a traceback."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import os
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hstu.errors import UserError

BAD_PLACE = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG, errno.EDQUOT)
"""A folder that was asked for cannot be there: a file is in its way, a read-only disk, a quota."""


def conf_dir() -> Path:
    """The folder with the YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise UserError(f"no conf folder in {package} or {package.parent}: install the project again")


def register_schemas() -> None:
    """Makes the dataclasses known to Hydra, so that overrides are checked and every field can be overridden.

    A primary config starts its defaults with ``prepare_schema`` (``data`` alone) or ``schema`` (all sections but
    ``model``, whose dataclass depends on ``model.name``).
    """
    from hydra.core.config_store import ConfigStore

    from hstu import config
    from hstu.config_stream import StreamConfig

    sections = {
        "data": config.DataConfig,
        "loss": config.LossConfig,
        "optim": config.OptimConfig,
        "embedding": config.EmbeddingConfig,
        "run": config.RunConfig,
        "eval": config.EvalConfig,
        "kernels": config.KernelsConfig,
        "published": config.PublishedConfig,
    }
    store = ConfigStore.instance()
    store.store(name="prepare_schema", node={"data": config.DataConfig})
    store.store(name="schema", node={"experiment": "synthetic", "seed": 0, "seeds": None, "variants": {}, **sections})
    store.store(name="stream_schema", node={"stream": StreamConfig})
    store.store(name="mixture_schema", node=config.MixtureConfig)  # first in every conf/model/*.yaml
    # First in every conf/ranking/*.yaml. No member of the group, so that ``ranking=`` stays an option elsewhere.
    store.store(name="ranking_schema", node=config.RankingConfig)


def run_hydra(task: Callable[[Any], Any], config_name: str, folder: str = "") -> None:
    """Composes ``conf/<folder>/<config_name>.yaml`` with the command line and calls ``task`` with the result.

    An exception of the task comes out as it is, without Hydra's own report.
    """
    import hydra
    from hydra.errors import HydraException

    register_schemas()
    failures: list[Exception] = []

    @hydra.main(version_base=None, config_path=str(conf_dir() / folder), config_name=config_name)
    def job(cfg: Any) -> None:
        try:
            _check_model_options(cfg)
            task(cfg)
        except Exception as error:
            failures.append(error)

    try:
        job()
    except HydraException as error:
        own = conf_dir() / folder / f"{config_name}.yaml" if folder or "/" in config_name else None
        raise UserError(_hydra_line(error, own)) from None
    if failures:
        raise failures[0]


def _check_model_options(cfg: Any) -> None:
    """Raises UserError where an experiment sets options of another model than the one chosen on the command line."""
    from hydra.core.hydra_config import HydraConfig

    from hstu.config import MODELS

    model = cfg.get("model") or {}
    name = model.get("name")
    if name not in MODELS:
        return
    known = {other: {f.name for f in dataclasses.fields(cls)} for other, cls in MODELS.items()}
    foreign = sorted(str(key) for key in model if key not in known[name])
    owners = [other for other, names in known.items() if foreign and names.issuperset(foreign)]
    if not owners:
        return
    chosen = HydraConfig.get().runtime.choices
    fitting = _experiments(chosen.get("data"), name)
    take = f"take experiment={' or experiment='.join(fitting)}, or " if fitting else ""
    drop = [f"'~model.{key}'" for key in foreign] + (["variants=null"] if cfg.get("variants") else [])
    raise UserError(
        f"experiment={chosen.get('experiment')} sets {', '.join(f'model.{key}' for key in foreign)} of model="
        f"{' or '.join(owners)}, which model={name} does not have: {take}drop what is for the other model with "
        f"{' '.join(drop)}"
    )


def _experiments(data: str | None, model: str) -> list[str]:
    """Names of the experiment files on this data set with this model."""
    import yaml

    folder, found = conf_dir() / "experiment", []
    for path in folder.rglob("*.yaml"):
        defaults = yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", [])
        picked = {group: choice for entry in defaults if isinstance(entry, dict) for group, choice in entry.items()}
        if (picked.get("override /data"), picked.get("override /model")) == (data, model):
            found.append(path.relative_to(folder).with_suffix("").as_posix())
    return sorted(found)


def command(main: Callable[..., Any]) -> Callable[..., int]:
    """Decorates a command's ``main``: a foreseeable failure is one ``error: ...`` line and exit status 1.

    Covers UserError, errors of Hydra's composition, a full disk and denied access. Ctrl-C exits with 130. Any
    other exception keeps its traceback: it is a bug.
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        # Hydra then lets exceptions of the task pass, instead of printing its own trace.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        try:
            result = main(*args, **kwargs)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except BrokenPipeError:  # the reader of our output, such as head, is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            line = _one_line(error)
            if line is None:
                raise
            return _fail(line, 1)
        return result if isinstance(result, int) else 0

    return run


def _fail(line: str, status: int) -> int:
    if _speaks():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(status)


def _speaks() -> bool:
    """False on a rank of torchrun where another one has reported the failure."""
    if "WORLD_SIZE" not in os.environ:
        return True
    from hstu.launch import first_to_say

    return first_to_say()


def _one_line(error: BaseException) -> str | None:
    """The message for the person at the command line, or None for a bug."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or 'while writing'}): free some space or set another data.root"
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}: change its rights or choose another place"
    if isinstance(error, OSError) and error.filename and error.errno in BAD_PLACE:
        return f"{error.filename} cannot be written ({error.strerror}): choose another place"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra_line(error)
    return None


def _hydra_line(error: BaseException, own: Path | None = None) -> str:
    """own: the file with the options of a command that does not take those of ``hstu.config``."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException):
        return (
            f"option {error.override!r} cannot be read: expected name=value; quote a value with spaces or brackets, "
            """as in 'name="A value (1)"'"""
        )
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").partition("/")
        folder = conf_dir() / group
        choices = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{group}={name}: no such choice; {hint}{group} is one of {', '.join(choices)}"
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    parts = [str(cause).strip().splitlines()[0].strip() for cause in causes if str(cause).strip()]
    line = " ".join(dict.fromkeys(parts))
    if found := re.search(r"Ambiguous value for argument '([\w.]+)=(.*)'", line):
        name, value = found.groups()
        return f"{name}={value}: a list is written {name}=[{value}]; to run once with each value, add -m"
    if found := re.search(r"Missing mandatory value: ([\w.]+)", line):
        return f"{found.group(1)} is not set: give {found.group(1)}=VALUE (--help says what the command takes)"
    return _with_near_key(line, own)


def _with_near_key(line: str, own: Path | None) -> str:
    """Adds the nearest field to OmegaConf's ``Key 'x' not in 'SomeConfig'`` and ``Key 'x' is not in struct``."""
    from hstu import config

    if found := re.search(r"Could not override '([\w.]+)'.* Key '(\w+)' is not in struct", line):
        *parents, key = found.group(1).split(".")
        if key != found.group(2):  # inside the value
            parents, key = [*parents, key], found.group(2)
        group = ".".join(parents)
        if (entry := _entry_type(parents)) is not None:
            wanted = f"'+{group}={{{key}: {{}}}}' with the options that it needs"
            return f"{group} has no {key}: to add it, write " + (
                wanted if dataclasses.is_dataclass(entry) else f"+{group}.{key}=VALUE"
            )
        return _near(f"there is no option {'.'.join([*parents, key])}", key, _option_names(parents, own))
    found = re.search(r"Key '(\w+)' (?:is )?not in '(\w+)'", line)
    cls = getattr(config, found.group(2), None) if found else None
    if found is None or not dataclasses.is_dataclass(cls):
        return line
    return _near(line, found.group(1), {f.name for f in dataclasses.fields(cls)})


def _near(line: str, key: str, names: set[str]) -> str:
    near = difflib.get_close_matches(key, names - {key}, n=1)
    if near:
        return f"{line}; did you mean {near[0]}?"
    return f"{line}; it is one of {', '.join(sorted(names))}" if names else line


def _option_names(parents: list[str], own: Path | None) -> set[str]:
    """Names of the options in a group such as ``["model", "bias"]``, of every model; the top level for [].

    own: a command's own file; groups that it takes from elsewhere, as it does ``model``, are those of every command.
    """
    if own is not None:
        import yaml

        values = yaml.safe_load(own.read_text(encoding="utf-8"))
        for part in parents:
            values = values.get(part) if isinstance(values, dict) else None
        if isinstance(values, dict):
            return set(values) - {"defaults", "hydra"}
    return {f.name for cls in _classes(parents) for f in dataclasses.fields(cls)}


def _entry_type(parents: list[str]) -> Any:
    """What the entries of ``parents`` are, an option with entries of any name as ``["ranking", "tasks"]``, or None."""
    hints = [typing.get_type_hints(cls).get(name) for name in parents[-1:] for cls in _classes(parents[:-1])]
    return next((typing.get_args(hint)[1] for hint in hints if typing.get_origin(hint) is dict), None)


def _classes(parents: list[str]) -> list[type]:
    """The configs that a group may be."""
    from hstu.config import Config

    classes: list[type] = [Config]
    for part in parents:
        hints = [hint for cls in classes if (hint := typing.get_type_hints(cls).get(part)) is not None]
        members = [cls for hint in hints for cls in (typing.get_args(hint) or (hint,))]
        classes = [cls for cls in members if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
    return classes
