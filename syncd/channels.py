"""Moving channels, and adding signatures to their moves: what a person does to a bucket of generations.

Rules kept here:
 * every write is fenced by the sequence that was read: of two people the second is told who was first, and changes
   nothing;
 * a channel is moved only to a generation of which the bucket still has everything;
 * a move says who, when and why, and is counted; the count outlives the channel;
 * nothing is signed whose folder, channel, number or digest is not what it is said to be, and nothing that was not read
   before (:class:`syncd.records.Signable`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import FormatTooNew, ObjectCorrupt, ObjectGone, SyncdError, UsageError, WriteConflict
from syncd.moves import MAX_NEXT_COUNT, move_metadata, read_move, time_text
from syncd.nodes import digest_of
from syncd.paths import object_name, printable
from syncd.records import (
    Signable,
    good_signers,
    no_generation,
    read_record,
    signable_generation,
    signature_text,
)
from syncd.store.base import CHANNELS, HEAD, BadMeta, Link
from syncd.trees import generation_name, number_of
from syncd.trust import (
    MOVE,
    SIGNATURES,
    WHO_MAX,
    Move,
    Statement,
    check_move,
    decode_move,
    seconds_of,
)
from syncd.whole import require_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from syncd.signatures import Signer
    from syncd.store.base import Bucket, ObjectInfo

log = structlog.get_logger()

MAX_TERM: Final = 36_500 * 86_400.0
"""Seconds that a move may be good for, when it does not say never."""

_NAME = re.compile(r"(?=.*[^0-9])[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
"""A channel's name; never digits alone, which are a generation."""


def next_count(info: ObjectInfo | None, *, folder: str, channel: str) -> int:
    """Return the count of a channel's next move, given its link (or the tombstone of that) as it is now.

    :raises ObjectCorrupt: the bucket's word on the present move is of no use.
    :raises FormatTooNew: a newer version wrote it.
    """
    text = info.metadata.get(MOVE, "") if info is not None else ""
    if not text:
        return 1
    try:
        move = decode_move(text.encode())
    except ObjectCorrupt as error:
        raise _no_count(channel, f"is not readable: {error.message}") from error
    if (move.folder, move.channel) != (folder, channel):
        raise _no_count(channel, f"is that of channel {printable(move.channel)!r} of {printable(move.folder)!r}")
    if move.count >= MAX_NEXT_COUNT:
        raise _no_count(channel, f"has the count {move.count}, which nobody honest counted up to")
    return move.count + 1


def chosen_count(info: ObjectInfo | None, wished: int, *, folder: str, channel: str) -> int:
    """Return the count of a channel's next move: what a person chose, 0 for the next one.

    :raises UsageError: subscribers would take it for an old one.
    :raises ObjectCorrupt, FormatTooNew: see :func:`next_count`.
    """
    if not wished:
        return next_count(info, folder=folder, channel=channel)
    try:
        least = next_count(info, folder=folder, channel=channel)
    except (ObjectCorrupt, FormatTooNew):
        return wished  # what is there says nothing: that is what the person knows better
    if wished < least:
        raise UsageError(
            f"the present move of channel {channel!r} is counted {least - 1}", hint=f"choose {least} or more, or none"
        )
    return wished


def term_of(info: ObjectInfo | None) -> float:
    """Return for how many seconds a channel's present move is good; 0: without an end, or nothing readable is said."""
    move = read_move(info.metadata.get(MOVE, "")) if info is not None else None
    if move is None or not move.expires:
        return 0.0
    begin, end = seconds_of(move.at), seconds_of(move.expires)
    return min(MAX_TERM, max(0.0, end - begin)) if begin is not None and end is not None else 0.0


def _no_count(channel: str, why: str) -> ObjectCorrupt:
    return ObjectCorrupt(
        f"the present move of channel {channel!r} {why}",
        hint="find out who wrote it, then say how far the count got: --count N, above what subscribers saw",
    )


def check_name(channel: str) -> str:
    """Return ``channel`` if it can be the name of a channel.

    :raises UsageError: it cannot.
    """
    if not _NAME.fullmatch(channel):
        raise UsageError(
            f"{printable(channel)!r} is no name of a channel",
            hint="use letters, digits, - and _, at most 64, and not digits alone",
        )
    return channel


# -- channels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moved:
    """A move that was made.

    :ivar before: the generation that the channel pointed at; 0 for none.
    :ivar record: BLAKE3 of the generation's record.
    :ivar seq: of the link's metadata message.
    :ivar digest: BLAKE3 of the move's own record.
    :ivar signed_by: the key that signed the move; "" for none.
    :ivar signatures: good signatures that the generation has, by whomever.
    :ivar signed_before: the move before it had a good signature, by whomever.
    """

    channel: str
    before: int
    number: int
    record: str
    count: int
    seq: int
    at: str
    who: str
    why: str
    expires: str
    digest: str
    signed_by: str
    signatures: int
    signed_before: bool


@dataclass(frozen=True, slots=True)
class ChannelState:
    """A channel as the bucket tells it. Nothing in it is checked against keys: it is for people.

    :ivar number: the generation that it points at; 0 where it points at none of this bucket.
    :ivar behind: how many newer generations there are.
    :ivar seq: of the link's metadata message.
    :ivar written: when the server stored the link, seconds since the epoch.
    :ivar count, record, at, who, why, expires: as the move says; 0 and "" where there is none.
    :ivar digest: BLAKE3 of the move: whoever names it has named the generation's record as well.
    :ivar signers: keys with a good signature over the move, trusted or not.
    :ivar problem: what is wrong with it; "" for nothing.
    """

    name: str
    number: int
    behind: int
    seq: int
    written: float
    count: int = 0
    record: str = ""
    at: str = ""
    who: str = ""
    why: str = ""
    expires: str = ""
    digest: str = ""
    signers: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a move is to say; see :meth:`Channels.promote`."""

    number: int
    who: str
    why: str
    signer: Signer | None
    valid_seconds: float | None
    count: int


class _Place(NamedTuple):
    """A channel as it was read.

    :ivar info: its link, or the tombstone of that; ``None`` for nothing that can be read.
    :ivar seq: what the move is fenced by; ``None``: it is written over.
    """

    info: ObjectInfo | None
    seq: int | None


class Channels:
    """The channels of one bucket of the generations layout."""

    def __init__(self, bucket: Bucket, clock: Callable[[], float]) -> None:
        self._bucket = bucket
        self._clock = clock
        self._log = log.bind(folder=bucket.name)

    async def promote(
        self,
        number: int,
        channel: str,
        *,
        who: str,
        why: str = "",
        signer: Signer | None = None,
        valid_seconds: float | None = None,
        count: int = 0,
    ) -> Moved:
        """Point a channel at a generation, also at the one that it points at: that makes the move anew.

        :param valid_seconds: how long until subscribers raise an alarm that nothing newer came; 0: never; ``None``: as
            long as with the move before, so that going back does not end the watch over a channel by oversight.
        :param count: what the bucket says of the move before is missing or wrong: this is the count of this one.
        :raises UsageError: the head, which only commits move; or there is no such generation.
        :raises WriteConflict: somebody else moved the channel meanwhile; nothing was changed.
        :raises ObjectGone, ObjectCorrupt: the bucket has not everything of that generation any more; or the channel is
            not readable. With a count of one's own that one is written over.
        """
        if channel == HEAD:
            raise UsageError(
                f"channel {HEAD!r} follows the commits, and cannot be promoted",
                hint=f"to go back for now: syncd rollback {self._bucket.name} --channel {HEAD}",
            )
        place = await self._place(check_name(channel), count)
        wish = _Wish(number, who, why, signer, valid_seconds, count)
        return await self._move(channel, place, wish)

    async def rollback(
        self,
        channel: str,
        *,
        to: int | None = None,
        who: str,
        why: str = "",
        signer: Signer | None = None,
        valid_seconds: float | None = None,
        count: int = 0,
    ) -> Moved:
        """Point a channel at an older generation: by default at the newest one before that which it points at.

        The head may be put forward again as well, by ``to``; the publisher's next commit moves it in any case.

        :raises UsageError: no such channel, or nothing older.
        :raises WriteConflict, ObjectGone, ObjectCorrupt: as in :meth:`promote`.
        """
        info = await self._link(channel)
        present = _target(self._bucket, info)
        if to is None:
            older = [number for number in await self._numbers() if number < present]
            if not older:
                raise UsageError(
                    f"channel {channel!r} points at generation {present}, and there is none older"
                    if present
                    else f"channel {channel!r} points at no generation of this folder",
                    hint=f"name one: --to N; see: syncd log {self._bucket.name}",
                )
            to = max(older)
        elif to == present:
            raise UsageError(f"channel {channel!r} points at generation {present} already")
        elif to > present and channel != HEAD:
            raise UsageError(
                f"channel {channel!r} points at generation {present}: {to} is newer",
                hint=f"forward is: syncd promote {self._bucket.name} {to} --channel {channel}",
            )
        wish = _Wish(to, who, why, signer, valid_seconds, count)
        return await self._move(channel, _Place(info, info.seq), wish)

    async def remove(self, channel: str) -> None:
        """Remove a channel. Its subscribers stay where they are; the count of its moves is kept.

        :raises UsageError: the head, or no such channel.
        :raises WriteConflict: somebody else moved it meanwhile.
        """
        if channel == HEAD:
            raise UsageError(f"channel {HEAD!r} cannot be removed")
        info = await self._link(channel)
        kept = {key: info.metadata[key] for key in (MOVE, SIGNATURES) if key in info.metadata}
        try:
            await self._bucket.delete(info.name, expected_seq=info.seq, metadata=kept)
        except WriteConflict as error:
            raise await self._told(channel) from error
        self._log.info("channel_removed", channel=channel)

    async def show(self) -> list[ChannelState]:
        """Return all channels: the head, then the others by name."""
        links: list[ObjectInfo] = []
        numbers: set[int] = set()
        found: list[ChannelState] = []
        async for page in self._bucket.changes(0):
            for item in page.items:
                if isinstance(item, BadMeta):
                    name = object_name(item.subject)
                    if name.startswith(CHANNELS):
                        found.append(ChannelState(name.removeprefix(CHANNELS), 0, 0, item.seq, 0, problem=item.reason))
                elif item.deleted:
                    continue
                elif item.name.startswith(CHANNELS):
                    links.append(item)
                elif item.link is None and (number := number_of(item.name)):
                    numbers.add(number)
        found += [_state(self._bucket, info, numbers) for info in links]
        return sorted(found, key=lambda one: (one.name != HEAD, one.name))

    async def to_sign(self, channel: str) -> tuple[Signable, Signable]:
        """Return the generation that a channel points at, and the channel's present move, which names its record.

        To be signed in this order: whoever finds the move signed then finds the generation signed as well.

        :raises UsageError: no such channel, or nobody recorded its move.
        :raises Untrusted: the move is not that of this channel, or leads elsewhere than the channel does.
        :raises ObjectGone, ObjectCorrupt: one of the two cannot be read.
        """
        info = await self._link(channel)
        text = info.metadata.get(MOVE, "")
        if not text:
            raise UsageError(
                f"channel {channel!r} has no recorded move to sign",
                hint=f"make one: syncd promote {self._bucket.name} N --channel {channel}",
            )
        data = text.encode()
        number = _target(self._bucket, info)
        record = await read_record(self._bucket, number) if number else None
        if record is None:
            raise ObjectGone(f"channel {channel!r} points at generation {number}, which is gone")
        digest = digest_of(record.data)
        check_move(decode_move(data), folder=self._bucket.name, channel=channel, number=number, record=digest)
        return signable_generation(record), Signable(f"channel {channel}", Statement.MOVE, info, data)

    async def sign(self, move: Signable, signer: Signer) -> bool:
        """Add a signature to a channel's move as it was read; tell whether it is new.

        :raises WriteConflict: somebody else moved the channel since.
        """
        info = move.info
        if signer.public in move.signers:
            return False
        assert info.link is not None
        text = signature_text(Statement.MOVE, move.data, signer, before=info.metadata.get(SIGNATURES, ""))
        try:
            await self._bucket.put_link(
                info.name, info.link, expected_seq=info.seq, metadata={**info.metadata, SIGNATURES: text}
            )
        except WriteConflict as error:
            raise await self._told(info.name.removeprefix(CHANNELS)) from error
        return True

    # -- moving --------------------------------------------------------------------------------------------------------

    async def _place(self, channel: str, count: int) -> _Place:
        """Return where a channel is to be written."""
        try:
            info = await self._bucket.get_info(CHANNELS + channel)
        except ObjectCorrupt:
            if not count:
                raise
            return _Place(None, None)
        return _Place(info, 0 if info is None else info.seq)

    async def _move(self, channel: str, place: _Place, wish: _Wish) -> Moved:
        folder = self._bucket.name
        count = chosen_count(place.info, wish.count, folder=folder, channel=channel)
        record = await read_record(self._bucket, wish.number)
        if record is None:
            raise no_generation(folder, wish.number)
        await require_whole(self._bucket, record.generation)
        now = self._clock()
        term = term_of(place.info) if wish.valid_seconds is None else wish.valid_seconds
        move = Move(
            folder=folder,
            channel=channel,
            count=count,
            number=wish.number,
            record=digest_of(record.data),
            at=time_text(now),
            who=wish.who[:WHO_MAX],
            why=wish.why,
            expires=time_text(now + term) if term else "",
        )
        try:
            metadata = move_metadata(move, wish.signer)
        except ValueError as error:
            raise UsageError(f"the move cannot be recorded: {error}") from error
        link = Link(folder, generation_name(wish.number))
        try:
            seq = await self._bucket.put_link(CHANNELS + channel, link, expected_seq=place.seq, metadata=metadata)
        except WriteConflict as error:
            raise await self._told(channel) from error
        crash_point("channel_moved")
        await self._still_there(channel, wish.number)
        self._log.info("channel_moved", channel=channel, generation=wish.number, count=count, who=move.who)
        return Moved(
            channel=channel,
            before=_target(self._bucket, place.info),
            number=move.number,
            record=move.record,
            count=count,
            seq=seq,
            at=move.at,
            who=move.who,
            why=move.why,
            expires=move.expires,
            digest=digest_of(metadata[MOVE].encode()),
            signed_by=wish.signer.public if wish.signer is not None else "",
            signatures=len(record.signers),
            signed_before=bool(_move_signers(place.info)),
        )

    async def _still_there(self, channel: str, number: int) -> None:
        """Look once more whether a generation is there, now that a channel holds it.

        RACE: a collection that read the channels before the move may remove the generation after it. The channel then
        points at nothing, and its subscribers stay where they are; whoever moved it is told here.

        :raises ObjectGone: it was collected.
        """
        info = await self._bucket.get_info(generation_name(number))
        if info is None or info.deleted:
            raise ObjectGone(
                f"generation {number} was collected while channel {channel!r} was moved to it",
                hint="move the channel to another one: it points at nothing now",
            )

    async def _link(self, channel: str) -> ObjectInfo:
        """Return a channel's link as it is.

        :raises UsageError: there is none.
        """
        info = await self._bucket.get_info(CHANNELS + channel) if channel else None
        if info is None or info.deleted:
            names = [printable(one.name) for one in await self.show()]
            raise UsageError(
                f"folder {self._bucket.name!r} has no channel {printable(channel)!r}",
                hint=f"channels: {', '.join(names)}" if names else f"see: syncd log {self._bucket.name}",
            )
        if info.link is None:
            raise ObjectCorrupt(f"channel {printable(channel)!r} is no link")
        return info

    async def _numbers(self) -> list[int]:
        """Return the numbers of the generations that there are."""
        numbers: list[int] = []
        async for page in self._bucket.changes(0):
            for item in page.items:
                if isinstance(item, BadMeta) or item.deleted or item.link is not None:
                    continue
                if number := number_of(item.name):
                    numbers.append(number)
        return sorted(numbers)

    async def _told(self, channel: str) -> WriteConflict:
        """Find out, for the one who came second, what the first one did."""
        hint = f"nothing of yours was changed; look, then decide again: syncd channels {self._bucket.name}"
        info = await self._bucket.get_info(CHANNELS + channel)
        if info is None or info.deleted:
            return WriteConflict(f"somebody else removed channel {channel!r} meanwhile", hint=hint)
        number = _target(self._bucket, info)
        move = read_move(info.metadata.get(MOVE, ""))
        if move is None:
            return WriteConflict(f"somebody else moved channel {channel!r} to generation {number} meanwhile", hint=hint)
        why = f" ({printable(move.why)})" if move.why else ""
        return WriteConflict(
            f"{printable(move.who) or 'somebody else'} moved channel {channel!r} to generation {number} "
            f"meanwhile, at {move.at}{why}",
            hint=hint,
        )


def _move_signers(info: ObjectInfo | None) -> tuple[str, ...]:
    text = info.metadata.get(MOVE, "") if info is not None and not info.deleted else ""
    data = text.encode("utf-8", "surrogatepass")
    return good_signers(Statement.MOVE, data, info.metadata.get(SIGNATURES, "")) if info is not None and text else ()


def _target(bucket: Bucket, info: ObjectInfo | None) -> int:
    """Return the number of the generation that a link points at; 0 for none of this bucket."""
    link = info.link if info is not None and not info.deleted else None
    return number_of(link.name or "") if link is not None and link.bucket == bucket.name else 0


def _problem(number: int, numbers: Collection[int]) -> str:
    if not number:
        return "it is no link to a generation of this folder"
    return "" if number in numbers else f"it points at generation {number}, which is gone"


def _state(bucket: Bucket, info: ObjectInfo, numbers: Collection[int]) -> ChannelState:
    name = info.name.removeprefix(CHANNELS)
    number = _target(bucket, info)
    plain = ChannelState(
        name=name,
        number=number,
        behind=sum(other > number for other in numbers),
        seq=info.seq,
        written=info.mtime_ns / 1e9,
        problem=_problem(number, numbers),
    )
    text = info.metadata.get(MOVE, "")
    if not text:
        return plain
    data = text.encode()
    try:
        move = decode_move(data)
    except SyncdError as error:
        return replace(plain, problem=plain.problem or f"its move is not readable: {error.message}")
    problem = plain.problem
    if (move.folder, move.channel, move.number) != (bucket.name, name, number):
        problem = problem or f"its move is that of channel {move.channel!r} to generation {move.number}"
    return replace(
        plain,
        count=move.count,
        record=move.record,
        at=move.at,
        who=move.who,
        why=move.why,
        expires=move.expires,
        digest=digest_of(data),
        signers=good_signers(Statement.MOVE, data, info.metadata.get(SIGNATURES, "")),
        problem=problem,
    )
