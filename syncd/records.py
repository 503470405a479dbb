"""Signed records as a bucket holds them: reading one, judging whether a person is to sign it, adding a signature.

Rules kept here:
 * nothing is signed whose folder or number is not what it is said to be;
 * what is signed was read before (:class:`Signable`): what was shown and judged of it are the very bytes that the
   signature is over, and the write is fenced by the sequence that was read.

Who else signed a record is for subscribers to judge (:mod:`syncd.trust`): what is good here is good by whatever key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from syncd.errors import BadSignatures, ObjectCorrupt, ObjectGone, Untrusted, UsageError, WriteConflict
from syncd.nodes import Generation, decode_record, digest_of
from syncd.paths import printable
from syncd.signatures import (
    MAX_SIGNATURES,
    Signer,
    add_signature,
    decode_signatures,
    encode_signatures,
    signers,
)
from syncd.store.base import CHUNK_SIZE, ObjectMeta, Stored
from syncd.trees import generation_name
from syncd.trust import SIGNATURES, Statement, statement_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from syncd.store.base import Bucket, ObjectInfo

EXPECT_DIGITS: Final = 32
"""Of a digest that names what was looked at: so many at least."""


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
    data = await small_content(bucket, info)
    generation = decode_record(data)
    if (generation.folder, generation.number) != (bucket.name, number):
        raise ObjectCorrupt(
            f"generation {number} holds the record of generation {generation.number} "
            f"of folder {printable(generation.folder)!r}"
        )
    return Record(info, data, generation)


# -- what a person signs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signable:
    """A record as it was read, to be shown, judged and signed: these bytes, and no others.

    :ivar what: what it is, in words.
    :ivar info: the object it was read from: its sequence fences the signature.
    :ivar data: the record's bytes.
    """

    what: str
    kind: Statement
    info: ObjectInfo
    data: bytes

    @property
    def digest(self) -> str:
        """BLAKE3 of the record: the name of what was looked at. That of a move pins the generation's record, too."""
        return digest_of(self.data)

    @property
    def signers(self) -> tuple[str, ...]:
        """Keys with a good signature over it, trusted or not."""
        return good_signers(self.kind, self.data, self.info.metadata.get(SIGNATURES, ""))


def check_expected(one: Signable, expected: str) -> None:
    """Check that a record is the one that somebody looked at.

    :param expected: its digest, or the first digits of it.
    :raises Untrusted: it is another one.
    """
    if len(expected) < EXPECT_DIGITS or not one.digest.startswith(expected):
        raise Untrusted(
            f"{printable(one.what)} is not what --expect names: it is not signed",
            hint="somebody wrote it since; look at it again, and find out who it was",
        )


def check_vouched(one: Signable, keys: Collection[str] | None) -> None:
    """Check that somebody who is trusted has signed a record before: nobody else's work is to be made good.

    :param keys: those that are trusted now; ``None``: nobody knows.
    :raises Untrusted: nobody has.
    """
    if keys is None:
        raise Untrusted(
            f"it is not known which keys are trusted now: nobody vouches for {printable(one.what)}",
            hint="name those of trusted_keys: --trust KEY; for a folder's first signature: --first",
        )
    if not set(one.signers).intersection(keys):
        raise Untrusted(
            f"{printable(one.what)} has no good signature by a key that is trusted now",
            hint="find out who wrote it; where nobody could have signed it yet: --first",
        )


async def generation_to_sign(bucket: Bucket, number: int) -> Signable:
    """Return a generation's record.

    :raises UsageError: there is no such generation.
    :raises ObjectCorrupt, ObjectGone: it cannot be read.
    """
    record = await read_record(bucket, number)
    if record is None:
        raise no_generation(bucket.name, number)
    return signable_generation(record)


def signable_generation(record: Record) -> Signable:
    """Return a generation's record as what may be signed."""
    return Signable(f"generation {record.generation.number}", Statement.GENERATION, record.info, record.data)


async def sign_record(bucket: Bucket, one: Signable, signer: Signer) -> bool:
    """Add a signature to an object whose content is a record; tell whether it is new.

    :raises WriteConflict: somebody else wrote it since it was read.
    """
    if signer.public in one.signers:
        return False
    info = one.info
    text = signature_text(one.kind, one.data, signer, before=info.metadata.get(SIGNATURES, ""))
    meta = ObjectMeta(info.name, info.description, info.headers, {**info.metadata, SIGNATURES: text})
    stored = Stored(info.nuid, info.chunks, info.size, one.digest, info.sha256, info.chunk_size)
    try:
        await bucket.put_meta(meta, stored, expected_seq=info.seq)
    except WriteConflict as error:
        raise WriteConflict(f"somebody else wrote {info.name} meanwhile", hint="look at it again") from error
    return True


# -- reading -----------------------------------------------------------------------------------------------------------


async def small_content(bucket: Bucket, info: ObjectInfo) -> bytes:
    """Return the content of an object of one chunk: a record.

    :raises ObjectGone, ObjectCorrupt: it cannot be had.
    """
    if info.size > CHUNK_SIZE:
        raise ObjectCorrupt(f"{printable(info.name)} has {info.size} bytes")
    async for _, data in bucket.download_many([info]):
        if isinstance(data, Exception):
            raise data
        return data
    raise ObjectGone(f"the content of {printable(info.name)} is gone")


def no_generation(folder: str, number: int) -> UsageError:
    """Return what to raise where there is no such generation."""
    return UsageError(f"folder {folder!r} has no generation {number}", hint=f"see: syncd log {folder}")
