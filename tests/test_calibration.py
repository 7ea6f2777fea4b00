"""The intercept: numbers a person can redo, and what it does to the metrics."""

import numpy as np
import pytest

from hstu.calibration import intercept, logits, shifted
from hstu.ranking_metrics import evaluate


def test_half_against_three_quarters_by_hand():
    # all predictions 1/2 (logit 0), 3 of 4 labels 1: the shift is logit(3/4) = log 3
    shift = intercept(np.full(4, 0.5), np.array([1.0, 1.0, 1.0, 0.0]))
    assert shift == pytest.approx(np.log(3), abs=1e-12)
    assert shifted(np.full(4, 0.5), shift) == pytest.approx(np.full(4, 0.75))


def test_missing_labels_do_not_count():
    labels = np.array([1.0, np.nan, 1.0, np.nan, 1.0, 0.0])
    predictions = np.array([0.5, 0.9, 0.5, 0.9, 0.5, 0.5])
    assert intercept(predictions, labels) == pytest.approx(np.log(3), abs=1e-12)


@pytest.mark.parametrize("labels", [[1.0, 1.0], [0.0, 0.0], [np.nan, np.nan]], ids=["all 1", "all 0", "none known"])
def test_nothing_to_learn_from_leaves_predictions_as_they_are(labels):
    predictions = np.array([0.2, 0.7])
    shift = intercept(predictions, np.array(labels))
    assert shift == 0.0
    assert shifted(predictions, shift) is predictions


def test_a_known_shift_is_found_and_undone_without_moving_auc():
    rng = np.random.default_rng(0)
    truth = rng.beta(2, 3, 20_000)
    labels = (rng.random(20_000) < truth).astype(np.float64)
    biased = shifted(truth, -0.4)
    shift = intercept(biased, labels)
    assert shift == pytest.approx(0.4, abs=0.03)  # three standard errors: 1 / sqrt(20,000 * .2) = .016
    users = np.arange(20_000) // 10
    before = evaluate("binary", labels, biased, users, None)["metrics"]
    after = evaluate("binary", labels, shifted(biased, shift), users, None)["metrics"]
    assert after["calibration"] == pytest.approx(1.0, abs=1e-6)
    assert after["ne"] < before["ne"] - 0.01
    assert after["auc"] == before["auc"]


def test_extreme_predictions_stay_finite():
    predictions = np.array([0.0, 1.0, 1e-12, 0.5], np.float32)
    assert np.isfinite(logits(predictions)).all()
    moved = shifted(predictions, 1.0)
    assert moved.dtype == np.float32 and np.isfinite(moved).all() and ((moved >= 0) & (moved <= 1)).all()
