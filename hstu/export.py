"""A trained run in formats that other programs read, and the command ``hstu-export``.

    hstu-export run=RUN out=FOLDER                          weights and item vectors
    hstu-export run=RUN out=FOLDER format=[parquet,faiss]   item vectors alone, with an index to search them

    safetensors  FOLDER/model.safetensors: every weight under its name in the model
    parquet      FOLDER/items.parquet: columns item (raw id), title (if any), vector
    faiss        FOLDER/items.faiss: an exact index (inner product); row i is row i of items.parquet

FOLDER/config.yaml, the resolved config of the run, is always written. Item vectors are those that scores are made
with: normalised where the model normalises, so that a dot product with ``Recommender.query`` is the score.

Weights and vectors go from the checkpoint to the file part by part: a table may be larger than memory. A FAISS index
is in memory as a whole.

Legend: ``V`` items, ``D`` model width, ``n`` items of a part.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hstu.allocator import give_back_freed_memory
from hstu.checkpoint_rows import StoredRows, rows_at_once
from hstu.checkpoint_state import model_targets
from hstu.cli import command, run_hydra
from hstu.errors import UserError
from hstu.evaluate import plain_options
from hstu.host_memory import free_bytes
from hstu.item_rows import ManagedRows, MappedTable
from hstu.safetensors_file import write_safetensors
from kernels._common import l2_normalize

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

FORMATS = ("safetensors", "parquet", "faiss")
MODEL = "model."
"""Begins the checkpoint's names of the model's tensors."""


def check_vectors(model: Any) -> None:
    """Raises UserError where a score is no dot product of one vector of the user and one of the item."""
    from hstu.model.mixture import MixtureTable
    from hstu.model.ranking import RankingModel

    if isinstance(model, RankingModel):
        raise UserError("a ranking run has no item vectors that are scored: take format=[safetensors]")
    if isinstance(model.table, MixtureTable):
        raise UserError(
            "with model.similarity=mixture_of_logits a score is no dot product of two vectors, so that an index cannot "
            "find the best items: take format=[safetensors]"
        )


def as_scored(table: Any, vectors: torch.Tensor) -> torch.Tensor:
    """Queries or item vectors [..., D] float32 as they enter the dot product."""
    vectors = vectors.float()
    return l2_normalize(vectors, table.eps) if table.l2_normalize else vectors


class ItemVectors:
    """The vectors of a run's items as they are scored, in the order of the items' ids.

    All items have one but the bucket of rare items, which stands for no single one, and with managed rows those without
    a row, of which nothing is known.

    Args:
        model: as of :func:`hstu.runs.empty_model`; of managed rows the map has its values.
    """

    def __init__(self, model: Any, store: SequenceStore, stored: StoredRows) -> None:
        from hstu.recommend import rare_item

        self.table, self.stored, self.dim = model.table, stored, model.table.dim
        rare = rare_item(store)
        self._ids: range | np.ndarray = range(1, rare or store.num_items + 1)  # the bucket is the last
        if isinstance(self.table, MappedTable) and isinstance(self.table.item_rows, ManagedRows):
            found = np.unique(self.table.item_rows.items().numpy())
            self._ids = found[(found > 0) & (found != (rare or 0))]

    def __len__(self) -> int:
        return len(self._ids)

    def parts(self, num_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids [n] int64 and vectors [n, D] float32 of ``num_rows`` items at once."""
        for first in range(0, len(self), num_rows):
            part = self._ids[first : first + num_rows]
            ids = np.arange(part.start, part.stop) if isinstance(part, range) else part
            yield ids, self._vectors(ids)
            give_back_freed_memory()  # with the threads of polars it grows to twice what an export needs

    @torch.no_grad()
    def _vectors(self, ids: np.ndarray) -> np.ndarray:
        name, rows = "table.weight", ids
        if isinstance(self.table, MappedTable):
            name, rows = "table.rows.weight", self.table.item_rows.rows(torch.from_numpy(ids)).numpy()
        return as_scored(self.table, self.stored.read(MODEL + name, rows)).numpy()


def write_weights(stored: StoredRows, model: torch.nn.Module, path: Path, about: dict[str, str]) -> None:
    """The checkpoint's weights under their names in ``model`` and in its dtypes; ``about`` goes into the header."""
    tensors = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}

    def parts(name: str) -> Iterator[torch.Tensor]:
        return (part.to(tensors[name][1]) for part in stored.parts(MODEL + name))

    _replacing(path, lambda partial: write_safetensors(partial, tensors, parts, about))


def write_items(vectors: ItemVectors, store: SequenceStore, path: Path) -> None:
    """Columns item, title (if any) and vector, a row for each item; a row group is what is in memory at once."""
    from hstu.recommend import polars_module

    pl = polars_module()
    from polars.io.plugins import register_io_source

    raw_ids, titles = np.asarray(store.item_raw_ids), store.item_attribute("title")

    def frame(ids: np.ndarray, values: np.ndarray) -> Any:
        columns = {"item": raw_ids[ids - 1]} | ({} if titles is None else {"title": np.asarray(titles)[ids - 1]})
        return pl.DataFrame({**columns, "vector": pl.Series(values, dtype=pl.Array(pl.Float32, vectors.dim))})

    row_bytes = 4 * vectors.dim + raw_ids.itemsize + (0 if titles is None else titles.itemsize)
    num_rows = rows_at_once(row_bytes)
    schema = frame(np.ones(1, np.int64), np.zeros((1, vectors.dim), np.float32)).schema

    def frames(*unused: Any) -> Iterator[Any]:
        return (frame(*part) for part in vectors.parts(num_rows))

    source = register_io_source(frames, schema=schema)
    _replacing(path, lambda partial: source.sink_parquet(partial, row_group_size=num_rows, maintain_order=True))


def write_index(vectors: ItemVectors, path: Path) -> None:
    """An exact FAISS index of the inner product; its rows are those of ``vectors``, which it holds once."""
    faiss = faiss_module()
    index = faiss.IndexFlatIP(vectors.dim)
    index.codes.resize(len(vectors) * index.code_size)  # index.add would let it grow by doubling
    index.ntotal = len(vectors)
    held = faiss.rev_swig_ptr(index.get_xb(), len(vectors) * vectors.dim).reshape(len(vectors), vectors.dim)
    first = 0
    for _, part in vectors.parts(rows_at_once(4 * vectors.dim)):
        held[first : first + len(part)] = part
        first += len(part)
    _replacing(path, lambda partial: faiss.write_index(index, str(partial)))


def check_fits(num_items: int, dim: int) -> None:
    """Raises UserError where an index of ``num_items`` vectors of ``dim`` needs more memory than is free."""
    needed, free = 4 * num_items * dim, free_bytes()
    if needed > free:
        raise UserError(
            f"format=faiss: an exact index of {num_items:,} vectors of {dim} is {needed / 2**30:,.1f} GiB in memory, "
            f"{free / 2**30:,.1f} GiB are free: leave faiss out, and build a smaller index from items.parquet"
        )


def faiss_module() -> Any:
    """faiss, which the index needs."""
    try:
        import faiss
    except ImportError:
        raise UserError("format=faiss needs FAISS: pip install faiss-cpu") from None
    return faiss


def _replacing(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a name beside ``path`` and renames: all of the file or nothing.

    Raises UserError where the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except Exception as error:
        if "No space left" in str(error):  # polars and FAISS have no error class for it
            raise UserError(f"the disk is full ({path}): free some space or choose another out") from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def _formats(value: Any) -> list[str]:
    chosen = [value] if isinstance(value, str) else list(value or [])
    if not chosen or any(name not in FORMATS for name in chosen):
        raise UserError(f"format={value}: expected some of {', '.join(FORMATS)}")
    return chosen


def export_run(options: dict[str, Any]) -> list[Path]:
    """What ``hstu-export`` does; returns the files written."""
    from hstu.recommend import polars_module
    from hstu.runs import empty_model, open_run

    chosen = _formats(options["format"])
    if "parquet" in chosen:
        polars_module()
    if "faiss" in chosen:
        faiss_module()
    run, out = Path(str(options["run"])).expanduser(), Path(str(options["out"])).expanduser()
    config, store, saved = open_run(run, options["which"])
    model: Any = empty_model(config, store)
    targets = model_targets(saved, model)
    saved.check(targets)
    if {"parquet", "faiss"} & set(chosen):
        check_vectors(model)
        saved.read({name: value for name, value in targets.items() if not value.is_meta})  # the map of managed rows
    with StoredRows(saved, MODEL) as stored:
        if {"parquet", "faiss"} & set(chosen):
            vectors = ItemVectors(model, store, stored)
        if "faiss" in chosen:
            check_fits(len(vectors), vectors.dim)
        out.mkdir(parents=True, exist_ok=True)
        _replacing(out / "config.yaml", lambda partial: shutil.copyfile(run / "config.yaml", partial))
        files = [out / "config.yaml"]
        if "safetensors" in chosen:
            about = {"format": "pt", "experiment": config.experiment, "run": run.name, "checkpoint": options["which"]}
            files.append(out / "model.safetensors")
            write_weights(stored, model, files[-1], about)
        if "parquet" in chosen:
            files.append(out / "items.parquet")
            write_items(vectors, store, files[-1])
        if "faiss" in chosen:
            files.append(out / "items.faiss")
            write_index(vectors, files[-1])
    for path in files:
        print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    return files


@command
def main() -> None:
    """Console script hstu-export."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "").split("\nLegend", 1)[0])
        return
    run_hydra(lambda cfg: export_run(plain_options(cfg)), "export", folder="commands")


if __name__ == "__main__":
    main()
