"""Who may say what a host goes to: channel moves and key sets as bytes and back, and the decisions about them.

Everything is pure. A subscriber with trusted keys goes where a *move* sends it that enough of them signed, to the
generation record whose digest the move names and that enough of them signed as well. What it remembers (:class:`Seen`,
:class:`Trust`) makes rollback and replay visible across restarts. The rules are kept here, each by one function:

 * signatures are over a *statement*: its kind, then the stored bytes, so that nothing signed as one kind of record can
   be shown as another; bytes are checked before anything is read from them (:func:`check_signed`);
 * a move and a generation count for the folder, channel and number that they name, nowhere else (:func:`check_move`);
 * the count of a channel's moves only grows (:func:`judge_move`); a number has one record (:func:`judge_generation`);
 * a key set is followed by the next one only, and by its own keys' word (:func:`advance`);
 * what only a removed key vouched for is doubted, nothing else is forgotten (:func:`recover`).

A move ("syncd-move") and signatures ("syncd-signatures") are texts in the metadata of the object they belong to; a key
set is the content of the object ``keys/<ten digits>``. All are canonical JSON, as generation records are.
"""

from __future__ import annotations

import json
import re
from calendar import monthrange, timegm
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from syncd.errors import BadSignatures, ObjectCorrupt, SyncdError, Untrusted
from syncd.nodes import FORMAT, MAX_GENERATION, check_format, decode_record, digest_of
from syncd.signatures import MAX_SIGNATURES, decode_signatures, is_public, signers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

MOVE: Final = "syncd-move"
"""Metadata key of a channel's link: the text of the move."""
SIGNATURES: Final = "syncd-signatures"
"""Metadata key of generations, channels' links and key sets: :func:`syncd.signatures.encode_signatures`."""
KEYS: Final = "keys/"
"""Prefix of the names of key sets; ten digits follow."""

MAX_COUNT: Final = (1 << 53) - 1
"""What every JSON reader counts exactly."""
MAX_VERSION: Final = 9_999_999_999
"""Ten digits, as in the name of a key set."""
MAX_KEYS: Final = MAX_SIGNATURES
WHO_MAX: Final = 256
"""Characters of who moved a channel."""
WHY_MAX: Final = 1024
NAME_MAX: Final = 256
"""Characters of a folder or channel."""
CLOCK_SLACK_SECONDS: Final = 300.0
"""What two hosts' clocks may differ by before a time counts as come, or as earlier."""
EVER: Final = "1970-01-01T00:00:00Z"
"""A time that no move was made before."""
RECORD_MAX: Final = 16 * 1024
"""Bytes of a move or key set."""

_HEX = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(
    r"([0-9]{4})-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9])(\.[0-9]{1,9})?Z"
)


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Move:
    """One move of a channel: where it points since then.

    :ivar count: which move of this channel it is: from 1, growing by one.
    :ivar number: the generation it points at.
    :ivar record: BLAKE3 of that generation's record, lower-case hex.
    :ivar at: RFC 3339, UTC, as the mover's clock had it: for people.
    :ivar who, why: for people.
    :ivar expires: RFC 3339, UTC: after it, a host that saw no newer move raises an alarm; "" for never.
    """

    folder: str
    channel: str
    count: int
    number: int
    record: str
    at: str
    who: str = ""
    why: str = ""
    expires: str = ""


@dataclass(frozen=True, slots=True)
class KeySet:
    """The keys that a folder's hosts trust from now on.

    :ivar version: from 1, growing by one; 0 is what each host's configuration says.
    :ivar keys: public nkeys of users, sorted.
    :ivar threshold: how many of them have to sign.
    :ivar parent: BLAKE3 of the key set before, lower-case hex; "" for version 1.
    """

    folder: str
    version: int
    keys: tuple[str, ...]
    threshold: int
    at: str
    parent: str = ""
    why: str = ""


_MOVE_KEYS: Final = frozenset(
    {"format", "folder", "channel", "count", "number", "record", "at", "who", "why", "expires"}
)
_KEYS_KEYS: Final = frozenset({"format", "folder", "version", "keys", "threshold", "parent", "at", "why"})


def encode_move(move: Move) -> bytes:
    """Return the canonical JSON of a move.

    :raises ValueError: a move that readers would refuse.
    """
    data = _move_bytes(move)
    try:
        decode_move(data)
    except ObjectCorrupt as error:
        raise ValueError(error.message) from None
    return data


def _move_bytes(move: Move) -> bytes:
    return _canonical(
        {
            "format": FORMAT,
            "folder": move.folder,
            "channel": move.channel,
            "count": move.count,
            "number": move.number,
            "record": move.record,
            "at": move.at,
            "who": move.who,
            "why": move.why,
            "expires": move.expires,
        }
    )


def decode_move(data: bytes) -> Move:
    """Read a move.

    :raises ObjectCorrupt: it is none, or not in its canonical form.
    :raises FormatTooNew: written by a newer version.
    """
    fields = _Fields(data, _MOVE_KEYS, "a channel's move")
    move = Move(
        folder=fields.name("folder"),
        channel=fields.name("channel"),
        count=fields.integer("count", MAX_COUNT),
        number=fields.integer("number", MAX_GENERATION),
        record=fields.digest("record"),
        at=fields.time("at"),
        who=fields.text("who", WHO_MAX),
        why=fields.text("why", WHY_MAX),
        expires=fields.time("expires", optional=True),
    )
    fields.check_form(_move_bytes(move))
    return move


def encode_keys(keys: KeySet) -> bytes:
    """Return the canonical JSON of a key set.

    :raises ValueError: a key set that readers would refuse.
    """
    data = _keys_bytes(keys)
    try:
        decode_keys(data)
    except ObjectCorrupt as error:
        raise ValueError(error.message) from None
    return data


def _keys_bytes(keys: KeySet) -> bytes:
    return _canonical(
        {
            "format": FORMAT,
            "folder": keys.folder,
            "version": keys.version,
            "keys": list(keys.keys),
            "threshold": keys.threshold,
            "parent": keys.parent,
            "at": keys.at,
            "why": keys.why,
        }
    )


def decode_keys(data: bytes) -> KeySet:
    """Read a key set.

    :raises ObjectCorrupt: it is none, or not in its canonical form.
    :raises FormatTooNew: written by a newer version.
    """
    fields = _Fields(data, _KEYS_KEYS, "a key set")
    keys = fields.publics("keys")
    version = fields.integer("version", MAX_VERSION)
    found = KeySet(
        folder=fields.name("folder"),
        version=version,
        keys=keys,
        threshold=fields.integer("threshold", len(keys)),
        at=fields.time("at"),
        parent=fields.digest("parent", optional=version == 1),
        why=fields.text("why", WHY_MAX),
    )
    if version == 1 and found.parent:
        raise ObjectCorrupt("a key set's parent is set where there can be none")
    fields.check_form(_keys_bytes(found))
    return found


def keys_name(version: int) -> str:
    """Return the name of the object that holds a key set."""
    return f"{KEYS}{version:010d}"


def _canonical(fields: Mapping[str, Any]) -> bytes:
    """Return canonical JSON (RFC 8785); lone surrogates become bytes that no reader takes."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


class _Fields:
    """The fields of a record of the bucket: read one by one, each checked; every doubt is ObjectCorrupt."""

    def __init__(self, data: bytes, keys: frozenset[str], what: str) -> None:
        if len(data) > RECORD_MAX:
            raise ObjectCorrupt(f"{what} of {len(data)} bytes")
        try:
            fields = json.loads(data.decode())
        except (ValueError, RecursionError):
            raise ObjectCorrupt(f"{what} is not JSON") from None
        if not isinstance(fields, dict):
            raise ObjectCorrupt(f"{what} is no JSON object")
        self._data, self._what = data, what
        self._fields: dict[str, Any] = fields
        check_format(self.integer("format", MAX_COUNT, least=0), what)
        if fields.keys() != keys:
            raise ObjectCorrupt(f"{what} lacks fields, or has unknown ones")

    def integer(self, key: str, most: int, *, least: int = 1) -> int:
        value = self._fields.get(key)
        if type(value) is not int or not least <= value <= most:
            raise ObjectCorrupt(f"{self._what}: {key} is no number from {least} to {most}")
        return value

    def text(self, key: str, most: int) -> str:
        value = self._fields[key]
        if type(value) is not str or len(value) > most:
            raise ObjectCorrupt(f"{self._what}: {key} is no text of up to {most} characters")
        return value

    def name(self, key: str) -> str:
        value = self.text(key, NAME_MAX)
        if not value:
            raise ObjectCorrupt(f"{self._what}: {key} is empty")
        return value

    def digest(self, key: str, *, optional: bool = False) -> str:
        value = self.text(key, NAME_MAX)
        if not _HEX.fullmatch(value) and not (optional and not value):
            raise ObjectCorrupt(f"{self._what}: {key} is no digest")
        return value

    def time(self, key: str, *, optional: bool = False) -> str:
        value = self.text(key, NAME_MAX)
        if seconds_of(value) is None and not (optional and not value):
            raise ObjectCorrupt(f"{self._what}: {key} is no time of RFC 3339 in UTC")
        return value

    def publics(self, key: str) -> tuple[str, ...]:
        value = self._fields[key]
        if not isinstance(value, list) or not 0 < len(value) <= MAX_KEYS:
            raise ObjectCorrupt(f"{self._what}: {key} are no list of 1 to {MAX_KEYS}")
        if not all(isinstance(one, str) and is_public(one) for one in value):
            raise ObjectCorrupt(f"{self._what}: one of its {key} is no public nkey of a user (U…)")
        if any(one >= other for one, other in pairwise(value)):
            raise ObjectCorrupt(f"{self._what}: its {key} are out of order, or there twice")
        return tuple(value)

    def check_form(self, data: bytes) -> None:
        """Check that there is no other form: doubled keys, blanks, other escapes, 1e3."""
        if data != self._data:
            raise ObjectCorrupt(f"{self._what} is not in canonical form")


def seconds_of(text: str) -> float | None:
    """Return the seconds since 1970 of a time as records have it, ``None`` where it is none."""
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second = map(int, found.groups()[:6])
    if year == 0 or day > monthrange(year, month)[1]:
        return None
    return timegm((year, month, day, hour, minute, second)) + float(found[7] or 0)


def is_expired(expires: str, now_s: float, *, slack: float = 0.0) -> bool:
    """Tell whether a record's end has come, give or take the clocks' difference; "" never comes.

    An end that is not readable has come: rather an alarm too many.
    """
    if not expires:
        return False
    end = seconds_of(expires)
    return end is None or now_s - slack >= end


def _is_before(at: str, since: str) -> bool:
    """Tell whether a record was made before a time, whatever the clocks' difference."""
    made, moment = seconds_of(at), seconds_of(since)
    return made is None or moment is None or made + CLOCK_SLACK_SECONDS < moment


# -- what is trusted ---------------------------------------------------------------------------------------------------


class Statement(StrEnum):
    """What a signature is about; its bytes begin every signed statement."""

    GENERATION = "generation"
    MOVE = "move"
    KEYS = "keys"


_WHAT: Final = {
    Statement.GENERATION: "the generation",
    Statement.MOVE: "the channel's move",
    Statement.KEYS: "the key set",
}


def statement_of(kind: Statement, data: bytes) -> bytes:
    """Return what is signed where ``data`` are the bytes of a record."""
    return f"syncd-{kind.value}-v1\n".encode() + data


@dataclass(frozen=True, slots=True)
class Trust:
    """The keys that are trusted now.

    :ivar version: of the key set they come from; 0: the configuration's own.
    :ivar digest: BLAKE3 of that key set's record; "" for version 0.
    :ivar anchor: which configuration it started from (:func:`resume`); set for version 0 by itself.
    :raises ValueError: no keys, one that is no public nkey of a user, or a threshold they cannot reach or that is 0.
    """

    keys: frozenset[str]
    threshold: int
    version: int = 0
    digest: str = ""
    anchor: str = ""

    def __post_init__(self) -> None:
        if not 0 < len(self.keys) <= MAX_KEYS:
            raise ValueError(f"{len(self.keys)} keys where 1 to {MAX_KEYS} are possible")
        if not all(map(is_public, self.keys)):
            raise ValueError("a key is no public nkey of a user (U…)")  # not shown: it may be a seed
        if not 0 < self.threshold <= len(self.keys):
            raise ValueError(f"{self.threshold} of {len(self.keys)} keys cannot be what is needed")
        if not 0 <= self.version <= MAX_VERSION or bool(self.version) is not bool(_HEX.fullmatch(self.digest)):
            raise ValueError(f"version {self.version} does not go with the digest {self.digest!r}")
        if not self.version and not self.anchor:
            object.__setattr__(self, "anchor", _anchor(self.keys, self.threshold))

    def to_json(self) -> str:
        """Return what :meth:`from_json` reads."""
        return json.dumps(
            {
                "keys": sorted(self.keys),
                "threshold": self.threshold,
                "version": self.version,
                "digest": self.digest,
                "anchor": self.anchor,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Trust:
        """Read what was remembered.

        :raises ValueError: it is damaged. Whoever goes on without it trusts the configuration's keys again, revoked
            ones included: a person has to decide that.
        """
        note = _Note(text, {"keys", "threshold", "version", "digest", "anchor"}, "trusted keys")
        return cls(
            keys=frozenset(note.texts("keys")),
            threshold=note.integer("threshold"),
            version=note.integer("version"),
            digest=note.digest("digest"),
            anchor=note.digest("anchor"),
        )


def _anchor(keys: Iterable[str], threshold: int) -> str:
    return digest_of(_canonical({"keys": sorted(keys), "threshold": threshold}))


def resume(stored: Trust | None, configured: Trust) -> Trust:
    """Return what a start trusts, given what was remembered and what the configuration says.

    What was remembered goes before the configuration that it grew from: that one may still name a key that was revoked
    since. A configuration that was changed is a person's word and goes first; where it only names the keys that are
    trusted anyway, the version reached stays known.
    """
    if stored is None:
        return configured
    if stored.anchor == configured.anchor:
        return stored
    if (stored.keys, stored.threshold) == (configured.keys, configured.threshold):
        return Trust(stored.keys, stored.threshold, stored.version, stored.digest, configured.anchor)
    return configured


def check_signed(trust: Trust, kind: Statement, data: bytes, signatures_text: str) -> frozenset[str]:
    """Check that enough trusted keys have signed a record, and return those that have.

    :param data: the record's bytes as stored; nothing has to be read from them before.
    :raises Untrusted: too few have.
    """
    what = _WHAT[kind]
    try:
        signatures = decode_signatures(signatures_text)
    except BadSignatures as error:
        raise Untrusted(f"{what} cannot be trusted: {error.message}", hint=_SIGN) from None
    good = signers(statement_of(kind, data), signatures, trust.keys)
    if len(good) < trust.threshold:
        raise Untrusted(
            f"{what} has {len(good)} good signatures by trusted keys where {trust.threshold} are needed"
            f" ({len(signatures)} signatures in all)",
            hint=_SIGN,
        )
    return good


_SIGN: Final = "have it signed by a trusted key, or correct trusted_keys; if it should be signed, find out who wrote it"


def advance(trust: Trust, record: bytes, signatures_text: str, *, folder: str) -> Trust:
    """Return what is trusted by the next key set.

    Only the keys trusted before decide: their threshold has to sign. New keys need no word of their own: asking for it
    would protect from a mistake only, which the configuration mends (:func:`resume`), and would make everybody wait
    for a new key's holder where a stolen key must be revoked at once.

    :raises Untrusted: not enough of the keys before have signed it, or it is not the next one, or another folder's.
    :raises ObjectCorrupt, FormatTooNew: signed, but not readable.
    """
    check_signed(trust, Statement.KEYS, record, signatures_text)
    keys = decode_keys(record)
    if keys.folder != folder:
        raise Untrusted(f"the key set is that of folder {keys.folder!r}, not of {folder!r}")
    if keys.version != trust.version + 1:
        raise Untrusted(f"the key set is version {keys.version} where {trust.version + 1} is due")
    if keys.parent != trust.digest:
        raise Untrusted(f"key set {keys.version} does not follow the one that is trusted here")
    return Trust(frozenset(keys.keys), keys.threshold, keys.version, digest_of(record), trust.anchor)


class Step(NamedTuple):
    """One key set that was followed: what is trusted by it, and when it was made, as its maker's clock had it."""

    trust: Trust
    at: str


class Followed(NamedTuple):
    """How far key sets lead.

    :ivar problem: why the next one there is was not followed, ``None`` where there is no next one.
    :ivar steps: all that were followed, in order: what each of them drops is doubted from its time on.
    """

    trust: Trust
    problem: SyncdError | None
    steps: tuple[Step, ...] = ()


def follow(trust: Trust, records: Mapping[int, tuple[bytes, str]], *, folder: str) -> Followed:
    """Follow all key sets that lead on from what is trusted.

    A host that is set up after keys were replaced names the present ones, not those that it began with. From version
    0, where the first key set is not signed by the configured keys, one that names exactly them is a start as well:
    but only if one that they signed follows, so that what is remembered rests on a signature.

    :param records: key sets of the bucket by version: bytes and signatures; older ones do no harm.
    """
    result = _walk(trust, records, folder)
    if result.trust.version:
        return result
    for version in sorted(records, reverse=True):
        start = start_at(trust, version, records[version][0], folder)
        later = _walk(start, records, folder) if start else result
        if later.trust.version > version:
            return later
    if any(start_at(trust, version, record, folder) for version, (record, _) in records.items()):
        return Followed(trust, None)
    return result


def _walk(trust: Trust, records: Mapping[int, tuple[bytes, str]], folder: str) -> Followed:
    steps: list[Step] = []
    while (found := records.get(trust.version + 1)) is not None:
        try:
            trust = advance(trust, *found, folder=folder)
        except SyncdError as error:
            return Followed(trust, error, tuple(steps))
        steps.append(Step(trust, decode_keys(found[0]).at))
    return Followed(trust, None, tuple(steps))


def start_at(trust: Trust, version: int, record: bytes, folder: str) -> Trust | None:
    """Return where to go on from if a key set of the bucket names exactly the keys that are trusted, else ``None``.

    Nobody's signature vouches for its version and digest: good for a walk, or to make the next key set from, but not
    to remember.
    """
    try:
        keys = decode_keys(record)
    except SyncdError:
        return None
    if (keys.folder, keys.version) != (folder, version):
        return None
    if (frozenset(keys.keys), keys.threshold) != (trust.keys, trust.threshold):
        return None
    return Trust(trust.keys, trust.threshold, version, digest_of(record), trust.anchor)


# -- what was seen -----------------------------------------------------------------------------------------------------


_SEEN_KEYS: Final = {"count", "move", "highest", "record", "moved", "signed_by", "expires", "doubted"}
_OLD_SEEN_KEYS: Final = {"count", "move", "highest", "record", "moved_by", "signed_by"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a host remembers of a channel.

    :ivar count: of the newest move that was followed; 0 for none.
    :ivar move: BLAKE3 of that move's record; "" for none.
    :ivar highest: the highest number of a generation that was gone to; 0 for none.
    :ivar record: BLAKE3 of that generation's record; "" for none.
    :ivar moved: each trusted key's highest count, of the moves that were followed and that it had signed.
    :ivar signed_by: the trusted keys that had signed the generation ``highest``, sorted.
    :ivar expires: the end of the newest move that was followed; "" for never.
    :ivar doubted: since when no trusted key vouches for that move (:func:`recover`); "": one does.
    """

    count: int = 0
    move: str = ""
    highest: int = 0
    record: str = ""
    moved: Mapping[str, int] = field(default_factory=dict)
    signed_by: tuple[str, ...] = ()
    expires: str = ""
    doubted: str = ""

    @property
    def floor(self) -> int:
        """The highest count that a trusted key vouches for, 0 for none: nothing leads below, whatever is doubted."""
        return max(self.moved.values(), default=0)

    def to_json(self) -> str:
        """Return what :meth:`from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, vouchers: Collection[str] = ()) -> Seen:
        """Read what was remembered.

        :param vouchers: the keys that vouch for all of it, where an older version wrote it, which did not count for
            each key: those that were trusted then. So nobody is led back; a count that a thief had driven up before
            the upgrade stands until none of them is trusted any more.
        :raises ValueError: it is damaged. Whoever goes on without it can be led back: a person has to decide that.
        """
        note = _Note(text, _SEEN_KEYS, "a channel", older=_OLD_SEEN_KEYS)
        count, highest = note.integer("count"), note.integer("highest")
        if note.is_older:
            moved = dict.fromkeys(vouchers or note.texts("moved_by"), count) if count else {}
            signed_by = sorted(vouchers or note.texts("signed_by")) if highest else []
        else:
            moved, signed_by = note.integers("moved"), note.texts("signed_by")
        seen = cls(
            count=count,
            move=note.digest("move"),
            highest=highest,
            record=note.digest("record"),
            moved=moved,
            signed_by=tuple(signed_by),
            expires="" if note.is_older else note.time("expires"),
            doubted="" if note.is_older else note.time("doubted"),
        )
        if bool(seen.count) is not bool(seen.move) or bool(seen.highest) is not bool(seen.record):
            raise ValueError("what was remembered of a channel contradicts itself")
        if seen.floor > seen.count or (seen.floor == seen.count) is bool(seen.doubted):
            raise ValueError("who vouches for what was remembered of a channel contradicts the rest")
        return seen


class _Note:
    """A remembered JSON object: its fields, or ValueError."""

    def __init__(self, text: str, keys: set[str], what: str, *, older: set[str] | None = None) -> None:
        self._what = f"what was remembered of {what} is damaged"
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(self._what) from None
        if not isinstance(fields, dict) or (fields.keys() != keys and fields.keys() != older):
            raise ValueError(self._what)
        self._fields: dict[str, Any] = fields
        self.is_older = fields.keys() == older

    def integer(self, key: str) -> int:
        value = self._fields[key]
        if type(value) is not int or not 0 <= value <= MAX_COUNT:
            raise ValueError(f"{self._what}: {key}")
        return value

    def digest(self, key: str) -> str:
        value = self._fields[key]
        if type(value) is not str or (value and not _HEX.fullmatch(value)):
            raise ValueError(f"{self._what}: {key}")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._fields[key]
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{self._what}: {key}")
        return value

    def integers(self, key: str) -> dict[str, int]:
        value = self._fields[key]
        if not isinstance(value, dict):
            raise ValueError(f"{self._what}: {key}")  # noqa: TRY004 - of one kind with all other damage
        if not all(type(one) is int and 0 < one <= MAX_COUNT for one in value.values()):
            raise ValueError(f"{self._what}: {key}")
        return value

    def time(self, key: str) -> str:
        value = self._fields[key]
        if type(value) is not str or (value and seconds_of(value) is None):
            raise ValueError(f"{self._what}: {key}")
        return value


def recover(seen: Seen, trust: Trust, since: str) -> Seen:
    """Doubt what no trusted key vouches for (any more). To be called after each change of what is trusted.

    Whoever stole a key can send hosts to the highest possible count, and nothing honest could ever follow: once the
    key is revoked, its word must not stand in the way. But what it signed before it was stolen is no worse than the
    rest, and cannot be told from it; were the count just forgotten, whoever runs the servers could show an old move
    of a remaining key again. So:

     * a count that *one* remaining key has signed stays: it is not stolen, or it would be revoked, and it signed this.
       With a threshold above 1, too: thieves who could drive a count up alone had the threshold of stolen keys, and
       are rid of when none of those who signed it is left. A changed threshold alone makes nobody's word worth less;
     * a newest move that only dropped keys signed is doubted: a lower count than its is followed then, if it is above
       all that a remaining key has vouched for, and if that move was made since they were dropped. No honest key's old
       move is, and who recovers makes a new one (:func:`judge_move`);
     * a number is no floor, only its record is compared: where none who signed that is left, it is forgotten.

    :param since: when keys were dropped: the time of the key set that did. :data:`EVER` where a person did, in the
        configuration: a host does not know when, and the moves that are to follow may have been made before.
    """
    moved = {key: count for key, count in seen.moved.items() if key in trust.keys}
    signed_by = tuple(key for key in seen.signed_by if key in trust.keys)
    seen = replace(seen, moved=moved, signed_by=signed_by)
    if not signed_by:
        seen = replace(seen, highest=0, record="")
    return replace(seen, doubted=seen.doubted or since) if seen.floor < seen.count else seen


# -- what a channel offers ---------------------------------------------------------------------------------------------


class Offer(NamedTuple):
    """What the bucket says of a channel: nothing in it is believed.

    :ivar folder, channel: what was asked for.
    :ivar number: the generation that the channel's link points at.
    :ivar record: bytes of that generation's record.
    :ivar record_signatures, move, move_signatures: texts of the metadata of both objects; "" where they are missing.
    """

    folder: str
    channel: str
    number: int
    record: bytes
    record_signatures: str
    move: str
    move_signatures: str


class Accepted(NamedTuple):
    """An offer that may be followed.

    :ivar seen: what to remember once it was followed: equal to what was remembered where there is nothing new.
    """

    move: Move
    seen: Seen


def judge_offer(trust: Trust, seen: Seen, offer: Offer) -> Accepted:
    """Decide whether a channel may be followed to where it points: every check of this module but :func:`is_expired`.

    :raises Untrusted: it must not be; the mirror stays as it is.
    :raises ObjectCorrupt, FormatTooNew: signed, but not readable.
    """
    if not offer.move:
        raise Untrusted(f"channel {offer.channel!r} points somewhere without a signed move", hint=_SIGN)
    data = offer.move.encode("utf-8", "surrogatepass")
    moved_by = check_signed(trust, Statement.MOVE, data, offer.move_signatures)
    signed_by = check_signed(trust, Statement.GENERATION, offer.record, offer.record_signatures)
    move, generation = decode_move(data), decode_record(offer.record)
    record = digest_of(offer.record)
    if (generation.folder, generation.number) != (offer.folder, offer.number):
        raise Untrusted(
            f"the record is that of generation {generation.number} of folder {generation.folder!r},"
            f" not of generation {offer.number} of folder {offer.folder!r}"
        )
    check_move(move, folder=offer.folder, channel=offer.channel, number=offer.number, record=record)
    judge_move(seen, move, digest_of(data))
    judge_generation(seen, offer.number, record)
    after = replace(
        seen,
        count=move.count,
        move=digest_of(data),
        moved={**seen.moved, **dict.fromkeys(moved_by, move.count)},
        expires=move.expires,
        doubted="",
    )
    if offer.number >= seen.highest:
        # Who leaves out signatures of what is known already must not make us forget who vouches for it.
        known = seen.signed_by if offer.number == seen.highest else ()
        after = replace(after, highest=offer.number, record=record, signed_by=tuple(sorted(signed_by.union(known))))
    return Accepted(move, after)


def check_move(move: Move, *, folder: str, channel: str, number: int, record: str) -> None:
    """Check that a move is that of this folder and channel, and leads to the generation that the channel points at.

    :param record: BLAKE3 of that generation's record.
    :raises Untrusted: it is another's, or leads elsewhere.
    """
    if (move.folder, move.channel) != (folder, channel):
        raise Untrusted(
            f"the move is that of channel {move.channel!r} of folder {move.folder!r}, not of {channel!r} of {folder!r}"
        )
    if move.number != number:
        raise Untrusted(f"the move leads to generation {move.number}, but channel {channel!r} points at {number}")
    if move.record != record:
        raise Untrusted(f"the move leads to another generation {number} than the bucket has")


def judge_move(seen: Seen, move: Move, digest: str) -> None:
    """Refuse a move that goes behind what was seen. The same one again is nothing new, and right.

    Behind what is doubted may lead what was made since (:func:`recover`).

    :param digest: BLAKE3 of the move's record.
    :raises Untrusted: an older one (rollback or replay), or another one of the same count (two histories).
    """
    if seen.doubted and seen.floor < move.count <= seen.count and digest != seen.move:
        if not _is_before(move.at, seen.doubted):
            return
        raise Untrusted(
            f"move {move.count} of channel {move.channel!r} is offered after move {seen.count}, and was made before"
            f" the keys that vouched for that were removed ({seen.doubted}): rollback or replay",
            hint=_BEHIND,
        )
    if move.count < seen.count:
        raise Untrusted(
            f"move {move.count} of channel {move.channel!r} is offered after move {seen.count}: rollback or replay",
            hint=_BEHIND,
        )
    if move.count == seen.count and digest != seen.move:
        raise Untrusted(f"there are two moves {move.count} of channel {move.channel!r}: two histories", hint=_BEHIND)


def judge_generation(seen: Seen, number: int, record: str) -> None:
    """Refuse a second record of the highest number that was gone to.

    A lower number is a matter of moves, and right where a newer move leads to it.

    :param record: BLAKE3 of the generation's record.
    :raises Untrusted: it is another one (two histories).
    """
    if number == seen.highest and record != seen.record:
        raise Untrusted(f"there are two generations {number}: two histories", hint=_BEHIND)


_BEHIND: Final = (
    "find out who put it there; a new signed promote or rollback leads on from here, where the bucket's count is lower"
    " than what hosts saw with --count N"
)
