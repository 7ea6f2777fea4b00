"""Grid sharding of tables that are looked up id by id, which torchrec has for pooled embeddings only.

A table is cut by columns into a part for each node, and a part by rows over the ranks of its node. An id goes to one
rank of each node, that in whose block it lies; the parts of its row come back and are put side by side. What is not
here is torchrec's: the plan, the lookups, the exchanges and the optimizers.

Legend: R ranks, N nodes of G ranks, F features of the parts of all nodes (a feature counts once for each part).
"""

from __future__ import annotations

from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.dist_data import KJTAllToAll
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import bucketize_kjt_before_all2all
from torchrec.distributed.sharding.cw_sequence_sharding import CwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingDist
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist

from hstu.transfer import to_device

GRID_SHARD = "grid_shard"
"""torchrec's name."""


class _GridInputDist(RwSparseFeaturesDist):
    """Sends each id to its rank of each node.

    Args:
        features_per_rank: [R]; those of a node's ranks are the same.
        hash_sizes: [F] rows of the table of each feature.
        node_size: G.
    """

    def __init__(self, group: Any, features_per_rank: list[int], hash_sizes: list[int], node_size: int,
                 device: torch.device | None) -> None:  # fmt: skip
        super(RwSparseFeaturesDist, self).__init__()  # the collection knows an exchange by rows by this class
        self.node_size, num_features = node_size, len(hash_sizes)
        starts = [0, *accumulate(features_per_rank[::node_size])]
        self.order = [
            block * num_features + feature
            for node in range(len(starts) - 1)
            for block in range(node_size)
            for feature in range(starts[node], starts[node + 1])
        ]  # rank by rank, what stands block by block
        blocks = [-(-size // node_size) for size in hash_sizes]
        self.register_buffer("blocks", torch.tensor(blocks, device=device), persistent=False)
        self.register_buffer("order_tensor", torch.tensor(self.order, device=device, dtype=torch.int32), False)
        self.unbucketize_permute_tensor: Tensor | None = None
        self.exchange = KJTAllToAll(group, features_per_rank)

    def forward(self, sparse_features: Any) -> Any:
        """Ids of the F features, in the order of the nodes, as they arrive on the ranks."""
        by_block, places = bucketize_kjt_before_all2all(
            sparse_features, self.node_size, self.blocks, output_permute=True  # type: ignore[arg-type]
        )  # fmt: skip
        assert places is not None
        self.unbucketize_permute_tensor = places + self._shifts(by_block.length_per_key(), places)[places]
        return self.exchange(by_block.permute(self.order, self.order_tensor))  # type: ignore[arg-type]

    def _shifts(self, counts: list[int], like: Tensor) -> Tensor:
        """How far each value moves when the segments, of ``counts`` values, are put in ``order``."""
        old = [0, *accumulate(counts)]
        new = [0, *accumulate(counts[segment] for segment in self.order)]
        moves = [0] * len(counts)
        for place, segment in enumerate(self.order):
            moves[segment] = new[place] - old[segment]
        known = to_device(torch.tensor([moves, counts], dtype=like.dtype), like.device)
        return known[0].repeat_interleave(known[1], output_size=old[-1])


class _GridSharding(CwSequenceEmbeddingSharding):
    """Column shards as of torchrec's column-wise sharding, each cut by rows over the ranks of a node."""

    _grouped_embedding_configs_per_rank: list[list[Any]]

    def __init__(self, sharding_infos: list[Any], env: Any, device: torch.device | None = None,
                 qcomm_codecs_registry: Any = None) -> None:  # fmt: skip
        super().__init__(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)
        self.node_size = node_size_of(sharding_infos[0].param_sharding)
        self.num_features = super().features_per_rank()  # [R]
        # A part of columns counts once: names and features are those of the first ranks of the nodes.
        self._grouped_embedding_configs_per_rank = [
            configs if rank % self.node_size == 0 else []
            for rank, configs in enumerate(self._grouped_embedding_configs_per_rank)
        ]

    def _shard(self, sharding_infos: list[Any]) -> list[list[Any]]:
        tables = super()._shard(sharding_infos)
        for table in chain.from_iterable(tables):
            table.local_rows = table.local_metadata.shard_sizes[0]
        return tables

    def features_per_rank(self) -> list[int]:
        return self.num_features

    def create_input_dist(self, device: torch.device | None = None) -> Any:
        configs = chain.from_iterable(self._grouped_embedding_configs_per_rank)
        hash_sizes = [size for config in configs for size in config.feature_hash_sizes()]
        return _GridInputDist(self._pg, self.num_features, hash_sizes, self.node_size, device or self._device)

    def create_output_dist(self, device: torch.device | None = None) -> Any:
        own = self.num_features[self._rank]
        return RwSequenceEmbeddingDist(self._pg, own, device or self._device, self.qcomm_codecs_registry)  # type: ignore[arg-type]


def node_size_of(sharding: Any) -> int:
    """G of a table's plan."""
    return len({shard.shard_offsets[0] for shard in sharding.sharding_spec.shards})


class _GridCollection(ShardedEmbeddingCollection):
    def __init__(self, module: Any, plan: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(module, plan, *args, **kwargs)
        for table in module.embedding_configs():
            if plan[table.name].sharding_type == GRID_SHARD:
                nodes = plan[table.name].ranks[:: node_size_of(plan[table.name])]  # of the parts from left to right
                order = [sorted(nodes).index(node) for node in nodes]
                self._features_to_permute_indices |= dict.fromkeys(table.feature_names, order)

    @classmethod
    def create_embedding_sharding(
        cls, sharding_type: str, sharding_infos: list[Any], env: Any, device: torch.device | None = None,
        qcomm_codecs_registry: Any = None,
    ) -> Any:  # fmt: skip
        if sharding_type == GRID_SHARD:
            return _GridSharding(sharding_infos, env, device, qcomm_codecs_registry)
        return super().create_embedding_sharding(sharding_type, sharding_infos, env, device, qcomm_codecs_registry)

    def _embedding_dim_for_sharding_type(self, sharding_type: str) -> int:
        if sharding_type == GRID_SHARD:
            return self._sharding_type_to_sharding[sharding_type].embedding_dims()[0]
        return super()._embedding_dim_for_sharding_type(sharding_type)


class GridSharder(EmbeddingCollectionSharder):
    """torchrec's sharder of EmbeddingCollections, with grid_shard beside what it knows."""

    def shard(
        self, module: Any, params: dict[str, Any], env: Any, device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:  # fmt: skip
        return _GridCollection(
            module, params, env, self.fused_params, device, qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )  # fmt: skip

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*super().sharding_types(compute_device_type), GRID_SHARD]

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingCollection]:
        return _GridCollection
