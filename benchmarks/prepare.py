"""Times hstu-prepare on a generated log of ML-20M's shape and format. ``python benchmarks/prepare.py``

The log: 138,493 users, 27,278 listed and 26,744 rated items, 20,000,263 ratings, user by user as in the original
``ratings.csv``. Numbers are random; only the shape and the format matter for the time. Preparation runs in its own
process, whose wall time and peak resident memory are recorded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hstu.report import Record, aggregate, read_json, write_record

NUM_USERS, NUM_RATED, NUM_LISTED, NUM_RATINGS = 138_493, 26_744, 27_278, 20_000_263
MAX_ID = 131_262
FIRST_TIME_S, LAST_TIME_S = 789_652_009, 1_427_784_002
TARGET_SECONDS, TARGET_GIB = 20.0, 4.0
_CHUNK = 1_000_000
_ROOT = Path(__file__).resolve().parent.parent


def generate(folder: Path, seed: int = 0) -> None:
    """Writes ratings.csv and movies.csv; every rated item and every user occurs."""
    import polars as pl

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    listed = np.sort(rng.choice(np.arange(1, MAX_ID + 1), NUM_LISTED, replace=False))
    rated = np.sort(rng.choice(listed, NUM_RATED, replace=False))
    with open(folder / "movies.csv", "w", encoding="utf-8") as file:
        file.write("movieId,title,genres\n")
        file.writelines(f'{i},"Film {i}, The (1995)",Comedy|Drama\n' for i in listed)
    lengths = 20 + rng.multinomial(NUM_RATINGS - 20 * NUM_USERS, rng.dirichlet(np.full(NUM_USERS, 0.5)))
    users = np.repeat(np.arange(1, NUM_USERS + 1), lengths)
    popularity = 1.0 / (np.arange(NUM_RATED) + 10.0)
    items = rng.permutation(rated)[np.searchsorted(np.cumsum(popularity / popularity.sum()), rng.random(NUM_RATINGS))]
    items[rng.choice(NUM_RATINGS, NUM_RATED, replace=False)] = rated
    starts = rng.integers(FIRST_TIME_S, LAST_TIME_S - 86_400, NUM_USERS)
    times = np.repeat(starts, lengths) + rng.integers(0, 1800, NUM_RATINGS)  # a session: many ties, as in ML
    ratings = rng.integers(1, 11, NUM_RATINGS) / 2
    with open(folder / "ratings.csv", "wb") as file:
        file.write(b"userId,movieId,rating,timestamp\n")
        for i in range(0, NUM_RATINGS, _CHUNK):
            part = {n: a[i : i + _CHUNK] for n, a in zip("umrt", (users, items, ratings, times), strict=True)}
            pl.DataFrame(part).write_csv(file, include_header=False)


def run_prepare(raw: Path, root: Path) -> tuple[float, float]:
    """Wall time in seconds and peak resident memory in GiB of hstu-prepare in its own process."""
    code = (
        "import resource, sys; from hstu.prepare import main; main();"
        "print('PEAK_KIB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    args = ["data=ml-20m", f"data.raw={raw}", f"data.root={root}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.perf_counter()
    env.pop("HSTU_DATA_DIR", None)
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = int(done.stdout.split("PEAK_KIB")[1].split()[0])
    return seconds, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Time hstu-prepare on a generated log of ML-20M's shape.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the generated log lies or goes; default: temporary")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        raw = options.folder or Path(temporary) / "ml-20m-shape"
        if not raw.exists():
            generate(raw)
        results = [run_prepare(raw, Path(temporary) / f"run{i}") for i in range(options.repeats)]
        meta = read_json(next((Path(temporary) / "run0").glob("stores/*/meta.json")), "written by hstu-prepare")
    record = make_record(meta, results)
    print(f"median {record.timing['seconds']:.1f} s, peak {record.timing['peak_gib']:.2f} GiB")
    if not options.no_record:
        print(write_record(record))


def make_record(meta: dict[str, Any], results: list[tuple[float, float]]) -> Record:
    """results: seconds and peak GiB of each repeat."""
    seconds, peaks = [s for s, _ in results], [g for _, g in results]
    return Record(
        name="prepare-ml-20m-shape",
        kind="preparation",
        dataset="generated log of ML-20M's shape",
        protocol=meta["protocol"],
        split_hash=meta["split_hash"],
        model="",
        seeds=[0],
        metrics=aggregate([{"seconds": s, "peak_gib": g} for s, g in results]),
        timing={
            "events": meta["counts"]["events"],
            "seconds": statistics.median(seconds),
            "seconds_target": TARGET_SECONDS,
            "peak_gib": max(peaks),
            "peak_gib_target": TARGET_GIB,
            "load_average": round(os.getloadavg()[0], 1),
        },
        config={
            "data": {**meta["settings"], "raw": "generated", "root": "temporary"},
            "command": "hstu-prepare data=ml-20m",
            "repeats": len(results),
        },
    )


if __name__ == "__main__":
    main()
