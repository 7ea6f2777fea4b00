"""Sharded tables whose width is no multiple of 4: stored with more columns, and otherwise as wide as they are."""

import contextlib
import dataclasses
from unittest import mock

import polars
import pytest
import torch

from hstu import checkpoint, checkpoint_dcp
from hstu.config import from_dict
from hstu.config_embedding import TABLE_OPTIMIZERS, EmbeddingConfig
from hstu.config_model import HSTUConfig
from hstu.distributed import World
from hstu.embedding import LocalItemTable, initial_rows
from hstu.errors import UserError
from hstu.export import as_scored, export_run
from hstu.feature_tables import FeatureTables
from hstu.model.retrieval import RetrievalModel
from hstu.plan import run as plan_and_show
from hstu.planning.config import from_options
from hstu.planning.memory import plan_memory
from hstu.planning.tables import shard_shape
from hstu.planning.work import Workload
from hstu.runs import load_run, open_store
from hstu.sharded.plan import (
    TableShape,
    allowed_shardings,
    column_part,
    fused_params,
    moved_by_fbgemm,
    table_bytes,
)
from hstu.sharded.width import stored_width, stretch_of
from hstu.table_optim import Rule
from hstu.vocabulary import reset_rows
from tests import test_checkpoint_tables as checkpoints
from tests import test_sharded_losses as losses
from tests import test_sharded_plan as plans
from tests.ranks import run_ranks
from tests.test_ranking_train import make_config as make_ranking_config
from tests.test_ranking_train import planted_store
from tests.test_train import logged, make_config
from tests.test_train_ranks import narrow, run_steps

pytest.importorskip("torchrec")

DIM = 50
"""Stored with 52 columns; the width of the published experiments on MovieLens-1M."""


def of_width(dim, function, *args):
    """The function on tables of that width, in the tests that it is of."""
    with contextlib.ExitStack() as stack:
        for module in (losses, checkpoints, plans):
            stack.enter_context(mock.patch.object(module, "DIM", dim))
        return function(*args)


def run_width(number, dim, function, *args):
    return run_ranks(number, of_width, dim, function, *args)


@pytest.mark.parametrize("dim, width", [(1, 4), (4, 4), (6, 8), (48, 48), (49, 52), (50, 52), (52, 52)])
def test_rows_are_stored_with_a_multiple_of_four(dim, width):
    assert stored_width(dim) == width
    config = EmbeddingConfig("sharded", "adam", dtype="float16")
    assert table_bytes(config, 10, dim) == 10 * width * (2 + 2 * 4)


# Training


@pytest.mark.parametrize("number, sharding", [(1, "auto"), (2, "row_wise")], ids=["one", "two"])
@pytest.mark.parametrize("optimizer", TABLE_OPTIMIZERS)
def test_five_optimizers_move_rows_as_those_of_a_local_table(optimizer, number, sharding):
    sampled = losses.LOSSES["sampled"]
    expected = of_width(DIM, losses.train, sampled, "local", optimizer, "auto", losses.SIZES[1])
    found = run_width(number, DIM, losses.train, sampled, "sharded", optimizer, sharding, losses.SIZES[number])
    for steps, table, linear in found:
        assert table.shape == (losses.NUM_ITEMS + 1, DIM)
        torch.testing.assert_close(steps, expected[0], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(table, expected[1], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(linear, expected[2], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_columns_of_which_the_last_part_is_padded(optimizer):
    """30 of 32 columns: 16 and 14."""
    sampled = losses.LOSSES["sampled"]
    expected = of_width(30, losses.train, sampled, "local", optimizer, "auto", losses.SIZES[1])
    for steps, table, _ in run_width(2, 30, losses.train, sampled, "sharded", optimizer, "column_wise", [35, 25]):
        torch.testing.assert_close(steps, expected[0], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(table, expected[1], rtol=1e-4, atol=2e-6)


def stored_after_steps(optimizer, sharding, dim):
    """Of this rank: stored parts, parts as they look, and the row-wise state, after three steps on all rows."""
    world = World.current()
    model, (_, tables), _ = checkpoints.make("sharded", optimizer, sharding)
    ids = torch.arange(1, losses.NUM_ITEMS + 1)
    for step in range(3):
        tables.zero_grad()
        found = model.table.lookup(ids)
        assert found.shape == (losses.NUM_ITEMS, dim)
        (found * (step + 1)).sum().backward()
        tables.step()
    stored = model.table.collection.state_dict()["embeddings.item.weight"].local_shards()
    shown = model.table.state_dict()["weight"]
    assert tuple(shown.metadata().size) == (losses.NUM_ITEMS + 1, dim)
    states = [
        (tuple(field.metadata().size), [part.tensor.clone() for part in field.local_shards()])
        for field in tables.states()["table.weight"].values()
        if hasattr(field, "local_shards")
    ]
    parts = [(part.metadata.shard_offsets[1], part.tensor.detach().clone()) for part in stored]
    own = [part.tensor.detach().clone() for part in shown.local_shards()]
    assert [p.tensor.data_ptr() for p in shown.local_shards()] == [p.tensor.data_ptr() for p in stored]
    return world.rank, parts, own, states


@pytest.mark.parametrize("sharding, dim", [("row_wise", 50), ("column_wise", 30)])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "rowwise_adam"])
def test_spare_columns_stay_zero_and_out_of_sight(optimizer, sharding, dim):
    spare = 0
    for _, parts, own, _ in run_width(2, dim, stored_after_steps, optimizer, sharding, dim):
        ((first, stored),), (shown,) = parts, own
        assert torch.equal(stored[:, : dim - first], shown)
        assert not stored[:, dim - first :].any() and shown[1:].any()
        spare += stored[:, dim - first :].numel()
    assert spare == (losses.NUM_ITEMS + 1) * 2


@pytest.mark.parametrize("optimizer, field", [("rowwise_adagrad", 0), ("rowwise_adam", 1)])
def test_row_wise_state_is_the_mean_over_the_columns_of_the_model(optimizer, field):
    """Gradients 1, 2, 3 in every column, of two ranks, each counted half: squares 1, 4, 9."""
    beta = from_dict({}).optim.betas[1]
    total = {"rowwise_adagrad": 1 + 4 + 9, "rowwise_adam": (1 - beta) * (beta**2 + 4 * beta + 9)}[optimizer]
    for rank, _, _, states in run_width(2, DIM, stored_after_steps, optimizer, "row_wise", DIM):
        size, (state,) = states[field]
        assert size == (losses.NUM_ITEMS + 1,)
        expected = torch.full_like(state, total)
        expected[: 1 if rank == 0 else 0] = 0.0  # the padding row
        torch.testing.assert_close(state, expected, rtol=1e-6, atol=0.0)


def rows_after_reset(optimizer):
    """Stored rows 2 and 3, as they look and their state, where they have been trained and then began anew."""
    from hstu.sharded.tables import shard

    embedding = {"kind": "sharded", "optimizer": optimizer, "ids": "managed", "rows": 9}
    config = from_dict({"embedding": embedding, "model": {"dim": 6}})
    model = RetrievalModel(config.model, 37, embedding=config.embedding)
    tables = shard(model, config, World.current())
    tables.zero_grad()
    model.table.rows.lookup(torch.arange(1, 10)).sum().backward()
    tables.step()
    reset_rows(model, torch.tensor([2, 3]), 11, [tables], None)
    fields = [model.table.state_dict()["rows.weight"]]
    fields += [field for field in tables.states()["table.rows.weight"].values() if hasattr(field, "local_shards")]
    stored = model.table.rows.collection.state_dict()["embeddings.item.weight"]
    return [field.local_shards()[0].tensor.detach().clone() for field in [stored, *fields]]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_rows_begin_anew(optimizer):
    ((stored, weight, *state),) = run_ranks(1, rows_after_reset, optimizer)
    assert torch.equal(weight[2:4], initial_rows(2, 6, 11)) and not stored[:, 6:].any()
    for field in state:
        assert field.shape[1:] in ((), (6,)) and not field[2:4].any() and field[[1, 4]].all()


def narrow_rows():
    model, _ = plans.make_sharded(World.current(), dtype="float16")
    with torch.no_grad():
        return model.table.lookup(torch.arange(plans.NUM_ITEMS + 1))


def test_narrow_rows():
    torch.manual_seed(7)
    weight = LocalItemTable(plans.NUM_ITEMS, DIM).weight.detach()
    for found in run_width(2, DIM, narrow_rows):
        assert found.dtype == torch.float32 and torch.equal(found, weight.half().float())


@pytest.mark.parametrize("name", ["rowwise_adagrad", "adagrad", "sgd", "adam", "rowwise_adam"])
def test_who_moves_padded_rows(name):
    """fbgemm where its mean over the stored columns can be put right, else torch; nothing else depends on the width."""
    cuda = torch.device("cuda")
    config = EmbeddingConfig("sharded", name)
    assert moved_by_fbgemm(config, cuda, 52) and moved_by_fbgemm(config, cuda, 50) == (name != "rowwise_adam")
    in_parts = dataclasses.replace(config, tables={"item": "column_wise"})
    assert moved_by_fbgemm(in_parts, cuda, 52) and moved_by_fbgemm(in_parts, cuda, 50) == ("rowwise" not in name)


def test_rows_of_bfloat16_move_in_torch():
    """fbgemm reads float32 and float16, and is told of a cache, which it makes none of, so that it can be built."""
    fbgemm = pytest.importorskip("fbgemm_gpu.split_embedding_configs")
    config = EmbeddingConfig("sharded", "adam", dtype="bfloat16")
    assert not moved_by_fbgemm(config, torch.device("cuda"), 52)
    params = fused_params(config, False, 0.1, Rule("adam", 1e-8, (0.9, 0.999), 0.0))
    assert params["cache_precision"] == fbgemm.SparseType.FP32


def test_stretch_makes_the_mean_over_stored_columns_that_over_the_others():
    gradient = torch.arange(1.0, 51.0, dtype=torch.float64)
    stored = torch.cat([gradient, torch.zeros(2, dtype=torch.float64)]) * stretch_of(50)
    assert stored.square().mean().item() == pytest.approx(gradient.square().mean().item(), rel=1e-14)
    assert stretch_of(48) == 1.0


# Plans


def test_widths_that_cannot_be_cut_are_refused():
    for dim, number, part in ((50, 2, 52), (50, 13, 4), (30, 2, 16), (30, 3, 16), (8, 4, 4), (64, 3, 32)):
        assert column_part(dim, number) == part, (dim, number)
    messages = run_width(2, 50, refusal_of_columns)
    expected = "rows of 52 (model.dim=50) have none for 2: take row_wise, or model.dim=56"
    assert all(expected in text for text in messages)


def refusal_of_columns():
    with pytest.raises(UserError) as raised:
        checkpoints.make("sharded", "sgd", "column_wise")
    return str(raised.value)


@pytest.mark.parametrize("dim, columns", [(50, 52), (52, 52), (30, 32)])
def test_hstu_plan_counts_stored_columns_as_torchrec_does(dim, columns):
    from hstu.planning.sharding import plan_sharding

    config = plan_options(dim, "row_wise", "adagrad")
    assert shard_shape(config) == (10**8 // 8 + 1, columns)
    work = Workload.planned(config)
    found = plan_sharding(config, work, plan_memory(config, work))
    assert found.found and found.ours_bytes == pytest.approx(found.hbm_bytes, rel=1e-6)


def test_hstu_plan_refuses_what_training_refuses():
    with pytest.raises(UserError, match=r"rows of 52 \(model.dim=50\) have none for 8: take row_wise, or model.dim=56"):
        plan_and_show(plan_options(50, "column_wise", "adagrad"))


def plan_options(dim, sharding, optimizer):
    embedding = {"rows": 10**8, "dim": dim, "sharding": sharding, "optimizer": optimizer}
    return from_options({"embedding": embedding, "cluster": {"gpus": 8}})


def test_the_planner_does_not_cut_padded_rows_with_one_number():
    table = TableShape("item", 1000, 250, (1.0, 1.0))
    for optimizer, number in (("rowwise_adagrad", 2), ("rowwise_adam", 2), ("adagrad", 3)):
        assert len(allowed_shardings(EmbeddingConfig("sharded", optimizer), table, 2)) == number, optimizer
    wide = dataclasses.replace(table, dim=252)
    assert "column_wise" in allowed_shardings(EmbeddingConfig("sharded", "rowwise_adagrad"), wide, 2)


def test_sizes_are_told_as_they_are_stored():
    config = EmbeddingConfig("sharded", "rowwise_adagrad")
    assert TableShape("item", 2**20, 50, (1.0,)).describe(config) == "item 1,048,576 x 50 (stored as 52) 0.207 GiB"
    assert TableShape("item", 2**20, 52, (1.0,)).describe(config) == "item 1,048,576 x 52 0.207 GiB"


def counted():
    """Parameters of a model with item and feature tables, before these lie on the ranks and then."""
    from hstu.sharded.tables import shard

    config = from_dict({"embedding": {"kind": "sharded", "optimizer": "adagrad"}, "model": {"dim": DIM}})
    model = RetrievalModel(config.model, 37, embedding=config.embedding)
    model.features = FeatureTables({"genre": 5, "city": 3}, DIM, sharded=True, whole=["city"])
    tables = [model.table, model.features]
    model.tables = lambda: tables
    before = model.num_parameters()
    shard(model, config, World.current())
    return before, model.num_parameters()


def test_parameters_are_counted_by_the_columns_of_the_model_on_all_ranks():
    dense = RetrievalModel(HSTUConfig(dim=DIM), 37).num_parameters()["without_embeddings"]
    expected = {"total": dense + (38 + 5 + 3) * DIM, "without_embeddings": dense}
    assert run_ranks(2, counted) == [(expected, expected)] * 2


# Checkpoints


LOCAL, ROWS, WHOLE = (1, "local", "auto"), (2, "sharded", "row_wise"), (1, "sharded", "auto")


@pytest.mark.parametrize(
    "optimizer, before, after",
    [
        ("rowwise_adagrad", LOCAL, ROWS),
        ("rowwise_adagrad", ROWS, LOCAL),
        ("rowwise_adagrad", ROWS, WHOLE),
        ("rowwise_adam", LOCAL, ROWS),
        ("rowwise_adam", WHOLE, LOCAL),
        ("adagrad", ROWS, LOCAL),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value[:2])),
)
def test_checkpoints_go_on_in_either_kind(tmp_path, optimizer, before, after):
    of_width(DIM, check_width, tmp_path, before, after, optimizer)


def check_width(tmp_path, before, after, optimizer):
    """As :func:`tests.test_checkpoint_tables.check`, on ranks that know the width."""
    with mock.patch.object(checkpoints, "run_ranks", lambda number, *args: run_width(number, DIM, *args)):
        checkpoints.check(tmp_path, before, after, optimizer)
    found = checkpoint.load_last(tmp_path / "run")
    assert found.sizes["model.table.weight"][0] == (losses.NUM_ITEMS + 1, DIM)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "rowwise_adam"])
def test_a_run_goes_on_bit_for_bit(tmp_path, optimizer):
    """The state that is saved is the one that is kept: no factor in between."""
    steps = checkpoints.STEPS
    whole = run_width(2, DIM, checkpoints.train, tmp_path / "a", 0, 2 * steps, "sharded", optimizer, "row_wise")
    run_width(2, DIM, checkpoints.train, tmp_path / "b", 0, steps, "sharded", optimizer, "row_wise")
    parts = run_width(2, DIM, checkpoints.train, tmp_path / "b", steps, 2 * steps, "sharded", optimizer, "row_wise")
    assert all(torch.equal(ours, expected) for ours, expected in zip(parts[0], whole[0], strict=True))
    one, two = (checkpoint.load_last(tmp_path / name).tensors("optimizer.") for name in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_columns_are_copied_piece_by_piece(monkeypatch):
    monkeypatch.setattr(checkpoint_dcp, "PIECE_BYTES", 3 * 6 * 4)
    stored = torch.arange(11 * 8.0).view(11, 8)
    held = {}
    copied = checkpoint_dcp.Pieces(torch.Size([11, 6]), [((0, 0), stored[:, :6])]).copied(held, "table")
    stored += 1.0
    ((offsets, block),) = copied.blocks
    assert offsets == (0, 0) and block.is_contiguous() and torch.equal(block, stored[:, :6] - 1.0)


# hstu-train


def trained(tmp_path, store, number, kind, end, sharding="auto", **changes):
    embedding = EmbeddingConfig(kind, "rowwise_adagrad", lr=0.05, sharding=sharding)
    model = HSTUConfig(dim=6, num_blocks=1, qk_dim=8, v_dim=8, max_len=20, dropout=0.1)
    config = make_config(tmp_path.parent, embedding=embedding, model=model, run_save_every_steps=2,
                         run_save_every_epochs=None, run_epochs=1, **changes)  # fmt: skip
    return run_ranks(number, run_steps, narrow(tmp_path, config), store, end)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(make_config(tmp_path_factory.mktemp("width"))).path


def test_a_run_changes_the_kind_of_its_tables_and_is_exported(store, tmp_path):
    trained(tmp_path / "whole", store, 1, "local", None)
    for number, kind, sharding, end in ((2, "sharded", "row_wise", 3), (1, "local", "auto", 5)):
        assert trained(tmp_path / "parts", store, number, kind, end, sharding) == ["Stop: "] * number
    assert trained(tmp_path / "parts", store, 2, "sharded", None, "row_wise") == ["", ""]
    expected, found = (
        [line.get("loss", line.get("ndcg@10")) for line in logged(tmp_path / name)] for name in ("whole", "parts")
    )
    assert len(expected) == 11 and found[:-1] == pytest.approx(expected[:-1], rel=2e-5)
    assert found[-1] == pytest.approx(expected[-1], abs=0.01)  # one user of 150 at a tie
    _, _, model = load_run(tmp_path / "parts")
    saved = checkpoint.load(tmp_path / "parts" / "checkpoints" / checkpoint.BEST)
    assert torch.equal(model.table.weight, saved.tensors("model.table.")["weight"])
    assert model.table.weight.shape == (61, 6)
    files = export_run({"run": tmp_path / "parts", "out": tmp_path / "out", "which": "best", "format": ["parquet"]})
    vectors = torch.from_numpy(polars.read_parquet(files[1])["vector"].to_numpy())
    assert torch.equal(vectors, as_scored(model.table, model.table.weight[1:]))


def test_the_pipeline_sees_the_same_rows(store, tmp_path):
    for name, pipeline in (("a", False), ("b", True)):
        embedding = EmbeddingConfig("sharded", "rowwise_adagrad", sharding="row_wise", pipeline=pipeline)
        model = HSTUConfig(dim=6, num_blocks=1, qk_dim=8, v_dim=8, max_len=20)
        config = make_config(tmp_path, embedding=embedding, model=model, run_epochs=1, run_batch_users=40)
        assert run_ranks(2, run_steps, narrow(tmp_path / name, config), store) == ["", ""]
    assert logged(tmp_path / "a") == logged(tmp_path / "b") and len(logged(tmp_path / "a")) == 5


def test_ranking_with_feature_tables(tmp_path):
    path = planted_store(tmp_path / "planted").path
    model = HSTUConfig(dim=10, num_blocks=1, num_heads=2, qk_dim=8, v_dim=8, max_len=16, dropout=0.1)
    found = []
    for name, number, kind in (("local", 1, "local"), ("one", 1, "sharded"), ("two", 2, "sharded")):
        embedding = EmbeddingConfig(kind, "rowwise_adagrad", lr=0.05)
        config = make_ranking_config(tmp_path, run_batch_users=5, run_save_every_epochs=None, embedding=embedding)
        config = dataclasses.replace(config, model=model)
        assert run_ranks(number, run_steps, narrow(tmp_path / name, config), path, 6) == ["Stop: "] * number
        found.append([line["loss"] for line in logged(tmp_path / name) if "loss" in line])
    assert len(set(found[0])) == 6
    assert found[1] == pytest.approx(found[0], rel=2e-5) and found[2] == pytest.approx(found[0], rel=2e-5)
