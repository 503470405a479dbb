"""Decisions, pure: what to do about a difference, in which order, and when to rather stop.

Nothing here waits, reads, logs or knows the time. The services walk what these functions return.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from syncd.model import DEFAULT_DIR_MODE, Entry, Kind, Stat
from syncd.paths import ancestors, parent, sort_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


MAX_UNEXPLAINED_PERCENT = 50


class PublishAction(Enum):
    """What the publisher does about one path."""

    NOTHING = "nothing"
    PUT_CONTENT = "put_content"
    """Content that the name does not have now: uploaded, unless the bucket has it under another name."""
    PUT_META = "put_meta"
    """Same content, other mode or time (or a directory or symlink): a metadata message suffices."""
    DELETE = "delete"


def publish_action(local: Entry | None, remote: Entry | None, *, remote_is_ours: bool) -> PublishAction:
    """Decide about one path of a source.

    :param local: what the source has; ``None``: nothing.
    :param remote: what the bucket announces; ``None``: nothing, or a tombstone.
    :param remote_is_ours: syncd wrote the object. What it did not write it does not delete.
    """
    if local is None:
        return PublishAction.DELETE if remote is not None and remote_is_ours else PublishAction.NOTHING
    if remote is None or not remote_is_ours or not local.same_content(remote):
        return PublishAction.PUT_CONTENT if local.kind is Kind.FILE else PublishAction.PUT_META
    return PublishAction.NOTHING if local.same_meta(remote) else PublishAction.PUT_META


def publish_halt(deletes: int, published: int, max_delete_percent: float) -> str:
    """Return why a publisher's plan must be held, "" if it need not.

    :param deletes: paths the plan would tombstone.
    :param published: paths that the bucket announces as ours now.
    """
    if deletes == 0 or published == 0:
        return ""
    if deletes >= published:
        return f"would delete all {published} published paths"
    percent = 100 * deletes / published
    if percent > max_delete_percent:
        return (
            f"would delete {deletes} of {published} published paths ({percent:.0f} %, limit {max_delete_percent:g} %)"
        )
    return ""


def mirror_halt(removes: int, mirrored: int, adds: int, *, allowed: int, unexplained: int) -> str:
    """Return why a subscriber's plan must be held, "" if it need not. Counts are of files and symlinks.

    :param removes: what the plan would remove from the mirror.
    :param mirrored: what syncd keeps in the mirror now.
    :param adds: what the plan would put where nothing is kept now.
    :param allowed: removals that a person allowed at the publisher.
    :param unexplained: removals without a tombstone: the bucket was purged, restored or made again.
    """
    if removes and removes >= mirrored and adds == 0 and allowed < removes:
        return f"would remove all {mirrored} mirrored paths"
    if 100 * unexplained > MAX_UNEXPLAINED_PERCENT * mirrored:
        return f"would remove {unexplained} of {mirrored} mirrored paths that vanished from the bucket without a trace"
    return ""


@dataclass(frozen=True, slots=True)
class MakeDir:
    """Make a directory, or accept the one that is there. Its mode and time come last, see :class:`DirMeta`."""

    path: str


@dataclass(frozen=True, slots=True)
class Place:
    """Rename staged content (a file or a symlink) to its path, over whatever non-directory is there.

    :ivar staged: name in the staging directory.
    :ivar assumed: what the index says is there now; ``None``: nothing that we know of. Anything else found is drift.
    """

    path: str
    entry: Entry
    staged: str
    assumed: Stat | None


@dataclass(frozen=True, slots=True)
class SetMeta:
    """Give a file (or symlink) whose content is right its mode and time, in place."""

    path: str
    entry: Entry
    assumed: Stat | None


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove a path that syncd wrote; a directory only when it is empty by then.

    :ivar assumed: what the index says is there; drifted content is not removed under ``drift = "report"``/``"keep"``.
    """

    path: str
    kind: Kind
    assumed: Stat | None


@dataclass(frozen=True, slots=True)
class DirMeta:
    """Give a directory its mode and time, after everything below it is done."""

    path: str
    mode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """What one batch does to a mirror, in the order of the fields, each already in the order of execution.

    :ivar clear: removals that make room for another kind at the same path (children before parents).
    :ivar make_dirs: parents before children.
    :ivar remove: children before parents.
    :ivar dir_meta: children before parents, so that a parent's time is set after its children's renames.
    """

    clear: tuple[Remove, ...] = ()
    make_dirs: tuple[MakeDir, ...] = ()
    place: tuple[Place, ...] = ()
    set_meta: tuple[SetMeta, ...] = ()
    remove: tuple[Remove, ...] = ()
    dir_meta: tuple[DirMeta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.clear or self.make_dirs or self.place or self.set_meta or self.remove or self.dir_meta)


@dataclass(frozen=True, slots=True)
class Difference:
    """One path where mirror and target differ.

    :ivar have: what syncd wrote there (index), ``None`` if nothing; ``stat`` its stat fields.
    :ivar want: what the bucket announces; ``None``: nothing any more.
    :ivar staged: name of the staged content where ``want`` needs some; "" where the content is in place already.
    """

    path: str
    have: Entry | None
    stat: Stat | None
    want: Entry | None
    staged: str = ""


def plan_mirror(differences: Iterable[Difference], dirs: Sequence[DirMeta]) -> MirrorPlan:
    """Order the actions of one batch.

    A file and a symlink replace one another by one rename; whatever else changes its kind is cleared away first, and
    so is a file or symlink that is gone upstream where a path below it is wanted (a directory that no object
    describes took its place). A path below one that is wanted as a file or symlink keeps its step and will fail
    there, so that somebody is told; no directory is made for it.

    :param differences: in any order, at most one per path. ``staged`` is set wherever ``want`` has content that is
        not in place.
    :param dirs: for every directory that the target has and whose children may change (parents of all paths of
        ``differences``): the mode and time it must have at the end.
    """
    rows = sorted(differences, key=lambda row: sort_key(row.path))
    leaves = {row.path for row in rows if row.want is not None and row.want.kind is not Kind.DIR}
    needed = {above for row in rows if row.want is not None for above in ancestors(row.path)} - leaves
    clear: list[Remove] = []
    make_dirs = {path: MakeDir(path) for path in needed}
    place: list[Place] = []
    set_meta: list[SetMeta] = []
    remove: list[Remove] = []
    metas = {meta.path: meta for meta in dirs}
    replaced_dirs: set[str] = set()
    for row in rows:
        have, want = row.have, row.want
        if want is None:
            if row.path not in needed:
                metas.pop(row.path, None)
            if have is None or (have.kind is Kind.DIR and row.path in needed):
                continue
            in_the_way = row.path in needed or any(above in replaced_dirs for above in ancestors(row.path))
            (clear if in_the_way else remove).append(Remove(row.path, have.kind, row.stat))
            continue
        if have is not None and have.kind is not want.kind and Kind.DIR in {have.kind, want.kind}:
            clear.append(Remove(row.path, have.kind, row.stat))
            if have.kind is Kind.DIR:
                replaced_dirs.add(row.path)
        if want.kind is Kind.DIR:
            make_dirs[row.path] = MakeDir(row.path)
            metas[row.path] = DirMeta(row.path, want.mode, want.mtime_ns)
        elif row.staged:
            in_place = have is not None and have.kind is not Kind.DIR
            place.append(Place(row.path, want, row.staged, row.stat if in_place else None))
        else:
            set_meta.append(SetMeta(row.path, want, row.stat))
    return MirrorPlan(
        clear=tuple(reversed(clear)),
        make_dirs=tuple(sorted(make_dirs.values(), key=lambda step: sort_key(step.path))),
        place=tuple(place),
        set_meta=tuple(set_meta),
        remove=tuple(reversed(remove)),
        dir_meta=tuple(sorted(metas.values(), key=lambda step: sort_key(step.path), reverse=True)),
    )


def parents_of(paths: Iterable[str]) -> set[str]:
    """Return the directories whose times a change of ``paths`` disturbs, without the root."""
    return {above for path in paths if (above := parent(path))}


def implied_dir() -> Entry:
    """Return the entry of a directory that no object describes (other clients write none)."""
    return Entry(Kind.DIR, DEFAULT_DIR_MODE, 0)
