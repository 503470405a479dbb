"""Signed records as a bucket holds them: reading a generation's, adding a signature to one.

Nothing is signed whose folder or number is not what it is said to be. Who else signed it is for subscribers to judge
(:mod:`syncd.trust`): what is good here is good by whatever key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from syncd.errors import BadSignatures, ObjectCorrupt, ObjectGone, UsageError, WriteConflict
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
    from syncd.store.base import Bucket, ObjectInfo


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


async def sign_generation(bucket: Bucket, number: int, signer: Signer) -> bool:
    """Add a signature to a generation; tell whether it is new.

    :raises UsageError: there is no such generation.
    :raises WriteConflict: somebody else wrote it meanwhile; try again.
    """
    record = await read_record(bucket, number)
    if record is None:
        raise no_generation(bucket.name, number)
    return await sign_object(bucket, record.info, Statement.GENERATION, record.data, signer)


async def sign_object(bucket: Bucket, info: ObjectInfo, kind: Statement, data: bytes, signer: Signer) -> bool:
    """Add a signature to an object that holds a record; tell whether it is new.

    :param data: the record, which the caller has read and judged.
    :raises WriteConflict: somebody else wrote it meanwhile; try again.
    """
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
