"""Moving channels, replacing trusted keys, and adding signatures: what a person does to a bucket of generations.

Rules kept here:
 * every write is fenced by the sequence that was read: of two people the second is told who was first, and changes
   nothing;
 * a channel is moved only to a generation of which the bucket still has everything;
 * a move says who, when and why, and is counted; the count outlives the channel;
 * nothing is signed whose folder, channel, number or digest is not what it is said to be. Who else signed it is for
   subscribers to judge (:mod:`syncd.trust`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from syncd.errors import BadSignatures, ObjectCorrupt, ObjectGone, SyncdError, UsageError, WriteConflict
from syncd.index import Index
from syncd.index.blobs import Blobs
from syncd.model import Kind
from syncd.moves import MAX_NEXT_COUNT, move_metadata, read_move, time_text
from syncd.nodes import (
    RECIPE_LEVELS,
    Generation,
    Node,
    NodeRef,
    Where,
    decode_recipe,
    decode_record,
    digest_of,
)
from syncd.paths import object_name, printable
from syncd.relayout import is_blob
from syncd.service import FolderThread
from syncd.signatures import (
    MAX_SIGNATURES,
    Signer,
    add_signature,
    decode_signatures,
    encode_signatures,
    is_public,
    signers,
)
from syncd.store.base import CHANNELS, CHUNK_SIZE, HEAD, BadMeta, Link, ObjectMeta, SmallPut, Stored
from syncd.store.mapping import KEY_SET, KIND
from syncd.trees import TreeReader, generation_name, number_of
from syncd.trust import (
    MAX_KEYS,
    MOVE,
    SIGNATURES,
    WHO_MAX,
    KeySet,
    Move,
    Statement,
    Trust,
    check_move,
    decode_keys,
    decode_move,
    encode_keys,
    follow,
    keys_name,
    seconds_of,
    start_at,
    statement_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from syncd.store.base import Bucket, ObjectInfo

log = structlog.get_logger()

MAX_KEY_SETS: Final = 1000
"""Key sets that are looked at: whoever may write to the bucket could make any number."""
MAX_TERM: Final = 36_500 * 86_400.0
"""Seconds that a move may be good for, when it does not say never."""
WALK_AT_ONCE: Final = 64
FETCH_AT_ONCE: Final = 64

_NAME = re.compile(r"(?=.*[^0-9])[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
"""A channel's name; never digits alone, which are a generation."""


# -- records and signatures --------------------------------------------------------------------------------------------


def signature_text(kind: Statement, data: bytes, *signer: Signer, before: str = "") -> str:
    """Return the text of the signatures over a record.

    :param signer: who signs; none leaves what was there.
    :param before: the text that was there. What is no good signature in it goes.
    :raises UsageError: there are as many as may be.
    """
    statement = statement_of(kind, data)
    try:
        signatures = tuple(one for one in decode_signatures(before) if signers(statement, (one,), {one.key}))
    except BadSignatures:
        signatures = ()
    for one in signer:
        signatures = add_signature(signatures, one.sign(statement))
    if len(signatures) > MAX_SIGNATURES:
        raise UsageError(f"it has {MAX_SIGNATURES} signatures already, which is the most")
    return encode_signatures(signatures)


def good_signers(kind: Statement, data: bytes, text: str) -> tuple[str, ...]:
    """Return the keys whose signature over a record is good, whoever they are, sorted."""
    try:
        signatures = decode_signatures(text)
    except BadSignatures:
        return ()
    return tuple(sorted(signers(statement_of(kind, data), signatures, {one.key for one in signatures})))


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
    :ivar signed_by: the key that signed the move; "" for none.
    :ivar signatures: good signatures that the generation has, by whomever.
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
    signed_by: str
    signatures: int


@dataclass(frozen=True, slots=True)
class ChannelState:
    """A channel as the bucket tells it. Nothing in it is checked against keys: it is for people.

    :ivar number: the generation that it points at; 0 where it points at none of this bucket.
    :ivar behind: how many newer generations there are.
    :ivar seq: of the link's metadata message.
    :ivar written: when the server stored the link, seconds since the epoch.
    :ivar count, at, who, why, expires: as the move says; 0 and "" where there is none.
    :ivar signers: keys with a good signature over the move, trusted or not.
    :ivar problem: what is wrong with it; "" for nothing.
    """

    name: str
    number: int
    behind: int
    seq: int
    written: float
    count: int = 0
    at: str = ""
    who: str = ""
    why: str = ""
    expires: str = ""
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

    async def sign(self, channel: str, signer: Signer) -> bool:
        """Add a signature to a channel's present move; tell whether it is new.

        :raises UsageError: no such channel, or nobody recorded its move.
        :raises Untrusted: the move is not that of this channel, or leads elsewhere than the channel does.
        :raises WriteConflict: somebody else moved the channel meanwhile.
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
        before = info.metadata.get(SIGNATURES, "")
        if signer.public in good_signers(Statement.MOVE, data, before):
            return False
        assert info.link is not None
        text = signature_text(Statement.MOVE, data, signer, before=before)
        try:
            await self._bucket.put_link(
                info.name, info.link, expected_seq=info.seq, metadata={**info.metadata, SIGNATURES: text}
            )
        except WriteConflict as error:
            raise await self._told(channel) from error
        return True

    async def target(self, channel: str) -> int:
        """Return the number of the generation that a channel points at; 0 for none of this bucket.

        :raises UsageError: no such channel.
        """
        return _target(self._bucket, await self._link(channel))

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
        count = wish.count or next_count(place.info, folder=folder, channel=channel)
        record = await read_record(self._bucket, wish.number)
        if record is None:
            raise _no_generation(folder, wish.number)
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
            signed_by=wish.signer.public if wish.signer is not None else "",
            signatures=len(record.signers),
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


def _no_generation(folder: str, number: int) -> UsageError:
    return UsageError(f"folder {folder!r} has no generation {number}", hint=f"see: syncd log {folder}")


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
        at=move.at,
        who=move.who,
        why=move.why,
        expires=move.expires,
        signers=good_signers(Statement.MOVE, data, info.metadata.get(SIGNATURES, "")),
        problem=problem,
    )


# -- generations -------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """A generation's object as it is.

    :ivar info: its metadata.
    :ivar data: the stored record.
    """

    info: ObjectInfo
    data: bytes
    generation: Generation

    @property
    def signers(self) -> tuple[str, ...]:
        """Keys with a good signature over it, trusted or not."""
        return good_signers(Statement.GENERATION, self.data, self.info.metadata.get(SIGNATURES, ""))


async def read_record(bucket: Bucket, number: int) -> Record | None:
    """Return a generation's object by its number, ``None`` where there is none (any more).

    :raises ObjectCorrupt: its record is not readable, or not this folder's.
    :raises ObjectGone: its content is gone.
    """
    info = await bucket.get_info(generation_name(number))
    if info is None or info.deleted:
        return None
    data = await _content(bucket, info)
    generation = decode_record(data)
    if (generation.folder, generation.number) != (bucket.name, number):
        raise ObjectCorrupt(
            f"generation {number} holds the record of generation {generation.number} "
            f"of folder {printable(generation.folder)!r}"
        )
    return Record(info, data, generation)


async def sign_generation(bucket: Bucket, number: int, signer: Signer) -> bool:
    """Add a signature to a generation; tell whether it is new.

    :raises UsageError: there is no such generation.
    :raises WriteConflict: somebody else wrote it meanwhile; try again.
    """
    record = await read_record(bucket, number)
    if record is None:
        raise _no_generation(bucket.name, number)
    return await _sign_object(bucket, record.info, Statement.GENERATION, record.data, signer)


async def _sign_object(bucket: Bucket, info: ObjectInfo, kind: Statement, data: bytes, signer: Signer) -> bool:
    before = info.metadata.get(SIGNATURES, "")
    if signer.public in good_signers(kind, data, before):
        return False
    text = signature_text(kind, data, signer, before=before)
    meta = ObjectMeta(info.name, info.description, info.headers, {**info.metadata, SIGNATURES: text})
    stored = Stored(info.nuid, info.chunks, info.size, digest_of(data), info.sha256, info.chunk_size)
    try:
        await bucket.put_meta(meta, stored, expected_seq=info.seq)
    except WriteConflict as error:
        raise WriteConflict(f"somebody else wrote {info.name} meanwhile", hint="try again") from error
    return True


async def _content(bucket: Bucket, info: ObjectInfo) -> bytes:
    """Return the content of an object of one chunk.

    :raises ObjectGone, ObjectCorrupt: it cannot be had.
    """
    if info.size > CHUNK_SIZE:
        raise ObjectCorrupt(f"{printable(info.name)} has {info.size} bytes")
    async for _, data in bucket.download_many([info]):
        if isinstance(data, Exception):
            raise data
        return data
    raise ObjectGone(f"the content of {printable(info.name)} is gone")


async def require_whole(bucket: Bucket, generation: Generation) -> None:
    """Check that a bucket still has everything that a generation is made of, reading its nodes and recipes only.

    Memory is bounded: what the bucket lists, and what was visited, is kept in a temporary database.

    :raises ObjectGone: a blob was collected.
    :raises ObjectCorrupt: a node or recipe cannot be read.
    """
    walk = _Walk(bucket)
    try:
        await walk.run(generation.root)
    except ObjectGone as error:
        raise ObjectGone(
            f"blobs of generation {generation.number} were collected: {error.message}",
            hint="choose a newer one; what is kept, keep_generations and keep_days of the publisher say",
        ) from error
    except ObjectCorrupt as error:
        raise ObjectCorrupt(f"generation {generation.number} cannot be read: {error.message}") from error
    finally:
        await walk.close()


class _Walk:
    """Goes through a tree's nodes and recipes, and compares what they name with what the bucket lists."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._index = Index(None)
        self._blobs = Blobs(self._index)
        self._thread = FolderThread(f"whole-{bucket.name}")
        self._reader = TreeReader(bucket)

    async def close(self) -> None:
        """Forget everything; also while this task is being cancelled."""
        await self._thread.close(self._index.close)

    async def run(self, root: NodeRef) -> None:
        """Go through all of it.

        :raises ObjectGone, ObjectCorrupt: something cannot be had.
        """
        async for page in self._bucket.list_chunks():
            listed = [name for name in page if is_blob(name)]
            await self._thread.run(partial(self._blobs.reach, listed))  # "reached" are here those that there are
        stack = await self._thread.run(partial(self._blobs.visit, [root]))
        while stack:
            some = [stack.pop() for _ in range(min(WALK_AT_ONCE, len(stack)))]
            nodes = await self._reader.nodes(some)
            below, missing, recipes = await self._thread.run(partial(self._look, nodes))
            stack.extend(below)
            await self._confirm(missing)
            for recipe in recipes:
                await self._follow(recipe)

    def _look(self, nodes: list[Node]) -> tuple[list[NodeRef], list[str], list[NodeRef]]:
        """Return the directories and recipes below some nodes that are new, and the blobs that are not listed."""
        below: list[NodeRef] = []
        recipes: list[NodeRef] = []
        needed: set[str] = set()
        for node in nodes:
            for child in node.children():
                where = child.location.where
                if child.entry.kind is Kind.DIR:
                    below.append(NodeRef(child.tree, child.location, child.length))
                elif where is Where.RECIPE:
                    recipes.append(NodeRef(child.location.blob, child.location, child.entry.size))
                elif where is not Where.EMPTY:
                    needed.add(child.location.blob)
        return self._blobs.visit(below), self._blobs.unreached(needed), self._blobs.visit(recipes)

    async def _follow(self, recipe: NodeRef) -> None:
        """Look at the pieces of a recipe, a level at a time."""
        levels = [(recipe.location.blob, recipe.length, RECIPE_LEVELS)]
        while levels:
            digest, length, below = levels.pop()
            read = decode_recipe((await self._reader.blobs({digest}))[digest], size=length, below=below)
            if read.level:
                levels.extend((piece.digest, piece.length, read.level) for piece in read.pieces)
            else:
                pieces = {piece.digest for piece in read.pieces}
                await self._confirm(await self._thread.run(partial(self._blobs.unreached, pieces)))

    async def _confirm(self, missing: Sequence[str]) -> None:
        """Ask for blobs that were not listed: one may have been sent since the listing began.

        :raises ObjectGone, ObjectCorrupt: one cannot be had.
        """
        for start in range(0, len(missing), FETCH_AT_ONCE):
            async for _, data in self._bucket.get_blobs(missing[start : start + FETCH_AT_ONCE]):
                if not isinstance(data, bytes):
                    raise data


# -- trusted keys ------------------------------------------------------------------------------------------------------


class StoredKeys(NamedTuple):
    """A key set's object as it is.

    :ivar data: the stored record; empty where it cannot be had.
    :ivar signatures: the text of its signatures.
    """

    info: ObjectInfo
    data: bytes
    signatures: str


@dataclass(frozen=True, slots=True)
class KeySetState:
    """A key set as the bucket tells it.

    :ivar signers: keys with a good signature over it, trusted or not.
    :ivar trusted: whether the chain from the keys that were asked about leads to it, or beyond.
    :ivar problem: why it cannot be read; "" for nothing.
    """

    version: int
    keys: tuple[str, ...] = ()
    threshold: int = 0
    at: str = ""
    why: str = ""
    signers: tuple[str, ...] = ()
    trusted: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What the next key set is to be, against the one before.

    :ivar threshold: how many keys have to sign from then on; 0: as many as before.
    """

    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    threshold: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class KeysChanged:
    """A key set that was written.

    :ivar signatures, needed: how many of the keys trusted before have signed it, and how many must before any
        subscriber follows it.
    """

    version: int
    keys: tuple[str, ...]
    threshold: int
    signatures: int
    needed: int


async def read_keys(bucket: Bucket, after: int = 0) -> dict[int, StoredKeys]:
    """Return a bucket's key sets by version, from the one after a known version to the first that is missing."""
    found: dict[int, StoredKeys] = {}
    for version in range(after + 1, after + 1 + MAX_KEY_SETS):
        info = await bucket.get_info(keys_name(version))
        if info is None or info.deleted:
            break
        try:
            data = await _content(bucket, info)
        except (ObjectGone, ObjectCorrupt):
            data = b""  # nobody's signature is good over it: whoever follows the chain stops here
        found[version] = StoredKeys(info, data, info.metadata.get(SIGNATURES, ""))
    return found


class KeySets:
    """The key sets of one bucket."""

    def __init__(self, bucket: Bucket, clock: Callable[[], float]) -> None:
        self._bucket = bucket
        self._clock = clock
        self._log = log.bind(folder=bucket.name)

    async def show(self, configured: Trust | None) -> list[KeySetState]:
        """Return all key sets, the oldest first.

        :param configured: the keys that subscribers' configurations name; ``None`` where nobody knows: then none of
            them counts as trusted.
        """
        records = await read_keys(self._bucket)
        reached = self._present(configured, records).version if configured is not None else 0
        return [_keys_state(version, one, trusted=version <= reached) for version, one in records.items()]

    async def change(
        self,
        configured: Trust,
        wish: KeyChange,
        signers: Sequence[Signer],
        *,
        instead: bool = False,
    ) -> KeysChanged:
        """Write the next key set.

        :param configured: the keys that subscribers' configurations name: what the bucket says is not believed.
        :param signers: of the keys trusted now. Too few of them may sign: then others add theirs (:meth:`sign`).
        :param instead: write over a next one that is there already and lacks signatures.
        :raises UsageError: a change that makes no sense, or a signer who is not trusted.
        :raises WriteConflict: somebody else wrote the next one meanwhile, or before, and it waits for signatures.
        """
        records = await read_keys(self._bucket)
        trust = self._present(configured, records)
        version = trust.version + 1
        keys = _changed(trust, wish)
        threshold = wish.threshold or trust.threshold
        if threshold > len(keys):
            raise UsageError(f"{threshold} of {len(keys)} keys can never sign", hint="lower it: --threshold N")
        for signer in signers:
            if signer.public not in trust.keys:
                raise UsageError(f"{signer.public} is none of the keys that are trusted now")
        if not signers:
            raise UsageError("a key set needs the signature of a key that is trusted now")
        waiting = records.get(version)
        if waiting is not None and not instead:
            raise WriteConflict(
                f"there is a key set {version} already, which lacks signatures",
                hint=f"look at it: syncd keys {self._bucket.name}; then sign it, or write --instead of it",
            )
        at = time_text(self._clock())
        try:
            record = encode_keys(KeySet(self._bucket.name, version, keys, threshold, at, trust.digest, wish.why))
        except ValueError as error:
            raise UsageError(f"the key set cannot be recorded: {error}") from error
        await self._put(version, record, signature_text(Statement.KEYS, record, *signers), waiting)
        good = len({signer.public for signer in signers})
        self._log.info("keys_changed", version=version, keys=len(keys), threshold=threshold, signatures=good)
        return KeysChanged(version, keys, threshold, good, trust.threshold)

    async def sign(self, version: int, signer: Signer) -> bool:
        """Add a signature to a key set; tell whether it is new.

        :raises UsageError: there is no such key set.
        :raises ObjectCorrupt: it is not readable, or does not follow the one before it.
        :raises WriteConflict: somebody else wrote it meanwhile.
        """
        records = await read_keys(self._bucket)
        one = records.get(version)
        if one is None:
            raise UsageError(f"folder {self._bucket.name!r} has no key set {version}")
        keys = decode_keys(one.data)
        parent = digest_of(records[version - 1].data) if version > 1 else ""
        if (keys.folder, keys.version, keys.parent) != (self._bucket.name, version, parent):
            raise ObjectCorrupt(f"key set {version} is another folder's, or does not follow the one before it")
        return await _sign_object(self._bucket, one.info, Statement.KEYS, one.data, signer)

    def _present(self, configured: Trust, records: dict[int, StoredKeys]) -> Trust:
        """Return what is trusted by what the bucket has, given what the configuration names."""
        folder = self._bucket.name
        plain = {version: (one.data, one.signatures) for version, one in records.items()}
        trust = follow(configured, plain, folder=folder).trust
        if trust.version:
            return trust
        for version in sorted(plain, reverse=True):
            start = start_at(trust, version, plain[version][0], folder)
            if start is not None:
                return start
        return trust

    async def _put(self, version: int, record: bytes, signatures: str, waiting: StoredKeys | None) -> None:
        name = keys_name(version)
        meta = ObjectMeta(
            name,
            headers={"Content-Type": ("application/json",)},
            metadata={KIND: KEY_SET, SIGNATURES: signatures},
        )
        expected = waiting.info.seq if waiting is not None else await self._absent(name)
        (result,) = await self._bucket.put_many([SmallPut(meta, record, None, expected)])
        if isinstance(result.error, WriteConflict):
            raise WriteConflict(
                f"somebody else wrote key set {version} meanwhile",
                hint=f"look at it: syncd keys {self._bucket.name}",
            ) from result.error
        if result.error is not None:
            raise result.error

    async def _absent(self, name: str) -> int:
        info = await self._bucket.get_info(name)
        return 0 if info is None else info.seq


def _changed(trust: Trust, wish: KeyChange) -> tuple[str, ...]:
    """Return the next keys.

    :raises UsageError: one is there already, or is not there; or too many, or none.
    """
    for key in wish.add:
        if not is_public(key):
            raise UsageError(f"{printable(key)!r} is no public key of a user (U…)", hint="make one: syncd keygen FILE")
        if key in trust.keys:
            raise UsageError(f"{printable(key)} is trusted already")
    for key in wish.drop:
        if key not in trust.keys:
            raise UsageError(f"{printable(key)} is none of the keys that are trusted now")
    keys = (trust.keys | set(wish.add)) - set(wish.drop)
    if not 0 < len(keys) <= MAX_KEYS:
        raise UsageError(f"{len(keys)} keys; there have to be 1 to {MAX_KEYS}")
    return tuple(sorted(keys))


def _keys_state(version: int, one: StoredKeys, *, trusted: bool) -> KeySetState:
    try:
        keys = decode_keys(one.data)
    except SyncdError as error:
        return KeySetState(version, problem=error.message)
    return KeySetState(
        version=version,
        keys=keys.keys,
        threshold=keys.threshold,
        at=keys.at,
        why=keys.why,
        signers=good_signers(Statement.KEYS, one.data, one.signatures),
        trusted=trusted,
    )
