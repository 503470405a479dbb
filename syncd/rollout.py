"""Bringing a whole generation into place: the check before, the release or the paths, the hooks after, the way back.

Rules kept here (docs/hooks.md, docs/architecture.md):
 * the check hook sees the whole staged tree before anything changes; what it refuses is not tried again until a person
   asks for it;
 * that hooks are due is noted with the generation itself, so that a crash in between runs them at the next start;
 * what fails afterwards is gone back from, to the last generation that ended well: in release mode by one rename;
 * a release that is here already is switched to: no download, no building.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import structlog

from syncd.checkout import APPLIED, TARGET, Applied, Held
from syncd.crashpoints import crash_point
from syncd.errors import DiskProblem, SyncdError
from syncd.hooks import NOT_STARTED, Hook, HookOutcome, run_health, run_hook, write_changed_file
from syncd.index.releases import ReleaseTables, prune_release_files, release_file
from syncd.mirror import BuildItem, ContentChanged, release_name
from syncd.model import Kind
from syncd.modes import ModePolicy
from syncd.paths import sort_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Container, Iterable, Iterator
    from pathlib import Path

    from syncd.checkout import Checkout, Target
    from syncd.drift import DriftPolicy
    from syncd.hooks import ChangeLetter, HookName
    from syncd.index import Index, LocalRow
    from syncd.mirror import Mirror
    from syncd.problems import ProblemBook
    from syncd.service import FolderThread
    from syncd.standing import Standing
    from syncd.upstream import Row

log = structlog.get_logger()

Mode = Literal["mirror", "release"]
Share = Literal["auto", "reflink", "hardlink", "copy"]
CHANGED: Final = "changed-paths"
COMMIT: Final = "commit"
"""A release's note of its generation's record and signatures."""
PAGE: Final = 1000
HEALTH_PAUSE_SECONDS: Final = 1.0
HEALTH_TRIES: Final = 1_000_000
"""The deadline ends them."""


@dataclass(frozen=True, slots=True)
class RolloutOptions:
    """How generations are brought into place.

    :ivar check, apply, health: argv of the hooks, empty for none.
    :ivar timeout: seconds that one run of a hook may take.
    :ivar health_seconds: for how long ``health`` is tried until it succeeds.
    :ivar max_failures: so often the hooks of one generation may begin without ending.
    :ivar keep_releases: releases that are kept, the current one included.
    """

    mode: Mode = "mirror"
    modes: ModePolicy = field(default_factory=ModePolicy)
    keep_releases: int = 3
    share: Share = "auto"
    check: tuple[str, ...] = ()
    apply: tuple[str, ...] = ()
    health: tuple[str, ...] = ()
    timeout: float = 60.0
    health_seconds: float = 30.0
    max_failures: int = 3

    @property
    def hooked(self) -> bool:
        """Whether anything runs after an apply."""
        return bool(self.apply or self.health)


class WentBack(Exception):
    """What was applied is refused now: resolve again, and go to the generation before."""


class Rollout:
    """One mirror's generations on their way into place."""

    def __init__(
        self,
        options: RolloutOptions,
        checkout: Checkout,
        standing: Standing,
        index: Index,
        mirror: Mirror,
        thread: FolderThread,
        *,
        folder: str,
        index_file: Path | None,
    ) -> None:
        self._folder = folder
        self._options = options
        self._file = index_file
        self._index = index
        self._tables = checkout.tables
        self._mirror = mirror
        self._checkout = checkout
        self._standing = standing
        self._thread = thread
        self._releases = ReleaseTables(index)
        self._unpruned = options.mode == "release"
        self._log = log.bind(folder=folder, role="subscribe")
        if options.mode == "release":
            checkout.kept = self

    @property
    def is_release(self) -> bool:
        """Whether the mirror keeps releases."""
        return self._options.mode == "release"

    def moving(self) -> bool:
        """Tell whether what is to be applied is another tree than what is. Blocking."""
        target = self._checkout.target
        tree = Applied(root=target.root, rules=target.rules).tree
        return target.record != self._standing.record and tree != self._standing.tree

    def is_current(self) -> bool:
        """Tell whether the current release is the one to be at, or has the very tree of it. Blocking."""
        if not self._mirror.release or self._releases.loaded() != self._mirror.release:
            return False
        return self._checkout.applied().record == self._checkout.target.record or not self.moving()

    def builds_whole(self) -> bool:
        """Tell whether a whole tree is to be built of the target: a release, or what a check is to see. Blocking."""
        if self.is_release:
            return not self.is_current()
        return bool(self._options.check) and not self._returning and self.moving()

    # -- at the start ------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Take up what was current when an earlier run was cut off. Blocking; before anything else.

        :raises DiskProblem: the disk refused.
        """
        if not self.is_release:
            return
        current = self._mirror.current()
        known = self._releases.loaded()
        if not current and known in self._mirror.releases():
            current = known  # somebody removed the link; what it named is still whole
        if current != self._mirror.release:
            self._mirror.switch(current)
        if current and self._releases.loaded() != current:
            if self._load(current):
                applied = self._checkout.applied()
                if applied.record != self._standing.record:
                    self._standing.arrived(applied.number, applied.record, applied.tree)
            else:
                self._log.warning("release_not_known", release=current)

    # -- before --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def going(self) -> AsyncIterator[None]:
        """Bring a generation into place within this; so often cut off by our own end, it is not tried again.

        What is gone back to is not counted: there is nothing else to go to.

        :raises Held: it was begun too often.
        """
        target = self._checkout.target
        if self._returning or target.record == self._standing.record:
            yield
            return
        begins = await self._thread.run(lambda: self._standing.begin(target.record))
        if begins > self._options.max_failures and self._standing.at[0]:
            reason = f"its application began {begins - 1} times and never ended"
            await self._refuse(target.number, target.record, reason)
            raise self._held(target.number, reason)
        try:
            yield
        except (asyncio.CancelledError, SyncdError):
            await asyncio.shield(self._thread.run(self._standing.gave_up))
            raise

    async def check_mirror(self, rows: Iterable[Row], unlike: Container[str]) -> None:
        """In mirror mode: have the staged tree checked, and write down what changes.

        :param rows: the differences, lazily; consumed in the folder's thread.
        :param unlike: files that are not what the index says of them.
        :raises Held: the check hook refuses the generation; nothing has changed.
        """
        if self._options.check and not self._returning:
            staged = await self._thread.run(
                lambda: self._mirror.build_check(self._items(unlike))  # cloned or copied: what is live is never linked
            )
            try:
                await self._check(staged, self._checkout.target)
            finally:
                await self._thread.run(self._mirror.drop_check)
        await self._write_changes(rows)

    async def release(self, rows: Iterable[Row], problems: ProblemBook, unlike: Container[str]) -> None:
        """In release mode: build the release, have it checked, switch to it.

        :param rows, unlike: see :meth:`check_mirror`.
        :raises Held: the check hook refuses it; the current release stays.
        :raises ContentChanged: some content is not what it was: it has to be gathered again.
        """
        name, staged = await self._thread.run(lambda: self._build(problems, unlike))
        try:
            if self._options.check and not self._returning:
                await self._check(staged, self._checkout.target)
        except BaseException:
            await self._thread.run(lambda: self._mirror.drop_build(name))
            raise
        await self._write_changes(rows)

        def switch() -> None:
            self._mirror.publish_release(name)
            self._mirror.switch(name)
            crash_point("release_switched")
            if not self._load(name):
                raise DiskProblem("what is known of the new release cannot be read back", hint="check the disk")

        await self._thread.run(switch)
        self._unpruned = True
        self._log.info("release_switched", release=name)

    def _build(self, problems: ProblemBook, unlike: Container[str]) -> tuple[str, Path]:
        target = self._checkout.target
        name = release_name(target.number, target.root, taken=self._mirror.releases())
        applied = Applied(target.number, target.record, target.root, rules=target.rules)
        notes = {
            TARGET: self._index.note(TARGET),
            APPLIED: json.dumps(asdict(applied)),
            COMMIT: self._checkout.commit_note,
        }
        built = self._mirror.build(
            name,
            self._items(unlike),
            share=self._options.share,
            read_only=self._options.modes.read_only,
            on_problem=problems.note,
        )
        try:
            self._releases.save(self._known(name), built, notes)
        except ContentChanged as changed:
            self._index.drop_local(changed.paths)  # what is there is looked at, and gathered, anew
            raise
        return name, self._mirror.build_path(name)

    def _items(self, unlike: Container[str]) -> Iterator[BuildItem]:
        """Yield the whole target tree with where its content is: staged, else in a file that is here."""
        local = self._index.iter_local()
        have: LocalRow | None = next(local, None)
        page: list[tuple[BuildItem, bool]] = []
        for remote in self._index.iter_remote():
            while have is not None and sort_key(have.path) < sort_key(remote.path):
                have = next(local, None)
            here = have if have is not None and have.path == remote.path and have.path not in unlike else None
            same = here is not None and here.entry.same_content(remote.entry)
            is_file = remote.entry.kind is Kind.FILE
            item = BuildItem(remote.path, remote.entry, source=here if same and is_file else None)
            page.append((item, is_file and not same))
            if len(page) == PAGE:
                yield from self._with_staged(page)
                page = []
        yield from self._with_staged(page)

    def _with_staged(self, page: list[tuple[BuildItem, bool]]) -> Iterator[BuildItem]:
        wanted = [item.path for item, missing in page if missing]
        staged = self._tables.staged(wanted)
        adopted = self._tables.adopted(path for path in wanted if path not in staged)
        for item, missing in page:
            if missing and item.path in staged:
                yield item._replace(staged=staged[item.path].name)
            elif missing and item.path in adopted:
                yield item._replace(source=adopted[item.path])
            else:
                yield item

    # -- releases that are here ----------------------------------------------------------------------------------------

    async def ready(self, target: Target) -> str:
        """See :class:`syncd.checkout.Kept`: checked as a new one, unless it is current already, or returned to."""
        name = await self._thread.run(lambda: next(self._kept(target.record, target.rules), ("", {}))[0])
        is_new = name != self._mirror.release and not self._standing.returns_to(target.record)
        if name and is_new and self._options.check:
            await self._check(self._mirror.root / "releases" / name, target)
        return name

    def take(self, name: str) -> None:
        """See :class:`syncd.checkout.Kept`."""
        before = self._mirror.release
        self._forget_changes()
        self._unpruned = True
        self._mirror.switch(name)
        crash_point("release_switched")
        if not self._load(name):
            raise DiskProblem(f"what is known of release {name} cannot be read back", hint="check the disk")
        if name != before:
            self._log.info("release_switched", release=name, kept=True)

    async def go_back(self) -> bool:
        """Go to the kept release of the last generation that ended well, asking nobody: the server may be away.

        :returns: whether it is there now; else it has to be had from the bucket.
        """
        number, record = self._standing.at
        if not self.is_release or not number or record == self._standing.record:
            return False
        for name, notes in await self._thread.run(lambda: list(self._kept(record))):
            target = self._checkout.back_to(notes.get(TARGET, ""))
            if target is not None and await self._checkout.trusts(notes.get(COMMIT, "")):
                await self._thread.run(partial(self._checkout.take_kept, name, target))
                return True
        return False

    def _kept(self, record: str, rules: str | None = None) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield the releases that hold a generation, the newest first, with their notes."""
        for name in reversed(self._mirror.releases()):
            notes = self._releases.notes(self._known(name)) or {}
            try:
                kept = json.loads(notes.get(TARGET, "{}"))
            except ValueError:
                continue
            if kept.get("record") == record and (rules is None or kept.get("rules") == rules):
                yield name, notes

    def mend_link(self, policy: DriftPolicy) -> bool:
        """Look whether somebody moved the link to the current release, and put it back as the policy has it. Blocking.

        :raises DiskProblem: it cannot be put back.
        """
        held = self._mirror.release
        if not held:
            return False
        try:
            now = self._mirror.current()
        except DiskProblem:
            now = "?"
        if now == held:
            return False
        self._log.warning("drift", path="current", policy=policy)
        if policy == "repair":
            self._mirror.switch(held if held in self._mirror.releases() else "")
        return True

    def _known(self, name: str) -> Path:
        if self._file is None:
            raise DiskProblem("release mode needs a state directory", hint="set daemon.state_dir")
        return release_file(self._file, name)

    def _load(self, name: str) -> bool:
        return self._releases.load(self._known(name))

    def _prune(self) -> None:
        good = [name for name in self._mirror.releases() if self._holds(name, self._standing.good_record)]
        spare = set(good[-1:])  # crashes may have left several of one generation
        removed = self._mirror.prune(self._options.keep_releases, spare)
        if self._file is not None:
            prune_release_files(self._file, set(self._mirror.releases()))
        if removed:
            self._log.info("releases_removed", releases=removed)

    def _holds(self, name: str, record: str) -> bool:
        notes = self._releases.notes(self._known(name)) or {}
        return bool(record) and f'"{record}"' in notes.get(TARGET, "")

    # -- hooks ---------------------------------------------------------------------------------------------------------

    @property
    def _returning(self) -> bool:
        return self._standing.returns_to(self._checkout.target.record)

    async def _check(self, staged: Path, target: Target) -> None:
        outcome = await self._run("check", target.number, staged=staged)
        crash_point("checked")
        if not outcome.ok:
            reason = f"check hook: {outcome.reason}"
            await self._refuse(target.number, target.record, reason)
            raise self._held(target.number, reason)

    async def finish(self) -> None:
        """Run the hooks that are due for what is applied.

        :raises WentBack: they failed: the generation before is to be gone to.
        :raises Held: they failed, and there is none to go back to.
        """
        standing = self._standing
        if standing.due:
            tries = await self._thread.run(standing.try_hooks)
            crash_point("hooks_begun")
            number, record = standing.number, standing.record
            if tries > self._options.max_failures:
                failed = f"its hooks began {tries - 1} times and never ended"
            else:
                failed = await self._after_or_stop(number)
            if failed and not standing.is_return:
                await self._refuse(number, record, failed)
                if standing.at[0]:
                    raise WentBack
                raise self._held(number, f"{failed}; there is no generation to go back to")
            await self._thread.run(standing.ended_well)
            crash_point("hooks_done")
        if self._unpruned:
            await self._thread.run(self._prune)
            self._unpruned = False

    async def _after_or_stop(self, number: int) -> str:
        try:
            return await self._after(number)
        except (asyncio.CancelledError, DiskProblem):
            await asyncio.shield(self._thread.run(self._standing.stopped))
            raise

    async def _after(self, number: int) -> str:
        """Run apply and health; return why they failed, "" where they did not."""
        names: tuple[HookName, ...] = ("apply", "health")
        for name in names:
            outcome = await self._run(name, number)
            crash_point("hook_ended")
            if not outcome.ok:
                return f"{name} hook: {outcome.reason}"
        return ""

    async def _run(self, name: HookName, number: int, *, staged: Path | None = None) -> HookOutcome:
        options = self._options
        argv: tuple[str, ...] = getattr(options, name)
        if not argv:
            return HookOutcome(name, ok=True, code=None, timed_out=False, output="", seconds=0.0, reason="")
        path = self._mirror.root / "current" if self.is_release else self._mirror.root
        values = {"path": str(path), "generation": str(number), "folder": self._folder}
        environ = {
            "SYNCD_FOLDER": self._folder,
            "SYNCD_GENERATION": str(number),
            "SYNCD_PREVIOUS": str(self._standing.before(number) or ""),
            "SYNCD_PATH": str(path),
        }
        if staged is not None:
            values["staged"] = environ["SYNCD_STAGED"] = str(staged)
        elif self._file is not None and (changed := self._file.with_name(CHANGED)).exists():
            environ["SYNCD_CHANGED_FILE"] = str(changed)
        hook = Hook(name, argv, options.timeout)
        if name == "health":
            outcome = await run_health(
                hook,
                tries=HEALTH_TRIES,
                pause=HEALTH_PAUSE_SECONDS,
                deadline=options.health_seconds,
                values=values,
                environ=environ,
            )
        else:
            outcome = await run_hook(hook, values=values, environ=environ)
        if outcome.code is None and not outcome.timed_out and outcome.reason.startswith(NOT_STARTED):
            raise DiskProblem(f"{name} hook: {outcome.reason}", hint="no verdict on the generation: it is run again")
        return outcome

    async def _refuse(self, number: int, record: str, reason: str) -> None:
        await self._thread.run(lambda: self._standing.refuse(record, reason))
        self._log.error("generation_refused", generation=number, reason=reason)

    def _held(self, number: int, reason: str) -> SyncdError:
        return Held(
            f"generation {number} of {self._folder!r} is held back: {reason}",
            hint=f"publish a newer one, or have it tried again: syncd allow {self._folder}",
        )

    def _forget_changes(self) -> None:
        """What changes is not known: hooks are told nothing rather than something else."""
        if self._file is not None:
            self._file.with_name(CHANGED).unlink(missing_ok=True)

    async def _write_changes(self, rows: Iterable[Row]) -> None:
        if not self._options.hooked or self._file is None:
            return
        directory = self._file.parent

        def write() -> None:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                write_changed_file(fd, CHANGED, map(_letter, rows))
            finally:
                os.close(fd)

        await self._thread.run(write)


def _letter(row: Row) -> tuple[ChangeLetter, str]:
    path, local, remote = row
    if remote is None:
        return "D", path
    return ("A" if local is None else "M"), path
