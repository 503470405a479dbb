"""Replacing trusted keys: the key sets of a bucket, as a person changes and signs them.

Rules kept here:
 * the next key set goes on from what subscribers trust, which their configuration says, never from what the bucket
   says;
 * every write is fenced by the sequence that was read: of two people the second is told, and changes nothing;
 * a key set is signed only if it is this folder's and follows the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from syncd.errors import ObjectCorrupt, ObjectGone, SyncdError, UsageError, WriteConflict
from syncd.moves import time_text
from syncd.nodes import digest_of
from syncd.paths import printable
from syncd.records import Signable, good_signers, signature_text, small_content
from syncd.signatures import Signer, is_public
from syncd.store.base import ObjectMeta, SmallPut
from syncd.store.mapping import KEY_SET, KIND
from syncd.trust import (
    MAX_KEYS,
    SIGNATURES,
    KeySet,
    Statement,
    Trust,
    decode_keys,
    encode_keys,
    follow,
    keys_name,
    start_at,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from syncd.store.base import Bucket, ObjectInfo

log = structlog.get_logger()

MAX_KEY_SETS: Final = 1000
"""Key sets that are looked at: whoever may write to the bucket could make any number."""


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

    :ivar digest: BLAKE3 of its record.
    :ivar signers: keys with a good signature over it, trusted or not.
    :ivar trusted: whether the chain from the keys that were asked about leads to it, or beyond.
    :ivar problem: why it cannot be read; "" for nothing.
    """

    version: int
    keys: tuple[str, ...] = ()
    threshold: int = 0
    at: str = ""
    why: str = ""
    digest: str = ""
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
            data = await small_content(bucket, info)
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

    async def trusted(self, configured: Trust) -> Trust:
        """Return what is trusted now by whoever is configured so, as far as the key sets of the bucket lead."""
        return self._present(configured, await read_keys(self._bucket))

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
        :param signers: of the keys trusted now. Too few of them may sign: then others add theirs (:meth:`to_sign`).
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

    async def to_sign(self, version: int) -> Signable:
        """Return a key set's record.

        :raises UsageError: there is no such key set.
        :raises ObjectCorrupt: it is not readable, or does not follow the one before it.
        """
        records = await read_keys(self._bucket)
        one = records.get(version)
        if one is None:
            raise UsageError(f"folder {self._bucket.name!r} has no key set {version}")
        keys = decode_keys(one.data)
        parent = digest_of(records[version - 1].data) if version > 1 else ""
        if (keys.folder, keys.version, keys.parent) != (self._bucket.name, version, parent):
            raise ObjectCorrupt(f"key set {version} is another folder's, or does not follow the one before it")
        return Signable(f"key set {version}", Statement.KEYS, one.info, one.data)

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
        digest=digest_of(one.data),
        signers=good_signers(Statement.KEYS, one.data, one.signatures),
        trusted=trusted,
    )
