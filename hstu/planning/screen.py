"""What ``hstu-plan`` prints: one screen of tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hstu.planning.config import GIB
from hstu.planning.cost import Step, Transfer
from hstu.planning.features import ASSUMED_ROWS
from hstu.planning.memory import Memory, Part
from hstu.planning.search import Mend, Plan
from hstu.planning.sharding import Sharding
from hstu.planning.tables import is_replicated

WIDE = 110
"""Columns from which on tables show everything."""
SHOWN_MENDS = 6


def show(
    plan: Plan, sharding: Sharding | None, has_torchrec: bool, smallest: int | None,
    both_ways: tuple[list[Transfer], list[Transfer]] | None, mends: Sequence[Mend], note: str,
    console: Console | None = None,
) -> None:  # fmt: skip
    """Prints the plan."""
    console = console or Console()
    console.print(_head(plan))
    wide = console.width >= WIDE
    grid = Table.grid(padding=(0, 2 if wide else 1))
    grid.add_row(
        _memory_table(plan.memory, wide), Group(_time_table(plan.step, wide), _transfer_table(plan.step, wide))
    )
    console.print(grid)
    for line in _conclusions(plan, sharding, has_torchrec, smallest, both_ways):
        console.print(line)
    if mends:
        console.print(_mend_table(plan, mends))
    console.print(Text(note, style="dim"))


def _head(plan: Plan) -> Panel:
    table, cluster, work = plan.config.embedding, plan.config.cluster, plan.work
    sheet, model = cluster.sheet, plan.config.model
    goal, users = ("ranking", "sequences") if plan.config.ranking is not None else (plan.config.loss.name, "users")
    items = "items" if table.ids == "exact" else f"rows for items ({table.ids})"
    lines = [
        f"{model.name} D={model.dim}, {model.num_blocks} layers, {model.num_heads} heads; {table.rows:,} {items}, "
        f"{table.dtype} rows, {table.optimizer}; {goal}, {plan.config.precision}",
        f"{cluster.gpus} x {cluster.gpu} in nodes of {sheet.gpus_per_node}: {sheet.hbm_gib:g} GiB, "
        f"{sheet.hbm_gbps:,g} GB/s, {plan.config.peak_tflops:g} TFLOP/s; NVLink {sheet.nvlink_gbps:g}, network "
        f"{sheet.network_gbps:g} GB/s a GPU",
        f"{work.tokens:,.0f} tokens a GPU, {work.users:,.0f} {users} of {work.tokens / work.users:,.0f} on average, "
        f"at most {work.longest:,}",
    ]
    if plan.config.ranking is not None:
        lines.insert(1, _ranking_line(plan))
    return Panel("\n".join(lines), title="hstu-plan", title_align="left", expand=False)


def _ranking_line(plan: Plan) -> str:
    """What is ranked, from what."""
    ranking, features, work = plan.config.ranking, plan.config.all_features, plan.work
    assert ranking is not None
    rows = sum(table.rows for table in features.tables)
    return (
        f"{ranking.form}, tasks {', '.join(ranking.tasks)}: {work.predicted:,.0f} predictions of {work.events:,.0f} "
        f"events; {len(features.tables)} feature tables with {rows:,} rows, {features.num_prefix} prefix tokens"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1))
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _memory_table(memory: Memory, wide: bool) -> Table:
    table = _table("Memory of the fullest GPU", "part", "GiB", *(["share"] if wide else []))

    def add(name: str, value: str, share: str, style: str = "") -> None:
        cells = (name, value, share) if wide else (name, value)
        table.add_row(*(Text(cell, style=style) for cell in cells))

    for part in merged_layers(memory.parts):
        add(part.name, f"{part.bytes / GIB:,.2f}", f"{part.bytes / memory.total:.0%}")
    style = "green" if memory.total <= memory.limit else "bold red"
    add("total", f"{memory.total / GIB:,.2f}", "", style)
    add("can be used", f"{memory.limit / GIB:,.2f}", "")
    if memory.host:
        add("host memory of a node", f"{memory.host / GIB:,.0f}", "", "" if memory.host <= memory.host_limit else "red")
        add("can be used of it", f"{memory.host_limit / GIB:,.0f}", "")
    return table


def merged_layers(parts: Sequence[Part]) -> list[Part]:
    """Equal layers in one line."""
    layers = [part for part in parts if part.name.startswith("kept: layer")]
    merged: list[Part] = []
    for part in parts:
        if part not in layers:
            merged.append(part)
        elif part is layers[0]:
            name = f"kept: {len(layers)} layers of {part.bytes / GIB:.2f}" if len(layers) > 1 else part.name
            merged.append(Part(name, sum(layer.bytes for layer in layers)))
    return merged


def _time_table(step: Step, wide: bool) -> Table:
    columns = ("part", "ms", "TFLOP", "GB", "waits for") if wide else ("part", "ms", "waits for")
    table = _table("Time of a step: computing", *columns)
    for part in step.parts:
        work = (_few(part.flops / 1e12), _few(part.bytes / 1e9)) if wide else ()
        table.add_row(part.name, _ms(part.seconds), *work, part.resource)
    return table


def _transfer_table(step: Step, wide: bool) -> Table:
    table = _table("and communication", "part", "ms", "GB sent", *(["GB off node"] if wide else []))
    for part in step.transfers:
        away = (_few(part.outside / 1e9),) if wide else ()
        table.add_row(part.name, _ms(part.seconds), _few(part.sent / 1e9), *away)
    if not step.transfers:
        table.add_row("none: one GPU", "", "")
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"


def _few(value: float) -> str:
    """Three digits; nothing for nothing."""
    return "" if value == 0 else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _conclusions(
    plan: Plan, sharding: Sharding | None, has_torchrec: bool, smallest: int | None,
    both_ways: tuple[list[Transfer], list[Transfer]] | None,
) -> list[Text]:  # fmt: skip
    step, memory = plan.step, plan.memory
    lines = []
    if memory.fits:
        shares = sorted(step.by_resource().items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {seconds / step.seconds:.0%}" for name, seconds in shares)
        longest = max(shares, key=lambda item: item[1])[1]
        lines.append(Text(
            f"Step {_ms(step.seconds)} ms ({_ms(longest)} if all overlapped): {step.tokens_per_s / 1e6:,.3g} M "
            f"tokens/s, limited by {step.limited_by} ({parts})", style="bold",
        ))  # fmt: skip
    else:
        lines.append(Text("Does not fit: limited by memory", style="bold red"))
    few = "none up to 32,768 GPUs fits" if smallest is None else f"{smallest} GPU{'s' * (smallest > 1)}"
    lines.append(Text(f"Smallest cluster of this kind that fits: {few}"))
    if both_ways is not None:
        queries_s, rows_s = (sum(t.seconds for t in way) for way in both_ways)
        cheaper = "queries" if queries_s <= rows_s else "rows"
        lines.append(Text(
            f"Loss over shards: queries travel {_ms(queries_s)} ms (as built), rows would {_ms(rows_s)} ms; {cheaper} "
            "are cheaper here"
        ))  # fmt: skip
    lines.append(Text(_sharding_line(sharding, has_torchrec, plan)))
    if assumed := [table for table in plan.config.all_features.tables if table.assumed]:
        names = ", ".join(table.name for table in assumed)
        say = f"features='{{{assumed[0].name}: ...}}'"
        lines.append(Text(f"Features of which nothing is said, {ASSUMED_ROWS:,} rows each: {names}; say {say}"))
    return lines


def _sharding_line(sharding: Sharding | None, has_torchrec: bool, plan: Plan) -> str:
    if is_replicated(plan.config):
        why = "kind=local" if plan.config.embedding.kind == "local" else "sharding=data_parallel"
        return f"Table: whole on every GPU (embedding.{why})"
    if not has_torchrec:
        return f"Table: {plan.config.embedding.sharding} by our arithmetic alone; torchrec is not installed"
    assert sharding is not None
    if not sharding.found:
        return f"Table: {plan.config.embedding.sharding} by our arithmetic; torchrec's planner: {sharding.note}"
    others = f", {len(sharding.features)} of features" if sharding.features else ""
    return (
        f"Table: {sharding.sharding} over {sharding.shards} shards{others} by torchrec's planner, with rows on their "
        f"way {sharding.hbm_bytes / GIB:,.2f} GiB; by our arithmetic {sharding.ours_bytes / GIB:,.2f}"
    )


def _mend_table(plan: Plan, mends: Sequence[Mend]) -> Table:
    table = _table("What would help", "option", "GiB a GPU", "host GiB", "ms a step", "fits")
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for mend in mends[:SHOWN_MENDS]:
        memory = mend.plan.memory
        host = f"{memory.host / GIB:,.0f}" if memory.host else ""
        table.add_row(mend.option, f"{memory.total / GIB:,.1f}", host, _ms(mend.plan.step.seconds),
                      "yes" if mend.fits else "no")  # fmt: skip
    return table
