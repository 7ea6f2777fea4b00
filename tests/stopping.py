"""A run that a signal stops at a step, for tests of what it goes on with."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hstu.train import Interrupted, Trainer


@contextmanager
def stopped_at(
    step: int, number: int = signal.SIGTERM, seed: int | None = None, match: str | None = None
) -> Iterator[pytest.ExceptionInfo[Interrupted]]:
    """Inside, a signal comes at the beginning of the step with ``global_step == step`` (of the run with ``seed``); the
    run must save and raise Interrupted, with a text that ``match`` finds."""
    usual = Trainer._step

    def step_then_signal(self: Trainer, step_input: Any) -> float:
        if self.progress.global_step == step and seed in (None, self.config.seed):
            os.kill(os.getpid(), number)
        return usual(self, step_input)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match=match) as raised:
        patch.setattr(Trainer, "_step", step_then_signal)
        yield raised
