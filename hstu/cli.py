"""What the commands share: composing their options with Hydra, and one clear line for a wrong one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hstu.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Options of ``conf/<name>.yaml`` with command-line ``overrides``, as nested plain values.

    Works from any folder and leaves no output folder behind. Raises UserError for an unknown or malformed
    option, and for a required one (``???``) that was not given.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for option in overrides:
        if "=" not in option:
            raise UserError(f"option {option!r}: expected name=value")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            options = OmegaConf.to_container(hydra_compose(name, overrides=list(overrides)), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        lines = [line.strip() for line in f"{error}\n{cause}".splitlines() if line.strip()]
        raise UserError(" ".join(dict.fromkeys(lines))) from None
    assert isinstance(options, dict)
    missing = [key for key, value in options.items() if value == "???"]
    if missing:
        raise UserError(f"option {missing[0]} is required: give {missing[0]}=VALUE")
    return {str(key): value for key, value in options.items()}


def command(name: str, usage: str | None, body: Callable[[dict[str, Any]], object]) -> int:
    """Runs ``body`` with the composed options of ``sys.argv``; returns the exit status.

    ``--help`` prints ``usage``. A UserError is printed as one line, without a traceback, and gives status 1.
    """
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print((usage or "").strip())
        return 0
    try:
        body(compose(name, arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
