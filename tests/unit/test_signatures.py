"""Signatures: one written form, keys are counted, other keys and algorithms are refused, no secret is shown."""

from __future__ import annotations

import base64
import json
import traceback
from types import SimpleNamespace
from typing import Any

import nkeys
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.errors import BadSignatures, ObjectCorrupt
from syncd.signatures import (
    MAX_SIGNATURES,
    Signature,
    Signer,
    add_signature,
    decode_signatures,
    encode_signatures,
    generate,
    is_public,
    signers,
)

STATEMENT = b"syncd-move-v1\n{}"


def signer(number: int) -> Signer:
    """A signer of its own for each number, the same in every run."""
    return Signer(nkeys.encode_seed(bytes([number]) * 32, nkeys.PREFIX_BYTE_USER).decode())


ANNA, BOB, EVE = signer(1), signer(2), signer(3)


def a_key(prefix: int, raw: bytes) -> str:
    """What looks like a public key, checksum and all."""
    head = bytes([prefix]) + raw
    return base64.b32encode(head + nkeys.crc16_checksum(head)).decode()


def raw_of(public: str) -> bytes:
    return base64.b32decode(public)[1:-2]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_generated_seed_signs_for_its_public_key() -> None:
    """And no two are the same."""
    seed, public = generate()
    assert (seed[:2], len(seed), public[:1], len(public)) == ("SU", 58, "U", 56)
    assert Signer(seed).public == public
    assert is_public(public)
    assert signers(STATEMENT, [Signer(seed).sign(STATEMENT)], {public}) == {public}
    assert generate() != (seed, public)


def test_keys_and_signatures_are_those_of_nkeys() -> None:
    """Any NATS tool makes and reads them."""
    seed, public = generate()
    pair = nkeys.from_seed(seed.encode())
    assert pair.public_key.decode() == public
    assert pair.sign(STATEMENT) == Signer(seed).sign(STATEMENT).sig


def test_the_first_vector_of_rfc_8032() -> None:
    """The secret and public key and the signature over nothing of section 7.1, test 1."""
    raw = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    one = Signer(nkeys.encode_seed(raw, nkeys.PREFIX_BYTE_USER).decode())
    assert raw_of(one.public).hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert one.sign(b"").sig.hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )


SEED = nkeys.encode_seed(bytes([9]) * 32, nkeys.PREFIX_BYTE_USER).decode()
BAD_SEEDS = {
    "nothing": "",
    "a public key": ANNA.public,
    "one letter mistyped": SEED[:20] + ("A" if SEED[20] != "A" else "B") + SEED[21:],
    "one letter too few": SEED[:-1],
    "lower case": SEED.lower(),
    "a line feed": SEED + "\n",
    "an account's seed": nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_ACCOUNT).decode(),
    "an operator's seed": nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_OPERATOR).decode(),
    "33 bytes": base64.b32encode(b"\x95" + base64.b32decode(SEED + "=" * 6)[1:-2] + b"\0\0\0").decode().rstrip("="),
    "another script": "\uff33\uff35" + SEED[2:],
    "a lone surrogate": "\ud800" + SEED[1:],
}


@pytest.mark.fault("K8 K14")
@pytest.mark.parametrize("seed", BAD_SEEDS.values(), ids=BAD_SEEDS)
def test_what_is_no_seed_of_a_user_makes_no_signer(seed: str) -> None:
    """A signer is made of a seed that is mistyped, cut, in lower case, too long, an account's, a public key or nothing.

    It is refused, and neither the error nor its traceback holds what was given.
    """
    with pytest.raises(ValueError, match="seed of a user nkey") as caught:
        Signer(seed)
    told = "".join(traceback.format_exception(caught.value))
    assert not seed or seed not in told
    assert caught.value.__context__ is None


@pytest.mark.fault("K14")
def test_a_signer_shows_its_public_key_only() -> None:
    """A signer is turned into text by repr, str and format, within a list, and by the repr of its signature.

    The public key is shown, and no form of the seed.
    """
    one = Signer(SEED)
    secrets = (SEED, SEED[2:], bytes([9]).hex() * 32, repr(bytes([9]) * 32))
    for text in (repr(one), str(one), f"{one!r:>100}", repr([one]), repr(one.sign(b"x"))):
        assert one.public in text
        assert not any(secret in text for secret in secrets)
    assert not hasattr(one, "__dict__")


BAD_PUBLICS = {
    "nothing": "",
    "a seed": SEED,
    "55 characters": ANNA.public[:-1],
    "57 characters": ANNA.public + "A",
    "padding only": "=" * 56,
    "padding at the end": ANNA.public[:-6] + "=" * 6,
    "a wrong checksum": ANNA.public[:-1] + ("A" if ANNA.public[-1] != "A" else "B"),
    "lower case": ANNA.public.lower(),
    "another script": "\uff35" + ANNA.public[1:],
    "a lone surrogate": "\ud800" + ANNA.public[1:],
    "an account": a_key(nkeys.PREFIX_BYTE_ACCOUNT, raw_of(ANNA.public)),
    "an operator": a_key(nkeys.PREFIX_BYTE_OPERATOR, raw_of(ANNA.public)),
    "a server": a_key(nkeys.PREFIX_BYTE_SERVER, raw_of(ANNA.public)),
    "a point of order 1, which anybody can sign for": a_key(nkeys.PREFIX_BYTE_USER, b"\1" + bytes(31)),
    "a point of order 4": a_key(nkeys.PREFIX_BYTE_USER, bytes(32)),
    "28 bytes, padded to 56 characters": a_key(nkeys.PREFIX_BYTE_USER, bytes(28)),
    "33 bytes": a_key(nkeys.PREFIX_BYTE_USER, raw_of(ANNA.public) + b"\0"),
    "no point of the curve": a_key(nkeys.PREFIX_BYTE_USER, b"\2" + bytes(31)),
}


@pytest.mark.fault("K8")
@pytest.mark.parametrize("text", BAD_PUBLICS.values(), ids=BAD_PUBLICS)
def test_k8_what_is_no_public_key_of_a_user_is_refused(text: str) -> None:
    """Keys are cut, mistyped, of other kinds or lengths, a seed, or points that anybody can sign for.

    None is taken as a key or in a list of signatures, and as a trusted key none is ever counted.
    """
    assert not is_public(text)
    forged = Signature(text, b"\1" + bytes(63))
    assert signers(STATEMENT, [forged, Signature(text, ANNA.sign(STATEMENT).sig)], {text}) == frozenset()
    with pytest.raises(BadSignatures):
        decode_signatures(json.dumps([{"key": text, "sig": "A" * 86}], separators=(",", ":")))


# -- checking ----------------------------------------------------------------------------------------------------------


def test_who_has_signed_is_told() -> None:
    """Those of the keys asked for, and no others."""
    both = [ANNA.sign(STATEMENT), BOB.sign(STATEMENT)]
    assert signers(STATEMENT, both, {ANNA.public, EVE.public}) == {ANNA.public}
    assert signers(STATEMENT, both, {ANNA.public, BOB.public}) == {ANNA.public, BOB.public}
    assert signers(STATEMENT, both, frozenset()) == frozenset()
    assert signers(STATEMENT, [], {ANNA.public}) == frozenset()


@pytest.mark.fault("K1")
def test_k1_a_signature_is_good_for_its_statement_only() -> None:
    """Every changed bit of the statement or the signature spoils it."""
    good = ANNA.sign(STATEMENT)
    for at in range(len(STATEMENT) * 8):
        other = bytearray(STATEMENT)
        other[at // 8] ^= 1 << at % 8
        assert not signers(bytes(other), [good], {ANNA.public})
    for at in range(512):
        sig = bytearray(good.sig)
        sig[at // 8] ^= 1 << at % 8
        assert not signers(STATEMENT, [good._replace(sig=bytes(sig))], {ANNA.public})


@pytest.mark.fault("K8")
def test_k8_one_key_counts_once() -> None:
    """One key's good signature is given three times, beside a bad one of the same key.

    The key counts once.
    """
    good, bad = ANNA.sign(STATEMENT), ANNA.sign(b"something else")
    assert signers(STATEMENT, [good, good, bad, good], {ANNA.public, BOB.public}) == {ANNA.public}


@pytest.mark.fault("K8")
@pytest.mark.parametrize("sig", [b"", b"\0", bytes(64), bytes(63), ANNA.sign(STATEMENT).sig[:63], bytes(65)])
def test_k8_an_empty_or_short_signature_never_counts(sig: bytes) -> None:
    """A trusted key's signature is empty, one byte, all zeros, or a byte too short or too long.

    It never counts.
    """
    assert signers(STATEMENT, [Signature(ANNA.public, sig)], {ANNA.public}) == frozenset()


@pytest.mark.fault("K8")
def test_k8_a_signature_has_no_second_form() -> None:
    """The group's order is added to the S of a good signature, the same number to sloppy readers (RFC 8032, 5.1.7).

    It does not count.
    """
    order = (1 << 252) + 27742317777372353535851937790883648493
    good = ANNA.sign(STATEMENT).sig
    other = good[:32] + (int.from_bytes(good[32:], "little") + order).to_bytes(32, "little")
    assert signers(STATEMENT, [Signature(ANNA.public, other)], {ANNA.public}) == frozenset()


# -- the written list --------------------------------------------------------------------------------------------------


def test_signatures_survive_their_text() -> None:
    """In the order of their keys, however they came; none at all is the empty text."""
    both = (ANNA.sign(STATEMENT), BOB.sign(STATEMENT))
    text = encode_signatures(both)
    assert text == encode_signatures(both[::-1])
    assert decode_signatures(text) == tuple(sorted(both))
    assert [row["key"] for row in json.loads(text)] == sorted([ANNA.public, BOB.public])
    assert " " not in text
    assert "=" not in text
    assert encode_signatures([]) == ""
    assert decode_signatures("") == ()


def test_a_full_list_fits() -> None:
    """As many as there may be, and not one more."""
    full = [signer(number).sign(STATEMENT) for number in range(1, MAX_SIGNATURES + 1)]
    text = encode_signatures(full)
    assert len(text) == 2593
    assert len(decode_signatures(text)) == MAX_SIGNATURES
    with pytest.raises(ValueError, match="no list of 1 to 16"):
        encode_signatures([*full, signer(17).sign(STATEMENT)])


def test_a_key_that_signs_again_replaces_its_signature() -> None:
    """So that signing twice is nothing new."""
    first, other = ANNA.sign(b"before"), BOB.sign(STATEMENT)
    assert set(add_signature([first, other], ANNA.sign(STATEMENT))) == {ANNA.sign(STATEMENT), other}
    assert add_signature([], first) == (first,)


def test_a_writer_writes_nothing_that_readers_refuse() -> None:
    good = ANNA.sign(STATEMENT)
    for bad in ([good, good], [good._replace(sig=b"")], [good._replace(key="U")], [good._replace(sig=bytes(65))]):
        with pytest.raises(ValueError):
            encode_signatures(bad)


ONE = encode_signatures([ANNA.sign(STATEMENT)])
TWO = encode_signatures([ANNA.sign(STATEMENT), BOB.sign(STATEMENT)])
ROW = json.loads(ONE)[0]
ROWS = json.loads(TWO)


def text_of(*rows: object) -> str:
    return json.dumps(rows, separators=(",", ":"))


REFUSED = {
    "no JSON": "[",
    "an object": json.dumps(ROW),
    "nothing": "null",
    "an empty list": "[]",
    "a text": '"x"',
    "a list of texts": text_of("x"),
    "a list of lists": text_of([]),
    "lists, one inside the other": "[" * 4000,
    "too long": " " * 4097,
    "seventeen": text_of(*[ROW] * 17),
    "a blank": ONE.replace(",", ", "),
    "a line feed": ONE + "\n",
    "a byte order mark": "\ufeff" + ONE,
    "a doubled field": ONE.replace('{"key"', '{"key":"","key"'),
    "a field in another order": text_of({"sig": ROW["sig"], "key": ROW["key"]}),
    "an escape": ONE.replace('"U', '"\\u0055'),
    "a field more": text_of({**ROW, "alg": "none"}),
    "a field less": text_of({"key": ROW["key"]}),
    "an algorithm for a key": text_of({"alg": "ed25519", "sig": ROW["sig"]}),
    "a key that is no text": text_of({**ROW, "key": 1}),
    "a signature that is no text": text_of({**ROW, "sig": None}),
    "an empty signature": text_of({**ROW, "sig": ""}),
    "a short signature": text_of({**ROW, "sig": ROW["sig"][:-2]}),
    "a long signature": text_of({**ROW, "sig": ROW["sig"] + "AA"}),
    "padding": text_of({**ROW, "sig": ROW["sig"] + "=="}),
    "other last bits": text_of({**ROW, "sig": ROW["sig"][:-1] + chr(ord(ROW["sig"][-1]) + 1)}),
    "the other alphabet": text_of({**ROW, "sig": "+" * 85 + "A"}),
    "blanks in base64": text_of({**ROW, "sig": ROW["sig"][:40] + "\n" + ROW["sig"][40:]}),
    "letters of another script": text_of({**ROW, "sig": "é" * 86}),
    "a lone surrogate": text_of({**ROW, "sig": "\ud800" * 86}),
    "out of order": text_of(*ROWS[::-1]),
    "one key twice": text_of(ROW, ROW),
    "one key twice, two signatures": text_of(ROW, {**ROW, "sig": ROWS[1]["sig"]}),
}


@pytest.mark.fault("K8 K10")
@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_k10_a_list_of_signatures_has_one_form(text: str) -> None:
    """A list of signatures is no list, has other fields, blanks, escapes, bad base64, a key twice or out of order.

    It is refused, as what is damaged is.
    """
    with pytest.raises(BadSignatures) as caught:
        decode_signatures(text)
    assert isinstance(caught.value, ObjectCorrupt)
    assert len(caught.value.message) < 200


@pytest.mark.fault("K10")
def test_k10_a_long_text_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,097 opening brackets are given as a list of signatures, and one less, which a parser gets to see.

    They are refused for their length, and not one of them is parsed; one less is refused as no JSON.
    """
    parsed: list[int] = []

    def loads(text: str) -> Any:
        parsed.append(len(text))
        return json.loads(text)

    monkeypatch.setattr("syncd.signatures.json", SimpleNamespace(loads=loads))
    with pytest.raises(BadSignatures, match="signatures of 4097 characters"):
        decode_signatures("[" * 4097)
    with pytest.raises(BadSignatures, match="not JSON"):
        decode_signatures("[" * 4096)
    assert parsed == [4096]


def test_the_refusals_are_refused_for_one_reason_only() -> None:
    """What they are made of is accepted."""
    assert text_of(ROW) == ONE
    assert text_of(*ROWS) == TWO
    assert len(decode_signatures(ONE)) + len(decode_signatures(TWO)) == 3
    assert decode_signatures(text_of({**ROW, "sig": "-" * 85 + "A"}))


pieces = st.sampled_from(["0", "null", "[", "]", "{", '"', "\\u0055", "\\ud800", "=", ",", " ", ROW["key"], ONE, TWO])


@settings(max_examples=300)
@given(
    st.builds(
        lambda text, at, end, piece: text[:at] + piece + text[end:],
        st.sampled_from([ONE, TWO]),
        st.integers(0, len(TWO)),
        st.integers(0, len(TWO)),
        pieces | st.text(max_size=5),
    )
    | st.text(max_size=100)
)
def test_whatever_a_list_is_read_from_it_has_one_form(text: str) -> None:
    """Any text is refused, or written again exactly so; nothing else escapes."""
    try:
        found = decode_signatures(text)
    except BadSignatures:
        return
    assert encode_signatures(found) == text
