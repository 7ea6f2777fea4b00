"""What the encoders keep for the backward pass and need while it runs, layer by layer.

Legend: T tokens of a GPU, D model width, H heads, A query/key width, V value width per head, F feed-forward width;
FuXi-Linear: S chunks of C tokens, slots = users times S C, periods of the temporal mixer with two heads each.
"""

from __future__ import annotations

from hstu.config_model import FuXiLinearConfig, HSTUConfig, ModelConfig, SASRecConfig, TransformerConfig
from hstu.planning.config import FLOAT, INT32, INT64, PlanConfig
from hstu.planning.work import Workload

BATCH_COLUMNS = 5
"""int64 numbers of a token in a batch: item, label, time, request time, row."""
SOFTMAX_LAYER_ROWS, FREED_ROWS = 11.5, 2.0
"""Float32 rows of width D a token: those that the backward of softmax attention needs at once in a SASRec or
Transformer layer, and those that the feed-forward part, which comes first, has given back by then (measured)."""
FFN_ROWS = 2.0
"""Float32 rows of width F a token that the backward of the feed-forward part needs at once."""
TEMPORAL_COPIES = 4.1
"""FuXi-Linear's temporal weights are made from so many arrays of their size at once (measured)."""
PAIR_BLOCK = 64
"""The torch path lays out time buckets for whole blocks of so many query rows (kernels/attention/layout.py)."""


def layer_bytes(config: PlanConfig, work: Workload) -> float:
    """What one layer keeps for the backward pass.

    Under autocast the residual stream stays float32 and what products give is narrow; so is the copy of its input that
    a linear layer keeps.
    """
    model, low = config.encoder, config.activation_bytes
    tokens, dim = work.tokens, model.dim
    if isinstance(model, HSTUConfig):  # the layer's input; u, v, q, k side by side; the attended values
        values = model.num_heads * model.v_dim
        return tokens * (FLOAT * dim + low * (3 * values + 2 * model.num_heads * model.qk_dim))
    if isinstance(model, SASRecConfig):
        fed = 2 * FLOAT if low == FLOAT else 3 * low  # inputs of linear layers: LN(x), z and, where narrow, x
        kept = tokens * dim * (2 * FLOAT + fed + low)  # x, the sum before the second norm; fed; attended
        kept += tokens * (4 * FLOAT + 2 * low * model.ffn_dim)  # statistics; after ReLU, after dropout
        return kept + _softmax_bytes(config, work, model.dropout)
    if isinstance(model, FuXiLinearConfig):
        return _fuxi_bytes(config, model, work)
    assert isinstance(model, TransformerConfig)
    kept = tokens * dim * (4 * FLOAT + 2 * low + low)  # twice x and its norm; what enters linear layers; attended
    kept += tokens * (2 * FLOAT + 4 * low * model.ffn_dim + 2 * low * dim / model.num_heads)  # gates; sines
    return kept + _softmax_bytes(config, work, 0.0) + (tokens * dim * low * 2 if config.torch_path else 0.0)


def fuxi_chunks(model: FuXiLinearConfig, work: Workload) -> tuple[int, int, float]:
    """Chunks of a user, tokens of a chunk, and slots of all users: every user is padded to the longest."""
    size = max(1, min(model.chunk_size, work.longest))
    chunks = -(-work.longest // size)
    return chunks, size, work.users * chunks * size


def _fuxi_bytes(config: PlanConfig, model: FuXiLinearConfig, work: Workload) -> float:
    """The gated projection and the feed-forward part for each token, the mixers for each slot.

    A chunk's weights are written out, S C^2 for each head; with more than one chunk so are the matrices that hold the
    earlier ones, A by V. The temporal weights have no gradient and keep no values.
    """
    low, tokens, dim = config.activation_bytes, work.tokens, model.dim
    chunks, size, slots = fuxi_chunks(model, work)
    qk, several = model.num_heads * model.qk_dim, chunks > 1
    kept = tokens * dim * (2 * FLOAT + 2 * 3 * FLOAT)  # x, the sum of both parts; the mixed values and their norm
    kept += tokens * low * (10 * dim + 2 * qk + 4 * model.ffn_dim) + tokens * 7 * FLOAT  # products; statistics
    kept += slots * low * (2 * qk + 3 * dim)  # q, k and the values, padded
    kept += slots * low * (2 * qk + 2 * size * model.num_heads + 3 * dim)  # both sides of the products; the weights
    if several:
        kept += slots * low * (2 * qk + 2 * dim)
        states = work.users * chunks * dim
        kept += states * (model.qk_dim * (low + FLOAT * (chunks - 1) / chunks) + model.position_dim * low)
        kept += slots * low * 8 * model.num_periods  # sines and cosines of queries and keys
    if low < FLOAT:
        kept += _temporal_bytes(model, work, low)
    return kept + size * size * (INT64 + 2 * FLOAT * model.num_heads)


def _temporal_bytes(model: ModelConfig, work: Workload, each: int) -> float:
    """Weights of FuXi-Linear's temporal mixer, of ``each`` bytes."""
    assert isinstance(model, FuXiLinearConfig)
    _, size, slots = fuxi_chunks(model, work)
    return slots * size * 2 * model.num_periods * each


def _softmax_bytes(config: PlanConfig, work: Workload, dropout: float) -> float:
    """Softmax attention: q, k, v on the torch path; elsewhere all padded to the longest user.

    With dropout on the weights the padded path keeps them twice, before and after, and its mask of one byte.
    """
    low, dim, heads = config.activation_bytes, config.encoder.dim, config.encoder.num_heads
    if config.torch_path:
        return work.tokens * 3 * dim * low
    slots = work.users * work.longest
    kept = slots * (3 * dim * low + INT64) + work.tokens * INT64
    if dropout:
        return kept + heads * slots * work.longest * (FLOAT + low + 1)
    return kept + slots * (dim * low + heads * FLOAT)


def layer_workspace(config: PlanConfig, work: Workload) -> float:
    """What the backward pass of one layer needs beside what is kept; measured on the CPU, as docs/plan.md says."""
    model, low = config.encoder, config.activation_bytes
    if isinstance(model, HSTUConfig):  # the projection once more and its gradient
        width = 2 * model.num_heads * (model.v_dim + model.qk_dim)
        return work.tokens * (2 * low * width + 2 * FLOAT * model.dim)
    if isinstance(model, FuXiLinearConfig):  # gradients of q, k and the values, padded
        slots = fuxi_chunks(model, work)[2]
        return slots * low * (2 * model.num_heads * model.qk_dim + 3 * model.dim) + work.tokens * FLOAT * model.dim
    freed = FREED_ROWS * model.dim + (2 if isinstance(model, SASRecConfig) else 4) * model.ffn_dim
    rows = max(SOFTMAX_LAYER_ROWS * model.dim - freed, FFN_ROWS * model.ffn_dim + model.dim)
    needed = work.tokens * FLOAT * rows
    if config.torch_path or not (isinstance(model, SASRecConfig) and model.dropout):
        return needed
    return needed + 2 * FLOAT * model.num_heads * work.users * work.longest**2  # gradients of the padded weights


def early_workspace(config: PlanConfig, work: Workload) -> float:
    """What the forward pass needs before the first layer, while nothing is kept: FuXi-Linear's temporal weights."""
    if not isinstance(config.encoder, FuXiLinearConfig):
        return 0.0
    return TEMPORAL_COPIES * _temporal_bytes(config.encoder, work, FLOAT)


def batch_bytes(config: PlanConfig, work: Workload) -> float:
    """Columns of a retrieval batch."""
    return work.tokens * INT64 * BATCH_COLUMNS


def layout_bytes(config: PlanConfig, work: Workload) -> float:
    """What the layers share of the batch's layout: the plan of the attention."""
    model = config.encoder
    if isinstance(model, FuXiLinearConfig):
        return 0.0
    if not config.torch_path:
        return work.tokens * 2 * INT32  # ages of queries and keys
    rows = 2 * work.tokens * INT64
    with_time = isinstance(model, HSTUConfig) and model.bias.time
    if config.form.is_fused:  # whole squares: hidden pairs, where each stands, its bucket
        return rows + work.squares * (1 + INT32 + INT32 * with_time)
    block = min(PAIR_BLOCK, work.longest)
    return rows + INT32 * (work.squares / 2 + work.tokens * block / 2) * with_time


def shared_bytes(config: PlanConfig, work: Workload) -> float:
    """What the layers keep together: FuXi-Linear's temporal weights, where they need not be narrowed for each."""
    shared = isinstance(config.encoder, FuXiLinearConfig) and config.activation_bytes == FLOAT
    return _temporal_bytes(config.encoder, work, FLOAT) if shared else 0.0


def output_bytes(config: PlanConfig, work: Workload) -> float:
    """What is kept between the last layer and the loss: L2 normalisation, a final norm."""
    kept = work.tokens * (FLOAT * config.encoder.dim + 2 * FLOAT) if config.encoder.l2_normalize else 0.0
    if isinstance(config.encoder, TransformerConfig):
        kept += work.tokens * (2 * FLOAT * config.encoder.dim + FLOAT)
    return kept
