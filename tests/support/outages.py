"""A host whose power is cut: one round in a process of its own (:mod:`tests.support.forks`), a store in memory.

The bucket is a file, as in :mod:`tests.support.returns`. Its hooks write down what they were asked, and which changes
they were told of; the check fails where the tree that it sees has a file ``unfit``, the others where there is ``bad``.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncd import rollout
from syncd.hooks import HookOutcome
from syncd.index import Index
from syncd.modes import ModePolicy
from syncd.outlet import PushResult
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.signatures import Signer
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.trust import Trust
from tests.support.pair import publisher_of
from tests.support.returns import save_bucket

if TYPE_CHECKING:
    from collections.abc import Mapping

    from syncd.hooks import Hook

PULL = "tests.support.outages:pull"
PUSH = "tests.support.outages:push"
NOTE = "tests.support.outages:note"


async def pull(
    *, bucket: str, mirror: str, index: str, log: str = "", mode: Any = "mirror", keys: list[str] | None = None
) -> dict[str, Any]:
    """Bring a mirror up to its channel; return its generation, and what was downloaded for it.

    :param log: where hooks write, in whole lines; "": none are configured.
    :param keys: one of them must have signed what is gone to; ``None``: nobody has to.
    """
    store = MemoryStore()
    store._streams = pickle.loads(Path(bucket).read_bytes())

    async def run(hook: Hook, *, values: Mapping[str, str], environ: Mapping[str, str], **_: Any) -> HookOutcome:
        sees, spoils = (values["staged"], "unfit") if hook.name == "check" else (values["path"], "bad")
        ok = not (Path(sees) / spoils).exists()
        changes = environ.get("SYNCD_CHANGED_FILE")
        told = Path(changes).read_text().splitlines() if changes else None
        with open(log, "ab", buffering=0) as out:  # noqa: PTH123 - one write, which SIGKILL does not undo
            out.write(json.dumps([hook.name, int(values["generation"]), told]).encode() + b"\n")
        reason = "" if ok else "exit code 1"
        return HookOutcome(
            hook.name, ok=ok, code=0 if ok else 1, timed_out=False, output="", seconds=0.0, reason=reason
        )

    vars(rollout).update(run_hook=run)
    how = RolloutOptions(
        mode=mode,
        modes=ModePolicy(read_only=mode == "release"),
        check=("check",) if log else (),
        apply=("apply",) if log else (),
    )
    trust = Trust(frozenset(keys), 1) if keys is not None else None
    options = SubscribeOptions("app", Path(mirror), Rules(), rollout=how, trust=trust)
    status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
    done = await Subscriber(options, store, Path(index), status=status).pull()
    return {"generation": done.generation, "downloaded": done.downloaded_bytes}


def asked(log: Path) -> list[tuple[str, int, list[str] | None]]:
    """What hooks were asked: their name, the generation, the lines of the list of changes."""
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


async def push(
    *, bucket: str, source: str, index: str, layout: str = "generations", seed: str = "", grace: float = 0.0,
    collect: bool = False, die: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Publish what the source has; the bucket's file has it afterwards.

    :param seed: signs.
    :param grace: how long what was replaced stays in the bucket.
    :param collect: free what only older generations need instead.
    :param die: at the end, before the index is closed, which would make it durable.
    """
    store = MemoryStore()
    if Path(bucket).exists():
        store._streams = pickle.loads(Path(bucket).read_bytes())
    store._nuids = itertools.count(time.monotonic_ns())  # never one that an earlier process gave out
    signer = Signer(seed) if seed else None
    publisher = publisher_of(
        store, Path(source), index=Path(index), layout=layout, max_delete_percent=100.0, signer=signer,
        keep_generations=1, grace_seconds=grace,
    )  # fmt: skip

    def end(*_: Any) -> None:
        save_bucket(store, Path(bucket))
        os.kill(os.getpid(), signal.SIGKILL)

    if die:
        vars(publisher)["_close"] = end
    if collect:
        await publisher.collect()
        done = PushResult()
    else:
        done = await publisher.push(allow_delete=True)
    save_bucket(store, Path(bucket))
    return {"generation": done.generation, "uploaded": done.uploaded_bytes}


def twin(number: int) -> str:
    """What is written beside a number in the same transaction: some pages, of which there must not be half."""
    return f"{number:04}" * 3000


def note(*, index: str, first: int, synced: int, last: int) -> None:
    """Write numbers into an index, a transaction each, and die without closing it.

    :param synced: the number after which what was committed is made durable; 0: none.
    """
    kept = Index(Path(index))
    for number in range(first, last + 1):
        with kept.transaction():
            kept.set_note("number", str(number))
            kept.set_note("twin", twin(number))
        if number == synced:
            kept.sync()
    os.kill(os.getpid(), signal.SIGKILL)
