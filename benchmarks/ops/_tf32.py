"""Cases that allow TF32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def with_tf32(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` with TF32 products allowed while it runs."""

    def allowed() -> Any:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return run()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return allowed
