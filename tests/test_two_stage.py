"""Two stages: candidates of a retrieval run, ranked by a ranking run of another store of the same data."""

import sys
import types

import numpy as np
import pytest
import torch

import hstu
from hstu import recommend as rec
from hstu.config_embedding import EmbeddingConfig
from hstu.data.ranking import RankingData
from hstu.data.store import write_store
from hstu.errors import UserError
from hstu.model.ranking import RankingModel
from hstu.recommend import REQUEST_GAP_S
from hstu.scoring import Scorer
from hstu.two_stage import TwoStage, join_raw, parse_by
from tests.ranking import config_of, ranking_config
from tests.serving import NUM_ITEMS, TITLES, small_config, small_model, small_store

TASKS = ["click", "rating", "watch"]


@pytest.fixture(scope="module")
def retrieval_store(tmp_path_factory):
    """Users 1000 to 1006 (1005 without events), items 11 to 40."""
    return small_store(tmp_path_factory.mktemp("retrieval") / "store")


@pytest.fixture(scope="module")
def ranking_store(tmp_path_factory, retrieval_store):
    """Users 1006, 1000 and 1003, in this order and as text, and items 30 to 11: raw 31 to 40 are unknown."""
    rng = np.random.default_rng(1)
    old, rows, lengths = retrieval_store, [], []
    for user in (6, 0, 3):
        span = np.arange(old.offsets[user], old.offsets[user + 1])
        rows.append(span[old.item_ids[span] <= 20])
        lengths.append(len(rows[-1]))
    rows, num_events = np.concatenate(rows), sum(lengths)
    columns = {"click": rng.integers(0, 2, num_events), "rating": rng.integers(1, 4, num_events),
               "watch_s": rng.integers(0, 60, num_events)}  # fmt: skip
    return write_store(
        tmp_path_factory.mktemp("ranking") / "other", offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item_ids=21 - np.asarray(old.item_ids)[rows], timestamps=np.asarray(old.timestamps)[rows], meta={"name": "o"},
        num_items=20, user_raw_ids=np.array(["1006", "1000", "1003"]), item_raw_ids=np.arange(30, 10, -1),
        columns={name: x.astype(np.float32) for name, x in columns.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def stages(retrieval_store, ranking_store):
    config = small_config()
    retrieval = rec.Recommender(config, retrieval_store, small_model(config, retrieval_store), "cpu")
    return TwoStage(retrieval, scorer_of(ranking_store))


def scorer_of(store, embedding=None):
    ranking = ranking_config(user_features={}, item_features={}, event_features={})
    config = config_of(ranking, max_len=12)
    data = RankingData(store, ranking)
    torch.manual_seed(0)
    model = RankingModel(config.model, ranking, data, embedding=embedding)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return Scorer(config, data, model)


def expected(stages, user, history, candidates):
    """Predictions of each task for retrieved raw items, one at a time, and the retrieved items."""
    found = stages.recommender.recommend(user=user, k=candidates).items
    last = stages.recommender.recommend(user=user, k=1).history[-1].time
    values = {}
    for item in found:
        if item.item <= 30:
            scores = stages.scorer.score(history, np.array([31 - item.item]), last + REQUEST_GAP_S)
            values[item.item] = {
                "click": scores["click"][0], "rating": (scores["rating"] @ [1, 2, 3])[0], "watch": scores["watch"][0],
            }  # fmt: skip
    return values, found


@pytest.mark.parametrize(("user", "row"), [(1000, 1), (1003, 2), (1006, 0), (1001, -1)])
def test_items_are_ranked_by_the_ranking_model(stages, user, row):
    values, found = expected(stages, user, stages.scorer.history(row), candidates=15)
    for by, value in (
        ("click", lambda v: v["click"]),
        ("rating", lambda v: v["rating"]),
        ("click+0.5*rating", lambda v: v["click"] + 0.5 * v["rating"]),
    ):
        got = stages.recommend(user=user, k=5, candidates=15, by=by)
        order = sorted(values, key=lambda item, value=value: -value(values[item]))
        assert [i.item for i in got.items] == order[:5]
        assert [i.rank for i in got.items] == list(range(1, 1 + len(got.items)))
        for item in got.items:
            assert item.value == pytest.approx(value(values[item.item]), rel=1e-4)
            assert item.predictions == pytest.approx(values[item.item], rel=1e-4)
            first = found[item.retrieval_rank - 1]
            assert (item.item, item.retrieval_score) == (first.item, pytest.approx(first.score, abs=1e-6))
            assert item.title == TITLES[item.item - 11]
        assert (got.num_scored, got.num_unknown) == (len(values), len(found) - len(values))
        assert got.num_unknown > 0 and got.is_cold is (row == -1)


def test_by_is_the_first_task_where_it_is_left_out(stages):
    assert stages.recommend(user=1000).items == stages.recommend(user=1000, by="click").items


def test_users_differ_by_what_they_did(stages):
    """The user of the ranking store is found by raw id, not by row."""
    by_user = {user: {i.item: i.value for i in stages.recommend(user=user, k=30).items} for user in (1001, 1000)}
    shared = by_user[1000].keys() & by_user[1001].keys()
    assert shared and any(abs(by_user[1000][i] - by_user[1001][i]) > 1e-3 for i in shared)


def test_items_without_a_row_in_the_ranking_run_are_equal_and_stay_in_the_order_of_retrieval(stages, ranking_store):
    pytest.importorskip("torchrec")
    scorer = scorer_of(ranking_store, EmbeddingConfig(ids="managed", rows=9))
    scorer.model.table.item_rows.take_in(
        torch.arange(1, 9)
    )  # raw items 30 to 23; 22 to 11 are in the store without one
    found = TwoStage(stages.recommender, Scorer(scorer.config, scorer.data, scorer.model)).recommend(user=1000, k=30)
    alike = [item for item in found.items if item.item <= 22]
    assert len(alike) > 3 and len({item.value for item in alike}) == 1
    assert [item.retrieval_rank for item in alike] == sorted(item.retrieval_rank for item in alike)
    others = {item.value for item in found.items if item.item > 22}
    assert len(others) > 3 and alike[0].value not in others


def test_shows_itself_as_tables(stages):
    text = str(stages.recommend(user=1001, k=3, by="click+0.5*rating", show_last=2))
    parts = ("user 1001: last 2 of 3 events", "candidates by click+0.5*rating", "retrieval", "watch", "Film ",
             "knows no event of this user: scored as a new one", "does not know are left out")  # fmt: skip
    for part in parts:
        assert part in text
    plain = str(stages.recommend(user=1000, k=3))
    assert "scored as a new one" not in plain and "best of" in plain


# The sum


@pytest.mark.parametrize(
    ("by", "weights"),
    [
        (None, {"click": 1.0}),
        ("watch", {"watch": 1.0}),
        ("click+0.5*rating", {"click": 1.0, "rating": 0.5}),
        (" 2 * click + -1e-3*watch", {"click": 2.0, "watch": -0.001}),
        ("click+click", {"click": 2.0}),
        ("odd+name", {"odd+name": 1.0}),
    ],
)
def test_what_to_sort_by(by, weights):
    assert parse_by(by, ["click", "rating", "watch", "odd+name"]) == weights


@pytest.mark.parametrize("by", ["like", "click-rating", "0.5click", "x*click", "click+", "", "click*2", "nan*click"])
def test_sums_that_cannot_be_read(by):
    with pytest.raises(UserError, match=r"expected a task or a sum such as click\+0.5\*watch; tasks: click, rating, w"):
        parse_by(by, TASKS)


# Ids


def test_ids_are_joined_as_numbers_or_text():
    numbers, text = np.array([3, 10, 7]), np.array(["10", "x", "3"])
    assert join_raw(numbers, text).tolist() == [2, 0, -1]
    assert join_raw(text, numbers).tolist() == [1, -1, 0]
    assert join_raw(numbers, numbers[::-1]).tolist() == [2, 1, 0]
    assert join_raw(numbers, numbers[:0]).tolist() == [-1, -1, -1]


def test_stores_that_share_nothing(stages, tmp_path):
    other = small_store(tmp_path / "s", item_raw_ids=np.arange(1000, 1000 + NUM_ITEMS))
    config = small_config()
    recommender = rec.Recommender(config, other, small_model(config, other), "cpu")
    with pytest.raises(UserError, match=r"the stores s and other share no raw item id \(such as 1000 and 30\)"):
        TwoStage(recommender, stages.scorer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user": 7}, r"user=7: no such user among 7"),
        ({"user": 1005}, r"user=1005 has no events"),
        ({"user": 1000, "k": 0}, r"k=0, candidates=500: expected 1 <= k <= candidates"),
        ({"user": 1000, "k": 9, "candidates": 5}, r"k=9, candidates=5: expected"),
        ({"user": 1000, "by": "likes"}, r"by=likes: expected a task"),
        ({"user": 1000, "request_time": 5}, r"request_time=5: expected no earlier than the last event"),
    ],
    ids=["unknown", "no events", "k", "few candidates", "by", "too early"],
)
def test_clear_errors(stages, arguments, message):
    with pytest.raises(UserError, match=message):
        stages.recommend(**arguments)


# The command and the batch form


@pytest.fixture
def runs(monkeypatch, stages):
    """Makes ``RETRIEVAL`` and ``RANKING`` the folders of the two runs."""
    recommender, scorer = stages.recommender, stages.scorer
    loaded = {
        "RETRIEVAL": (recommender.config, recommender.store, recommender.model),
        "RANKING": (scorer.config, scorer.data.store, scorer.model),
    }
    for name in ("hstu.train", "hstu.runs"):
        module = types.ModuleType(name)
        module.load_run = lambda run, which="best": loaded[str(run)]
        monkeypatch.setitem(sys.modules, name, module)


def run_command(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["hstu-recommend", "device=cpu", *options])
    try:
        return rec.main() or 0
    except SystemExit as stop:
        return stop.code


def test_three_lines_of_python(runs, stages):
    both = hstu.load_two_stage("RETRIEVAL", "RANKING", device="cpu")
    result = both.recommend(user=1000, k=4, by="rating")
    assert "user 1000: the best of" in str(result)
    assert [i.item for i in result.items] == [i.item for i in stages.recommend(user=1000, k=4, by="rating").items]


def test_command(runs, monkeypatch, capsys):
    options = ["retrieval=RETRIEVAL", "ranking=RANKING", "user=1000", "k=3", "candidates=20", "by=click+0.5*rating"]
    assert run_command(monkeypatch, *options) == 0
    out = capsys.readouterr().out
    for part in ("user 1000: last 10 of 12 events", "candidates by click+0.5*rating", "watch", "Film "):
        assert part in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["retrieval=RETRIEVAL", "user=1000"], "two stages take retrieval=RUN and ranking=RUN, and no run="),
        (["ranking=RANKING", "user=1000"], "two stages take retrieval=RUN and ranking=RUN, and no run="),
        (["retrieval=RETRIEVAL", "ranking=RANKING", "run=RETRIEVAL", "user=1"], "and no run="),
        (["retrieval=RETRIEVAL", "ranking=RANKING", "history=[11]"], "a made-up history has no actions to rank by"),
        (["retrieval=RETRIEVAL", "ranking=RANKING", "user=1000", "by=hate"], "by=hate: expected a task or a sum"),
        (["retrieval=RETRIEVAL", "ranking=RETRIEVAL", "user=1000"], "a retrieval run; scoring needs a ranking run"),
        (["retrieval=RANKING", "ranking=RANKING", "user=1000"], "is a ranking run"),
    ],
    ids=["no ranking", "no retrieval", "run too", "history", "by", "not ranking", "not retrieval"],
)
def test_command_errors_are_one_line(runs, monkeypatch, capsys, options, message):
    assert run_command(monkeypatch, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_all_users_to_parquet(runs, stages, monkeypatch, capsys, tmp_path):
    pl = pytest.importorskip("polars", reason="the batch form needs polars")
    path = tmp_path / "ranked.parquet"
    options = ["retrieval=RETRIEVAL", "ranking=RANKING", "users=all", f"output={path}", "k=4", "candidates=12"]
    assert run_command(monkeypatch, *options, "by=rating", "batch_users=4") == 0
    assert capsys.readouterr().out.startswith("6 users, ")
    frame = pl.read_parquet(path)
    predicted = [f"predicted_{task}" for task in TASKS]
    assert frame.columns == ["user", "rank", "item", "title", "value", *predicted, "retrieval_rank", "retrieval_score"]
    for user in (1000, 1001, 1006):
        one = frame.filter(pl.col("user") == user)
        alone = stages.recommend(user=user, k=4, candidates=12, by="rating").items
        assert one["item"].to_list() == [i.item for i in alone]
        assert one["rank"].to_list() == [i.rank for i in alone]
        assert one["title"].to_list() == [i.title for i in alone]
        assert one["retrieval_rank"].to_list() == [i.retrieval_rank for i in alone]
        assert one["predicted_watch"].to_list() == pytest.approx([i.predictions["watch"] for i in alone], rel=1e-4)
        assert one["value"].to_list() == pytest.approx([i.value for i in alone], rel=1e-4)
