"""Embeddings of categorical features: torchrec's EmbeddingCollection, or plain torch tables of the same names.

Legend: n rows, V values of a feature, D model width, F features.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hstu.data.ranking_batches import Features
from hstu.embedding import INIT_STD
from hstu.errors import UserError
from hstu.sharded.initial import InitialValues
from hstu.sharded.width import narrowed, own_columns, stored_width
from hstu.transfer import to_device

log = logging.getLogger(__name__)

BAGS = 1024
"""Rows of a feature in sharded tables, whose values are not pooled. What they are cut into does not matter, but kernels
of fbgemm on the GPU go through a row one value after another, so that one row of all would take a second."""


@cache
def has_torchrec() -> bool:
    """Whether torchrec and the fbgemm ops it needs can be imported."""
    if importlib.util.find_spec("torchrec") is None or importlib.util.find_spec("fbgemm_gpu") is None:
        return False
    try:
        with torch.device("cpu"):  # it computes something as it is imported, which on the meta device it cannot
            import torchrec  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("torchrec cannot be imported (%s): plain embedding tables take its place; see hstu-doctor", line)
        return False
    # torchrec's tensors ask torch.fx whether they are traced, and torch.fx then advises torchrec's authors.
    logging.getLogger("torch.fx._symbolic_trace").addFilter(_wanted)
    return True


def _wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("is_fx_tracing will return true")


class FeatureTables(nn.Module):
    """One table [codes, D] a feature, by torchrec where it is installed.

    Without torchrec plain tables with the same parameter names (``collection.embeddings.<feature>.weight``) take its
    place, and a checkpoint of one loads into the other.

    Args:
        sizes: feature -> number of codes, 0 .. size - 1.
        dim: D.
        use_torchrec: None: where it can be imported.
        sharded: the tables stay empty until ``hstu.sharded.tables.shard`` gives each rank its part.
        dtype: of sharded tables.
        whole: features whose tables stay whole on every rank all the same (data parallel), learning as local ones.
    """

    def __init__(
        self, sizes: dict[str, int], dim: int, use_torchrec: bool | None = None, sharded: bool = False,
        dtype: str = "float32", whole: Container[str] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.keys, self.dim, self.sharded = tuple(sizes), dim, sharded and bool(sizes)
        self.uses_torchrec = bool(sizes) and (has_torchrec() if use_torchrec is None else use_torchrec)
        names = [table_name(key) for key in sizes]
        if len(set(names)) < len(names):
            raise ValueError(f"features {list(sizes)} give the same table name; rename one")
        self.initial: list[InitialValues] = []
        """Of sharded tables, in the order of ``sizes``."""
        self.whole = tuple(key for key in sizes if self.sharded and key in whole)
        self.collected = tuple(key for key in sizes if key not in self.whole)
        """Features of the collection."""
        self._given: list[Tensor] | None = None
        if self.sharded:
            self._make_sharded(sizes, dtype)
            return
        with torch.random.fork_rng(devices=[]):  # what a collection draws must not move the initial weights after it
            self.collection: Any = _collection(sizes, dim) if self.uses_torchrec else _PlainCollection(sizes, dim)
        with torch.no_grad():
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=INIT_STD)

    def _make_sharded(self, sizes: dict[str, int], dtype: str) -> None:
        if not self.uses_torchrec:
            raise UserError("embedding.kind=sharded: expected torchrec and fbgemm-gpu; see hstu-doctor, or take local")
        with torch.random.fork_rng(devices=[]):
            self.replicas = _PlainCollection({key: sizes[key] for key in self.whole}, self.dim)
        tables = {table_name(key): (size, [key]) for key, size in sizes.items() if key not in self.whole}
        self.collection = make_collection(tables, stored_width(self.dim), "meta", dtype) if tables else None
        for key, size in sizes.items():
            if key in self.whole:
                nn.init.normal_(self.replicas.embeddings[table_name(key)].weight.detach(), std=INIT_STD)  # type: ignore[operator, union-attr]
            else:
                self.initial.append(InitialValues.take(size, self.dim, _normal))
        self._register_state_dict_hook(_to_local_names)
        self.register_load_state_dict_pre_hook(_from_local_names)

    @property
    def num_weights(self) -> int:
        """Of all ranks, without columns that are only stored."""
        if not self.sharded:
            return sum(p.numel() for p in self.parameters())
        return sum(p.numel() for p in self.replicas.parameters()) + sum(i.num_rows * i.dim for i in self.initial)

    def _apply(self, fn: Any, recurse: bool = True) -> FeatureTables:
        if self.sharded:  # rows lie where they were planned
            self.replicas._apply(fn, recurse)
            return self
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def forward(self, features: Features) -> list[Tensor]:
        """[n, D] of each feature in the order of ``sizes``; several values of a row are summed.

        Raises ValueError where the features are not those of the tables.
        """
        if features.keys != self.keys:
            raise ValueError(f"features are {list(features.keys)}, the tables {list(self.keys)}")
        rows = features.num_rows
        if rows == 0 and not self.sharded:  # torchrec cannot split nothing
            table = next(self.parameters(), features.numbers)
            return [table.new_zeros(0, table.shape[1])] * len(self.keys)
        pooled = []
        lengths = features.lengths.view(len(self.keys), rows)
        for index, embedded in enumerate(self._lookup(features)):
            if features.counts[index] == rows:  # at least one value a row, so exactly one
                pooled.append(embedded)
                continue
            owner = torch.repeat_interleave(
                torch.arange(rows, device=embedded.device), lengths[index], output_size=features.counts[index]
            )
            pooled.append(embedded.new_zeros(rows, embedded.shape[1]).index_add(0, owner, embedded))
        return pooled

    def _lookup(self, features: Features) -> list[Tensor]:
        """[V, D] of each feature."""
        if not self.uses_torchrec:
            return self.collection(features)  # type: ignore[no-any-return]
        if self.sharded and torch.is_inference_mode_enabled():  # fbgemm's lookups are not there in it
            with torch.inference_mode(False), torch.no_grad():
                plain = replace(features, values=features.values.clone(), lengths=features.lengths.clone())
                return self._lookup(plain)
        collected = self._given
        if collected is None:
            collected = self._own(self.collection(self.keyed(features))) if self.collected else []
        if not self.whole:
            return collected
        found = dict(zip(self.whole, self.replicas(_part(features, self.whole)), strict=True))
        found |= zip(self.collected, collected, strict=True)
        return [found[key] for key in self.keys]

    def keyed(self, features: Features) -> Any:
        """What of ``features`` is looked up in the collection, as it takes it."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        part = _part(features, self.collected) if self.whole else features
        counts = list(part.counts)  # given, so that no kernel has to be waited for
        lengths, stride = part.lengths, part.num_rows
        if self.sharded:  # a number of rows that is the same everywhere: a rank without values takes part too
            lengths, stride = to_device(spread(counts), lengths.device), BAGS
        return KeyedJaggedTensor(list(part.keys), part.values, lengths=lengths, length_per_key=counts, stride=stride)

    def _own(self, found: Any) -> list[Tensor]:
        """[V, D] of each feature of the collection, of what it has found."""
        return [own_columns(found[key].values(), self.dim) for key in self.collected]

    @contextmanager
    def given(self, found: Any) -> Iterator[None]:
        """Inside, lookups take what the collection has found already."""
        self._given = self._own(found)
        try:
            yield
        finally:
            self._given = None


def spread(counts: Sequence[int]) -> Tensor:
    """Lengths [F * BAGS] int64 of the rows that the values of each feature are laid out in, evenly; on the CPU.

    counts: [F] values of each feature.
    """
    edges = torch.arange(BAGS + 1) * torch.tensor(counts, dtype=torch.int64)[:, None] // BAGS
    return edges.diff(dim=1).view(-1)


def _part(features: Features, keys: tuple[str, ...]) -> Features:
    """Of some of the features; the lengths stay behind."""
    values = dict(zip(features.keys, features.values.split(list(features.counts)), strict=True))
    counts = dict(zip(features.keys, features.counts, strict=True))
    joined = torch.cat([values[key] for key in keys])
    return Features(keys, joined, features.lengths[:0], tuple(counts[key] for key in keys), features.numbers)


def local_name(name: str) -> str:
    """Of a parameter of a table that stays whole, the name that it has among local tables."""
    return name.replace("replicas.embeddings.", "collection.embeddings.")


def _to_local_names(module: FeatureTables, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in module.keys:
        name = f"embeddings.{table_name(key)}.weight"
        if key in module.whole:
            state[f"{prefix}collection.{name}"] = state.pop(f"{prefix}replicas.{name}")
        else:
            state[f"{prefix}collection.{name}"] = narrowed(state[f"{prefix}collection.{name}"], module.dim)


def _from_local_names(module: FeatureTables, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    for key in module.whole:
        name = f"embeddings.{table_name(key)}.weight"
        if f"{prefix}collection.{name}" in state:
            state[f"{prefix}replicas.{name}"] = state.pop(f"{prefix}collection.{name}")


def _collection(sizes: dict[str, int], dim: int) -> nn.Module:
    return make_collection({table_name(key): (size, [key]) for key, size in sizes.items()}, dim)


def make_collection(
    tables: dict[str, tuple[int, list[str]]], dim: int, device: str | None = None, dtype: str = "float32"
) -> nn.Module:
    """torchrec's EmbeddingCollection of tables, name -> rows and features. device: None: torch's default."""
    from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection

    data_type = {"float32": DataType.FP32, "float16": DataType.FP16, "bfloat16": DataType.BF16}[dtype]
    configs = [
        EmbeddingConfig(
            name=name, embedding_dim=dim, num_embeddings=rows, feature_names=features, data_type=data_type
        )
        for name, (rows, features) in tables.items()
    ]  # fmt: skip
    place = torch.get_default_device() if device is None else torch.device(device)
    return EmbeddingCollection(tables=configs, device=place)  # type: ignore[no-any-return]


def _normal(block: Tensor, generator: torch.Generator) -> None:
    nn.init.normal_(block, std=INIT_STD, generator=generator)


class _PlainCollection(nn.Module):
    def __init__(self, sizes: dict[str, int], dim: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({table_name(key): nn.Embedding(n, dim) for key, n in sizes.items()})

    def forward(self, features: Features) -> list[Tensor]:
        parts = features.values.split(list(features.counts))
        return [table(part) for table, part in zip(self.embeddings.values(), parts, strict=True)]


def table_name(key: str) -> str:
    """A module name: no dots, none that torch takes for itself."""
    name = key.replace(".", "_")
    return f"{name}_" if hasattr(nn.ModuleDict(), name) else name
