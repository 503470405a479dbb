"""One-shot commands: compose the adapters, do one thing, return plain values. Rendering is the command line's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from syncd.checks import Finding, disk_findings, problems_of
from syncd.errors import ObjectCorrupt, SyncdError, Unavailable, UsageError
from syncd.index import Index, LocalRow
from syncd.mirror import Mirror
from syncd.model import Entry, Kind
from syncd.paths import printable
from syncd.publisher import Publisher, PushResult
from syncd.rules import Rules
from syncd.statedir import StateDir
from syncd.status import FolderState, FolderStatus, StatusKeeper
from syncd.store.base import BadMeta, ObjectInfo
from syncd.store.bucket import NatsStore
from syncd.store.connection import Connection, check_version, require_jetstream
from syncd.store.mapping import remote_row
from syncd.store.probe import missing_permissions
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.wiring import connection_options, publish_options, subscribe_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from syncd.fetch import PullResult
    from syncd.progress import Progress
    from syncd.settings import Settings
    from syncd.store.base import Store

CONNECT_SECONDS = 10.0
SPOOL_BYTES = 8 * 1024 * 1024


@contextlib.asynccontextmanager
async def open_store(settings: Settings) -> AsyncIterator[tuple[Store, Connection]]:
    """Connect for one command.

    :raises Unavailable, NotPermitted: named, after at most ten seconds.
    """
    connection = Connection(connection_options(settings))
    await connection.start(CONNECT_SECONDS)
    try:
        check_version(await connection.server_version(), connection.host)
        yield NatsStore(connection), connection
    finally:
        await connection.close()


def absolute(path: Path) -> Path:
    """Return a path from the working directory as the settings write paths."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow symlinks


def _keeper(role: str, folder: str, path: Path) -> StatusKeeper:
    first = FolderStatus("publish" if role == "publish" else "subscribe", folder, str(path))
    return StatusKeeper(first, clock=time.time, report=lambda _: None)


async def push(
    settings: Settings,
    folder: str,
    *,
    allow_delete: bool,
    take_over: bool,
    progress: Callable[[Progress], None] | None,
) -> PushResult:
    """Publish one configured folder once.

    :raises UsageError: no ``[[publish]]`` of that name.
    """
    item = next((item for item in settings.publish if item.folder == folder), None)
    if item is None:
        raise UsageError(f"no [[publish]] with folder = {folder!r} in the configuration")
    state = StateDir(settings.daemon.state_dir)
    state.prepare()
    index_file = state.index_file("publish", folder, item.path)
    async with open_store(settings) as (store, _):
        publisher = Publisher(
            publish_options(settings, item), store, index_file, status=_keeper("publish", folder, item.path)
        )
        return await publisher.push(allow_delete=allow_delete, take_over=take_over, progress=progress)


async def pull(
    settings: Settings,
    folder: str,
    directory: Path,
    *,
    allow_delete: bool,
    progress: Callable[[Progress], None] | None,
) -> PullResult:
    """Bring a directory up to a bucket once; a configured mirror of it keeps its options."""
    directory = absolute(directory)
    item = next((item for item in settings.subscribe if item.folder == folder and item.path == directory), None)
    options = subscribe_options(item) if item else SubscribeOptions(folder, directory, Rules())
    state = StateDir(settings.daemon.state_dir)
    state.prepare()
    index_file = state.index_file("subscribe", folder, directory)
    async with open_store(settings) as (store, _):
        subscriber = Subscriber(options, store, index_file, status=_keeper("subscribe", folder, directory))
        return await subscriber.pull(allow_delete=allow_delete, progress=progress)


async def list_objects(settings: Settings, folder: str, wanted: dict[str, str]) -> AsyncIterator[ObjectInfo]:
    """Yield a bucket's live objects whose metadata has all the wanted values, in the order they were written."""
    async with open_store(settings) as (store, _):
        async for page in store.bucket(folder).changes(0):
            for item in page.items:
                if isinstance(item, BadMeta) or item.deleted:
                    continue
                if all(item.metadata.get(key) == value for key, value in wanted.items()):
                    yield item


async def cat(settings: Settings, folder: str, name: str, out: BinaryIO) -> None:
    """Write one object's content to ``out``, but only once all of it is verified.

    :raises UsageError: there is no such object, or it has no content (a directory, a symlink).
    """
    async with open_store(settings) as (store, _):
        bucket = store.bucket(folder)
        info = await bucket.get_info(name)
        for _ in range(2):  # the object itself, or what its link points to
            if info is None or info.deleted:
                raise UsageError(f"no object {printable(name)!r} in bucket {folder!r}", hint=f"see: syncd ls {folder}")
            if info.link is None:
                break
            if info.link.name is None:
                raise UsageError(f"{printable(name)!r} is a link to the bucket {info.link.bucket!r}")
            bucket = store.bucket(info.link.bucket)
            info = await bucket.get_info(info.link.name)
        if info is None or info.link is not None:
            raise ObjectCorrupt(f"{printable(name)!r} is a link to another link")
        kind = info.metadata.get("syncd-kind", "file")
        if kind != "file":
            raise UsageError(f"{printable(name)!r} is a {kind}, it has no content")
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
            await bucket.download(info, spool)

            def copy() -> None:
                spool.seek(0)
                while block := spool.read(1024 * 1024):
                    out.write(block)
                out.flush()

            await asyncio.to_thread(copy)


async def seal(settings: Settings, folder: str) -> None:
    """Make a bucket read-only for ever."""
    async with open_store(settings) as (store, _):
        await store.bucket(folder).seal()


# -- verify --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Deviation:
    """One path where a mirror is not what the bucket says: ``missing``, ``content``, ``kind``, ``mode``, ``mtime``."""

    path: str
    what: str


@dataclass(slots=True)
class Verdict:
    """What an audit found; ``extraneous`` paths are not syncd's and no fault."""

    checked: int
    extraneous: int
    deviations: list[Deviation]


async def verify(settings: Settings, directory: Path, folder: str | None) -> Verdict:
    """Read every file of a mirror and compare it with the bucket.

    :raises UsageError: the directory is no configured mirror and no folder is named.
    """
    directory = absolute(directory)
    item = next((item for item in settings.subscribe if item.path == directory), None)
    if folder is None and item is None:
        raise UsageError(f"{directory} is no [[subscribe]] path of the configuration", hint="name it: --folder FOLDER")
    name = folder or (item.folder if item else "")
    rules = Rules(item.include, item.exclude) if item else Rules()
    with tempfile.TemporaryDirectory(prefix="syncd-verify-") as scratch:
        index = await asyncio.to_thread(Index, Path(scratch) / "verify.db")
        try:
            async with open_store(settings) as (store, _):
                await _list_into(index, store, name, rules)
            return await asyncio.to_thread(_compare, index, directory)
        finally:
            await asyncio.to_thread(index.close)


async def _list_into(index: Index, store: Store, folder: str, rules: Rules) -> None:
    async for page in store.bucket(folder).changes(0):
        rows = []
        for item in page.items:
            if isinstance(item, BadMeta) or item.deleted or item.link is not None:
                continue
            with contextlib.suppress(SyncdError):  # refused objects are the daemon's report, not a mirror's fault
                row = remote_row(item)
                if rules.takes(row.path, is_dir=row.entry.kind is Kind.DIR):
                    rows.append(row)
        await asyncio.to_thread(index.put_remote, rows)


def _compare(index: Index, directory: Path) -> Verdict:
    with Mirror.peek(directory) as mirror:

        def rows() -> Iterator[LocalRow]:
            for path, disk in mirror.walk():
                if disk.kind is None:
                    continue
                digest = sha256 = ""
                if disk.kind is Kind.FILE and index.remote(path) is not None:
                    digest, sha256, _ = mirror.read_digests(path)
                mode = 0o777 if disk.kind is Kind.SYMLINK else disk.mode
                entry = Entry(disk.kind, mode, disk.stat.mtime_ns, disk.stat.size, digest, sha256, disk.target)
                yield LocalRow(path, entry, disk.stat)

        index.put_local(list(rows()))
    extraneous = 0
    deviations: list[Deviation] = []
    for path, local, remote in index.diff():
        if remote is None:
            extraneous += 0 if index.has_remote_below(path) else 1
        elif local is None:
            deviations.append(Deviation(path, "missing"))
        else:
            deviations.append(Deviation(path, _what(local.entry, remote.entry)))
    return Verdict(index.count_remote(), extraneous, deviations)


def _what(have: Entry, want: Entry) -> str:
    if have.kind is not want.kind:
        return "kind"
    if not have.same_content(want):
        return "content"
    return "mode" if have.mode != want.mode else "mtime"


# -- check ---------------------------------------------------------------------------------------------------------


async def check(settings: Settings, *, connect: bool) -> list[Finding]:
    """Say what the daemon would: configuration, disk, server, permissions."""
    findings = problems_of(settings) + await asyncio.to_thread(disk_findings, settings)
    if not connect or any(finding.severity == "error" for finding in findings):
        return findings
    if settings.nats.embedded is not None and not await asyncio.to_thread(
        StateDir(settings.daemon.state_dir).daemon_runs
    ):
        return findings  # the server comes with the daemon: nothing to ask yet
    async with open_store(settings) as (store, connection):
        if settings.publish:
            await require_jetstream(connection)
        for source in settings.publish:
            findings += await _folder_findings(connection, store, "publish", source.folder)
        for mirror in settings.subscribe:
            findings += await _folder_findings(connection, store, "subscribe", mirror.folder)
    return findings


async def _folder_findings(connection: Connection, store: Store, role: str, folder: str) -> list[Finding]:
    where = f"{role} {folder}"
    try:
        await store.bucket(folder).state()
    except Unavailable as error:
        severity = "warning"
        text = error.message if role == "subscribe" else f"{error.message}: it will be created"
        return [Finding(where, text, "warning" if severity == "warning" else "error")]
    except SyncdError as error:
        return [Finding(where, error.message)]
    missing = await missing_permissions(connection, folder, publish=role == "publish")
    return [Finding(where, f"permission missing: {subject}") for subject in missing]


# -- status and allow ----------------------------------------------------------------------------------------------


def allow(settings: Settings, folder: str) -> list[str]:
    """Allow the held plans of a folder on this host; return the roles that were halted.

    :raises UsageError: nothing of that folder is held.
    """
    state = StateDir(settings.daemon.state_dir)
    _, folders = state.read_status()
    held = [one for one in folders if one.folder == folder and one.state is FolderState.HALTED]
    if not held:
        raise UsageError(f"no plan of folder {folder!r} is held on this host", hint="see: syncd status")
    for one in held:
        state.allowance(one.role, folder).give()
    return [one.role for one in held]
