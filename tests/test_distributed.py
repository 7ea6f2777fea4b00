"""What ranks tell each other, signs of life, how ranks are joined and started, and what is said when one fails."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hstu import launch, pulse
from hstu.config import Config, RunConfig, to_dict
from hstu.data.share import EVENT_WORK, Ranks
from hstu.distributed import World
from hstu.errors import Interrupted, RankLost, UserError
from hstu.evaluate import turns
from hstu.pulse import Beat, Place, Pulse, this_machine
from hstu.runs import open_store
from hstu.train import train
from tests.ranks import run_ranks
from tests.test_train import assert_same_run, final_state, make_config
from tests.test_train_ranks import narrow, run_steps

# World


def exchange() -> dict[str, Any]:
    world = World.current()
    own = torch.tensor([float(world.rank + 1)], requires_grad=True)
    total = world.sum(own)
    rows = world.gather(torch.full((world.rank, 2), float(world.rank)))
    arrays = world.gather_arrays(np.arange(world.rank, dtype=np.int64))
    first = world.on_first(lambda: f"by {world.rank}")
    world.barrier()
    return {
        "sum": float(total), "grad": total.requires_grad, "own": float(own), "rows": rows.tolist(),
        "arrays": arrays.tolist(), "objects": world.gather_objects(world.rank), "first": first,
    }  # fmt: skip


def test_ranks_exchange_sums_and_rows_of_any_number() -> None:
    found = run_ranks(3, exchange)
    for rank, result in enumerate(found):
        assert result == {
            "sum": 6.0, "grad": False, "own": rank + 1.0, "rows": [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]],
            "arrays": [0, 0, 1], "objects": [0, 1, 2], "first": "by 0",
        }  # fmt: skip


def test_a_world_of_one_needs_no_process_group() -> None:
    world = World()
    assert world.is_first and float(world.sum(torch.ones(()))) == 1.0
    assert world.gather(torch.ones(2, 3)).shape == (2, 3) and world.gather_arrays(np.arange(3)).tolist() == [0, 1, 2]
    assert world.gather_objects("x") == ["x"] and world.on_first(lambda: 5) == 5
    world.barrier()
    world.agree({"a": 1})


def fail_on_first() -> str:
    def fail() -> None:
        raise UserError("no such folder")

    try:
        World.current().on_first(fail)
    except UserError as error:
        return str(error)
    return ""


def test_an_error_of_the_first_rank_is_raised_on_all() -> None:
    assert run_ranks(2, fail_on_first) == ["no such folder"] * 2


# Shares


def test_shares_by_hand() -> None:
    # Work n^2 + 10 n: 11, 24, 39, 200. The heaviest goes to rank 0, the others to rank 1, which stays lighter.
    lengths = np.array([1, 2, 3, 10])
    shares = [Ranks(rank, 2, event_work=10.0).divide(lengths) for rank in range(2)]
    assert [mine.tolist() for mine, _ in shares] == [[3], [0, 1, 2]]
    assert all(work.tolist() == [200.0, 74.0] for _, work in shares)
    assert EVENT_WORK == 5


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_take_batches_in_turns_and_leave_none_out(size: int) -> None:
    found = [turns(10, 3, World(rank, size)) for rank in range(size)]
    assert sorted(np.concatenate([places for places, _ in found]).tolist()) == list(range(10))
    assert {rounds for _, rounds in found} == {{1: 4, 2: 2, 3: 2, 8: 1}[size]}
    if size == 2:
        assert found[1][0].tolist() == [3, 4, 5, 9]


# Signs of life


def make_pulses(timeout_s: float) -> tuple[Pulse, Pulse, list[str]]:
    """Two ranks in this process, and what is given up."""
    store, said = dist.HashStore(), []  # type: ignore[var-annotated]
    pulses: list[Pulse] = []
    threads = [
        threading.Thread(target=lambda r=rank: pulses.append(Pulse(store, r, 2, timeout_s, said.append)))
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = sorted(pulses, key=lambda p: p.rank)
    return first, second, said


def wait_until(condition: Callable[..., bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_a_silent_rank_is_given_up_and_named() -> None:
    first, second, said = make_pulses(timeout_s=1.0)
    second._stopping.set()  # its thread ends without a word, as that of a stopped process
    wait_until(lambda: bool(said))
    assert said[0].startswith(
        f"rank 1 (process {os.getpid()} on {socket.gethostname()}) has given no sign of life for 1 s"
    )
    first.stop()


def test_a_rank_that_has_ended_is_not_given_up() -> None:
    first, second, said = make_pulses(timeout_s=0.4)
    second.stop()
    time.sleep(1.0)
    assert said == []
    first.stop()


def test_a_lost_contact_is_explained() -> None:
    first, second, _ = make_pulses(timeout_s=4.0)
    error = RuntimeError("Timed out waiting\nfor recv")
    first.at(7, "training")
    second.at(7, "training")  # the others hear of it with the next beat
    assert first.explain(error) == "the ranks lost contact with each other (Timed out waiting)"
    first.enter("sum")
    assert first.explain(error) == (
        f"{first.name(1)} at step 7, training did not come to what the others wait for, step 7, training, exchange 2 "
        "(sum) (Timed out waiting)"
    )
    second.enter("sum")
    for ours in (first, second, first):
        ours.load()
    assert first.explain(error) == (
        f"{first.name(1)} did not read in time the users that the others waited for (Timed out waiting)"
    )
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    first._look = lambda: None  # type: ignore[method-assign]
    first.others[1] = Beat(socket.gethostname(), gone.pid, this_machine())
    assert first.explain(error).startswith(f"rank 1 (process {gone.pid} on {socket.gethostname()}) ended while")
    for ours in (first, second):
        ours.stop()


def wait_apart() -> list[str]:
    """Three ranks, of which one is at the validation while the others train; what their pulses give up."""
    world = World.current()
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)] if world.is_first else []
    port = world.gather_objects([store.port for store in stores])[0][0]
    store = dist.TCPStore("localhost", port, is_master=False)
    said: list[str] = []
    patient = dist.new_group(backend="gloo")
    pulse = Pulse(store, world.rank, 3, 1.0, said.append)
    world = dataclasses.replace(world, pulse=pulse, patient=patient)
    world.at(5, "training")
    astray = world.rank == 1
    if astray:
        world.at(5, "validation")
    ones = torch.ones(())
    thread = threading.Thread(target=world.barrier if astray else lambda: world.sum(ones))
    thread.start()
    plain = dataclasses.replace(world, pulse=None)
    if astray:  # then goes to what the others wait in, and they to where it was, so that all come to an end
        wait_until(lambda: bool(said))
        plain.sum(ones)
    thread.join()
    if not astray:
        plain.barrier()
    world.gather_objects(None)
    return [*said, pulse.name(1)]


def test_a_rank_in_another_exchange_than_the_others_is_named_with_both_places() -> None:
    said, name = run_ranks(3, wait_apart)[1]
    assert said == (
        f"{name} at step 5, validation, exchange 3 (barrier) did not come to what the others wait for, step 5, "
        "training, exchange 2 (sum) (for 1 s; run.timeout_s=1)"
    )


class Places:
    """In place of a pulse: all places of a rank."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, ...]] = []

    def at(self, step: int, phase: str, patient: bool = False) -> None:
        self.found.append((step, phase))

    def enter(self, exchange: str, patient: bool = False) -> None:
        self.found.append((exchange,))


def places_of_a_run(config: Config) -> list[tuple[Any, ...]]:
    places = Places()
    train(config, world=dataclasses.replace(World.current(), pulse=places))  # type: ignore[arg-type]
    return places.found


def test_all_ranks_come_through_the_same_places(tmp_path: Path) -> None:
    config = narrow(tmp_path / "run", make_config(tmp_path, run_epochs=1, run_save_every_steps=4, run_loggers=[]))
    first, second = run_ranks(2, places_of_a_run, config)
    assert first == second
    phases = [place for place in first if len(place) > 1]
    steps = [(step, "training") for step in range(10)]
    saved = {3: (4, "saving"), 7: (8, "saving")}
    during = [place for step in range(10) for place in (steps[step], saved.get(step)) if place]
    assert phases == [*during, (10, "validation"), (10, "saving"), (10, "test")]


@pytest.mark.parametrize(("patient", "is_stuck"), [(False, True), (True, False)], ids=["limited", "patient"])
def test_who_works_alone_while_the_others_wait_with_patience_is_left_alone(patient: bool, is_stuck: bool) -> None:
    first, second, said = make_pulses(timeout_s=0.4)
    for each in (first, second):
        each.at(3, "training")
        each.enter("sum")
    first.enter("barrier", patient)
    end = time.monotonic() + 1.0
    while time.monotonic() < end and not said:
        time.sleep(0.01)
    assert bool(said) == is_stuck
    for ours in (first, second):
        ours.stop()


def test_ranks_that_compute_for_long_at_one_place_are_left_alone() -> None:
    first, second, said = make_pulses(timeout_s=0.4)
    for each in (first, second):
        each.at(3, "training")
    time.sleep(1.0)
    assert said == []
    for ours in (first, second):
        ours.stop()


def test_most_ranks_are_believed_and_of_two_the_one_that_is_further() -> None:
    first, second, _ = make_pulses(timeout_s=60.0)
    here, there = Place(1, "training", 4, "sum"), Place(1, "validation", 5, "barrier", True)
    first.own.place, first.others[1].place = here, there
    assert str(first._apart()).startswith("rank 0 (process")
    first.others[2] = Beat("host", 12, "machine", place=here)
    assert first._apart() == (
        f"{first.name(1)} at step 1, validation, exchange 5 (barrier) did not come to what the others wait for, "
        "step 1, training, exchange 4 (sum)"
    )
    for ours in (first, second):
        ours.stop()


def test_processes_of_a_machine_with_the_same_name_are_left_alone(tmp_path, monkeypatch) -> None:
    (tmp_path / "boot_id").write_text("another boot\n")
    here = this_machine()
    with monkeypatch.context() as patched:
        patched.setattr(pulse, "BOOT_ID", tmp_path / "boot_id")
        elsewhere = this_machine.__wrapped__()
    assert elsewhere != here and "another boot" in elsewhere and elsewhere.startswith(socket.gethostname())
    first, second, _ = make_pulses(timeout_s=60.0)
    assert first.others[1].machine == here
    first._look = lambda: None  # type: ignore[method-assign]
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        first.others[1] = Beat(socket.gethostname(), process.pid, elsewhere)  # silent since ever
        first.kill_silent()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        first.others[1].machine = here
        first.kill_silent()
        assert process.wait(20) == -9
        assert "ended while the others went on" in first.explain(RuntimeError(""))
        first.others[1].machine = elsewhere
        assert "ended" not in first.explain(RuntimeError(""))
    finally:
        process.kill()
    for ours in (first, second):
        ours.stop()


# Joining


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_environment(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_environment


def test_a_port_in_use_is_named(torchrun: Callable[..., None]) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        torchrun(RANK=0, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=taken.getsockname()[1])
        with pytest.raises(UserError, match=rf"cannot listen at port {taken.getsockname()[1]} .*another MASTER_PORT"):
            launch.connect(0, timeout_s=1.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_an_absent_first_rank_is_named(torchrun: Callable[..., None]) -> None:
    port = free_port()
    torchrun(RANK=1, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=port)
    with pytest.raises(UserError, match=rf"rank 1 finds no store of the run at localhost:{port} .*start rank 0"):
        launch.connect(1, timeout_s=0.5)


def test_an_absent_rank_is_named(torchrun: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "START_TIMEOUT_S", 0.5)
    torchrun(RANK=0, WORLD_SIZE=3, MASTER_ADDR="localhost", MASTER_PORT=free_port())
    with pytest.raises(UserError, match=r"rank 1, 2 of 3 did not start within 0\.5 s"), launch.join(RunConfig()):
        pass


def test_another_number_of_ranks_than_asked_for_is_refused(torchrun: Callable[..., None]) -> None:
    torchrun(RANK=0, WORLD_SIZE=2)
    with pytest.raises(UserError, match="run.ranks=3, but 2 were started"), launch.join(RunConfig(ranks=3)):
        pass


def test_one_rank_reports_for_all(torchrun: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    torchrun(WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE=True)
    statuses = []
    for rank in (1, 0):
        torchrun(RANK=rank)
        statuses.append(launch.conclude(UserError(f"found by {rank}")))
    assert statuses == [1, 1] and capsys.readouterr().err == "error: found by 1\n"


def test_what_would_fail_again_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(launch.FOLDER, str(tmp_path))
    assert launch.conclude(RankLost("rank 1 is gone")) == 1  # the launcher starts ranks again that end with 1
    assert (tmp_path / "loss-0.txt").read_text() == "rank 1 is gone"
    assert launch.conclude(UserError("no such metric")) == 0
    assert launch.conclude(RankLost("rank 0 is gone")) == 0  # as it has reported its end
    with pytest.raises(UserError, match="^no such metric$"):
        launch._raise_outcome(tmp_path / launch.OUTCOME, None, None)
    assert capsys.readouterr().err == ""


# Starting


def ranks_of_this_process() -> dict[int, int]:
    """Rank -> process id of the ranks that the launcher has started here."""
    found = {}
    for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        try:
            lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except OSError:  # it has just ended
            continue
        environment = dict(line.split("=", 1) for line in lines if "=" in line)
        if "RANK" in environment and launch.FOLDER in environment:
            found[int(environment["RANK"])] = int(pid)
    return found


@dataclasses.dataclass
class OlderLaunchConfig:
    """Of a torch whose launcher has no such setting."""

    max_restarts: int = 3


@dataclasses.dataclass
class LaunchConfig(OlderLaunchConfig):
    shutdown_timeout: int | None = None


def test_the_launcher_waits_for_the_last_save_where_it_can() -> None:
    assert launch._stop_patience(RunConfig(), LaunchConfig) == {"shutdown_timeout": 300}
    assert launch._stop_patience(RunConfig(stop_patience_s=7), LaunchConfig) == {"shutdown_timeout": 7}
    assert launch._stop_patience(RunConfig(), OlderLaunchConfig) == {}
    with pytest.raises(UserError, match=r"run.stop_patience_s=7: .* 30 s after a signal.*expected null, or torch 2.13"):
        launch._stop_patience(RunConfig(stop_patience_s=7), OlderLaunchConfig)
    with pytest.raises(UserError, match=r"run.stop_patience_s=0: expected >= 1 or null"):
        RunConfig(stop_patience_s=0)


def meanwhile(config: Config, actions: list[Callable[[], None]]) -> threading.Thread:
    """Takes the actions one by one, each when the run has made three steps more than at the one before."""

    path = Path(config.run.dir or "") / "metrics.jsonl"

    def num_lines() -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    def work(reached: int) -> None:
        for action in actions:
            wait_until(lambda least=reached + 3: num_lines() >= least, 150.0)
            reached = num_lines()
            action()

    thread = threading.Thread(target=work, args=(num_lines(),), daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds its ranks in /proc")
def test_stopped_hanging_and_killed_the_run_ends_bit_identical(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, run_epochs=3, run_save_every_steps=2, run_ranks=2, run_timeout_s=5.0)
    whole, troubled = (narrow(tmp_path / name, config) for name in ("whole", "troubled"))
    assert run_ranks(2, run_steps, whole, open_store(config).path) == ["", ""]
    options = to_dict(troubled)
    before = signal.getsignal(signal.SIGTERM)
    thread = meanwhile(troubled, [lambda: os.kill(os.getpid(), signal.SIGTERM)])
    with pytest.raises(Interrupted) as stopped:
        launch.launch(options)
    thread.join()
    assert stopped.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == before
    reached = final_state(tmp_path / "troubled").values["progress"]["global_step"]
    assert 3 <= reached < 30
    actions = [
        lambda: os.kill(ranks_of_this_process()[1], signal.SIGSTOP),
        lambda: os.kill(ranks_of_this_process()[0], signal.SIGKILL),
    ]
    thread = meanwhile(troubled, actions)
    launch.launch(options)
    thread.join()
    shown = capfd.readouterr()
    assert "restart 1: rank 1 (process" in shown.out and "has given no sign of life for" in shown.out
    assert "restart 2: rank 0 (process" in shown.out and "ended while the others went on" in shown.out
    assert "Traceback" not in shown.err and "error" not in shown.err
    assert_same_run(tmp_path / "whole", tmp_path / "troubled")
    assert (tmp_path / "troubled" / "result.json").exists()
