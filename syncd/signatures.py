"""Ed25519 signatures by nkeys of users: made, written beside what they sign, and checked.

The only home of ``nkeys`` for signing, and of PyNaCl, which nkeys stands on: nkeys itself checks no signature without
the seed, and takes a mistyped seed for another key. Kept here:

 * the algorithm is never read from outside: a key is a user's public nkey ("U…"), a signature 64 bytes of Ed25519;
 * a list of signatures has one written form, and everything else is refused, so a list means the same to every reader;
 * keys are counted, not signatures.
"""

from __future__ import annotations

import base64
import binascii
import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import nkeys
from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from syncd.errors import BadSignatures

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

MAX_SIGNATURES: Final = 16
"""Signatures in a list, and keys in a key set."""
_MAX_TEXT: Final = 4096
"""Characters of a list of signatures: the longest has 2,593."""
_KEY_BYTES: Final = 32
_CHECKSUM_BYTES: Final = 2
_SIGNATURE_BYTES: Final = 64
_FIELDS: Final = frozenset({"key", "sig"})


class Signature(NamedTuple):
    """One key's signature over one statement.

    :ivar key: the public nkey of a user.
    :ivar sig: 64 bytes.
    """

    key: str
    sig: bytes


# -- keys --------------------------------------------------------------------------------------------------------------


def generate() -> tuple[str, str]:
    """Return the seed ("SU…", secret) and the public key ("U…") of a new user nkey."""
    raw = bytes(SigningKey.generate())
    seed = _seed_of(raw)
    return seed, Signer(seed).public


class Signer:
    """Signs with one key.

    :param seed: the seed of a user nkey.
    :ivar public: its public key.
    :raises ValueError: it is none; the message does not hold it.
    """

    __slots__ = ("_key", "public")

    def __init__(self, seed: str) -> None:
        self._key = SigningKey(_raw_seed(seed))
        head = bytes([nkeys.PREFIX_BYTE_USER]) + bytes(self._key.verify_key)
        self.public: str = base64.b32encode(head + nkeys.crc16_checksum(head)).decode()

    def __repr__(self) -> str:
        return f"Signer({self.public})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signer) and other.public == self.public

    def __hash__(self) -> int:
        return hash(self.public)

    def sign(self, statement: bytes) -> Signature:
        """Return the signature over a statement; the same statement has the same one always."""
        return Signature(self.public, self._key.sign(statement).signature)


def _seed_of(raw: bytes) -> str:
    return str(nkeys.encode_seed(raw, nkeys.PREFIX_BYTE_USER).decode())


def _raw_seed(seed: str) -> bytes:
    """Return the 32 bytes of a user's seed.

    nkeys looks at neither length nor checksum, and takes other kinds; the seed made anew is another one then.
    """
    try:
        _, raw = nkeys.decode_seed(seed.encode())
        if _seed_of(bytes(raw)) == seed:
            return bytes(raw)
    except (nkeys.NkeysError, ValueError):
        pass
    raise ValueError("not the seed of a user nkey (SU…)")


def is_public(text: str) -> bool:
    """Tell whether a text is the public nkey of a user, of a point of the curve that a seed can lead to."""
    return _raw_public(text) is not None


def _raw_public(text: str) -> bytes | None:
    """Return the 32 bytes of a public key, ``None`` where it is none. One form only: 35 bytes fill 56 characters."""
    try:
        data = base64.b32decode(text)
    except ValueError:  # binascii.Error is one, and so is what is said of text beyond ASCII
        return None
    head, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    raw = head[1:]
    if len(raw) != _KEY_BYTES or head[0] != nkeys.PREFIX_BYTE_USER or nkeys.crc16_checksum(head) != checksum:
        return None
    return raw if crypto_core_ed25519_is_valid_point(raw) else None


# -- checking ----------------------------------------------------------------------------------------------------------


def signers(statement: bytes, signatures: Iterable[Signature], keys: Container[str]) -> frozenset[str]:
    """Return those of ``keys`` that have signed a statement, each once however often it signed."""
    return frozenset(one.key for one in signatures if one.key in keys and _is_good(statement, one))


def _is_good(statement: bytes, signature: Signature) -> bool:
    raw = _raw_public(signature.key)
    if raw is None or len(signature.sig) != _SIGNATURE_BYTES:
        return False
    try:
        VerifyKey(raw).verify(statement, signature.sig)
    except BadSignatureError:
        return False
    return True


# -- the written list --------------------------------------------------------------------------------------------------


def add_signature(signatures: Iterable[Signature], new: Signature) -> tuple[Signature, ...]:
    """Return signatures with one more; one that its key made before gives way."""
    return (*(one for one in signatures if one.key != new.key), new)


def encode_signatures(signatures: Iterable[Signature]) -> str:
    """Return the text that keeps signatures: canonical JSON, sorted by key; "" for none.

    :raises ValueError: a list that readers would refuse.
    """
    text = _text_of(sorted(signatures))
    try:
        decode_signatures(text)
    except BadSignatures as error:
        raise ValueError(error.message) from None
    return text


def _text_of(signatures: Iterable[Signature]) -> str:
    rows = [{"key": one.key, "sig": _base64(one.sig)} for one in signatures]
    return json.dumps(rows, sort_keys=True, separators=(",", ":"), ensure_ascii=False) if rows else ""


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decode_signatures(text: str) -> tuple[Signature, ...]:
    """Read what :func:`encode_signatures` wrote; "" is what an unsigned object has.

    :raises BadSignatures: anything else: other fields, kinds of keys or lengths, a key twice, too many, another form.
    """
    if not text:
        return ()
    if len(text) > _MAX_TEXT:
        raise BadSignatures(f"signatures of {len(text)} characters")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        raise BadSignatures("signatures that are not JSON") from None
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_SIGNATURES:
        raise BadSignatures(f"signatures that are no list of 1 to {MAX_SIGNATURES}")
    found = tuple(map(_read_row, rows))
    if any(one.key >= other.key for one, other in pairwise(found)):
        raise BadSignatures("signatures whose keys are out of order, or there twice")
    if _text_of(found) != text:  # doubled fields, blanks, escapes, padding
        raise BadSignatures("signatures that are not in canonical form")
    return found


def _read_row(row: Any) -> Signature:
    if not isinstance(row, dict) or row.keys() != _FIELDS:
        raise BadSignatures("a signature lacks fields, or has unknown ones")
    key, sig = row["key"], row["sig"]
    if not isinstance(key, str) or not is_public(key):
        raise BadSignatures("a signature by what is no public nkey of a user (U…)")
    data = _bytes_of(sig) if isinstance(sig, str) else b""
    if len(data) != _SIGNATURE_BYTES:
        raise BadSignatures(f"a signature that is not the base64url of {_SIGNATURE_BYTES} bytes")
    return Signature(key, data)


def _bytes_of(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_")
    except (binascii.Error, ValueError):
        return b""
