"""Generations on their way into place: hooks before and after, releases, the way back, pins, channels, modes."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd import rollout
from syncd import subscriber as subscribers
from syncd.audit import Takes, audit
from syncd.channels import Channels
from syncd.checkout import Held
from syncd.errors import DiskProblem, ObjectGone, Unavailable, UsageError
from syncd.mirror import Mirror
from syncd.modes import ModePolicy
from syncd.outlet import PublishOptions
from syncd.publisher import Publisher
from syncd.rollout import Rollout, RolloutOptions
from syncd.rules import Rules
from syncd.signatures import Signer, generate
from syncd.statedir import StateDir
from syncd.status import FolderState, FolderStatus, StatusKeeper
from syncd.store.memory import MemoryBucket, MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.trust import Trust

if TYPE_CHECKING:
    from syncd.upstream import PullResult

MODES = pytest.mark.parametrize("mode", ["mirror", "release"])


class Site:
    """One publisher and one host on the memory twin; hooks are shell scripts that write into ``log``."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.store = MemoryStore()
        self.source = tmp / "source"
        self.source.mkdir()
        self.root = tmp / "mirror"
        self.log = tmp / "log"
        self.options = RolloutOptions(health_seconds=0.5, timeout=10)
        self.extra: dict[str, Any] = {}
        self.pinned = 0
        self.signer: Signer | None = None

    def hook(self, text: str) -> tuple[str, ...]:
        return ("/bin/sh", "-c", text, "hook", str(self.log))

    def says(self, word: str, condition: str = "true") -> tuple[str, ...]:
        """A hook that notes its word, generation and what it comes after, and succeeds on a condition."""
        return self.hook(f'echo "{word} $SYNCD_GENERATION after ${{SYNCD_PREVIOUS:-none}}" >> "$1"; {condition}')

    def told(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    async def push(self, **files: str | None) -> int:
        for name, text in files.items():
            path = self.source / name
            if text is None:
                path.unlink()
            else:
                path.write_text(text)
        options = PublishOptions("app", self.source, Rules(), "here:/source", signer=self.signer)
        status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=lambda _: None)
        result = await Publisher(options, self.store, self.tmp / "publish.db", status=status).push(allow_delete=True)
        return result.generation

    def subscriber(self, report: Any = lambda _: None) -> Subscriber:
        options = SubscribeOptions("app", self.root, Rules(), rollout=self.options, **self.extra)
        status = StatusKeeper(FolderStatus("subscribe", "app", str(self.root)), clock=time.time, report=report)
        index = self.tmp / "state" / "index.db"
        index.parent.mkdir(exist_ok=True)
        return Subscriber(options, self.store, index, status=status, pin=lambda: self.pinned)

    async def pull(self, **arguments: Any) -> PullResult:
        return await self.subscriber().pull(**arguments)

    @property
    def tree(self) -> Path:
        return self.root / "current" if self.options.mode == "release" else self.root

    def files(self) -> dict[str, str]:
        return {
            path.name: path.read_text()
            for path in sorted(self.tree.iterdir())
            if path.is_file() and not path.name.startswith(".")
        }

    def releases(self) -> list[str]:
        return sorted(path.name for path in (self.root / "releases").iterdir())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


# -- check -------------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.fault("R2")
async def test_what_the_check_refuses_changes_nothing(site: Site, mode: Any) -> None:
    """A real check hook finds a bad file in the staged tree of generation 2 and fails.

    The mirror stays as it was, the hook is not asked again, and generation 3 is applied.
    """
    check = site.hook('echo "$(cat "$SYNCD_STAGED"/*)" >> "$1"; test ! -e "$SYNCD_STAGED/bad"')
    site.options = replace(site.options, mode=mode, check=check)
    await site.push(a="one", same="s")
    await site.pull()
    await site.push(a="two", bad="!")
    with pytest.raises(Held, match="check hook: exit code 1"):
        await site.pull()
    assert site.files() == {"a": "one", "same": "s"}
    assert site.told() == ["ones", "two!s"]
    with pytest.raises(Held):  # not tried again: the hook is not asked
        await site.pull()
    assert len(site.told()) == 2
    await site.push(bad=None, a="three")
    assert (await site.pull()).generation == 3
    assert site.files() == {"a": "three", "same": "s"}


@MODES
async def test_the_mirror_is_kept_as_it_must_be_while_a_generation_is_held(site: Site, mode: Any) -> None:
    """Drift is repaired from the generation before."""
    site.options = replace(site.options, mode=mode, check=site.hook('test ! -e "$SYNCD_STAGED/bad"'))
    await site.push(a="one", b="b")
    await site.pull()
    await site.push(a="two", bad="!")
    with pytest.raises(Held):
        await site.pull()
    (site.tree / "b").unlink() if mode == "mirror" else _force_out(site.tree / "b")
    with pytest.raises(Held):
        await site.pull()
    assert site.files() == {"a": "one", "b": "b"}


def _force_out(path: Path) -> None:
    path.resolve().parent.chmod(0o755)
    path.unlink()


@MODES
async def test_a_check_that_refuses_the_first_generation_leaves_nothing(site: Site, mode: Any) -> None:
    """There is nothing to be at: nothing appears."""
    site.options = replace(site.options, mode=mode, check=site.hook("false"))
    await site.push(a="one")
    for _ in range(2):
        with pytest.raises(Held):
            await site.pull()
    assert not (site.tree / "a").exists()


# -- apply and health --------------------------------------------------------------------------------------------------


@MODES
async def test_hooks_run_where_nobody_publishes(site: Site, mode: Any) -> None:
    """Not in the mirror: python -m and the like would find the publisher's modules."""
    where = site.hook('pwd >> "$1"')
    site.options = replace(site.options, mode=mode, check=where, apply=where, health=where)
    await site.push(a="one")
    await site.pull()
    assert site.told() == ["/", "/", "/"]


@MODES
async def test_apply_runs_once_after_the_whole_set(site: Site, mode: Any) -> None:
    """It sees all new files, and the list of what changed; a round without changes runs nothing."""
    apply = site.hook(
        'echo "$(cat "$SYNCD_PATH/a" "$SYNCD_PATH/b") $(tr "\\n\\t" ",:" < "$SYNCD_CHANGED_FILE")" >> "$1"'
    )
    site.options = replace(site.options, mode=mode, apply=apply)
    await site.push(a="1", b="2", c="3")
    await site.pull()
    await site.pull()
    await site.push(a="4", c=None)
    await site.pull()
    assert site.told() == ["12 A:a,A:b,A:c,", "42 M:a,D:c,"]


@MODES
@pytest.mark.parametrize("which", ["apply", "health"])
@pytest.mark.fault("R1")
async def test_a_failing_hook_goes_back_to_the_generation_before(site: Site, mode: Any, which: str) -> None:
    """A real apply or health hook finds a bad word in a file of generation 2 and fails.

    Generation 1 comes back and its hooks run again; 2 is not tried again, and 3 is applied.
    """
    good = '! grep -q bad "$SYNCD_PATH/a"'
    hooks = {"apply": site.says("apply"), "health": site.says("health")} | {which: site.says(which, good)}
    site.options = replace(site.options, mode=mode, health_seconds=1.5, apply=hooks["apply"], health=hooks["health"])
    await site.push(a="one", b="b")
    await site.pull()
    await site.push(a="bad", c="c")
    for _ in range(2):
        with pytest.raises(Held, match=f"{which} hook: exit code 1"):
            await site.pull()
        assert site.files() == {"a": "one", "b": "b"}
    assert site.told()[0] == "apply 1 after none"
    assert [line for line in site.told() if line.startswith("apply")][1:] == ["apply 2 after 1", "apply 1 after 2"]
    await site.push(a="good")
    assert (await site.pull()).generation == 3
    assert site.files() == {"a": "good", "b": "b", "c": "c"}


async def test_health_is_tried_until_it_succeeds(site: Site) -> None:
    """What needs a moment gets it."""
    site.options = replace(site.options, health_seconds=10, health=site.says("health", 'test "$(wc -l < "$1")" -ge 2'))
    await site.push(a="one")
    assert (await site.pull()).generation == 1
    assert len(site.told()) == 2


@MODES
async def test_a_first_generation_that_fails_stays_and_says_so(site: Site, mode: Any) -> None:
    """There is nothing to go back to."""
    site.options = replace(site.options, mode=mode, health_seconds=1.5, health=site.hook("false"))
    await site.push(a="one")
    with pytest.raises(Held, match="no generation to go back to"):
        await site.pull()
    assert site.files() == {"a": "one"}
    await site.push(a="two")
    with pytest.raises(Held):
        await site.pull()


@MODES
async def test_a_person_has_a_refused_generation_tried_again(site: Site, mode: Any) -> None:
    """``syncd allow`` forgets refusals; it allows no deletion by that."""
    site.options = replace(site.options, mode=mode, check=site.says("check", 'test -e "$1.good"'))
    await site.push(a="one")
    given = [False]

    class Word:
        def given(self) -> bool:
            return given[0]

        def clear(self) -> None:
            given[0] = False

    states: list[FolderStatus] = []
    subscriber = site.subscriber(states.append)
    subscriber._allowance = Word()  # type: ignore[assignment]
    running = asyncio.create_task(subscriber.run())
    try:
        await _until(lambda: bool(states) and states[-1].state is FolderState.HALTED)
        site.log.with_name("log.good").touch()
        given[0] = True
        await _until(lambda: states[-1].generation == 1)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert site.files() == {"a": "one"}


async def test_one_word_is_one_more_try(site: Site) -> None:
    """What is refused again after ``syncd allow`` is held again; the word is used up."""
    site.options = replace(site.options, check=site.says("check", "false"))
    await site.push(a="one")
    given = [False]

    class Word:
        def given(self) -> bool:
            return given[0]

        def clear(self) -> None:
            given[0] = False

    states: list[FolderStatus] = []
    subscriber = site.subscriber(states.append)
    subscriber._allowance = Word()  # type: ignore[assignment]
    running = asyncio.create_task(subscriber.run())
    try:
        await _until(lambda: bool(states) and states[-1].state is FolderState.HALTED)
        given[0] = True
        await _until(lambda: len(site.told()) == 2 and states[-1].state is FolderState.HALTED)
        assert not given[0]
        await asyncio.sleep(1.2)  # two looks for a word
        assert len(site.told()) == 2
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@MODES
async def test_a_generation_of_the_same_tree_runs_nothing(site: Site, mode: Any) -> None:
    """A tree that was committed anew (lost blobs came back) changes nothing here: no hook, no new release."""
    site.options = replace(site.options, mode=mode, apply=site.says("apply"), check=site.says("check"))
    await site.push(a="one")
    await site.pull()
    stream = site.store.stream("app")
    for digest in [name for name in stream.chunks if len(name) == 64]:
        stream.chunks.pop(digest)
    assert await site.push() == 2
    assert (await site.pull()).generation == 2
    assert [line.split()[0] for line in site.told()] == ["check", "apply"]
    await site.push(a="two")
    await site.pull()
    assert site.told()[-1] == "apply 3 after 2"


# -- crashes -----------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def point(at: str) -> None:
        if at == name:
            raise Crash

    monkeypatch.setattr(rollout, "crash_point", point)


@MODES
@pytest.mark.parametrize("point", ["hooks_begun", "hook_ended", "hooks_done"])
@pytest.mark.fault("C3", "R1")
async def test_hooks_that_were_cut_off_run_at_the_next_start(
    site: Site, mode: Any, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round is cut off (exception) where hooks begin, after the first one, or when all are done.

    The next start runs all of them, or none if all were done; the one after that none.
    """
    site.options = replace(site.options, mode=mode, apply=site.says("apply"), health=site.says("health"))
    await site.push(a="one")
    crash_at(monkeypatch, point)
    with pytest.raises(Crash):
        await site.pull()
    monkeypatch.undo()
    done = point == "hooks_done"
    assert done or len(site.told()) < 2
    site.log.unlink(missing_ok=True)
    assert (await site.pull()).generation == 1
    assert site.told() == ([] if done else ["apply 1 after none", "health 1 after none"])
    site.log.unlink(missing_ok=True)
    await site.pull()
    assert site.told() == []


@MODES
@pytest.mark.fault("C7")
async def test_a_crash_loop_is_capped(site: Site, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is cut off (exception) at the end of its apply hook, in two starts, where two are allowed.

    The third goes back to the generation before and says why.
    """
    site.options = replace(site.options, mode=mode, max_failures=2, apply=site.says("apply"))
    await site.push(a="one")
    await site.pull()
    await site.push(a="two")
    crash_at(monkeypatch, "hook_ended")
    for _ in range(2):
        with pytest.raises(Crash):
            await site.pull()
    assert site.files() == {"a": "two"}
    monkeypatch.undo()
    with pytest.raises(Held, match="began 2 times and never ended"):
        await site.pull()
    assert site.files() == {"a": "one"}


@MODES
@pytest.mark.fault("C7")
@pytest.mark.parametrize("point", ["checked", "in the midst of it"])
async def test_a_crash_loop_before_the_hooks_is_capped(
    site: Site, mode: Any, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round is cut off (exception) after its check or in its commit, in two starts, where two are allowed.

    The third does not begin it again and says why; a newer generation is tried.
    """
    site.options = replace(site.options, mode=mode, max_failures=2, check=site.says("check"), apply=site.says("apply"))
    await site.push(a="one", b="one")
    await site.pull()
    await site.push(a="two", b="two")
    if point == "checked":
        crash_at(monkeypatch, point)
    else:

        def dies(*_: Any, **__: Any) -> None:
            raise Crash

        monkeypatch.setattr(Mirror, {"mirror": "commit", "release": "publish_release"}[mode], dies)
    for _ in range(2):
        with pytest.raises(Crash):
            await site.pull()
    for _ in range(2):
        with pytest.raises(Held, match="its application began 2 times and never ended"):
            await site.pull()
        monkeypatch.undo()
    assert site.files() == {"a": "one", "b": "one"}
    assert [line for line in site.told() if line.startswith("check")] == [
        "check 1 after none",
        *["check 2 after 1"] * (2 if point == "checked" or mode == "release" else 1),
    ]
    await site.push(a="three")
    assert (await site.pull()).generation == 3
    assert site.files() == {"a": "three", "b": "two"}


@MODES
async def test_a_stop_in_the_midst_of_it_is_no_verdict(site: Site, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarted again and again, or refused by the disk, a good generation is not refused for it."""
    site.options = replace(site.options, mode=mode, max_failures=1, check=site.says("check"))
    await site.push(a="one")
    await site.pull()
    await site.push(a="two")

    for end in (asyncio.CancelledError, DiskProblem("the disk")) * 2:

        async def stopped(*_: Any, end: Any = end) -> None:
            raise end

        with monkeypatch.context() as patch:
            patch.setattr(Rollout, "_check", stopped)
            with pytest.raises((asyncio.CancelledError, DiskProblem)):
                await site.pull()
    assert (await site.pull()).generation == 2


@MODES
@pytest.mark.parametrize("hook", ["apply", "health"])
async def test_a_word_on_what_stayed_in_place_runs_its_hooks_again(site: Site, mode: Any, hook: str) -> None:
    """There was nothing to go back to: a person's word is one more try, and not the end of it."""
    good = site.root.parent / "good"
    site.options = replace(site.options, mode=mode, **{hook: site.says(hook, f"test -e {good}")})
    await site.push(a="one")
    with pytest.raises(Held, match="no generation to go back to"):
        await site.pull()
    tries = len(site.told())
    with pytest.raises(Held):
        await site.pull()
    assert len(site.told()) == tries
    with pytest.raises(Held):
        await site.pull(allow_delete=True)
    assert len(site.told()) > tries
    good.touch()
    with pytest.raises(Held):
        await site.pull()
    await site.pull(allow_delete=True)
    assert (await site.pull()).generation == 1


async def test_a_stop_during_the_hooks_is_no_verdict(site: Site) -> None:
    """Restarted again and again in the middle of a long hook, a good generation is not refused for it."""
    site.options = replace(
        site.options, max_failures=2, apply=site.hook('echo begun >> "$1"; test -e "$1.quick" || sleep 60')
    )
    await site.push(a="one")
    for count in range(1, 5):
        running = asyncio.create_task(site.subscriber().run())
        await _until(lambda count=count: len(site.told()) == count)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    site.log.with_name("log.quick").touch()
    assert (await site.pull()).generation == 1


@MODES
@pytest.mark.fault("X2", "R1")
async def test_a_hook_that_cannot_be_started_is_no_verdict(
    site: Site, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting a process is made to fail with EMFILE in four rounds.

    Each fails as a DiskProblem and the generation is not refused: the fifth applies it, with its hooks.
    """
    site.options = replace(site.options, mode=mode, check=site.says("check"), apply=site.says("apply"))
    await site.push(a="one")

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", refuse)
        for _ in range(4):
            with pytest.raises(DiskProblem, match="could not be started"):
                await site.pull()
    assert (await site.pull()).generation == 1
    assert site.told() == ["check 1 after none", "apply 1 after none"]


@pytest.mark.parametrize("point", ["release_switched"])
@pytest.mark.fault("C3")
async def test_a_switch_that_was_not_remembered_is_taken_up(
    site: Site, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round is cut off (exception) after the switch to a new release, before that is remembered.

    The next start takes the current release as it is, downloads nothing, and runs its hooks.
    """
    site.options = replace(site.options, mode="release", apply=site.says("apply"))
    await site.push(a="one")
    await site.pull()
    await site.push(a="two")
    crash_at(monkeypatch, point)
    with pytest.raises(Crash):
        await site.pull()
    monkeypatch.undo()
    assert site.files() == {"a": "two"}
    result = await site.pull()
    assert (result.generation, result.downloaded_bytes) == (2, 0)
    assert site.told() == ["apply 1 after none", "apply 2 after 1"]


# -- releases ----------------------------------------------------------------------------------------------------------


async def test_releases_stand_side_by_side_and_are_pruned(site: Site) -> None:
    """Each generation has its directory; the newest few are kept; unchanged files are shared."""
    site.options = replace(site.options, mode="release", keep_releases=2, modes=ModePolicy(read_only=True))
    await site.push(same="always")
    for text in "123":
        await site.push(a=text)
        await site.pull()
    names = site.releases()
    assert [name.split("-")[0] for name in names] == ["3", "4"]
    assert (site.root / "current").resolve().name == names[-1]
    one, other = (site.root / "releases" / name / "same" for name in names)
    assert one.stat().st_ino == other.stat().st_ino
    assert not os.access(other, os.W_OK) or os.geteuid() == 0
    assert other.stat().st_mode & 0o222 == 0


async def test_going_back_to_a_kept_release_downloads_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rename: neither blobs nor nodes are asked for, and everything is as it was."""
    site.options = replace(site.options, mode="release")
    for text in "12":
        await site.push(a=text, **{f"only{text}": text})
        await site.pull()
    first = site.releases()[0]
    await Channels(site.store.bucket("app"), time.time).rollback("head", to=1, who="me", why="")

    def refuse(*_: Any) -> Any:
        raise AssertionError("a blob was asked for")

    with monkeypatch.context() as patched:
        patched.setattr(type(site.store.bucket("app")), "get_blobs", refuse)
        result = await site.pull()
    assert (result.generation, result.downloaded_bytes) == (1, 0)
    assert (site.root / "current").resolve().name == first
    assert site.files() == {"a": "1", "only1": "1"}
    await site.push(a="3")
    assert (await site.pull()).generation == 3
    assert site.files() == {"a": "3", "only1": "1", "only2": "2"}


async def fails_and_server_goes(site: Site, monkeypatch: pytest.MonkeyPatch, hook: str, **options: Any) -> None:
    """Generation 2 is in place when its hook fails, and the server is away from the first run of that on."""
    site.options = replace(site.options, **options, **{hook: site.says(hook, "! grep -q bad $SYNCD_PATH/a")})
    await site.push(a="good", b="b")
    await site.pull()
    site.log.unlink()
    await site.push(a="bad")
    real = Rollout._run

    async def run(self: Rollout, *arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(MemoryBucket, "state", away)
        monkeypatch.setattr(MemoryBucket, "get_info", away)
        return await real(self, *arguments, **named)

    monkeypatch.setattr(Rollout, "_run", run)


async def away(*_: Any) -> None:
    raise Unavailable("the server is away")


@pytest.mark.fault("R1", "N1")
@pytest.mark.parametrize("hook", ["apply", "health"])
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_release_goes_back_without_a_server(
    site: Site, hook: str, restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release's real hook fails, and from then on the bucket's calls raise; also with a cut and a new start between.

    The release before is gone back to with nobody asked, and the failure is told.
    """
    await fails_and_server_goes(site, monkeypatch, hook, mode="release", keep_releases=2)
    if restarted:
        crash_at(monkeypatch, "hooks_begun")
        with pytest.raises(Crash):
            await site.pull()
        monkeypatch.undo()
        assert site.files()["a"] == "bad"
        monkeypatch.setattr(MemoryBucket, "state", away)
    states: list[FolderStatus] = []
    with pytest.raises(Unavailable):
        await site.subscriber(states.append).pull()
    assert site.files() == {"a": "good", "b": "b"}
    assert site.told()[-1] == f"{hook} 1 after 2"
    [problem] = states[-1].problems
    assert problem.text.startswith(f"generation 2 failed here: {hook} hook: exit code 1")
    monkeypatch.undo()
    with pytest.raises(Held):
        await site.pull()
    assert site.files() == {"a": "good", "b": "b"}
    assert len(site.told()) <= 2 + (hook == "health") * 10


@pytest.mark.fault("R1", "R7")
@pytest.mark.parametrize("pinned", [False, True])
async def test_a_release_goes_back_to_what_was_collected(site: Site, pinned: bool) -> None:
    """Generation 1 is deleted from the bucket and kept here; the real health hook of 2 fails, pinned or not.

    The kept release is gone back to, and generation 3 is applied.
    """
    hook = site.says("health", "! grep -q bad $SYNCD_PATH/a")
    site.options = replace(site.options, mode="release", keep_releases=2, health=hook)
    await site.push(a="good")
    await site.pull()
    await site.push(a="bad")
    bucket = site.store.bucket("app")
    await bucket.delete("generations/0000000001", expected_seq=None, metadata={})
    if pinned:
        site.extra = {"pin": 2}
    for _ in range(2):
        with pytest.raises(Held):
            await site.pull()
        assert site.files() == {"a": "good"}
    site.extra = {}
    await site.push(a="better")
    await site.pull()
    assert site.files() == {"a": "better"}


@pytest.mark.fault("R1", "R7")
async def test_a_mirror_stays_where_what_was_before_is_gone(site: Site) -> None:
    """Generation 1 is deleted from the bucket, and the real health hook of 2 fails in a mirror without releases.

    It stays at 2 and says so, repairs drift there, and goes on to 3.
    """
    site.options = replace(site.options, health=site.says("health", "! grep -q bad $SYNCD_PATH/a"))
    await site.push(a="good", b="b")
    await site.pull()
    await site.push(a="bad")
    bucket = site.store.bucket("app")
    await bucket.delete("generations/0000000001", expected_seq=None, metadata={})
    for _ in range(2):
        with pytest.raises(Held, match="generation 1, the last one that ended well here, is not gone back to"):
            await site.pull()
        assert site.files() == {"a": "bad", "b": "b"}
        (site.root / "b").write_text("drifted")
    with pytest.raises(Held):
        await site.pull()
    assert site.files() == {"a": "bad", "b": "b"}
    await site.push(a="better")
    await site.pull()
    assert site.files() == {"a": "better", "b": "b"}


@pytest.mark.fault("K9", "R1")
@pytest.mark.parametrize("trusted", [True, False])
async def test_k9_a_release_goes_back_alone_only_to_what_is_trusted_today(
    site: Site, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host is cut off (exception) as a bad release's hooks begin, and the bucket's calls raise; its hook fails.

    It goes back to the kept release only if that one's key is still trusted by the configuration.
    """
    one, two = (Signer(generate()[0]) for _ in range(2))
    both = Trust(frozenset({one.public, two.public}), 1)
    site.options = replace(site.options, mode="release", apply=site.says("apply", "! grep -q bad $SYNCD_PATH/a"))
    for signer, text in ((one, "good"), (two, "bad")):
        site.extra, site.signer = {"trust": both}, signer
        await site.push(a=text)
        if text == "bad":
            crash_at(monkeypatch, "hooks_begun")
        with nullcontext() if text == "good" else pytest.raises(Crash):
            await site.pull()
    monkeypatch.undo()
    monkeypatch.setattr(MemoryBucket, "state", away)
    site.extra = {"trust": both if trusted else Trust(frozenset({two.public}), 1)}
    with pytest.raises(Unavailable):
        await site.pull()
    assert site.files() == {"a": "good" if trusted else "bad"}


@pytest.mark.fault("R2")
async def test_a_kept_release_is_checked_before_it_is_switched_to(site: Site) -> None:
    """A check hook is new, and the channel is rolled back to a kept release with a file that it refuses.

    It is not switched to, and not asked again; another hook lets it pass.
    """
    site.options = replace(site.options, mode="release", keep_releases=5)
    for text in ("bad", "good"):
        await site.push(a=text)
        await site.pull()
    site.options = replace(
        site.options, check=site.hook('echo "$SYNCD_STAGED" >> "$1"; ! grep -q bad "$SYNCD_STAGED/a"')
    )
    await Channels(site.store.bucket("app"), time.time).rollback("head", to=1, who="somebody")
    for _ in range(2):
        with pytest.raises(Held, match="check hook"):
            await site.pull()
        assert site.files() == {"a": "good"}
    [staged] = site.told()
    assert Path(staged).parent == site.root / "releases"
    site.options = replace(site.options, check=site.hook("true"))
    await site.pull(allow_delete=True)
    assert site.files() == {"a": "bad"}


@pytest.mark.parametrize("drift", ["repair", "report", "keep"])
@pytest.mark.parametrize("how", ["removed", "elsewhere", "older", "missing release"])
async def test_a_link_that_was_moved_is_drift(site: Site, how: str, drift: str) -> None:
    """By a running daemon as well: programs read through nothing else."""
    site.options = replace(site.options, mode="release")
    site.extra = {"drift": drift, "rescan_seconds": 0.1}
    for text in ("one", "two"):
        await site.push(a=text)
        await site.pull()
    states: list[FolderStatus] = []
    running = asyncio.create_task(site.subscriber(states.append).run())
    link = site.root / "current"
    try:
        await _until(lambda: bool(states) and states[-1].state is FolderState.IN_SYNC)
        good = link.readlink()
        link.unlink()
        if how != "removed":
            older = next(name for name in site.releases() if name.startswith("1-"))
            link.symlink_to({"elsewhere": "/etc", "older": f"releases/{older}"}.get(how, "releases/9-0123abcd"))
        if drift == "repair" and how == "elsewhere":  # somebody's, and not ours to remove
            await _until(lambda: "which syncd did not make" in states[-1].error)
        elif drift == "repair":
            await _until(lambda: os.path.lexists(link) and link.readlink() == good)
        elif drift == "report":
            await _until(lambda: any(problem.path == "current" for problem in states[-1].problems))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert (os.path.lexists(link) and link.readlink() == good) is (drift == "repair" and how != "elsewhere")


async def test_drift_in_the_current_release_is_repaired_there(site: Site) -> None:
    """What somebody forced into a release is put right in place; other releases are not touched."""
    site.options = replace(site.options, mode="release")
    await site.push(a="one", b="two")
    await site.pull()
    path = site.tree / "a"
    path.resolve().parent.chmod(0o755)
    path.unlink()
    path.write_text("forged")
    await site.pull()
    assert site.files() == {"a": "one", "b": "two"}
    assert len(site.releases()) == 1


@pytest.mark.parametrize(
    ("options", "extra", "said"),
    [
        ({"mode": "release"}, {}, "release mode cannot build from"),
        ({}, {"pin": 3}, "knows no generations"),
        ({}, {"channel": "stable"}, r"has no channels \('stable'\)"),
        *(({hook: ("true",)}, {}, "runs no hooks") for hook in ("check", "apply", "health")),
    ],
    ids=str,
)
async def test_what_needs_generations_is_refused_where_there_are_none(
    site: Site, options: dict[str, Any], extra: dict[str, Any], said: str
) -> None:
    """The objects layout knows nothing whole; what is asked for is not left out in silence."""
    objects = PublishOptions("app", site.source, Rules(), "here:/source", layout="objects")
    status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=lambda _: None)
    (site.source / "a").write_text("one")
    await Publisher(objects, site.store, site.tmp / "publish.db", status=status).push()
    site.options, site.extra = replace(site.options, **options), extra
    with pytest.raises(UsageError, match=said):
        await site.pull()
    assert not (site.root / "current").exists()
    assert not (site.root / "a").exists()


async def test_a_channel_that_is_not_there_is_named(site: Site) -> None:
    """It is no folder without generations: what to do is in the hint."""
    await site.push(a="one")
    site.extra = {"channel": "slow"}
    with pytest.raises(Unavailable, match="no channel 'slow'") as told:
        await site.pull()
    assert "syncd promote app N --channel slow" in told.value.hint


async def test_a_mirror_becomes_a_release_mirror_and_back(site: Site) -> None:
    """The setting changes on the same generation: the release is built, and the other way round the paths appear."""
    await site.push(a="one", b="two")
    await site.pull()
    site.options = replace(site.options, mode="release")
    assert (await site.pull()).generation == 1
    assert site.files() == {"a": "one", "b": "two"}
    site.options = replace(site.options, mode="mirror")
    assert (await site.pull()).generation == 1
    assert site.files() == {"a": "one", "b": "two"}


@pytest.mark.parametrize("how", ["removed", "dangling"])
async def test_a_lost_link_is_made_again(site: Site, how: str) -> None:
    """``current`` is gone, or leads nowhere, although the release is whole: it is switched to again."""
    site.options = replace(site.options, mode="release")
    await site.push(a="one")
    await site.pull()
    current = site.root / "current"
    current.unlink()
    if how == "dangling":
        current.symlink_to("releases/9-00000000")
    result = await site.pull()
    assert (result.generation, site.files()) == (1, {"a": "one"})
    assert len(site.releases()) == 1


async def test_a_release_that_was_removed_is_built_again(site: Site) -> None:
    """Release and link are gone: everything is had anew."""
    site.options = replace(site.options, mode="release")
    await site.push(a="one")
    await site.pull()
    (site.root / "current").unlink()
    shutil.rmtree(site.root / "releases")
    assert (await site.pull()).generation == 1
    assert site.files() == {"a": "one"}


async def test_a_generation_of_the_same_tree_builds_no_release(site: Site) -> None:
    """Also where the release is read-only: its modes are the policy's, its tree is the generation's."""
    site.options = replace(site.options, mode="release", modes=ModePolicy(read_only=True), apply=site.says("apply"))
    await site.push(a="one")
    await site.pull()
    stream = site.store.stream("app")
    for digest in [name for name in stream.chunks if len(name) == 64]:
        stream.chunks.pop(digest)
    assert await site.push() == 2
    assert (await site.pull()).generation == 2
    assert (len(site.releases()), len(site.told())) == (1, 1)


# -- where to go -------------------------------------------------------------------------------------------------------


@MODES
async def test_a_host_follows_its_channel_forward_and_back(site: Site, mode: Any) -> None:
    """Commits do not move it; promotions and rollbacks do."""
    site.options = replace(site.options, mode=mode)
    site.extra = {"channel": "stable"}
    channels = Channels(site.store.bucket("app"), time.time)
    await site.push(a="one")
    await channels.promote(1, "stable", who="me", why="")
    await site.push(a="two")
    assert ((await site.pull()).generation, site.files()) == (1, {"a": "one"})
    await channels.promote(2, "stable", who="me", why="")
    assert ((await site.pull()).generation, site.files()) == (2, {"a": "two"})
    await channels.rollback("stable", who="me", why="worse")
    assert ((await site.pull()).generation, site.files()) == (1, {"a": "one"})


@MODES
@pytest.mark.fault("R8")
async def test_a_pinned_host_ignores_the_channel(site: Site, mode: Any) -> None:
    """The configuration pins generation 1 while the channel is at 2; then the pin is taken away.

    The host goes to 1, then to 2.
    """
    site.options = replace(site.options, mode=mode)
    for text in "12":
        await site.push(a=text)
    site.extra = {"pin": 1}
    assert ((await site.pull()).generation, site.files()) == (1, {"a": "1"})
    site.extra = {}
    assert ((await site.pull()).generation, site.files()) == (2, {"a": "2"})


@pytest.mark.fault("R8")
async def test_a_pin_of_an_unknown_generation_changes_nothing(site: Site) -> None:
    """The configuration pins generation 7, which does not exist.

    The pull fails with that number, and the mirror stays.
    """
    await site.push(a="1")
    await site.pull()
    site.extra = {"pin": 7}
    with pytest.raises(ObjectGone, match="generation 7"):
        await site.pull()
    assert site.files() == {"a": "1"}


@MODES
@pytest.mark.fault("R8")
async def test_a_pin_to_a_refused_generation_is_held(site: Site, mode: Any) -> None:
    """The configuration pins a generation that the real check hook has refused.

    The mirror stays as it is; without the hook, the pinned generation is applied.
    """
    site.options = replace(site.options, mode=mode, check=site.hook('test ! -e "$SYNCD_STAGED/bad"'))
    await site.push(a="one")
    await site.pull()
    await site.push(a="two", bad="!")
    with pytest.raises(Held):
        await site.pull()
    site.extra = {"pin": 2}
    with pytest.raises(Held):
        await site.pull()
    assert site.files() == {"a": "one"}
    site.options = replace(site.options, check=())
    assert (await site.pull(allow_delete=True)).generation == 2
    assert site.files() == {"a": "two", "bad": "!"}


async def test_a_pinned_generation_that_was_collected_is_kept_as_it_is(site: Site) -> None:
    """The host has it: drift is repaired as far as that needs no bucket, and nothing else happens."""
    for text in "12":
        await site.push(a=text, b="b")
    site.extra = {"pin": 1}
    await site.pull()
    bucket = site.store.bucket("app")
    await bucket.delete("generations/0000000001", expected_seq=None, metadata={})
    (site.root / "b").chmod(0o600)
    await site.pull()
    assert site.files() == {"a": "1", "b": "b"}
    assert (site.root / "b").stat().st_mode & 0o777 == 0o644


async def test_a_persons_pin_is_obeyed_within_a_moment(site: Site) -> None:
    """A running daemon goes to the pinned generation, and back to the channel's when the pin is gone."""
    for text in "12":
        await site.push(a=text)
    states: list[FolderStatus] = []
    running = asyncio.create_task(site.subscriber(states.append).run())
    try:
        await _until(lambda: bool(states) and states[-1].generation == 2)
        site.pinned = 1
        await _until(lambda: states[-1].generation == 1)
        assert site.files() == {"a": "1"}
        site.pinned = 0
        await _until(lambda: states[-1].generation == 2)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.fault("R8")
async def test_a_pin_that_is_damaged_meanwhile_is_told_and_holds(site: Site, tmp_path: Path) -> None:
    """The pin file of a running subscriber is emptied, and the channel has a newer generation.

    The damage is told and the mirror stays; with a new pin it goes on.
    """
    state = StateDir(tmp_path / "daemon")
    state.prepare()
    pin = state.pin("app")
    for text in "12":
        await site.push(a=text)
    pin.set(1)
    states: list[FolderStatus] = []
    subscriber = site.subscriber(states.append)
    subscriber._pin = pin.number
    running = asyncio.create_task(subscriber.run())
    try:
        await _until(lambda: bool(states) and states[-1].generation == 1)
        (state.root / "pin" / "app").write_text("")
        await _until(lambda: "is damaged" in states[-1].error)
        assert site.files() == {"a": "1"}
        pin.set(2)
        await _until(lambda: states[-1].generation == 2)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.fault("C1")
@pytest.mark.parametrize("change", ["touched", "changed"])
@pytest.mark.parametrize("meanwhile", ["removed", "replaced", "a directory"])
async def test_what_was_changed_between_a_crash_and_the_next_start_is_repaired_by_it(
    site: Site, change: str, meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round is cut off (exception) with a file in place and not in the index; it is then removed or replaced.

    One start brings content and time, also where a directory stands there.
    """
    await site.push(a="one", b="b")
    await site.pull()
    if change == "touched":
        os.utime(site.source / "a", ns=(0, 4_200_000_000_000_000_001))
        await site.push()
    else:
        await site.push(a="two")

    def point(at: str) -> None:
        if at == "batch_applied":
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(subscribers, "crash_point", point)
        with pytest.raises(Crash):
            await site.pull()
    file = site.root / "a"
    file.unlink()
    if meanwhile == "replaced":
        file.write_text("strange")
    elif meanwhile == "a directory":
        file.mkdir()
    await site.pull()
    assert site.files() == {"a": (site.source / "a").read_text(), "b": "b"}
    assert file.stat().st_mtime_ns == (site.source / "a").stat().st_mtime_ns


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("M1")
async def test_modes_are_mapped_and_a_new_mapping_is_applied(site: Site) -> None:
    """A source has a set-id file and one of mode 0600; the mirror's setting maps modes, and then no more.

    The mirror has the configured modes each time.
    """
    await site.push(a="one", tool="#!")
    (site.source / "tool").chmod(0o4755)
    (site.source / "a").chmod(0o600)
    await site.push(b="b")
    site.options = replace(site.options, modes=ModePolicy(files=0o640, special="drop"))
    await site.pull()
    found = {path.name: path.stat().st_mode & 0o7777 for path in site.root.iterdir() if path.is_file()}
    assert found == {"a": 0o640, "b": 0o640, "tool": 0o750}
    site.options = replace(site.options, modes=ModePolicy())
    await site.pull()
    found = {path.name: path.stat().st_mode & 0o7777 for path in site.root.iterdir() if path.is_file()}
    assert (found["a"], found["tool"]) == (0o600, 0o4755)


# -- extraneous --------------------------------------------------------------------------------------------------------


async def test_files_that_syncd_never_wrote_go_only_where_asked(site: Site) -> None:
    """``keep`` leaves them, ``delete`` removes them."""
    await site.push(a="one", b="", c="", d="")
    await site.pull()
    (site.root / "stranger").write_text("?")
    await site.pull()
    assert (site.root / "stranger").exists()
    site.extra = {"extraneous": "delete"}
    await site.pull()
    assert site.files() == {"a": "one", "b": "", "c": "", "d": ""}


# -- verify ------------------------------------------------------------------------------------------------------------


@MODES
async def test_verify_knows_releases_and_mapped_modes(site: Site, mode: Any) -> None:
    """The tree digest is that of the generation, computed from the disk; a change is named."""
    modes = ModePolicy(files=0o640, dirs=0o750, read_only=mode == "release")
    site.options = replace(site.options, mode=mode, modes=modes)
    (site.source / "d").mkdir()
    await site.push(a="one", b="two")
    await site.pull()
    takes = Takes(Rules(), modes, mode)
    verdict = await audit(site.store.bucket("app"), site.root, takes)
    assert (verdict.sound, verdict.found, verdict.generation) == (True, verdict.tree, 1)
    (site.tree / "a").chmod(0o600)
    verdict = await audit(site.store.bucket("app"), site.root, takes)
    assert [(one.path, one.what) for one in verdict.deviations] == [("a", "mode")]
