"""A step waits for the device once, and an evaluation over sharded tables twice a call, torchrec's own waits aside."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.config import Config, LossConfig, OptimConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.config_similarity import MixtureConfig
from hstu.data.batches import Batch
from hstu.data.share import Ranks, Share
from hstu.data.store import SequenceStore
from hstu.distributed import World
from hstu.feature_tables import has_torchrec
from hstu.problem import make_problem
from hstu.progress import Display
from hstu.runs import open_store
from hstu.sharded.rank import Scoring, sharded_rank, sharded_topk
from hstu.train import StepInput, Trainer
from hstu.transfer import to_device
from tests.ranks import run_ranks
from tests.reads import Reads
from tests.test_ranking_train import make_config as make_ranking_config
from tests.test_ranking_train import planted_store
from tests.test_train import make_config
from tests.test_train_ranks import narrow

ON_THE_HOST = (
    "check_rows", "_check_offsets", "check_range_on_cpu", "<genexpr>", "draw_at", "zero_grad", "step",
    "gradient", "move", "hash_keep",
)  # fmt: skip
"""Functions that read what lies on the host, check on the CPU alone, or are the CPU's own kernel."""
ONCE = {"train.py:_exchange tolist": 1}
CPU = torch.device("cpu")
MIXTURE = MixtureConfig(query_components=2, item_components=2, dim=4, hidden_dim=4, gate_dim=4)
TORCHREC = ("_fetch", "_lookup")


def reads_of_a_step(config: Config, store_path: Path, half: bool = False) -> Counter[str]:
    """In the second step, as in the first one torchrec learns what it keeps. half: every other position counts."""
    trainer = Trainer(config, SequenceStore.open(store_path), Path(config.run.dir or ""), Display(False, shown=False))
    trainer._step(trainer._make_input(0, 0))
    step_input = trainer._make_input(0, 1)
    if half:
        step_input = StepInput([(with_half(share), plan) for share, plan in step_input.parts])
    with Reads() as reads:
        trainer._step(step_input)
    trainer.saver.close()
    return reads.places


def with_half(share: Share[Batch]) -> Share[Batch]:
    return replace(share, batch=replace(share.batch, counted=torch.arange(0, share.batch.num_events, 2)))


def at_the_device(places: Counter[str], *apart: str) -> dict[str, int]:
    def function(place: str) -> str:
        return place.partition(":")[2].partition(" ")[0]

    return {place: n for place, n in places.items() if function(place) not in (*ON_THE_HOST, *apart)}


def test_reads_are_seen() -> None:
    values = torch.arange(4.0)
    with Reads() as reads:
        values.tolist(), float(values[0]), values[values > 1], values.nonzero(), values.repeat_interleave(values.long())
        values[values > 1], values.numpy(), torch.tensor([1], device="cpu"), values.repeat_interleave(2)
        values[torch.tensor([0])], values + 1, values.to("cpu"), values.to(torch.float64), to_device(values, CPU)
        values[values > 1] = 0.0
        values[torch.tensor([0])] = 0.0
        values.index_fill_(0, torch.tensor([0]), 0.0), values.index_put_((torch.tensor([0]),), torch.zeros(1))
    kinds = Counter({place.rpartition(" ")[2]: n for place, n in reads.places.items()})
    expected = ("tolist", "_local_scalar_dense", "nonzero", "repeat_interleave", "numpy", "tensor")
    assert kinds == {"index": 2, **dict.fromkeys([*expected, "device", "__setitem__"], 1)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    return {"retrieval": open_store(make_config(root)).path, "ranking": planted_store(root / "planted").path}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", ["retrieval", "half", "accumulated", "shared_bank", "mixture", "ranking", "fused"])
def test_a_step_reads_once(case: str, num_ranks: int, stores: dict[str, Path], tmp_path: Path) -> None:
    ranking = case in ("ranking", "fused")
    if ranking:
        config = make_ranking_config(tmp_path, "fused" if case == "fused" else "interleaved", run_batch_users=5)
    else:
        optim = OptimConfig(clip_norm=0.5, average_decay=0.9, accumulate_steps=1 + (case == "accumulated"))
        config = make_config(tmp_path, optim=optim)
    if case == "shared_bank":
        config = replace(config, loss=LossConfig(name="shared_bank", num_negatives=16))
    if case == "mixture":
        model = replace(config.model, similarity="mixture_of_logits", mixture=MIXTURE, l2_normalize=False)
        config = replace(config, model=model, loss=LossConfig(num_negatives=16, temperature=1.0))
    store = stores["ranking" if ranking else "retrieval"]
    for places in run_ranks(num_ranks, reads_of_a_step, narrow(tmp_path / "run", config), store, case == "half"):
        assert at_the_device(places) == ONCE


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", ["retrieval", "ranking"])
def test_batches_are_made_without_a_wait(case: str, num_ranks: int, stores: dict[str, Path], tmp_path: Path) -> None:
    """A loader thread that waited for the stream of the training would lose a step at every tensor."""
    config = make_config(tmp_path) if case == "retrieval" else make_ranking_config(tmp_path)
    problem = make_problem(config, SequenceStore.open(stores[case]), World(), tmp_path)
    problem.data.share(0, 0, Ranks(size=num_ranks))
    with Reads() as reads:
        problem.data.share(0, 1, Ranks(size=num_ranks)).batch.to(CPU)
    assert reads.places == {}


def test_copies_to_a_gpu_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: asked.append("pinned") or value)
    monkeypatch.setattr(torch.Tensor, "to", lambda value, *args, **options: asked.append((args, options)) or value)
    for device in (torch.device("cuda", 1), CPU):
        to_device(torch.ones(2), device)
    assert asked == ["pinned", ((torch.device("cuda", 1),), {"non_blocking": True}), ((CPU,), {})]


NEGATIVES = {
    "losses.py:scored_negatives nonzero": 1, "losses.py:scored_negatives _local_scalar_dense": 1,
    "losses.py:_places_and_labels nonzero": 1, "distributed.py:counts tolist": 1,
}  # fmt: skip
BANK = {
    "losses.py:find_places nonzero": 1, "losses.py:_places_and_labels nonzero": 1,
    "distributed.py:counts tolist": 1,
}  # fmt: skip


@pytest.mark.skipif(not has_torchrec(), reason="torchrec is not installed")
@pytest.mark.parametrize(
    ("loss", "num_ranks", "expected"),
    [("sampled_softmax", 1, {}), ("sampled_softmax", 2, NEGATIVES), ("full_softmax", 2, BANK)],
)
def test_a_sharded_step_reads_what_it_fetches(
    loss: str, num_ranks: int, expected: dict[str, int], stores: dict[str, Path], tmp_path: Path
) -> None:
    embedding = EmbeddingConfig(kind="sharded", optimizer="adam")
    config = make_config(tmp_path, embedding=embedding, loss=LossConfig(name=loss, num_negatives=16))
    for places in run_ranks(num_ranks, reads_of_a_step, narrow(tmp_path / "run", config), stores["retrieval"]):
        assert at_the_device(places, *TORCHREC) == ONCE | expected


@pytest.mark.parametrize("items", [60, 600], ids=["one piece", "several pieces"])
def test_ranks_read_twice_however_many_pieces(items: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(items + 1, 4, generator=generator)
    how = Scoring(World(), items, False, 1e-6, 0.001, lambda ids: table[ids])
    queries, targets = torch.randn(3, 4, generator=generator), torch.tensor([1, items, 7])
    seen_ids, seen_offsets = torch.tensor([2, 3, 5]), torch.tensor([0, 1, 1, 3])
    twice = {"rank.py:_by_piece tolist": 1, "rank.py:check _local_scalar_dense": 1}
    with Reads() as reads:
        sharded_rank(how, queries, targets, seen_ids, seen_offsets)
    assert reads.places == twice
    with Reads() as reads:
        sharded_topk(how, queries, 5, seen_ids, seen_offsets)
    assert reads.places == twice
