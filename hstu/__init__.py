"""Training generative recommenders: data, models, losses, training, evaluation, recommendation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hstu.recommend import Recommender

__all__ = ["load"]


def load(run: str | Path, which: str = "best", device: str = "auto") -> Recommender:
    """A trained run, ready to recommend: ``print(hstu.load(RUN).recommend(user=42, k=10))``.

    run: run folder; which: checkpoint, ``best`` or ``last``; device: ``auto``, ``cpu`` or ``cuda``.
    """
    from hstu.recommend import load as load_recommender

    return load_recommender(run, which, device)
