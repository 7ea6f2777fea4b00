"""Training generative recommenders: data, models, losses, training, evaluation, recommendation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hstu.recommend import Recommender
    from hstu.two_stage import TwoStage

__all__ = ["load", "load_two_stage"]


def load(run: str | Path, which: str = "best", device: str = "auto") -> Recommender:
    """A trained run, ready to recommend: ``print(hstu.load(RUN).recommend(user=42, k=10))``.

    run: run folder; which: checkpoint, ``best`` or ``last``; device: ``auto``, ``cpu`` or ``cuda``.
    """
    from hstu.recommend import load as load_recommender

    return load_recommender(run, which, device)


def load_two_stage(retrieval: str | Path, ranking: str | Path, which: str = "best", device: str = "auto") -> TwoStage:
    """A retrieval and a ranking run: ``print(hstu.load_two_stage(RETRIEVAL, RANKING).recommend(user=42, by="like"))``.

    retrieval, ranking: run folders, of stores that share raw user and item ids; which and device as in :func:`load`.
    """
    from hstu.two_stage import load_two_stage as load_both

    return load_both(retrieval, ranking, which, device)
