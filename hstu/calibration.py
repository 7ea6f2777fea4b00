"""Calibration of predicted rates by an intercept.

A ranking model trained on past days predicts too low or too high a rate on later ones, whatever the order of its
predictions. One number a task, fitted on the validation part, is added to the logits; AUC does not change.

Source: Platt 1999 with the slope fixed at 1; He et al. 2014 (Practical lessons from predicting clicks on ads at
Facebook) on why normalised entropy asks for it.

Legend: M labelled events.
"""

from __future__ import annotations

import numpy as np

LEAST = 1e-7
"""Predictions are kept this far from 0 and 1, as in the log-loss."""
MAX_SHIFT = 20.0


def logits(predictions: np.ndarray) -> np.ndarray:
    """float64 log-odds of probabilities, of the same shape."""
    p = np.clip(predictions.astype(np.float64), LEAST, 1.0 - LEAST)
    return np.log(p) - np.log1p(-p)


def intercept(predictions: np.ndarray, labels: np.ndarray) -> float:
    """What added to the logits brings the mean prediction to the mean label, which also minimises the log-loss.

    0 where no label is known or all are the same: the best shift is then infinite, and says nothing.

    Args:
        predictions: [M] probabilities. labels: [M], 0 or 1, NaN where missing.
    """
    known = ~np.isnan(labels)
    z, rate = logits(predictions[known]), float(labels[known].mean()) if known.any() else 0.0
    if not 0.0 < rate < 1.0:
        return 0.0
    low, high = -MAX_SHIFT, MAX_SHIFT
    for _ in range(60):  # the mean prediction rises with the shift
        middle = (low + high) / 2
        low, high = (middle, high) if float(_sigmoid(z + middle).mean()) < rate else (low, middle)
    return (low + high) / 2


def shifted(predictions: np.ndarray, shift: float) -> np.ndarray:
    """Probabilities with ``shift`` added to their logits, of the dtype of ``predictions``; themselves with 0."""
    if shift == 0.0:
        return predictions
    return _sigmoid(logits(predictions) + shift).astype(predictions.dtype)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * z))
