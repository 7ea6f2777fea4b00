"""Copies from the host to a GPU that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on the device; from the host to a GPU through pinned memory, where the copy is only queued.

    Any other copy waits for all that the stream holds by then: a loader thread would stand still at each tensor for as
    long as the step that is under way takes. torch gives the pinned memory to nobody else before the copy is done.
    """
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
