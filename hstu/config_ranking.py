"""Configuration of the ranking half: tasks, actions, features and heads. Part of ``hstu/config.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from hstu.errors import UserError, check, one_of

TASK_KINDS = ("binary", "multiclass", "ordinal", "regression")
ACTION_KINDS = ("binary", "levels", "thresholds")
FEATURE_KINDS = ("categorical", "buckets", "numeric")


def _ascending(name: str, values: list[float], least: int) -> None:
    ok = len(values) >= least and all(a < b for a, b in zip(values, values[1:], strict=False))
    check(ok, name, values, f"at least {least} ascending numbers")


@dataclass
class TaskConfig:
    """One prediction of the ranking model."""

    column: str = "actions"
    """Column of the store that holds the label: ``actions`` or a file of ``columns/``. NaN is a missing label."""
    kind: str = "binary"
    """binary (BCE), multiclass (softmax over ``levels``), ordinal (one score, ordered cut points between ``levels``)
    or regression (squared error)."""
    threshold: float | None = None
    """binary: the label is value >= threshold. None: the column must hold 0 and 1."""
    levels: list[float] = field(default_factory=list)
    """multiclass and ordinal: every value that can occur, ascending."""
    transform: str = "none"
    """regression: none or log1p; the model predicts the transformed, standardised value."""
    mask_column: str | None = None
    """Column of the store; events where it is 0 or missing do not count for this task. None: all count."""
    weight: float = 1.0
    """Of the task's loss in the sum."""

    def __post_init__(self) -> None:
        one_of("ranking.tasks.*.kind", self.kind, TASK_KINDS)
        one_of("ranking.tasks.*.transform", self.transform, ("none", "log1p"))
        check(self.weight >= 0, "ranking.tasks.*.weight", self.weight, ">= 0")
        if self.kind in ("multiclass", "ordinal"):
            _ascending("ranking.tasks.*.levels", self.levels, 2)
        else:
            check(not self.levels, "ranking.tasks.*.levels", self.levels, f"none with kind={self.kind}")
        binary, regression = self.kind == "binary", self.kind == "regression"
        check(binary or self.threshold is None, "ranking.tasks.*.threshold", self.threshold, "null but for kind=binary")
        check(regression or self.transform == "none", "ranking.tasks.*.transform", self.transform,
              "none but for kind=regression")  # fmt: skip


@dataclass
class ActionConfig:
    """One part of the action token: a column of the store turned into bits, each with an embedding."""

    kind: str = "binary"
    """binary (0 or 1), levels (one bit per value of ``levels``), or thresholds (pseudo-actions: one bit per threshold
    that the value reaches). A missing value (NaN) has a bit of its own."""
    levels: list[float] = field(default_factory=list)
    """levels: every value that can occur, ascending."""
    thresholds: list[float] = field(default_factory=list)
    """thresholds: ascending, in the column's unit."""

    def __post_init__(self) -> None:
        one_of("ranking.actions.*.kind", self.kind, ACTION_KINDS)
        for name in ("levels", "thresholds"):
            values = getattr(self, name)
            if self.kind == name:
                _ascending(f"ranking.actions.*.{name}", values, 1)
            else:
                check(not values, f"ranking.actions.*.{name}", values, f"none with kind={self.kind}")


@dataclass
class FeatureConfig:
    """One feature of users, items or events."""

    kind: str = "categorical"
    """categorical (a code for each value), buckets (quantiles of a number, a code each) or numeric (a standardised
    number times a vector)."""
    separator: str | None = None
    """categorical text: several values in one cell, split by this; their embeddings are summed."""
    num_buckets: int = 16
    """buckets: how many."""
    transform: str = "none"
    """numeric: none or log1p, before it is standardised."""
    min_count: int = 1
    """categorical: values that occur less often share one code."""
    hash_rows: int | None = None
    """categorical: instead of a code each, values get one of so many codes by a hash of their text, and those that get
    the same share everything. For values that keep coming: with stream.watch every categorical feature needs it."""

    def __post_init__(self) -> None:
        one_of("ranking.*_features.*.kind", self.kind, FEATURE_KINDS)
        one_of("ranking.*_features.*.transform", self.transform, ("none", "log1p"))
        check(self.num_buckets >= 2, "ranking.*_features.*.num_buckets", self.num_buckets, ">= 2")
        check(self.min_count >= 1, "ranking.*_features.*.min_count", self.min_count, ">= 1")
        rows, name = self.hash_rows, "ranking.*_features.*.hash_rows"
        if rows is not None:
            check(rows >= 1, name, rows, ">= 1 or null")
            check(self.kind == "categorical", name, rows, f"null with kind={self.kind}")
            check(self.min_count == 1, "ranking.*_features.*.min_count", self.min_count, "1 with hash_rows")


@dataclass
class HeadConfig:
    """What maps ``user state * item`` to the tasks."""

    hidden: list[int] = field(default_factory=lambda: [64])
    """Widths of the hidden layers, of the shared trunk or of each expert."""
    shared_experts: int = 0
    """Experts that all tasks use, mixed by a gate of each task; 0 with task_experts 0: one shared trunk."""
    task_experts: int = 0
    """Further experts of each task alone."""
    dropout: float = 0.0
    """After each hidden layer."""

    def __post_init__(self) -> None:
        check(len(self.hidden) > 0 and all(h >= 1 for h in self.hidden), "ranking.head.hidden", self.hidden,
              "widths >= 1")  # fmt: skip
        check(self.shared_experts >= 0, "ranking.head.shared_experts", self.shared_experts, ">= 0")
        check(self.task_experts >= 0, "ranking.head.task_experts", self.task_experts, ">= 0")
        check(0 <= self.dropout < 1, "ranking.head.dropout", self.dropout, "in [0, 1)")


@dataclass
class RankingConfig:
    """Ranking: the action on each item is predicted from the history of items and actions (Zhai et al. 2024, 2.2)."""

    form: str = "interleaved"
    """interleaved: item and action tokens take turns, every event is predicted in one pass. fused: one token for item
    and action, the predicted events are appended as targets with an empty action; half the length."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Name -> what is predicted."""
    actions: dict[str, ActionConfig] = field(default_factory=dict)
    """Column -> how it enters the action token."""
    user_features: dict[str, FeatureConfig] = field(default_factory=dict)
    """Attribute of users -> a prefix token each."""
    item_features: dict[str, FeatureConfig] = field(default_factory=dict)
    """Attribute of items -> added to the item token."""
    event_features: dict[str, FeatureConfig] = field(default_factory=dict)
    """Column of events known before the action, or ``hour_of_day`` or ``day_of_week`` -> added to the item token."""
    use_actions: bool = True
    """false: ``actions`` are left out (ablation); action tokens stay and say nothing."""
    use_features: bool = True
    """false: all features are left out (ablation)."""
    utc_offset_hours: float = 0.0
    """Of ``hour_of_day`` and ``day_of_week``, hours."""
    targets: int = 16
    """fused: events predicted by one sequence, at most; the events before them are its history."""
    stride: int | None = None
    """interleaved: a user with more than model.max_len events is cut into sequences that predict so many events each,
    those before them being context. None: half of model.max_len."""
    mode: str = "epochs"
    """epochs: passes over the training events. progressive: one pass over all events in time order, each predicted
    before it is trained on (progressive validation)."""
    batch_events: int = 4096
    """progressive: events per step, in time order."""
    head: HeadConfig = field(default_factory=HeadConfig)
    calibrate: bool = False
    """Add to the logits of each binary task the number that brings the mean prediction on validation to the mean label;
    baselines that learn are treated alike. It is part of the checkpoint. With run.selection=validation. hstu-stream
    fits it on each day's predictions, before the day is trained on, for the next day."""

    def __post_init__(self) -> None:
        one_of("ranking.form", self.form, ("interleaved", "fused"))
        one_of("ranking.mode", self.mode, ("epochs", "progressive"))
        check(len(self.tasks) > 0, "ranking.tasks", self.tasks, "at least one task")
        for name in self.tasks:
            check(name.isidentifier(), "ranking.tasks", name, "names of letters, digits and _")
        after = {task.column for task in self.tasks.values()} | set(self.actions)
        for name in self.event_features:
            if name in after:
                raise UserError(f"ranking.event_features.{name}: that column is what is predicted or done, and only "
                                "known after the event; leave it out")  # fmt: skip
        check(-24 < self.utc_offset_hours < 24, "ranking.utc_offset_hours", self.utc_offset_hours, "in (-24, 24)")
        check(any(t.weight > 0 for t in self.tasks.values()), "ranking.tasks.*.weight", 0, "> 0 for one task at least")
        check(self.targets >= 1, "ranking.targets", self.targets, ">= 1")
        check(self.stride is None or self.stride >= 1, "ranking.stride", self.stride, ">= 1 or null")
        check(not self.calibrate or self.mode == "epochs", "ranking.calibrate", True, "false with mode=progressive")
        check(self.batch_events >= 1, "ranking.batch_events", self.batch_events, ">= 1")
