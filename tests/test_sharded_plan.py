"""Where sharded tables lie and begin: plans, refusals with numbers, initial values, narrow rows and exchanges."""

import contextlib
import re
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hstu.config import Config, from_dict
from hstu.config_embedding import EmbeddingConfig
from hstu.distributed import World
from hstu.embedding import LocalItemTable
from hstu.errors import UserError
from hstu.feature_tables import FeatureTables
from hstu.sharded import initial as sharded_init
from hstu.sharded.initial import InitialValues
from hstu.sharded.plan import TableShape, allowed_shardings, capacity, check_device, check_memory, table_bytes
from tests.ranks import run_ranks

pytest.importorskip("torchrec")

NUM_ITEMS, DIM = 50, 8


def make_config(**embedding):
    settings = {"kind": "sharded", "optimizer": "sgd", "sharding": "row_wise"} | embedding
    return from_dict({"embedding": settings, "model": {"dim": DIM}})


def make_sharded(world, num_items=NUM_ITEMS, **embedding):
    from hstu.sharded.tables import ShardedItemTable, shard

    torch.manual_seed(7)
    model = torch.nn.Module()
    model.table = ShardedItemTable(num_items, DIM, dtype=embedding.get("dtype", "float32"))
    model.after = torch.nn.Linear(2, 2)
    tables = shard(model, make_config(**embedding), world)
    return model, tables


def parts_of(table):
    return [
        (*part.metadata.shard_offsets, part.tensor.detach().float().clone())
        for part in table.state_dict()["weight"].local_shards()
    ]


# Initial values


def initial_parts(sharding):
    model, _ = make_sharded(World.current(), sharding=sharding)
    return parts_of(model.table), model.after.weight.detach()


@pytest.mark.parametrize("sharding, ranks", [("row_wise", 4), ("column_wise", 2), ("table_wise", 2)])
def test_initial_values_are_those_of_a_local_table(sharding, ranks):
    torch.manual_seed(7)
    local, after = LocalItemTable(NUM_ITEMS, DIM).weight.detach(), torch.nn.Linear(2, 2).weight
    held = torch.zeros_like(local)
    for parts, linear in run_ranks(ranks, initial_parts, sharding):
        assert torch.equal(linear, after)  # what is drawn after the table is the same too
        for row, column, values in parts:
            assert torch.equal(values, local[row : row + len(values), column : column + values.shape[1]])
            held[row : row + len(values), column : column + values.shape[1]] += 1
    assert bool((held == 1).all())


def test_feature_tables_begin_as_local_ones():
    sizes = {"genre": 40, "city": 5}
    torch.manual_seed(3)
    local = FeatureTables(sizes, DIM)
    torch.manual_seed(3)
    for (name, weight), values in zip(
        local.named_parameters(), FeatureTables(sizes, DIM, sharded=True).initial, strict=True
    ):
        found = torch.empty(7, 3)
        if len(weight) < 10:
            found = torch.empty(2, 3)
        values.write(found, len(weight) - len(found), 5)
        assert torch.equal(found, weight.detach()[-len(found) :, 5:]), name


def test_a_table_too_large_to_draw_whole_is_drawn_in_blocks(monkeypatch):
    monkeypatch.setattr(sharded_init, "MAX_WHOLE", 100)
    monkeypatch.setattr(sharded_init, "BLOCK_ROWS", 16)
    largest = 0

    def fill(block, generator):
        nonlocal largest
        largest = max(largest, len(block))
        block.normal_(generator=generator)

    torch.manual_seed(0)
    values = InitialValues.take(70, 4, fill)
    whole = torch.empty(70, 4)
    values.write(whole, 0, 0)
    part = torch.empty(20, 2)
    values.write(part, 30, 1)
    assert largest == 16 and torch.equal(part, whole[30:50, 1:3])
    assert len(whole.unique()) == 280
    torch.manual_seed(1)
    other = torch.empty(70, 4)
    InitialValues.take(70, 4, fill).write(other, 0, 0)
    assert not torch.equal(other, whole)


def test_blocks_drawn_by_several_threads_are_the_same(monkeypatch):
    monkeypatch.setattr(sharded_init, "MAX_WHOLE", 100)
    monkeypatch.setattr(sharded_init, "BLOCK_ROWS", 16)
    together = threading.Barrier(3)  # passed where three draw at a time

    def fill(block, generator):
        together.wait(timeout=20)
        block.normal_(generator=generator)

    torch.manual_seed(0)
    values = InitialValues.take(96, 4, fill)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = torch.empty(96, 4)
    values.write(found, 0, 0)
    alone = torch.empty(96, 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    InitialValues(96, 4, lambda block, generator: block.normal_(generator=generator), values.state).write(alone, 0, 0)
    assert torch.equal(found, alone) and len(alone.unique()) == 384


def filled_at_different_speeds(folder):
    from hstu.sharded import tables as sharded

    fill, rank = sharded._fill, dist.get_rank()

    def slowly(*args):
        if rank == 1:
            time.sleep(0.5)
        fill(*args)
        (folder / str(rank)).touch()

    with mock.patch.object(sharded, "_fill", slowly):
        make_sharded(World.current())
    return sorted(path.name for path in folder.iterdir())


def test_ranks_go_on_when_all_have_filled_their_tables(tmp_path):
    assert run_ranks(2, filled_at_different_speeds, tmp_path) == [["0", "1"]] * 2


# Plans


def planned():
    model, _ = make_sharded(World.current(), num_items=9)
    return parts_of(model.table)[0][2].shape[0] if parts_of(model.table) else 0


def test_rows_lie_in_blocks_of_one_size():
    assert run_ranks(4, planned) == [3, 3, 3, 1]  # 10 rows with the padding


def test_a_table_of_few_rows_lies_on_one_rank():
    config = EmbeddingConfig("sharded", "sgd", sharding="row_wise")
    for num_rows, expected in ((16, "row_wise"), (10, "row_wise"), (9, "table_wise"), (3, "table_wise")):
        assert allowed_shardings(config, TableShape("item", num_rows, 8, (1.0, 1.0)), 4) == [expected], num_rows
    auto = EmbeddingConfig("sharded", "sgd")
    assert allowed_shardings(auto, TableShape("item", 3, 8, (1.0, 1.0)), 4) == ["table_wise", "column_wise"]
    assert allowed_shardings(config, TableShape("item", 1, 8, (1.0, 1.0)), 1) == ["row_wise"]


def loss_of_few_items():
    from hstu.config import LossConfig

    model, tables = make_sharded(World.current(), num_items=2)
    labels = torch.tensor([1, 2])
    tables.zero_grad()
    model.table.expect(labels, LossConfig(name="full_softmax"), 1)
    queries = model.table.lookup(labels)
    losses = model.table.full_softmax(queries, labels, 0.1)
    losses.sum().backward()
    with torch.inference_mode():
        ranks = model.table.rank(queries.detach(), labels)
    return losses.detach(), ranks


def test_more_ranks_than_rows():
    torch.manual_seed(7)
    table = LocalItemTable(2, DIM)
    labels = torch.tensor([1, 2])
    queries = table.lookup(labels)
    for losses, ranks in run_ranks(4, loss_of_few_items):
        torch.testing.assert_close(losses, table.full_softmax(queries, labels, 0.1).detach())
        assert torch.equal(ranks, table.rank(queries, labels))


WORLD = World(0, 4)


@pytest.mark.parametrize("name", ["dtype", "comm_dtype"])
def test_bfloat16_wants_a_gpu(name):
    config = EmbeddingConfig("sharded", "sgd", **{name: "bfloat16"})
    check_device(config, torch.device("cuda"))
    with pytest.raises(UserError, match=f"embedding.{name}=bfloat16: expected a CUDA device"):
        check_device(config, torch.device("cpu"))


def test_bytes_of_a_table():
    for optimizer, per_row in (
        ("sgd", 32),
        ("adagrad", 64),
        ("rowwise_adagrad", 36),
        ("adam", 96),
        ("rowwise_adam", 68),
    ):
        config = EmbeddingConfig("sharded", optimizer)
        assert table_bytes(config, 100, 8) == 100 * per_row
    assert table_bytes(EmbeddingConfig("sharded", "rowwise_adagrad", dtype="float16"), 100, 8) == 100 * 20


def test_a_table_that_does_not_fit_is_refused_with_the_numbers():
    config = EmbeddingConfig("sharded", "rowwise_adagrad", ddr_gib=1.0)
    table = TableShape("item", 2**26, 64, (100.0, 100.0))  # 16 GiB and a number a row
    with pytest.raises(UserError) as error:
        check_memory(config, WORLD, [table])
    text = str(error.value)
    assert "tables need 16.2 GiB (item 67,108,864 x 64 16.2 GiB; float32" in text
    assert "4 ranks of 1 GiB have 3.4 GiB" in text and "at least 20 ranks" in text
    check_memory(config, World(0, 20), [table])
    with pytest.raises(UserError, match="at least 20 ranks"):
        check_memory(config, World(0, 19), [table])


def test_the_average_of_a_table_takes_room_too():
    config = EmbeddingConfig("sharded", "rowwise_adagrad", ddr_gib=1.0)
    table = TableShape("item", 2**26, 64, (100.0, 100.0), averaged=True)  # 16 GiB more
    with pytest.raises(UserError, match=r"32\.2 GiB; float32, .* state and averages included\).*at least 38 ranks"):
        check_memory(config, WORLD, [table])


def test_a_table_that_does_not_fit_on_its_one_rank_is_refused():
    config = EmbeddingConfig("sharded", "sgd", sharding="table_wise", ddr_gib=1.0)
    with pytest.raises(UserError, match="item 16,777,216 x 32 2 GiB .* table_wise puts it on one rank, which has 0.85"):
        check_memory(config, WORLD, [TableShape("item", 2**24, 32, (1.0, 1.0))])
    assert check_memory(config, WORLD, [TableShape("item", 2**22, 32, (1.0, 1.0))]) is None


def room_of_uneven_gpus(options):
    """Room for tables, and the refusal of 12 GiB, where rank r has 2 + r GiB free and 1 more that torch keeps."""
    rank = dist.get_rank()
    world = World(rank, dist.get_world_size(), torch.device("cuda", rank))
    facts = {"mem_get_info": ((2 + rank) * 2**30, 80 * 2**30), "memory_reserved": 3 * 2**30, "memory_allocated": 2**31}
    with contextlib.ExitStack() as stack:
        for name, value in facts.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        config = EmbeddingConfig("sharded", "sgd", **options)
        with pytest.raises(UserError) as raised:
            check_memory(config, world, [TableShape("item", 3 * 2**24, 64, (1.0, 1.0))])
        return capacity(config, world) / 2**30, str(raised.value)


def test_room_on_gpus_is_what_the_fullest_of_them_has_free():
    for room, text in run_ranks(2, room_of_uneven_gpus, {}):
        assert room == 3.0
        assert "2 ranks of 3 GiB (free on the GPU of the rank that has the least) have 5.1 GiB" in text
    for room, text in run_ranks(2, room_of_uneven_gpus, {"hbm_gib": 4.0}):
        assert room == 4.0 and "2 ranks of 4 GiB have 6.8 GiB" in text


def refused():
    try:
        make_sharded(World.current(), num_items=10**9, ddr_gib=1.0)
    except UserError as error:
        return str(error)
    return ""


def test_refused_before_anything_is_allocated():
    for text in run_ranks(2, refused):
        assert re.search(r"tables need 29.8 GiB .*2 ranks of 1 GiB have 1.7 GiB", text)


# What a rank holds and fetches


def no_place():
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner.types import PlannerError

    with mock.patch.object(EmbeddingShardingPlanner, "plan", side_effect=PlannerError("no plan\nadvice")):
        with pytest.raises(UserError) as raised:
            make_sharded(World.current())
    return str(raised.value)


def test_all_ranks_are_told_that_the_planner_finds_no_place():
    first, second = run_ranks(2, no_place)
    assert first == second and re.search(r"finds no place for item 51 x 8 .* on 2 ranks of .*: no plan; take", first)


def lost_while_planning():
    with mock.patch.object(dist, "broadcast_object_list", side_effect=dist.DistNetworkError("gone")):
        with pytest.raises(RuntimeError) as raised:
            make_sharded(World.current())
    return type(raised.value).__name__


def test_a_rank_lost_while_planning_is_no_lack_of_memory():
    assert run_ranks(2, lost_while_planning) == ["DistNetworkError"] * 2


def count_rows(loss):
    """Largest number of rows that a rank asks for beyond its events, and that it holds, in a step."""
    from hstu.config import LossConfig
    from hstu.sharded.tables import ShardedItemTable

    world = World.current()
    model, tables = make_sharded(world, num_items=999)
    asked, fetch = [], ShardedItemTable._fetch

    def watched(self, events, scored):
        asked.append((int(scored.min()), int(scored.max()), len(scored)))
        return fetch(self, events, scored)

    ShardedItemTable._fetch = watched
    try:
        labels = torch.randint(1, 1000, (300,), generator=torch.Generator().manual_seed(world.rank))
        tables.zero_grad()
        model.table.expect(labels, LossConfig(**loss), 1, torch.arange(300) + 300 * world.rank)
        queries = model.table.lookup(labels)
        method = {"sampled_softmax": "sampled_softmax", "full_softmax": "full_softmax"}[loss["name"]]
        getattr(model.table, method)(queries, labels, temperature=0.1).sum().backward()
    finally:
        ShardedItemTable._fetch = fetch
    return asked, sum(len(values) for _, _, values in parts_of(model.table))


@pytest.mark.parametrize("loss", [{"name": "sampled_softmax", "num_negatives": 64}, {"name": "full_softmax"}])
def test_no_rank_holds_or_fetches_the_rows_of_another(loss):
    for rank, (asked, held) in enumerate(run_ranks(4, count_rows, loss)):
        assert held == 250 and len(asked) == 1  # one exchange a step
        low, high, count = asked[0]
        assert 250 * rank <= low and high < 250 * (rank + 1) and 200 < count <= 250


# Narrow rows and exchanges


def lookup_of(embedding):
    world = World.current()
    model, tables = make_sharded(world, **embedding)
    with torch.no_grad():
        before = model.table.lookup(torch.arange(1, NUM_ITEMS + 1))
    tables.zero_grad()
    found = model.table.lookup(torch.arange(1, NUM_ITEMS + 1))
    found.square().sum().backward()
    with torch.no_grad():
        after = model.table.lookup(torch.arange(1, NUM_ITEMS + 1))
    return before, after, parts_of(model.table)[0][2].dtype, str(before.dtype)


@pytest.mark.parametrize(
    "embedding, error", [({"dtype": "float16"}, 2e-5), ({"comm_dtype": "float16"}, 2e-5)],
    ids=str,
)  # fmt: skip
def test_narrow_rows_and_exchanges(embedding, error):
    torch.manual_seed(7)
    weight = LocalItemTable(NUM_ITEMS, DIM).weight.detach()[1:]
    for before, after, _, dtype in run_ranks(2, lookup_of, {"lr": 0.25} | embedding):
        assert dtype == "torch.float32"
        difference = (before - weight).abs().max()
        assert 0 < difference < error
        # Gradient 2 w of two ranks, divided by them as data parallelism does: half of w is left.
        assert (after - 0.5 * weight).abs().max() < 2 * error


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "sharded"}, "embedding.optimizer='adamw': expected one of sgd"),
        (
            {"sharding": "rows"},
            "embedding.sharding='rows': expected one of auto, table_wise, row_wise, column_wise, grid",
        ),
        ({"tables": {"item": "auto"}}, "embedding.tables.item='auto': expected one of table_wise"),
        (
            {"kind": "sharded", "optimizer": "sgd", "sharding": "data_parallel", "pipeline": True},
            "embedding.pipeline=True: expected false where all tables are data_parallel",
        ),
        ({"pipeline": True}, "embedding.pipeline=True: expected false with embedding.kind=local"),
        (
            {"kind": "sharded", "optimizer": "sgd", "sharding": "data_parallel", "dtype": "float16"},
            "embedding.dtype='float16': expected float32 where all tables are data_parallel",
        ),
        ({"dtype": "float16"}, "expected float32 with embedding.kind=local"),
        ({"kind": "sharded", "optimizer": "sgd", "dtype": "float8"}, "embedding.dtype"),
        ({"lr": 0.0}, "embedding.lr"),
        ({"ddr_gib": -1.0}, "embedding.ddr_gib"),
    ],
    ids=[
        "optimizer",
        "sharding",
        "table",
        "pipeline",
        "pipeline-local",
        "whole-dtype",
        "local-dtype",
        "dtype",
        "lr",
        "memory",
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        EmbeddingConfig(**options)


@pytest.mark.parametrize("option", [{"sharding": "row_wise"}, {"tables": {"item": "grid"}}, {"hbm_gib": 8.0}])
def test_options_of_shards_are_not_left_out_silently(option):
    with pytest.raises(UserError, match=f"embedding.{next(iter(option))}=.*: expected none with embedding.kind=local"):
        Config(embedding=EmbeddingConfig(**option))


def test_a_table_that_is_not_there_is_named():
    with pytest.raises(UserError, match="embedding.tables: genre is no table, expected one of item$"):
        make_sharded(World(), tables={"genre": "row_wise"})


def test_one_process_needs_no_launcher():
    model, _ = make_sharded(World())
    try:
        assert model.table.lookup(torch.tensor([1, 2])).shape == (2, DIM)
    finally:
        dist.destroy_process_group()


def test_the_pipeline_wants_a_sharded_table():
    from hstu.config import HSTUConfig
    from hstu.model.retrieval import RetrievalModel
    from hstu.sharded.pipeline import Pipeline

    model = RetrievalModel(HSTUConfig(dim=8, num_blocks=1, qk_dim=8, v_dim=8), 5)
    with pytest.raises(UserError, match="embedding.pipeline=true: expected a table that is sharded, all of"):
        Pipeline(model, World(), lambda step_input, index, seed: torch.zeros(()), lambda step: step)
