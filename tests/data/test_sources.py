"""Where raw files come from: order of preference, archives, downloads that break off, no network."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hstu.config import DataConfig
from hstu.data.sources import fetch_raw
from hstu.errors import UserError
from hstu.prepare import prepare
from tests.data.logs import write_ml_1m, zip_folder


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content`` at every path, understands Range, can break off, and remembers the Range headers."""

    content = b""
    break_after: int | None = None
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/ml-1m.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        body = self.server.content[start:]
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        if start >= len(self.server.content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.server.break_after is None else body[: self.server.break_after])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HSTU_DATA_DIR", raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    return zip_folder(write_ml_1m(tmp_path / "made" / "ml-1m"), tmp_path / "made.zip").read_bytes()


def config(tmp_path: Path, **values: Any) -> DataConfig:
    return DataConfig(name="ml-1m", source="movielens-dat", root=str(tmp_path / "root"), **values)


def test_download_verify_unpack_prepare(tmp_path: Path, server: Server, archive: bytes) -> None:
    server.content = archive
    wanted = config(tmp_path, url=server.url, checksum=f"md5:{hashlib.md5(archive).hexdigest()}")
    assert prepare(wanted, quiet=True).num_events == 6
    assert len(server.ranges) == 1
    prepare(wanted, quiet=True)
    assert len(server.ranges) == 1, "raw files that are there are not fetched again"


def test_finished_store_needs_neither_raw_files_nor_network(tmp_path: Path, server: Server, archive: bytes) -> None:
    server.content = archive
    wanted = config(tmp_path, url=server.url)
    store = prepare(wanted, quiet=True)
    (tmp_path / "root" / "raw").rename(tmp_path / "gone")
    server.status = 500
    assert prepare(wanted, quiet=True).path == store.path
    with pytest.raises(UserError, match="answered 500"):
        prepare(config(tmp_path, url=server.url, protocol="stable"), quiet=True)


def test_broken_download_is_resumed(tmp_path: Path, server: Server) -> None:
    folder = write_ml_1m(tmp_path / "made" / "ml-1m")
    (folder / "README").write_bytes(bytes(300_000))  # several chunks long
    archive = zip_folder(folder, tmp_path / "made.zip").read_bytes()
    server.content, server.break_after = archive, 200_000
    wanted = config(tmp_path, url=server.url, checksum=f"sha256:{hashlib.sha256(archive).hexdigest()}")
    with pytest.raises(UserError, match=r"resume"):
        fetch_raw(wanted, quiet=True)
    server.break_after = None
    folder = fetch_raw(wanted, quiet=True)[0]
    assert server.ranges == [None, f"bytes={3 * 2**16}-"], "whole chunks of 64 KiB are kept"
    assert (folder / "ml-1m" / "ratings.dat").is_file()
    assert not list((tmp_path / "root" / "raw").glob("*.part"))


def test_wrong_checksum_deletes_the_download(tmp_path: Path, server: Server, archive: bytes) -> None:
    server.content = archive
    with pytest.raises(UserError, match=f"the md5 of the download is {hashlib.md5(archive).hexdigest()}, expected 00"):
        fetch_raw(config(tmp_path, url=server.url, checksum="md5:00"), quiet=True)
    assert not any(p.is_file() for p in (tmp_path / "root").rglob("*"))
    with pytest.raises(UserError, match="expected md5:HEX or sha256:HEX"):
        fetch_raw(config(tmp_path, url=server.url, checksum="crc:1"), quiet=True)


def test_no_network_says_what_to_fetch_and_where_to_put_it(tmp_path: Path, server: Server) -> None:
    url = "http://127.0.0.1:9/ml-1m.zip"  # nothing listens at the discard port
    with pytest.raises(UserError) as caught:
        fetch_raw(config(tmp_path, url=url), quiet=True)
    message = str(caught.value)
    assert "\n" not in message and url in message
    assert str(tmp_path / "root" / "raw" / "ml-1m.zip") in message
    assert "$HSTU_DATA_DIR/ml-1m" in message and "data.raw=PATH" in message


def test_archive_put_where_the_message_says_is_used(tmp_path: Path, server: Server, archive: bytes) -> None:
    (tmp_path / "root" / "raw").mkdir(parents=True)
    (tmp_path / "root" / "raw" / "ml-1m.zip").write_bytes(archive)
    assert prepare(config(tmp_path, url="http://127.0.0.1:9/ml-1m.zip"), quiet=True).num_events == 6


def test_http_error(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(UserError, match="answered 404"):
        fetch_raw(config(tmp_path, url=server.url), quiet=True)


def test_no_raw_data_and_no_url(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UserError, match=r"data=ml-1m has no raw data: give data.raw=PATH"):
        fetch_raw(config(tmp_path), quiet=True)


def test_shared_folder_comes_before_download(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ml_1m(tmp_path / "shared" / "ml-1m")
    monkeypatch.setenv("HSTU_DATA_DIR", str(tmp_path / "shared"))
    assert fetch_raw(config(tmp_path, url=server.url)) == [tmp_path / "shared" / "ml-1m"]
    assert server.ranges == []


def test_local_archive(tmp_path: Path, server: Server, archive: bytes) -> None:
    (tmp_path / "mine.zip").write_bytes(archive)
    assert prepare(config(tmp_path, raw=str(tmp_path / "mine.zip")), quiet=True).num_events == 6


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no archive"])
def test_corrupt_archive(tmp_path: Path, server: Server, archive: bytes, damage: str) -> None:
    broken = {
        "truncated": archive[:-30],
        "flipped": archive[:60] + bytes(b ^ 255 for b in archive[60:80]) + archive[80:],
        "no archive": b"<html>sorry</html>",
    }
    (tmp_path / "mine.zip").write_bytes(broken[damage])
    with pytest.raises(UserError, match="mine.zip is truncated or corrupt .*: fetch it again"):
        prepare(config(tmp_path, raw=str(tmp_path / "mine.zip")), quiet=True)
    assert not any(p.is_file() for p in (tmp_path / "root").rglob("*")), "nothing half-unpacked is left"


def test_archive_cannot_write_outside_its_folder(tmp_path: Path, server: Server) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as out:
        out.writestr("../../evil.txt", "x")
    with pytest.raises(UserError, match="unsafe path"):
        fetch_raw(config(tmp_path, raw=str(tmp_path / "evil.zip")), quiet=True)


def test_tar_gz_is_unpacked_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HSTU_DATA_DIR", raising=False)
    folder = write_ml_1m(tmp_path / "made" / "ml-1m")
    archive = tmp_path / "ml-1m.tar.gz"
    with tarfile.open(archive, "w:gz") as out:
        out.add(folder, "ml-1m")
    assert prepare(config(tmp_path, raw=str(archive)), quiet=True).num_events == 6
    (tmp_path / "cut.tgz").write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(UserError, match="cut.tgz is truncated or corrupt"):
        prepare(config(tmp_path, raw=str(tmp_path / "cut.tgz")), quiet=True)
    with tarfile.open(tmp_path / "outside.tar.gz", "w:gz") as out:
        out.addfile(tarfile.TarInfo("../outside.txt"), io.BytesIO())
    with pytest.raises(UserError, match="outside.tar.gz holds an unsafe path"):
        prepare(config(tmp_path, raw=str(tmp_path / "outside.tar.gz")), quiet=True)
    assert not list(tmp_path.rglob("outside.txt"))
