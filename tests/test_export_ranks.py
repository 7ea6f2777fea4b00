"""Exports of what several ranks saved: as of the model that one process holds, however the tables were sharded."""

from __future__ import annotations

import dataclasses
import os
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch

from hstu import export
from hstu.checkpoint import Saver, State
from hstu.checkpoint_state import model_state
from hstu.config import HSTUConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.data.store import SequenceStore
from hstu.distributed import World
from hstu.model.retrieval import RetrievalModel
from hstu.runs import load_run
from tests.ranks import run_ranks
from tests.serving import NUM_ITEMS, small_config, small_store
from tests.test_export import describe_run, options, whole_vectors

pytest.importorskip("torchrec")


def save(folder, config, store_path, ranks_of_node):
    """Saves the initial model, sharded; returns the offsets and sizes of this rank's parts of the item table."""
    from hstu.item_rows import ManagedRows
    from hstu.sharded.tables import shard

    world = World.current()
    torch.manual_seed(3)
    model = RetrievalModel(config.model, SequenceStore.open(store_path).num_items, embedding=config.embedding)
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(ranks_of_node)):
        shard(model, config, world)
    for module in model.modules():
        if isinstance(module, ManagedRows):
            module.take_in(torch.tensor([5, 2, 9, 2, 30, 17, 5, 11]))
    saver = Saver(folder / "checkpoints", keep_last=1, world=world)
    saver.save_best(State(model_state(model), {"progress": {}}))
    saver.close()
    weight = next(value for name, value in model.state_dict().items() if name.endswith("table.weight")
                  or name.endswith("table.rows.weight"))  # fmt: skip
    local = weight.local_shards() if hasattr(weight, "local_shards") else []
    return [(tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)) for s in local]


ROWS, TABLE = [[((0, 0), (16, 8))], [((16, 0), (15, 8))]], [[((0, 0), (31, 8))], []]
COLUMNS = [[((0, 0), (31, 4))], [((0, 4), (31, 4))]]
CASES = {
    "row_wise": ({"sharding": "row_wise"}, 8, 2, ROWS),
    "table_wise": ({"sharding": "table_wise"}, 8, 2, TABLE),
    "column_wise": ({"sharding": "column_wise"}, 8, 2, COLUMNS),
    "grid": (
        {"sharding": "grid"}, 8, 2,
        [[((0, 0), (16, 4))], [((16, 0), (15, 4))], [((0, 4), (16, 4))], [((16, 4), (15, 4))]],
    ),
    "data_parallel": ({"sharding": "data_parallel"}, 8, 2, [[], []]),
    "row_wise-of-50": ({"sharding": "row_wise"}, 50, 2, [[((0, 0), (16, 50))], [((16, 0), (15, 50))]]),
    "column_wise-of-6": ({"sharding": "column_wise"}, 6, 2, [[((0, 0), (31, 4))], [((0, 4), (31, 2))]]),
    "float16": ({"sharding": "row_wise", "dtype": "float16"}, 8, 2, ROWS),
    "hash": ({"sharding": "row_wise", "ids": "hash", "rows": 9}, 8, 2, [[((0, 0), (5, 8))], [((5, 0), (5, 8))]]),
    "managed": ({"sharding": "column_wise", "ids": "managed", "rows": 5}, 8, 2,
                [[((0, 0), (6, 4))], [((0, 4), (6, 4))]]),
}  # fmt: skip


@pytest.mark.parametrize("embedding, dim, ranks_of_node, expected", CASES.values(), ids=CASES)
def test_an_export_is_that_of_the_whole_model(tmp_path, monkeypatch, embedding, dim, ranks_of_node, expected):
    monkeypatch.setattr("hstu.checkpoint_rows.PART_BYTES", 7 * 4 * dim)
    store = small_store(tmp_path / "store")
    model = HSTUConfig(dim=dim, num_blocks=1, num_heads=2, qk_dim=4, v_dim=4, max_len=10)
    config = dataclasses.replace(
        small_config(), model=model, embedding=EmbeddingConfig("sharded", "rowwise_adagrad", **embedding)
    )
    folder = tmp_path / "run"
    describe_run(folder, config, store)
    assert run_ranks(len(expected), save, folder, config, store.path, ranks_of_node) == expected

    _, _, whole = load_run(folder)
    export.export_run(options(folder, tmp_path / "out"))
    known = np.arange(1, NUM_ITEMS + 1)
    if config.embedding.ids == "managed":
        known = np.unique(whole.table.item_rows.items().numpy())[1:]
        assert 2 <= len(known) <= 4
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert items["item"].to_list() == store.item_raw_ids[known - 1].tolist()
    assert items["title"].to_list() == store.item_attribute("title")[known - 1].tolist()
    np.testing.assert_array_equal(items["vector"].to_numpy(), scored(whole, known))
    np.testing.assert_allclose(items["vector"].to_numpy(), whole_vectors(whole, known), rtol=1e-6)
    library = pytest.importorskip("safetensors.torch")
    library.save_file(whole.state_dict(), tmp_path / "expected", metadata={})
    found = library.load_file(tmp_path / "out" / "model.safetensors")
    library.save_file(found, tmp_path / "found", metadata={})
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def scored(model, items):
    with torch.no_grad():
        return export.as_scored(model.table, model.table.lookup(torch.from_numpy(items))).numpy()
