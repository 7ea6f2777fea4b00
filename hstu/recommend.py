"""Recommendations from a trained run, and the command ``hstu-recommend``.

    hstu-recommend run=RUN user=42 [k=10]                          one user of the log
    hstu-recommend run=RUN history=[260,1196]                      a made-up history of raw ids
    hstu-recommend run=RUN 'history=["Heat (1995)", 1196]'         or titles; what has spaces or brackets is quoted
    hstu-recommend run=RUN users=all output=recs.parquet           everybody, to Parquet
    hstu-recommend run=RUN users=users.parquet output=recs.parquet the users of column `user`
    hstu-recommend retrieval=RUN ranking=RUN user=42 [by=like]     two stages: items of one run, ranked by the other

From Python::

    recommender = hstu.load("runs/ml-1m/hstu/...")
    result = recommender.recommend(user=42, k=10)
    print(result)

The input is everything the user did, held-out events included. HSTU's time bias knows when the predicted event
happens (the request time): unless ``request_time`` is given that is one minute after the last event. A made-up
history has no times: unless ``history_times`` is given its events lie one minute apart, the last one now.

Legend: ``B`` users in a batch, ``L`` total events, ``S`` items left out, ``D`` model width.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hstu.baselines import expand
from hstu.cli import command, run_hydra
from hstu.data.hashing import hash_ids
from hstu.errors import UserError
from hstu.evaluate import plain_options, run_device

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from hstu.config import Config
    from hstu.data.store import SequenceStore
    from hstu.model.retrieval import RetrievalModel

CACHE_MIB = 256.0
"""Memory of the encoded histories that a :class:`Recommender` keeps."""
REQUEST_GAP_S = 60
"""Assumed time between the last event and the request, and between the events of a made-up history."""


@dataclass
class Item:
    """One recommended item."""

    rank: int
    item: int | str
    """Raw item id."""
    title: str | None
    score: float


@dataclass
class Event:
    """One event of the history."""

    item: int | str
    title: str | None
    time: int
    """Seconds since 1970."""


class Printable:
    """Something that rich prints as tables, and ``print`` too."""

    def show(self) -> None:
        """Prints the tables to the terminal."""
        from rich.console import Console

        Console().print(self)

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=110).print(self)
        return text.getvalue()


def history_table(who: str, history: list[Event], show_last: int) -> Table:
    """The last events of a history, oldest first."""
    from rich.markup import escape
    from rich.table import Table

    last = history[-show_last:] if show_last else []
    table = Table(title=f"{who}: last {len(last)} of {len(history)} events", title_justify="left")
    for column in ("time (UTC)", "item", "title"):
        table.add_column(column)
    for event in last:
        table.add_row(_clock(event.time), escape(str(event.item)), escape(event.title or ""))
    return table


@dataclass
class Recommendations(Printable):
    """The answer for one user; printing it shows the user's last events and the recommended items."""

    items: list[Item]
    history: list[Event]
    """Oldest first."""
    user: int | str | None = None
    """Raw user id; None for a made-up history."""
    skipped: list[int | str] = field(default_factory=list)
    """Entries of a made-up history that are no known item."""
    show_last: int = 10

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        who = "made-up history" if self.user is None else escape(f"user {self.user}")
        new = Table(title=f"{who}: recommended", title_justify="left")
        for column in ("rank", "item", "title", "score"):
            new.add_column(column, justify="right" if column in ("rank", "score") else "left")
        for item in self.items:
            new.add_row(str(item.rank), escape(str(item.item)), escape(item.title or ""), f"{item.score:.4f}")
        yield history_table(who, self.history, self.show_last)
        if self.skipped:
            yield escape(f"skipped, not in this catalogue: {', '.join(map(repr, self.skipped))}")
        yield new


def _clock(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return str(seconds)


class Recommender:
    """A trained model with its data: answers for users of the store and for made-up histories.

    Encoded histories are kept (:class:`hstu.query_cache.QueryCache`), so that a repeated or grown one costs only what
    is new; scores then agree with a pass over everything to the noise of the dtype. Models that cannot do this
    (other encoders, ``model.divisor=max_len``, ``model.full_rows``) take that pass. The batch form always does.

    Args:
        config, store: of the run.
        model: its weights may not change from here on.
        device: auto, cpu or cuda.
        cache_mib: memory of the kept histories; 0: none are kept.
    """

    def __init__(
        self, config: Config, store: SequenceStore, model: RetrievalModel, device: str = "auto",
        cache_mib: float = CACHE_MIB,
    ) -> None:  # fmt: skip
        from hstu.query_cache import QueryCache, can_cache

        if not cache_mib >= 0:
            raise UserError(f"cache_mib={cache_mib}: expected >= 0")
        self.config, self.store = config, store
        self.device = run_device(device)
        self.model = model.to(self.device).eval()
        self.queries = QueryCache(self.model, cache_mib) if cache_mib and can_cache(self.model) else None
        """None: every history is encoded from its first event."""
        self.titles = store.item_attribute("title")
        self._user_order = np.argsort(store.user_raw_ids, kind="stable")
        self._item_order = np.argsort(store.item_raw_ids, kind="stable")
        self._by_title: dict[str, list[int]] | None = None
        self.hashed = store.meta.get("source") == "stream"
        """Items are the rows that raw ids were hashed to (:class:`hstu.data.watch.WatchedDays`)."""
        self._rare = rare_item(store)

    # Ids

    def user_row(self, user: int | str) -> int:
        """Row of raw user id ``user``; UserError, with ids that exist, where there is none."""
        raw = self.store.user_raw_ids
        row = find_raw(raw, self._user_order, user)
        if row is None:
            examples = ", ".join(str(u) for u in raw[: min(3, len(raw))])
            raise UserError(
                f"user={user}: no such user among {len(raw):,} in {self.store.path.name}; examples: {examples}"
            )
        return row

    def item_id(self, entry: int | str) -> int | None:
        """Item id of a raw id or a title (upper and lower case are equal); None where neither is known.

        Raises UserError for a title that several items share.
        """
        if self.hashed:
            return int(hash_ids(np.array([str(entry)]))[0] % np.uint64(self.store.num_items)) + 1
        row = find_raw(self.store.item_raw_ids, self._item_order, entry)
        if row is not None:
            return row + 1
        if not isinstance(entry, str) or self.titles is None:
            return None
        if self._by_title is None:
            self._by_title = {}
            for i, title in enumerate(self.titles):
                self._by_title.setdefault(str(title).casefold().strip(), []).append(i + 1)
        found = self._by_title.get(entry.casefold().strip(), [])
        if len(found) > 1:
            ids = ", ".join(str(self.store.item_raw_ids[i - 1]) for i in found)
            raise UserError(f"history: title {entry!r} is shared by items {ids}; give the id")
        return found[0] if found else None

    def _resolve(self, history: Sequence[int | str]) -> tuple[np.ndarray, np.ndarray, list[int | str]]:
        """Item ids of the known entries, their places, and the unknown entries."""
        if isinstance(history, str | bytes) or len(history) == 0:
            raise UserError(f"history={history!r}: expected a list of at least one item id or title")
        ids = [self.item_id(entry) for entry in history]
        skipped = [entry for entry, item in zip(history, ids, strict=True) if item is None]
        if len(skipped) == len(history):
            known = self.store.item_raw_ids[:3]
            hint = f"ids such as {', '.join(str(i) for i in known)}"
            texts = [entry for entry in skipped if isinstance(entry, str)]
            if texts and self._by_title:
                close = difflib.get_close_matches(texts[0].casefold(), list(self._by_title), n=1, cutoff=0.5)
                hint = f"did you mean {str(self.titles[self._by_title[close[0]][0] - 1])!r}?" if close else hint  # type: ignore[index]
            raise UserError(f"history: none of {len(history)} items is in the catalogue ({skipped[0]!r}, ...); {hint}")
        places = np.array([p for p, item in enumerate(ids) if item is not None], dtype=np.int64)
        return np.array([item for item in ids if item is not None], dtype=np.int64), places, skipped

    # Scoring

    def _filter(self, filter_history: str | None) -> str:
        value = filter_history or ("none" if self.config.eval.filter_history == "none" else "full")
        if value not in ("truncated", "full", "none"):
            raise UserError(f"filter_history={value}: expected truncated, full or none")
        return value

    def _read(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the events that the model reads of histories at offsets [B+1], and offsets [B+1] of these."""
        return expand(np.maximum(offsets[:-1], offsets[1:] - self.config.model.max_len), offsets[1:])

    @torch.inference_mode()
    def _queries(
        self, items: np.ndarray, times: np.ndarray, offsets: np.ndarray, request_times: np.ndarray, users: np.ndarray
    ) -> torch.Tensor:
        """Queries [B, ...] by a pass over everything.

        items, times: [L] whole histories, oldest first; offsets: [B+1]; request_times: [B] s; users: [B].
        """
        from hstu.data.batches import Batch

        rows, short = self._read(offsets)
        followed = np.append(times[1:], 0)  # time of the next event; the last one's is the request
        followed[offsets[1:] - 1] = request_times
        tensor = torch.from_numpy
        batch = Batch(
            offsets=tensor(short), item_ids=tensor(items[rows]), timestamps=tensor(times[rows]),
            request_times=tensor(followed[rows]), labels=torch.zeros(len(rows), dtype=torch.int64),
            users=tensor(users), max_len=int(np.diff(short).max()),
        )  # fmt: skip
        return self.model.last(batch.to(self.device))

    @torch.inference_mode()
    def _topk(
        self, queries: torch.Tensor, items: np.ndarray, offsets: np.ndarray, k: int, filter_history: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [B, k] and item ids int64 [B, k]; id 0 where fewer than k items are left.

        queries: [B, ...]; items: [L] whole histories; offsets: [B+1].
        """
        seen, seen_offsets = items, offsets
        if filter_history == "truncated":
            rows, seen_offsets = self._read(offsets)
            seen = items[rows]
        if filter_history == "none":
            seen, seen_offsets = items[:0], np.zeros_like(offsets)
        if self._rare is not None:
            ends = seen_offsets[1:]
            seen, seen_offsets = np.insert(seen, ends, self._rare), seen_offsets + np.arange(len(offsets))
        k = min(k, self.store.num_items)
        best, found = self.model.table.topk(
            queries, k, torch.from_numpy(seen).to(self.device), torch.from_numpy(seen_offsets).to(self.device),
            self.config.eval.chunk_mib,
        )  # fmt: skip
        scores = best.float().cpu().numpy()
        return scores, np.where(np.isfinite(scores), found.cpu().numpy(), 0)

    def recommend(
        self,
        user: int | str | None = None,
        history: Sequence[int | str] | None = None,
        k: int = 10,
        history_times: Sequence[int] | None = None,
        request_time: int | None = None,
        filter_history: str | None = None,
        show_last: int = 10,
    ) -> Recommendations:
        """The ``k`` best items for a user of the store (``user``, raw id) or for a made-up ``history``.

        history: raw item ids or titles, oldest first. Unknown ones are left out and listed in ``skipped``.
        history_times: seconds since 1970, one per entry of history, not descending.
        request_time: seconds since 1970 at which the recommended item would be taken.
        filter_history: items left out: ``full`` (every item of the history), ``truncated`` (those the model
            reads) or ``none``; None: full, but none for a run evaluated with ``eval.filter_history=none``.

        Raises UserError for an unknown user, a user without events, or a history of unknown items only.
        """
        if k < 1:
            raise UserError(f"k={k}: expected >= 1")
        chosen = self._filter(filter_history)
        query, items, times, skipped = self._ask(user, history, history_times, request_time)
        scores, ids = self._topk(query, items, np.array([0, len(items)], dtype=np.int64), k, chosen)
        found = [
            Item(rank, self._raw(int(i)), self._title(int(i)), float(s))
            for rank, (i, s) in enumerate(zip(ids[0], scores[0], strict=True), 1)
            if i > 0
        ]
        past = [Event(self._raw(int(i)), self._title(int(i)), int(t)) for i, t in zip(items, times, strict=True)]
        return Recommendations(found, past, user, skipped, show_last)

    def query(
        self,
        user: int | str | None = None,
        history: Sequence[int | str] | None = None,
        history_times: Sequence[int] | None = None,
        request_time: int | None = None,
    ) -> np.ndarray:
        """The vector [1, D] float32 whose dot products with the exported item vectors are the scores.

        Arguments as in :meth:`recommend`. Raises UserError where a score is no dot product of two vectors.
        """
        from hstu.export import as_scored, check_vectors

        check_vectors(self.model)
        query = self._ask(user, history, history_times, request_time)[0]
        return as_scored(self.model.table, query).cpu().numpy()

    def _ask(
        self,
        user: int | str | None,
        history: Sequence[int | str] | None,
        history_times: Sequence[int] | None,
        request_time: int | None,
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray, list[int | str]]:
        """Query [1, ...] of a user or a made-up history, its items and times [L], and the entries that are unknown."""
        if (user is None) == (history is None):
            raise UserError("recommend: expected either user or history")
        skipped: list[int | str] = []
        row = -1
        if history is None:
            assert user is not None
            row = self.user_row(user)
            begin, end = int(self.store.offsets[row]), int(self.store.offsets[row + 1])
            if begin == end:
                raise UserError(f"user={user} has no events, so there is nothing to recommend from; give history=[...]")
            items = np.asarray(self.store.item_ids[begin:end]).astype(np.int64)
            times = np.asarray(self.store.timestamps[begin:end]).astype(np.int64)
        else:
            items, places, skipped = self._resolve(history)
            times = self._history_times(history, history_times)[places]
        request = int(times[-1]) + REQUEST_GAP_S if request_time is None else int(request_time)
        if request < times[-1]:
            raise UserError(f"request_time={request}: expected no earlier than the last event, {int(times[-1])}")
        if self.queries is None:
            offsets = np.array([0, len(items)], dtype=np.int64)
            query = self._queries(items, times, offsets, np.array([request]), np.array([row]))
        else:
            max_len = self.config.model.max_len
            query = self.queries.query(items[-max_len:], times[-max_len:], request, row)
        return query, items, times, skipped

    def _history_times(self, history: Sequence[int | str], times: Sequence[int] | None) -> np.ndarray:
        if times is None:
            return int(time.time()) + REQUEST_GAP_S * np.arange(1 - len(history), 1, dtype=np.int64)
        given = np.array(times, dtype=np.int64)
        if len(given) != len(history):
            raise UserError(
                f"history_times has {len(given)} entries, history has {len(history)}: expected one time per item"
            )
        if np.any(np.diff(given) < 0):
            raise UserError("history_times: expected times that do not descend (oldest event first)")
        return given

    def _raw(self, item: int) -> int | str:
        return self.store.item_raw_ids[item - 1].item()

    def _title(self, item: int) -> str | None:
        return None if self.titles is None else str(self.titles[item - 1])

    # Batch form

    def recommend_many(
        self, rows: np.ndarray, k: int = 10, filter_history: str | None = None, batch_users: int = 512
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For blocks of users ``rows`` (user rows with events): ``(rows [B], scores [B, k], item ids [B, k])``."""
        if k < 1 or batch_users < 1:
            raise UserError(f"k={k}, batch_users={batch_users}: expected >= 1")
        chosen = self._filter(filter_history)
        store_offsets = np.asarray(self.store.offsets)
        for start in range(0, len(rows), batch_users):
            block = rows[start : start + batch_users]
            events, offsets = expand(store_offsets[block], store_offsets[block + 1])
            items = np.asarray(self.store.item_ids)[events].astype(np.int64)
            times = np.asarray(self.store.timestamps)[events].astype(np.int64)
            request_times = times[offsets[1:] - 1] + REQUEST_GAP_S
            queries = self._queries(items, times, offsets, request_times, block)
            yield block, *self._topk(queries, items, offsets, k, chosen)

    def write_parquet(
        self, users: str, output: str | Path, k: int = 10, filter_history: str | None = None, batch_users: int = 512
    ) -> tuple[int, int]:
        """Writes recommendations of many users to Parquet: columns user, rank, item, title (if any), score.

        users: ``all``, or a Parquet file with a column ``user`` of raw user ids.
        Returns the number of users written, and of users left out because they have no events.
        """
        pl = polars_module()
        path = output_path(output)
        rows, num_empty = self.batch_rows(users)
        blocks = list(self.recommend_many(rows, k, filter_history, batch_users))
        ids = np.concatenate([ids for _, _, ids in blocks])  # [users, k]
        scores = np.concatenate([scores for _, scores, _ in blocks])
        owner = np.repeat(np.concatenate([block for block, _, _ in blocks]), ids.shape[1])
        rank = np.tile(np.arange(1, ids.shape[1] + 1, dtype=np.int32), len(ids))
        keep = ids.ravel() > 0
        item = ids.ravel()[keep] - 1
        columns = {
            "user": np.asarray(self.store.user_raw_ids)[owner[keep]],
            "rank": rank[keep],
            "item": np.asarray(self.store.item_raw_ids)[item],
        }
        if self.titles is not None:
            columns["title"] = np.asarray(self.titles)[item]
        write_frame(pl.DataFrame({**columns, "score": scores.ravel()[keep]}), path)
        return len(rows), num_empty

    def batch_rows(self, users: str) -> tuple[np.ndarray, int]:
        """User rows with events of ``all`` users or of those in a Parquet file, and how many have none."""
        rows = np.arange(self.store.num_users) if users == "all" else self._rows_of(Path(users).expanduser())
        has_events = np.diff(np.asarray(self.store.offsets))[rows] > 0
        if not has_events.any():
            raise UserError(f"users={users}: none of {len(rows)} users has an event")
        return rows[has_events], int((~has_events).sum())

    def _rows_of(self, path: Path) -> np.ndarray:
        """User rows of the raw ids in column ``user`` of a Parquet file."""
        pl = polars_module()
        if not path.exists():
            raise UserError(f"users={path}: no such file; expected all, or a Parquet file with a column user")
        try:
            frame = pl.read_parquet(path)
        except Exception as error:  # polars has many error classes for a file that is no Parquet
            raise UserError(f"users={path}: not readable as Parquet ({str(error).splitlines()[0]})") from None
        if "user" not in frame.columns:
            raise UserError(f"users={path}: no column user, found {', '.join(frame.columns)}")
        wanted = frame["user"].drop_nulls().unique(maintain_order=True).to_list()
        return np.array([self.user_row(user) for user in wanted], dtype=np.int64)


def rare_item(store: SequenceStore) -> int | None:
    """Item id of the rare-item bucket, which stands for no single item and is never recommended."""
    from hstu.data.store import RARE_ITEM

    if store.num_items == 0:
        return None
    last = store.item_raw_ids[-1]
    is_rare = str(last) == RARE_ITEM or (not isinstance(last, str) and int(last) == -1)
    return store.num_items if is_rare else None


def find_raw(raw: np.ndarray, order: np.ndarray, value: int | str) -> int | None:
    """Place of ``value`` in ``raw`` by binary search in ``raw[order]``; numbers and their text are equal."""
    if raw.dtype.kind in "iu":
        try:
            key: Any = int(value)
        except (ValueError, TypeError, OverflowError):
            return None
        if key != value and not isinstance(value, str) or abs(key) > np.iinfo(np.int64).max:
            return None
    else:
        key = str(value)
    at = int(np.searchsorted(raw, key, sorter=order))
    return int(order[at]) if at < len(raw) and raw[order[at]] == key else None


def output_path(output: str | Path) -> Path:
    """Where the batch form writes; UserError where there is no such folder."""
    path = Path(output).expanduser()
    if not path.parent.is_dir():
        raise UserError(f"output={output}: folder {path.parent} does not exist")
    return path


def write_frame(frame: Any, path: Path) -> None:
    """Writes a polars frame as Parquet: all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        frame.write_parquet(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"output={path}: could not be written ({error})") from None


def polars_module() -> Any:
    """polars, which the batch form needs."""
    try:
        import polars
    except ImportError:
        raise UserError("the batch form needs polars to read and write Parquet: pip install polars") from None
    return polars


def load(run: str | Path, which: str = "best", device: str = "auto", cache_mib: float = CACHE_MIB) -> Recommender:
    """Loads the ``best`` or ``last`` checkpoint of run folder ``run`` for recommending.

    The host's memory has to hold the tables, in float32; ``hstu-export`` writes item vectors without.
    """
    from hstu.train import load_run

    config, store, model = load_run(Path(run).expanduser(), which=which)
    if config.ranking is not None:
        raise UserError(
            f"run={run} is a ranking run: it predicts actions on given items and recommends none; add a retrieval run, "
            "as in retrieval=RUN ranking=RUN"
        )
    return Recommender(config, store, model, device, cache_mib)


def recommend_run(options: dict[str, Any]) -> None:
    """What ``hstu-recommend`` does."""
    given = [name for name in ("user", "history", "users") if options[name] is not None]
    if len(given) != 1:
        raise UserError(f"give exactly one of user, history and users, got {', '.join(given) or 'none'}")
    if (options["users"] is None) != (options["output"] is None):
        raise UserError("the batch form takes both: users=all (or a Parquet file) and output=FILE.parquet")
    if options["users"] is not None:
        polars_module()
    if options["retrieval"] is not None or options["ranking"] is not None:
        from hstu.two_stage import two_stage_run

        two_stage_run(options)
        return
    if options["run"] is None:
        raise UserError("run is not set: give run=RUN, or retrieval=RUN ranking=RUN")
    recommender = load(options["run"], options["which"], options["device"])
    if recommender.hashed:
        store = recommender.store
        print(
            f"histories up to {store.meta['day']}; an item is shown as the row of {store.num_items:,} that its raw id "
            "is hashed to, a history is given by raw ids"
        )
    if options["users"] is not None:
        started = time.perf_counter()
        written, empty = recommender.write_parquet(
            str(options["users"]), options["output"], options["k"], options["filter_history"], options["batch_users"]
        )
        print_written(written, empty, time.perf_counter() - started, options["output"])
        return
    history = options["history"]
    recommender.recommend(
        user=options["user"],
        history=[history] if isinstance(history, int | str) else history,
        k=options["k"],
        history_times=options["history_times"],
        request_time=options["request_time"],
        filter_history=options["filter_history"],
        show_last=options["show_last"],
    ).show()


def print_written(num_users: int, num_empty: int, seconds: float, output: str) -> None:
    """What the batch form says last."""
    left_out = f"; {num_empty:,} users without events left out" if num_empty else ""
    print(f"{num_users:,} users, {seconds:.1f} s, written to {output}{left_out}")


@command
def main() -> None:
    """Console script hstu-recommend."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "").split("\nLegend", 1)[0])
        return
    run_hydra(lambda cfg: recommend_run(plain_options(cfg)), "recommend", folder="commands")


if __name__ == "__main__":
    main()
