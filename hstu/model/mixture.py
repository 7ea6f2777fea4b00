"""Mixture of logits: a learned similarity between a query and an item, and the item table that scores with it.

A query has P component vectors, an item K; all P K dot products, over a temperature, are the logits. The score is their
mean under weights that depend on the query, the item and the logits themselves:

    logits = <query component, item component> / temperature              all components L2-normalised
    gate   = query network(q) * item network(x) + pair network(logits)
    score  = sum(softmax(gate * sigmoid(gate)) * logits)

Sources: Zhai et al. 2023 (arXiv 2306.04039); Ding & Zhai 2024 (arXiv 2407.15462), whose public code (bailuding/rails)
is followed in sizes, order of operations and auxiliary losses.

Legend: ``L`` total events, ``B`` users, ``D`` model width, ``R`` negatives per position, ``V`` items + 1, ``P`` and
``K`` components of a query and an item, ``C`` their width, ``E`` = P K logits of a pair, ``n`` rows of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hstu.config_similarity import MixtureConfig
from hstu.distributed import World
from hstu.embedding import ItemTable, LocalItemTable
from hstu.model.shares import over_ranks, over_ranks_with_gradient
from hstu.seeding import derive
from kernels._common import l2_normalize, no_autocast, row_chunks, rows_within
from kernels._dropout import seeded_dropout
from kernels._hash_dropout import row_dropout
from kernels.rank_and_topk.cpu import rank_scored, topk_scored
from kernels.sampled_softmax.cpu import draw_negatives

EPS = 1e-6
"""Lower bound of norms and of the sum of the weights; added inside logarithms and the layer norm's root."""
USER_SEED, ITEM_SEED, GATE_SEED, SOFTMAX_SEED = 1, 2, 3, 4
"""Purpose numbers of the dropout seeds."""

Side = tuple[Tensor, Tensor]
"""Components [..., P or K, C] and gating values [..., E] of queries or items."""


def _wide(x: Tensor) -> Tensor:
    """x in float32, float64 if it is: under autocast the products are narrow, what follows them is not."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dropout(x: Tensor, rate: float, seed: int | None, rows: Tensor | None) -> Tensor:
    """x [n, ...] with dropout drawn by ``rows`` [n]; x itself without a seed."""
    if seed is None:
        return x
    return row_dropout(x, rate, seed, torch.arange(x.shape[0], device=x.device) if rows is None else rows)


def _part(seed: int | None, purpose: int) -> int | None:
    return None if seed is None else derive(seed, purpose)


class MixtureOfLogits(nn.Module):
    """The networks of the mixture. Matrices start as Xavier normals, biases as zeros.

    Args:
        config: sizes and dropout rates.
        dim: D, of encoder outputs and item embeddings.
    """

    def __init__(self, config: MixtureConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        own = config.query_components - bool(config.user_embeddings)
        num_logits = config.query_components * config.item_components
        self.query_hidden = nn.Linear(dim, 2 * config.hidden_dim)
        self.query_components = nn.Linear(config.hidden_dim, own * config.dim)
        self.item_components = nn.Linear(dim, config.item_components * config.dim)
        self.query_gate = self._gate(dim, num_logits, bias=False)
        self.item_gate = self._gate(dim, num_logits, bias=False)
        self.pair_gate = self._gate(num_logits, num_logits, bias=True)
        self.users = nn.Embedding(config.user_embeddings + 1, config.dim, 0) if config.user_embeddings else None
        """Row 0: users who are not in the store."""
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.xavier_normal_(parameter)
            else:
                nn.init.zeros_(parameter)
        if self.users is not None:
            nn.init.zeros_(self.users.weight[0].detach())

    def _gate(self, width: int, num_logits: int, bias: bool) -> nn.Sequential:
        hidden = self.config.gate_dim
        return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, num_logits, bias=bias))

    def queries(self, outputs: Tensor, users: Tensor) -> Tensor:
        """What a table scores with, [n, D] or [n, D + C]: layer-normalised outputs, then the users' vectors.

        outputs: [n, D] of the encoder. users: [n] int64, rows of the store; -1: not in it.
        """
        outputs = F.layer_norm(outputs, (self.dim,), eps=EPS)
        if self.users is None:
            return outputs
        rows = torch.where(users >= 0, users % self.config.user_embeddings + 1, 0)
        return torch.cat([outputs, self.users(rows).to(outputs.dtype)], dim=1)

    def query_side(self, queries: Tensor, seed: int | None, rows: Tensor | None = None) -> Side:
        """Components [n, P, C] and gating values [n, E] of queries as of :meth:`queries`.

        seed, rows: of the dropout, int or None and [n] int64.
        """
        outputs, users = queries[:, : self.dim], queries[:, self.dim :]
        left, right = self.query_hidden(outputs).chunk(2, dim=-1)
        left = F.silu(left) if self.config.activation == "silu" else F.gelu(left)
        components = _wide(self.query_components(left * right)).unflatten(-1, (-1, self.config.dim))
        if self.users is not None:
            users = seeded_dropout(users, self.config.user_dropout, _part(seed, USER_SEED), rows)
            components = torch.cat([components, users[:, None].to(components.dtype)], dim=1)
        return l2_normalize(components, EPS), _wide(self.query_gate(outputs))

    def item_side(self, items: Tensor, seed: int | None = None, rows: Tensor | None = None) -> Side:
        """Components [..., K, C] and gating values [..., E] of item embeddings [..., D].

        seed, rows: of the dropout of items [n, R, D], int or None and [n] int64.
        """
        dropped = _dropout(items, self.config.item_dropout, _part(seed, ITEM_SEED), rows)
        components = _wide(self.item_components(dropped)).unflatten(-1, (-1, self.config.dim))
        return l2_normalize(components, EPS), _wide(self.item_gate(items))

    def pair_logits(self, queries: Tensor, items: Tensor) -> Tensor:
        """Logits [n, R, E] of components [n, P, C] with each row's own items [n, R, K, C]."""
        products = torch.matmul(queries, items.flatten(1, 2).mT)  # [n, P, R * K]
        products = products.unflatten(2, items.shape[1:3]).transpose(1, 2)  # [n, R, P, K]
        return _wide(products.flatten(2)) / self.config.temperature

    def cross_logits(self, queries: Tensor, items: Tensor) -> Tensor:
        """Logits [n, V, E] of components [n, P, C] with the same items [V, K, C] for every row."""
        products = torch.matmul(queries.flatten(0, 1), items.flatten(0, 1).mT)  # [n * P, V * K]
        products = products.view(*queries.shape[:2], *items.shape[:2]).transpose(1, 2)  # [n, V, P, K]
        return _wide(products.flatten(2)) / self.config.temperature

    def mix(
        self, logits: Tensor, query_gate: Tensor, item_gate: Tensor, seed: int | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Scores [n, R] and weights [n, R, E].

        logits: [n, R, E]. query_gate: [n, E]. item_gate: [n, R, E] or [R, E]. seed, rows: of the dropout.
        """
        pair = self.pair_gate(_dropout(logits, self.config.gate_dropout, _part(seed, GATE_SEED), rows))
        weights = F.silu(query_gate[:, None] * item_gate + _wide(pair)).softmax(dim=-1)
        if seed is not None and self.config.softmax_dropout > 0:
            weights = _dropout(weights, self.config.softmax_dropout, _part(seed, SOFTMAX_SEED), rows)
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=EPS)
        return (weights * logits).sum(dim=-1), weights


def _entropy(weights: Tensor) -> Tensor:
    """Over the last dimension, in nats."""
    return -(weights * (weights + EPS).log()).sum(dim=-1)


class MixtureTable(ItemTable):
    """A local item table whose scores are mixtures of logits; queries are those of :meth:`MixtureOfLogits.queries`.

    Losses that score one bank or the whole catalogue at every position are not offered. In training mode
    :meth:`sampled_softmax` applies the dropout, a function of its seed and of the positions' rows.
    """

    def __init__(self, num_items: int, dim: int, config: MixtureConfig) -> None:
        super().__init__()
        self.num_items, self.num_live, self.dim, self.l2_normalize = num_items, num_items, dim, False
        self.items = LocalItemTable(num_items, dim, l2_normalize=False)
        self.mixture = MixtureOfLogits(config, dim)

    def embeddings(self) -> list[nn.Module]:
        users = self.mixture.users
        return [self.items] if users is None else [self.items, users]

    def lookup(self, ids: Tensor) -> Tensor:
        return self.items.lookup(ids)

    # Loss

    def sampled_softmax(
        self, queries: Tensor, labels: Tensor, negatives: Tensor | None = None, num_negatives: int = 128,
        seed: int = 0, temperature: float = 0.05, rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Loss [L]; the auxiliary losses, means over the positions, are added to each: any mean has them once."""
        losses, extra = self.loss_parts(queries, labels, negatives, num_negatives, seed, temperature, rows)
        return losses + extra

    def loss_parts(
        self, queries: Tensor, labels: Tensor, negatives: Tensor | None, num_negatives: int, seed: int,
        temperature: float, rows: Tensor | None = None, world: World | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Loss [L] of the positions of this rank, and the auxiliary losses, a scalar over those of all ranks.

        The scalar has the same value on all ranks; its gradient on one is that of its own positions.

        Positions are scored in blocks of about ``config.chunk_mib``; where there are several, each is scored again in
        the backward pass instead of kept.
        """
        config, mixture = self.mixture.config, self.mixture
        if negatives is None:
            negatives = draw_negatives(len(labels), num_negatives, self.num_items, seed, labels.device, rows)
        ids = torch.cat([labels[:, None].to(negatives.dtype), negatives], dim=1)  # [L, R + 1]
        dropout_seed = seed if self.training else None
        rows = torch.arange(len(labels), device=labels.device) if rows is None else rows
        components, gate = mixture.query_side(queries, dropout_seed, rows)
        size = rows_within(config.chunk_mib, ids.shape[1] * self._pair_floats(), torch.float32)
        blocks = list(zip(*(x.split(size) for x in (components, gate, ids, rows)), strict=True))
        losses, sums, entropies = [], [], []
        for block in blocks:
            arguments = (*block, dropout_seed, temperature)
            if len(blocks) == 1:
                loss, weights = self._block_loss(*arguments)
            else:  # the masks come from seeds: no generator state to keep
                loss, weights = checkpoint(
                    self._block_loss, *arguments, use_reentrant=False, preserve_rng_state=False
                )  # fmt: skip
            losses.append(loss)
            sums.append(weights.sum(dim=0))
            entropies.append(_entropy(weights).sum())
        return torch.cat(losses), self._auxiliary(
            queries, torch.stack(sums).sum(0), torch.stack(entropies).sum(), world
        )

    def _auxiliary(self, queries: Tensor, used: Tensor, single: Tensor, world: World | None) -> Tensor:
        """used: [E] sum of the labels' weights; single: sum of their entropies."""
        config = self.mixture.config
        squares = _wide(queries[:, self.dim :]).square().sum().to(used.dtype)  # 0 without user vectors
        sums = over_ranks_with_gradient(torch.cat([used, single[None], squares[None]]), world)
        num = over_ranks(torch.full((), len(queries), device=queries.device), world).clamp(min=1)
        used, single, squares = sums[:-2] / num, sums[-2] / num, sums[-1] / num
        information = _entropy(used) - single  # of positions and logits, mutual
        return config.user_norm_weight * squares - config.balance_weight * information

    def _block_loss(
        self, components: Tensor, gate: Tensor, ids: Tensor, rows: Tensor, seed: int | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Loss [n] and the labels' weights [n, E]; ids: [n, R + 1], the label first."""
        items, item_gate = self.mixture.item_side(self.items.lookup(ids), seed, rows)
        logits = self.mixture.pair_logits(components, items)
        scores, weights = self.mixture.mix(logits, gate, item_gate, seed, rows)  # [n, R + 1], [n, R + 1, E]
        copies = ids == ids[:, :1]
        copies[:, 0] = False
        scores = (scores / temperature).masked_fill(copies, -torch.inf)
        # A copy: a view would keep the weights of all pairs of a block that is scored again.
        return scores.logsumexp(dim=1) - scores[:, 0], weights[:, 0].clone()

    def _pair_floats(self) -> int:
        """About how many values the loss keeps for each position and item."""
        c = self.mixture.config
        num_logits = c.query_components * c.item_components
        return 2 * self.dim + 2 * c.item_components * c.dim + 4 * c.gate_dim + 10 * num_logits

    def bank_softmax(
        self, queries: Tensor, labels: Tensor, bank_ids: Tensor, log_q: Tensor | None = None,
        label_log_q: Tensor | None = None, temperature: float = 0.05,
    ) -> Tensor:  # fmt: skip
        raise ValueError("a mixture of logits has no loss over a shared bank: expected sampled_softmax")

    def full_softmax(
        self, queries: Tensor, labels: Tensor, temperature: float = 0.05, chunk_mib: float = 64,
        weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        raise ValueError("a mixture of logits has no loss over the whole catalogue: expected sampled_softmax")

    # Ranks

    def rank(
        self, queries: Tensor, targets: Tensor, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> Tensor:  # fmt: skip
        with torch.no_grad(), no_autocast(queries.device):
            scorer = _Scorer(self, queries, chunk_mib)
            return rank_scored(scorer, queries, self.num_items + 1, targets, seen_ids, seen_offsets, chunk_mib)

    def topk(
        self, queries: Tensor, k: int, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with torch.no_grad(), no_autocast(queries.device):
            scorer = _Scorer(self, queries, chunk_mib)
            return topk_scored(scorer, queries, self.num_items + 1, k, seen_ids, seen_offsets, chunk_mib)


class _Scorer:
    """Scores [n, V] of blocks of queries against all items, without dropout.

    The items' components and gating values, V (K C + E) numbers, are made once. Everything that a pair of user and item
    needs is made for as many pairs at a time as fit into half of ``chunk_mib``; the scores have the other half.
    """

    def __init__(self, table: MixtureTable, queries: Tensor, chunk_mib: float) -> None:
        self.mixture = table.mixture
        config = self.mixture.config
        self.components, self.gate = self.mixture.query_side(queries, None)
        num_logits = config.query_components * config.item_components
        self.num_pairs = rows_within(chunk_mib / 2, 2 * config.gate_dim + 8 * num_logits, self.gate.dtype)
        weight, width = table.items.weight, 2 * config.gate_dim + 2 * config.item_components * config.dim
        self.items = weight.new_empty(len(weight), config.item_components, config.dim)
        self.item_gate = weight.new_empty(len(weight), num_logits)
        for part in row_chunks(len(weight), rows_within(chunk_mib / 2, width, weight.dtype)):
            self.items[part], self.item_gate[part] = self.mixture.item_side(weight[part])

    def __call__(self, rows: slice) -> Tensor:
        components, gate = self.components[rows], self.gate[rows]
        scores = gate.new_empty(len(gate), len(self.items))
        for part in row_chunks(len(self.items), self.num_pairs // max(1, len(gate))):
            logits = self.mixture.cross_logits(components, self.items[part])  # [n, items, E]
            scores[:, part] = self.mixture.mix(logits, gate, self.item_gate[part])[0]
        return scores
