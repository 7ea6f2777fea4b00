"""Where the raw files of a data set lie: given, in a shared folder, downloaded before, or downloaded now."""

from __future__ import annotations

import contextlib
import difflib
import glob
import gzip
import hashlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from hstu.config import DataConfig
from hstu.errors import UserError

DATA_DIR_VARIABLE = "HSTU_DATA_DIR"
_CHUNK_BYTES = 1 << 20
_DOWNLOAD_BYTES = 1 << 16
"""A download that breaks off loses at most this much."""
_TIMEOUT_S = 30


def local_raw(config: DataConfig) -> list[Path] | None:
    """Raw files or folders that are already there, in order of preference, or None.

    ``data.raw`` (file, folder or glob; must exist), ``$HSTU_DATA_DIR/<name>``, ``<root>/raw/<name>``.
    """
    if config.raw is not None:
        return [unpacked(p, config) for p in _given(config.raw)]
    shared = os.environ.get(DATA_DIR_VARIABLE)
    folders = [Path(shared).expanduser() / config.name] if shared else []
    for path in [*folders, _raw_folder(config)]:
        if path.exists():
            return [path]
    return None


def fetch_raw(config: DataConfig, quiet: bool = False) -> list[Path]:
    """:func:`local_raw`, or else downloads, verifies and unpacks ``data.url`` into ``<root>/raw/<name>``."""
    found = local_raw(config)
    if found is not None:
        return found
    if config.url is None:
        raise UserError(
            f"data={config.name} has no raw data: give data.raw=PATH (a file, a folder or a glob), "
            f"or put the files into ${DATA_DIR_VARIABLE}/{config.name} or {_raw_folder(config)}"
        )
    archive = _raw_folder(config).parent / Path(config.url).name
    download(config.url, archive, config, quiet)
    return [unpacked(archive, config)]


def _raw_folder(config: DataConfig) -> Path:
    return Path(config.root).expanduser() / "raw" / config.name


def _given(raw: str) -> list[Path]:
    if not raw.strip():  # an unset variable of the shell; as a path it would be the current folder
        raise UserError("data.raw is empty: expected a file, a folder or a glob; leave data.raw out to look elsewhere")
    path = Path(raw).expanduser()
    if path.exists():
        return [path]
    if glob.has_magic(raw):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not found:
            raise UserError(f"data.raw={raw}: no file matches; quote the pattern so that the shell leaves it alone")
        return found
    hint = ""
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else f"; {path.parent} exists"
    raise UserError(f"data.raw={raw}: no such file or folder{hint}")


# Archives

_DAMAGED = (zipfile.BadZipFile, tarfile.ReadError, gzip.BadGzipFile, EOFError, zlib.error, NotImplementedError)


def unpacked(path: Path, config: DataConfig) -> Path:
    """The folder or file that ``path`` unpacks to under ``<root>/raw``; ``path`` itself where it is no archive."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in (".zip", ".gz", ".tgz"):
        return path
    is_tar = path.name.lower().endswith((".tar.gz", ".tgz"))
    is_archive = is_tar or suffix == ".zip"
    stat = path.stat()
    tag = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]
    base = Path(config.root).expanduser() / "raw"
    folder = _raw_folder(config) if path.parent == base and is_archive else base / f"{path.stem}-{tag}"
    target = folder if is_archive else folder / path.stem
    if target.exists():
        return target
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        if suffix == ".zip":
            _unzip(path, temporary)
        elif is_tar:
            _untar(path, temporary)
        else:
            temporary.mkdir()
            _gunzip(path, temporary / path.stem)
        with contextlib.suppress(FileExistsError):
            os.rename(temporary, folder)
    except _DAMAGED as error:
        mend = "delete it and run again" if config.raw is None else "fetch it again"
        raise UserError(f"{path} is truncated or corrupt ({error}): {mend}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _unzip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            parts = Path(member.filename).parts
            if Path(member.filename).is_absolute() or ".." in parts:
                raise UserError(f"{path} holds the unsafe path {member.filename!r}: not unpacked")
        archive.extractall(folder)


def _untar(path: Path, folder: Path) -> None:
    try:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise UserError(f"{path} holds an unsafe path ({error}): not unpacked") from None


def _gunzip(path: Path, target: Path) -> None:
    with gzip.open(path, "rb") as source, open(target, "wb") as out:
        shutil.copyfileobj(source, out, _CHUNK_BYTES)


# Download


def download(url: str, target: Path, config: DataConfig, quiet: bool = False) -> None:
    """Downloads ``url`` to ``target``, resuming a partial download, and verifies ``data.checksum``."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        _download_part(url, partial, target, config, quiet)
        _verify(partial, config.checksum, url)
        os.replace(partial, target)
    else:
        _verify(target, config.checksum, url)


def _download_part(url: str, partial: Path, target: Path, config: DataConfig, quiet: bool) -> None:
    import requests

    shared = f"its unpacked files into ${DATA_DIR_VARIABLE}/{config.name}"
    advice = f"fetch {url} elsewhere and put it at {target}, or put {shared}, or give data.raw=PATH"
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {"Accept-Encoding": "identity"}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
            if answer.status_code == 416:  # nothing left to send: the partial file is complete or of another version
                return
            if answer.status_code >= 400:
                raise UserError(f"{url} answered {answer.status_code} {answer.reason}: {advice}")
            resumed = answer.status_code == 206
            length = int(answer.headers.get("Content-Length") or 0)
            total = length + have if resumed and length else length
            done = have if resumed else 0
            with open(partial, "ab" if resumed else "wb") as out, _progress(target.name, total, done, quiet) as advance:
                for chunk in answer.iter_content(_DOWNLOAD_BYTES):
                    out.write(chunk)
                    done += len(chunk)
                    advance(len(chunk))
    except requests.exceptions.RequestException as error:
        problem = type(error).__name__
        kept = " (the part that came is kept and will be resumed)" if partial.exists() else ""
        raise UserError(f"cannot download {config.name} ({problem}){kept}: {advice}") from None
    if total and done < total:
        raise UserError(f"{url} broke off after {done} of {total} bytes: run again to resume, or {advice}")


@contextlib.contextmanager
def _progress(name: str, total: int, done: int, quiet: bool):  # type: ignore[no-untyped-def]
    if quiet:
        ignore: Callable[[int], None] = lambda _: None  # noqa: E731
        yield ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total or None, completed=done)
        yield lambda amount: progress.advance(task, amount)


def _verify(path: Path, checksum: str | None, url: str) -> None:
    if checksum is None:
        return
    kind, _, expected = checksum.partition(":")
    if kind not in ("md5", "sha256") or not expected:
        raise UserError(f"data.checksum={checksum}: expected md5:HEX or sha256:HEX")
    got = file_digest(path, kind)
    if got != expected.lower():
        path.unlink()
        raise UserError(
            f"{url}: the {kind} of the download is {got}, expected {expected}; it was deleted, run again, "
            "or set data.checksum=null if the publisher changed the file"
        )


def file_digest(path: Path, kind: str = "sha256") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()
