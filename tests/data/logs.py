"""Small raw logs for the tests of the data pipeline."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hstu.config import ColumnsConfig, DataConfig
from hstu.data.store import SequenceStore
from hstu.prepare import prepare


def log_config(tmp_path: Path, raw: Path | str, columns: dict[str, Any] | None = None, **values: Any) -> DataConfig:
    return DataConfig(
        name="log",
        source="log",
        raw=str(raw),
        root=str(tmp_path / "root"),
        columns=ColumnsConfig(**(columns or {})),
        **{"protocol": "stable", **values},
    )


def prepare_log(tmp_path: Path, raw: Path | str, columns: dict[str, Any] | None = None, **values: Any) -> SequenceStore:
    return prepare(log_config(tmp_path, raw, columns, **values), quiet=True)


def sequences(store: SequenceStore) -> dict[Any, list[tuple[Any, int]]]:
    """By raw user id: (raw item id, timestamp) in order."""
    raw = store.item_raw_ids
    return {
        user: [(raw[store.item_ids[i] - 1].item(), int(store.timestamps[i])) for i in range(a, b)]
        for user, a, b in zip(store.user_raw_ids.tolist(), store.offsets, store.offsets[1:], strict=False)
    }


def nothing_left(tmp_path: Path) -> bool:
    """No store, no temporary folder."""
    return not any((tmp_path / "root").rglob("*")) or not any((tmp_path / "root" / "stores").glob("*"))


def write_ml_1m(folder: Path) -> Path:
    """Three users, four films of which one is never rated, ties, Latin-1 titles, ids with holes."""
    folder.mkdir(parents=True, exist_ok=True)
    ratings = "1::10::5::100\n1::30::3::100\n1::7::4::50\n2::30::1::7\n2::10::2::8\n5::7::5::1\n"
    (folder / "ratings.dat").write_text(ratings)
    movies = (
        "30::Amélie: Part 2 (2001)::Comedy|Romance\n7::Heat (1995)::Action\n10::Big (1988)::Comedy\n99::None::Drama\n"
    )
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    return folder


def write_ml_100k(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "u.data").write_text("2\t1\t3\t20\n1\t2\t4\t10\n1\t1\t5\t30\n")
    lines = []
    for movie, title, genres in ((1, "Café (1995)", (1, 5)), (2, "Heat (1995)", (0,))):
        flags = "|".join("1" if g in genres else "0" for g in range(19))
        lines.append(f"{movie}|{title}|01-Jan-1995||http://x|{flags}\n")
    (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))
    return folder


def write_ml_csv(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,3,4.5,20\n1,2,0.5,10\n9,2,3.0,5\n9,3,3.0,6\n"
    )
    movies = (
        'movieId,title,genres\n2,"Big, The ""Best"" (1988)",Comedy\n3,Œuvre (2000),(no genres listed)\n11,Heat,Action\n'
    )
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    return folder


def zip_folder(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as out:
        for file in sorted(folder.iterdir()):
            out.write(file, f"{folder.name}/{file.name}")
    return archive


def random_log(path: Path, num_rows: int = 5000, seed: int = 0, separator: str = ",") -> np.ndarray:
    """Writes user, item, timestamp with many ties; returns the rows."""
    rng = np.random.default_rng(seed)
    rows = np.stack(
        [rng.integers(1, 200, num_rows), rng.integers(1, 90, num_rows), rng.integers(10**9, 10**9 + 300, num_rows)], 1
    )
    lines = [separator.join(map(str, row)) for row in rows]
    path.write_text("\n".join([separator.join(["user", "item", "timestamp"]), *lines]) + "\n")
    return rows
