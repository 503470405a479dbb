"""One-shot commands: compose the adapters, do one thing, return plain values. Rendering is the command line's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from syncd.audit import Takes, Verdict, audit
from syncd.checkout import APPLIED
from syncd.checks import Finding, disk_findings, problems_of
from syncd.errors import DiskProblem, Locked, ObjectCorrupt, SyncdError, Unavailable, UsageError
from syncd.history import History
from syncd.index import Index
from syncd.modes import ModePolicy
from syncd.nodes import NOTE_MAX
from syncd.paths import printable
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.statedir import StateDir
from syncd.status import FolderState, FolderStatus, StatusKeeper
from syncd.store.base import HEAD, BadMeta, ObjectInfo
from syncd.store.bucket import NatsStore
from syncd.store.connection import Connection, require_jetstream
from syncd.store.probe import missing_permissions
from syncd.store.reasons import check_version
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.trees import layout_of
from syncd.trust import Trust
from syncd.wiring import connection_options, publish_options, rollout_options, subscribe_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from syncd.outlet import PushResult
    from syncd.progress import Progress
    from syncd.retention import Collected
    from syncd.settings import PublishSettings, Settings, SubscribeSettings
    from syncd.store.base import Bucket, Sink, Store
    from syncd.upstream import PullResult

CONNECT_SECONDS = 10.0
SPOOL_BYTES = 8 * 1024 * 1024
NOT_IN_NOTES = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories: control characters, lone surrogates, separators of lines and paragraphs."""


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


class Place(NamedTuple):
    """A directory that a person named.

    :ivar path: its one spelling, so that what is remembered of it is found again: that of the configuration, else
        without symlinks.
    :ivar item: the [[subscribe]] that is about it; ``None``: there is none.
    """

    path: Path
    item: SubscribeSettings | None


def place_of(settings: Settings, directory: Path, folder: str | None = None) -> Place:
    """Return which mirror a directory is, by whatever name (relative, through a symlink, a second mount). Blocking.

    :param folder: look only at its mirrors.
    """
    for item in settings.subscribe:
        if folder in {None, item.folder} and _same(item.path, directory):
            return Place(item.path, item)
    return Place(Path(os.path.realpath(directory)), None)


def _same(one: Path, other: Path) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True  # neither has to be there
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False


def trusted(settings: Settings, folder: str, keys: Collection[str] = (), threshold: int | None = None) -> Trust | None:
    """Return the keys that a folder's subscribers start from: those that a person names, else the configuration's.

    ``None`` where nobody says.

    :raises UsageError: they are none; or the configuration says more than one thing.
    """
    named = {
        (frozenset(item.trusted_keys), item.trusted_threshold)
        for item in settings.subscribe
        if item.folder == folder and item.trusted_keys
    }
    if threshold is not None and not keys:
        raise UsageError("--trust-threshold says nothing without --trust KEY", hint="name the keys, too")
    if keys:
        named = {(frozenset(keys), threshold or 1)}
    if not named:
        return None
    if len(named) > 1:
        raise UsageError(
            f"the [[subscribe]]s of folder {folder!r} do not trust the same keys", hint="say which: --trust KEY"
        )
    try:
        return Trust(*named.pop())
    except ValueError as error:
        raise UsageError(f"trusted keys: {error}") from None


def _keeper(role: str, folder: str, path: Path) -> StatusKeeper:
    first = FolderStatus("publish" if role == "publish" else "subscribe", folder, str(path))
    return StatusKeeper(first, clock=time.time, report=lambda _: None)


def _published(settings: Settings, folder: str) -> PublishSettings:
    for item in settings.publish:
        if item.folder == folder:
            return item
    raise UsageError(f"no [[publish]] with folder = {folder!r} in the configuration")


@contextlib.asynccontextmanager
async def _publisher(settings: Settings, folder: str, *, looks: bool = False) -> AsyncIterator[Publisher]:
    """Make what a one-shot command publishes with.

    :param looks: nothing is to be written, here either.
    """
    item = _published(settings, folder)
    state = StateDir(settings.daemon.state_dir)
    if not looks:
        state.prepare()
    index_file = state.index_file("publish", folder, item.path)
    async with open_store(settings) as (store, _):
        yield Publisher(
            publish_options(settings, item), store, index_file, status=_keeper("publish", folder, item.path)
        )


async def push(
    settings: Settings,
    folder: str,
    *,
    allow_delete: bool,
    take_over: bool,
    change_layout: bool = False,
    note: str = "",
    progress: Callable[[Progress], None] | None,
) -> PushResult:
    """Publish one configured folder once.

    :raises UsageError: no ``[[publish]]`` of that name, or a note that cannot be kept.
    """
    if note and _published(settings, folder).layout != "generations":
        raise UsageError(
            f"folder {folder!r} has the objects layout, which keeps no notes", hint="notes belong to generations"
        )
    check_note(note)
    async with _publisher(settings, folder) as publisher:
        return await publisher.push(
            allow_delete=allow_delete, take_over=take_over, change_layout=change_layout, note=note, progress=progress
        )


def check_note(note: str) -> None:
    """Refuse a text that is no note: it is one line that a terminal can show as it is.

    :raises UsageError: too long, or with control characters.
    """
    if len(note) > NOTE_MAX:
        raise UsageError(f"a note of {len(note)} characters; {NOTE_MAX} is the most")
    if any(unicodedata.category(char) in NOT_IN_NOTES for char in note):
        raise UsageError(
            f"the note {printable(note)!r} has control characters or line breaks", hint="a note is one line of text"
        )


async def collect(settings: Settings, folder: str, *, dry_run: bool) -> Collected:
    """Free what no kept generation of a configured folder reaches.

    :raises UsageError: no ``[[publish]]`` of that name, or it has the objects layout.
    """
    async with _publisher(settings, folder, looks=dry_run) as publisher:
        return await publisher.collect(dry_run=dry_run)


async def pull(
    settings: Settings,
    folder: str,
    directory: Path,
    *,
    allow_delete: bool,
    generation: int = 0,
    trust: Trust | None = None,
    unchecked: Callable[[str], None] | None = None,
    progress: Callable[[Progress], None] | None,
) -> PullResult:
    """Bring a directory up to a bucket once; a configured mirror of it keeps its options.

    :param generation: bring it to this generation; 0: to the newest.
    :param trust: what a directory that is no configured mirror trusts; ``None``: what the folder's mirrors trust.
    :param unchecked: told why signatures are not checked, where they are not, before anything is written.
    :raises UsageError: there is no such generation, or the bucket keeps none; or whom to trust is not clear.
    """
    directory, item = await asyncio.to_thread(place_of, settings, directory, folder)
    if item is not None and trust is not None:
        raise UsageError(
            f"{directory} has a [[subscribe]], which says whom it trusts", hint="leave --trust out, or change that"
        )
    if item is not None:
        options = subscribe_options(item)
    else:
        options = SubscribeOptions(folder, directory, Rules(), trust=trust or trusted(settings, folder))
    state = StateDir(settings.daemon.state_dir)
    state.prepare()
    index_file = state.index_file("subscribe", folder, directory)
    if item is not None:
        generation = generation or state.pin(folder).number()
    async with open_store(settings) as (store, _):
        if generation:
            await (await History.open(store.bucket(folder))).commit(generation)  # in plain words, before anything else
        if options.trust is None and unchecked is not None:
            at = "" if item is None else f" at {directory}"
            unchecked(f"no trusted_keys are configured for {folder}{at}")
        subscriber = Subscriber(options, store, index_file, status=_keeper("subscribe", folder, directory))
        return await subscriber.pull(allow_delete=allow_delete, generation=generation, progress=progress)


@contextlib.asynccontextmanager
async def open_bucket(settings: Settings, folder: str) -> AsyncIterator[Bucket]:
    """Connect for one command that looks into one bucket."""
    async with open_store(settings) as (store, _):
        yield store.bucket(folder)


@contextlib.asynccontextmanager
async def open_history(settings: Settings, folder: str) -> AsyncIterator[History]:
    """Connect for one command that looks into a folder's generations.

    :raises UsageError: it has the objects layout.
    """
    async with open_bucket(settings, folder) as bucket:
        yield await History.open(bucket)


async def list_objects(bucket: Bucket, wanted: dict[str, str]) -> AsyncIterator[ObjectInfo]:
    """Yield a bucket's live objects whose metadata has all the wanted values, in the order they were written."""
    async for page in bucket.changes(0):
        for item in page.items:
            if isinstance(item, BadMeta) or item.deleted:
                continue
            if all(item.metadata.get(key) == value for key, value in wanted.items()):
                yield item


async def cat(settings: Settings, folder: str, name: str, out: BinaryIO, *, generation: int = 0) -> None:
    """Write one content to ``out``, but only once all of it is verified.

    :param generation: of which one; 0: what the folder holds now.
    :raises UsageError: there is no such path or generation, or it has no content (a directory, a symlink).
    """
    async with open_store(settings) as (store, _):
        bucket = store.bucket(folder)
        history = await History.open(bucket) if generation else await History.find(bucket)
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
            if history is not None:
                await history.save(name, spool, generation or HEAD)
            else:
                await _save_object(store, bucket, name, spool)

            def copy() -> None:
                spool.seek(0)
                while block := spool.read(1024 * 1024):
                    out.write(block)
                out.flush()

            await asyncio.to_thread(copy)


async def _save_object(store: Store, bucket: Bucket, name: str, out: Sink) -> None:
    folder = bucket.name
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
    await bucket.download(info, out)


async def verify(settings: Settings, directory: Path, folder: str | None, *, generation: int = 0) -> Verdict:
    """Read every file of a mirror and compare it with its bucket.

    :param generation: what to compare with; 0: what this host applied, as far as it knows, else the head.
    :raises UsageError: the directory is no configured mirror and no folder is named; or there is no such generation.
    """
    directory, item = await asyncio.to_thread(place_of, settings, directory)
    if folder is None and item is None:
        raise UsageError(f"{directory} is no [[subscribe]] path of the configuration", hint="name it: --folder FOLDER")
    name = folder or (item.folder if item else "")
    takes = _takes(item) if item else await asyncio.to_thread(_guess, directory)
    applied = await asyncio.to_thread(_applied, settings, name, directory)
    async with open_bucket(settings, name) as bucket:
        return await audit(bucket, directory, takes, generation=generation, applied=applied)


def _takes(item: SubscribeSettings) -> Takes:
    options = rollout_options(item)
    return Takes(Rules(item.include, item.exclude), options.modes, options.mode)


def _guess(directory: Path) -> Takes:
    """Return what a directory that no configuration describes looks like."""
    release = (directory / "current").is_symlink() and (directory / "releases").is_dir()
    return Takes(Rules(), ModePolicy(read_only=release), "release" if release else "mirror")


def _applied(settings: Settings, folder: str, directory: Path) -> int:
    """Return the generation that a mirror of this host has: by its index, or, while a daemon has that, its status.

    0 where nobody knows: it was never mirrored here, or this user must not look.
    """
    state = StateDir(settings.daemon.state_dir)
    file = state.index_file("subscribe", folder, directory)
    with contextlib.suppress(OSError, Locked, DiskProblem, ValueError, KeyError, TypeError):
        if not state.daemon_runs() and file.exists():
            index = Index(file)
            try:
                return int(json.loads(index.note(APPLIED))["number"])
            finally:
                index.close()
    _, folders = state.read_status()
    found = [one for one in folders if one.role == "subscribe" and one.folder == folder and one.path == str(directory)]
    return found[0].generation if found else 0


async def seal(settings: Settings, folder: str) -> None:
    """Make a bucket read-only for ever."""
    async with open_store(settings) as (store, _):
        await store.bucket(folder).seal()


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
            found = await _folder_findings(connection, store, "subscribe", mirror.folder)
            findings += found or await _mirror_findings(store.bucket(mirror.folder), mirror)
    return findings


async def _mirror_findings(bucket: Bucket, mirror: SubscribeSettings) -> list[Finding]:
    """Say what a mirror asks for, and the bucket does not have."""
    where = f"subscribe {mirror.folder}"
    try:
        if await layout_of(bucket, await bucket.state()) == "objects":
            wants = {
                "trusted_keys": mirror.trusted_keys,
                'mode = "release"': mirror.mode == "release",
                "hooks": mirror.hooks.check or mirror.hooks.apply or mirror.hooks.health,
                "channel": mirror.channel != HEAD,
                "pin": mirror.pin,
            }
            asked = " and ".join(name for name, wanted in wants.items() if wanted)
            return [Finding(where, f"the objects layout has no place for {asked}")] if asked else []
        history = await History.open(bucket)
        for name in filter(None, (str(mirror.pin or ""), mirror.channel)):
            try:
                await history.commit(name)
            except UsageError as error:
                return [Finding(where, error.message, "warning")]
    except SyncdError as error:
        return [Finding(where, error.message, "warning")]
    return []


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


async def pin(settings: Settings, folder: str, generation: int | None, *, clear: bool) -> int:
    """Set, clear or return (``generation`` is ``None``) this host's pin of a folder.

    :raises UsageError: this host has no mirror of the folder, or there is no such generation.
    """
    if not any(item.folder == folder for item in settings.subscribe):
        raise UsageError(f"no [[subscribe]] with folder = {folder!r} in the configuration")
    state = StateDir(settings.daemon.state_dir)
    state.prepare()
    here = state.pin(folder)
    if generation is not None:
        async with open_history(settings, folder) as history:
            await history.commit(generation)  # in plain words, where there is none
        here.set(generation)
    elif clear:
        here.set(0)
    return here.number()
