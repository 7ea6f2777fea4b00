"""Full-ranking evaluation with exact ranks, and the command ``hstu-evaluate`` (ranking: ``ranking_evaluate.py``).

    hstu-evaluate run=RUN [which=best|last] [split=test|validation] [eval.ks=[10]] [eval.filter_history=full]
    hstu-evaluate run=RUN ranks=N [embedding=local|sharded]              on N processes or GPUs of this machine
    torchrun --nproc-per-node=N -m hstu.evaluate run=RUN ...             the same; also on several machines

RUN is a run folder. Options that are not given keep the values of the run's own config. Any number of ranks gives the
result of one. On several, tables lie as in the training: those of embedding=sharded in parts, so that no rank holds one
whole; with local tables each rank has them all, and its part of the users.

Legend: ``M`` targets, ``B`` users in a batch, ``S`` seen items of a batch, ``D`` model width.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hstu import baselines, metrics, report
from hstu.cli import command, run_hydra
from hstu.config import published_row
from hstu.data.splits import Split, Targets, make_split
from hstu.distributed import World
from hstu.errors import UserError, check

if TYPE_CHECKING:
    from rich.console import Console

    from hstu.config import Config
    from hstu.data.store import SequenceStore
    from hstu.model.retrieval import RetrievalModel

ALL_USERS = "all users"
EXACT_TIMES = "users without estimated timestamps"


@dataclass
class RankResult:
    """Exact ranks of the targets that could be ranked."""

    ranks: np.ndarray
    """[M] float64. 1 + candidates that score higher + half of the other candidates with the same score."""
    users: np.ndarray
    """[M] int64, user rows."""
    rows: np.ndarray
    """[M] int64, event row of each target."""
    num_empty: int = 0
    """Targets left out because their user has no event before them."""

    def __len__(self) -> int:
        return len(self.ranks)


def with_history(store: SequenceStore, targets: Targets) -> tuple[Targets, int]:
    """The targets with at least one event before them, and how many have none."""
    users, rows = np.asarray(targets.users), np.asarray(targets.rows)
    keep = rows > np.asarray(store.offsets)[users]
    return Targets(users[keep], rows[keep]), int((~keep).sum())


@torch.inference_mode()
def evaluate(
    model: RetrievalModel, store: SequenceStore, targets: Targets, config: Config, device: torch.device | str = "cpu",
    world: World | None = None,
) -> RankResult:  # fmt: skip
    """Ranks every target against the whole catalogue with the model's scores.

    Scores exist for one batch of users and one block of items at a time (the item table's ``rank``). The model
    is put in evaluation mode and left in the mode it was found in. The ranks of ``world`` take the batches in turns and
    all return the same, whatever their number; one that has no batch left takes part with an empty one, as a table that
    lies on several ranks needs them all.

    Raises UserError if no target has a history.
    """
    from hstu.data.batches import eval_batches

    kept, num_empty = with_history(store, targets)
    if len(kept) == 0:
        raise UserError(f"nothing to evaluate: none of the {len(targets)} held-out events has an event before it")
    world = world or World()
    device, max_len, size = torch.device(device), config.model.max_len, config.eval.batch_users
    places, rounds = turns(len(kept), size, world)
    own = Targets(kept.users[places], kept.rows[places])
    item_ids = store.item_ids
    was_training = model.training
    model.eval()
    ranks, at = np.empty(len(own), dtype=np.float64), 0
    for batch, labels in eval_batches(store, own, max_len, size, least=rounds):
        m = slice(at, at + len(labels))
        starts, ends = baselines.seen_range(store, own.users[m], own.rows[m], config.eval.filter_history, max_len)
        seen_rows, seen_offsets = baselines.expand(starts, ends)
        seen_ids = torch.from_numpy(item_ids[seen_rows].astype(np.int64)).to(device)  # [S]
        queries = model.last(batch.to(device))  # [B, D], or as the table wants them
        batch_ranks = model.table.rank(
            queries, labels.to(device), seen_ids, torch.from_numpy(seen_offsets).to(device), config.eval.chunk_mib
        )
        ranks[m] = batch_ranks.double().cpu().numpy()
        at += len(labels)
    assert at == len(own), f"eval_batches gave {at} targets of {len(own)}"
    model.train(was_training)
    order = np.argsort(world.gather_arrays(places))
    return RankResult(world.gather_arrays(ranks)[order], kept.users, kept.rows, num_empty)


def turns(count: int, size: int, world: World) -> tuple[np.ndarray, int]:
    """Places int64 of this rank where ranks take batches of ``size`` of ``count`` things in turns, and the number of
    batches of the rank with the most. Only the very last batch is smaller, so a rank's own make the same batches."""
    rounds = math.ceil(math.ceil(count / size) / world.size)
    starts = (np.arange(rounds) * world.size + world.rank) * size
    places = (starts[:, None] + np.arange(size)).ravel()
    return places[places < count], rounds


def oracle_ranks(config: Config, store: SequenceStore, targets: Targets) -> np.ndarray | None:
    """Ranks under the true next-item distribution of the synthetic log, float64 [M]; None for other data.

    No model can do better on average: the oracle knows the process, the whole history and the request time.
    """
    if config.data.source != "synthetic":
        return None
    from hstu.data import synthetic

    return synthetic.oracle_ranks(store, targets, config.eval.filter_history, config.model.max_len)


def user_groups(store: SequenceStore, users: np.ndarray) -> dict[str, np.ndarray]:
    """Which rankings each reported group of users holds, bool [M] by name.

    Always all users; where the store flags estimated timestamps also the users who have none.
    """
    groups = {ALL_USERS: np.ones(len(users), dtype=bool)}
    flags = store.columns.get("timestamp_estimated")
    if flags is not None:
        before = np.zeros(len(flags) + 1, dtype=np.int64)
        np.cumsum(np.asarray(flags) != 0, out=before[1:])
        offsets = np.asarray(store.offsets)
        groups[EXACT_TIMES] = before[offsets[users + 1]] == before[offsets[users]]
    return groups


@dataclass
class Row:
    """One line of the result table: a system's metrics over one group of users."""

    system: str
    group: str
    count: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class Evaluation:
    """Everything that ``hstu-evaluate`` prints and writes."""

    rows: list[Row]
    breakdowns: dict[str, list[metrics.Group]]
    num_empty: int
    filter_history: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def assess(config: Config, store: SequenceStore, split: Split, result: RankResult) -> Evaluation:
    """Metrics, intervals, breakdowns and baselines for the model's ranks ``result``.

    The baselines count the training events of ``split`` and rank the same targets with the same filter.
    """
    ks, filter_history = config.eval.ks, config.eval.filter_history
    targets = Targets(result.users, result.rows)
    systems = {config.model.name: result.ranks}
    if config.eval.baselines:
        systems |= baselines.rank_baselines(store, split.train_end, targets, filter_history, config.model.max_len)
    oracle = oracle_ranks(config, store, targets)
    if oracle is not None:
        systems["oracle (true process)"] = oracle
    rows = []
    for group, inside in user_groups(store, result.users).items():
        for system, ranks in systems.items():
            if inside.any():
                intervals = metrics.bootstrap(
                    ranks[inside], result.users[inside], ks, config.eval.bootstrap, seed=config.seed
                )
                values = metrics.summarize(ranks[inside], ks)
                rows.append(Row(system, group, int(inside.sum()), values, intervals))
    times = store.timestamps
    counts = baselines.popularity(store, split.train_end)
    parts = metrics.breakdowns(
        result.ranks,
        result.rows - np.asarray(store.offsets)[result.users],
        counts[store.item_ids[result.rows]],
        times[result.rows] - times[result.rows - 1],
        ks,
    )
    return Evaluation(rows, parts, result.num_empty, filter_history)


def split_targets(split: Split, part: str) -> Targets:
    """The targets of ``test`` or ``validation``."""
    if part == "test":
        return split.test
    if part != "validation":
        raise UserError(f"split={part}: expected test or validation")
    if split.validation is None:
        raise UserError("split=validation: this run held out no validation events (run.selection=reference); use test")
    return split.validation


def override_eval(config: Config, options: dict[str, Any]) -> Config:
    """The run's config with the given ``eval.*`` options (None: keep)."""
    from hstu.config import EvalConfig, build

    values = dataclasses.asdict(config.eval) | {k: v for k, v in options.items() if v is not None}
    return dataclasses.replace(config, eval=build(EvalConfig, values, "eval."))


def dataset_label(store: SequenceStore) -> str:
    """Name of the data set, with the share of estimated timestamps where the store flags them."""
    name = str(store.meta.get("name", store.path.name))
    flags = store.columns.get("timestamp_estimated")
    if flags is None or not np.any(flags):
        return name
    return f"{name}, {100 * np.count_nonzero(flags) / len(flags):.1f} % of the timestamps estimated"


def evaluation_json(
    config: Config, store: SequenceStore, evaluation: Evaluation, part: str, which: str
) -> dict[str, Any]:
    """Content of ``evaluation.json``: what was evaluated, how, with what, and every number."""
    published = dataclasses.asdict(row) if (row := published_row(config)) is not None else {}
    what = what_was_evaluated(config, store, part, which)
    return {"dataset": dataset_label(store), **what, "published": published, **evaluation.to_dict()}


def what_was_evaluated(config: Config, store: SequenceStore, part: str, which: str) -> dict[str, Any]:
    """What every ``evaluation.json`` says beside its numbers: the split, the run, the options, the machine."""
    return {
        "protocol": store.meta.get("protocol"),
        "split_hash": store.meta.get("split_hash"),
        "model": config.model.name,
        "experiment": config.experiment,
        "seed": config.seed,
        "selection": config.run.selection,
        "part": part,
        "checkpoint": which,
        "eval": dataclasses.asdict(config.eval),
        "machine": report.machine(),
        "versions": report.versions(),
        "commit": report.commit(),
    }


def show(evaluation: Evaluation, config: Config, store: SequenceStore, part: str, console: Console) -> None:
    """Prints the metrics beside the baselines and the published row, then the breakdowns."""
    names = metrics.metric_names(config.eval.ks)
    model = config.model.name
    for group in dict.fromkeys(row.group for row in evaluation.rows):
        rows = {row.system: row for row in evaluation.rows if row.group == group}
        columns: dict[str, dict[str, Any]] = {model: rows[model].metrics}
        if rows[model].intervals:
            columns["95 %\ninterval"] = {n: f"{a:.3f}-{b:.3f}" for n, (a, b) in rows[model].intervals.items()}
        columns |= {system: row.metrics for system, row in rows.items() if system != model}
        published = published_row(config)
        if published is not None:
            columns[f"published\n({published.source})"] = dict(published.metrics)
        title = f"{dataset_label(store)}, {part}: {rows[model].count:,} users"
        title += "" if group == ALL_USERS else f" ({group})"
        console.print(report.metrics_table(title, columns, names))
    k = 10 if 10 in config.eval.ks else min(config.eval.ks)
    for kind, groups in evaluation.breakdowns.items():
        console.print(
            report.groups_table(f"{model} on {part}, by {kind}", kind, groups, [f"hr@{k}", f"ndcg@{k}", "mrr"])
        )
    notes = [
        f"items removed from the ranking: {evaluation.filter_history} history",
        f"protocol {store.meta.get('protocol')}",
    ]
    if evaluation.num_empty:
        notes.append(f"left out, no event before the target: {evaluation.num_empty:,} users")
    if config.run.selection == "reference" and part == "test":
        notes.append("best epoch chosen on test (run.selection=reference)")
    console.print("; ".join(notes), soft_wrap=True)


def is_stream(run: Path) -> bool:
    """Whether ``hstu-stream`` made the run."""
    return (run / "stream.json").exists()


def stream_note(run: Path, store: SequenceStore) -> str:
    """What to mind of an evaluation after a stream."""
    said = f"a stream: all of {store.path} was trained on, these events too; numbers from before that are in"
    return f"{said} {run / 'days.json'}"


def plain_options(cfg: Any) -> dict[str, Any]:
    """A command's composed options as plain values; a required one that is missing raises."""
    from omegaconf import OmegaConf

    options = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(options, dict)
    return {str(name): value for name, value in options.items()}


def _check_device(name: str) -> None:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name}: expected auto, cpu or cuda")


def run_device(name: str, local_rank: int | None = None) -> torch.device:
    """``auto`` takes CUDA where it is; ``cuda`` without one raises UserError.

    local_rank: number of the process among those of this machine, each of which needs a GPU of its own; None: alone.
    """
    _check_device(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; use device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank is None:
        return torch.device("cuda")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this machine needs a GPU of its own, torch sees {torch.cuda.device_count()}: start "
            "fewer ranks, or use run.device=cpu"
        )
    return torch.device("cuda", local_rank)


def run_command(options: dict[str, Any]) -> None:
    """What ``hstu-evaluate`` does with the composed options.

    With ``ranks`` it starts the ranks, which call it again and join.
    """
    from hstu.config import RunConfig
    from hstu.launch import join, should_launch, start_ranks

    ranks = options["ranks"]
    check(ranks is None or (isinstance(ranks, int) and ranks >= 1), "ranks", ranks, ">= 1 or null")
    _check_device(options["device"])
    run = RunConfig(ranks=ranks, device=options["device"], max_restarts=0)
    if should_launch({"run": {"ranks": ranks}}):
        return start_ranks(options, "hstu.evaluate", run)
    with join(run) as world:
        evaluate_run(options, world)


def evaluate_run(options: dict[str, Any], world: World | None = None) -> Evaluation | dict[str, Any]:
    """Loads, ranks, prints, writes ``evaluation.json`` into the run folder; the same result on every rank of ``world``.

    Returns the content of that file for a ranking run.
    """
    from hstu.runs import agree_on_run
    from hstu.train import load_run
    from hstu.vocabulary import unknown_shares, unknown_text

    world = world or World(device=run_device(options["device"]))
    run = Path(str(options["run"])).expanduser()
    config, store, model = load_run(run, options["which"], world, options.get("embedding"))
    if config.ranking is not None:
        from hstu.ranking_evaluate import evaluate_ranking_run

        return evaluate_ranking_run(run, config, store, model, options, world)
    trained_eval = config.eval
    config = override_eval(config, options["eval"])
    agree_on_run(world, config, store)
    split = make_split(store, config.run.selection)
    part = options["split"]
    targets = split_targets(split, part)
    started = time.perf_counter()
    result = evaluate(model.to(world.device), store, targets, config, world.device, world)

    def assessed() -> Evaluation:
        from rich.console import Console

        evaluation = assess(config, store, split, result)
        unknown = unknown_shares(model, store, Targets(result.users, result.rows), config.model.max_len)
        seconds = time.perf_counter() - started
        console = Console()
        show(evaluation, config, store, part, console)
        if unknown:
            console.print(unknown_text(unknown))
        usual = part == "test" and options["which"] == "best" and config.eval == trained_eval
        # evaluation.json stays what the training wrote: the best checkpoint on test with the run's own options
        path = run / ("evaluation.json" if usual else f"evaluation-{part}-{options['which']}.json")
        content = evaluation_json(config, store, evaluation, part, options["which"])
        report.write_json(path, content | unknown | {"seconds": seconds})
        if is_stream(run):
            console.print(stream_note(run, store), soft_wrap=True, highlight=False, markup=False)
        console.print(f"{seconds:.1f} s; written to {path}", soft_wrap=True, highlight=False, markup=False)
        return evaluation

    return world.on_first(assessed)


@command
def main() -> None:
    """Console script hstu-evaluate."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "").split("\nLegend", 1)[0])
        return
    run_hydra(lambda cfg: run_command(plain_options(cfg)), "evaluate", folder="commands")


if __name__ == "__main__":
    main()
