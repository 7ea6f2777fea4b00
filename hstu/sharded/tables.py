"""Tables of ids spread over ranks by torchrec: the item table, and how a model's tables are sharded.

    model = RetrievalModel(...)              # its tables are empty, on torch's meta device
    tables = shard(model, config, world)     # now each rank has its part, with initial values
    set_learning_rate(tables, rate); tables.zero_grad(); loss.backward(); tables.step()   # and the rows have moved

One lookup a step fetches all rows that the step needs, so that the optimizer sees one gradient a row.

Legend: R ranks, V rows of a table, D width, L positions, n ids.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hstu.config import Config, LossConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.distributed import World
from hstu.embedding import INIT_STD, NORM_EPS, ItemTable
from hstu.errors import UserError
from hstu.feature_tables import BAGS, FeatureTables, has_torchrec, make_collection, spread
from hstu.optim import Block, table_rate, table_rule
from hstu.sharded.initial import InitialValues
from hstu.sharded.kernel import Shard, TorchKernel
from hstu.sharded.losses import Scored, exact_loss, scored_by
from hstu.sharded.plan import (
    ROWWISE,
    TableShape,
    fused_params,
    make_plan,
    make_sharder,
    moved_by_fbgemm,
    moves_in_torch,
    quiet,
)
from hstu.sharded.rank import Scoring, sharded_rank, sharded_topk
from hstu.sharded.width import is_padded, narrowed, own_columns, stored_width, stretch_gradients, stretch_of
from hstu.table_optim import Rule
from hstu.transfer import to_device

log = logging.getLogger(__name__)

# torchrec's state dicts are of the class that torch says so about, again at every line that reads them.
warnings.filterwarnings("ignore", message="Please use DTensor instead and we are deprecating ShardedTensor")

TABLE = "item"
EVENTS, SCORED = "events", "scored"
"""Features of the item table: ids of this rank's events, and of the items that it scores."""


class ShardedItemTable(ItemTable):
    """Embeddings of items in one torchrec collection; :func:`shard` gives each rank its part.

    In training :meth:`expect` comes first, then one :meth:`lookup` of the events, then the loss. Every rank takes part
    in every lookup, loss, :meth:`rank` and :meth:`topk`, be it without users.
    """

    def __init__(self, num_items: int, dim: int, l2_normalize: bool = True, eps: float = NORM_EPS,
                 dtype: str = "float32") -> None:  # fmt: skip
        super().__init__()
        if not has_torchrec():
            raise UserError("embedding.kind=sharded: expected torchrec and fbgemm-gpu; see hstu-doctor, or take local")
        self.num_items, self.dim, self.l2_normalize, self.eps = num_items, dim, l2_normalize, eps
        self.num_live = num_items
        self.initial = InitialValues.take(num_items + 1, dim, _truncated_normal)
        table = {TABLE: (num_items + 1, [EVENTS, SCORED])}
        self.collection: Any = make_collection(table, stored_width(dim), "meta", dtype)
        self.world = World()
        self._expected: Scored | None = None
        self._rows: Tensor | None = None
        self._given: tuple[Tensor, Tensor] | None = None
        self._register_state_dict_hook(_to_local_name)
        self.register_load_state_dict_pre_hook(_from_local_name)

    @property
    def num_weights(self) -> int:
        """Of all ranks, without columns that are only stored."""
        return (self.num_items + 1) * self.dim

    def extra_repr(self) -> str:
        return f"num_items={self.num_items}, dim={self.dim}, l2_normalize={self.l2_normalize}"

    def _apply(self, fn: Any, recurse: bool = True) -> ShardedItemTable:
        return self  # rows lie where they were planned

    def _fetch(self, events: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of ids [n] and [K], in one exchange with all ranks."""
        if torch.is_inference_mode_enabled():  # fbgemm's lookups are not there in it
            with torch.inference_mode(False), torch.no_grad():
                return self._fetch(events.clone(), scored.clone())
        return self._own(self.collection(self.keyed(events, scored)))

    def _own(self, found: Any) -> tuple[Tensor, Tensor]:
        """Embeddings of events [n, D] and of what is scored [K, D], of what the collection has found."""
        return own_columns(found[EVENTS].values(), self.dim), own_columns(found[SCORED].values(), self.dim)

    def keyed(self, events: Tensor, scored: Tensor) -> Any:
        """Ids [n] and [K] as the collection takes them."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        counts = [len(events), len(scored)]
        return KeyedJaggedTensor(
            [EVENTS, SCORED], torch.cat([events.long(), scored.long()]), stride=BAGS, length_per_key=counts,
            lengths=to_device(spread(counts), events.device),
        )  # fmt: skip

    @contextmanager
    def given(self, found: Any, scored: Scored | None) -> Iterator[None]:
        """Inside, :meth:`expect` and :meth:`lookup` take what the collection has found already.

        scored: what the loss scores; None: nothing.
        """
        self._given, self._expected = self._own(found), scored
        try:
            yield
        finally:
            self._given = None

    def expect(
        self, labels: Tensor, loss: LossConfig, seed: int, rows: Tensor | None = None, every: Tensor | None = None
    ) -> None:
        self._rows = None
        if self._given is not None:
            return
        self._expected = scored_by(loss, self.world, labels, rows, self.num_live, seed, every)

    def lookup(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        expected = self._expected if torch.is_grad_enabled() else None
        scored = flat[:0] if expected is None else expected.ids
        found, rows = self._given or self._fetch(flat, scored)
        if expected is not None:
            self._rows = rows
        found = found.masked_fill((flat == 0)[:, None], 0.0)
        return found.view(*ids.shape, self.dim)

    def _loss(self, queries: Tensor, temperature: float, **options: Any) -> Tensor:
        scored, rows = self._expected, self._rows
        if scored is None or rows is None:
            raise ValueError("a loss over a sharded table: expected expect() and lookup() before it, once a step")
        self._expected = self._rows = None
        return exact_loss(queries, rows, scored, temperature, self.l2_normalize, self.eps, **options)

    def sampled_softmax(
        self, queries: Tensor, labels: Tensor, negatives: Tensor | None = None, num_negatives: int = 128,
        seed: int = 0, temperature: float = 0.05, rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As that of every table; labels, num_negatives, seed and rows are those of :meth:`expect`."""
        if negatives is not None:
            raise ValueError("negatives: expected None with a sharded table, which draws its own")
        return self._loss(queries, temperature)

    def bank_softmax(
        self, queries: Tensor, labels: Tensor, bank_ids: Tensor, log_q: Tensor | None = None,
        label_log_q: Tensor | None = None, temperature: float = 0.05,
    ) -> Tensor:  # fmt: skip
        """As that of every table; the bank is that of :meth:`expect`, the same on all ranks."""
        return self._loss(queries, temperature, log_q=log_q, label_log_q=label_log_q)

    def full_softmax(
        self, queries: Tensor, labels: Tensor, temperature: float = 0.05, chunk_mib: float = 64,
        weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        loss = self._loss(queries, temperature, chunk_mib=chunk_mib)
        return loss if weights is None else (loss * weights.to(loss.dtype)).sum()

    def rank(
        self, queries: Tensor, targets: Tensor, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> Tensor:  # fmt: skip
        return sharded_rank(self._scoring(chunk_mib), queries, targets, seen_ids, seen_offsets)

    def counted_rank(
        self, queries: Tensor, targets: Tensor, counts: Tensor, seen_ids: Tensor, seen_offsets: Tensor, chunk_mib: float
    ) -> Tensor:  # fmt: skip
        return sharded_rank(self._scoring(chunk_mib), queries, targets, seen_ids, seen_offsets, counts)

    def topk(
        self, queries: Tensor, k: int, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return sharded_topk(self._scoring(chunk_mib), queries, k, seen_ids, seen_offsets)

    def _scoring(self, chunk_mib: float) -> Scoring:
        def fetch(ids: Tensor) -> Tensor:
            return self._fetch(ids[:0], ids)[1]

        return Scoring(self.world, self.num_live, self.l2_normalize, self.eps, chunk_mib, fetch)


def _truncated_normal(block: Tensor, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(block, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD, generator=generator)


def _to_local_name(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    stored = state.pop(f"{prefix}collection.embeddings.{TABLE}.weight")
    state[f"{prefix}weight"] = narrowed(stored, module.dim)  # type: ignore[arg-type]


def _from_local_name(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    if f"{prefix}weight" in state:
        state[f"{prefix}collection.embeddings.{TABLE}.weight"] = state.pop(f"{prefix}weight")


class FusedTables(torch.optim.Optimizer):
    """The optimizer of all sharded tables.

    fbgemm moves rows in the backward, at the rate set before :meth:`zero_grad`. In torch they move in :meth:`step`, at
    the rate set before it, and until then their gradients can be seen and scaled.

    ``param_groups`` is one group without parameters, whose ``lr`` and ``lr_factor`` are those of the tables.
    """

    def __init__(
        self, dmp: Any, collections: dict[str, Any], by_fbgemm: bool, rule: Rule, dim: int, lr: float,
        lr_factor: float,
    ) -> None:  # fmt: skip
        super().__init__([{"params": []}], {"lr": lr, "lr_factor": lr_factor})
        self.dim = dim
        self.fused, self.collections = dmp.fused_optimizer, collections
        self.steps = torch.zeros((), dtype=torch.int64)
        self.kernels = [kernel for c in collections.values() for lookup in c._lookups for kernel in _kernels(lookup)]
        self.in_torch: list[TorchKernel] = []
        """What moves rows in place of fbgemm, for each of ``kernels``; empty where fbgemm does."""
        self.stretch = 1.0
        """Of the gradients that fbgemm sees, see ``hstu/sharded/width.py``."""
        if not by_fbgemm:
            self.in_torch = [TorchKernel(kernel, rule, dim) for kernel in self.kernels]
            for kernel, ours in zip(self.kernels, self.in_torch, strict=True):
                kernel.forward = ours.forward
        elif rule.name in ROWWISE and is_padded(dim):
            self.stretch = stretch_of(dim)
            for kernel in self.kernels:
                stretch_gradients(kernel, self.stretch)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Tells the kernels the rate and the number of the step that begins."""
        rate, step = self.param_groups[0]["lr"], int(self.steps)
        for group in self.fused.param_groups:
            group["lr"] = rate / self.stretch
        self.fused.zero_grad()
        for _, part in self._shards():
            part.begin()
        for kernel in self.kernels:  # fbgemm counts lookups, those of evaluation too
            kernel.emb_module.iter.fill_(step)
            kernel.emb_module.iter_cpu.fill_(step)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Counts the step, and moves the rows that have not moved."""
        self.steps += 1
        for _, part in self._shards():
            part.move(self.param_groups[0]["lr"], int(self.steps))

    def gradients(self) -> list[tuple[str, Tensor]]:
        """Gradients [t, d] of the rows of this rank that the step has looked up, each with the name of its parameter.

        There are none where rows move in the backward. Made once a step: what scales them in place scales the step.
        """
        return [(name, part.gradient()[1]) for (name, _), part in self._shards()]

    def parts(self) -> dict[Block, Tensor]:
        """This rank's weights [n, d], sharing the memory, by parameter (as of a local table) and offsets."""
        return {
            (name, tuple(part.metadata.shard_offsets)): part.tensor.detach()
            for name, weight in self._weights().items()
            for part in weight.local_shards()
        }

    def sharded(self, values: Mapping[Block, Tensor]) -> dict[str, Any]:
        """ShardedTensors, by parameter, of what this rank has for each of :meth:`parts`; [n, d], or [n] a row.

        A table of which it has no part is left out. The memory is that of ``values``.
        """
        weights = self._weights()
        own = {name: {} for name, weight in weights.items() if weight.local_shards()}  # type: ignore[var-annotated]
        for (name, offsets), value in values.items():
            if name in own:
                own[name][offsets] = value
        return {name: _like(weights[name], parts) for name, parts in own.items()}

    def _shards(self) -> Iterator[tuple[Block, Shard]]:
        """This rank's parts of the tables, as of :meth:`parts`, where rows move in torch."""
        places = iter(part for ours in self.in_torch for part in ours.shards)
        for path, collection in self.collections.items() if self.in_torch else ():
            for kernel in (kernel for lookup in collection._lookups for kernel in _kernels(lookup)):
                for table in kernel.config.embedding_tables:
                    name = _local_name(f"{path}.embeddings.{table.name}.weight")
                    yield (name, tuple(table.local_metadata.shard_offsets)), next(places)

    def states(self) -> dict[str, dict[str, Any]]:
        """State by name of the parameter, as of a local table, and field; ShardedTensors that share the memory."""
        if self.in_torch:
            found = self._torch_states()
        else:
            found = {}
            for name, fields in self.fused.state_dict()["state"].items():
                own = {field.rpartition(".")[2]: narrowed(value, self.dim) for field, value in fields.items()}
                found[_local_name(name)] = own
        return {name: {"step": self.steps, **fields} for name, fields in found.items()}

    def _torch_states(self) -> dict[str, dict[str, Any]]:
        parts = dict(self._shards())
        found: dict[str, dict[str, Any]] = {name: {} for name, _ in parts}
        for field in next((part.state for part in parts.values()), {}):
            states = {block: part.state[field] for block, part in parts.items()}
            for name, value in self.sharded(states).items():
                found[name][field] = value
        return found

    def _weights(self) -> dict[str, Any]:
        """ShardedTensors of the tables' columns, by parameter, as of a local table."""
        return {
            _local_name(f"{path}.{key}"): narrowed(weight, self.dim)
            for path, collection in self.collections.items()
            for key, weight in collection.state_dict().items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state.items() if key != "steps"})
        if "steps" in state:
            self.steps.fill_(int(state["steps"]))


def _kernels(lookup: Any) -> list[Any]:
    return list(lookup._emb_modules)


def _like(weight: Any, values: Mapping[tuple[int, ...], Tensor]) -> Any:
    """A ShardedTensor that is cut as ``weight`` is. values: [n, d] or [n] of this rank's parts, by their offsets."""
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata

    first = next(iter(values.values()))
    metadata, rowwise = copy.deepcopy(weight.metadata()), first.ndim == 1
    columns = sorted({shard.shard_offsets[1] for shard in metadata.shards_metadata})

    def cut(shard: Any) -> Any:
        offsets, sizes = list(shard.shard_offsets), list(shard.shard_sizes)
        if rowwise:  # column shards each have a number a row: one after another
            offsets, sizes = [offsets[0] + columns.index(offsets[1]) * weight.shape[0]], sizes[:1]
        return ShardMetadata(offsets, sizes, shard.placement)

    if rowwise:
        metadata.size = torch.Size([len(columns) * weight.shape[0]])
    own = [shard.metadata for shard in weight.local_shards()]
    shards = [Shard(values[tuple(part.shard_offsets)], cut(part)) for part in own]
    metadata.shards_metadata = [cut(shard) for shard in metadata.shards_metadata]
    metadata.tensor_properties.dtype = first.dtype
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)


def _local_name(name: str) -> str:
    return name.replace(f"collection.embeddings.{TABLE}.weight", "weight")


def shard(model: nn.Module, config: Config, world: World, initial: bool = True) -> FusedTables | None:
    """Gives each rank its part of the model's tables, with initial values; returns what moves them.

    None where all tables stay whole (data_parallel).

    initial: False where all rows are about to be read from a checkpoint: they are not drawn.

    The model's other parameters stay as they are. Every rank calls it. The model's ``sharded_names`` afterwards are the
    names of the parameters that data parallelism has to leave alone.

    Raises UserError where the tables do not fit, before anything is allocated.
    """
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv

    embedding = config.embedding
    tables = table_shapes(model, config, world)
    if not tables:
        model.sharded_names = []  # type: ignore[assignment]
        return None
    ensure_process_group(world.device)
    rate, rule = table_rate(config), table_rule(config)
    with quiet():
        (dim,) = {table.dim for table in tables}
        by_fbgemm = not moves_in_torch(embedding, config.optim, world.device, dim)
        _say_who_moves(embedding, world, dim)
        # The planner counts the optimizer's state, which fbgemm does not have where rows move in torch.
        sharder = make_sharder(embedding, world.device, fused_params(embedding, True, rate, rule))
        plan = make_plan(model, embedding, world, sharder, tables)
        sharder = make_sharder(embedding, world.device, fused_params(embedding, by_fbgemm, rate, rule))
        dmp = DistributedModelParallel(
            model, env=ShardingEnv.from_process_group(dist.group.WORLD), device=world.device, plan=plan,
            sharders=[sharder], init_data_parallel=False, init_parameters=False,
        )  # fmt: skip
        owners = dict(sharded_modules(model))
        for owner in owners.values():
            is_item = isinstance(owner, ShardedItemTable)
            if is_item:
                owner.world = world
            _clear_spare_columns(owner.collection, owner.dim)
            if initial:
                _fill(owner.collection, [owner.initial] if is_item else owner.initial)
                if is_item:
                    _clear_padding(owner.collection)
        world.barrier()  # large tables take a rank its time, for which the first exchange would not wait
        collections = {f"{path}.collection": owner.collection for path, owner in owners.items()}
        inside = tuple(f"{path}." for path in collections)
        model.sharded_names = [name for name, _ in model.named_parameters() if name.startswith(inside)]  # type: ignore[assignment]
        return FusedTables(dmp, collections, by_fbgemm, rule, dim, rate, rate / config.optim.lr)


def _say_who_moves(embedding: EmbeddingConfig, world: World, dim: int) -> None:
    if world.is_first and world.device.type == "cuda" and not moved_by_fbgemm(embedding, world.device, dim):
        log.warning(
            "embedding.optimizer=%s with model.dim=%d and embedding.dtype=%s: rows move in torch, not in fbgemm's "
            "kernels; these serve model.dim=%d in float32 and float16",
            embedding.optimizer, dim, embedding.dtype, stored_width(dim),
        )  # fmt: skip


def ensure_process_group(device: torch.device) -> None:
    """torchrec wants a process group, be it of this process alone."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def sharded_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Paths of the modules of ``model`` that hold sharded tables, and the modules."""
    for path, module in model.named_modules():
        if isinstance(module, ShardedItemTable | FeatureTables) and getattr(module, "initial", None):
            yield path, module


def table_shapes(model: nn.Module, config: Config, world: World) -> list[TableShape]:
    """Of the tables to be sharded, with how many rows a rank asks for in a step, about."""
    run, loss = config.run, config.loss
    events = (run.batch_tokens or run.batch_users * config.model.max_len) / world.size
    found, averaged = [], config.optim.average_decay is not None
    for _, owner in sharded_modules(model):
        if isinstance(owner, ShardedItemTable):
            draws = {"sampled_softmax": events * loss.num_negatives, "full_softmax": math.inf}
            scored = events + draws.get(loss.name, loss.num_negatives / world.size)
            scored = min(scored, (owner.num_items + 1) / world.size)
            found.append(TableShape(TABLE, owner.num_items + 1, owner.dim, (events, scored), averaged))
        else:
            names = [key for key in owner.keys if key not in owner.whole]
            for name, initial in zip(names, owner.initial, strict=True):
                found.append(TableShape(name, initial.num_rows, initial.dim, (events,), averaged))
    _check_table_names(model, config.embedding)
    return found


def _check_table_names(model: nn.Module, embedding: EmbeddingConfig) -> None:
    """Raises UserError for a table of ``embedding.tables`` that the model has not."""
    features = [key for module in model.modules() if isinstance(module, FeatureTables) for key in module.keys]
    known = [TABLE, *features]
    unknown = [name for name in embedding.tables if name not in known]
    if unknown:
        raise UserError(f"embedding.tables: {unknown[0]} is no table, expected one of {', '.join(known)}")


def _fill(collection: Any, initial: list[InitialValues]) -> None:
    for weight, values in zip(collection.state_dict().values(), initial, strict=True):
        for part in narrowed(weight, values.dim).local_shards():
            first_row, first_column = part.metadata.shard_offsets
            values.write(part.tensor.detach(), first_row, first_column)


def _clear_spare_columns(collection: Any, dim: int) -> None:
    for weight in collection.state_dict().values():
        for part in weight.local_shards():
            part.tensor.detach()[:, max(0, dim - part.metadata.shard_offsets[1]) :].zero_()


def _clear_padding(collection: Any) -> None:
    for weight in collection.state_dict().values():
        for part in weight.local_shards():
            if part.metadata.shard_offsets[0] == 0 and len(part.tensor):
                part.tensor.detach()[0].zero_()
