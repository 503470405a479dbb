"""A generation as the messages that commit it (docs/format.md). Pure: nuids and the time are arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.errors import StoreRejected
from syncd.store import wire
from syncd.store.base import CHANNELS, CHUNK_SIZE, GENERATIONS, Link, ObjectMeta
from syncd.store.content import describe

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class CommitMessages:
    """One commit: the record as an ordinary object, and the channel as a link to it.

    :ivar nuid: of the record's chunk.
    """

    nuid: str
    record: bytes
    meta_subject: str
    meta: bytes
    link_subject: str
    link: bytes


def encode_commit(
    bucket: str,
    number: int,
    record: bytes,
    metadata: Mapping[str, str],
    *,
    channel: str,
    nuids: tuple[str, str],
    now_ns: int,
    link_metadata: Mapping[str, str] | None = None,
) -> CommitMessages:
    """Lay out a commit.

    :param metadata: of the generation object.
    :param link_metadata: of the channel's link.
    :param nuids: fresh ones for the record and for the link (other clients want one there, too).
    :raises StoreRejected: the record does not fit one chunk, or its metadata does not fit a message.
    """
    if not 0 < len(record) <= CHUNK_SIZE:
        raise StoreRejected(f"a generation record of {len(record)} bytes")
    name = f"{GENERATIONS}{number:010d}"
    meta = ObjectMeta(name, headers={"Content-Type": ("application/json",)}, metadata=metadata)
    nuid, link_nuid = nuids
    stored = describe(nuid, record)
    pointer = CHANNELS + channel
    return CommitMessages(
        nuid=nuid,
        record=record,
        meta_subject=wire.meta_subject(bucket, name),
        meta=wire.encode_put(bucket, meta, stored, nuid=nuid, now_ns=now_ns),
        link_subject=wire.meta_subject(bucket, pointer),
        link=wire.encode_link(
            bucket, pointer, Link(bucket, name), nuid=link_nuid, now_ns=now_ns, metadata=link_metadata
        ),
    )
