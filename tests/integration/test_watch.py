"""Hints from a real directory: what is told, what is admitted to be lost, and what survives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import watchfiles
from structlog.testing import capture_logs

from syncd import watch
from syncd.watch import MAX_PENDING, PathHints, PathWatcher, around_unreadable, is_limit, relative_paths

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

DEADLINE = 15.0


class Watched:
    """A watcher, and all it has told so far."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modes: list[tuple[str, str]] = []
        self.watcher = PathWatcher(root, on_mode=lambda mode, reason: self.modes.append((mode, reason)))
        self.paths: set[str] = set()
        self.rescans = 0

    async def until(self, condition: Callable[[], object], seconds: float = DEADLINE) -> None:
        """Take hints until the condition holds."""
        async with asyncio.timeout(seconds):
            while not condition():
                hints = await self.watcher.next(0.05)
                self.paths |= hints.paths
                self.rescans += hints.rescan

    async def told(self, path: str) -> None:
        """Wait until a path was hinted, or a rescan has taken its place."""
        before = self.rescans
        await self.until(lambda: path in self.paths or self.rescans > before)

    async def begun(self, times: int = 1) -> None:
        await self.until(lambda: self.rescans >= times and self.watcher.mode in {"events", "polling"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
async def watched(root: Path) -> AsyncIterator[Watched]:
    watched = Watched(root)
    async with watched.watcher:
        await watched.begun()
        yield watched


async def test_a_change_is_hinted_within_moments(watched: Watched) -> None:
    """Watching begins with one rescan; then files, directories, renames and removals are hinted by path."""
    root = watched.root
    assert (watched.modes, watched.rescans) == ([("events", "")], 1)
    (root / "d").mkdir()
    await watched.told("d")
    began = time.monotonic()
    (root / "d" / "é f").write_text("x")
    await watched.told("d/é f")
    assert time.monotonic() - began < 1.0
    for act, path in (
        (lambda: (root / "d" / "é f").rename(root / "g"), "g"),
        (lambda: (root / "g").chmod(0o600), "g"),
        (lambda: (root / "l").symlink_to("g"), "l"),
        ((root / "g").unlink, "g"),
    ):
        watched.paths.clear()
        act()
        await watched.told(path)
    assert watched.rescans == 1


async def test_silence_is_told_as_nothing_after_the_given_time(watched: Watched) -> None:
    """next returns at its deadline, empty; cancelling it passes through."""
    began = time.monotonic()
    assert await watched.watcher.next(0.2) == PathHints(frozenset(), rescan=False)
    assert 0.15 < time.monotonic() - began < 5
    task = asyncio.create_task(watched.watcher.next(60))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_our_own_files_are_not_hinted(watched: Watched) -> None:
    """What happens below .syncd at the top stays there."""
    (watched.root / ".syncd").mkdir()
    (watched.root / ".syncd" / "staged").touch()
    (watched.root / "seen").touch()
    await watched.told("seen")
    assert not {path for path in watched.paths if path.startswith(".syncd")}


async def test_a_root_that_is_a_symlink_is_watched_where_it_points(tmp_path: Path, root: Path) -> None:
    """Paths are relative to the resolved root."""
    (tmp_path / "link").symlink_to("root")
    watched = Watched(tmp_path / "link")
    async with watched.watcher:
        await watched.begun()
        (root / "f").touch()
        await watched.until(lambda: "f" in watched.paths)


@pytest.mark.fault("W1")
async def test_a_burst_of_30000_creations_ends_in_a_rescan(watched: Watched, root: Path) -> None:
    """A thread creates 30,000 files in a watched directory while nobody takes hints.

    What is pending stays bounded, a rescan is told, and later changes are hinted.
    """

    def burst() -> None:
        for number in range(30_000):
            (root / f"f{number}").touch()

    thread = threading.Thread(target=burst)
    thread.start()
    largest = 0
    while thread.is_alive():
        await asyncio.sleep(0.01)
        largest = max(largest, len(watched.watcher._paths))
    thread.join()
    rescans = watched.rescans
    await watched.until(lambda: watched.rescans > rescans)
    assert largest <= MAX_PENDING
    assert watched.watcher.mode == "events"
    await asyncio.to_thread((root / "afterwards").touch)
    await watched.told("afterwards")


@pytest.mark.fault("W2")
async def test_a_burst_of_nested_directories_is_hinted_near_the_top(watched: Watched, root: Path) -> None:
    """200 directories, one inside the other, are made faster than they are watched, each with a file.

    The topmost one is hinted, or a rescan is, and later changes are.
    """
    deep = root
    for number in range(200):
        deep = deep / f"d{number}"
        deep.mkdir()
        (deep / "leaf").touch()
    await watched.told("d0")
    (root / "afterwards").touch()
    await watched.told("afterwards")


@pytest.mark.fault("W3 W5 L10")
async def test_a_root_that_is_removed_is_down_and_watched_again_when_it_is_back(watched: Watched, root: Path) -> None:
    """The watched root is removed with all in it, and made again later.

    The loss is told, its return with a rescan, and new files in it are hinted.
    """
    (root / "d").mkdir()
    await watched.told("d")
    shutil.rmtree(root)
    await watched.until(lambda: watched.watcher.mode == "down")
    rescans = watched.rescans
    root.mkdir()
    await watched.begun(rescans + 1)
    (root / "new").touch()
    await watched.until(lambda: "new" in watched.paths)
    assert [mode for mode, _ in watched.modes] == ["events", "down", "events"]


@pytest.mark.fault("W3 L10")
async def test_a_root_that_is_replaced_at_once_is_watched_anew(watched: Watched, root: Path) -> None:
    """The watched root is renamed away and made again at once; inotify would follow the old one.

    A rescan is told without anything happening in it, and new files are hinted.
    """
    rescans = watched.rescans
    root.rename(root.with_name("aside"))
    root.mkdir()
    await watched.begun(rescans + 1)
    (root / "new").touch()
    await watched.until(lambda: "new" in watched.paths)


@pytest.mark.fault("W3")
async def test_a_directory_below_that_is_removed_and_made_again_is_watched(watched: Watched, root: Path) -> None:
    """A directory below the watched root is made, written into and removed, twice.

    Each step is hinted, also those in the second directory of that name.
    """
    for _ in range(2):
        (root / "d").mkdir()
        await watched.told("d")
        watched.paths.clear()
        (root / "d" / "f").touch()
        await watched.told("d/f")
        watched.paths.clear()
        shutil.rmtree(root / "d")
        await watched.told("d")
        watched.paths.clear()


@pytest.mark.fault("W5")
async def test_a_root_that_is_missing_at_start_is_waited_for(tmp_path: Path) -> None:
    """A file stands in the root's place when watching starts, then nothing; later the directory is made.

    The watcher says that it is down, and tells a rescan once the root is there.
    """
    watched = Watched(tmp_path / "later")
    watched.root.touch()
    async with watched.watcher:
        await watched.until(lambda: watched.watcher.mode == "down")
        watched.root.unlink()
        assert watched.rescans == 0
        watched.root.mkdir()
        await watched.begun()


@pytest.mark.fault("P4")
async def test_a_name_that_is_not_utf8_does_not_end_the_watching(watched: Watched, root: Path) -> None:
    """A file is created whose name is not UTF-8, which ends watchfiles' loop.

    That is begun again with a rescan, and the next file is hinted.
    """
    (root / "bad\udcff").touch()
    await watched.until(lambda: watched.rescans >= 2)
    (root / "good").touch()
    await watched.told("good")
    assert watched.watcher.mode == "events"


@pytest.mark.fault("W4")
async def test_where_watches_run_out_it_polls_and_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """watchfiles is replaced by one that raises its error of too few watches unless it polls.

    The watcher polls, names the kernel's setting, and hints a new file.
    """
    real = watchfiles.watch
    limit = OSError("OS file watch limit reached. about [] (Error { kind: MaxFilesWatch, paths: [] })")

    def limited(*paths: str, **options: object) -> object:
        if not options["force_polling"]:
            raise limit
        options["poll_delay_ms"] = 50
        return real(*paths, **options)

    monkeypatch.setattr(watch.watchfiles, "watch", limited)
    watched = Watched(root)
    async with watched.watcher:
        await watched.begun()
        (root / "f").touch()
        await watched.until(lambda: "f" in watched.paths)
    assert [mode for mode, _ in watched.modes] == ["polling"]
    assert "max_user_watches" in watched.modes[0][1]


def run_program(root: Path, body: str, *prefix: str) -> str:
    """Run a coroutine's body in a process of its own; `watched` is there, `root` too."""
    program = (
        "import asyncio, concurrent.futures.thread, os, platform, sys\nfrom pathlib import Path\n"
        "from tests.integration.test_watch import *\nroot = Path(sys.argv[1])\n"
        "async def main():\n    watched = Watched(root)\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\nasyncio.run(main())\n"
    )
    run = subprocess.run(
        [*prefix, sys.executable, "-c", program, str(root)], capture_output=True, text=True, timeout=40, check=False
    )
    if prefix and "unshare" in run.stderr:
        pytest.skip(f"needs user namespaces: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


@pytest.mark.fault("W4")
def test_the_kernel_s_limit_of_watches_really_leads_to_polling(root: Path) -> None:
    """A user namespace is given eight inotify watches for thirty directories.

    The watcher polls, and hints a file in the last of them.
    """
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    for number in range(30):
        (root / f"d{number}").mkdir()
    body = """
        Path("/proc/sys/user/max_inotify_watches").write_text("8")
        async with watched.watcher:
            await watched.begun()
            (root / "d29" / "f").touch()
            await watched.until(lambda: "d29/f" in watched.paths)
        print(watched.modes[0][0])
    """
    assert run_program(root, body, "unshare", "--user", "--map-root-user") == "polling"


@pytest.mark.fault("S3")
def test_a_directory_that_cannot_be_read_hides_no_other(tmp_path: Path, root: Path) -> None:
    """One of thirty directories gets mode 0, and a process without privileges watches.

    A file in each of the others is hinted, and the mode says that some are not watched.
    """
    for above in [root, *root.parents]:
        with contextlib.suppress(OSError):
            above.chmod(above.stat().st_mode | 0o055)
    names = [f"{top}/{number}" for top in ("a", "b", "c") for number in range(10)]
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name).chmod(0o777)
    (root / "b" / "5").chmod(0)
    names.remove("b/5")
    body = f"""
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        async with watched.watcher:
            await watched.begun()
            for name in {names}:
                (root / name / "f").touch()
            await watched.until(lambda: {{f"{{name}}/f" for name in {names}}} <= watched.paths)
        print(watched.modes)
    """
    assert run_program(root, body) == "[('events', 'directories that cannot be read are not watched')]"


def test_everything_beside_the_way_to_an_unreadable_directory_is_watched(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root, then the readable siblings at every level down to it; symlinks and odd names are left out."""
    for name in ("a/x/closed", "a/x/open", "a/y/deep", "b", "c\udcff"):
        (root / name).mkdir(parents=True)
    (root / "l").symlink_to("b")
    (root / "f").touch()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = around_unreadable(str(root))
    assert found[0] == str(root)
    assert [str(Path(path).relative_to(root)) for path in found[1:]] == ["a", "a/x", "a/x/open", "a/y", "b"]


async def test_any_error_begins_the_watching_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors at the start are told as down, with growing pauses; then all is well again."""
    real = watchfiles.watch
    errors = [RuntimeError("first\x1b"), ValueError("second"), OSError(5, "Input/output error")]

    def failing(*paths: str, **options: object) -> object:
        if errors:
            raise errors.pop(0)
        return real(*paths, **options)

    monkeypatch.setattr(watch.watchfiles, "watch", failing)
    watched = Watched(root)
    async with watched.watcher:
        await watched.begun()
    assert watched.modes == [("down", "first\\x1b"), ("events", "")]


async def test_leaving_ends_the_thread_without_blocking_the_loop(root: Path) -> None:
    """Within about a second, while other tasks run; hints that come late fall on nobody."""
    watched = Watched(root)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async with watched.watcher:
        await watched.begun()
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0)
        began, before = time.monotonic(), ticks
    took = time.monotonic() - began
    ticking.cancel()
    assert took < 1.5
    assert ticks - before >= took / 0.01 / 4 - 2
    assert not watched.watcher._thread.is_alive()
    (root / "late").touch()


def test_a_loop_that_is_closed_is_not_called(root: Path) -> None:
    """The thread may outlive its loop: then it falls silent, and ends when it is told to."""
    watcher = PathWatcher(root, on_mode=lambda mode, reason: None)

    async def begin() -> None:
        await watcher.__aenter__()
        await watcher.next(5)

    asyncio.run(begin())
    told: list[object] = []
    tell = watcher._tell

    def listening(*arguments: object) -> None:
        tell(*arguments)
        told.append(arguments)

    watcher._tell = listening
    with capture_logs() as logs:
        (root / "f").touch()
        deadline = time.monotonic() + DEADLINE
        while not told and time.monotonic() < deadline:
            watcher._thread.join(0.02)
        assert told
        assert watcher._thread.is_alive()
        watcher._stop.set()
        watcher._thread.join(5)
    assert not watcher._thread.is_alive()
    assert logs == []


def test_paths_are_made_relative_and_doubt_is_admitted() -> None:
    """Of a root with or without a trailing slash; what is not below it, or not UTF-8, cannot be named."""
    assert relative_paths("/r", ["/r", "/r/a", "/r/a/b", "/r/.syncd/x", "/r/.syncd"]) == ({"", "a", "a/b"}, False)
    assert relative_paths("/", ["/etc", "/"]) == ({"etc", ""}, False)
    assert relative_paths("/r", ["/rx", "/other"]) == (set(), True)
    assert relative_paths("/r", ["/r/\udcff", "/r/ok"]) == ({"ok"}, True)


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError('OS file watch limit reached. about ["/x"]'), True),
        (RuntimeError("Error creating recommended watcher: Too many open files (os error 24)"), True),
        (OSError(5, "Input/output error"), False),
        (RuntimeError('Unable to decode path "/x/\\xFF" to string'), False),
    ],
)
def test_the_limit_of_watches_is_told_from_other_errors(error: Exception, limit: bool) -> None:
    """Texts as watchfiles 1.3 raised them."""
    assert is_limit(error) is limit
