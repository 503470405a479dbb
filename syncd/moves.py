"""What a channel's link says of its last move, and who signed what: metadata of links and generation objects."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Final

from syncd.errors import SyncdError
from syncd.signatures import decode_signatures, encode_signatures, signers
from syncd.trust import (
    MAX_COUNT,
    MOVE,
    SIGNATURES,
    Move,
    Statement,
    check_move,
    decode_move,
    encode_move,
    statement_of,
)

if TYPE_CHECKING:
    from syncd.signatures import Signer
    from syncd.trees import Commit

MAX_NEXT_COUNT: Final = MAX_COUNT // 2
"""No honest channel gets here: a forged count must not leave us without a next one."""
MAX_JUMP: Final = 1 << 20
"""How far the count of a move that is not ours may be ahead of ours, and be believed: people move by hand."""
LEAP: Final = 1 << 16
"""Counts that a publisher without memory leaves out: more renewals than it will have made of one generation."""


class Word(Enum):
    """Whose word it is that a channel points where it does."""

    OURS = "ours"
    ANOTHERS = "another's"
    """By another key, or by none: for subscribers to judge."""
    FORGED = "forged"
    """Nobody said so: it is beside a move that leads elsewhere, or was put back after a later one of ours."""


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


def word_of(commit: Commit, signer: Signer | None, *, folder: str, channel: str, count: int) -> Word:
    """Judge the move that led to a generation, as the one who moves that channel and signs.

    :param signer: without one nothing is judged: whoever may write may move.
    :param count: of the last move that the signer made; 0: not remembered.
    """
    if signer is None:
        return Word.OURS
    move = read_move(commit.move)
    if move is None:
        return Word.ANOTHERS
    try:
        check_move(move, folder=folder, channel=channel, number=commit.generation.number, record=commit.digest)
    except SyncdError:
        return Word.FORGED
    data = commit.move.encode("utf-8", "surrogatepass")
    if not _has_signed(signer, Statement.MOVE, data, commit.move_signatures):
        return Word.ANOTHERS
    if move.count < count:
        return Word.FORGED
    return Word.OURS if is_record_signed(commit, signer) else Word.ANOTHERS


def is_record_signed(commit: Commit, signer: Signer) -> bool:
    """Tell whether a signer has signed a generation's record."""
    return _has_signed(signer, Statement.GENERATION, commit.record, commit.signatures)


def count_after(commit: Commit | None, signer: Signer | None, used: int, number: int) -> int:
    """Return the count of a channel's next move.

    Signing a count that somebody else thought of would leave the channel without a next one; a person's moves are
    counted on from. Who signs and has lost his memory may be shown old moves: he leaps over all that he can have made.

    :param commit: where the channel points; ``None`` for nowhere.
    :param used: the count of the last move that was made here; 0: not remembered.
    :param number: of the generation that the move leads to.
    """
    told = _told(commit, signer, used)
    if signer is not None and not used and number > 1:
        return max(told, number) + LEAP
    return max(used, told) + 1


def _told(commit: Commit | None, signer: Signer | None, used: int) -> int:
    move = read_move(commit.move) if commit is not None else None
    if commit is None or move is None or move.count >= MAX_NEXT_COUNT:
        return 0
    if signer is None or move.count <= used + MAX_JUMP:
        return move.count
    data = commit.move.encode("utf-8", "surrogatepass")
    return move.count if _has_signed(signer, Statement.MOVE, data, commit.move_signatures) else 0


def _has_signed(signer: Signer, kind: Statement, data: bytes, text: str) -> bool:
    try:
        return bool(signers(statement_of(kind, data), decode_signatures(text), {signer.public}))
    except SyncdError:
        return False


def _signed(kind: Statement, data: bytes, signer: Signer | None) -> dict[str, str]:
    if signer is None:
        return {}
    return {SIGNATURES: encode_signatures([signer.sign(statement_of(kind, data))])}
