"""What a channel's link says of its last move, and who signed what: metadata of links and generation objects."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from syncd.errors import SyncdError
from syncd.signatures import decode_signatures, encode_signatures, signers
from syncd.trust import MAX_COUNT, MOVE, SIGNATURES, Move, Statement, decode_move, encode_move, statement_of

if TYPE_CHECKING:
    from syncd.signatures import Signer
    from syncd.trees import Commit

MAX_NEXT_COUNT: Final = MAX_COUNT // 2
"""No honest channel gets here: a forged count must not leave us without a next one."""


def time_text(seconds: float) -> str:
    """Return a moment (seconds since the epoch) as records have it: RFC 3339, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def read_move(text: str) -> Move | None:
    """Read the move of a link's metadata; ``None`` where there is none that this version can read.

    Not believed: whoever follows a move checks its signatures first.
    """
    try:
        return decode_move(text.encode("utf-8", "surrogatepass")) if text else None
    except SyncdError:
        return None


def move_metadata(move: Move, signer: Signer | None) -> dict[str, str]:
    """Return the metadata of a link that is moved."""
    data = encode_move(move)
    return {MOVE: data.decode()} | _signed(Statement.MOVE, data, signer)


def generation_signature(record: bytes, signer: Signer | None) -> dict[str, str]:
    """Return what a generation object's metadata says of who signed its record."""
    return _signed(Statement.GENERATION, record, signer)


def is_signed_by(commit: Commit, signer: Signer | None) -> bool:
    """Tell whether a signer made the move that led to a generation, and signed that; without one: yes."""
    if signer is None:
        return True
    keys = {signer.public}
    pairs = (
        (Statement.MOVE, commit.move.encode("utf-8", "surrogatepass"), commit.move_signatures),
        (Statement.GENERATION, commit.record, commit.signatures),
    )
    try:
        return all(signers(statement_of(kind, data), decode_signatures(text), keys) for kind, data, text in pairs)
    except SyncdError:
        return False


def _signed(kind: Statement, data: bytes, signer: Signer | None) -> dict[str, str]:
    if signer is None:
        return {}
    return {SIGNATURES: encode_signatures([signer.sign(statement_of(kind, data))])}
