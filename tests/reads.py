"""Where a computation would wait for a GPU, counted on the CPU: each call that needs a tensor's values on the host.

    with Reads() as reads:
        trainer._step(step_input)
    reads.places   # Counter({"train.py:_exchange tolist": 1})

Counted are what is asked of a tensor in Python (``tolist``, ``numpy``, ``cpu``), the operators whose result has a size
that depends on values or is no tensor, and new values made on a device, moved to one or put at places of one (but by
:func:`hstu.transfer.to_device`), as torch waits for a copy from memory that is not pinned. Not seen: what compiled code
of others does inside an operator, and which tensors lie on the host on a GPU too: a test names the places that read
those.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = {
    "_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "unique_consecutive", "masked_select", "bincount",
    "equal", "is_nonzero",
}  # fmt: skip
"""aten operators that wait on CUDA."""
METHODS = {"tolist", "numpy", "cpu", "__array__", "new_tensor"}
ROOT = Path(__file__).parents[1]
OURS = (str(ROOT / "hstu"), str(ROOT / "kernels"))


def _place() -> str:
    """The innermost function of the project that is being called."""
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "elsewhere"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


class Reads:
    """Counts by place while it is entered; ``places``: "file:function operator" -> number."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._modes = (_Methods(self.places), _Operators(self.places))

    def __enter__(self) -> Reads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Methods(TorchFunctionMode):
    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS or (func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None):
            self.places[f"{_place()} {name}"] += 1
        if name == "__setitem__" and _puts_a_number(*args):
            self.places[f"{_place()} {name}"] += 1
        if name == "to" and _names_a_device(*args[1:], *(kwargs or {}).values()):
            place = _place()
            if place != "transfer.py:to_device":
                self.places[f"{place} to device"] += 1
        return func(*args, **(kwargs or {}))


def _puts_a_number(into: Any, where: Any, value: Any) -> bool:
    """Whether torch makes a tensor of ``value`` on the host and copies it to the device: ``x[places] = number``."""
    places = [i for i in (where if isinstance(where, tuple) else (where,)) if isinstance(i, Tensor)]
    return isinstance(value, int | float) and any(i.dtype not in (torch.bool, torch.uint8) for i in places)


def _names_a_device(*values: Any) -> bool:
    return any(isinstance(value, torch.device | str) for value in values)


class _Operators(TorchDispatchMode):
    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATORS or _by_mask(name, args) or _by_counts(name, args, kwargs or {}):
            self.places[f"{_place()} {name}"] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(name: str, args: Any) -> bool:
    """Whether rows are picked by a bool tensor; a single value set by one is a masked_fill, which waits for nothing."""
    masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
        i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
    )
    return masked and (name == "index" or args[2].numel() != 1)


def _by_counts(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether rows are repeated as often as a tensor says, without their sum being told."""
    return name == "repeat_interleave" and len(args) == 1 and kwargs.get("output_size") is None
