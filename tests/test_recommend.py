"""Recommendations: what is recommended, what is shown, and what is said when something is wrong."""

import sys

import numpy as np
import pytest
import torch

import hstu
from hstu import recommend as rec
from hstu.data.splits import Targets
from hstu.errors import UserError
from tests.serving import NUM_ITEMS, TITLES, fake_train, small_config, small_model, small_store


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "store")


@pytest.fixture
def recommender(store):
    config = small_config()
    return rec.Recommender(config, store, small_model(config, store), device="cpu")


def history_of(store, row):
    return np.asarray(store.item_ids[store.offsets[row] : store.offsets[row + 1]])


def test_scores_and_order_are_the_models(recommender, store):
    """User 1003 by a loop: the model's scores on the last events, best first, own items left out."""
    got = recommender.recommend(user=1003, k=5)
    begin, end = store.offsets[3], store.offsets[4]
    from hstu.data.batches import Batch

    times = torch.from_numpy(np.array(store.timestamps[begin:end]))
    batch = Batch(
        offsets=torch.tensor([0, 7]), item_ids=torch.from_numpy(np.array(store.item_ids[begin:end])).long(),
        timestamps=times, request_times=torch.cat([times[1:], times[-1:] + 60]), labels=torch.zeros(7).long(),
        users=torch.tensor([3]), max_len=7,
    )  # fmt: skip
    with torch.inference_mode():
        table = torch.nn.functional.normalize(recommender.model.table.weight, dim=1)
        scores = (table @ recommender.model.last(batch)[0]).tolist()
    own = set(history_of(store, 3).tolist())
    best = sorted((i for i in range(1, NUM_ITEMS + 1) if i not in own), key=lambda i: -scores[i])[:5]
    assert [item.item for item in got.items] == [i + 10 for i in best]
    assert [item.title for item in got.items] == [TITLES[i - 1] for i in best]
    assert [item.score for item in got.items] == pytest.approx([scores[i] for i in best], rel=1e-5)
    assert [item.rank for item in got.items] == [1, 2, 3, 4, 5]


def test_a_user_and_the_same_made_up_history_agree(recommender, store):
    for row in (0, 3, 6):  # 12, 7 and 40 events; the model reads 10
        user = recommender.recommend(user=1000 + row)
        made_up = recommender.recommend(
            history=(history_of(store, row) + 10).tolist(),
            history_times=np.asarray(store.timestamps[store.offsets[row] : store.offsets[row + 1]]).tolist(),
        )
        assert [i.item for i in user.items] == [i.item for i in made_up.items] and user.history == made_up.history
        assert [i.score for i in user.items] == pytest.approx([i.score for i in made_up.items], abs=1e-6)


def test_titles_and_ids_are_the_same_history(recommender):
    by_id = recommender.recommend(history=[11, 40], history_times=[5, 6])
    by_title = recommender.recommend(history=["film 1 (1901)", "Film 30 (1930)"], history_times=[5, 6])
    assert by_id.items == by_title.items and [e.item for e in by_title.history] == [11, 40]
    assert recommender.recommend(history=["11", "40"], history_times=[5, 6]).items == by_id.items


def test_made_up_history_lies_a_minute_apart_and_ends_now(recommender, monkeypatch):
    monkeypatch.setattr(rec.time, "time", lambda: 1_700_000_000.9)
    events = recommender.recommend(history=[11, 12, 13]).history
    assert [e.time for e in events] == [1_699_999_880, 1_699_999_940, 1_700_000_000]


def test_request_time_reaches_the_model(recommender):
    soon = recommender.recommend(user=1003, k=20)
    later = recommender.recommend(user=1003, k=20, request_time=int(soon.history[-1].time) + 10**8)
    assert [i.score for i in soon.items] != [i.score for i in later.items]


def test_filter_history_choices(recommender, store):
    """User 1006 has 40 events; the model reads the last 10."""
    events = history_of(store, 6) + 10
    everything = {i.item for i in recommender.recommend(user=1006, k=NUM_ITEMS).items}
    assert everything == set(range(11, 41)) - set(events.tolist())
    recent = {i.item for i in recommender.recommend(user=1006, k=NUM_ITEMS, filter_history="truncated").items}
    assert recent == set(range(11, 41)) - set(events[-10:].tolist())
    assert len(recommender.recommend(user=1006, k=99, filter_history="none").items) == NUM_ITEMS
    recommender.config.eval.filter_history = "none"  # a log where repeats are wanted
    assert len(recommender.recommend(user=1006, k=99).items) == NUM_ITEMS


def test_unknown_items_are_skipped_and_said(recommender):
    got = recommender.recommend(history=[11, 999, "Nothing [2020]", 12], history_times=[1, 2, 3, 4])
    assert got.skipped == [999, "Nothing [2020]"]
    assert [(e.item, e.time) for e in got.history] == [(11, 1), (12, 4)]
    assert "skipped, not in this catalogue: 999, 'Nothing [2020]'" in str(got)


def test_shows_itself_as_tables(recommender):
    text = str(recommender.recommend(user=1000, k=3, show_last=4))
    for part in ("user 1000: last 4 of 12 events", "time (UTC)", "1970-", "recommended", "rank", "score", "Film "):
        assert part in text
    assert text.count("Film ") == 4 + 3


def test_titles_with_brackets_are_shown_as_they_are(tmp_path):
    titles = TITLES.astype("<U40")
    titles[:] = "Rec [bold] [2]"
    store = small_store(tmp_path / "s", item_attributes={"title": titles})
    config = small_config()
    text = str(rec.Recommender(config, store, small_model(config, store), "cpu").recommend(user=1000, k=2))
    assert text.count("Rec [bold] [2]") == 12 - 2 + 2


def test_store_without_titles(tmp_path):
    store = small_store(tmp_path / "s", item_attributes={})
    config = small_config()
    got = rec.Recommender(config, store, small_model(config, store), "cpu").recommend(user=1000, k=2)
    assert [i.title for i in got.items] == [None, None] and "recommended" in str(got)


def test_string_ids(tmp_path):
    users = np.array([f"u{i}" for i in range(7)])[::-1]
    items = np.array([f"B00{i:02d}" for i in range(NUM_ITEMS)])
    store = small_store(tmp_path / "s", user_raw_ids=users, item_raw_ids=items, item_attributes={})
    config = small_config()
    recommender = rec.Recommender(config, store, small_model(config, store), "cpu")
    assert len(recommender.recommend(user="u6").history) == 12  # the first row
    assert recommender.recommend(history=["B0003"]).history[0].item == "B0003"


def test_rare_bucket_is_never_recommended(tmp_path):
    from hstu.data.store import RARE_ITEM

    items = np.array([f"B00{i:02d}" for i in range(NUM_ITEMS - 1)] + [RARE_ITEM])
    store = small_store(tmp_path / "s", item_raw_ids=items)
    config = small_config(filter_history="none")
    recommender = rec.Recommender(config, store, small_model(config, store), "cpu")
    got = recommender.recommend(user=1003, k=NUM_ITEMS)
    assert len(got.items) == NUM_ITEMS - 1 and RARE_ITEM not in {i.item for i in got.items}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user": 42}, r"user=42: no such user among 7 in store; examples: 1000, 1001, 1002$"),
        ({"user": "anna"}, r"user=anna: no such user"),
        ({"user": 10**30}, r"no such user"),
        ({"user": 1000.5}, r"no such user"),
        ({"user": 1005}, r"user=1005 has no events.*give history="),
        ({"history": [999, 998]}, r"none of 2 items is in the catalogue \(999, ...\); ids such as 11, 12, 13$"),
        ({"history": ["Film 7 (1970)"]}, r"did you mean 'Film 7 \(1907\)'\?$"),
        ({"history": []}, r"expected a list of at least one"),
        ({"history": "Film 1"}, r"expected a list of at least one"),
        ({}, r"expected either user or history"),
        ({"user": 1000, "history": [11]}, r"expected either user or history"),
        ({"user": 1000, "k": 0}, r"k=0: expected >= 1"),
        ({"user": 1000, "filter_history": "some"}, r"filter_history=some: expected truncated, full or none"),
        ({"user": 1000, "request_time": 5}, r"request_time=5: expected no earlier than the last event"),
        ({"history": [11, 12], "history_times": [1]}, r"history_times has 1 entries, history has 2"),
        ({"history": [11, 12], "history_times": [2, 1]}, r"times that do not descend"),
    ],
    ids=lambda value: (
        None if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items())[:40] or "empty"
    ),
)
def test_clear_errors(recommender, arguments, message):
    with pytest.raises(UserError, match=message):
        recommender.recommend(**arguments)


def test_shared_title_asks_for_the_id(tmp_path):
    titles = TITLES.copy()
    titles[4] = titles[2]
    store = small_store(tmp_path / "s", item_attributes={"title": titles})
    config = small_config()
    recommender = rec.Recommender(config, store, small_model(config, store), "cpu")
    with pytest.raises(UserError, match=r"shared by items 13, 15; give the id"):
        recommender.recommend(history=[titles[2]])


def test_three_lines_of_python(store, monkeypatch, tmp_path):
    config = small_config()
    fake_train(monkeypatch, config, store, small_model(config, store))
    recommender = hstu.load(tmp_path, device="cpu")
    result = recommender.recommend(user=1000, k=2)
    assert "user 1000: recommended" in str(result)


# Batch form


def test_all_users_to_parquet(recommender, store, tmp_path):
    pl = pytest.importorskip("polars", reason="the batch form needs polars")
    path = tmp_path / "recs.parquet"
    assert recommender.write_parquet("all", path, k=4, batch_users=3) == (6, 1)  # user 1005 has no events
    frame = pl.read_parquet(path)
    assert frame.columns == ["user", "rank", "item", "title", "score"]
    assert frame["user"].unique().sort().to_list() == [1000, 1001, 1002, 1003, 1004, 1006]
    for user in (1000, 1004, 1006):
        one = frame.filter(pl.col("user") == user)
        alone = recommender.recommend(user=user, k=4).items
        assert one["item"].to_list() == [i.item for i in alone]
        assert one["title"].to_list() == [i.title for i in alone]
        assert one["rank"].to_list() == list(range(1, len(alone) + 1))
        assert one["score"].to_list() == pytest.approx([i.score for i in alone], rel=1e-4, abs=1e-6)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_users_from_parquet(recommender, tmp_path):
    pl = pytest.importorskip("polars", reason="the batch form needs polars")
    wanted = tmp_path / "users.parquet"
    pl.DataFrame({"user": [1006, 1000, 1006, None]}).write_parquet(wanted)
    assert recommender.write_parquet(str(wanted), tmp_path / "recs.parquet", k=2) == (2, 0)
    frame = pl.read_parquet(tmp_path / "recs.parquet")
    assert frame["user"].to_list() == [1006, 1006, 1000, 1000]


def test_batch_form_errors(recommender, tmp_path):
    pl = pytest.importorskip("polars", reason="the batch form needs polars")
    pl.DataFrame({"id": [1]}).write_parquet(tmp_path / "other.parquet")
    pl.DataFrame({"user": [77]}).write_parquet(tmp_path / "unknown.parquet")
    (tmp_path / "text.parquet").write_text("user\n1000\n")
    out = tmp_path / "recs.parquet"
    for users, output, message in (
        (tmp_path / "missing.parquet", out, "no such file"),
        (tmp_path / "other.parquet", out, "no column user, found id"),
        (tmp_path / "unknown.parquet", out, "user=77: no such user"),
        (tmp_path / "text.parquet", out, "not readable as Parquet"),
        ("all", tmp_path / "no" / "recs.parquet", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            recommender.write_parquet(str(users), output)
    assert not out.exists()


def test_batch_form_without_polars(recommender, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(UserError, match="needs polars .* pip install polars"):
        recommender.write_parquet("all", tmp_path / "recs.parquet")
    assert recommender.recommend(user=1000).items  # the rest works without


def test_many_users_equal_one_by_one(recommender):
    rows = np.array([0, 1, 2, 3, 4, 6])
    blocks = list(recommender.recommend_many(rows, k=3, batch_users=4))
    assert [len(users) for users, _, _ in blocks] == [4, 2]
    for users, _, ids in blocks:
        for row, best in zip(users, ids, strict=True):
            alone = [i.item - 10 for i in recommender.recommend(user=int(row) + 1000, k=3).items]
            assert best[best > 0].tolist() == alone


def test_evaluated_last_item_would_be_ranked_alike(store):
    """The input path here and ``eval_batches`` are the same: the rank of a target is its place in the list."""
    from hstu.evaluate import evaluate

    config = small_config(filter_history="truncated")
    model = small_model(config, store)
    recommender = rec.Recommender(config, store, model, "cpu")
    row = int(store.offsets[1]) - 1  # user 1000's last event
    begin = int(store.offsets[0])
    target = int(store.item_ids[row])
    (rank,) = evaluate(model, store, Targets(np.array([0]), np.array([row])), config).ranks
    listed = recommender.recommend(
        history=(np.asarray(store.item_ids[begin:row]) + 10).tolist(),
        history_times=np.asarray(store.timestamps[begin:row]).tolist(),
        request_time=int(store.timestamps[row]),
        filter_history="none",
        k=NUM_ITEMS,
    )
    seen = set(np.asarray(store.item_ids[max(begin, row - config.model.max_len) : row]).tolist()) - {target}
    order = [i.item - 10 for i in listed.items if i.item - 10 not in seen]
    assert rank == order.index(target) + 1


# The command


def run_command(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["hstu-recommend", *options])
    try:
        return rec.main() or 0
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["user=1000", "k=3"], ["user 1000: last 10 of 12 events", "user 1000: recommended"]),
        (["history=[11,12,999]"], ["made-up history: last 2 of 2 events", "skipped, not in this catalogue: 999"]),
        (['history=["Film 3 (1903)"]'], ["Film 3 (1903)", "made-up history: recommended"]),
        (["history=11"], ["made-up history: last 1 of 1 events"]),
    ],
    ids=["user", "history", "title", "one-item"],
)
def test_command(store, monkeypatch, capsys, options, parts):
    config = small_config()
    fake_train(monkeypatch, config, store, small_model(config, store))
    assert run_command(monkeypatch, "run=X", "device=cpu", *options) == 0
    out = capsys.readouterr().out
    for part in parts:
        assert part in out


def test_command_batch_form(store, monkeypatch, capsys, tmp_path):
    pytest.importorskip("polars", reason="the batch form needs polars")
    config = small_config()
    fake_train(monkeypatch, config, store, small_model(config, store))
    path = tmp_path / "recs.parquet"
    assert run_command(monkeypatch, "run=X", "device=cpu", "users=all", f"output={path}") == 0
    out = capsys.readouterr().out
    assert path.exists() and out.startswith("6 users, ") and "1 users without events left out" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["user=1"], "no such user"),
        ([], "give exactly one of user, history and users, got none"),
        (["user=1000", "history=[11]"], "got user, history"),
        (["users=all"], "takes both: users=all"),
        (["user=1000", "output=x.parquet"], "takes both: users=all"),
        (["user=1000", "kk=3"], "kk"),
        (["history=[Film 3 (1903)]"], "quote a value with spaces or brackets"),
        (["run=null", "user=1000"], "run is not set: give run=RUN, or retrieval=RUN ranking=RUN"),
    ],
    ids=["unknown-user", "nothing", "two-things", "no-output", "no-users", "unknown-key", "unquoted-title", "no-run"],
)
def test_command_errors_are_one_line(store, monkeypatch, capsys, options, message):
    config = small_config()
    fake_train(monkeypatch, config, store, small_model(config, store))
    assert run_command(monkeypatch, "run=X", "device=cpu", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
