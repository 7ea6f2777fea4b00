"""Exports: the weights and vectors of the run, with which other programs score as it does."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import types

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from hstu import export
from hstu.checkpoint import Saver, State
from hstu.checkpoint_rows import StoredRows
from hstu.checkpoint_state import model_state
from hstu.config import to_dict
from hstu.config_embedding import EmbeddingConfig
from hstu.data.store import RARE_ITEM, write_store
from hstu.errors import UserError
from hstu.model.retrieval import RetrievalModel
from hstu.recommend import Recommender
from tests.serving import NUM_ITEMS, TITLES, small_config, small_store


@pytest.fixture
def run(tmp_path):
    """A run folder, with its store and model."""
    return make_run(tmp_path, small_store(tmp_path / "store"))


def make_run(tmp_path, store, config=None, model=None):
    """A run folder whose best checkpoint is ``model``; also its store and the model."""
    config, folder = config or small_config(), tmp_path / "run"
    if model is None:
        torch.manual_seed(0)
        model = RetrievalModel(config.model, store.num_items, embedding=config.embedding)
    describe_run(folder, config, store)
    saver = Saver(folder / "checkpoints", keep_last=1)
    saver.save_best(State(model_state(model), {"progress": {}}))
    saver.close()
    return folder, store, model


def describe_run(folder, config, store):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    environment = {"store": str(store.path.resolve()), "split_hash": store.meta.get("split_hash")}
    (folder / "environment.json").write_text(json.dumps(environment))


def whole_vectors(model, items=None):
    """Item vectors [V, D] by the model's own lookup, normalised as it scores."""
    items = torch.arange(1, model.table.num_items + 1) if items is None else torch.as_tensor(items)
    with torch.no_grad():
        found = model.table.lookup(items)
        return (torch.nn.functional.normalize(found, dim=1) if model.table.l2_normalize else found).numpy()


def options(folder, out, **more):
    return {"run": folder, "out": out, "which": "best", "format": ["safetensors", "parquet"], **more}


def test_weights_and_vectors_are_those_of_the_run(run, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    folder, store, model = run
    files = export.export_run(options(folder, tmp_path / "out"))
    assert [f.name for f in files] == ["config.yaml", "model.safetensors", "items.parquet"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(f.name for f in files)
    assert files[0].read_text() == (folder / "config.yaml").read_text()
    weights = safetensors.load_file(files[1])
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    items = pl.read_parquet(files[2])
    assert items.columns == ["item", "title", "vector"] and items["vector"].dtype == pl.Array(pl.Float32, 8)
    assert items["item"].to_list() == list(range(11, 11 + NUM_ITEMS)) and items["title"].to_list() == TITLES.tolist()
    np.testing.assert_allclose(items["vector"].to_numpy(), whole_vectors(model), rtol=1e-6)
    assert "items.parquet" in capsys.readouterr().out


def test_dot_products_with_the_vectors_are_the_scores(run, tmp_path):
    folder, store, model = run
    export.export_run(options(folder, tmp_path / "out", format="parquet"))
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    for cache_mib in (0, 8):
        recommender = Recommender(small_config(), store, model, device="cpu", cache_mib=cache_mib)
        scores = recommender.query(user=1000) @ items["vector"].to_numpy().T
        best = recommender.recommend(user=1000, k=10, filter_history="none").items
        order = np.argsort(-scores[0])[:10]
        assert items["item"].to_numpy()[order].tolist() == [item.item for item in best]
        assert scores[0][order].tolist() == pytest.approx([item.score for item in best], rel=1e-5)
    made_up = recommender.query(history=[11, 12], history_times=[5, 6], request_time=9)
    assert made_up.shape == (1, 8) and made_up.dtype == np.float32


def test_the_index_finds_what_hstu_recommend_does(run, tmp_path):
    faiss = pytest.importorskip("faiss", reason="pip install faiss-cpu")
    folder, store, model = run
    export.export_run(options(folder, tmp_path / "out", format=["parquet", "faiss"]))
    index = faiss.read_index(str(tmp_path / "out" / "items.faiss"))
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    recommender = Recommender(small_config(), store, model, device="cpu")
    for user in (1000, 1003, 1006):
        scores, rows = index.search(recommender.query(user=user), 10)
        best = recommender.recommend(user=user, k=10, filter_history="none").items
        assert items["item"].to_numpy()[rows[0]].tolist() == [item.item for item in best]
        assert scores[0].tolist() == pytest.approx([item.score for item in best], rel=1e-5)


def test_the_bucket_of_rare_items_is_left_out(tmp_path):
    store = write_store(
        tmp_path / "store", offsets=[0, 3], item_ids=[1, 3, 2], timestamps=[5, 6, 7], num_items=3,
        meta={"name": "rare", "protocol": "reference"}, item_raw_ids=np.array(["a", "b", RARE_ITEM]),
    )  # fmt: skip
    folder, *_ = make_run(tmp_path, store)
    export.export_run(options(folder, tmp_path / "out", format=["parquet"]))
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert items["item"].to_list() == ["a", "b"] and items.columns == ["item", "vector"]


def test_unnormalised_tables_are_written_as_they_are(tmp_path):
    config = small_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, l2_normalize=False))
    folder, _, model = make_run(tmp_path, small_store(tmp_path / "store"), config)
    export.export_run(options(folder, tmp_path / "out"))
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    np.testing.assert_array_equal(items["vector"].to_numpy(), model.table.weight[1:].detach().numpy())


def test_items_that_share_rows_have_their_vectors(tmp_path):
    config = dataclasses.replace(small_config(), embedding=EmbeddingConfig(ids="hash", rows=7))
    folder, store, model = make_run(tmp_path, small_store(tmp_path / "store"), config)
    export.export_run(options(folder, tmp_path / "out"))
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert items["item"].to_list() == store.item_raw_ids.tolist() and items["vector"].n_unique() == 7
    np.testing.assert_allclose(items["vector"].to_numpy(), whole_vectors(model), rtol=1e-6)


def test_a_checkpoint_of_the_first_format(tmp_path):
    folder, store, model = make_run(tmp_path, small_store(tmp_path / "store"))
    shutil.rmtree(folder / "checkpoints" / "best")
    old = {"format": 1, "model": model.state_dict(), "optimizer": {"state": {}}, "progress": {}, "rng": {}}
    torch.save(old, folder / "checkpoints" / "best.pt")
    export.export_run(options(folder, tmp_path / "out"))
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    np.testing.assert_allclose(items["vector"].to_numpy(), whole_vectors(model), rtol=1e-6)
    safetensors = pytest.importorskip("safetensors.torch")
    assert torch.equal(safetensors.load_file(tmp_path / "out" / "model.safetensors")["table.weight"],
                       model.table.weight)  # fmt: skip


@pytest.mark.parametrize("ids", ["exact", "hash"])
def test_memory_is_that_of_a_part(tmp_path, monkeypatch, ids):
    """Files are those of the same run exported at once, of parts of five rows of eight float32 at most."""
    embedding = EmbeddingConfig(ids=ids, rows=None if ids == "exact" else 20)
    config = dataclasses.replace(small_config(), embedding=embedding)
    folder, *_ = make_run(tmp_path, small_store(tmp_path / "store"), config)
    export.export_run(options(folder, tmp_path / "once"))
    sizes, read = [], StoredRows.read
    limit = 5 * 8 * 4

    def counted(self, name, rows):
        found = read(self, name, rows)
        sizes.append((found.nbytes, len(found)))
        return found

    monkeypatch.setattr(StoredRows, "read", counted)
    monkeypatch.setattr("hstu.checkpoint_rows.PART_BYTES", limit)
    export.export_run(options(folder, tmp_path / "parts"))
    assert all(num_bytes <= limit or num_rows == 1 for num_bytes, num_rows in sizes)
    assert len(sizes) > 2 * NUM_ITEMS / 5
    once, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "parts"))
    assert once == parts
    once, parts = (pl.read_parquet(tmp_path / name / "items.parquet") for name in ("once", "parts"))
    assert once.equals(parts) and once.schema == parts.schema and len(parts) == NUM_ITEMS


def test_what_cannot_be_exported_is_one_clear_line(run, tmp_path, monkeypatch):
    folder, *_ = run
    with pytest.raises(UserError, match="format=onnx: expected some of safetensors, parquet, faiss"):
        export.export_run(options(folder, tmp_path / "out", format="onnx"))
    for module, name in (("faiss", "faiss"), ("polars", "parquet")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match="pip install"):
                export.export_run(options(folder, tmp_path / "out", format=[name]))
    assert not (tmp_path / "out").exists()


def test_an_index_that_does_not_fit_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", types.ModuleType("faiss"))
    monkeypatch.setattr(export, "free_bytes", lambda: 4 * NUM_ITEMS * 8 - 1)
    expected = (
        r"format=faiss: an exact index of 30 vectors of 8 is 0.0 GiB in memory, 0.0 GiB are free: leave faiss out"
    )
    with pytest.raises(UserError, match=expected):
        export.export_run(options(run[0], tmp_path / "out", format=["parquet", "faiss"]))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export, "free_bytes", lambda: 4 * NUM_ITEMS * 8)
    with pytest.raises(AttributeError, match="IndexFlatIP"):  # of the module that is none
        export.export_run(options(run[0], tmp_path / "out", format=["faiss"]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


def test_free_memory_is_some_and_no_more_than_the_machine_has():
    assert 2**20 < export.free_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_checkpoint_that_is_damaged_or_of_another_model_is_refused(run, tmp_path):
    folder, store, _ = run
    file = next((folder / "checkpoints" / "best").glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"checkpoint .*/best is damaged \(__0_0.distcp has checksum"):
        export.export_run(options(folder, tmp_path / "out"))
    file.write_bytes(content)
    config = small_config()
    for changes, expected in (
        ({"num_blocks": 2}, r"encoder\..* is missing, expected shape"),
        ({"dim": 16}, r"is of shape \(.*8.*\), expected shape \(.*16.*\): it is of another model"),
    ):
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(other)))
        with pytest.raises(UserError, match=expected):
            export.export_run(options(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["safetensors", "parquet"])
def test_a_failed_export_leaves_the_earlier_one(run, tmp_path, monkeypatch, name):
    folder, out = run[0], tmp_path / "out"
    monkeypatch.setattr("hstu.checkpoint_rows.PART_BYTES", 5 * 8 * 4)
    file = export.export_run(options(folder, out, format=name))[1]
    before, names = file.read_bytes(), sorted(out.iterdir())
    read, calls = StoredRows.read, []

    def failing(self, tensor, rows):
        calls.append(tensor)
        if len(calls) == 4:
            raise UserError("the disk is gone")
        return read(self, tensor, rows)

    with monkeypatch.context() as patch:
        patch.setattr(StoredRows, "read", failing)
        with pytest.raises(UserError, match="the disk is gone"):
            export.export_run(options(folder, out, format=name))
    assert len(calls) == 4 and file.read_bytes() == before and sorted(out.iterdir()) == names


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("name, file", [("safetensors", "model.safetensors"), ("parquet", "items.parquet")])
def test_a_full_disk_is_one_line(run, tmp_path, name, file):
    out = tmp_path / "out"
    out.mkdir()
    (out / f".{file}.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"the disk is full \({out}/{file}\): free some space or choose another out"):
        export.export_run(options(run[0], out, format=name))
    assert [path.name for path in out.iterdir()] == ["config.yaml"]
