"""Triton's interpreter, faster where it combines the elements of a tile one by one in Python."""

from __future__ import annotations

from typing import Any

import numpy as np


def scan_slices() -> None:
    """From now on ``tl.associative_scan`` is interpreted slice by slice along its axis.

    The same combinations in the same order, so bit for bit what the interpreter's own loop over single elements gives
    (``tests/kernels/test_interpreter.py``), which takes half of the time of a backward of attention.
    """
    try:
        from triton.runtime.interpreter import ScanOps
    except ImportError:
        return
    ScanOps.generic_scan = _scan


def _scan(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """In place of ``ScanOps.generic_scan``."""
    slices = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    results = [s.copy() for s in slices]
    for i in range(1, len(slices[0])):
        before = [self.to_tensor(r[i - 1], x.dtype) for r, x in zip(results, inputs, strict=True)]
        here = [self.to_tensor(s[i], x.dtype) for s, x in zip(slices, inputs, strict=True)]
        found = self.combine_fn.fn(*before, *here)
        for result, value in zip(results, found if isinstance(found, tuple) else (found,), strict=True):
            result[i : i + 1] = value.handle.data if hasattr(value, "handle") else value
    return [self.to_tensor(np.moveaxis(r, 0, self.axis), x.dtype) for r, x in zip(results, inputs, strict=True)]
