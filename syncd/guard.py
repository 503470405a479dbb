"""What a host believes of a folder: trusted keys followed from set to set, and what was seen, kept outside the index.

Rules kept here (docs/security.md):
 * what was seen is written down before it is followed, and synced: a restart, or an index that was lost, leads nobody
   back. The index has a copy, for the case that the note is lost or put back. A note that is damaged stops the folder
   until a person decides: without it a replay could not be told;
 * key sets are followed before a channel is judged, so that a revoked key is of no more use from the round on in which
   the new set is there to be read; and in every round, whatever the channel said;
 * an end (``expires``) that has come refuses what is new, and raises an alarm about what is here already: also where
   there is nothing new to be read.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import DiskProblem, ObjectCorrupt, ObjectGone, SyncdError, Untrusted
from syncd.moves import read_move, time_text
from syncd.store.base import BadMeta
from syncd.trust import (
    CLOCK_SLACK_SECONDS,
    EVER,
    KEYS,
    RECORD_MAX,
    SIGNATURES,
    Offer,
    Seen,
    Statement,
    Trust,
    check_signed,
    follow,
    is_expired,
    judge_generation,
    judge_offer,
    keys_name,
    recover,
    resume,
    seconds_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from syncd.index import Index
    from syncd.service import FolderThread
    from syncd.store.base import Bucket, BucketState, ObjectInfo
    from syncd.trees import Commit

log = structlog.get_logger()

MAX_KEY_SETS: Final = 1000
"""Key sets that are read in one round: who may write to the bucket could put any number there."""
MAX_TRIED_AGAIN: Final = 16
"""Key sets that cannot be read and are tried again in one round."""
ASK_SECONDS: Final = 5.0
"""How long a return to what is kept here waits for a server that may be away."""
KEY_DIGITS: Final = 10
COPY: Final = "trust"
"""The index's note that says what the file says."""
_DAMAGED: Final = (
    "move it away: the index knows what it said; without both this host trusts its configuration and the folder anew"
)


class _Noted(NamedTuple):
    """What is kept.

    :ivar step: how often it was written: which of two is the newer one.
    """

    step: int
    trust: Trust
    seen: dict[str, Seen]


class TrustNote:
    """Where what is trusted and what was seen is kept: one small file, replaced whole. Blocking.

    :param file: ``None``: nothing outlives the process.
    :param index: keeps a copy; ``None``: nobody does.
    """

    def __init__(self, file: Path | None, index: Index | None = None) -> None:
        self._file = file
        self._index = index
        self._step = 0

    def load(self) -> tuple[Trust | None, dict[str, Seen]]:
        """Return the trusted keys (``None``: nothing noted) and what was seen of each channel.

        The newer one of file and copy counts, whole: what a host has forgotten since (:func:`syncd.trust.recover`)
        must not come back from the older one.

        :raises Untrusted: the note is damaged.
        :raises DiskProblem: it cannot be read.
        """
        if self._file is None:
            return None, {}
        text = self._read()
        copy = self._index.note(COPY) if self._index is not None else ""
        noted = self._parse(text) if text is not None else None
        copied: _Noted | None = None
        try:
            copied = _noted(copy) if copy else None
        except ValueError:
            if noted is None:
                raise Untrusted(f"{self._file} is lost, and the index's copy cannot be read", hint=_DAMAGED) from None
        if copied is not None and noted is not None and copied.step == noted.step and copied != noted:
            raise Untrusted(f"{self._file} and the index's copy of it differ: one of them is damaged", hint=_DAMAGED)
        if copied is not None and (noted is None or copied.step != noted.step):
            newer = noted if noted is not None and noted.step > copied.step else copied
            behind = "index" if newer is noted else "file"
            log.warning("trust_note_behind", file=str(self._file), behind=behind, lost=noted is None)
            noted = newer
        if noted is None:
            return None, {}
        self._step = noted.step
        return noted.trust, noted.seen

    def _read(self) -> str | None:
        assert self._file is not None
        try:
            return self._file.read_text()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            return ""
        except OSError as error:
            raise DiskProblem(f"cannot read {self._file}: {error.strerror}") from error

    def _parse(self, text: str) -> _Noted:
        try:
            return _noted(text)
        except ValueError:
            raise Untrusted(f"{self._file}: what this host has seen cannot be read", hint=_DAMAGED) from None

    def save(self, trust: Trust, seen: dict[str, Seen]) -> None:
        """Replace the note, durably, and its copy.

        :raises DiskProblem: the disk refuses.
        """
        if self._file is None:
            return
        step = self._step + 1
        fields = {
            "step": step,
            "trust": json.loads(trust.to_json()),
            "seen": {name: json.loads(one.to_json()) for name, one in seen.items()},
        }
        text = json.dumps(fields)
        draft = self._file.with_name(f".{self._file.name}.new")
        try:
            with draft.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            crash_point("trust_drafted")
            draft.replace(self._file)
            directory = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise DiskProblem(f"cannot write {self._file}: {error.strerror}", hint="free some space") from error
        self._step = step
        crash_point("trust_noted")
        if self._index is not None:
            self._index.set_note(COPY, text)


def _noted(text: str) -> _Noted:
    """Read what :meth:`TrustNote.save` wrote, or a version before that kept no copy and no count for each key.

    :raises ValueError: it is damaged.
    """
    try:
        fields = json.loads(text)
        step = fields.get("step", 0)
        if type(step) is not int or step < 0:
            raise ValueError("how often it was written")
        trust = Trust.from_json(json.dumps(fields["trust"]))
        seen = {str(name): Seen.from_json(json.dumps(one), trust.keys) for name, one in fields["seen"].items()}
    except (TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("what is noted of trust is damaged") from None
    return _Noted(step, trust, seen)


class Guard:
    """Judges what a bucket offers to one mirror.

    :param configured: the keys that the configuration trusts; ``None``: everything is believed.
    :param clock: wall clock, seconds since the epoch.
    """

    def __init__(
        self,
        bucket: Bucket,
        channel: str,
        configured: Trust | None,
        note: TrustNote,
        thread: FolderThread,
        clock: Callable[[], float],
    ) -> None:
        self._bucket = bucket
        self._channel = channel
        self._configured = configured
        self._note = note
        self._thread = thread
        self._clock = clock
        self._log = log.bind(folder=bucket.name, role="subscribe")
        self._trust: Trust | None = None
        self._seen: dict[str, Seen] = {}
        self._expires = ""
        self._problem = ""
        self._told: dict[int, str] = {}
        self._followed = False
        self._state: BucketState | None = None
        self._listing = _Listing()

    @property
    def active(self) -> bool:
        """Whether anything is checked."""
        return self._configured is not None

    def begin(self, state: BucketState) -> None:
        """A round begins."""
        self._state = state
        self._followed = False

    async def follow(self) -> None:
        """Follow key sets where this round has not: what a channel says, or not, must not keep one from being seen."""
        if self._configured is not None and not self._followed:
            await self._follow_keys()

    async def judge(self, commit: Commit) -> None:
        """Refuse what a channel offers, or write down that it was seen.

        :raises Untrusted: it must not be followed; the mirror stays as it is.
        :raises ObjectCorrupt, FormatTooNew: signed, but not readable.
        """
        if self._configured is None:
            self._expires = _expires_of(commit)
            return
        trust = await self._follow_keys()
        seen = self._seen.get(self._channel, Seen())
        offer = Offer(
            folder=self._bucket.name,
            channel=self._channel,
            number=commit.generation.number,
            record=commit.record,
            record_signatures=commit.signatures,
            move=commit.move,
            move_signatures=commit.move_signatures,
        )
        accepted = judge_offer(trust, seen, offer)
        ends = accepted.move.expires
        if accepted.seen.move != seen.move and self._has_come(ends):
            raise Untrusted(
                f"channel {self._channel!r} is not fresh: its move ended {ends}",
                hint="is its publisher running? are the clocks right? otherwise somebody holds newer moves back",
            )
        if accepted.seen != seen:
            await self._keep(trust, self._seen | {self._channel: accepted.seen})

    async def judge_number(self, commit: Commit) -> None:
        """Refuse a generation that is asked for by its number: no channel, so its own signatures have to do.

        :raises Untrusted: not enough trusted keys have signed it.
        """
        if self._configured is None:
            return
        trust = await self._follow_keys()
        check_signed(trust, Statement.GENERATION, commit.record, commit.signatures)
        for seen in self._seen.values():
            judge_generation(seen, commit.generation.number, commit.digest)

    async def judge_kept(self, record: bytes, signatures: str) -> None:
        """Refuse a generation that is kept here, by what this host trusts as far as it knows.

        The server may be away, and going back does not wait for it. Where this round has not followed key sets yet (a
        start that finds hooks due), it is asked for a moment: a key may have been removed while the host was down.

        :raises Untrusted: not enough trusted keys have signed it.
        """
        if self._configured is None:
            return
        with suppress(SyncdError, TimeoutError):
            async with asyncio.timeout(ASK_SECONDS):
                await self.follow()
        trust = self._trust
        if trust is None:
            stored, _ = await self._thread.run(self._note.load)
            trust = resume(stored, self._configured)
        check_signed(trust, Statement.GENERATION, record, signatures)

    def stale_since(self) -> str:
        """Return since when nothing fresh has arrived, "" while what is here is fresh or never ends.

        It is what was followed last that ends, by this process or one before.
        """
        expires = self._expires if self._configured is None else self._seen.get(self._channel, Seen()).expires
        return expires if self._has_come(expires) else ""

    def _has_come(self, expires: str) -> bool:
        return is_expired(expires, self._clock(), slack=CLOCK_SLACK_SECONDS)

    # -- keys ----------------------------------------------------------------------------------------------------------

    async def _follow_keys(self) -> Trust:
        """Return what is trusted now, after every key set that leads on."""
        assert self._configured is not None
        before, known = self._trust, self._seen
        if before is None:
            stored, known = await self._thread.run(self._note.load)
            before = resume(stored, self._configured)
            if stored is not None and before != stored:
                self._log.warning("trust_reconfigured", keys=len(before.keys), threshold=before.threshold)
                known = _recovered(known, before, EVER)
        trust, problem, steps = follow(before, await self._key_sets(before.version), folder=self._bucket.name)
        if problem is not None and problem.message != self._problem:
            self._log.warning("key_set_refused", version=trust.version + 1, reason=problem.message)
        self._problem = "" if problem is None else problem.message
        if trust != self._trust:
            for step in steps:
                known = _recovered(known, step.trust, self._not_later(step.at))
            await self._keep(trust, known)
            if trust.version != before.version:
                self._log.info("keys_changed", version=trust.version, keys=len(trust.keys), threshold=trust.threshold)
        self._followed = True
        return trust

    def _not_later(self, at: str) -> str:
        """Return a key set's time, or now, where its maker's clock was ahead: else nothing could follow for as long."""
        now = self._clock()
        return at if (seconds_of(at) or 0.0) <= now else time_text(now)

    async def _key_sets(self, version: int) -> dict[int, tuple[bytes, str]]:
        """Read the key sets that come after a version; from version 0 all there are, whatever they begin with."""
        if version == 0:
            return await self._all_key_sets()
        found: dict[int, tuple[bytes, str]] = {}
        while len(found) < MAX_KEY_SETS and (one := await self._key_set(version + 1)) is not None:
            version += 1
            found[version] = one
        return found

    async def _all_key_sets(self) -> dict[int, tuple[bytes, str]]:
        """Return all key sets of the bucket; what was read of it in rounds before is not read again."""
        with suppress(ObjectCorrupt):  # what is there is none that can be read; there may be others
            if await self._bucket.get_info(keys_name(1)) is None:  # the usual case: keys were never replaced
                return {}
        state, listing = self._state, self._listing
        if state is None or state.created != listing.created or state.last_seq < listing.seq:
            self._listing = listing = _Listing(created="" if state is None else state.created)
        changed: set[int] = set()
        seq = listing.seq
        if state is None or state.last_seq > seq:
            async for page in self._bucket.changes(seq):
                changed.update(filter(None, map(_version_of, page.items)))
                seq = page.last_seq
        again = [version for version in sorted(listing.found) if listing.found[version] is None][:MAX_TRIED_AGAIN]
        for version in sorted(changed.union(again))[-MAX_KEY_SETS:]:
            listing.found[version] = await self._key_set(version)
        listing.seq = seq
        for version in sorted(listing.found)[:-MAX_KEY_SETS]:
            del listing.found[version]
        return {version: one for version, one in listing.found.items() if one is not None}

    async def _key_set(self, version: int) -> tuple[bytes, str] | None:
        """Return a key set's bytes and signatures; ``None`` where there is none that can be read: the chain ends."""
        try:
            info = await self._bucket.get_info(keys_name(version))
            if info is None or info.deleted:
                return None
            if info.size > RECORD_MAX:
                raise ObjectCorrupt(f"a key set of {info.size} bytes")
            async for _, record in self._bucket.download_many([info]):
                if isinstance(record, SyncdError):
                    raise record
                assert isinstance(record, bytes)
                self._told.pop(version, None)
                return record, info.metadata.get(SIGNATURES, "")
        except (ObjectCorrupt, ObjectGone) as error:
            if self._told.get(version) != error.message:
                self._log.warning("key_set_refused", version=version, reason=error.message)
            self._told[version] = error.message
        return None

    async def _keep(self, trust: Trust, seen: dict[str, Seen]) -> None:
        """Write down what is believed from now on, and only then believe it."""
        await self._thread.run(lambda: self._note.save(trust, seen))
        self._trust, self._seen = trust, seen


@dataclass(slots=True)
class _Listing:
    """The key sets that a bucket was found to have: it is listed once, then only what is new.

    :ivar created: which bucket of that name.
    :ivar seq: as far as it was listed.
    :ivar found: by version; ``None``: one that cannot be read, which is tried again.
    """

    created: str = ""
    seq: int = 0
    found: dict[int, tuple[bytes, str] | None] = field(default_factory=dict)


def _version_of(item: ObjectInfo | BadMeta) -> int:
    """Return the version of a key set's object, 0 where it is none."""
    if isinstance(item, BadMeta) or not item.name.startswith(KEYS):
        return 0
    digits = item.name.removeprefix(KEYS)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) == KEY_DIGITS else 0


def _recovered(known: dict[str, Seen], trust: Trust, since: str) -> dict[str, Seen]:
    return {channel: recover(seen, trust, since) for channel, seen in known.items()}


def _expires_of(commit: Commit) -> str:
    move = read_move(commit.move)
    return "" if move is None else move.expires
