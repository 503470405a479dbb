"""The daemon: adapters from settings, one supervised task per folder, signals, drain, readiness.

The lifetime reads top to bottom in :func:`run_daemon`. One folder's failure never stops the others; the first
SIGTERM or SIGINT drains, the second exits at once, a deadline cancels; SIGHUP re-reads the configuration and keeps
the old one where the new one is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from syncd import __version__, logs
from syncd.checks import errors_of, problems_of
from syncd.embedded import EmbeddedServer
from syncd.errors import EXIT_OK, ConfigError, FolderTaken, SyncdError
from syncd.notify import sd_notify, watchdog_interval
from syncd.publisher import Publisher
from syncd.retry import backoff
from syncd.settings import load, split_listen
from syncd.statedir import DAEMON_FILE, StateDir
from syncd.status import FolderState, FolderStatus, StatusKeeper
from syncd.store.bucket import NatsStore
from syncd.store.connection import Connection
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.wiring import connection_options, publish_options, subscribe_options

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from syncd.outlet import PublishOptions
    from syncd.settings import Settings
    from syncd.status import Role
    from syncd.store.base import Store

log = structlog.get_logger()

DRAIN_SECONDS = 4.0
STATUS_SECONDS = 0.2
BEAT_SECONDS = 10.0
"""How often daemon.json is written at least; `syncd status` calls three times as much a stuck daemon."""
SETTLED = {FolderState.IN_SYNC, FolderState.WAITING, FolderState.HALTED, FolderState.FAILED}


async def run_daemon(settings: Settings, config: Path | None, environ: Mapping[str, str]) -> int:
    """Run every folder of the settings until a signal; return the exit code.

    :raises ConfigError: the settings do not fit together.
    :raises Locked: another daemon has the state directory.
    """
    _check(settings)
    state = StateDir(settings.daemon.state_dir)
    state.prepare()
    with state.lock():
        signals = _Signals()
        board = _Board(state, settings)
        writer = asyncio.create_task(board.keep_writing())
        watchdog = asyncio.create_task(_feed_watchdog())
        try:
            async with contextlib.AsyncExitStack() as stack:
                daemon = _Daemon(settings, state, board)
                stack.push_async_callback(daemon.stop)
                wish = await _start(daemon, signals)
                if not wish:
                    board.check_ready()
                    log.info(
                        "daemon_started", version=__version__, host=settings.daemon.host, folders=len(daemon.folders)
                    )
                    wish = await signals.next()
                while wish == "reload":
                    sd_notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                    await _reload(daemon, config, environ)
                    sd_notify("READY=1")
                    wish = await signals.next()
                log.info("daemon_stopping", signal=wish)
                sd_notify("STOPPING=1")
        finally:
            signals.close()
            watchdog.cancel()
            writer.cancel()
            await asyncio.gather(watchdog, writer, return_exceptions=True)
            await asyncio.to_thread(board.write, final=True)
    log.info("daemon_stopped")
    return EXIT_OK


async def _start(daemon: _Daemon, signals: _Signals) -> str:
    """Start the daemon; an embedded server may take minutes to read its store. A signal that stops ends it early.

    :returns: that signal's name, "" where the daemon has started.
    """
    starting = asyncio.ensure_future(daemon.start())
    try:
        while True:
            waiting = asyncio.ensure_future(signals.next())
            await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                signals.put_back(waiting)
                starting.result()
                return ""
            if waiting.result() != "reload":  # what it would read is being started already
                return waiting.result()
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


def _check(settings: Settings) -> None:
    findings = problems_of(settings)
    error = errors_of(settings, findings)
    if error is not None:
        raise error
    for finding in findings:
        log.warning("config_warning", where=finding.where, text=finding.text)


async def _reload(daemon: _Daemon, config: Path | None, environ: Mapping[str, str]) -> None:
    """Take over a new configuration, or keep the old one and say why."""
    try:
        settings = await asyncio.to_thread(load, config, environ)
        _check(settings)
        await asyncio.to_thread(_wanted, settings)  # reads keys
    except ConfigError as error:
        log.error("config_refused", error=error.message, problems=list(error.problems))
        return
    logs.configure(settings.daemon.log_level, settings.daemon.log_format)
    await daemon.take(settings)
    log.info("config_reloaded", folders=len(daemon.folders))


@dataclass(frozen=True)
class _Folder:
    """One running folder."""

    options: PublishOptions | SubscribeOptions
    task: asyncio.Task[None]
    status: StatusKeeper


class _Daemon:
    """What runs: the embedded server, the connection, the folders."""

    def __init__(self, settings: Settings, state: StateDir, board: _Board) -> None:
        self._settings = settings
        self._state = state
        self._board = board
        self._embedded: tuple[EmbeddedServer, asyncio.Task[None]] | None = None
        self._connection: Connection | None = None
        self._store: Store
        self.folders: dict[str, _Folder] = {}

    async def start(self) -> None:
        """Start everything. Only the embedded server is waited for; the rest connects and waits on its own.

        :raises SyncdError: the embedded server does not start.
        """
        await self._start_embedded()
        self._connection = Connection(connection_options(self._settings))
        await self._connection.start()
        self._store = NatsStore(self._connection)
        self._start_folders()

    async def stop(self) -> None:
        """Stop everything, the folders first; what does not end in time is cut off."""
        await self._stop_folders(list(self.folders))
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
        await self._stop_embedded()

    async def take(self, settings: Settings) -> None:
        """Change to other settings: only what they change is stopped and started."""
        before, self._settings = self._settings, settings
        if settings.daemon.state_dir != before.daemon.state_dir:
            log.warning("restart_needed", key="daemon.state_dir")
            self._settings = settings = settings.model_copy(update={"daemon": before.daemon})
        if settings.nats != before.nats or settings.daemon != before.daemon:
            await self._stop_folders(list(self.folders))
            if self._connection is not None:
                await self._connection.close()
            if settings.nats.embedded != before.nats.embedded:
                await self._stop_embedded()
                await self._start_embedded()
            self._connection = Connection(connection_options(settings))
            await self._connection.start()
            self._store = NatsStore(self._connection)
        wanted = _wanted(self._settings)
        await self._stop_folders([key for key, folder in self.folders.items() if wanted.get(key) != folder.options])
        for key in self._board.keys() - wanted.keys():
            self._board.forget(key)
        self._start_folders()

    # -- parts -----------------------------------------------------------------------------------------------------

    async def _start_embedded(self) -> None:
        embedded = self._settings.nats.embedded
        if embedded is None:
            return
        store_dir = self._settings.nats_store_dir
        assert store_dir is not None
        server = EmbeddedServer(embedded.listen, store_dir, embedded.config_file, log)
        await server.start()
        host, port = split_listen(embedded.listen)
        log.info("nats_server_ready", host=host, port=port)
        self._embedded = server, asyncio.create_task(server.run())

    async def _stop_embedded(self) -> None:
        if self._embedded is None:
            return
        server, task = self._embedded
        self._embedded = None
        await server.stop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def _start_folders(self) -> None:
        for key, options in _wanted(self._settings).items():
            if key not in self.folders:
                role: Role = "subscribe" if isinstance(options, SubscribeOptions) else "publish"
                first = FolderStatus(role, options.folder, str(options.path))
                status = StatusKeeper(first, clock=time.time, report=self._board.report)
                task = asyncio.create_task(self._supervise(options, status), name=key)
                self.folders[key] = _Folder(options, task, status)

    async def _stop_folders(self, keys: list[str]) -> None:
        stopping = [self.folders.pop(key) for key in keys]
        if not stopping:
            return
        for folder in stopping:
            folder.task.cancel()
        _, late = await asyncio.wait([folder.task for folder in stopping], timeout=DRAIN_SECONDS)
        for folder in stopping:
            folder.status.set(state=FolderState.STOPPED)
        for task in late:
            log.warning("folder_stop_late", folder=task.get_name())

    async def _supervise(self, options: PublishOptions | SubscribeOptions, status: StatusKeeper) -> None:
        """Run one folder for ever; its failures are its own."""
        bound = log.bind(folder=options.folder, role=status.now.role)
        waits = backoff(0.5, 60.0)
        told = ""
        while True:
            started = time.monotonic()
            try:
                await self._service(options, status)
            except SyncdError as error:
                if error.message != told:
                    bound.error("folder_failed", error=error.message, hint=error.hint)
                told = error.message
                status.set(state=FolderState.FAILED, error=error.message, hint=error.hint)
                if isinstance(error, FolderTaken):
                    return
            except Exception as error:  # noqa: BLE001 - a bug in one folder must not stop the others
                bound.exception("folder_crashed")
                status.set(state=FolderState.FAILED, error=f"internal error: {error!r}", hint="see the log")
            if time.monotonic() - started > 60:  # noqa: PLR2004 - it ran well for a minute
                waits, told = backoff(0.5, 60.0), ""
            await asyncio.sleep(next(waits))

    async def _service(self, options: PublishOptions | SubscribeOptions, status: StatusKeeper) -> None:
        role = status.now.role
        index_file = self._state.index_file(role, options.folder, options.path)
        allowance = self._state.allowance(role, options.folder)
        if isinstance(options, SubscribeOptions):
            pin = self._state.pin(options.folder).number
            subscriber = Subscriber(options, self._store, index_file, status=status, allowance=allowance, pin=pin)
            await subscriber.run()
        else:
            await Publisher(options, self._store, index_file, status=status, allowance=allowance).run()


def _wanted(settings: Settings) -> dict[str, PublishOptions | SubscribeOptions]:
    """Return what is to run, by its status's key. Blocking, briefly.

    :raises ConfigError: a signing key cannot be read.
    """
    wanted: dict[str, PublishOptions | SubscribeOptions] = {}
    for source in settings.publish:
        key = FolderStatus("publish", source.folder, str(source.path)).key
        wanted[key] = publish_options(settings, source)
    for mirror in settings.subscribe:
        wanted[FolderStatus("subscribe", mirror.folder, str(mirror.path)).key] = subscribe_options(mirror)
    return wanted


class _Board:
    """Collects statuses and writes them, a few times a second at most; tells the service manager."""

    def __init__(self, state: StateDir, settings: Settings) -> None:
        self._state = state
        self._statuses: dict[str, FolderStatus] = {}
        self._dirty: set[str] = set()
        self._forgotten: set[str] = set()
        self._wake = asyncio.Event()
        self._writing = threading.Lock()
        self._started = False
        self._ready = False
        self._failing = False
        self._daemon: dict[str, Any] = {
            "pid": os.getpid(),
            "version": __version__,
            "host": settings.daemon.host,
            "started": time.time(),
        }
        self._forgotten.update(status.key for status in state.read_status()[1])

    def keys(self) -> set[str]:
        """Return the folders that were ever reported."""
        return set(self._statuses)

    def report(self, status: FolderStatus) -> None:
        """Take one folder's status."""
        self._statuses[status.key] = status
        self._dirty.add(status.key)
        self._forgotten.discard(status.key)
        self._wake.set()
        if self._started:
            self.check_ready()

    def check_ready(self) -> None:
        """Tell the service manager once: every folder has done its first round, or said why it cannot."""
        self._started = True
        if not self._ready and all(one.state in SETTLED for one in self._statuses.values()):
            self._ready = True
            sd_notify("READY=1")

    def forget(self, key: str) -> None:
        """Drop a folder that is no longer configured."""
        self._statuses.pop(key, None)
        self._dirty.discard(key)
        self._forgotten.add(key)
        self._wake.set()

    async def keep_writing(self) -> None:
        """Write what changed, for ever; without any change often enough to show that the event loop turns."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            await asyncio.to_thread(self.write)
            await asyncio.sleep(STATUS_SECONDS)

    def write(self, *, final: bool = False) -> None:
        """Write what changed, blocking. A disk that refuses is reported once and tried again with the next change."""
        with self._writing:  # the last write comes while a cancelled one may still be at it
            self._write(final=final)

    def _write(self, *, final: bool) -> None:
        dirty, self._dirty = self._dirty, set()
        forgotten, self._forgotten = self._forgotten, set()
        try:
            for key in dirty:
                if (status := self._statuses.get(key)) is not None:  # forgotten meanwhile
                    self._state.write_status(f"{key}.json", status.to_json())
            for key in forgotten:
                self._state.drop_status(f"{key}.json")
            self._state.write_status(DAEMON_FILE, self._daemon | {"beat": time.time(), "stopped": final})
        except OSError as error:
            self._dirty |= dirty
            self._forgotten |= forgotten - self._statuses.keys()
            if not self._failing:
                log.warning("status_not_written", error=str(error))
            self._failing = True
        else:
            self._failing = False


class _Signals:
    """Signals as a queue of wishes; the second wish to stop exits at once."""

    def __init__(self) -> None:
        self._wishes: asyncio.Queue[str] = asyncio.Queue()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._wishes.put_nowait, "reload")

    async def next(self) -> str:
        """Wait for the next wish: ``reload``, or the name of the signal that stops."""
        return await self._wishes.get()

    def put_back(self, waiting: asyncio.Future[str]) -> None:
        """End a wait; a wish that it got meanwhile is not lost."""
        if waiting.done():
            self._wishes.put_nowait(waiting.result())
        else:
            waiting.cancel()

    def _stop(self, number: signal.Signals) -> None:
        if self._stopping:
            os._exit(128 + number)
        self._stopping = True
        self._wishes.put_nowait(number.name)

    def close(self) -> None:
        """Leave SIGHUP ignored; a second SIGTERM still exits at once."""
        self._loop.add_signal_handler(signal.SIGHUP, lambda: None)


async def _feed_watchdog() -> None:
    """Tell the service manager that the event loop turns."""
    interval = watchdog_interval()
    while interval is not None:
        sd_notify("WATCHDOG=1")
        await asyncio.sleep(interval)
