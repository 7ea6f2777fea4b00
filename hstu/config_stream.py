"""Options of ``hstu-stream``: one pass over a log in time order."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hstu.errors import check


@dataclass
class StreamConfig:
    """Training day by day (``hstu-stream``)."""

    day_s: int = 86_400
    """Length of a day in seconds; days begin at multiples of it since 1970."""
    utc_offset_hours: float = 0.0
    """Of the clock that days go by, hours ahead of UTC (8: Beijing). watch: dates in paths are of that clock."""
    days: int | None = None
    """Stop after so many days; None: after the last one."""
    eval_users: int | None = None
    """Each day is evaluated, before it is trained on, on so many of its users, drawn at random: retrieval on the first
    event of each who has one before the day, ranking on all their events. 0: all users. None: 10,000 for retrieval,
    which ranks the whole catalogue for each, and all for ranking."""
    lr_decay: float = 1.0
    """Every day the learning rate of the dense part is multiplied by this."""
    table_lr_decay: float = 1.0
    """Likewise of the embedding tables, whose rows for new items still have all to learn."""
    min_lr_fraction: float = 0.1
    """Neither rate falls below this share of where it began."""
    watch: str | None = None
    """Folder in which files of the log arrive (``data=log``), a date in each path; None: the days of the prepared
    store."""
    item_rows: int = 1_000_000
    """watch: rows of the item table, to which raw item ids are hashed."""
    settle_s: float = 30.0
    """watch: a file without ``_SUCCESS`` beside it is complete when it has not changed for so many seconds."""
    timeout_s: float = 3600.0
    """watch: stop when no further day is complete for so many seconds."""

    def __post_init__(self) -> None:
        check(self.day_s >= 1, "stream.day_s", self.day_s, ">= 1")
        check(-24 < self.utc_offset_hours < 24, "stream.utc_offset_hours", self.utc_offset_hours, "in (-24, 24)")
        check(self.days is None or self.days >= 1, "stream.days", self.days, ">= 1 or null")
        eval_users = self.eval_users
        check(eval_users is None or eval_users >= 0, "stream.eval_users", eval_users, ">= 0 or null")
        for name in ("lr_decay", "table_lr_decay"):
            check(0 < getattr(self, name) <= 1, f"stream.{name}", getattr(self, name), "in (0, 1]")
        check(0 <= self.min_lr_fraction <= 1, "stream.min_lr_fraction", self.min_lr_fraction, "in [0, 1]")
        check(self.item_rows >= 1, "stream.item_rows", self.item_rows, ">= 1")
        check(self.settle_s >= 0, "stream.settle_s", self.settle_s, ">= 0")
        check(self.timeout_s >= 0, "stream.timeout_s", self.timeout_s, ">= 0")
        check(self.watch is None or self.day_s == 86_400, "stream.day_s", self.day_s,
              "86400 with stream.watch, whose files carry dates")  # fmt: skip

    @property
    def utc_offset_s(self) -> int:
        return round(self.utc_offset_hours * HOUR_S)

    def settled(self, ranking: bool) -> StreamConfig:
        """With the number of users that ``eval_users=None`` stands for."""
        usual = ALL_USERS if ranking else RETRIEVAL_EVAL_USERS
        return replace(self, eval_users=usual if self.eval_users is None else self.eval_users)


HOUR_S = 3600
ALL_USERS, RETRIEVAL_EVAL_USERS = 0, 10_000
FREE_ON_RESUME = ("days", "settle_s", "timeout_s")
"""Fields that may differ between a run and its continuation."""
