"""Metrics of predicted actions: hand-made tables, scikit-learn on random input with ties, streaming, intervals."""

import math
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hstu import ranking_metrics as rm
from hstu.plots import plot_reliability
from tests.figures import rendered

NAN = math.nan
LEVELS = [1.0, 2.0, 4.0]


def log(x):
    return math.log(x)


def random_rows(kind, rows=2000, users=150, seed=0):
    """Labels (a tenth missing), predictions with ties, and users of very different sizes."""
    rng = np.random.default_rng(seed)
    owners = (users * rng.random(rows) ** 2).astype(np.int64)
    if kind == "binary":
        predictions = rng.integers(1, 40, rows) / 40
        labels = (rng.random(rows) < predictions).astype(float)
    elif kind == "regression":
        predictions = np.round(rng.normal(5, 2, rows), 1)
        labels = predictions + rng.normal(0, 1, rows)
    else:
        predictions = rng.integers(1, 10, (rows, 3)).astype(float)
        predictions /= predictions.sum(axis=1, keepdims=True)
        labels = rng.integers(0, 3, rows).astype(float)
    labels[rng.random(rows) < 0.1] = NAN
    return labels, predictions, owners


def levels_of(kind):
    return LEVELS if kind in ("multiclass", "ordinal") else None


# By hand


def test_binary_by_hand():
    """Two positives at 1/2 and 1/4, two negatives at 1/4 and 1/8; a fifth row has no label.

    Pairs: 1/2 beats both (2), 1/4 ties with one (1/2) and beats the other (1): 7/2 of 4.
    User 7 has the pair (1/2, 1/4), won; user 9 the pair (1/4, 1/8), won.
    """
    labels, predictions = [1, 1, 0, 0, NAN], [1 / 2, 1 / 4, 1 / 4, 1 / 8, 1]
    got = rm.evaluate("binary", labels, predictions, [7, 9, 7, 9, 7])
    loss = -(log(1 / 2) + log(1 / 4) + log(3 / 4) + log(7 / 8)) / 4
    assert got["metrics"] == pytest.approx({
        "auc": 7 / 8, "gauc": 1, "gauc_weighted": 1, "ne": loss / log(2), "log_loss": loss,
        "calibration": (1 / 2 + 1 / 4 + 1 / 4 + 1 / 8) / 2, "rate": 1 / 2,
    }, abs=1e-12)  # fmt: skip
    assert got["counts"] == {"rows": 4, "missing": 1, "gauc_users": 2}
    assert got["reasons"] == {}
    assert list(got["metrics"]) == list(rm.METRICS["binary"])


def test_gauc_by_hand():
    """User 1: positives .9 and .3, negative .5: 1 pair of 2 won, 3 rows. User 2: a tie, 1/2, 2 rows.
    User 3: one positive at .2, negatives .1, .2, .3, .4: (1 + 1/2) / 4, 5 rows. User 4 has one row, user 5 one class.
    """
    users = [1, 2, 3, 1, 3, 4, 3, 5, 2, 3, 1, 5, 3]
    labels = [1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    scores = [0.9, 0.6, 0.2, 0.3, 0.1, 0.9, 0.2, 0.1, 0.6, 0.3, 0.5, 0.9, 0.4]
    found, values, rows = rm.user_aucs(np.array(labels, float), np.array(scores), np.array(users))
    assert found.tolist() == [1, 2, 3]
    assert values.tolist() == [1 / 2, 1 / 2, 3 / 8]
    assert rows.tolist() == [3, 2, 5]
    got = rm.evaluate("binary", labels, scores, users)
    assert got["counts"]["gauc_users"] == 3
    assert got["metrics"]["gauc"] == pytest.approx((1 / 2 + 1 / 2 + 3 / 8) / 3)
    assert got["metrics"]["gauc_weighted"] == pytest.approx((3 / 2 + 2 / 2 + 15 / 8) / 10)


@pytest.mark.parametrize("kind", ["multiclass", "ordinal"])
def test_levels_by_hand(kind):
    """Three rows of levels 1, 2, 4 stars: expected stars 2 (label 1), 9/4 (label 4), 2 (label 2)."""
    predictions = [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [0, 1, 0], [1, 0, 0]]
    got = rm.evaluate(kind, [0, 2, 1, NAN], predictions, [1, 1, 2, 2], LEVELS)
    loss = -(log(1 / 2) + log(1 / 4) + log(1 - rm.EPSILON)) / 3
    assert got["metrics"] == pytest.approx({
        "ne": loss / log(3), "log_loss": loss, "accuracy": 2 / 3, "mae": (1 + 7 / 4 + 0) / 3,
        "rmse": math.sqrt((1 + 49 / 16 + 0) / 3),
    }, abs=1e-12)  # fmt: skip
    assert got["counts"] == {"rows": 3, "missing": 1}


def test_regression_by_hand():
    got = rm.evaluate("regression", [10.0, 20.0, NAN, 30.0], [13.0, 16.0, 1e9, 30.0], [1, 1, 1, 2])
    assert got["metrics"] == pytest.approx({"mae": 7 / 3, "rmse": math.sqrt(25 / 3), "calibration": 59 / 60})
    assert got["counts"] == {"rows": 3, "missing": 1}


def test_ne_of_the_best_constant_is_one():
    labels = np.array([1.0, 0, 0, 0])
    assert rm.evaluate("binary", labels, np.full(4, 0.25), np.arange(4))["metrics"]["ne"] == pytest.approx(1)
    assert rm.evaluate("binary", labels, np.full(4, 0.5), np.arange(4))["metrics"]["ne"] > 1.2


def test_certain_and_wrong_costs_the_clipped_logarithm():
    got = rm.evaluate("binary", [1, 0], [0.0, 1.0], [1, 1])["metrics"]
    assert got["log_loss"] == pytest.approx(-log(rm.EPSILON))
    assert got["auc"] == got["gauc"] == 0


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_auc_and_says_why(label):
    got = rm.evaluate("binary", [label, label, NAN], [0.5, 0.25, 0.1], [1, 1, 1])
    undefined = {"auc", "gauc", "gauc_weighted", "ne"} | ({"calibration"} if label == 0 else set())
    assert {n for n, v in got["metrics"].items() if math.isnan(v)} == undefined == set(got["reasons"])
    assert got["reasons"]["auc"] == "all 2 rows have the same label"
    assert got["reasons"]["gauc"] == "no user has rows of both labels"
    loss = -(log(0.5) + log(0.25)) / 2 if label else -(log(0.5) + log(0.75)) / 2
    assert got["metrics"]["log_loss"] == pytest.approx(loss)
    assert all(math.isnan(end) for end in rm.bootstrap("binary", [label] * 2, [0.5, 0.2], [1, 2], resamples=20)["auc"])


@pytest.mark.parametrize("kind", rm.METRICS)
def test_no_label_at_all_gives_nan_with_the_reason(kind):
    levels = levels_of(kind)
    predictions = np.full((2, 3), 1 / 3) if levels else np.array([0.5, 0.5])
    got = rm.evaluate(kind, [NAN, NAN], predictions, [1, 1], levels)
    assert list(got["metrics"]) == list(rm.METRICS[kind]) == list(got["reasons"])
    assert all(math.isnan(v) for v in got["metrics"].values())
    assert set(got["reasons"].values()) == {"no row has a label"}
    assert (got["counts"]["rows"], got["counts"]["missing"]) == (0, 2)
    assert rm.bootstrap(kind, [NAN, NAN], predictions, [1, 1], levels) == {}


def test_level_that_all_rows_share_has_no_ne():
    got = rm.evaluate("ordinal", [1, 1], [[0.2, 0.6, 0.2]] * 2, [1, 2], LEVELS)
    assert math.isnan(got["metrics"]["ne"]) and list(got["reasons"]) == ["ne"]
    assert got["metrics"]["log_loss"] == pytest.approx(-log(0.6))


@pytest.mark.parametrize(
    ("kind", "labels", "predictions", "levels", "message"),
    [
        ("binary", [0, 1], [0.5, 1.5], None, "predictions contains 1.5: expected probabilities in 0..1"),
        ("binary", [0, 1], [-0.1, 0.5], None, "predictions contains -0.1"),
        ("binary", [0, 1], [NAN, 0.5], None, "predictions contains nan"),
        ("binary", [NAN, 1], [NAN, 0.5], None, "predictions contains nan"),
        ("binary", [0, 2], [0.5, 0.5], None, r"labels contains 2.0: expected whole numbers 0..1, or NaN"),
        ("binary", [0, 0.5], [0.5, 0.5], None, "labels contains 0.5"),
        ("binary", [0, 1], [0.5], None, r"expected \[M\], \[M\], \[M\]"),
        ("binary", [0, 1], [0.5, 0.5], [0, 1], "levels were given for a binary task"),
        ("ordinal", [0, 3], [[1, 0, 0]] * 2, LEVELS, "expected whole numbers 0..2"),
        ("ordinal", [0, 1], [[0.5, 0.4, 0.2]] * 2, LEVELS, "adds up to 1.1"),
        ("ordinal", [0, 1], [[0.5, 0.5]] * 2, LEVELS, r"\[M, 3\]"),
        ("multiclass", [0, 1], [[0.5, 0.5]] * 2, None, "needs the finite values of two or more levels"),
        ("regression", [0, 1], [0, math.inf], None, "predictions contains inf: expected finite"),
        ("regression", [0, -math.inf], [0, 0], None, "labels contains -inf: expected finite"),
        ("clicks", [0, 1], [0, 1], None, "expected one of binary, multiclass, ordinal, regression"),
    ],
)
def test_what_would_give_a_wrong_number_raises(kind, labels, predictions, levels, message):
    with pytest.raises(ValueError, match=message):
        rm.evaluate(kind, labels, predictions, [1, 1], levels)


def test_users_must_be_integers():
    with pytest.raises(ValueError, match="users has dtype float64: expected integers"):
        rm.evaluate("binary", [0, 1], [0.5, 0.5], [1.0, 2.0])


def test_directions():
    up = [n for n in rm.HIGHER_IS_BETTER if rm.higher_is_better(n)]
    assert up == ["auc", "gauc", "gauc_weighted", "accuracy"]
    assert not rm.higher_is_better("click/ne") and rm.higher_is_better("click/auc")
    with pytest.raises(ValueError, match="'calibration' has no direction"):
        rm.higher_is_better("calibration")
    named = {name for names in rm.METRICS.values() for name in names}
    assert named - set(rm.HIGHER_IS_BETTER) == {"calibration", "rate"}


# Against scikit-learn


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_binary_agrees_with_scikit_learn(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, predictions, users = random_rows("binary", seed=seed)
    got = rm.evaluate("binary", labels, predictions, users)
    known = ~np.isnan(labels)
    y, p, u = labels[known], predictions[known], users[known]
    assert got["metrics"]["auc"] == pytest.approx(sklearn.roc_auc_score(y, p), abs=1e-12)
    assert got["metrics"]["log_loss"] == pytest.approx(sklearn.log_loss(y, p), abs=1e-9)
    own = {k: sklearn.roc_auc_score(y[u == k], p[u == k]) for k in np.unique(u) if len(set(y[u == k])) == 2}
    sizes = [(u == k).sum() for k in own]
    assert got["counts"]["gauc_users"] == len(own) < len(np.unique(u))
    assert got["metrics"]["gauc"] == pytest.approx(np.mean(list(own.values())), abs=1e-12)
    assert got["metrics"]["gauc_weighted"] == pytest.approx(np.average(list(own.values()), weights=sizes), abs=1e-12)
    assert rm.auc(labels, predictions) == got["metrics"]["auc"]


def test_levels_and_values_agree_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, predictions, users = random_rows("ordinal")
    got = rm.evaluate("ordinal", labels, predictions, users, LEVELS)["metrics"]
    known = ~np.isnan(labels)
    y, p = labels[known].astype(int), predictions[known]
    stars, expected = np.array(LEVELS)[y], p @ np.array(LEVELS)
    assert got["log_loss"] == pytest.approx(sklearn.log_loss(y, p), abs=1e-9)
    assert got["accuracy"] == pytest.approx(sklearn.accuracy_score(y, p.argmax(axis=1)))
    assert got["mae"] == pytest.approx(sklearn.mean_absolute_error(stars, expected))
    assert got["rmse"] == pytest.approx(sklearn.root_mean_squared_error(stars, expected))
    labels, predictions, users = random_rows("regression")
    got = rm.evaluate("regression", labels, predictions, users)["metrics"]
    known = ~np.isnan(labels)
    assert got["mae"] == pytest.approx(sklearn.mean_absolute_error(labels[known], predictions[known]))
    assert got["rmse"] == pytest.approx(sklearn.root_mean_squared_error(labels[known], predictions[known]))


def test_importing_the_package_needs_no_scikit_learn():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('sklearn', 'scipy', 'torch')))\n"
        "import hstu.ranking_metrics as rm\n"
        "print(rm.evaluate('binary', [0, 1], [.2, .6], [1, 1])['metrics']['auc'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1.0"


# Streaming


def fed(kind, exact, parts, rows):
    """An accumulator that has seen ``rows`` in the given parts (slices or index arrays)."""
    total = rm.MetricAccumulator(kind, levels_of(kind), exact)
    for part in parts:
        total.update(*[values[part] for values in rows])
    return total


@pytest.mark.parametrize("kind", rm.METRICS)
def test_exact_mode_does_not_depend_on_the_parts(kind):
    rows = random_rows(kind)
    whole = rm.evaluate(kind, *rows, levels_of(kind))
    chunks = [slice(a, b) for a, b in ((0, 1), (1, 1), (1, 700), (700, 2000))]
    assert fed(kind, True, chunks, rows).compute() == whole
    one, other = fed(kind, True, chunks[:3], rows), fed(kind, True, chunks[3:], rows)
    one.merge(other)
    assert one.compute() == whole
    assert one.auc_error_bound() == 0


@pytest.mark.parametrize("kind", rm.METRICS)
def test_bounded_mode_with_whole_users_in_each_part(kind):
    rows = random_rows(kind)
    users = rows[2]
    whole = rm.evaluate(kind, *rows, levels_of(kind))
    one = fed(kind, False, [users % 5 == 0, users % 5 == 1], rows)
    one.merge(fed(kind, False, [users % 5 > 1], rows))
    got = one.compute()
    assert got["counts"] == whole["counts"] and whole["counts"]["missing"] > 100
    auc, exact_auc = got["metrics"].pop("auc", 0.0), whole["metrics"].pop("auc", 0.0)
    assert got["metrics"] == pytest.approx(whole["metrics"], rel=1e-12)
    assert abs(auc - exact_auc) <= one.auc_error_bound() + 1e-15


@pytest.mark.parametrize("spread", [1.0, 1e-4], ids=["spread out", "within a few bins"])
def test_bounded_auc_stays_within_its_bound(spread):
    """Distinct predictions; squeezed into a few bins the histogram must err, and must say by how much."""
    rng = np.random.default_rng(0)
    predictions = 0.5 + spread * (rng.random(5000) - 0.5) * 0.999
    labels = (rng.random(5000) < 0.2 + 0.6 * (predictions - 0.5) / spread + 0.3).astype(float)
    bounded = fed("binary", False, [slice(None)], (labels, predictions, np.arange(5000)))
    error = abs(bounded.compute()["metrics"]["auc"] - rm.auc(labels, predictions))
    assert error <= bounded.auc_error_bound()
    if spread == 1.0:
        assert bounded.auc_error_bound() < 2e-4
    else:
        assert 1e-4 < error and 1e-2 < bounded.auc_error_bound() < 0.5


def test_bounded_mode_of_one_class():
    got = fed("binary", False, [slice(None)], (np.zeros(3), np.full(3, 0.5), np.arange(3)))
    assert got.compute()["reasons"] == rm.evaluate("binary", np.zeros(3), np.full(3, 0.5), np.arange(3))["reasons"]
    assert math.isnan(got.auc_error_bound())


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bounded"])
@pytest.mark.parametrize("kind", ["binary", "ordinal"])
def test_state_survives_a_checkpoint(kind, exact, tmp_path):
    rows = random_rows(kind)
    once = fed(kind, exact, [slice(0, 900), slice(900, None)], rows)
    half = fed(kind, exact, [slice(0, 900)], rows)
    torch.save(half.state_dict(), tmp_path / "half.pt")
    again = fed(kind, exact, [slice(500)], rows)  # is replaced
    again.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    again.update(*[values[900:] for values in rows])
    assert again.compute() == once.compute()
    assert half.compute() != once.compute()


def test_accumulators_of_different_things_do_not_merge():
    for other in (
        rm.MetricAccumulator("binary", exact=False),
        rm.MetricAccumulator("regression"),
        rm.MetricAccumulator("ordinal", LEVELS),
    ):
        with pytest.raises(ValueError, match="expected .'binary', True, None"):
            rm.MetricAccumulator("binary").merge(other)
    with pytest.raises(ValueError, match=r"\[1.0, 2.0, 3.0\]"):
        rm.MetricAccumulator("ordinal", LEVELS).load_state_dict(rm.MetricAccumulator("ordinal", [1, 2, 3]).state_dict())


def test_update_that_raises_adds_nothing():
    total = fed("binary", False, [slice(None)], random_rows("binary"))
    before = total.compute()
    with pytest.raises(ValueError):
        total.update(np.array([1.0, NAN, 7.0]), np.full(3, 0.5), np.arange(3))
    assert total.compute() == before


def reduce_on_rank(rank, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for kind in ("binary", "ordinal"):
        rows = random_rows(kind)
        for exact in (True, False):
            mine = fed(kind, exact, [rows[2] % 2 == rank] if rank else [], rows)  # rank 0 has seen nothing
            if not rank:
                mine.update(*[values[rows[2] % 2 == 0] for values in rows])
            total = mine.reduce()
            result = {"total": total.compute(), "mine": mine.compute(), "again": mine.reduce().compute()}
            torch.save(result, f"{folder}/{kind}-{exact}-{rank}.pt")
    nothing = rm.MetricAccumulator("binary") if rank == 0 else fed("binary", True, [slice(None)], random_rows("binary"))
    torch.save(nothing.reduce().compute(), f"{folder}/empty-{rank}.pt")
    dist.barrier()  # a rank that leaves while the other still talks to it can abort at its exit
    dist.destroy_process_group()


def test_two_ranks_give_the_metrics_of_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(reduce_on_rank, (port, str(tmp_path)), nprocs=2)
    for kind in ("binary", "ordinal"):
        rows = random_rows(kind)
        whole = rm.evaluate(kind, *rows, levels_of(kind))
        for exact in (True, False):
            first, second = (torch.load(tmp_path / f"{kind}-{exact}-{rank}.pt") for rank in range(2))
            assert first["total"] == second["total"] == first["again"]
            assert first["mine"]["counts"]["rows"] + second["mine"]["counts"]["rows"] == whole["counts"]["rows"]
            assert first["total"]["counts"] == whole["counts"]
            assert first["total"]["metrics"] == pytest.approx(whole["metrics"], rel=1e-12)
    whole = rm.evaluate("binary", *random_rows("binary"))
    assert torch.load(tmp_path / "empty-0.pt") == torch.load(tmp_path / "empty-1.pt") == whole


# Intervals


@pytest.mark.parametrize("kind", rm.METRICS)
def test_bootstrap_equals_drawing_the_users_by_hand(kind):
    """The rows of every drawn user put together and evaluated, resample by resample, on the same draws."""
    labels, predictions, users = random_rows(kind, rows=300, users=40)
    got = rm.bootstrap(kind, labels, predictions, users, levels_of(kind), resamples=60, seed=3, confidence=0.8)
    names = np.unique(users[~np.isnan(labels)])
    rng, resampled = np.random.default_rng(3), []
    for _ in range(60):
        drawn = names[rng.integers(0, len(names), len(names))]
        rows = [np.flatnonzero(users == user) for user in drawn]
        copies = np.repeat(np.arange(len(drawn)), [len(r) for r in rows])  # a user drawn twice is two users
        at = np.concatenate(rows)
        resampled.append(rm.evaluate(kind, labels[at], predictions[at], copies, levels_of(kind))["metrics"])
    assert list(got) == [n for n in rm.METRICS[kind] if n != "rate"]
    for name, interval in got.items():
        assert interval == pytest.approx(np.percentile([r[name] for r in resampled], [10, 90]), rel=1e-9), name


def test_bootstrap_covers_the_binomial_interval_of_the_accuracy():
    """1600 users with one row each, 3/4 right: standard error sqrt(3/4 x 1/4 / 1600)."""
    right = np.arange(1600) % 4 > 0
    predictions = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
    low, high = rm.bootstrap("multiclass", np.zeros(1600), predictions, np.arange(1600), [0, 1], resamples=4000)[
        "accuracy"
    ]
    error = math.sqrt(0.75 * 0.25 / 1600)
    assert low == pytest.approx(0.75 - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(0.75 + 1.96 * error, abs=0.1 * error)


def test_bootstrap_is_seeded_and_independent_of_its_blocks():
    rows = random_rows("binary", rows=3000, users=2000)
    once = rm.bootstrap("binary", *rows, resamples=100, seed=1)
    assert once == rm.bootstrap("binary", *rows, resamples=100, seed=1)
    assert once != rm.bootstrap("binary", *rows, resamples=100, seed=2)
    tiny = rm.bootstrap("binary", *rows, resamples=100, seed=1, block_mib=1)
    for name, interval in once.items():
        assert tiny[name] == pytest.approx(interval), name
    assert rm.bootstrap("binary", *rows, resamples=0) == {}


# Reliability


def test_reliability_by_hand():
    """Six rows in three bins; 0.4 occurs three times and is not split: bins of 1, 3 and 2 rows."""
    got = rm.reliability([0, 1, 0, 1, 1, 0, NAN], [0.2, 0.4, 0.4, 0.4, 0.8, 0.6, 0.5], bins=3)
    assert got.count.tolist() == [1, 3, 2]
    assert got.mean_prediction == pytest.approx([0.2, 0.4, 0.7])
    assert got.mean_label == pytest.approx([0, 2 / 3, 1 / 2])
    assert got.histogram.sum() == 6 and got.histogram[400] == 3
    # Wilson for 1 of 2: centre 1/2, half width z / (1 + z^2/2) sqrt(1/8 + z^2/16).
    z = rm.WILSON_Z
    half = z / (1 + z * z / 2) * math.sqrt(1 / 8 + z * z / 16)
    assert (got.low[2], got.high[2]) == pytest.approx((1 / 2 - half, 1 / 2 + half))
    assert (got.low[0], got.high[0]) == pytest.approx((0, z * z / (1 + z * z)))  # 0 of 1


def test_reliability_has_bins_of_equal_mass_whatever_the_order():
    labels, predictions = (
        (np.random.default_rng(0).random(1000) < 0.3).astype(float),
        np.random.default_rng(1).random(1000),
    )
    got = rm.reliability(labels, predictions, bins=10)
    assert got.count.tolist() == [100] * 10
    assert (np.diff(got.mean_prediction) > 0).all()
    turned = rm.reliability(labels[::-1], predictions[::-1], bins=10)
    assert turned.mean_label == pytest.approx(got.mean_label)


@pytest.mark.parametrize("rows", [0, 5])
def test_reliability_of_a_constant_has_one_bin_and_of_nothing_none(rows):
    got = rm.reliability(np.ones(rows), np.full(rows, 0.3))
    assert got.count.tolist() == [5] * (rows > 0)


def test_reliability_needs_a_bin():
    with pytest.raises(ValueError, match="bins=0"):
        rm.reliability([1], [0.5], bins=0)


def test_reliability_plot(tmp_path):
    pytest.importorskip("matplotlib")
    labels, predictions, _ = random_rows("binary")
    curves = {"model": rm.reliability(labels, predictions), "constant": rm.reliability(labels, np.full(2000, 0.5))}
    with rendered():
        path = plot_reliability(tmp_path / "reliability.png", curves)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert plot_reliability(tmp_path / "none.png", {"model": rm.reliability([], [])}) is None
    assert not (tmp_path / "none.png").exists()
