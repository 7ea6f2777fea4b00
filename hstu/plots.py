"""Figures beside a run's curves: reliability of predicted probabilities."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hstu.ranking_metrics import Reliability

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red", "tab:brown")
HISTOGRAM_STEPS = 40
"""About how many steps the histogram shows."""


def plot_reliability(path: Path, curves: Mapping[str, Reliability], title: str = "Reliability") -> Path | None:
    """Draws predicted against observed rates of each system, with 95 % intervals, over a histogram of predictions.

    Both panels reach from 0 to the largest mean of a bin, so that rare actions fill the figure too. Without
    matplotlib (an optional package) nothing is drawn, said once, and None returned; so it is for no curve at all.
    """
    curves = {system: curve for system, curve in curves.items() if len(curve.count)}
    if not curves:
        return None
    try:
        import matplotlib
    except ImportError:
        logging.getLogger(__name__).warning("no %s: matplotlib is not installed (pip install matplotlib)", path.name)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 7), layout="constrained", sharex=True, height_ratios=(3, 1))
    reach = min(1.0, 1.05 * max(float(max(c.mean_prediction.max(), c.high.max())) for c in curves.values()))
    above.plot([0, reach], [0, reach], color="0.6", linewidth=1, linestyle="--", label="perfect")
    for place, (system, curve) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        span = np.stack([curve.mean_label - curve.low, curve.high - curve.mean_label])
        above.errorbar(
            curve.mean_prediction, curve.mean_label, yerr=np.maximum(span, 0.0), color=colour, marker="o",
            markersize=3.5, linewidth=1.2, elinewidth=0.8, capsize=2, label=system,
        )  # fmt: skip
        joined = max(1, int(reach * len(curve.histogram) / HISTOGRAM_STEPS))
        starts = np.arange(0, len(curve.histogram), joined)
        share = np.add.reduceat(curve.histogram, starts) / curve.histogram.sum()
        below.stairs(share, np.append(starts, len(curve.histogram)) / len(curve.histogram), color=colour, linewidth=1.2)
    above.set(title=title, ylabel="observed rate", xlim=(0, reach), ylim=(0, reach))
    below.set(xlabel="predicted probability", ylabel="share of rows", yscale="log")
    for panel in (above, below):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    above.legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
