"""A host whose hooks refuse some generations: a process of its own (:mod:`tests.support.forks`), a store in memory.

The bucket is a file: the pickled streams of a :class:`syncd.store.memory.MemoryStore`. Hooks are functions of the
process itself: they write into a log what they were asked, and fail where the tree that they see has a file ``bad``. Or
they are programs; or there are none, and signatures are checked.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncd import rollout
from syncd.errors import Unavailable
from syncd.hooks import HookOutcome
from syncd.modes import ModePolicy
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.statedir import StateDir
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.trust import Trust

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from syncd.hooks import Hook

PULL = "tests.support.returns:pull"
PULL_HOOKED = "tests.support.returns:pull_hooked"
PULL_TRUSTING = "tests.support.returns:pull_trusting"
PULL_REPORTING = "tests.support.returns:pull_reporting"
KEPT_RELEASES = 2


def save_bucket(store: MemoryStore, file: Path) -> None:
    """Write a store down for the processes that are started from now on."""
    file.write_bytes(pickle.dumps(store._streams))


async def pull(*, bucket: str, mirror: str, index: str, log: str, mode: Any, fails: str, offline: bool = False) -> int:
    """Bring a mirror up to its channel; return the generation that it has.

    :param fails: the hook that fails where there is a file ``bad``.
    :param offline: no call of the store succeeds.
    """

    async def run(hook: Hook, *, values: Mapping[str, str], **_: Any) -> HookOutcome:
        ok = hook.name != fails or not (Path(values["path"]) / "bad").exists()
        with open(log, "ab", buffering=0) as out:  # noqa: PTH123 - one write, which SIGKILL does not undo
            out.write(f"{hook.name} {values['generation']}\n".encode())
        reason = "" if ok else "exit code 1"
        return HookOutcome(
            hook.name, ok=ok, code=0 if ok else 1, timed_out=False, output="", seconds=0.0, reason=reason
        )

    async def run_once(hook: Hook, *, values: Mapping[str, str], **_: Any) -> HookOutcome:
        return await run(hook, values=values)

    vars(rollout).update(run_hook=run, run_health=run_once)
    hooks: dict[str, Any] = {name: (name,) for name in ("check", "apply", "health")}
    return await _pull(bucket, mirror, index, rollout=_rollout(mode, **hooks), offline=offline)


async def pull_hooked(*, bucket: str, mirror: str, index: str, mode: Any, script: str, max_failures: int) -> int:
    """Bring a mirror up to its channel, with real hooks.

    :param script: of the shell, for all three hooks; ``$1`` is the process id of this one.
    """
    argv = ("/bin/sh", "-c", script, "hook", str(os.getpid()))
    how = _rollout(mode, check=argv, apply=argv, health=argv, max_failures=max_failures)
    return await _pull(bucket, mirror, index, rollout=how)


async def pull_trusting(*, bucket: str, mirror: str, index: str, keys: list[str]) -> int:
    """Bring a mirror up to its channel, where one of the keys has signed it."""
    return await _pull(bucket, mirror, index, trust=Trust(frozenset(keys), 1))


async def pull_reporting(
    *, bucket: str, mirror: str, index: str, mode: Any, state: str, reports: str, dies_at: int
) -> int:
    """Bring a mirror up to its channel and write each report of it down, as a daemon does.

    :param reports: a file that gets those that were.
    :param dies_at: which of the reports is written and never gets its name: SIGKILL.
    """
    directory = StateDir(Path(state))
    directory.prepare()
    left = dies_at
    real = Path.replace

    def replace(draft: Path, target: Path) -> Path:
        nonlocal left
        left -= target.parent == directory.root / "status"
        if dies_at and not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(draft, target)

    def report(status: FolderStatus) -> None:
        directory.write_status(f"{status.key}.json", status.to_json())
        with open(reports, "ab", buffering=0) as out:  # noqa: PTH123 - one write, which SIGKILL does not undo
            out.write(json.dumps(status.to_json()).encode() + b"\n")

    Path.replace = replace  # type: ignore[assignment, method-assign]
    return await _pull(bucket, mirror, index, rollout=_rollout(mode), report=report)


def _rollout(mode: Any, **options: Any) -> RolloutOptions:
    modes = ModePolicy(read_only=mode == "release")
    return RolloutOptions(mode=mode, modes=modes, keep_releases=KEPT_RELEASES, **options)


async def _pull(
    bucket: str,
    mirror: str,
    index: str,
    *,
    offline: bool = False,
    report: Callable[[FolderStatus], None] = lambda _: None,
    **options: Any,
) -> int:
    """:param options: those of SubscribeOptions."""
    store = MemoryStore()
    store._streams = pickle.loads(Path(bucket).read_bytes())
    if offline:
        store.faults.fail("*", Unavailable("cut off"), times=1000)
    status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=report)
    os.makedirs(os.path.dirname(index), exist_ok=True)  # noqa: PTH103, PTH120
    chosen = SubscribeOptions("app", Path(mirror), Rules(), **options)
    return (await Subscriber(chosen, store, Path(index), status=status).pull()).generation
