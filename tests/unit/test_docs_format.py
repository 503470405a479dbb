"""What docs/format.md says of moves, key sets and signatures is so: the example runs, the tables are the code's."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
from nacl.exceptions import BadSignatureError

from syncd import signatures, trust
from syncd.guard import CLOCK_SLACK_SECONDS, MAX_KEY_SETS
from syncd.signatures import MAX_SIGNATURES, Signer, decode_signatures, encode_signatures
from syncd.store import mapping
from syncd.trust import KeySet, Move, Statement, decode_keys, decode_move, statement_of
from tests.unit.test_docs import FORMAT, ROOT, Block, blocks, code, table


def example() -> Block:
    [block] = [one for one in blocks(FORMAT) if one.note == "runs: tests/unit/test_docs_format.py"]
    return block


def vectors(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "tests/vectors" / name).read_text())
    return found


def test_the_worked_example_verifies_the_first_vector() -> None:
    """A stranger who copies it gets no exception, and what he checked is what the vectors hold."""
    names: dict[str, Any] = {}
    exec(compile(example().text, str(example()), "exec"), names)
    first = vectors("moves.json")[0]
    assert names["move"] == first["bytes"]
    assert set(decode_signatures(names["signatures"])) <= set(decode_signatures(first["signatures"]))


@pytest.mark.parametrize("change", ['"count":2', '"channel":"stable"'])
def test_the_worked_example_is_not_blind(change: str) -> None:
    """Another move does not pass."""
    field = change.partition(":")[0]
    text, count = re.subn(field + r':("\w+"|\d+)', change, example().text)
    assert count == 1
    with pytest.raises(BadSignatureError):
        exec(compile(text, str(example()), "exec"), {})


def test_the_worked_example_has_ten_lines() -> None:
    """Of code: what it checks is written over several."""
    lines = example().text.replace("(\n", "(").splitlines()
    assert len([line for line in lines if line and not line.startswith(("    '", ")"))]) <= 10


def test_the_fields_of_moves_and_key_sets_are_those_of_the_code() -> None:
    """Each once, and no other."""
    for heading, fields in (("Move", Move.__dataclass_fields__), ("Key set", KeySet.__dataclass_fields__)):
        told = [word for row in table(FORMAT, heading)[1:] for word in code(row[0])]
        assert sorted(told) == sorted({"format", *fields})


def test_the_statements_are_those_of_the_code() -> None:
    """Their first lines, and how a line ends."""
    told = [code(row[1])[:2] for row in table(FORMAT, "Signatures")[1:]]
    assert told == [[statement_of(kind, b"").decode().removesuffix("\n"), "0a"] for kind in Statement]


def test_the_metadata_keys_of_generations_and_channels_are_those_of_the_code() -> None:
    """Of both tables together with the objects layout's: every constant, and no other."""
    tables = ("Metadata of an object", "Generation object", "Channel")
    told = {word for name in tables for row in table(FORMAT, name) for word in code(row[0])}
    ours = {value for name, value in vars(mapping).items() if name.isupper() and str(value).startswith("syncd-")}
    assert told == ours | {trust.MOVE, trust.SIGNATURES}


def test_the_caps_are_those_of_the_code() -> None:
    """The rows about moves, key sets and signatures."""
    told = {row[0]: row[1] for row in table(FORMAT, "Caps")[1:]}
    assert told["record, move, key set"] == f"{trust.RECORD_MAX:,} bytes each"
    assert told["who, why of a move"] == f"{trust.WHO_MAX}, {trust.WHY_MAX:,} characters"
    assert told["folder, channel in moves and key sets"] == f"{trust.NAME_MAX} characters"
    told_signatures = told["signatures; keys of a key set"]
    assert told_signatures == f"{MAX_SIGNATURES} each; {signatures._MAX_TEXT:,} characters of `{trust.SIGNATURES}`"
    assert trust.MAX_KEYS == MAX_SIGNATURES
    assert told["key sets that are followed in one go"] == f"{MAX_KEY_SETS:,}"
    assert told["generations, versions of key sets"] == f"{trust.MAX_VERSION:,}"
    assert (told["count of moves"], trust.MAX_COUNT) == ("2^53 - 1", 2**53 - 1)
    assert f"give or take {CLOCK_SLACK_SECONDS:.0f} seconds" in FORMAT.read_text()


def test_the_vectors_of_moves_and_key_sets_are_what_the_page_says_of_them() -> None:
    """``bytes``, ``digest`` and ``signatures`` of good ones, ``hex`` and ``error`` of others."""
    for name, decode in (("moves.json", decode_move), ("keys.json", decode_keys)):
        for one in vectors(name):
            assert set(one) in ({"name", "bytes", "digest", "signatures"}, {"refused", "error", "hex"})
            if "bytes" in one:
                decode(one["bytes"].encode("utf-8", "surrogatepass"))


def test_a_public_key_is_made_as_the_page_says() -> None:
    """``a0``, 32 bytes, CRC-16 of both, in base32 without padding."""
    seed, public = signatures.generate()
    raw = signatures._raw_public(public)
    assert raw is not None
    head = b"\xa0" + raw
    crc = 0
    for byte in head:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    assert base64.b32decode(public) == head + crc.to_bytes(2, "little")
    assert (len(public), public[0], seed[:2]) == (56, "U", "SU")
    assert len(encode_signatures([Signer(seed).sign(b"")])) < 4096
