"""Checkpoints: whole or not at all, written beside the training, the last k kept, damage seen, nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hstu import checkpoint, checkpoint_dcp
from hstu.checkpoint import Saver, State
from hstu.checkpoint_state import restore_model, restore_run, run_state
from hstu.cli import command
from hstu.config import OptimConfig
from hstu.distributed import World
from hstu.errors import UserError
from hstu.optim import WeightAverage, clip_gradients, gradient_norm, learning_rate, make_optimizer

TENSORS = "__0_0.distcp"


def state(value: float) -> State:
    """Tensors filled with ``value``, one of them a scalar, one empty, one of integers."""
    tensors = {
        "model.w": torch.full((3, 2), value), "model.step": torch.tensor(value), "model.none": torch.zeros(0, 4),
        "model.ids": torch.full((5,), int(value)),
    }  # fmt: skip
    return State(tensors, {"progress": {"step": value, "best": float("nan")}})


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with the steps 1, 2 and 3 and the best."""
    saver = Saver(tmp_path / "checkpoints", keep_last=3)
    for step in (1, 2, 3):
        saver.save(state(step), step)
    saver.save_best(state(9))
    saver.wait()
    saver.close()
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def last_step(folder: Path) -> float:
    found = checkpoint.load_last(folder)
    assert found is not None
    assert found.tensors("model.")["w"].tolist() == [[found.values["progress"]["step"]] * 2] * 3
    return found.values["progress"]["step"]


@pytest.mark.parametrize("background", [True, False], ids=["background", "at once"])
def test_the_last_k_and_the_best_are_kept(tmp_path, background):
    saver = Saver(tmp_path, keep_last=2, background=background)
    for step in range(5):
        saver.save(state(step), step)
    saver.save_best(state(8))
    saver.save_best(state(9))
    saver.wait()
    assert names(tmp_path) == ["best", "step-000000003", "step-000000004"]
    assert last_step(tmp_path) == 4
    best = checkpoint.load(tmp_path / checkpoint.BEST)
    tensors = best.tensors()
    for name, value in state(9).tensors.items():
        assert torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype, name
    assert best.values["progress"]["step"] == 9 and best.ranks == 1


def test_a_step_saved_again_is_replaced(tmp_path):
    saver = Saver(tmp_path, keep_last=2)
    saver.save(state(1), 7)
    saver.save(state(2), 7)
    saver.wait()
    assert names(tmp_path) == ["step-000000007"] and last_step(tmp_path) == 2


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    go_on, write = threading.Event(), checkpoint.write

    def slowly(*args):
        assert go_on.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint, "write", slowly)
    saver, trained = Saver(tmp_path, keep_last=2), state(1)
    saver.save(trained, 1)  # returns though nothing can be written yet
    with torch.no_grad():
        trained.tensors["model.w"].fill_(5.0)
    trained.values["progress"] = {"step": 5}
    assert not tmp_path.exists() or names(tmp_path) == []
    waits = threading.Thread(target=saver.save, args=(state(2), 2))
    waits.start()
    waits.join(0.2)
    assert waits.is_alive(), "a save that is due waits for the one before"
    go_on.set()
    waits.join(60)
    saver.wait()
    first = checkpoint.load(tmp_path / "step-000000001")
    assert first.tensors("model.")["w"].unique().tolist() == [1.0] and first.values["progress"]["step"] == 1
    assert last_step(tmp_path) == 2


def test_a_step_waits_for_the_best_whose_memory_it_takes(tmp_path, monkeypatch):
    write = checkpoint.write

    def slowly(*args):
        time.sleep(0.1)
        write(*args)

    monkeypatch.setattr(checkpoint, "write", slowly)
    saver = Saver(tmp_path, keep_last=2)
    saver.save_best(state(1))
    saver.save(state(2), 2)
    copied = {name for name, _ in saver._copies}
    saver.save_best(state(3))
    assert {name for name, _ in saver._copies} == copied and len(saver._copies) == len(state(1).tensors)
    saver.close()
    found = [checkpoint.load(tmp_path / name).tensors("model.")["w"] for name in ("step-000000002", "best")]
    assert [value.unique().tolist() for value in found] == [[2.0], [3.0]]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("background", [True, False], ids=["background", "at once"])
@pytest.mark.parametrize("file", [TENSORS, ".metadata.tmp", "values.json", "manifest.json"])
def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(tmp_path, capsys, background, file):
    saver = Saver(tmp_path, keep_last=1, background=background)
    saver.save(state(1), 1)
    saver.wait()
    (tmp_path / "step-000000002.partial").mkdir()
    (tmp_path / "step-000000002.partial" / file).symlink_to("/dev/full")

    @command
    def train() -> None:
        saver.save(state(2), 2)
        saver.save(state(3), 3)  # where the failure of the one before is told

    with pytest.raises(SystemExit):
        train()
    assert capsys.readouterr().err.startswith(f"error: the disk is full ({tmp_path}")
    assert names(tmp_path) == ["step-000000001"] and last_step(tmp_path) == 1
    saver.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_step_is_not_written_where_its_best_one_could_not_be(tmp_path):
    saver = Saver(tmp_path, keep_last=1)
    (tmp_path / "best.partial").mkdir()
    (tmp_path / "best.partial" / TENSORS).symlink_to("/dev/full")
    saver.save_best(state(1))
    with pytest.raises(OSError, match="No space left"):
        saver.save(state(1), 1)
    saver.close()
    assert names(tmp_path) == []


def test_what_a_crash_left_is_cleared_away(saved):
    shutil.copytree(saved / "step-000000003", saved / "step-000000004.partial")
    shutil.copytree(saved / "step-000000003", saved / "step-000000000.removed")
    shutil.copytree(saved / "step-000000003", saved / "step-000000003.replaced")
    (saved / "best").rename(saved / "best.replaced")  # ended between the two renames
    (saved / "step-000000002.partial").write_bytes(b"of the first format")
    Saver(saved, keep_last=3).close()
    assert names(saved) == ["best", "step-000000001", "step-000000002", "step-000000003"]
    assert checkpoint.load(saved / checkpoint.BEST).values["progress"]["step"] == 9


KILLED = """
import os, sys
from pathlib import Path
from hstu import checkpoint
from tests.test_checkpoint import state

def die(*_):
    os.kill(os.getpid(), 9)

for name in ("fsync", "_write_json", "_replace"):  # in the tensors, before the manifest, before the rename
    folder = Path(sys.argv[1]) / name
    saver = checkpoint.Saver(folder, keep_last=1, background=False)
    saver.save(state(1), 1)
    saver.close()
    if os.fork() == 0:
        setattr(os if name == "fsync" else checkpoint, name, die)
        saver.save(state(2), 2)
    assert os.wait()[1] == 9
"""


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])
    for place in ("fsync", "_write_json", "_replace"):
        folder = tmp_path / place
        assert "step-000000002.partial" in names(folder) and last_step(folder) == 1
        Saver(folder, keep_last=1).close()
        assert names(folder) == ["step-000000001"] and last_step(folder) == 1


# Damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "tensors cut": (lambda p: cut(p / TENSORS), r"__0_0\.distcp has [\d,]+ bytes, expected [\d,]+"),
    "tensors flipped": (lambda p: flip(p / TENSORS), r"__0_0\.distcp has checksum \w{8}, expected \w{8}"),
    "tensors gone": (lambda p: (p / TENSORS).unlink(), r"__0_0\.distcp is missing"),
    "metadata flipped": (lambda p: flip(p / ".metadata"), r"\.metadata has checksum"),
    "values cut": (lambda p: cut(p / "values.json"), r"values\.json has [\d,]+ bytes"),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest cut": (lambda p: cut(p / "manifest.json"), r"manifest\.json cannot be read"),
    "manifest of nothing": (lambda p: (p / "manifest.json").write_text("[]"), r"manifest\.json cannot be read"),
    "folder empty": (lambda p: [f.unlink() for f in p.iterdir()], r"manifest\.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(saved, capsys, damage):
    hurt, message = damage
    hurt(saved / "step-000000003")
    assert last_step(saved) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "step-000000003 is damaged" in told and "going back to step 2" in told
    assert pytest.raises(UserError, checkpoint.load, saved / "step-000000003").match(message)
    hurt(saved / "best")
    with pytest.raises(UserError, match=rf"best is damaged \(.*{message}.*\): take which=last"):
        checkpoint.load(saved / checkpoint.BEST)


def test_two_damaged_ones_are_told_in_one_line_and_set_aside(saved, capsys):
    cut(saved / "step-000000002" / TENSORS)
    flip(saved / "step-000000003" / TENSORS)
    found = checkpoint.load_last(saved, set_aside=True)
    assert found is not None and found.path.name == "step-000000001"
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.count("is damaged") == 2 and "going back to step 1" in told
    assert names(saved) == ["best", "step-000000001", "step-000000002.damaged", "step-000000003.damaged"]
    saver = Saver(saved, keep_last=1)
    saver.save(state(2), 2)
    saver.wait()
    assert last_step(saved) == 2


def test_no_whole_one_is_an_error_and_none_at_all_is_not(saved, tmp_path):
    assert checkpoint.load_last(tmp_path / "none") is None
    for step in checkpoint.steps(saved):
        cut(step / TENSORS)
    with pytest.raises(UserError, match="no older one is left"):
        checkpoint.load_last(saved, set_aside=True)
    assert [p.name for p in checkpoint.steps(saved)] == [f"step-00000000{n}" for n in (1, 2, 3)]
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "none" / checkpoint.BEST)


def test_another_format_is_refused(saved):
    manifest = json.loads((saved / "best" / "manifest.json").read_text())
    (saved / "best" / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="has format 99, expected 2"):
        checkpoint.load(saved / checkpoint.BEST)


# Nothing is executed


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def accept(folder: Path, name: str, data: bytes) -> None:
    """Puts ``data`` into a checkpoint as an attacker would: with a manifest that fits."""
    (folder / name).write_bytes(data)
    if name == "manifest.json":
        return
    manifest = json.loads((folder / "manifest.json").read_text())
    found = checkpoint_dcp.file_sum(folder / name)
    manifest["files"][name] = {"size": found.size, "crc32": found.crc32}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_pickle_in_place_of_the_metadata_is_not_run(saved, tmp_path, capsys):
    data = pickle.dumps(Payload(tmp_path / "ran"))
    pickle.loads(data)
    (tmp_path / "ran").rmdir()  # it works
    accept(saved / "step-000000003", ".metadata", data)
    with pytest.raises(UserError, match=r"\.metadata cannot be read \(it names posix\.mkdir, which is no part of"):
        checkpoint.load(saved / "step-000000003")
    assert last_step(saved) == 2 and "posix.mkdir" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_place_of_tensors_is_not_run(saved, tmp_path):
    path = saved / "best" / TENSORS
    data = pickle.dumps(Payload(tmp_path / "ran")).ljust(path.stat().st_size, b"\0")
    path.write_bytes(data)
    with pytest.raises(Exception):  # noqa: B017  what torch.load says of it does not matter
        torch.load(path, weights_only=False)
    (tmp_path / "ran").rmdir()  # it works
    accept(saved / "best", TENSORS, data)
    with pytest.raises(UserError, match="best cannot be read"):
        checkpoint.load(saved / checkpoint.BEST).tensors()
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_place_of_json_is_not_run(saved, tmp_path):
    for name in ("values.json", "manifest.json"):
        accept(saved / "best", name, pickle.dumps(Payload(tmp_path / "ran")))
        with pytest.raises(UserError, match="best is damaged"):
            checkpoint.load(saved / checkpoint.BEST)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_a_file_of_the_first_format_is_not_run(tmp_path):
    torch.save({"format": 1, "model": Payload(tmp_path / "ran")}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt is damaged \(it cannot be read \(Weights only load failed"):
        checkpoint.load(tmp_path / checkpoint.BEST)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["../../../secret", "/etc/hostname"])
def test_metadata_cannot_name_a_file_outside(saved, path):
    folder = saved / "best"
    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.relative_path = path
    accept(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match="which is not among the files of the checkpoint"):
        checkpoint.load(folder)


# What of a run is in it


def make_run(seed: int) -> tuple[torch.nn.Module, torch.optim.AdamW, WeightAverage]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    return model, make_optimizer(model, OptimConfig(weight_decay=0.1)), WeightAverage(model, 0.9)


def state_of(run: tuple, progress: dict) -> State:
    model, optimizer, average = run
    return run_state(model, [optimizer], average, progress, World())


def resume(found: checkpoint.Saved, run: tuple) -> dict:
    model, optimizer, average = run
    return restore_run(found, model, [optimizer], average, World())


def train_steps(run: tuple, count: int) -> None:
    """Steps on data that torch's generator draws."""
    model, optimizer, average = run
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        average.update()


def values_of(run: tuple) -> list[torch.Tensor]:
    model, optimizer, average = run
    moments = [optimizer.state[p][field] for p in model.parameters() for field in sorted(optimizer.state[p])]
    return [*model.parameters(), *moments, *average.values.values(), torch.tensor(average.num_updates)]


def test_a_run_goes_on_bit_for_bit(tmp_path):
    run, saver = make_run(0), Saver(tmp_path, keep_last=1)
    train_steps(run, 3)
    saver.save(state_of(run, {"global_step": 3}), 3)
    train_steps(run, 2)
    saver.wait()
    again = make_run(1)
    found = checkpoint.load_last(tmp_path)
    assert found is not None and resume(found, again) == {"global_step": 3}
    train_steps(again, 2)
    assert len(values_of(run)) == 4 + 4 * 3 + 4 + 1
    assert all(torch.equal(a, b) for a, b in zip(values_of(run), values_of(again), strict=True))


def test_a_file_of_the_first_format_is_resumed_and_replaced(tmp_path):
    run = make_run(0)
    model, optimizer, average = run
    train_steps(run, 3)
    old = {
        "format": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": {"global_step": 3},
        "rng": {"cpu": torch.get_rng_state()},
        "average": {"num_updates": average.num_updates, "values": list(average.values.values())},
    }  # fmt: skip
    torch.save(old, tmp_path / "step-000000003.pt")
    torch.save({**old, "average": None}, tmp_path / "best.pt")
    weight = model[0].weight.detach().clone()
    train_steps(run, 2)
    again = make_run(1)
    found = checkpoint.load_last(tmp_path)
    assert found is not None and resume(found, again) == {"global_step": 3}
    train_steps(again, 2)
    assert all(torch.equal(a, b) for a, b in zip(values_of(run), values_of(again), strict=True))
    fresh = make_run(2)[0]
    restore_model(checkpoint.load(tmp_path / checkpoint.BEST), fresh)
    assert torch.equal(fresh[0].weight, weight)
    saver = Saver(tmp_path, keep_last=1)
    saver.save(state_of(again, {"global_step": 5}), 5)
    saver.save_best(state_of(again, {"global_step": 5}))
    saver.wait()
    assert names(tmp_path) == ["best", "step-000000005"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run, saver = make_run(0), Saver(tmp_path, keep_last=1)
    train_steps(run, 1)
    saver.save(state_of(run, {}), 1)
    saver.wait()
    found = checkpoint.load_last(tmp_path)
    assert found is not None
    wide = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    with pytest.raises(UserError, match=r"model\.0\.weight is of shape \(4, 3\), expected shape \(5, 3\)"):
        restore_model(found, wide)
    more = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1), torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"model\.2\.weight is missing"):
        restore_model(found, more)
    with pytest.raises(UserError, match=r"has model\.1\.bias, which this model has not|has model\.1\.weight"):
        restore_model(found, torch.nn.Sequential(torch.nn.Linear(3, 4)))


def test_a_large_tensor_is_written_in_blocks(tmp_path, monkeypatch):
    large, wide = torch.arange(300.0).reshape(100, 3), torch.arange(64.0).reshape(2, 32)
    monkeypatch.setattr(checkpoint_dcp.Pieces.split, "__defaults__", (120,))  # 10 rows of 12 bytes; under one of 128
    saver = Saver(tmp_path, keep_last=1)
    saver.save(State({"large": large, "wide": wide}), 1)
    saver.wait()
    manifest = json.loads((tmp_path / "step-000000001" / "manifest.json").read_text())
    metadata = checkpoint_dcp.read_metadata(tmp_path / "step-000000001", manifest["files"]).state_dict_metadata
    assert [len(metadata[name].chunks) for name in ("large", "wide")] == [10, 2]
    found = checkpoint.load_last(tmp_path)
    assert found is not None and torch.equal(found.tensors()["large"], large)
    assert torch.equal(found.tensors()["wide"], wide)


def test_learning_rates():
    constant = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(constant, s, 10) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = OptimConfig(lr=1.0, schedule="cosine", min_lr_fraction=0.1)
    assert [learning_rate(cosine, s, 10) for s in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])


def test_gradient_norm_and_clipping():
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    norm = gradient_norm(model)
    assert norm.item() == pytest.approx(5.0)
    clip_gradients(model, norm, 1.0)
    assert model.weight.grad.tolist() == [[pytest.approx(0.6), 0.0]]
    clip_gradients(model, gradient_norm(model), 10.0)
    assert model.bias.grad.item() == pytest.approx(0.8)
    model.bias.grad[0] = float("inf")
    assert not torch.isfinite(gradient_norm(model))


def test_weight_decay_spares_vectors():
    optimizer = make_optimizer(torch.nn.Linear(2, 1), OptimConfig(weight_decay=0.1))
    assert [(g["weight_decay"], g["params"][0].dim()) for g in optimizer.param_groups] == [(0.1, 2), (0.0, 1)]
