"""One publisher, three subscribers, and everything that can happen to them, in orders that nobody thought of.

A hypothesis state machine. Its rules change the source, publish, pull, promote and roll back, cut and mend the network
of the publisher and of one subscriber, kill and restart the server, kill or freeze publisher and subscribers at named
points, edit and add files in the mirrors, collect garbage. Mostly two subscribers follow ``head``, one repairing drift
and one keeping it, and the third follows ``stable`` and keeps releases; some examples have other roles. Each process is
a real one (:mod:`tests.support.forks`), so is the server, and a kill is SIGKILL.

What holds after every step:

* what a subscriber applied is some committed generation, exactly: kinds, contents, modes, times, link texts, and the
  tree digest, which the test computes by itself from the source at the moment of the commit;
* a subscriber that was cut off half-way shows, path by path, one of the generations that it went between, and is
  exactly one of them after its next start, even without network;
* a file of somebody else in a mirror is as it was, and so is one of ours that was edited under ``drift = "keep"``;
* nothing outside the mirrors changed: a tree beside them, down to its inodes' ctimes, and the source.

And in the end, when all is healed: every mirror equals what its channel points at, nothing is staged or journaled,
every blob in the bucket is needed.

    SYNCD_STATE_EXAMPLES=2000 SYNCD_STATE_STEPS=60 scripts/test tests/e2e/test_state_machine.py -n 0 -s

is a long run (some two hours). ``SYNCD_STATE_SEED=n`` repeats one that failed (both numbers must be the same, too), and
``SYNCD_STATE_BLOB=b'...'`` the one example whose blob was printed, also in a changed program. ``SYNCD_STATE_SHRINK=1``
makes a failing example small first: it may take minutes.
"""

from __future__ import annotations

import ast
import os
import random
import shutil
import stat
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.support.fleet import FLEET, Proxy
from tests.support.forks import Forks, Job, Outcome
from tests.support.killpoints import Mode, points
from tests.support.mirror import litter
from tests.support.trees import root_digest, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.server import NatsServer

# Taken out of the environment: syncd refuses variables that look like its keys.
EXAMPLES = int(os.environ.pop("SYNCD_STATE_EXAMPLES", "10"))
STEPS = int(os.environ.pop("SYNCD_STATE_STEPS", "40"))
SEED = int(os.environ.pop("SYNCD_STATE_SEED", str(time.time_ns() % 2**32)))
BLOB = os.environ.pop("SYNCD_STATE_BLOB", "")
SHRINK = os.environ.pop("SYNCD_STATE_SHRINK", "") == "1"

NAMES = ["a", "a!", "b", "c d", "ü$(x)", "n\nl"]
SIZES = [0, 1, 300, 5_000, 70_000, 700_000]
MODES = [0o644, 0o600, 0o755, 0o444]
TIMES = [0, 1, 1_600_000_000_123_456_789, 2**31 * 10**9 + 7, 4_200_000_000_000_000_001]
KEPT = 3
"""Generations that a collection leaves."""
MORE_POINTS: dict[Mode, set[str]] = {
    "mirror": {"stage_write:4", "stage_finished:3", "after_each_step:2", "after_each_step:5", "after_each_step:9"},
    "release": {"stage_write:4", "stage_finished:3", "release_building:3", "release_removing:3"},
}
PULL_POINTS = {
    mode: sorted({point.name for point in points("subscriber", "generations", mode) if not point.hooked} | more)
    for mode, more in MORE_POINTS.items()
}
PUSH_POINTS = sorted(point.name for point in points("publisher", "generations"))
COLLECT_POINTS = sorted(point.name for point in points("collector", "generations"))

Tree = dict[str, tuple[Any, ...]]
Shape = tuple[str, str, Mode]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
CONTENTS = st.tuples(st.sampled_from(SIZES), st.integers(0, 3))
PUSH = st.sampled_from([True, True, False])
"""Whether a change is published at once."""
LOST_TOUCH = {"Unavailable", "StoreTimeout"}
"""What a process may end with whose network was cut meanwhile."""
USUAL: tuple[Shape, ...] = (("repair", "head", "mirror"), ("keep", "head", "mirror"), ("repair", "stable", "release"))
SHAPES: list[tuple[Shape, ...]] = [
    USUAL,
    USUAL,
    (("repair", "stable", "mirror"), ("keep", "head", "mirror"), ("repair", "head", "release")),
    (("repair", "head", "mirror"), ("keep", "stable", "mirror"), ("repair", "head", "release")),
]
"""Drift policy, channel and mode of the three subscribers."""
WHICH = st.integers(0, 99)
"""Which of what there is: a number modulo how many there are."""

T = TypeVar("T")


def content(size: int, tag: int) -> bytes:
    return random.Random(f"{size} {tag}").randbytes(size)


def chosen(things: list[T], which: int) -> T | None:
    return things[which % len(things)] if things else None


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when anybody touches a file that is not a mirror's."""
    now = path.lstat()
    return now.st_ino, now.st_mode, now.st_uid, now.st_gid, now.st_nlink, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def above(path: str) -> list[str]:
    """``a/b/c`` -> ``a``, ``a/b``."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


def leads_out(path: str, target: str) -> bool:
    """Such symlinks are not published."""
    return os.path.normpath(f"{path}/../{target}").startswith("..")


def below(path: str, tree: Any) -> list[str]:
    return [other for other in tree if other.startswith(path + "/")]


@dataclass(frozen=True)
class Commit:
    """A generation as the test knows it: the source at that moment."""

    tree: Tree
    root: str

    @property
    def leaves(self) -> set[str]:
        return {path for path, entry in self.tree.items() if entry[0] != "dir"}


@dataclass
class Host:
    """One subscriber, and what must be true of its mirror.

    :ivar applied: the generation that the mirror has, 0 for none, ``None`` after a kill: one of ``between``.
    :ivar pinned: somebody else's files, which must stay as they are; ``None``: ours, removed here and kept so.
    :ivar dirty: paths that somebody changed and syncd may, and with its next pull has to, put right.
    :ivar job: a pull that is frozen, or ``running``: thawed and not waited for.
    :ivar torn: its network was cut meanwhile.
    :ivar stale: a collection ran meanwhile.
    :ivar since: how many moves its channel had made when it began.
    :ivar explicit: the generation it was told to go to.
    """

    name: str
    mirror: Path
    index: Path
    drift: str
    channel: str
    mode: Mode
    proxy: Proxy
    applied: int | None = 0
    between: set[int] = field(default_factory=set)
    pinned: dict[str, bytes | None] = field(default_factory=dict)
    dirty: set[str] = field(default_factory=set)
    job: Job | None = None
    running: bool = False
    torn: bool = False
    stale: bool = False
    since: int = 0
    explicit: int = 0
    dirty_before: set[str] = field(default_factory=set)
    pinned_before: set[str] = field(default_factory=set)

    @property
    def root(self) -> Path:
        """Where the tree is."""
        return self.mirror / "current" if self.mode == "release" else self.mirror

    def tree(self) -> Tree:
        return snapshot(self.root)

    def wanted(self, commit: Commit) -> Tree:
        """What the mirror should have: a release is read-only."""
        if self.mode == "mirror":
            return commit.tree
        return {path: (entry[0], entry[1] and entry[1] & ~0o222, *entry[2:]) for path, entry in commit.tree.items()}

    def soil(self, path: str) -> None:
        """Somebody changed ``path``, and with it the time of the directory that holds it."""
        self.dirty |= {path, path.rpartition("/")[0]}
        self.dirty_before -= {path, path.rpartition("/")[0]}

    def is_excused(self, path: str, found: Tree) -> bool:
        """Tell whether a path may differ from the generation: somebody else's files are in the way there."""
        now = found.get(path)
        if path in self.dirty or path in self.pinned:
            return True
        if now is not None and now[0] == "dir" and any(self.pinned[p] is not None for p in below(path, self.pinned)):
            return True
        return now is None and any(self.pinned.get(parent) is not None for parent in above(path))

    def wrong(self, commit: Commit) -> dict[str, Any]:
        """Paths at which the mirror is not what the generation says."""
        found, want = self.tree(), self.wanted(commit)
        return {
            path: (found.get(path), want.get(path))
            for path in sorted(found.keys() | want.keys())
            if found.get(path) != want.get(path) and not self.is_excused(path, found)
        }


class Fleet(RuleBasedStateMachine):
    """See the module."""

    server: ClassVar[NatsServer]
    forks: ClassVar[Forks]
    directory: ClassVar[Path]
    numbers: ClassVar[count[int]] = count(1)
    left: ClassVar[list[str]] = []
    """Folders whose buckets are still to be looked through."""
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = f"app{next(self.numbers)}"
        base = self.base = self.directory / self.folder
        self.source = base / "source"
        self.outside = base / "outside"
        for path in (self.source, self.outside / "dir"):
            path.mkdir(parents=True)
        (self.source / "keep").write_text("a folder is never emptied")
        (self.outside / "file").write_text("not of syncd")
        (self.outside / "dir/a").write_text("nor this")
        (self.outside / "dir/link").symlink_to("../file")
        self.commits: dict[int, Commit] = {0: Commit({}, "")}
        self.moves: dict[str, list[int]] = {"head": [0], "stable": [0]}
        self.alive: set[int] = set()
        self.pending: Commit | None = None
        self.push_job: Job | None = None
        self.push_since = 0
        self.push_torn = False
        self.net = Proxy(self.server.port)
        self.restarted = False
        self.hosts: list[Host] = []
        (base / "syncd.toml").write_text(f'[nats]\nservers = ["{self.server.url}"]\n')
        self.untouched = self.stamps()
        self.locals = count(1)
        self.written = snapshot(self.source)

    def host(self, drift: str, channel: str, mode: Mode) -> Host:
        name = f"{channel}-{drift}-{mode}"
        mirror = self.base / name / "mirror"
        mirror.mkdir(parents=True)
        return Host(name, mirror, self.base / name / "index.db", drift, channel, mode, Proxy(self.server.port))

    def stamps(self) -> dict[str, tuple[int, ...]]:
        return {str(path): stamp(path) for path in [self.outside, *self.outside.rglob("*")]}

    # -- the source ----------------------------------------------------------------------------------------------------

    @property
    def is_publishing(self) -> bool:
        return self.push_job is not None

    def place(self, path: str) -> Path:
        """Make room for ``path``: what is there goes, whatever it is, and so does what is no directory above it."""
        target = self.source / path
        for parent in [self.source / name for name in above(path)]:
            if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
                parent.unlink()
            parent.mkdir(exist_ok=True)
        clear(target)
        return target

    def wrote(self, *, push: bool) -> None:
        self.written = snapshot(self.source)
        if push:
            self.push()

    def paths(self) -> list[str]:
        return sorted(path for path in self.written if path != "keep")

    @initialize(
        shapes=st.sampled_from(SHAPES), paths=st.lists(st.tuples(PATHS, CONTENTS), max_size=8), begin=st.integers(0, 9)
    )
    def plant(self, shapes: tuple[Shape, ...], paths: list[tuple[str, tuple[int, int]]], begin: int) -> None:
        self.hosts = [self.host(*shape) for shape in shapes]
        for path, what in paths:
            self.place(path).write_bytes(content(*what))
        self.wrote(push=begin < 9)
        if begin < 8:
            self.move("promote", "stable", 0)

    @rule(path=PATHS, what=CONTENTS, mode=st.sampled_from(MODES), push=PUSH)
    def write(self, path: str, what: tuple[int, int], mode: int, push: bool) -> None:
        if self.is_publishing:
            return
        target = self.place(path)
        target.write_bytes(content(*what))
        target.chmod(mode)
        self.wrote(push=push)

    @rule(which=WHICH, at=WHICH, push=PUSH)
    def edit(self, which: int, at: int, push: bool) -> None:
        """Change one byte of a file where it is, or begin an empty one."""
        files = [path for path in self.paths() if self.written[path][0] == "file"]
        path = chosen(files, which)
        if path is None or self.is_publishing:
            return
        data = bytearray((self.source / path).read_bytes() or b"\0")
        data[at * len(data) // 100] ^= 1
        with (self.source / path).open("r+b") as file:
            file.write(data)
        self.wrote(push=push)

    @rule(which=WHICH, to=PATHS, push=PUSH)
    def rename(self, which: int, to: str, push: bool) -> None:
        path = chosen(self.paths(), which)
        if path is None or self.is_publishing or to == path or to.startswith(path + "/") or path.startswith(to + "/"):
            return
        target = self.place(to)
        with suppress(FileNotFoundError):  # it was in what had to make room
            (self.source / path).rename(target)
            for moved in [target, *target.rglob("*")]:
                name = str(moved.relative_to(self.source))
                if moved.is_symlink() and leads_out(name, str(moved.readlink())):
                    moved.unlink()
        self.wrote(push=push)

    @rule(which=WHICH, push=PUSH)
    def delete(self, which: int, push: bool) -> None:
        path = chosen(self.paths(), which)
        if path is not None and not self.is_publishing:
            clear(self.source / path)
            self.wrote(push=push)

    @rule(which=WHICH, mode=st.sampled_from(MODES), push=PUSH)
    def chmod(self, which: int, mode: int, push: bool) -> None:
        path = chosen([path for path in self.paths() if self.written[path][0] != "symlink"], which)
        if path is not None and not self.is_publishing:
            (self.source / path).chmod(mode | 0o711 if self.written[path][0] == "dir" else mode)
            self.wrote(push=push)

    @rule(which=WHICH, when=st.sampled_from(TIMES), push=PUSH)
    def touch(self, which: int, when: int, push: bool) -> None:
        path = chosen(self.paths(), which)
        if path is not None and not self.is_publishing:
            os.utime(self.source / path, ns=(when, when), follow_symlinks=False)
            self.wrote(push=push)

    @rule(path=PATHS, push=PUSH)
    def make_dir(self, path: str, push: bool) -> None:
        if not self.is_publishing:
            self.place(path).mkdir()
            self.wrote(push=push)

    @rule(path=PATHS, to=PATHS, push=PUSH)
    def link(self, path: str, to: str, push: bool) -> None:
        """A symlink to something in the tree that may be there or not."""
        if not self.is_publishing:
            self.place(path).symlink_to(os.path.relpath("/" + to, os.path.dirname("/" + path)))  # noqa: PTH120
            self.wrote(push=push)

    # -- the publisher -------------------------------------------------------------------------------------------------

    def publisher(self, task: str, **more: Any) -> Job:
        return self.forks.start(
            FLEET + task,
            url=self.net.url,
            folder=self.folder,
            source=str(self.source),
            index=str(self.base / "publisher.db"),
            offline=self.net.is_cut,
            **more,
        )

    def begin_push(self, **how: Any) -> None:
        self.pending = Commit(self.written, root_digest(self.source))
        self.push_since = len(self.moves["head"])
        self.push_torn = self.net.is_cut
        self.push_job = self.publisher("push", **how)

    def take_commit(self, number: int) -> Commit:
        """What a generation must be; it may be the one whose publisher was killed before it could say so."""
        if number not in self.commits:
            assert number == max(self.commits) + 1
            assert self.pending is not None
            self.commits[number] = self.pending
            self.alive.add(number)
            self.moves["head"].append(number)
        return self.commits[number]

    def look_at_head(self) -> None:
        """Learn whether the publisher has committed."""
        number, root = self.forks.run(FLEET + "channel", url=self.server.url, folder=self.folder).value or (0, "")
        assert root == self.take_commit(number).root

    def end_push(self, outcome: Outcome) -> None:
        assert self.push_job is not None
        note(f"    {self.push_job.what}: {outcome}")
        self.push_job = None
        self.seen["pushes killed" if outcome.killed else outcome.error or "pushes"] += 1
        if outcome.killed or (self.push_torn and outcome.error in LOST_TOUCH):
            self.look_at_head()  # it may be committed, and its acknowledgement lost
        elif outcome.error:
            assert outcome.error == "WriteConflict", outcome
            assert len(self.moves["head"]) > self.push_since, "nobody moved the head"
        else:
            done = outcome.value
            assert (done["problems"], done["again"]) == ([], [])
            commit = self.take_commit(done["generation"])
            assert (commit.tree, commit.root) == (self.written, done["root"])
        self.pending = None

    def has_bucket(self) -> bool:
        return len(self.commits) > 1

    @rule()
    def push(self) -> None:
        if not self.is_publishing:
            self.begin_push()
            assert self.push_job is not None
            self.end_push(self.push_job.wait())

    @rule(path=PATHS, what=CONTENTS, point=st.sampled_from(PUSH_POINTS), freeze=st.booleans())
    def push_stops(self, path: str, what: tuple[int, int], point: str, freeze: bool) -> None:
        """A change, and a publisher that is killed or freezes; then the source stays as it is until that goes on."""
        if self.is_publishing or not self.has_bucket():
            return
        self.place(path).write_bytes(content(*what))
        self.wrote(push=False)
        self.begin_push(**{"freeze" if freeze else "crash": point})
        assert self.push_job is not None
        outcome = self.push_job.wait_frozen()
        if outcome is not None:
            self.end_push(outcome)

    @rule(kill=st.booleans())
    def push_goes_on(self, kill: bool) -> None:
        if self.push_job is None:
            return
        if kill:
            self.end_push(self.push_job.kill())
        else:
            self.push_job.thaw()
            self.end_push(self.push_job.wait())

    @rule(point=st.sampled_from(["", "", *COLLECT_POINTS]))
    def collect(self, point: str) -> None:
        """Keep three generations, and those that channels point at."""
        if self.is_publishing or not self.has_bucket():
            return
        outcome = self.publisher("collect", crash=point, keep=KEPT).wait()
        if self.net.is_cut:
            assert outcome.error in LOST_TOUCH, outcome
            return
        assert not outcome.error, outcome
        kept = set(sorted(self.alive)[-KEPT:]) | {moves[-1] for moves in self.moves.values()}
        self.alive &= kept  # where it was killed: some of the others may still be there
        for host in self.hosts:
            host.stale = host.job is not None

    @rule(which=WHICH)
    def promote(self, which: int) -> None:
        self.move("promote", "stable", which)

    @rule(which=WHICH, channel=st.sampled_from(["head", "stable"]))
    def rollback(self, which: int, channel: str) -> None:
        self.move("rollback", channel, which)

    def move(self, command: str, channel: str, which: int) -> None:
        """A person moves a channel by the command line, also while a publisher is about to commit."""
        if self.pending is not None:
            self.look_at_head()
        present = self.moves[channel][-1]
        numbers = sorted(number for number in self.alive if number != present)
        if command == "rollback":
            numbers = [number for number in numbers if number < present]
        number = chosen(numbers, which)
        if number is None:
            return
        arguments = [str(number)] if command == "promote" else ["--to", str(number)]
        config = ["--config", str(self.base / "syncd.toml")]
        done = self.forks.run(
            FLEET + "command", arguments=[command, self.folder, *arguments, "--channel", channel, *config]
        )
        assert done.value == 0, done
        self.seen[command] += 1
        self.moves[channel].append(number)

    # -- subscribers ---------------------------------------------------------------------------------------------------

    def begin_pull(self, host: Host, generation: int = 0, *, crash: str = "", freeze: str = "") -> Job:
        host.since = len(self.moves[host.channel]) - 1
        host.explicit = generation
        host.dirty_before = set(host.dirty)
        host.pinned_before = set(host.pinned)
        host.stale = host.running = False
        host.torn = host.proxy.is_cut
        host.job = self.forks.start(
            FLEET + "pull",
            url=host.proxy.url,
            folder=self.folder,
            mirror=str(host.mirror),
            index=str(host.index),
            generation=generation,
            drift=host.drift,
            channel=host.channel,
            offline=host.proxy.is_cut,
            rollout={"mode": host.mode},
            crash=crash,
            freeze=freeze,
        )
        return host.job

    def goals(self, host: Host) -> set[int]:
        """Where the channel pointed while the subscriber ran, or was told to go."""
        if host.explicit:
            return {host.explicit}
        heads = set(self.moves[host.channel][host.since :])
        if self.pending is not None and host.channel == "head":
            heads.add(max(self.commits) + 1)
        return heads

    def end_pull(self, host: Host, outcome: Outcome) -> None:
        goals = self.goals(host)
        assert host.job is not None
        note(f"    {host.name}: {host.job.what} to one of {sorted(goals)}: {outcome}")
        log = host.job.log
        host.job, host.running = None, False
        self.seen["pulls killed" if outcome.killed else outcome.error or "pulls"] += 1
        if outcome.killed:
            host.between |= goals | ({host.applied} if host.applied is not None else set())
            host.applied = None
        elif outcome.error:
            assert outcome.error in self.expected_errors(host, goals), f"{host.name}: {outcome}\n{log.read_text()}"
            self.find_out(host)
        else:
            self.check_pulled(host, outcome.value, goals)

    def expected_errors(self, host: Host, goals: set[int]) -> set[str]:
        expected = set()
        if host.torn:
            expected |= LOST_TOUCH
        if 0 in goals:
            expected |= {"NoGeneration", "BucketNotFound"}
        if host.stale or not goals <= self.alive:
            expected |= {"ObjectGone"}
        return expected

    def check_pulled(self, host: Host, done: dict[str, Any], goals: set[int]) -> None:
        number = done["generation"]
        commit = self.take_commit(number)
        assert number in goals, (number, goals)
        assert done["root"] == commit.root
        host.dirty -= host.dirty_before
        self.release(host, number)
        assert host.wrong(commit) == {}, f"{host.name} does not have generation {number}"
        for path in done["problems"]:
            assert self.may_be_a_problem(host, path), done["problems"]
        if done["exact"]:
            found = host.tree()
            since = host.dirty | (host.pinned.keys() - host.pinned_before)  # what it may not have seen, being frozen
            differ = {path for path, entry in commit.tree.items() if found.get(path) != entry} - since
            assert differ == set(), host.name
        if host.mode == "mirror" and not host.dirty and not host.pinned:
            assert done["exact"]
            assert root_digest(host.mirror) == done["root"]
        host.applied, host.between = number, set()

    def may_be_a_problem(self, host: Host, path: str) -> bool:
        around = {path, *above(path)} & (host.pinned.keys() | host.dirty)
        return bool(around or below(path, host.pinned) or below(path, host.dirty))

    def release(self, host: Host, number: int) -> None:
        """Forget what the policy gives away: under "repair", files where a generation has one of its own."""
        if host.drift == "repair":
            for path in host.pinned.keys() & self.commits[number].leaves:
                del host.pinned[path]

    def find_out(self, host: Host) -> None:
        """After a round that failed, or a start without network: it is exactly one of what it was between."""
        if host.applied is not None:
            return
        wrong = {number: host.wrong(commit) for number, commit in self.ends(host).items()}
        fits = [number for number in sorted(wrong) if not wrong[number]]
        assert fits, f"{host.name} is between generations: {wrong}"
        host.applied, host.between = fits[-1], set()
        self.take_commit(fits[-1])

    def ends(self, host: Host) -> dict[int, Commit]:
        """Return the generations between which a mirror may be now."""
        numbers = host.between | (self.goals(host) if host.job is not None else set())
        if host.applied is not None:
            numbers = numbers | {host.applied}
        found = {number: self.commits[number] for number in numbers & self.commits.keys()}
        if self.pending is not None and max(self.commits) + 1 in numbers:
            found[max(self.commits) + 1] = self.pending
        return found

    def idle(self, which: int) -> Host | None:
        return chosen([host for host in self.hosts if host.job is None], which)

    @rule(which=WHICH)
    def pull(self, which: int) -> None:
        host = self.idle(which)
        if host is not None:
            self.end_pull(host, self.begin_pull(host).wait())

    @rule(which=WHICH, number=WHICH)
    def pull_one(self, which: int, number: int) -> None:
        """Go to a generation that was, whatever the channel says."""
        host = self.idle(which)
        generation = chosen(sorted(self.commits.keys() - {0}), number)
        if host is not None and generation:
            self.end_pull(host, self.begin_pull(host, generation).wait())

    @rule(which=WHICH, at=WHICH, path=PATHS, what=CONTENTS)
    def pull_killed(self, which: int, at: int, path: str, what: tuple[int, int]) -> None:
        self.pull_stops(which, at, path, what, freezes=False)

    @rule(which=WHICH, at=WHICH, path=PATHS, what=CONTENTS)
    def pull_frozen(self, which: int, at: int, path: str, what: tuple[int, int]) -> None:
        self.pull_stops(which, at, path, what, freezes=True)

    def pull_stops(self, which: int, at: int, path: str, what: tuple[int, int], *, freezes: bool) -> None:
        """Something new, and a pull that stops at some point, if it gets there."""
        host = self.idle(which)
        if host is None:
            return
        self.write(path, what, MODES[at % len(MODES)], push=True)
        if host.channel == "stable":
            self.move("promote", "stable", -1)
        point = PULL_POINTS[host.mode][at % len(PULL_POINTS[host.mode])]
        crash, freeze = ("", point) if freezes else (point, "")
        outcome = self.begin_pull(host, crash=crash, freeze=freeze).wait_frozen()
        if outcome is not None:
            self.end_pull(host, outcome)
        else:
            self.seen["pulls frozen"] += 1
            note(f"    {host.name}: frozen at {point}")

    @rule(which=WHICH, kill=st.booleans())
    def pull_goes_on(self, which: int, kill: bool) -> None:
        host = chosen([host for host in self.hosts if host.job is not None], which)
        if host is None or host.job is None:
            return
        if kill:
            self.end_pull(host, host.job.kill())
            return
        host.job.thaw()
        host.running = True
        if not host.proxy.is_cut:
            self.end_pull(host, host.job.wait())

    @rule(which=WHICH, size=st.integers(1, 900_000), path=PATHS, what=CONTENTS)
    def pull_stutters(self, which: int, size: int, path: str, what: tuple[int, int]) -> None:
        """Something new, and a connection that ends while it is fetched, and comes back."""
        host = self.idle(which)
        if host is None or host.proxy.is_cut:
            return
        self.write(path, what, MODES[0], push=True)
        host.proxy.cut_after(size)
        job = self.begin_pull(host)
        while not host.proxy.was_cut.wait(0.005) and not job.has_ended():
            pass
        host.torn = host.proxy.is_cut
        host.proxy.mend()
        self.end_pull(host, job.wait())

    # -- the network ---------------------------------------------------------------------------------------------------

    @rule(which=WHICH)
    def cut(self, which: int) -> None:
        host = self.hosts[which % len(self.hosts)]
        host.proxy.cut()
        host.torn = True

    @rule(which=WHICH)
    def mend(self, which: int) -> None:
        host = chosen([host for host in self.hosts if host.proxy.is_cut], which)
        if host is not None:
            host.proxy.mend()

    @rule()
    def cut_publisher(self) -> None:
        self.net.cut()
        self.push_torn = True

    @rule()
    def mend_publisher(self) -> None:
        self.net.mend()

    @rule(path=PATHS, what=CONTENTS, size=st.integers(1, 9_000))
    def push_stutters(self, path: str, what: tuple[int, int], size: int) -> None:
        """A connection that ends while something is published, and comes back."""
        if self.is_publishing or self.net.is_cut:
            return
        self.write(path, what, MODES[0], push=False)
        self.net.cut_after(size)
        self.begin_push()
        assert self.push_job is not None
        while not self.net.was_cut.wait(0.005) and not self.push_job.has_ended():
            pass
        self.push_torn = self.net.is_cut
        self.net.mend()
        self.end_push(self.push_job.wait())

    @rule(kill=st.sampled_from([True, True, False]))
    def restart_server(self, kill: bool) -> None:
        """Once in an example: it takes a while. What is frozen meanwhile finds its connection gone."""
        if self.restarted:
            return
        self.restarted = True
        self.seen["servers killed" if kill else "servers stopped"] += 1
        self.push_torn = True
        for host in self.hosts:
            host.torn = True
        self.server.restart(kill=kill)
        deadline = time.monotonic() + 20
        while self.forks.run(FLEET + "channel", url=self.server.url, folder=self.folder).error in LOST_TOUCH:
            assert time.monotonic() < deadline, "the server does not come back"

    # -- what others do in the mirrors ---------------------------------------------------------------------------------

    def quiet(self, which: int) -> Host | None:
        """One in whose mirror nobody works just now, rather one that is in the middle of a pull: frozen or killed."""
        quiet = [host for host in self.hosts if not host.running]
        return chosen([host for host in quiet if host.job is not None or host.applied is None] or quiet, which)

    @rule(which=WHICH, where=WHICH, what=CONTENTS)
    def add_foreign(self, which: int, where: int, what: tuple[int, int]) -> None:
        """A file of a name that nobody publishes, in some directory of a mirror."""
        host = self.quiet(which)
        if host is None:
            return
        directories = [""]
        if host.mode == "mirror":
            directories += sorted(path for path, entry in host.tree().items() if entry[0] == "dir")
        directory = chosen(directories, where)
        self.own(host, f"{directory}/local-{next(self.locals)}".lstrip("/"), content(*what))

    @rule(which=WHICH, path=PATHS, what=CONTENTS)
    def squat(self, which: int, path: str, what: tuple[int, int]) -> None:
        """A file of a name that may be published some day."""
        host = self.quiet(which)
        if host is None or host.mode == "release":
            return
        tree = host.tree()
        if path not in {*tree, *host.pinned} and all(tree.get(name, " ")[0] == "dir" for name in above(path)):
            self.own(host, path, b"squatter " + content(*what))

    def own(self, host: Host, path: str, data: bytes) -> None:
        (host.mirror / path).write_bytes(data)
        (host.mirror / path).chmod(0o640)
        host.pinned[path] = data
        host.soil(path)
        host.dirty.discard(path)

    @rule(which=WHICH, where=WHICH, how=st.sampled_from(["edit", "replace", "delete", "chmod", "touch"]))
    def drift(self, which: int, where: int, how: str) -> None:
        """Somebody changes what syncd wrote."""
        host = self.quiet(which)
        if host is None:
            return
        tree = host.tree()
        ours = sorted(path for path in tree if path not in host.pinned and tree[path][0] != "dir")
        changing = [path for path in ours if len({end.tree.get(path) for end in self.ends(host).values()}) > 1]
        path = chosen(changing or ours, where)
        if path is None:
            return
        target = host.root / path
        if tree[path][0] == "symlink":
            how = "delete"
        if host.drift == "keep" and how == "delete" and (host.job is not None or host.applied is None):
            return  # a file that is being replaced may come back: nobody can tell that it was there a moment ago
        if how in {"edit", "replace"} and any(path not in end.tree for end in self.ends(host).values()):
            return  # it came with an apply that was killed: after a change nobody can tell it from a stranger's
        host.soil(path)
        if how == "chmod":
            target.chmod(0o751)
            return
        if how == "touch":
            os.utime(target, ns=(5, 5))
            return
        data: bytes | None = None
        if how == "delete":
            target.unlink()
        else:
            data = b"changed here " + (target.read_bytes() if how == "edit" else b"")
            if how == "replace":
                target.unlink()
            target.write_bytes(data)
        if host.drift == "keep":
            host.pinned[path] = data
            host.dirty.discard(path)

    @rule(which=WHICH, where=WHICH)
    def drift_dir(self, which: int, where: int) -> None:
        host = self.quiet(which)
        if host is None:
            return
        tree = host.tree()
        path = chosen(sorted(path for path, entry in tree.items() if entry[0] == "dir"), where)
        if path is not None:
            (host.root / path).chmod(0o750 if tree[path][1] != 0o750 else 0o700)
            host.soil(path)

    # -- all of it -----------------------------------------------------------------------------------------------------

    @rule()
    def heal(self) -> None:
        """Everything works again: each mirror equals what its channel points at."""
        self.net.mend()
        self.push_goes_on(kill=False)
        for host in self.hosts:
            host.proxy.mend()
            if host.job is not None:
                host.job.thaw()
                self.end_pull(host, host.job.wait())
        for host in self.hosts:
            self.begin_pull(host)
        for host in self.hosts:
            assert host.job is not None
            self.end_pull(host, host.job.wait())
            newest = self.moves[host.channel][-1]
            assert host.applied == newest or not newest  # a channel that points nowhere changes nothing
            assert litter(host.mirror) == [], host.name
            if host.mode == "release":
                assert not list((host.mirror / "releases").glob(".*"))
                assert {path.name for path in host.mirror.iterdir()} <= {".syncd", "current", "releases", *host.pinned}

    @invariant()
    def all_is_well(self) -> None:
        self.mirrors_are_generations()
        self.nothing_of_others_is_lost()
        self.nothing_outside_changed()

    def mirrors_are_generations(self) -> None:
        for host in self.hosts:
            if host.job is None and host.applied is not None:
                wrong = host.wrong(self.commits[host.applied])
                assert wrong == {}, f"{host.name} does not have generation {host.applied} any more"
            elif not host.running:
                self.check_between(host)

    def check_between(self, host: Host) -> None:
        """Each path is as in one of the generations; what all of them have as a file or symlink is there."""
        if host.mode == "release":
            wrong = {number: host.wrong(commit) for number, commit in self.ends(host).items()}
            assert {} in wrong.values(), f"{host.name} shows none of these: {wrong}"
            return
        trees = [commit.tree for commit in self.ends(host).values()]
        found = host.tree()
        for path in found.keys() | {path for tree in trees for path in tree}:
            if host.is_excused(path, found):
                continue
            now = found.get(path)
            whole = [tree.get(path) for tree in trees]
            if all(entry is not None and entry[0] != "dir" for entry in whole):
                assert now is not None, f"{host.name}: {path!r} is missing"
            if now is not None and now[0] != "dir":
                contents = [(entry[0], entry[3]) for entry in whole if entry is not None]
                assert (now[0], now[3]) in contents, f"{host.name}: {path!r} is of no generation"

    def nothing_of_others_is_lost(self) -> None:
        for host in self.hosts:
            for path, data in list(host.pinned.items()):
                target = host.mirror / path
                if data is not None and not self.may_be_given_away(host, path):
                    assert stat.S_ISREG(target.lstat().st_mode)
                    assert target.read_bytes() == data, f"{host.name}: {path!r} was overwritten"

    def may_be_given_away(self, host: Host, path: str) -> bool:
        return host.drift == "repair" and any(path in commit.leaves for commit in self.ends(host).values())

    def nothing_outside_changed(self) -> None:
        assert self.stamps() == self.untouched
        ours = {host.name for host in self.hosts} | {"source", "outside", "syncd.toml"}
        others = {path.name for path in self.base.iterdir()} - ours
        assert not {name for name in others if not name.startswith("publisher.db")}
        assert snapshot(self.source) == self.written

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.finish()
        finally:
            for job in [self.push_job, *(host.job for host in self.hosts)]:
                if job is not None:
                    job.kill()
            for proxy in [self.net, *(host.proxy for host in self.hosts)]:
                proxy.close()
        shutil.rmtree(self.base)

    def finish(self) -> None:
        """All is healed, and nothing is left of what was."""
        self.net.mend()
        self.push_goes_on(kill=False)
        self.push()
        self.heal()
        self.collect("")
        self.check_buckets()
        self.left.append(self.folder)

    def check_buckets(self) -> None:
        """Every blob is needed, in the buckets of examples before this one: what is removed leaves with a delay."""
        while self.left:
            folder = self.left.pop(0)
            deadline = time.monotonic() + 20
            while loose := self.forks.run(FLEET + "orphans", url=self.server.url, folder=folder).value:
                assert time.monotonic() < deadline, f"nothing needs these blobs of {folder}: {loose}"
                time.sleep(0.1)
            self.forks.run(FLEET + "drop", url=self.server.url, folder=folder)


@pytest.mark.slow
@pytest.mark.layout("generations")
@pytest.mark.fault("C1 C3 C4 D3 D4 D5 N1 R6 X4")
@pytest.mark.timeout(300 + EXAMPLES * STEPS)
def test_whatever_happens_mirrors_are_generations(
    nats_server: NatsServer, tmp_path: Path, record_property: Any
) -> None:
    """At random: edits, pushes, rollbacks, collections, kills (the server's, too), freezes, cut networks, drift.

    After each step a mirror is one generation, or path by path one of those it was between; others' files, and all
    outside, are as they were.
    """
    print(f"SYNCD_STATE_SEED={SEED} SYNCD_STATE_EXAMPLES={EXAMPLES} SYNCD_STATE_STEPS={STEPS}")
    Fleet.server, Fleet.directory, Fleet.forks = nats_server, tmp_path, Forks(tmp_path / "forks")
    Fleet.left.clear()
    Fleet.seen.clear()
    record_property("fault_runs", EXAMPLES)
    machine: Any = seed(SEED)(Fleet)
    if BLOB:
        machine = hypothesis.reproduce_failure(hypothesis.__version__, ast.literal_eval(BLOB))(Fleet)
    shrink = [Phase.shrink] if SHRINK else []
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                print_blob=True,
                phases=[Phase.explicit, Phase.reuse, Phase.generate, *shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        Fleet.forks.close()
        print(dict(Fleet.seen))


# -- what it found -----------------------------------------------------------------------------------------------------


class Pair:
    """A publisher and a mirror, each step a process of its own."""

    def __init__(self, directory: Path, server: NatsServer) -> None:
        self.forks = Forks(directory / "forks")
        self.directory, self.url = directory, server.url
        self.source, self.mirror = directory / "source", directory / "mirror"
        self.source.mkdir()
        self.mirror.mkdir()
        (self.source / "keep").write_text("k")
        (directory / "syncd.toml").write_text(f'[nats]\nservers = ["{server.url}"]\n')

    def push(self, crash: str = "") -> Outcome:
        index = str(self.directory / "publisher.db")
        return self.forks.run(
            FLEET + "push", url=self.url, folder="app", source=str(self.source), index=index, crash=crash
        )

    def pull(self, crash: str = "", **options: Any) -> Outcome:
        index = str(self.directory / "mirror.db")
        return self.forks.run(
            FLEET + "pull", url=self.url, folder="app", mirror=str(self.mirror), index=index, crash=crash, **options
        )

    def command(self, *arguments: str) -> int:
        config = ["--config", str(self.directory / "syncd.toml")]
        return int(self.forks.run(FLEET + "command", arguments=[*arguments, *config]).value)


@pytest.fixture
def pair(tmp_path: Path, nats_server: NatsServer) -> Iterator[Pair]:
    found = Pair(tmp_path, nats_server)
    yield found
    found.forks.close()


@pytest.mark.layout("generations")
@pytest.mark.fault("C4")
@pytest.mark.parametrize("to", ["1", "2"])
def test_a_commit_that_was_not_remembered_counts_although_the_head_was_moved_back(pair: Pair, to: str) -> None:
    """A publisher is killed (SIGKILL) right after a commit, before it remembers it; then the head is rolled back.

    The next push takes the number after it, instead of one for which it would be refused for ever.
    """
    for _ in range(2):
        pair.push()
        (pair.source / "file").write_bytes(os.urandom(10))
    assert pair.push("generation_committed").killed
    assert pair.push().value["generation"] == 3
    (pair.source / "file").write_bytes(os.urandom(10))
    assert pair.push("generation_committed").killed
    assert pair.command("rollback", "app", "--to", str(int(to) + 1)) == 0
    (pair.source / "file").write_bytes(os.urandom(10))
    assert pair.push().value["generation"] == 5
    assert pair.pull().value["generation"] == 5


@pytest.mark.layout("generations")
@pytest.mark.fault("C1")
def test_what_could_not_be_placed_does_not_fail_the_start_after_a_kill(pair: Pair) -> None:
    """A local directory with a file is in a published file's way; the pull is killed (SIGKILL) after it was applied.

    The next one goes through and tells a problem of that path; the local file is still there.
    """
    (pair.source / "path").write_text("a file")
    pair.push()
    (pair.mirror / "path").mkdir()
    (pair.mirror / "path/local").write_text("not of syncd")
    assert pair.pull("generation_applied").killed
    done = pair.pull()
    assert done.error == "", done
    assert done.value["problems"] == {"path": "directory_in_the_way"}
    assert (pair.mirror / "path/local").read_text() == "not of syncd"


@pytest.mark.layout("generations")
@pytest.mark.fault("D5")
def test_a_mirror_that_keeps_what_is_in_the_way_is_not_called_exact(pair: Pair) -> None:
    """A local file stands where one is published, and is pulled twice under drift = "keep"; then it is removed.

    It stays, round for round, and the mirror is not called exact; without it the file comes, and it is.
    """
    (pair.source / "path").write_text("published")
    pair.push()
    (pair.mirror / "path").write_text("not of syncd")
    for _ in range(2):
        assert pair.pull(drift="keep").value["exact"] is False
        assert (pair.mirror / "path").read_text() == "not of syncd"
    (pair.mirror / "path").unlink()
    assert pair.pull(drift="keep").value["exact"] is True
    assert (pair.mirror / "path").read_text() == "published"
