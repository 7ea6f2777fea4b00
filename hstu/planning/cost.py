"""Time of a training step by part: what GPUs send each other, products, and bytes moved in memory.

Every part is its work over a stated share of the machine's peak; nothing is assumed to overlap, so that the sum is
careful and the largest part a bound from below.

Legend: T tokens of a GPU, P = N T positions of all, D model width, H heads, A query/key width, V value width per head,
R negatives per position, N GPUs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hstu.config_model import FuXiLinearConfig, HSTUConfig, SASRecConfig
from hstu.feature_tables import BAGS
from hstu.planning.config import DTYPE_BYTES, FLOAT, INT64, PlanConfig
from hstu.planning.layers import early_workspace, fuxi_chunks, layer_bytes, shared_bytes
from hstu.planning.losses import DRAW_BYTES, bank_items, distinct, rectangle_width, scored_rows
from hstu.planning.memory import dense_parameters
from hstu.planning.mixture import is_mixture, mixture_flops, pair_bytes, query_bytes
from hstu.planning.ranking import head_bytes, head_flops, token_bytes
from hstu.planning.tables import (
    Lookup,
    busiest,
    column_parts,
    is_replicated,
    lookups,
    num_shards,
    optimizer_bytes,
    row_width,
    whole_gradients,
)
from hstu.planning.updates import average_bytes, labels_of, map_moved_bytes, moves_in_torch
from hstu.planning.work import Workload

BACKWARD_ATTENTION = 2.5
"""Times the forward: five products, of which two are computed again (as benchmarks/ops/attention.py counts)."""
PRODUCTS_OF_QK, PRODUCTS_OF_V = 5, 4
"""Products of width A and of width V that the Triton kernels of HSTU's attention do for a pair: two forward, three in
the backward kernel for q and its bias, four in that for k and v (kernels/attention/README.md)."""
PASSES_OF_QK, PASSES_OF_V = 8, 7
"""How often the same three kernels read or write q, k (or a gradient as large) and v, the output (or theirs)."""
TOUCHES = 6.0
"""A number that a layer keeps is written, read by the next op, read in the backward pass; so is its gradient. Of an
HSTU layer with H A = H V = D under autocast that is 84 D bytes a token. What its kernels apart from products and
attention read and write, one by one for D > 256 (norm twice, gate, gradients narrowed, joined and added), is 72."""
SOFTMAX_PASSES = 12.0
"""Softmax attention written out in steps moves each weight so often, forward and backward."""
ADAMW_FLOATS = 7.0
"""AdamW reads weight, gradient and two moments of a number and writes all but the gradient."""
AVERAGE_PASSES = 3.0
"""The average is read and written, the weights are read."""
TABLE_PASSES = {"torch": 12.0, "triton": 5.0, "ranking": 2.0}
"""A local table is gone through so often beside AdamW: its gradients from the events and from the loss are made and
added; on the torch path it is normalised as a whole, forward and backward. Ranking only makes that from the events."""
GATHER_FLOATS = 2.0
"""The backward of a sampled loss adds to a float32 gradient: read and write."""


@dataclass(frozen=True)
class Transfer:
    """One collective of a step, or several alike."""

    name: str
    sent: float
    """Bytes that a GPU sends (the busiest one)."""
    outside: float
    """Of them, those that leave the node through the GPU's share of its network cards."""
    seconds: float
    calls: int = 1

    def times(self, count: int) -> Transfer:
        """So often."""
        return Transfer(self.name, count * self.sent, count * self.outside, count * self.seconds, count * self.calls)


class Network:
    """Time of collectives over ``cluster.gpus`` GPUs in nodes of ``gpus_per_node``."""

    def __init__(self, config: PlanConfig) -> None:
        sheet, cluster = config.cluster.sheet, config.cluster
        self.gpus = cluster.gpus
        self.node = min(sheet.gpus_per_node, self.gpus)
        self.nvlink = sheet.nvlink_gbps * 1e9 * cluster.network_fraction
        self.card = sheet.network_gbps * 1e9 * cluster.network_fraction
        self.start_s = cluster.collective_us * 1e-6

    def _transfer(self, name: str, sent: float, outside: float, inside: float, calls: int) -> Transfer:
        seconds = max(inside / self.nvlink, outside / self.card) + calls * self.start_s
        return Transfer(name, sent, outside, seconds, calls)

    def all_to_all(self, name: str, size: float, calls: int = 1) -> Transfer:
        """size: bytes that a GPU has for all GPUs, itself included, evenly."""
        other, away = (self.gpus - 1) / self.gpus, (self.gpus - self.node) / self.gpus
        return self._transfer(name, size * other, size * away, size * (other - away), calls)

    def all_gather(self, name: str, size: float, calls: int = 1, passes: int = 1) -> Transfer:
        """size: bytes of the result, on every GPU. A reduce-scatter takes as much; an all-reduce two passes.

        Rings over the nodes, one for each network card: a GPU's card carries its share of what enters the node.
        """
        nodes = -(-self.gpus // self.node)
        sent = passes * size * (self.gpus - 1) / self.gpus
        outside = passes * size * (nodes - 1) / nodes / self.node
        return self._transfer(name, sent, outside, sent, calls)


def transfers(config: PlanConfig, work: Workload) -> list[Transfer]:
    """What a batch sends, by part; empty on one GPU."""
    if config.cluster.gpus == 1:
        return []
    network, spread = Network(config), [x for x in lookups(config, work) if not is_replicated(x.config)]
    parts = _lookup(network, "events", [x for x in spread if x.of == "events"])
    if config.ranking is None and not is_replicated(config):
        parts += loss_transfers(config, work)
    parts += _lookup(network, "features", [x for x in spread if x.of != "events"])
    return parts


def update_transfers(config: PlanConfig, work: Workload) -> list[Transfer]:
    """What is sent once a step, after or before its batches."""
    if config.cluster.gpus == 1:
        return []
    network = Network(config)
    dense = FLOAT * float(dense_parameters(config)) + whole_gradients(config, work)
    parts = [network.all_gather("gradients of dense weights", dense, 1, passes=2)]
    if config.embedding.ids == "managed":
        parts.append(network.all_gather("ids for the map", labels_of(config, work) * INT64, 2))
    return parts


def _lookup(network: Network, what: str, tables: Sequence[Lookup]) -> list[Transfer]:
    """Ids to the GPUs that have their rows, rows back, gradients there; rows: those that a GPU asks for."""
    if not tables:
        return []
    ids, rows, lengths = [], [], 0.0
    for table in tables:
        config = table.config
        asked = table.rows * max(1.0, network.gpus / num_shards(config))  # by all GPUs of the few that have all rows
        # Lengths go first; those of what is scored go with those of the events.
        lengths += network.gpus * (2 if table.of == "events" else 1) * BAGS * INT64
        ids.append((config, asked * column_parts(config) * INT64))
        rows.append((config, asked * row_width(config) * DTYPE_BYTES[config.embedding.comm_dtype]))
    exchanges = len({table.of for table in tables})
    return [
        network.all_to_all(f"ids of {what}", busiest(ids) + lengths, 2 * exchanges),
        network.all_to_all(f"rows of {what}", busiest(rows), exchanges),
        network.all_to_all(f"gradients of {what}", busiest(rows), exchanges),
    ]


def loss_transfers(config: PlanConfig, work: Workload) -> list[Transfer]:
    """Queries of all GPUs go to every GPU, which scores its own rows; what the sharded losses do."""
    network, row = Network(config), FLOAT * config.model.dim
    everyone = work.tokens * config.cluster.gpus
    # Beside the label the row that numbers a draw; for in_batch the labels of the bank and, to count them, once more.
    known = {"sampled_softmax": 2, "in_batch": 3}.get(config.loss.name, 1)
    parts = [
        network.all_gather("labels", everyone * INT64 * known, 2),
        network.all_gather("queries", everyone * row),
        network.all_gather("losses of the parts", everyone * FLOAT * 3, 3, passes=2),
        network.all_gather("gradients of the losses", everyone * FLOAT),
        network.all_gather("gradients of queries", everyone * row),
    ]
    if config.embedding.sharding in ("column_wise", "table_wise", "grid"):  # rows do not lie where they are scored
        parts += _lookup(network, "scored items", [Lookup("scored", "events", config, scored_rows(config, work))])
    return parts


def row_transfers(config: PlanConfig, work: Workload) -> list[Transfer]:
    """The other way: every GPU fetches the rows that its own positions are scored against."""
    items, tokens, count = float(config.embedding.rows), work.tokens, config.loss.num_negatives
    everyone = tokens * config.cluster.gpus
    rows = {
        "sampled_softmax": distinct(tokens * (count + 1), items),
        "shared_bank": distinct(tokens + count, items),
        "in_batch": distinct(everyone, items),
        "full_softmax": items,
    }[config.loss.name]
    return _lookup(Network(config), "scored items", [Lookup("scored", "events", config, rows)])


# Work on the GPU


@dataclass(frozen=True)
class TimePart:
    """One part of a step."""

    name: str
    seconds: float
    resource: str
    """compute, HBM bandwidth, NVLink, network or PCIe: what it waits for."""
    flops: float = 0.0
    bytes: float = 0.0

    def times(self, count: int) -> TimePart:
        """So often."""
        return TimePart(self.name, count * self.seconds, self.resource, count * self.flops, count * self.bytes)


def compute_parts(config: PlanConfig, work: Workload) -> list[TimePart]:
    """Everything but communication, of a batch."""
    layers = config.model.num_blocks
    touched = TOUCHES * layers * layer_bytes(config, work)
    touched += 2 * early_workspace(config, work) + 2 * layers * shared_bytes(config, work)  # written, read
    linear = layers * work.tokens * _linear_flops(config)
    return [
        *_apart(config, ("linear layers", "element-wise"), linear, touched),
        _attention(config, work),
        *(_loss_parts(config, work) if config.ranking is None else _heads(config, work)),
        *_embedding(config, work),
    ]


def update_parts(config: PlanConfig, work: Workload) -> list[TimePart]:
    """Once a step: the dense optimizer, the average, the map of ids."""
    dense = float(dense_parameters(config))
    found = [
        ("dense optimizer", dense * FLOAT * ADAMW_FLOATS),
        ("average", AVERAGE_PASSES * average_bytes(config, dense, work)),
        ("map of ids", map_moved_bytes(config, work)),
    ]
    return [_part(config, name, 0.0, size, 1.0) for name, size in found if size]


def _part(config: PlanConfig, name: str, flops: float, num_bytes: float, fraction: float) -> TimePart:
    """One kernel, which reads and writes while it computes: the longer of its products and its bytes."""
    compute_s = flops / (config.peak_tflops * 1e12 * fraction)
    bytes_s = num_bytes / (config.cluster.sheet.hbm_gbps * 1e9 * config.cluster.hbm_fraction)
    resource = "compute" if compute_s >= bytes_s else "HBM bandwidth"
    return TimePart(name, max(compute_s, bytes_s), resource, flops, num_bytes)


def _apart(config: PlanConfig, names: tuple[str, str], flops: float, num_bytes: float) -> list[TimePart]:
    """Products of linear layers, and what kernels of their own do between them: one waits for the other."""
    products, rest = names
    return [
        _part(config, products, flops, 0.0, config.cluster.linear_fraction), _part(config, rest, 0.0, num_bytes, 1.0)
    ]  # fmt: skip


def _linear_flops(config: PlanConfig) -> float:
    """Of one token in one layer, forward and backward; HSTU computes its first product again."""
    model = config.model
    if isinstance(model, HSTUConfig):
        values = model.num_heads * model.v_dim
        return 8.0 * model.dim * (2 * values + 2 * model.num_heads * model.qk_dim) + 6.0 * values * model.dim
    if isinstance(model, FuXiLinearConfig):  # so does FuXi-Linear
        projected = 6 * model.dim + 2 * model.num_heads * model.qk_dim
        return 8.0 * model.dim * projected + 18.0 * model.dim**2 + 18.0 * model.dim * model.ffn_dim
    feed_forward = (2 if isinstance(model, SASRecConfig) else 3) * model.ffn_dim
    return 6.0 * model.dim * (4 * model.dim + feed_forward)


def _attention(config: PlanConfig, work: Workload) -> TimePart:
    model, fraction = config.model, config.cluster.attention_fraction
    if isinstance(model, HSTUConfig):
        widths = model.num_heads * (model.qk_dim + model.v_dim)
        squares = (
            config.torch_path and config.form.is_fused
        )  # prefixes that see forward: the torch path goes through all
        each = (1 + BACKWARD_ATTENTION) * widths
        if not config.torch_path:
            each = model.num_heads * (PRODUCTS_OF_QK * model.qk_dim + PRODUCTS_OF_V * model.v_dim)
        flops = 2.0 * (work.squares if squares else work.pairs) * each
        row = model.num_heads * (PASSES_OF_QK * model.qk_dim + PASSES_OF_V * model.v_dim)
        moved = work.tokens * row * config.activation_bytes
        return _part(config, "attention", model.num_blocks * flops, model.num_blocks * moved, fraction)
    if isinstance(model, FuXiLinearConfig):  # torch's own products, as of linear layers
        return _part(config, "mixers", model.num_blocks * _mixer_flops(model, work), 0.0,
                     config.cluster.linear_fraction)  # fmt: skip
    padded = work.squares if config.torch_path else work.users * work.longest**2
    if isinstance(model, SASRecConfig) and model.dropout > 0 and not config.torch_path:
        moved = SOFTMAX_PASSES * model.num_heads * padded * FLOAT
        return _part(config, "attention", model.num_blocks * 12.0 * padded * model.dim,
                     model.num_blocks * moved, fraction)  # fmt: skip
    flops = (1 + BACKWARD_ATTENTION) * 2.0 * padded * model.dim  # half of the square, as the causal mask shows
    return _part(config, "attention", model.num_blocks * flops, 0.0, fraction)


def _mixer_flops(model: FuXiLinearConfig, work: Workload) -> float:
    """Of a layer's three mixers, forward and twice as much backward; the temporal weights have no gradient.

    Inside a chunk each token meets all of it; with several chunks it also writes into and reads from one matrix a head.
    """
    chunks, size, slots = fuxi_chunks(model, work)
    qk, dim = model.num_heads * model.qk_dim, model.dim
    inside = size * (3 * (qk + dim) + 2 * dim + 3 * dim)  # semantic, temporal, positional
    carried = 2 * dim * (3 * model.qk_dim + 2 * 2 + 3 * model.position_dim) if chunks > 1 else 0
    return 2.0 * slots * (inside + carried)


def _loss_parts(config: PlanConfig, work: Workload) -> list[TimePart]:
    dim, count, gpus = config.model.dim, config.loss.num_negatives, config.cluster.gpus
    if is_replicated(config):
        gpus = 1
    everyone = work.tokens * gpus
    if is_mixture(config):
        pairs = work.tokens * (count + 1)
        moved = TOUCHES * (pairs * pair_bytes(config) + work.tokens * query_bytes(config))
        return _apart(config, ("loss", "loss: rest"), mixture_flops(config, work), moved)
    if config.loss.name != "sampled_softmax":
        bank = bank_items(config.with_gpus(gpus), work)
        # The logits are computed again in the backward pass, but where a full softmax makes its gradients at once.
        products = 6.0 if config.torch_path and is_replicated(config) and config.loss.name == "full_softmax" else 8.0
        flops = products * everyone * bank * dim
        return [_part(config, "loss", flops, TOUCHES * everyone * dim * FLOAT, config.cluster.linear_fraction)]
    pairs = everyone * (rectangle_width(everyone, count, gpus) + 1)
    rows = work.tokens * (count + 1)  # what fills up the rectangle is the label, whose row is in the cache
    each = dim * (2 * config.activation_bytes + GATHER_FLOATS * FLOAT)
    parts = [_part(config, "loss", 6.0 * pairs * dim, rows * each, config.cluster.linear_fraction)]
    if not is_replicated(config):
        drawn = 2.0 * everyone * count * DRAW_BYTES
        parts.append(_part(config, "owners of the negatives", 0.0, drawn, 1.0))
    return parts


def _heads(config: PlanConfig, work: Workload) -> list[TimePart]:
    """Tokens are put together and the heads are run: ranking."""
    kept = token_bytes(config, work) + head_bytes(config, work) + 2 * work.tokens * config.model.dim * FLOAT
    return _apart(config, ("heads", "tokens, heads: rest"), head_flops(config, work), TOUCHES * kept)


def _embedding(config: PlanConfig, work: Workload) -> list[TimePart]:
    """Lookups, and the update of the rows that were touched; a table that is whole with AdamW is updated whole."""
    moved, from_host = [], []
    scored = scored_rows(config, work) if config.ranking is None else 0.0
    for table in lookups(config, work):
        whole = is_replicated(table.config)
        near, far = (_whole_table_bytes(table), 0.0) if whole else _shard_traffic(table, scored)
        moved.append((table.config, near))
        from_host.append((table.config, far))
    far = busiest(from_host)
    parts = [_part(config, "embedding", 0.0, busiest(moved), 1.0)]
    if far:
        seconds = far / (config.cluster.sheet.pcie_gbps * 1e9 * config.cluster.network_fraction)
        parts.append(TimePart("rows in host memory", seconds, "PCIe", 0.0, far))
    return parts


def _whole_table_bytes(table: Lookup) -> float:
    """Moved in memory for a table that is whole on the GPU."""
    config, row = table.config, table.config.model.dim * FLOAT
    path = "ranking" if config.ranking is not None else "torch" if config.torch_path else "triton"
    return 2 * table.rows * row + (config.embedding.rows + 1) * row * (ADAMW_FLOATS + TABLE_PASSES[path])


def _shard_traffic(lookup: Lookup, scored: float) -> tuple[float, float]:
    """Bytes moved in memory and, of rows in host memory, from and to it, for the largest shard of a table.

    scored: rows that the loss wants beside those of the lookup.
    """
    config, table, dim = lookup.config, lookup.config.embedding, row_width(lookup.config)
    stored, gpus, shards = DTYPE_BYTES[table.dtype], config.cluster.gpus, num_shards(config)
    busy = gpus / shards  # lookups of a GPU that has rows, against an even share
    rows = (lookup.rows + scored) * busy
    touched = distinct(lookup.rows * gpus, float(table.rows)) / shards + scored * busy
    state = optimizer_bytes(table.optimizer, 1, dim)
    moved = rows * dim * (stored + FLOAT) + rows * dim * FLOAT + touched * 2 * (dim * stored + state)
    if moves_in_torch(config):  # gradients are kept, then summed by row
        moved += 2 * (rows + touched) * dim * FLOAT
    missed = {"hbm": 0.0, "uvm": 1.0}.get(table.placement, 1.0 - table.cache_hit_rate)
    return moved, missed * (rows * dim * stored + touched * (dim * stored + 2 * state))


@dataclass(frozen=True)
class Step:
    """Time of one step."""

    parts: tuple[TimePart, ...]
    transfers: tuple[Transfer, ...]
    tokens: float
    """Of all GPUs."""

    @property
    def seconds(self) -> float:
        """All parts one after the other."""
        return sum(p.seconds for p in self.parts) + sum(t.seconds for t in self.transfers)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def by_resource(self) -> dict[str, float]:
        """Seconds that the step waits for each resource."""
        total: dict[str, float] = defaultdict(float)
        for part in self.parts:
            total[part.resource] += part.seconds
        for transfer in self.transfers:
            total["network" if transfer.outside else "NVLink"] += transfer.seconds
        return dict(total)

    @property
    def limited_by(self) -> str:
        shares = self.by_resource()
        return max(shares, key=lambda name: shares[name])


def plan_step(config: PlanConfig, work: Workload) -> Step:
    """Time of one step of the busiest GPU."""
    batches = config.optim.accumulate_steps
    parts = [p.times(batches) for p in compute_parts(config, work)] + update_parts(config, work)
    sent = [t.times(batches) for t in transfers(config, work)] + update_transfers(config, work)
    return Step(tuple(parts), tuple(sent), work.tokens * config.cluster.gpus * batches)
