"""SIGKILL in the midst of a hook, and of a report: once, and at every start.

Each process does one round (:mod:`tests.support.returns`), with programs as hooks that kill the very process which
waits for them; the moment between a hook's end and what comes of it is that of test_kills_return.py.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd.statedir import StateDir
from syncd.status import FolderStatus
from syncd.store.memory import MemoryStore
from tests.support.forks import Forks, Outcome
from tests.support.generations import Publisher, Tree, expected, file, folder, found, link
from tests.support.mirror import litter
from tests.support.returns import PULL_HOOKED, PULL_REPORTING, save_bucket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.killpoints import Mode

MAX_FAILURES = 2
STARTS = 2
MODES = pytest.mark.parametrize("mode", ["mirror", "release"])
SCRIPT = """
echo "$SYNCD_HOOK $SYNCD_GENERATION $$" >> {log}
case "$SYNCD_GENERATION $SYNCD_HOOK" in
    "$(cat {kills})"|"$(cat {kills_once})") rm -f {kills_once}; kill -KILL $1; sleep 1000;;
esac
"""
"""``{kills}`` and ``{kills_once}`` say "generation hook"; what is killed is syncd, and the hook would go on."""


def tree(number: int) -> Tree:
    """Something of every kind of change from number to number."""
    return {
        "a": file(f"text {number}"),
        "d": folder({"x": file("x"), f"y{number}": file("y")}),
        "kind": file("a file") if number % 2 else folder({"inside": file("a directory")}),
        "l": link(f"d/y{number}"),
        "same": file("same"),
    }


def is_alive(pid: str) -> bool:
    """Tell whether a process runs: one that nobody waits for may stay as a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


class Host:
    """One bucket and one mirror."""

    def __init__(self, directory: Path, forks: Forks, mode: Mode) -> None:
        self.directory, self.forks, self.mode = directory, forks, mode
        self.store = MemoryStore()
        self.publisher = Publisher(self.store)
        self.mirror = directory / "mirror"
        self.log, self.kills, self.kills_once = (directory / name for name in ("log", "kills", "kills-once"))
        self.kills.touch()
        self.log.touch()
        self.script = SCRIPT.format(log=self.log, kills=self.kills, kills_once=self.kills_once)

    def publish(self) -> int:
        """The next generation."""
        asyncio.run(self.publisher.commit(tree(self.publisher.number + 1)))
        save_bucket(self.store, self.directory / "bucket")
        return self.publisher.number

    def run(self, task: str, **how: Any) -> Outcome:
        return self.forks.run(
            task, bucket=str(self.directory / "bucket"), mirror=str(self.mirror),
            index=str(self.directory / "state/index.db"), mode=self.mode, **how,
        )  # fmt: skip

    def pull(self, crash: str = "") -> Outcome:
        return self.run(PULL_HOOKED, crash=crash, script=self.script, max_failures=MAX_FAILURES)

    def asked(self) -> list[str]:
        """What hooks were asked since the last look; none of them runs any more."""
        lines = [line.rpartition(" ") for line in self.log.read_text().splitlines()]
        self.log.write_text("")
        deadline = time.monotonic() + 20
        while left := [pid for _, _, pid in lines if is_alive(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
        return [line for line, _, _ in lines]

    def is_at(self, number: int) -> bool:
        """Tell whether it has exactly this generation."""
        wanted = expected(tree(number))
        if self.mode == "release":
            wanted = {
                p: one if one[0] == "symlink" else (one[0], one[1] & ~0o222, *one[2:]) for p, one in wanted.items()
            }
        return found((self.mirror / "current").resolve() if self.mode == "release" else self.mirror) == wanted

    def check_clean(self) -> None:
        assert litter(self.mirror) == []


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    found = Forks(tmp_path / "forks")
    yield found
    found.close()


def hooks_of(number: int) -> list[str]:
    return [f"{name} {number}" for name in ("check", "apply", "health")]


@pytest.mark.parametrize(
    ("hook", "mode"), [("check", "mirror"), ("check", "release"), ("apply", "mirror"), ("health", "release")]
)
@pytest.mark.fault("C3 C7 R1")
def test_a_hook_in_which_syncd_is_killed(
    hook: str, mode: Mode, tmp_path: Path, forks: Forks, record_property: Any
) -> None:
    """SIGKILL from within each hook, once: the next start runs it again; at every start: so often and no more."""
    host = Host(tmp_path, forks, mode)
    host.publish()
    assert host.pull() == Outcome(value=1)
    assert host.asked() == hooks_of(1)

    number = host.publish()
    host.kills_once.write_text(f"{number} {hook}")
    assert host.pull().killed
    assert host.is_at(1 if hook == "check" else 2)
    at = hooks_of(2).index(f"{hook} 2")
    assert host.asked() == hooks_of(2)[: at + 1]
    assert host.pull() == Outcome(value=2)
    assert host.asked() == (hooks_of(2) if hook == "check" else hooks_of(2)[1:])
    assert host.is_at(2)
    host.check_clean()

    number = host.publish()
    host.kills.write_text(f"{number} {hook}")
    for _ in range(MAX_FAILURES):
        assert host.pull().killed
        assert host.is_at(2 if hook == "check" else 3)
        assert host.asked()[-1] == f"{hook} 3"
    for first in (True, False):
        outcome = host.pull()
        assert (outcome.error, f"began {MAX_FAILURES} times and never ended" in outcome.text) == ("Held", True), outcome
        assert host.asked() == (["apply 2", "health 2"] if first and hook != "check" else [])
        assert host.is_at(2)
    host.check_clean()
    host.publish()
    assert host.pull() == Outcome(value=4)
    assert host.is_at(4)
    host.check_clean()
    record_property("fault_runs", 1 + MAX_FAILURES)


@MODES
@pytest.mark.parametrize("point", ["checked", "refused"])
@pytest.mark.fault("C3 R2")
def test_a_refusal_by_the_check_in_which_syncd_is_killed(mode: Mode, point: str, tmp_path: Path, forks: Forks) -> None:
    """SIGKILL after the check hook has failed, before and after that is noted: what is noted is not asked again."""
    host = Host(tmp_path, forks, mode)
    host.publish()
    assert host.pull() == Outcome(value=1)
    number = host.publish()
    host.script = host.script.replace("esac", f'esac\ntest "$SYNCD_HOOK $SYNCD_GENERATION" != "check {number}"')
    host.asked()
    assert host.pull(point).killed
    assert (host.asked(), host.is_at(1)) == (["check 2"], True)
    for asked in (["check 2"] if point == "checked" else [], []):
        outcome = host.pull()
        assert (outcome.error, "check hook: exit code 1" in outcome.text) == ("Held", True), outcome
        assert (host.asked(), host.is_at(1)) == (asked, True)
    host.check_clean()
    host.publish()
    assert host.pull() == Outcome(value=3)


@MODES
@pytest.mark.fault("C3 C7")
def test_a_report_in_which_syncd_is_killed(mode: Mode, tmp_path: Path, forks: Forks, record_property: Any) -> None:
    """SIGKILL after each report of a round is written and before it gets its name, at each of several starts."""
    host = Host(tmp_path, forks, mode)
    state = StateDir(tmp_path / "daemon")
    reports = tmp_path / "reports"

    def pull(dies_at: int) -> Outcome:
        return host.run(PULL_REPORTING, state=str(state.root), reports=str(reports), dies_at=dies_at)

    host.publish()
    assert pull(0) == Outcome(value=1)
    kills = at = 0
    while kills == at * STARTS:
        at += 1
        number = host.publish()
        for _ in range(STARTS):
            if not pull(at).killed:
                break
            kills += 1
            *_, told = reports.read_text().splitlines()
            [status] = state.read_status()[1]
            assert status == FolderStatus.from_json(json.loads(told)), "the last whole one"
            assert [path.name for path in (state.root / "status").glob("[!.]*")] == [f"{status.key}.json"]
            assert host.is_at(number - 1) or host.is_at(number)
        assert pull(0) == Outcome(value=number), "no generation is refused for it"
        assert host.is_at(number)
        host.check_clean()
    record_property("fault_runs", kills)
    assert at > 1
