"""Rows of a checkpoint's tensors: those asked for, whatever blocks they lie in, and no more in memory."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from hstu import checkpoint_rows
from hstu.checkpoint import Saved
from hstu.checkpoint_dcp import Pieces, write
from hstu.checkpoint_rows import StoredRows
from hstu.errors import UserError
from tests.test_checkpoint import Payload

TABLE = torch.arange(66).reshape(11, 6)
CUTS = {
    "whole": [(0, 11, 0, 6)],
    "rows": [(7, 11, 0, 6), (0, 1, 0, 6), (1, 7, 0, 6)],
    "columns": [(0, 11, 0, 4), (0, 11, 4, 6)],
    "grid": [(0, 4, 0, 4), (0, 4, 4, 6), (4, 11, 0, 4), (4, 11, 4, 6)],
    "uneven": [(0, 11, 0, 1), (0, 9, 1, 6), (9, 11, 1, 6)],
}
"""First and last row and column of each block."""


def pieces(table, cut):
    return Pieces(table.shape, [((r, c), table[r:end, c:stop]) for r, end, c, stop in CUTS[cut]])


def saved(folder, tensors):
    """A checkpoint of the blocks, as far as reading goes."""
    folder.mkdir()
    files = {}
    write(folder, tensors, files.update)
    sizes = {name: (value.size(), value.blocks[0][1].dtype) for name, value in tensors.items()}
    return Saved(folder, {}, sizes, files=frozenset(files))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_rows_of_any_blocks_in_any_order(tmp_path, cut, dtype):
    table = TABLE.to(dtype)
    with StoredRows(saved(tmp_path / "c", {"a": pieces(TABLE, "rows"), "t": pieces(table, cut)})) as stored:
        for rows in ([], [5], [3, 4, 5], [10, 0, 4], [2, 2, 9, 2, 1], [0, 1, 1, 3], list(range(11))):
            found = stored.read("t", np.array(rows, dtype=np.int64))
            assert found.dtype == dtype and torch.equal(found, table[rows])
        assert torch.equal(torch.cat(list(stored.parts("t"))), table) and stored.num_rows("t") == 11


def test_other_shapes_and_layouts(tmp_path):
    transposed = torch.arange(12.0).reshape(3, 4).t()
    cube = torch.arange(24.0).reshape(4, 3, 2)
    tensors = {"step": torch.tensor(7), "line": torch.arange(5.0), "turned": transposed, "cube": cube,
               "none": torch.empty(0, 3)}  # fmt: skip
    blocks = {name: Pieces(value.shape, [((0,) * value.dim(), value)]) for name, value in tensors.items()}
    with StoredRows(saved(tmp_path / "c", blocks)) as stored:
        for name in ("line", "turned", "cube"):
            assert torch.equal(stored.read(name, np.array([3, 1])), tensors[name][[3, 1]])
            assert torch.equal(torch.cat(list(stored.parts(name))), tensors[name])
        assert [part.tolist() for part in stored.parts("step")] == [[7]] and list(stored.parts("none")) == []


def test_no_more_is_read_at_once_than_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_rows, "PART_BYTES", 3 * 48)
    with StoredRows(saved(tmp_path / "c", {"t": pieces(TABLE, "grid")})) as stored:
        assert [len(part) for part in stored.parts("t")] == [3, 3, 3, 2]
        monkeypatch.setattr(checkpoint_rows, "PART_BYTES", 5)
        assert [len(part) for part in stored.parts("t")] == [1] * 11


def test_a_checkpoint_that_is_removed_is_read_to_its_end(tmp_path):
    with StoredRows(saved(tmp_path / "c", {"t": pieces(TABLE, "rows")})) as stored:
        shutil.rmtree(tmp_path / "c")
        assert torch.equal(stored.read("t", np.arange(11)), TABLE)


def test_only_what_is_named_is_opened(tmp_path):
    found = saved(tmp_path / "c", {"model.t": pieces(TABLE, "rows"), "optimizer.t": pieces(TABLE, "rows")})
    with StoredRows(found, "model.") as stored:
        assert torch.equal(stored.read("model.t", np.arange(11)), TABLE)
        with pytest.raises(KeyError):
            stored.read("optimizer.t", np.arange(11))


def test_what_is_damaged_is_one_line_and_runs_nothing(tmp_path):
    found = saved(tmp_path / "c", {"t": pieces(TABLE, "rows")})
    path, data = tmp_path / "c" / ".metadata", next((tmp_path / "c").glob("*.distcp"))
    metadata = pickle.loads(path.read_bytes())
    gap = pickle.loads(path.read_bytes())
    gap.state_dict_metadata["t"].chunks.pop(1)
    path.write_bytes(pickle.dumps(gap))
    with StoredRows(found) as stored:
        assert torch.equal(stored.read("t", np.array([8, 3])), TABLE[[8, 3]])
        with pytest.raises(UserError, match=r"checkpoint .*/c cannot be read \(t has no values for some rows\)"):
            stored.read("t", np.array([8, 0]))
    torch.save({"t": Payload(tmp_path / "ran")}, tmp_path / "code")
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (tmp_path / "code").stat().st_size
    path.write_bytes(pickle.dumps(metadata))
    for content in ((tmp_path / "code").read_bytes(), bytes(100_000)):
        data.write_bytes(content)
        with StoredRows(found) as stored, pytest.raises(UserError, match=r"/c cannot be read \(Weights only") as caught:
            stored.read("t", np.array([1]))
        assert "\n" not in str(caught.value)
    torch.save(TABLE[:3], data)
    for info in metadata.storage_data.values():
        info.length = data.stat().st_size
    path.write_bytes(pickle.dumps(metadata))
    expected = r"a block is \(3, 6\) torch.int64, not \(6, 6\) torch.int64"
    with StoredRows(found) as stored, pytest.raises(UserError, match=expected):
        stored.read("t", np.array([1]))
    assert not (tmp_path / "ran").exists()
