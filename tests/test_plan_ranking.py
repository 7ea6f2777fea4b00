"""The plan of ranking models against real ones: bytes kept, weights, peaks, features, options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from hstu.config import FuXiLinearConfig, HSTUConfig, SASRecConfig, TransformerConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.config_model import ModelConfig
from hstu.config_ranking import ActionConfig, FeatureConfig, HeadConfig, RankingConfig, TaskConfig
from hstu.data.ranking import num_bits
from hstu.data.ranking_batches import Features, RankingBatch, make_features
from hstu.distributed import World
from hstu.errors import UserError
from hstu.model.ranking import RankingModel
from hstu.planning.config import BatchPlanConfig, ClusterConfig, PlanConfig, TablePlanConfig, TokenForm, from_options
from hstu.planning.cost import transfers
from hstu.planning.features import FeaturePlanConfig, plan_features
from hstu.planning.memory import dense_parameters, plan_memory, saved_bytes
from hstu.planning.tables import busiest
from hstu.planning.work import Workload, visible_pairs
from tests.test_plan_memory import allocated_peak

ITEMS = 3000
LENGTHS = np.maximum(1, (120 * (np.arange(1, 17) / 16) ** 2).astype(np.int64))
"""Skewed: 1 .. 120 events."""
TASKS = {"click": TaskConfig(), "like": TaskConfig()}
ACTIONS = {"click": ActionConfig(), "seconds": ActionConfig(kind="thresholds", thresholds=[1.0, 3.0, 7.0])}
FEATURES: dict[str, dict[str, FeatureConfig]] = {
    "item_features": {
        "author": FeatureConfig(),
        "tag": FeatureConfig(separator="|"),
        "price": FeatureConfig("numeric"),
    },
    "event_features": {"hour_of_day": FeatureConfig()},
    "user_features": {"country": FeatureConfig(), "age": FeatureConfig("numeric")},
}
GIVEN = {"author": FeaturePlanConfig(rows=500), "tag": FeaturePlanConfig(rows=50, values=2.5),
         "country": FeaturePlanConfig(rows=7)}  # fmt: skip
HSTU = HSTUConfig(dim=64, num_heads=2, qk_dim=32, v_dim=32, max_len=120)
EXPERTS = HeadConfig(hidden=[64, 32], shared_experts=2, task_experts=1, dropout=0.1)
LEVELS = {"rating": TaskConfig(kind="ordinal", levels=[1.0, 2.0, 3.0]), "time": TaskConfig(kind="regression")}
CASES: dict[str, tuple[ModelConfig, RankingConfig]] = {
    "interleaved": (HSTU, RankingConfig(tasks=TASKS, actions=ACTIONS, **FEATURES)),
    "no features": (HSTU, RankingConfig(tasks=TASKS, actions=ACTIONS)),
    "fused": (HSTU, RankingConfig(form="fused", targets=8, tasks=TASKS, actions=ACTIONS, **FEATURES)),
    "experts": (HSTU, RankingConfig(tasks=TASKS, actions=ACTIONS, head=EXPERTS, **FEATURES)),
    "levels": (HSTU, RankingConfig(tasks=LEVELS, actions=ACTIONS, head=HeadConfig(hidden=[256]))),
    "transformer": (TransformerConfig(dim=96, ffn_dim=256, max_len=120),
                    RankingConfig(tasks=TASKS, actions=ACTIONS, **FEATURES)),
    "sasrec": (SASRecConfig(dim=64, max_len=120), RankingConfig(tasks=TASKS, actions=ACTIONS)),
    "fuxi": (FuXiLinearConfig(max_len=120), RankingConfig(tasks=TASKS, actions=ACTIONS, **FEATURES)),
}  # fmt: skip


def planned(model: ModelConfig, ranking: RankingConfig, precision: str = "float32", ranks: int = 1,
            **table: Any) -> PlanConfig:  # fmt: skip
    table = table or {"kind": "local", "optimizer": "adamw"}
    cluster = ClusterConfig(gpu="cpu", gpus=ranks, gpus_per_node=8)
    given = {name: value for name, value in GIVEN.items() if ranking.item_features}
    return PlanConfig(TablePlanConfig(rows=ITEMS, **table), cluster, BatchPlanConfig(mean_len=1.0), model,
                      precision=precision, ranking=ranking, features=given)  # fmt: skip


def data_of(config: PlanConfig) -> Any:
    """What a ranking model asks of a store, from the plan's sizes."""
    ranking, features = config.ranking, config.all_features
    assert ranking is not None
    return SimpleNamespace(
        store=SimpleNamespace(num_items=ITEMS),
        num_prefix=features.num_prefix,
        token_feature_sizes={f"item.{table.name}": table.rows for table in features.of("item")},
        user_feature_sizes={table.name: table.rows for table in features.of("user")},
        token_number_names=["item.number"] * features.numbers,
        user_number_names=["number"] * features.user_numbers,
        num_action_bits=sum(num_bits(action) for action in ranking.actions.values()),
    )


def make_model(config: PlanConfig) -> RankingModel:
    assert config.ranking is not None
    table = config.embedding
    embedding = EmbeddingConfig(kind=table.kind, optimizer=table.optimizer, sharding=table.sharding)
    return RankingModel(config.model, config.ranking, data_of(config), embedding=embedding)


def make_batch(config: PlanConfig, lengths: np.ndarray, seed: int = 0) -> RankingBatch:
    """lengths: [S] events of each sequence, those that are predicted included."""
    ranking, data = config.ranking, data_of(config)
    assert ranking is not None
    generator = np.random.default_rng(seed)
    total, owner = int(lengths.sum()), np.repeat(np.arange(len(lengths)), lengths)
    offsets = np.concatenate([[0], lengths.cumsum()])
    num_targets = np.minimum(lengths, ranking.targets) if ranking.form == "fused" else lengths
    targets = np.flatnonzero(np.arange(total) >= (offsets[1:] - num_targets)[owner])
    codes = {table.name: table for table in config.all_features.tables}

    def features(names: list[str], rows: int, numbers: int) -> Features:
        coded = {}
        for name in names:
            table = codes[name.removeprefix("item.")]
            each = np.ones(rows, np.int64)
            if table.values != 1.0:  # two or three, half of each
                each = np.resize(np.array([2, 3]), rows)
            coded[name] = generator.integers(0, table.rows, each.sum()), each
        return make_features(coded, generator.standard_normal((rows, numbers)).astype(np.float32))

    bits = generator.integers(0, 2, (total, data.num_action_bits)).astype(np.float32)
    return RankingBatch(
        offsets=torch.from_numpy(offsets),
        item_ids=torch.from_numpy(generator.integers(1, ITEMS + 1, total)),
        timestamps=torch.from_numpy(generator.integers(0, 86_400, total).cumsum()),
        action_bits=torch.from_numpy(bits),
        num_targets=torch.from_numpy(num_targets),
        targets=torch.from_numpy(targets),
        labels={task: torch.from_numpy(generator.integers(0, 2, len(targets)).astype(np.float32))
                for task in ranking.tasks},
        rows=torch.from_numpy(targets),
        users=torch.arange(len(lengths)),
        item_features=features(list(data.token_feature_sizes), total, len(data.token_number_names)),
        user_features=features(list(data.user_feature_sizes), len(lengths), len(data.user_number_names)),
        max_len=int(lengths.max()),
        max_targets=int(num_targets.max()),
    )  # fmt: skip


def work_of(config: PlanConfig, lengths: np.ndarray) -> Workload:
    assert config.ranking is not None
    return Workload.of_lengths(lengths, config.model, config.form, np.minimum(lengths, config.form.targets))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name))


def kept_bytes(model: RankingModel, batch: RankingBatch, precision: str, world: World | None = None) -> int:
    """Bytes of the batch, its plan, and the distinct storages that the loss keeps for the backward pass."""
    plan = model.plan(batch)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {t.untyped_storage().data_ptr(): t for part in (batch, plan) for t in tensors_in(part)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            kept[place] = tensor
        return tensor

    low = precision == "bfloat16"
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=low):
        model.loss(batch, 1, plan, world)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("precision", "bound"), [("float32", 0.02), ("bfloat16", 0.05)])
@pytest.mark.parametrize("case", CASES)
def test_what_a_ranking_model_keeps(case: str, precision: str, bound: float) -> None:
    config = planned(*CASES[case], precision)
    measured = kept_bytes(make_model(config), make_batch(config, LENGTHS), precision)
    parts = saved_bytes(config, work_of(config, LENGTHS))
    assert sum(part.bytes for part in parts) == pytest.approx(measured, rel=bound)


@pytest.mark.parametrize("case", CASES)
def test_weights(case: str) -> None:
    config = planned(*CASES[case])
    model = make_model(config)
    memory = plan_memory(config, work_of(config, LENGTHS))
    counts = model.num_parameters()
    assert dense_parameters(config) == counts["without_embeddings"]
    assert memory.of("table") == 4 * (ITEMS + 1) * config.model.dim
    features = memory.of("feature tables") if config.all_features.tables else 0.0
    assert memory.of("table") + features == 4 * (counts["total"] - counts["without_embeddings"])
    assert memory.of("gradients") == 4 * counts["total"]


@pytest.mark.parametrize("case", ["interleaved", "fused", "experts", "transformer", "fuxi"])
def test_peak_of_a_ranking_step(case: str) -> None:
    config, lengths = planned(*CASES[case]), np.tile(LENGTHS, 2)
    model, batch = make_model(config), make_batch(config, lengths)
    plan = model.plan(batch)

    def step() -> None:
        model.loss(batch, 1, plan).backward()

    step()
    for parameter in model.parameters():
        parameter.grad = None
    memory = plan_memory(config, work_of(config, lengths))
    kept = sum(p.bytes for p in memory.parts if p.name.startswith("kept")) - memory.of("kept: batch and plan")
    assert kept + memory.of("workspace") + memory.of("gradients") == pytest.approx(allocated_peak(step), rel=0.1)


# Tokens and features


@pytest.mark.parametrize(("window", "full_rows"), [(0, 0), (4, 0), (4, 2), (50, 0)])
@pytest.mark.parametrize("targets", [0, 1, 3])
def test_pairs_of_the_fused_form_are_those_of_the_mask(targets: int, window: int, full_rows: int) -> None:
    """Prefixes of two tokens, histories of 1 to 9 events."""
    from kernels.attention import Mask
    from kernels.attention.reference import visible

    model, form = HSTUConfig(window=window, full_rows=full_rows), TokenForm(2, 1, targets, True)
    for history in (1, 2, 5, 9):
        n = 2 + history + targets
        i, j = torch.arange(n)[:, None], torch.arange(n)
        mask = Mask(window=window, full_rows=full_rows, contextual=2)
        seen = visible(i, j, torch.tensor(n), torch.tensor(n - targets), mask)
        assert visible_pairs(np.array([float(n)]), model, form, np.array([float(targets)]))[0] == int(seen.sum())


def test_tokens_of_a_planned_batch_by_hand() -> None:
    """All users have 10 events: 2 prefix tokens and 20 of items and actions, or 10 and 4 targets."""
    model, batch = replace(HSTU, max_len=10), BatchPlanConfig(tokens_per_gpu=2200, mean_len=10)
    for form, tokens, predicted in (("interleaved", 22, 10), ("fused", 16, 4)):
        ranking = RankingConfig(form=form, targets=4, tasks=TASKS, **FEATURES)
        work = Workload.planned(PlanConfig(TablePlanConfig(rows=9), ClusterConfig(), batch, model, ranking=ranking))
        assert (work.tokens, work.longest, work.users) == (2200, tokens, pytest.approx(2200 / tokens))
        assert (work.squares, work.predicted) == (pytest.approx(2200 * tokens), pytest.approx(work.users * predicted))


def test_features_of_one_name_are_told_apart() -> None:
    names = {"category": FeatureConfig(hash_rows=9)}
    ranking = RankingConfig(tasks=TASKS, item_features=names, event_features=names, user_features=names)
    found = [(t.name, t.of, t.rows) for t in plan_features(ranking, {"user_category": FeaturePlanConfig(30)}).tables]
    assert found == [("category", "item", 10), ("event_category", "item", 10), ("user_category", "user", 31)]


def test_rows_of_features() -> None:
    """Given, known, assumed; one row is that of a missing value."""
    ranking = RankingConfig(tasks=TASKS, **FEATURES)
    found = {t.name: (t.of, t.rows, t.values, t.assumed) for t in plan_features(ranking, {"tag": GIVEN["tag"]}).tables}
    assert found == {
        "author": ("item", 1001, 1.0, True), "tag": ("item", 51, 2.5, False),
        "hour_of_day": ("item", 25, 1.0, False), "country": ("user", 1001, 1.0, True),
    }  # fmt: skip
    assert plan_features(replace(ranking, use_features=False), GIVEN).tables == ()


def test_a_feature_beside_those_of_ranking() -> None:
    ranking = RankingConfig(tasks=TASKS)
    given = {"shop": FeaturePlanConfig(rows=10**6), "city": FeaturePlanConfig(rows=99, of="user")}
    features = plan_features(ranking, given)
    assert [(t.name, t.of, t.rows) for t in features.tables] == [("shop", "item", 10**6 + 1), ("city", "user", 100)]
    assert features.num_prefix == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": {"shop": 10}}, "features=['shop']: expected none without a ranking model, as in"),
        ({"features": {"authr": 10}}, "features.authr: ranking has no such feature; did you mean author?"),
        ({"features": {"price": 10}}, "features.price: ranking has it as a number, which has no table"),
        ({"features": {"author": {"rows": 10, "of": "user"}}}, "features.author.of=user: ranking has it as a feature"),
        ({"features": {"author": 0}}, "features.*.rows=0: expected >= 1"),
        ({"features": {"author": {"row": 1}}}, "unknown config key features.author.row: expected one of of, rows"),
        ({"form": "fused", "model": {"name": "sasrec"}}, "ranking.form=fused with model=sasrec: only hstu"),
        ({"batch": {"tokens_per_gpu": 100, "mean_len": 60}}, "at least one user's tokens, 122 with batch.mean_len=60"),
    ],
)  # fmt: skip
def test_wrong_options_of_ranking_are_named(options: dict[str, Any], message: str) -> None:
    form = options.pop("form", "interleaved")
    ranking = {**asdict(RankingConfig(tasks=TASKS, **FEATURES)), "form": form}
    given = {"embedding": {"rows": 10}, "ranking": None if "shop" in options.get("features", {}) else ranking}
    with pytest.raises(UserError, match=re.escape(message)):
        from_options({**given, **options})


def test_tables_that_are_whole_on_every_gpu() -> None:
    """In float32 with a gradient as large, whatever the others are; the item table is spread over four."""
    ranking = RankingConfig(tasks=TASKS, **FEATURES)
    config = planned(HSTU, ranking, ranks=4, kind="sharded", sharding="row_wise", dtype="float16")
    whole = config.with_shardings("row_wise", {"author": "data_parallel"})
    work = work_of(config, LENGTHS)
    spread, kept = plan_memory(config, work), plan_memory(whole, work)
    assert kept.of("gradients") - spread.of("gradients") == 501 * 64 * 4
    assert kept.of("feature tables") - spread.of("feature tables") == 501 * 64 * 4 - 126 * 64 * 2
    sent = [{t.name: t.sent for t in transfers(c, work)} for c in (config, whole)]
    assert sent[1]["rows of features"] == sent[0]["rows of features"] - work.events * 64 * 4 * 3 / 4
    assert sent[1]["rows of events"] == sent[0]["rows of events"]


def test_tables_on_one_gpu_each_are_not_on_the_same() -> None:
    """Loads 5 and 3 on one of four GPUs each: the busiest has 5; with four of 3 beside it, 5 and 4 x 3 / 4 are even."""
    config = planned(HSTU, RankingConfig(tasks=TASKS), ranks=4, kind="sharded", sharding="table_wise")
    assert busiest([(config, 5.0), (config, 3.0)]) == 5.0
    assert busiest([(config, 5.0), *[(config, 8.0)] * 4]) == (5 + 32) / 4
    rows = config.with_table(sharding="row_wise")
    assert busiest([(config, 5.0), (rows, 2.0)]) == 7.0


def test_planner_places_features_too() -> None:
    pytest.importorskip("torchrec")
    from hstu.plan import resolve_sharding

    table = TablePlanConfig(rows=10**7, optimizer="rowwise_adagrad")
    ranking = RankingConfig(tasks=TASKS, **FEATURES)
    given = {**GIVEN, "author": FeaturePlanConfig(rows=10**7)}
    config = PlanConfig(table, ClusterConfig(gpus=8), BatchPlanConfig(), HSTU, ranking=ranking, features=given)
    chosen, found = resolve_sharding(config)
    assert found is not None and found.found
    assert set(found.features) == {"author", "tag", "hour_of_day", "country"}
    assert chosen.features["author"].sharding == found.features["author"]
    assert found.ours_bytes == pytest.approx(found.hbm_bytes, rel=1e-3)


def test_screen_of_a_ranking_plan(capsys: pytest.CaptureFixture[str]) -> None:
    from hstu import plan

    config = planned(HSTU, RankingConfig(tasks=TASKS, actions=ACTIONS, **FEATURES))
    config = replace(config, batch=BatchPlanConfig(), features={"tag": GIVEN["tag"]})
    assert plan.run(config) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "interleaved, tasks click, like:" in printed
    assert "4 feature tables with 2,078 rows, 2 prefix tokens" in printed
    assert "1,000 rows each: author, country; say features='{author: ...}'" in printed
