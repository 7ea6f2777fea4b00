"""Memory of one GPU in a training step, part by part, before anything is allocated.

Weights are counted on torch's meta device, what autograd keeps is written down per layer (tests count the same bytes on
real batches), the rest is arithmetic over sizes.

Legend: T tokens of a GPU, B its users, n a user's tokens, D model width, H heads, A query/key width, V value width per
head, F feed-forward width, R negatives per position, K items of a bank, N GPUs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from hstu.config import build
from hstu.config_model import MODELS, HSTUConfig, ModelConfig, SASRecConfig, TransformerConfig
from hstu.errors import UserError
from hstu.feature_tables import BAGS
from hstu.plan_config import DTYPE_BYTES, PlanConfig
from hstu.sharded_losses import MAX_DRAWS
from hstu.sharded_plan import column_part, state_bytes
from kernels._common import CACHE_MIB, MIN_ROWS

GIB = 2.0**30
FLOAT, INT64, INT32 = 4, 8, 4
"""Bytes."""
BATCH_COLUMNS = 5
"""int64 numbers of a token in a batch: item, label, time, request time, row."""
CACHE_ROW_BYTES, CACHE_SLOT_BYTES = 4, 16
"""fbgemm's cache of rows in host memory: its map for each row, its state for each slot (torchrec's planner counts the
same)."""
DRAW_BYTES = INT32 + 2 + INT64
"""Of one negative while its owner is found: the id, two masks, a running count."""
SOFTMAX_LAYER_ROWS = 9
"""Float32 rows of width D a token that the backward of a SASRec or Transformer layer needs at once."""
PAIR_BLOCK = 64
"""The torch path lays out time buckets for whole blocks of so many query rows (kernels/attention/layout.py)."""


@dataclass(frozen=True)
class Workload:
    """What a step asks of one GPU."""

    tokens: float
    users: float
    longest: int
    squares: float
    """Sum over users of n^2."""
    pairs: float
    """Pairs of a token and one that it sees, by the model's mask."""

    @classmethod
    def of_lengths(cls, lengths: Sequence[int] | np.ndarray, model: ModelConfig) -> Workload:
        """Of a real batch; lengths: [B] tokens of each user."""
        n = np.asarray(lengths, dtype=np.float64)
        pairs = float(visible_pairs(n, model).sum())
        return cls(float(n.sum()), len(n), int(n.max()), float((n * n).sum()), pairs)

    @classmethod
    def planned(cls, config: PlanConfig) -> Workload:
        """Of the batch that the config describes."""
        longest, mean, tokens = config.model.max_len, config.mean_len, float(config.batch.tokens_per_gpu)
        users = tokens / mean
        n = np.arange(1, longest + 1, dtype=np.float64)
        share = length_shares(mean, longest)
        square = float(share @ (n * n))
        pairs = float(share @ visible_pairs(n, config.model))
        if config.batch.mean_square_len is not None:
            pairs *= config.batch.mean_square_len / square
            square = config.batch.mean_square_len
        return cls(tokens, users, longest, users * square, users * pairs)


def length_shares(mean: float, longest: int) -> np.ndarray:
    """Share of users with 1..longest tokens, [longest]: of all distributions with this mean the one of most entropy.

    Their shares are proportional to exp(slope * n); the slope is found by bisection.
    """
    n = np.arange(1, longest + 1, dtype=np.float64)

    def shares(slope: float) -> np.ndarray:
        weight = np.exp(slope * n - max(slope, slope * longest))
        return weight / weight.sum()

    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle) @ n < mean else (low, middle)
    return shares((low + high) / 2)


def visible_pairs(n: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Pairs that the mask shows for users of n tokens, [...]: causal, with HSTU's window and full rows."""
    pairs = n * (n + 1) / 2
    window = getattr(model, "window", 0)
    if not window:
        return pairs

    def triangle(x: np.ndarray) -> np.ndarray:
        x = np.maximum(x, 0.0)
        return x * (x + 1) / 2

    return pairs - triangle(n - window - getattr(model, "full_rows", 0))


# Parameters


def dense_parameters(model: ModelConfig) -> int:
    """Parameters of everything but the table, counted on the meta device."""
    return _dense_parameters(model.name, json.dumps(dataclasses.asdict(model)))


@cache
def _dense_parameters(name: str, text: str) -> int:
    from hstu.model.encoder import make_encoder

    model = build(MODELS[name], json.loads(text))
    with torch.device("meta"):
        return sum(p.numel() for p in make_encoder(model).parameters())


def check_model(model: ModelConfig) -> None:
    """Raises UserError for a model whose memory is not written down here."""
    if not isinstance(model, HSTUConfig | SASRecConfig | TransformerConfig):
        raise UserError(f"model={model.name}: hstu-plan knows hstu, sasrec and transformer")
    if model.similarity != "dot":
        raise UserError(f"model.similarity={model.similarity}: hstu-plan knows dot only")


# What autograd keeps


@dataclass(frozen=True)
class Part:
    """A named number of bytes."""

    name: str
    bytes: float


def layer_bytes(config: PlanConfig, work: Workload) -> float:
    """What one layer keeps for the backward pass.

    Under autocast the residual stream stays float32 and what products give is narrow; so is the copy of its input that
    a linear layer keeps.
    """
    model, low = config.model, config.activation_bytes
    tokens, dim = work.tokens, model.dim
    if isinstance(model, HSTUConfig):  # the layer's input; u, v, q, k side by side; the attended values
        values = model.num_heads * model.v_dim
        return tokens * (FLOAT * dim + low * (3 * values + 2 * model.num_heads * model.qk_dim))
    if isinstance(model, SASRecConfig):
        fed = 2 * FLOAT if low == FLOAT else 3 * low  # inputs of linear layers: LN(x), z and, where narrow, x
        kept = tokens * dim * (2 * FLOAT + fed + low)  # x, the sum before the second norm; fed; attended
        kept += tokens * (4 * FLOAT + 2 * low * model.ffn_dim)  # statistics; after ReLU, after dropout
        return kept + _softmax_bytes(config, work, model.dropout)
    assert isinstance(model, TransformerConfig)
    kept = tokens * dim * (4 * FLOAT + 2 * low + low)  # twice x and its norm; what enters linear layers; attended
    kept += tokens * (2 * FLOAT + 4 * low * model.ffn_dim + 2 * low * dim / model.num_heads)  # gates; sines
    return kept + _softmax_bytes(config, work, 0.0) + (tokens * dim * low * 2 if config.torch_path else 0.0)


def _softmax_bytes(config: PlanConfig, work: Workload, dropout: float) -> float:
    """Softmax attention: q, k, v on the torch path; elsewhere all padded to the longest user.

    With dropout on the weights the padded path keeps them twice, before and after, and its mask of one byte.
    """
    low, dim, heads = config.activation_bytes, config.model.dim, config.model.num_heads
    if config.torch_path:
        return work.tokens * 3 * dim * low
    slots = work.users * work.longest
    kept = slots * (3 * dim * low + INT64) + work.tokens * INT64
    if dropout:
        return kept + heads * slots * work.longest * (FLOAT + low + 1)
    return kept + slots * (dim * low + heads * FLOAT)


def layer_workspace(config: PlanConfig, work: Workload) -> float:
    """What the backward pass of one layer needs beside what is kept; measured on the CPU, as docs/plan.md says."""
    model, low = config.model, config.activation_bytes
    if isinstance(model, HSTUConfig):  # the projection once more and its gradient
        width = 2 * model.num_heads * (model.v_dim + model.qk_dim)
        return work.tokens * (2 * low * width + FLOAT * model.dim)
    needed = SOFTMAX_LAYER_ROWS * work.tokens * FLOAT * model.dim
    if config.torch_path or not (isinstance(model, SASRecConfig) and model.dropout):
        return needed
    return needed + 2 * FLOAT * model.num_heads * work.users * work.longest**2  # gradients of the padded weights


def input_bytes(config: PlanConfig, work: Workload) -> float:
    """The batch and what all layers share: the plan of the attention."""
    columns = work.tokens * INT64 * BATCH_COLUMNS
    if not config.torch_path:
        return columns + work.tokens * 2 * INT32  # ages of queries and keys
    rows = 2 * work.tokens * INT64
    model = config.model
    if not (isinstance(model, HSTUConfig) and model.bias.time):
        return columns + rows
    block = min(PAIR_BLOCK, work.longest)
    return columns + rows + INT32 * (work.squares / 2 + work.tokens * block / 2)


def output_bytes(config: PlanConfig, work: Workload) -> float:
    """What is kept between the last layer and the loss: L2 normalisation, a final norm."""
    kept = work.tokens * (FLOAT * config.model.dim + 2 * FLOAT) if config.model.l2_normalize else 0.0
    if isinstance(config.model, TransformerConfig):
        kept += work.tokens * (2 * FLOAT * config.model.dim + FLOAT)
    return kept


# The table and the loss


def is_replicated(config: PlanConfig) -> bool:
    """Whether every GPU has the whole table, with a gradient as large."""
    return config.embedding.kind == "local"


def num_shards(config: PlanConfig) -> int:
    """GPUs over which the table lies."""
    sharding, gpus = config.embedding.sharding, config.cluster.gpus
    if is_replicated(config) or sharding == "table_wise":
        return 1
    return config.model.dim // column_part(config.model.dim, gpus) if sharding == "column_wise" else gpus


def shard_shape(config: PlanConfig) -> tuple[int, int]:
    """Rows and columns of the largest shard; the padding row counts."""
    rows, shards = config.embedding.rows + 1, num_shards(config)
    if config.embedding.sharding == "column_wise":
        return rows, config.model.dim // shards
    return math.ceil(rows / shards), config.model.dim


def table_bytes(config: PlanConfig) -> tuple[float, float]:
    """Rows of the largest shard, and their optimizer's state."""
    rows, columns = shard_shape(config)
    size = float(rows) * columns * DTYPE_BYTES[config.embedding.dtype]
    return size, float(optimizer_bytes(config.embedding.optimizer, rows, columns))


def optimizer_bytes(optimizer: str, rows: int, columns: int) -> int:
    """Of the state of so many rows; float32 for narrow rows too. adamw keeps what adam does."""
    return state_bytes("adam" if optimizer == "adamw" else optimizer, rows, columns)


def distinct(draws: float, items: float) -> float:
    """Expected number of different items among uniform draws."""
    return items * -math.expm1(draws * math.log1p(-1.0 / items)) if items > 1 else min(draws, items)


def scored_rows(config: PlanConfig, work: Workload) -> float:
    """Different rows that one GPU scores in the loss: labels and candidates of its block of the catalogue.

    Labels count as if they were uniform, which no log is: a little too many.
    """
    gpus, items = config.cluster.gpus, float(config.embedding.rows)
    positions, count = work.tokens * gpus, config.loss.num_negatives
    if config.loss.name == "full_softmax":
        return items / gpus
    if config.loss.name == "sampled_softmax":
        return distinct(positions * (count + 1) / gpus, items / gpus)
    return distinct(positions + (count if config.loss.name == "shared_bank" else 0), items) / gpus


def bank_items(config: PlanConfig, work: Workload) -> float:
    """Items of the bank that one GPU scores; those of a sampled softmax are no bank."""
    gpus, items = config.cluster.gpus, float(config.embedding.rows)
    banks = {"full_softmax": items, "shared_bank": float(config.loss.num_negatives)}
    return banks.get(config.loss.name, distinct(work.tokens * gpus, items)) / gpus


def rectangle_width(positions: float, negatives: int, gpus: int) -> int:
    """Most of a position's negatives that one of N GPUs owns, over all positions: the largest of binomial counts.

    The largest count that at least one position is expected to reach.
    """
    if gpus == 1:
        return negatives
    share, tail = 1.0 / gpus, 0.0
    for count in range(negatives, 0, -1):
        log_ways = math.lgamma(negatives + 1) - math.lgamma(count + 1) - math.lgamma(negatives - count + 1)
        tail += math.exp(log_ways + count * math.log(share) + (negatives - count) * math.log1p(-share))
        if positions * tail >= 1.0:
            return count
    return 1


@dataclass(frozen=True)
class LossMemory:
    """Bytes of the loss."""

    kept: float
    """For the backward pass."""
    workspace: float
    """Only while it runs."""
    draws: float = 0.0
    """Before the forward pass, while nothing else is kept."""


def loss_memory(config: PlanConfig, work: Workload) -> LossMemory:
    """Of the loss on the table as it lies: whole on this GPU, or in shards."""
    if not is_replicated(config):
        return _sharded_loss(config, work)
    return _torch_loss(config, work) if config.torch_path else _triton_loss(config, work)


def _torch_loss(config: PlanConfig, work: Workload) -> LossMemory:
    """The torch path keeps normalised copies of what it multiplies, the whole table among them."""
    tokens, row = work.tokens, FLOAT * config.model.dim
    rows, count, name = config.embedding.rows + 1, config.loss.num_negatives, config.loss.name
    l2 = config.model.l2_normalize
    stats = tokens * 2 * FLOAT if l2 else 0.0
    table = rows * (row + 2 * FLOAT) if l2 else 0.0
    queries = tokens * row * (2 if l2 else 1) + stats
    if name == "sampled_softmax":
        kept = queries + table + tokens * (count + 1) * (INT32 + FLOAT)
        return LossMemory(kept, tokens * count * (INT32 + FLOAT) + rows * row)
    if name == "full_softmax":
        given = tokens * row + rows * row  # the gradients, made in the forward pass
        kept = given + (tokens * row + stats + rows * 2 * FLOAT if l2 else 0.0)
        return LossMemory(kept, _block_bytes(config, tokens, rows) + rows * row)
    bank = count if name == "shared_bank" else distinct(tokens, config.embedding.rows)
    kept = 2 * queries + bank * (row * (2 if l2 else 1) + INT64 + (2 * FLOAT if l2 else 0)) + tokens * 3 * FLOAT
    return LossMemory(kept, _block_bytes(config, tokens, bank) + 2 * rows * row)


def _block_bytes(config: PlanConfig, positions: float, columns: float) -> float:
    """Of the block of logits that the torch path has at a time; on the CPU it stays in the cache."""
    row = columns * FLOAT
    rows = min(config.loss.chunk_mib * 2.0**20 / row, max(MIN_ROWS, CACHE_MIB * 2.0**20 / row), positions)
    return max(1.0, rows) * row


def _triton_loss(config: PlanConfig, work: Workload) -> LossMemory:
    """The kernels keep queries and a few numbers of each; logits stay in registers."""
    tokens, rows = work.tokens, config.embedding.rows + 1
    kept = tokens * (FLOAT * config.model.dim + 4 * FLOAT)
    if config.loss.name == "full_softmax":
        kept += rows * FLOAT
    narrow = rows * config.model.dim * config.activation_bytes if config.activation_bytes < FLOAT else 0.0
    return LossMemory(kept, narrow + rows * config.model.dim * FLOAT + tokens * FLOAT * config.model.dim)


def _sharded_loss(config: PlanConfig, work: Workload) -> LossMemory:
    """Positions of all GPUs against the rows of this one (``hstu/sharded_losses.py``); all float32."""
    gpus, row, l2 = config.cluster.gpus, FLOAT * config.model.dim, config.model.l2_normalize
    everyone, scored, count = work.tokens * gpus, scored_rows(config, work), config.loss.num_negatives
    kept = everyone * (2 * row + INT64 + 3 * FLOAT + 1)  # all queries, the rows of their labels, numbers
    kept += gpus * 2 * BAGS * INT64  # lengths of the ids' rows, of events and of what is scored
    workspace = 2 * everyone * row + 2 * scored * row  # gradients of all that
    if l2:  # own queries and fetched rows before they are normalised; rows of events lie in the same storage
        kept += work.tokens * 2 * row + scored * (row + 2 * FLOAT)
    if config.loss.name != "sampled_softmax":
        bank = bank_items(config, work)
        again = everyone * row + bank * row if config.torch_path else scored * row
        return LossMemory(kept + again + bank * INT64, workspace)
    width = rectangle_width(everyone, count, gpus)
    kept += scored * row + everyone * (width + 1) * (INT32 + FLOAT if config.torch_path else INT64)
    # Every GPU draws the negatives of all positions and picks its own before the forward pass.
    own = everyone * count / gpus * (INT32 + INT64) if gpus > 1 else 0.0
    drawn = min(everyone * count, MAX_DRAWS) if gpus > 1 else everyone * count
    return LossMemory(kept, workspace, drawn * DRAW_BYTES + own)


# All of it


@dataclass(frozen=True)
class Memory:
    """Memory of the fullest GPU, bytes."""

    parts: tuple[Part, ...]
    limit: float
    """What there is, less the reserve."""
    host: float = 0.0
    """Of host memory, for all GPUs of a node."""
    host_limit: float = 0.0

    @property
    def total(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.total <= self.limit and self.host <= self.host_limit

    def of(self, name: str) -> float:
        """Bytes of the part of this name."""
        return next(part.bytes for part in self.parts if part.name == name)


def saved_bytes(config: PlanConfig, work: Workload) -> list[Part]:
    """What autograd keeps between forward and backward, by layer."""
    parts = [Part("batch and plan", input_bytes(config, work))]
    each = layer_bytes(config, work)
    parts += [Part(f"layer {index + 1}", each) for index in range(config.model.num_blocks)]
    return [*parts, Part("output", output_bytes(config, work)), Part("loss", loss_memory(config, work).kept)]


def plan_memory(config: PlanConfig, work: Workload) -> Memory:
    """Memory of the fullest GPU by part."""
    check_model(config.model)
    sheet, table = config.cluster.sheet, config.embedding
    rows, state = table_bytes(config)
    host, extra = 0.0, 0.0
    if table.placement != "hbm":
        local = min(sheet.gpus_per_node, config.cluster.gpus, num_shards(config))
        host = (rows + state) * local
        cached = table.cache_fraction if table.placement == "uvm_caching" else 0.0
        slots = shard_shape(config)[0]
        extra = slots * (CACHE_ROW_BYTES + cached * CACHE_SLOT_BYTES) if cached else 0.0
        rows, state = rows * cached, state * cached
    dense = float(FLOAT * dense_parameters(config.model))
    whole = float(table.rows + 1) * config.model.dim * FLOAT if is_replicated(config) else 0.0
    loss, kept = loss_memory(config, work), saved_bytes(config, work)
    early = loss.draws - sum(part.bytes for part in kept)
    layer = layer_workspace(config, work) - loss.kept  # by then the loss has given back what it kept
    parts = [
        Part("table", rows + extra),
        Part("table optimizer", state),
        Part("dense weights", dense),
        Part("gradients", dense + whole),
        Part("dense optimizer (AdamW)", 2 * dense),
        *(Part(f"kept: {part.name}", part.bytes) for part in kept),
        Part("workspace", max(loss.workspace, layer, early)),
        Part("communication", communication_buffers(config, work, dense + whole)),
    ]
    hbm = sheet.hbm_gib * GIB
    return Memory(tuple(parts), hbm * (1 - config.cluster.reserve), host, sheet.ddr_gib * GIB)


def communication_buffers(config: PlanConfig, work: Workload, gradients: float) -> float:
    """Rows of the events and their ids on the way (sent and received at once), and DDP's buckets of gradients."""
    rows = 0.0 if is_replicated(config) else 2 * work.tokens * (FLOAT * config.model.dim + INT64)
    return rows + (gradients if config.cluster.gpus > 1 else 0.0)
