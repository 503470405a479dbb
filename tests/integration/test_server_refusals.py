"""Servers that syncd cannot use are named as what they are: too old, without JetStream, not there, not for us."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from syncd.errors import Unavailable
from syncd.nodes import digest_of
from syncd.store.base import BucketSpec
from syncd.store.codec import RAW
from tests.support.daemon import Daemon
from tests.support.server import NatsServer, free_port
from tests.support.store import live_kit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDERS = '[[publish]]\nfolder = "app"\npath = "{0}"\n[[subscribe]]\nfolder = "app"\npath = "{0}-mirror"\n'


@pytest.fixture(scope="module")
def old_binary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """nats-server 2.9 of Debian 12, unpacked, not installed."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("nats-server 2.9 comes from Debian's packages, and this is no Debian")
    directory = tmp_path_factory.mktemp("debian")
    for command in (["true"], ["apt-get", "update", "-qq"]):
        subprocess.run(command, capture_output=True, check=False, timeout=90)
        subprocess.run(
            ["apt-get", "download", "nats-server"], cwd=directory, capture_output=True, check=False, timeout=90
        )
        if packages := list(directory.glob("nats-server_*.deb")):
            break
    else:
        pytest.skip("Debian's archive has no nats-server for this release")
    subprocess.run(["dpkg", "-x", str(packages[0]), str(directory / "root")], check=True, timeout=60)
    binary = directory / "root/usr/sbin/nats-server"
    said = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    if not said.startswith(("nats-server: v2.9.", "nats-server: v2.10.", "nats-server: v2.11.")):
        pytest.skip(f"Debian's {said.strip()} is new enough")
    return str(binary)


@pytest.fixture
def old_server(tmp_path: Path, old_binary: str) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "old", binary=old_binary).start()
    yield server
    server.stop()


@pytest.fixture
def bare_server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "bare", jetstream=False).start()
    yield server
    server.stop()


def daemon(tmp_path: Path, url: str, more: str = "") -> Daemon:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/f").write_text("x")
    return Daemon(tmp_path / "d", f'[nats]\nservers = ["{url}"]\n{more}' + FOLDERS.format(tmp_path / "source"))


@pytest.mark.fault("N7")
def test_a_server_that_is_too_old_is_named_with_its_version(tmp_path: Path, old_server: NatsServer) -> None:
    """check, push, pull, ls and the daemon are run against Debian's nats-server 2.9.

    Each says which version is there and which is needed; commands end with exit code 69.
    """
    host = daemon(tmp_path, old_server.url)
    for command in (["check"], ["push", "app"], ["pull", "app", str(tmp_path / "out")], ["ls", "app"]):
        done = host.run(*command)
        assert (done.returncode, done.stderr.count("\n")) == (69, 1), done.stderr
        assert re.search(r"nats-server 2\.(9|10|11)\.", done.stderr)
        assert "2.12" in done.stderr
    host.start()
    try:
        failed = host.wait_event("round_failed")
        assert "2.12" in failed["error"] + failed["hint"]
        assert host.stop() == 0
    finally:
        host.kill()


@pytest.mark.fault("N7")
async def test_a_server_that_is_too_old_gets_no_message_of_ours(old_server: NatsServer) -> None:
    """A store that believes its server newer makes, writes, reads and removes in a bucket of Debian's nats-server 2.9.

    Every call is refused with both versions, and the stream holds no message.
    """
    config = {"name": "OBJ_B", "subjects": ["$O.B.C.>", "$O.B.M.>"], "allow_rollup_hdrs": True, "allow_direct": True}
    async with live_kit(old_server.url) as kit:
        await kit.api("STREAM.CREATE.OBJ_B", config)
        bucket = kit.store.bucket("B")
        bucket._stream.atomic = bucket._stream.ttl = True  # learnt from a newer server of its cluster

        async def put_blob() -> None:
            async with bucket.blob_sink() as sink:
                await sink.put(digest_of(b"x"), RAW + b"x")

        async def get_blob() -> list[object]:
            return [item async for item in bucket.get_blobs([digest_of(b"x")])]

        calls = [
            kit.store.create_bucket("B", BucketSpec(layout="generations")),
            put_blob(),
            get_blob(),
            bucket.remove_blobs([digest_of(b"x")]),
            bucket.commit_generation(1, b"{}", {}, channel="head", expected_seq=0),
            bucket.set_layout("generations"),
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            assert isinstance(result, Unavailable), result
            assert "nats-server 2." in result.message
            assert "needs 2.12" in result.message
        assert (await kit.api("STREAM.INFO.OBJ_B"))["state"]["messages"] == 0


def test_a_server_without_jetstream_is_named_as_such(tmp_path: Path, bare_server: NatsServer) -> None:
    """A clear line with what to do, not a time-out."""
    host = daemon(tmp_path, bare_server.url)
    for command in (["check"], ["push", "app"], ["pull", "app", str(tmp_path / "out")]):
        done = host.run(*command)
        assert (done.returncode, done.stderr.count("\n")) == (69, 1), done.stderr
        assert "JetStream" in done.stderr


def test_a_server_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    """A one-shot command gives up after its time and names the address."""
    port = free_port()
    done = daemon(tmp_path, f"nats://127.0.0.1:{port}").run("ls", "app")
    assert (done.returncode, done.stderr.count("\n")) == (69, 1), done.stderr
    assert f"127.0.0.1:{port}" in done.stderr


@pytest.mark.fault("K14")
def test_a_wrong_password_is_refused_and_not_shown(tmp_path: Path) -> None:
    """`syncd ls` is run with another password than the server's. Exit code 77; the password is in no output."""
    server = NatsServer(tmp_path / "nats", 'authorization { user: "u", password: "right-one" }').start()
    try:
        host = daemon(tmp_path, server.url, 'user = "u"\npassword = "wrong-one"\n')
        done = host.run("ls", "app")
        assert done.returncode == 77, done.stderr
        assert "wrong-one" not in done.stderr + done.stdout
    finally:
        server.stop()
