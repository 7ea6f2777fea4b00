"""A trained run in formats that other programs read, and the command ``hstu-export``.

    hstu-export run=RUN out=FOLDER                          weights and item vectors
    hstu-export run=RUN out=FOLDER format=[parquet,faiss]   item vectors alone, with an index to search them

    safetensors  FOLDER/model.safetensors: every weight under its name in the model
    parquet      FOLDER/items.parquet: columns item (raw id), title (if any), vector
    faiss        FOLDER/items.faiss: an exact index (inner product); row i is row i of items.parquet

FOLDER/config.yaml, the resolved config of the run, is always written. Item vectors are those that scores are made
with: normalised where the model normalises, so that a dot product with ``Recommender.query`` is the score.

Legend: ``V`` items, ``D`` model width.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hstu.cli import command, run_hydra
from hstu.errors import UserError
from hstu.evaluate import plain_options
from kernels._common import l2_normalize

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

FORMATS = ("safetensors", "parquet", "faiss")
ITEMS_AT_ONCE = 1 << 20


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


@torch.inference_mode()
def item_vectors(model: Any, items: np.ndarray | None = None) -> np.ndarray:
    """Vectors [V, D] float32 of ``items`` [V] int64 (None: of all) as they are scored."""
    table = model.table
    items = np.arange(1, table.num_items + 1) if items is None else items
    found = np.empty((len(items), table.dim), dtype=np.float32)
    for first in range(0, len(found), ITEMS_AT_ONCE):
        rows = slice(first, first + ITEMS_AT_ONCE)
        found[rows] = as_scored(table, table.lookup(torch.from_numpy(items[rows])))
    return found


def items_to_export(model: Any, store: SequenceStore) -> np.ndarray:
    """Ids [V] int64, ascending: all but the bucket of rare items, which stands for no single one, and with managed rows
    but those without a row, of which nothing is known."""
    from hstu.item_rows import ManagedRows, MappedTable
    from hstu.recommend import rare_item

    items = np.arange(1, store.num_items + 1)
    if isinstance(model.table, MappedTable) and isinstance(model.table.item_rows, ManagedRows):
        items = np.unique(model.table.item_rows.items().numpy())
    return items[(items > 0) & (items != (rare_item(store) or 0))]


def write_safetensors(model: torch.nn.Module, path: Path, about: dict[str, str]) -> None:
    """Weights under their names; ``about`` goes into the header."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("format=safetensors needs safetensors: pip install safetensors") from None
    tensors = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    _replacing(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt", **about}))


def write_items(vectors: np.ndarray, items: np.ndarray, store: SequenceStore, path: Path) -> None:
    """Columns item, title (if any) and vector, a row for each of ``items`` [V] with its vector [V, D]."""
    from hstu.recommend import polars_module

    pl = polars_module()
    titles = store.item_attribute("title")
    columns = {"item": np.asarray(store.item_raw_ids)[items - 1]}
    if titles is not None:
        columns["title"] = np.asarray(titles)[items - 1]
    frame = pl.DataFrame({**columns, "vector": pl.Series(vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))})
    _replacing(path, frame.write_parquet)


def write_index(vectors: np.ndarray, path: Path) -> None:
    """An exact FAISS index of the inner product; its rows are those of ``vectors`` [V, D]."""
    faiss = faiss_module()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    _replacing(path, lambda partial: faiss.write_index(index, str(partial)))


def faiss_module() -> Any:
    """faiss, which the index needs."""
    try:
        import faiss
    except ImportError:
        raise UserError("format=faiss needs FAISS: pip install faiss-cpu") from None
    return faiss


def _replacing(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a name beside ``path`` and renames: all of the file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
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
    from hstu.runs import load_run

    chosen = _formats(options["format"])
    if "parquet" in chosen:
        polars_module()
    if "faiss" in chosen:
        faiss_module()
    run, out = Path(str(options["run"])).expanduser(), Path(str(options["out"])).expanduser()
    config, store, model = load_run(run, which=options["which"])
    if {"parquet", "faiss"} & set(chosen):
        check_vectors(model)
    out.mkdir(parents=True, exist_ok=True)
    _replacing(out / "config.yaml", lambda partial: shutil.copyfile(run / "config.yaml", partial))
    files = [out / "config.yaml"]
    if "safetensors" in chosen:
        about = {"experiment": config.experiment, "run": run.name, "checkpoint": options["which"]}
        files.append(out / "model.safetensors")
        write_safetensors(model, files[-1], about)
    if {"parquet", "faiss"} & set(chosen):
        items = items_to_export(model, store)
        vectors = item_vectors(model, items)
    if "parquet" in chosen:
        files.append(out / "items.parquet")
        write_items(vectors, items, store, files[-1])
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
