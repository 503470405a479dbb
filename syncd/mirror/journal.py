"""The journal: one batch, written down before the first path of the mirror changes.

Format, version 1: lines of ASCII JSON. A header ``{"syncd_journal": 1, "drift": policy, "steps": count}``, with
``"release": name`` where the batch is for one, one array per step in the order of execution, and ``{"blake3": hex}`` of
all bytes before that line. ``json`` escapes everything outside ASCII, control characters and lone surrogates, so a name
never breaks a line.

Rules kept here:
 * the rename of a complete, synced ``journal.new`` to ``journal`` (and the sync of its directory) is the commit point
   of a batch; before it nothing has happened, after it the batch will be completed, by this process or the next;
 * a journal that is torn never was committed; one of another version is set aside and reported, never guessed at.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from blake3 import blake3

from syncd.crashpoints import crash_point
from syncd.mirror.root import disk_problem
from syncd.model import Entry, Kind, Stat
from syncd.plan import DirMeta, MakeDir, MirrorPlan, Place, Remove, SetMeta

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.errors import DiskProblem

log = structlog.get_logger()

VERSION = 1
JOURNAL = "journal"
UNFINISHED = "journal.new"
REFUSED = "journal.refused"
"""An earlier one of the same name is replaced: one is enough to look at."""

_LINES_PER_WRITE = 1000


@dataclass(frozen=True, slots=True)
class Journal:
    """A committed batch and the policy it was committed under.

    :ivar release: the tree that it is for; "": the root.
    """

    plan: MirrorPlan
    drift: str
    release: str = ""


class TornJournalError(ValueError):
    """The journal is not complete: its batch was never committed."""


class ForeignJournalError(ValueError):
    """The journal is complete but of a version, or with steps, that this version does not know."""


def _entry_fields(entry: Entry) -> list[Any]:
    return [entry.kind, entry.mode, entry.mtime_ns, entry.size, entry.digest, entry.sha256, entry.target]


def _stat_fields(stat: Stat | None) -> list[int] | None:
    return None if stat is None else [stat.size, stat.mtime_ns, stat.ctime_ns, stat.ino, stat.dev]


def _to_entry(fields: list[Any]) -> Entry:
    return Entry(Kind(fields[0]), *fields[1:])


def _to_stat(fields: list[int] | None) -> Stat | None:
    return None if fields is None else Stat(*fields)


def _steps(plan: MirrorPlan) -> Iterator[list[Any]]:
    for clear in plan.clear:
        yield ["clear", clear.path, clear.kind, _stat_fields(clear.assumed)]
    for make in plan.make_dirs:
        yield ["dir", make.path]
    for place in plan.place:
        yield ["place", place.path, _entry_fields(place.entry), place.staged, _stat_fields(place.assumed)]
    for change in plan.set_meta:
        yield ["meta", change.path, _entry_fields(change.entry), _stat_fields(change.assumed)]
    for remove in plan.remove:
        yield ["remove", remove.path, remove.kind, _stat_fields(remove.assumed)]
    for meta in plan.dir_meta:
        yield ["dirmeta", meta.path, meta.mode, meta.mtime_ns]


def encode(plan: MirrorPlan, drift: str, release: str = "") -> Iterator[bytes]:
    """Yield the journal's bytes in pieces of bounded size."""
    count = sum(map(len, (plan.clear, plan.make_dirs, plan.place, plan.set_meta, plan.remove, plan.dir_meta)))
    digest = blake3()
    header = {"syncd_journal": VERSION, "drift": drift, "steps": count} | ({"release": release} if release else {})
    lines = [json.dumps(header)]
    for step in _steps(plan):
        lines.append(json.dumps(step, separators=(",", ":")))
        if len(lines) >= _LINES_PER_WRITE:
            piece = ("\n".join(lines) + "\n").encode("ascii")
            digest.update(piece)
            lines.clear()
            yield piece
    if lines:
        piece = ("\n".join(lines) + "\n").encode("ascii")
        digest.update(piece)
        yield piece
    yield json.dumps({"blake3": digest.hexdigest()}).encode("ascii") + b"\n"


def decode(data: bytes) -> Journal:
    """Read a journal.

    :raises TornJournalError: it is not complete.
    :raises ForeignJournalError: another version wrote it.
    """
    first = data.partition(b"\n")[0]
    try:
        header = json.loads(first)
        version, drift, count = header["syncd_journal"], header.get("drift"), header.get("steps")
        release = header.get("release", "")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise TornJournalError("no header") from None
    if version != VERSION:
        raise ForeignJournalError(f"format version {version}, this syncd knows {VERSION}")
    body, _, last = data.removesuffix(b"\n").rpartition(b"\n")
    body += b"\n"
    if last != json.dumps({"blake3": blake3(body).hexdigest()}).encode("ascii"):
        raise TornJournalError("no matching digest at its end")
    try:
        lines = [json.loads(line) for line in body.splitlines()[1:]]
        plan = _decode_steps(lines)
    except (ValueError, TypeError, KeyError, IndexError) as exc:
        raise ForeignJournalError(f"a step that this syncd does not know: {exc}") from exc
    if len(lines) != count or not isinstance(drift, str) or not isinstance(release, str):
        raise ForeignJournalError("header and steps do not fit together")
    return Journal(plan, drift, release)


def _decode_steps(lines: list[list[Any]]) -> MirrorPlan:
    clear: list[Remove] = []
    make_dirs: list[MakeDir] = []
    place: list[Place] = []
    set_meta: list[SetMeta] = []
    remove: list[Remove] = []
    dir_meta: list[DirMeta] = []
    for word, *rest in lines:
        if word == "place":
            place.append(Place(rest[0], _to_entry(rest[1]), rest[2], _to_stat(rest[3])))
        elif word == "meta":
            set_meta.append(SetMeta(rest[0], _to_entry(rest[1]), _to_stat(rest[2])))
        elif word in {"clear", "remove"}:
            (clear if word == "clear" else remove).append(Remove(rest[0], Kind(rest[1]), _to_stat(rest[2])))
        elif word == "dir":
            make_dirs.append(MakeDir(rest[0]))
        elif word == "dirmeta":
            dir_meta.append(DirMeta(*rest))
        else:
            raise ValueError(word)
    return MirrorPlan(tuple(clear), tuple(make_dirs), tuple(place), tuple(set_meta), tuple(remove), tuple(dir_meta))


class JournalFile:
    """The journal in ``.syncd``, by descriptor of that directory."""

    def __init__(self, private_fd: int) -> None:
        self._dir = private_fd

    def exists(self) -> bool:
        """Tell whether a batch is committed and not completed."""
        try:
            os.stat(JOURNAL, dir_fd=self._dir, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise disk_problem(exc, "cannot look for a journal") from exc
        return True

    def write(self, plan: MirrorPlan, drift: str, release: str = "") -> None:
        """Commit a batch: when this returns, the batch is durable.

        :param release: the tree that it is for.
        :raises DiskProblem: no room, an I/O error: nothing is committed.
        """
        try:
            self._write_unfinished(plan, drift, release)
            # a crash here leaves journal.new and the old tree: the next recover() sweeps it
            os.rename(UNFINISHED, JOURNAL, src_dir_fd=self._dir, dst_dir_fd=self._dir)
            os.fsync(self._dir)
            # a crash here leaves the journal and the old tree: the next recover() brings the new one
        except OSError as exc:
            raise self._take_back(exc) from exc

    def _write_unfinished(self, plan: MirrorPlan, drift: str, release: str) -> None:
        self._unlink(UNFINISHED)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(UNFINISHED, flags, 0o600, dir_fd=self._dir), "wb") as file:
            for piece in encode(plan, drift, release):
                half = len(piece) // 2
                file.write(piece[:half])
                file.flush()
                crash_point("journal_torn")
                file.write(piece[half:])
            file.flush()
            os.fsync(file.fileno())

    def _take_back(self, cause: OSError) -> DiskProblem:
        """Undo a commit that failed half way, so that what we say (it failed) stays true after a restart."""
        for name in (UNFINISHED, JOURNAL):
            try:
                self._unlink(name)
            except OSError as exc:
                log.warning("journal_left", name=name, error=str(exc))
        return disk_problem(cause, "cannot write the journal")

    def read(self) -> Journal | None:
        """Return the committed batch, ``None`` where there is none; sweeps a torn one, sets a foreign one aside.

        :raises DiskProblem: it cannot be read.
        """
        try:
            data = self._read()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise disk_problem(exc, "cannot read the journal") from exc
        try:
            return decode(data)
        except TornJournalError as exc:
            log.warning("journal_torn", reason=str(exc))
            self.remove()
        except ForeignJournalError as exc:
            log.error("journal_refused", reason=str(exc), kept_as=REFUSED)
            try:
                os.rename(JOURNAL, REFUSED, src_dir_fd=self._dir, dst_dir_fd=self._dir)
            except OSError as error:
                raise disk_problem(error, "cannot set the journal aside") from error
        return None

    def _read(self) -> bytes:
        with os.fdopen(os.open(JOURNAL, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._dir), "rb") as file:
            return file.read()

    def remove(self) -> None:
        """Remove the journal of a completed batch, durably: a later power cut must not bring it back.

        :raises DiskProblem: the disk refused.
        """
        try:
            self._unlink(JOURNAL)
            os.fsync(self._dir)
        except OSError as exc:
            raise disk_problem(exc, "cannot remove the journal") from exc

    def sweep(self) -> None:
        """Remove what a crash before the commit point left.

        :raises DiskProblem: the disk refused.
        """
        try:
            self._unlink(UNFINISHED)
        except OSError as exc:
            raise disk_problem(exc, "cannot remove an unfinished journal") from exc

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._dir)
        except FileNotFoundError:
            return
