"""Checkpoints of the first format: one file, ``step-<step>.pt`` or ``best.pt``, of a run on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu.errors import UserError

FORMAT = 1


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of the file under the names of today; parameters known by number are ``#<number>``.

    Raises UserError where the file is unreadable or of another format. Nothing in it is executed.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"it cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(f"it has format {found}, expected {FORMAT}")
    tensors = {f"model.{name}": value for name, value in state["model"].items()}
    for number, fields in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.#{number}.{name}": torch.as_tensor(value) for name, value in fields.items()}
    tensors |= {f"rng.{device}.0": value for device, value in state["rng"].items()}
    average = state.get("average") or {"values": [], "num_updates": 0}
    tensors |= {f"average.#{number}": value for number, value in enumerate(average["values"])}
    return tensors, {"progress": state["progress"], "average_updates": average["num_updates"]}
