"""A host whose hooks refuse some generations: a process of its own (:mod:`tests.support.forks`), a store in memory.

The bucket is a file: the pickled streams of a :class:`syncd.store.memory.MemoryStore`. Hooks are functions of the
process itself: they write into a log what they were asked, and fail where the tree that they see has a file ``bad``.
"""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncd import rollout
from syncd.errors import Unavailable
from syncd.hooks import HookOutcome
from syncd.modes import ModePolicy
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber

if TYPE_CHECKING:
    from collections.abc import Mapping

    from syncd.hooks import Hook

PULL = "tests.support.returns:pull"
KEPT_RELEASES = 2


def save_bucket(store: MemoryStore, file: Path) -> None:
    """Write a store down for the processes that are started from now on."""
    file.write_bytes(pickle.dumps(store._streams))


async def pull(*, bucket: str, mirror: str, index: str, log: str, mode: Any, fails: str, offline: bool = False) -> int:
    """Bring a mirror up to its channel; return the generation that it has.

    :param fails: the hook that fails where there is a file ``bad``.
    :param offline: no call of the store succeeds.
    """
    store = MemoryStore()
    store._streams = pickle.loads(Path(bucket).read_bytes())
    if offline:
        store.faults.fail("*", Unavailable("cut off"), times=1000)

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
    how = RolloutOptions(
        mode=mode,
        modes=ModePolicy(read_only=mode == "release"),
        keep_releases=KEPT_RELEASES,
        check=("check",),
        apply=("apply",),
        health=("health",),
    )
    options = SubscribeOptions("app", Path(mirror), Rules(), rollout=how)
    status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
    os.makedirs(os.path.dirname(index), exist_ok=True)  # noqa: PTH103, PTH120
    subscriber = Subscriber(options, store, Path(index), status=status)
    return (await subscriber.pull()).generation
