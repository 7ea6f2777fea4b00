"""Two stages: a retrieval model gives candidates, a ranking model scores them for the same user.

    stages = hstu.load_two_stage("runs/ml-1m/hstu/...", "runs/ml-1m/ranking-interleaved/...")
    result = stages.recommend(user=42, k=10, by="like")
    print(result)

The two runs may have been trained on different stores of the same data: users and items are joined by their raw ids.

Legend: C candidates of a user, k of them that are shown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hstu.errors import UserError
from hstu.recommend import (
    REQUEST_GAP_S,
    Event,
    Printable,
    Recommender,
    find_raw,
    history_table,
    load,
    output_path,
    polars_module,
    print_written,
    write_frame,
)
from hstu.scoring import History, Scorer

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

CANDIDATES = 500
"""Items of the first stage."""


@dataclass
class RankedItem:
    """One item after both stages."""

    rank: int
    item: int | str
    """Raw item id."""
    title: str | None
    value: float
    """What the items are sorted by."""
    predictions: dict[str, float]
    """Of every task: a probability (binary), the expected level (multiclass, ordinal) or the value (regression)."""
    retrieval_rank: int
    retrieval_score: float


@dataclass
class Ranked(Printable):
    """The answer for one user; printing it shows the user's last events and the items."""

    items: list[RankedItem]
    history: list[Event]
    """Of the retrieval store, oldest first."""
    user: int | str
    by: str
    num_scored: int
    """Candidates that the ranking run knows."""
    num_unknown: int
    """Candidates that it does not know; they are left out."""
    is_cold: bool
    """The ranking store has no event of the user."""
    show_last: int = 10
    tasks: list[str] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        who = escape(f"user {self.user}")
        table = Table(title=f"{who}: the best of {self.num_scored} candidates by {escape(self.by)}",
                      title_justify="left")  # fmt: skip
        sum_of_tasks = [] if self.by in self.tasks else ["value"]
        for column in ("rank", "item", "title", *sum_of_tasks, *self.tasks, "retrieval", "its rank"):
            table.add_column(escape(column), justify="left" if column in ("item", "title") else "right")
        for item in self.items:
            numbers = [item.value] * len(sum_of_tasks) + [item.predictions[task] for task in self.tasks]
            table.add_row(
                str(item.rank), escape(str(item.item)), escape(item.title or ""), *(f"{x:.4f}" for x in numbers),
                f"{item.retrieval_score:.4f}", str(item.retrieval_rank),
            )  # fmt: skip
        yield history_table(who, self.history, self.show_last)
        if self.is_cold:
            yield "the ranking run knows no event of this user: scored as a new one"
        if self.num_unknown:
            yield f"{self.num_unknown} candidates that the ranking run does not know are left out"
        yield table


def parse_by(by: str | None, tasks: list[str]) -> dict[str, float]:
    """Weight of each task in what the items are sorted by, best (largest) first.

    by: a task; or a sum of terms ``task`` or ``number*task``, joined by ``+``; None: the first task. The number may be
        negative. Raises UserError for anything else.
    """
    if by is None or by in tasks:
        return {tasks[0] if by is None else by: 1.0}
    weights: dict[str, float] = {}
    for term in by.split("+"):
        number, _, task = (part.strip() for part in term.rpartition("*"))
        try:
            weight = float(number) if number else 1.0
        except ValueError:
            weight = np.nan
        if task not in tasks or not np.isfinite(weight):
            raise UserError(
                f"by={by}: expected a task or a sum such as {tasks[0]}+0.5*{tasks[-1]}; tasks: {', '.join(tasks)}"
            )
        weights[task] = weights.get(task, 0.0) + weight
    return weights


def join_raw(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int64 [len(left)]: row of ``right`` that has the same raw id, -1 where none has; numbers equal their text."""
    if len(right) == 0:
        return np.full(len(left), -1, np.int64)
    if (left.dtype.kind in "iu") != (right.dtype.kind in "iu"):
        left, right = left.astype(np.str_), right.astype(np.str_)
    order = np.argsort(right, kind="stable")
    at = np.searchsorted(right, left, sorter=order).clip(max=len(right) - 1)
    return np.where(right[order[at]] == left, order[at], -1).astype(np.int64)


class TwoStage:
    """A retrieval model and a ranking model that work for the same users.

    Args:
        recommender: gives the candidates.
        scorer: predicts the actions on them, from the user's history in its own store.

    Raises UserError where the two stores share no item, or one of them holds items by a hash (``stream.watch``).
    """

    def __init__(self, recommender: Recommender, scorer: Scorer) -> None:
        self.recommender, self.scorer = recommender, scorer
        self.tasks = scorer.data.config.tasks
        first, second = recommender.store, scorer.data.store
        for name, store in (("retrieval", first), ("ranking", second)):
            if store.meta.get("source") == "stream":
                raise UserError(
                    f"{name}: {store.path} holds items by a hash of their raw ids, which no other run knows; take "
                    "a run on a prepared store"
                )
        self.known_as = np.append(0, join_raw(first.item_raw_ids, second.item_raw_ids) + 1)
        """[items of the retrieval store + 1]: item id in the ranking store; 0: unknown there."""
        if not self.known_as.any():
            raise UserError(
                f"the stores {first.path.name} and {second.path.name} share no raw item id (such as "
                f"{first.item_raw_ids[0]} and {second.item_raw_ids[0]}): train both runs on the same data"
            )
        self._user_order = np.argsort(second.user_raw_ids, kind="stable")

    def recommend(
        self, user: int | str, k: int = 10, candidates: int = CANDIDATES, by: str | None = None,
        request_time: int | None = None, filter_history: str | None = None, show_last: int = 10,
    ) -> Ranked:  # fmt: skip
        """The ``k`` best of ``candidates`` retrieved items for a user of the retrieval store (raw id).

        by: what to sort by, see :func:`parse_by`. request_time: s since 1970, for both models; None: a minute after
        the last event that either store has of the user. filter_history: see :meth:`Recommender.recommend`.

        A user whom the ranking store does not know is scored as a new one; items that it does not know are left out
        and counted. Raises UserError for a user unknown to the retrieval store, or with no event there.
        """
        weights = self._checked(k, candidates, by)
        store, row = self.recommender.store, self.recommender.user_row(user)
        history = self.scorer.history(self._ranking_row(user))
        lasts = [*store.timestamps[max(store.offsets[row], store.offsets[row + 1] - 1) : store.offsets[row + 1]],
                 *history.timestamps[-1:]]  # fmt: skip
        request = _request(request_time, int(max(lasts, default=0)))
        found = self.recommender.recommend(user=user, k=candidates, request_time=request, filter_history=filter_history)
        ids = np.array([self.recommender.item_id(item.item) for item in found.items], np.int64)
        scores = np.array([item.score for item in found.items])
        columns = self._rank(history, ids, scores, request, weights)
        items = [
            RankedItem(
                place + 1, found.items[at].item, found.items[at].title, float(columns["value"][place]),
                {task: float(columns[f"predicted_{task}"][place]) for task in self.tasks},
                at + 1, found.items[at].score,
            )
            for place, at in enumerate((columns["retrieval_rank"] - 1)[:k].tolist())
        ]  # fmt: skip
        num_scored = len(columns["value"])
        return Ranked(items, found.history, user, by or next(iter(self.tasks)), num_scored, len(ids) - num_scored,
                      len(history) == 0, show_last, list(self.tasks))  # fmt: skip

    def _checked(self, k: int, candidates: int, by: str | None) -> dict[str, float]:
        """The weights that ``by`` says."""
        if not 1 <= k <= candidates:
            raise UserError(f"k={k}, candidates={candidates}: expected 1 <= k <= candidates")
        return parse_by(by, list(self.tasks))

    def _ranking_row(self, user: int | str) -> int:
        """User row in the ranking store, -1 where there is none."""
        row = find_raw(self.scorer.data.store.user_raw_ids, self._user_order, user)
        return -1 if row is None else row

    def _rank(
        self, history: History, ids: np.ndarray, scores: np.ndarray, request: int, weights: dict[str, float]
    ) -> dict[str, np.ndarray]:
        """Columns of the candidates that the ranking run knows, best first.

        ids: [C] item ids of the retrieval store, best first; 0: none. scores: [C].
        """
        known = np.flatnonzero(self.known_as[ids] > 0)
        found = self.scorer.score(history, self.known_as[ids[known]], request)
        predicted = {}
        for task, config in self.tasks.items():
            values = found[task]
            predicted[task] = values @ np.array(config.levels, np.float32) if values.ndim == 2 else values
        value = sum(weight * predicted[task] for task, weight in weights.items())
        order = np.argsort(-np.asarray(value), kind="stable")  # of equal ones the better retrieved first
        columns = {"value": np.asarray(value), **{f"predicted_{task}": x for task, x in predicted.items()}}
        columns |= {"retrieval_rank": known + 1, "retrieval_score": scores[known], "id": ids[known]}
        return {name: column[order] for name, column in columns.items()}

    def write_parquet(
        self, users: str, output: str | Path, k: int = 10, candidates: int = CANDIDATES, by: str | None = None,
        filter_history: str | None = None, batch_users: int = 512,
    ) -> tuple[int, int]:  # fmt: skip
        """Writes the ``k`` best items of many users to Parquet: columns user, rank, item, title (if any), value,
        ``predicted_TASK`` of each task, retrieval_rank, retrieval_score.

        users: ``all``, or a Parquet file with a column ``user`` of raw user ids.
        Returns the number of users written, and of users left out because they have no events.
        """
        pl = polars_module()
        path = output_path(output)
        weights = self._checked(k, candidates, by)
        rows, num_empty = self.recommender.batch_rows(users)
        store, parts = self.recommender.store, []
        for row, columns in self._rank_many(rows, candidates, weights, filter_history, batch_users):
            best = {name: column[:k] for name, column in columns.items()}
            size = len(best["id"])
            parts.append(best | {"row": np.full(size, row), "rank": np.arange(1, size + 1, dtype=np.int32)})
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        item, owner = joined.pop("id") - 1, joined.pop("row")
        frame = {"user": np.asarray(store.user_raw_ids)[owner], "rank": joined.pop("rank")}
        frame["item"] = np.asarray(store.item_raw_ids)[item]
        if self.recommender.titles is not None:
            frame["title"] = np.asarray(self.recommender.titles)[item]
        write_frame(pl.DataFrame(frame | joined), path)
        return len(rows), num_empty

    def _rank_many(
        self, rows: np.ndarray, candidates: int, weights: dict[str, float], filter_history: str | None, batch_users: int
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """User row and columns, as of :meth:`_rank`, of each user in ``rows``, who all have events."""
        store = self.recommender.store
        ranking_rows = join_raw(store.user_raw_ids, self.scorer.data.store.user_raw_ids)
        for block, scores, ids in self.recommender.recommend_many(rows, candidates, filter_history, batch_users):
            for row, row_scores, row_ids in zip(block.tolist(), scores, ids, strict=True):
                history = self.scorer.history(int(ranking_rows[row]))
                last = max([store.timestamps[store.offsets[row + 1] - 1], *history.timestamps[-1:]])
                yield row, self._rank(history, row_ids, row_scores, int(last) + REQUEST_GAP_S, weights)


def _request(request_time: int | None, last: int) -> int:
    request = last + REQUEST_GAP_S if request_time is None else int(request_time)
    if request < last:
        raise UserError(f"request_time={request}: expected no earlier than the last event, {last}")
    return request


def load_two_stage(retrieval: str | Path, ranking: str | Path, which: str = "best", device: str = "auto") -> TwoStage:
    """Both runs, ready to recommend."""
    return TwoStage(load(retrieval, which, device), Scorer.load(ranking, which, device))


def two_stage_run(options: dict[str, Any]) -> None:
    """What ``hstu-recommend retrieval=RUN ranking=RUN`` does."""
    missing = [name for name in ("retrieval", "ranking") if options[name] is None]
    if missing or options["run"] is not None:
        raise UserError("two stages take retrieval=RUN and ranking=RUN, and no run=")
    if options["history"] is not None:
        raise UserError("history: two stages take user or users; a made-up history has no actions to rank by")
    by = None if options["by"] is None else str(options["by"])
    stages = load_two_stage(options["retrieval"], options["ranking"], options["which"], options["device"])
    shared = {"k": options["k"], "candidates": options["candidates"], "by": by,
              "filter_history": options["filter_history"]}  # fmt: skip
    if options["users"] is None:
        stages.recommend(
            options["user"], request_time=options["request_time"], show_last=options["show_last"], **shared
        ).show()
        return
    started = time.perf_counter()
    written, empty = stages.write_parquet(
        str(options["users"]), options["output"], batch_users=options["batch_users"], **shared
    )
    print_written(written, empty, time.perf_counter() - started, options["output"])
