"""What a host believes of a folder: trusted keys followed from set to set, and what was seen, kept outside the index.

Rules kept here (docs/security.md):
 * what was seen is written down before it is followed, and synced: a restart, or an index that was lost, leads nobody
   back. A note that is damaged stops the folder until a person decides: without it a replay could not be told;
 * key sets are followed before a channel is judged, so that a revoked key is of no more use from the round on in which
   the new set is there to be read;
 * an end (``expires``) that has come refuses what is new, and raises an alarm about what is here already.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

import structlog

from syncd.errors import DiskProblem, ObjectCorrupt, SyncdError, Untrusted
from syncd.moves import read_move
from syncd.store.base import BadMeta
from syncd.trust import (
    KEYS,
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
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from syncd.service import FolderThread
    from syncd.store.base import Bucket
    from syncd.trees import Commit

log = structlog.get_logger()

CLOCK_SLACK_SECONDS: Final = 300.0
"""What two hosts' clocks may differ by before an end counts as come."""
MAX_KEY_SETS: Final = 1000
"""Key sets that are read in one round: who may write to the bucket could put any number there."""
KEY_DIGITS: Final = 10
_DAMAGED: Final = "move it away only if this host may trust its configuration and the folder anew"


class TrustNote:
    """Where what is trusted and what was seen is kept: one small file, replaced whole. Blocking.

    :param file: ``None``: nothing outlives the process.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def load(self) -> tuple[Trust | None, dict[str, Seen]]:
        """Return the trusted keys (``None``: nothing noted) and what was seen of each channel.

        :raises Untrusted: the note is damaged.
        :raises DiskProblem: it cannot be read.
        """
        if self._file is None:
            return None, {}
        try:
            text = self._file.read_text()
        except FileNotFoundError:
            return None, {}
        except UnicodeDecodeError:
            text = ""
        except OSError as error:
            raise DiskProblem(f"cannot read {self._file}: {error.strerror}") from error
        try:
            fields = json.loads(text)
            seen = {str(name): Seen.from_json(json.dumps(one)) for name, one in fields["seen"].items()}
            return Trust.from_json(json.dumps(fields["trust"])), seen
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Untrusted(f"{self._file}: what this host has seen cannot be read", hint=_DAMAGED) from None

    def save(self, trust: Trust, seen: dict[str, Seen]) -> None:
        """Replace the note, durably.

        :raises DiskProblem: the disk refuses.
        """
        if self._file is None:
            return
        fields = {
            "trust": json.loads(trust.to_json()),
            "seen": {name: json.loads(one.to_json()) for name, one in seen.items()},
        }
        draft = self._file.with_name(f".{self._file.name}.new")
        try:
            with draft.open("w") as file:
                json.dump(fields, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._file)
            directory = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise DiskProblem(f"cannot write {self._file}: {error.strerror}", hint="free some space") from error


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

    @property
    def active(self) -> bool:
        """Whether anything is checked."""
        return self._configured is not None

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
        self._expires = ends

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

    def stale_since(self) -> str:
        """Return since when nothing fresh has arrived, "" while what is here is fresh or never ends."""
        return self._expires if self._has_come(self._expires) else ""

    def _has_come(self, expires: str) -> bool:
        return is_expired(expires, self._clock(), slack=CLOCK_SLACK_SECONDS)

    # -- keys ----------------------------------------------------------------------------------------------------------

    async def _follow_keys(self) -> Trust:
        """Return what is trusted now, after every key set that leads on."""
        assert self._configured is not None
        before = self._trust
        if before is None:
            stored, self._seen = await self._thread.run(self._note.load)
            before = resume(stored, self._configured)
            if stored is not None and before != stored:
                self._log.warning("trust_reconfigured", keys=len(before.keys), threshold=before.threshold)
        trust, problem = follow(before, await self._key_sets(before.version), folder=self._bucket.name)
        if problem is not None and problem.message != self._problem:
            self._log.warning("key_set_refused", version=trust.version + 1, reason=problem.message)
        self._problem = "" if problem is None else problem.message
        if trust != self._trust:
            await self._keep(trust, {channel: recover(seen, trust) for channel, seen in self._seen.items()})
            if trust.version != before.version:
                self._log.info("keys_changed", version=trust.version, keys=len(trust.keys), threshold=trust.threshold)
        return trust

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
        found: dict[int, tuple[bytes, str]] = {}
        versions: list[int] = []
        if await self._bucket.get_info(keys_name(1)) is None:  # the usual case: keys were never replaced
            return found
        async for page in self._bucket.changes(0):
            for item in page.items:
                if isinstance(item, BadMeta) or item.deleted or not item.name.startswith(KEYS):
                    continue
                digits = item.name.removeprefix(KEYS)
                if digits.isascii() and digits.isdigit() and len(digits) == KEY_DIGITS and int(digits):
                    versions.append(int(digits))
        for version in sorted(versions)[-MAX_KEY_SETS:]:
            one = await self._key_set(version)
            if one is not None:
                found[version] = one
        return found

    async def _key_set(self, version: int) -> tuple[bytes, str] | None:
        """Return a key set's bytes and signatures; ``None`` where there is none that can be read."""
        info = await self._bucket.get_info(keys_name(version))
        if info is None or info.deleted:
            return None
        try:
            async for _, record in self._bucket.download_many([info]):
                if isinstance(record, SyncdError):
                    raise record
                assert isinstance(record, bytes)
                return record, info.metadata.get(SIGNATURES, "")
        except ObjectCorrupt as error:
            self._log.warning("key_set_refused", version=version, reason=error.message)
        return None

    async def _keep(self, trust: Trust, seen: dict[str, Seen]) -> None:
        """Write down what is believed from now on, and only then believe it."""
        await self._thread.run(lambda: self._note.save(trust, seen))
        self._trust, self._seen = trust, seen


def _expires_of(commit: Commit) -> str:
    move = read_move(commit.move)
    return "" if move is None else move.expires
