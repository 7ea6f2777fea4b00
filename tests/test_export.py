"""Exports: the weights and vectors of the run, with which other programs score as it does."""

from __future__ import annotations

import sys

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from hstu import export
from hstu.data.store import RARE_ITEM, write_store
from hstu.errors import UserError
from hstu.model.retrieval import RetrievalModel
from hstu.recommend import Recommender
from tests.serving import NUM_ITEMS, TITLES, small_config, small_model, small_store


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder as far as the export reads it; returns its store and model too."""
    return make_run(tmp_path, monkeypatch, small_store(tmp_path / "store"))


def make_run(tmp_path, monkeypatch, store, model=None):
    config, folder = small_config(), tmp_path / "run"
    model = model or small_model(config, store)
    folder.mkdir()
    (folder / "config.yaml").write_text("experiment: small\n")
    monkeypatch.setattr("hstu.runs.load_run", lambda run, which="best": (config, store, model.eval()))
    return folder, store, model


def options(folder, out, **more):
    return {"run": folder, "out": out, "which": "best", "format": ["safetensors", "parquet"], **more}


def test_weights_and_vectors_are_those_of_the_run(run, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    folder, store, model = run
    files = export.export_run(options(folder, tmp_path / "out"))
    assert [f.name for f in files] == ["config.yaml", "model.safetensors", "items.parquet"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(f.name for f in files)
    assert yaml.safe_load(files[0].read_text()) == {"experiment": "small"}
    weights = safetensors.load_file(files[1])
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    items = pl.read_parquet(files[2])
    assert items.columns == ["item", "title", "vector"] and items["vector"].dtype == pl.Array(pl.Float32, 8)
    assert items["item"].to_list() == list(range(11, 11 + NUM_ITEMS)) and items["title"].to_list() == TITLES.tolist()
    expected = torch.nn.functional.normalize(model.table.weight[1:].detach(), dim=1)
    np.testing.assert_allclose(items["vector"].to_numpy(), expected.numpy(), rtol=1e-6)
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


def test_the_bucket_of_rare_items_is_left_out(tmp_path, monkeypatch):
    store = write_store(
        tmp_path / "store", offsets=[0, 3], item_ids=[1, 3, 2], timestamps=[5, 6, 7], num_items=3,
        meta={"name": "rare", "protocol": "reference"}, item_raw_ids=np.array(["a", "b", RARE_ITEM]),
    )  # fmt: skip
    folder, *_ = make_run(tmp_path, monkeypatch, store)
    export.export_run(options(folder, tmp_path / "out", format=["parquet"]))
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert items["item"].to_list() == ["a", "b"] and items.columns == ["item", "vector"]


def test_unnormalised_tables_are_written_as_they_are(tmp_path):
    model = RetrievalModel(small_config().model, 5)
    model.table.l2_normalize = False
    np.testing.assert_array_equal(export.item_vectors(model), model.table.weight[1:].detach().numpy())


def test_what_cannot_be_exported_is_one_clear_line(run, tmp_path, monkeypatch):
    folder, store, model = run
    with pytest.raises(UserError, match="format=onnx: expected some of safetensors, parquet, faiss"):
        export.export_run(options(folder, tmp_path / "out", format="onnx"))
    for module, name in (("safetensors.torch", "safetensors"), ("faiss", "faiss"), ("polars", "parquet")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match="pip install"):
                export.export_run(options(folder, tmp_path / "out", format=[name]))
    assert not (tmp_path / "out" / "items.parquet").exists()
