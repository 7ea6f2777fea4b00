"""What ranks on several machines and GPUs need, seen on a CPU: threads, streams, devices, rows of lookups, rounding."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hstu import launch, metrics
from hstu.checkpoint import Saver, State
from hstu.data.batches import Prefetcher
from hstu.distributed import World
from hstu.errors import UserError
from hstu.feature_tables import BAGS, has_torchrec, spread
from hstu.nonfinite import is_finite
from hstu.problem import make_problem
from hstu.runs import open_store
from tests.ranks import run_ranks
from tests.test_train import make_config


def test_threads_have_the_gpu_of_their_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    current: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: current.update({threading.current_thread().name: device})
    )
    with Prefetcher(lambda step: current[threading.current_thread().name], 0, 2) as items:
        assert list(items) == [3, 3]
    current.clear()
    saver = Saver(tmp_path / "checkpoints", keep_last=1)
    saver.save(State({"model.w": torch.ones(2)}), 1)
    saver.close()
    assert current == {"checkpoint_0": 3}


class Recorder:
    """In place of a tensor on a GPU."""

    def __init__(self) -> None:
        self.streams: list[Any] = []

    def record_stream(self, stream: Any) -> None:
        self.streams.append(stream)


@pytest.mark.skipif(not has_torchrec(), reason="needs torchrec")
def test_all_that_enters_the_pipeline_is_kept_until_its_streams_have_used_it() -> None:
    from hstu.sharded.losses import Positions, Scored
    from hstu.sharded.pipeline import _Batch

    ids, labels, candidates, bank, keyed, features = (Recorder() for _ in range(6))
    scored: Any = Scored(Positions(World(), (1,)), ids, labels, candidates, bank)  # type: ignore[arg-type]
    _Batch([keyed, features], scored, lambda: torch.zeros(())).record_stream("stream")  # type: ignore[arg-type]
    assert [t.streams for t in (ids, labels, candidates, bank, keyed, features)] == [["stream"]] * 6


def meet(port: int, devices: list[str]) -> list[int | str]:
    """What ranks with these kinds of device get when they meet, each through its own connection."""

    def one(rank: int) -> int | str:
        store = dist.TCPStore("localhost", port, is_master=False, timeout=timedelta(seconds=5))
        try:
            return launch._meet(store, rank, len(devices), devices[rank])
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(one, range(len(devices))))


def test_ranks_meet_again_at_a_store_that_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers of two machines count restarts differently: the numbers are rank 0's, whatever lies in the store."""
    server = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    assert meet(server.port, ["cpu"] * 3) == [1, 1, 1]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert meet(server.port, ["cpu"] * 3) == [2, 2, 2]
    monkeypatch.setattr(launch, "START_TIMEOUT_S", 0.3)
    rank_0 = dist.TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=5))
    with pytest.raises(UserError, match="rank 1, 2 of 3 did not start"):  # those of the last time do not count
        launch._meet(rank_0, 0, 3, "cpu")


def test_ranks_with_other_devices_are_named() -> None:
    server = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    found = meet(server.port, ["cuda", "cuda", "cpu"])
    assert all(str(text).startswith("rank 2 computes on cpu, rank 0 on cuda: set run.device") for text in found)


@pytest.mark.parametrize("counts", [[0, 5], [3 * BAGS + 7, 1]], ids=["few", "many"])
def test_values_are_spread_evenly_over_rows(counts: list[int]) -> None:
    lengths = spread(counts).view(len(counts), BAGS)
    assert lengths.sum(dim=1).tolist() == counts
    assert (lengths.amax(dim=1) - lengths.amin(dim=1) <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    assert is_finite(tensor)
    tensor[1, 2] = value
    assert not is_finite(tensor)
    assert is_finite(tensor[:0]) and is_finite(torch.tensor([1, 2]))


def validate_rounding_otherwise(root: Path) -> dict[str, float]:
    """Metrics of a new model, on a rank whose processor gives the second one's other last digits."""
    world = World.current()
    config = make_config(root)
    problem = make_problem(config, open_store(config, world), world, root / "run")
    summarize = metrics.summarize

    def rounded(*args: Any) -> dict[str, float]:
        return {name: value + 1e-9 * world.rank for name, value in summarize(*args).items()}

    metrics.summarize = rounded
    try:
        return problem.validate()
    finally:
        metrics.summarize = summarize


def test_ranks_decide_by_the_same_metrics(tmp_path: Path) -> None:
    found = run_ranks(2, validate_rounding_otherwise, tmp_path)
    assert found[0] == found[1] and found[0]["mrr"] > 0
