"""Trust, one condition at a time: what a mutation of it would let through (the attacks are in test_trust.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from syncd.errors import ObjectCorrupt, Untrusted
from syncd.nodes import digest_of
from syncd.trust import (
    MAX_COUNT,
    MAX_KEYS,
    MAX_VERSION,
    RECORD_MAX,
    Seen,
    Trust,
    _is_before,
    decode_keys,
    decode_move,
    judge_generation,
    judge_offer,
    recover,
)
from tests.unit.test_trust import ANNA, AT, BOB, CARL, ONE, TWO, a_generation, an_offer, signer, trusting

SEEN = Seen(3, digest_of(b"move"), 2, digest_of(b"record"), {ANNA.public: 3}, (ANNA.public,))


@pytest.mark.fault("O5")
@pytest.mark.parametrize("decode", [decode_move, decode_keys])
def test_a_record_may_have_so_many_bytes_and_no_more(decode: Any) -> None:
    """One byte above is refused for that alone, without being parsed."""
    with pytest.raises(ObjectCorrupt, match="is not JSON"):
        decode(b" " * RECORD_MAX)
    with pytest.raises(ObjectCorrupt, match=f"of {RECORD_MAX + 1} bytes"):
        decode(b" " * (RECORD_MAX + 1))


@pytest.mark.fault("K8")
def test_as_many_keys_may_be_trusted_as_may_sign() -> None:
    """One more is refused; so is a version beyond ten digits."""
    keys = [signer(number).public for number in range(1, MAX_KEYS + 2)]
    digest = digest_of(b"key set")
    full = Trust(frozenset(keys[:MAX_KEYS]), MAX_KEYS, MAX_VERSION, digest)
    assert (len(full.keys), full.version) == (MAX_KEYS, MAX_VERSION)
    with pytest.raises(ValueError, match="keys where 1 to"):
        Trust(frozenset(keys), 1)
    with pytest.raises(ValueError, match="does not go with"):
        Trust(full.keys, 1, MAX_VERSION + 1, digest)


def test_only_a_configuration_is_its_own_anchor() -> None:
    """A key set that was followed keeps the one that it came from, or none: it is no configuration's."""
    assert Trust(frozenset({ANNA.public}), 1, 1, digest_of(b"key set")).anchor == ""
    configured = trusting(ANNA)
    assert configured.anchor == trusting(ANNA).anchor != trusting(ANNA, BOB).anchor
    assert Trust(configured.keys, 1, anchor=digest_of(b"another")).anchor == digest_of(b"another")


@pytest.mark.parametrize(("at", "since"), [("never", AT), (AT, "never"), ("", AT), (AT, "")])
def test_what_no_one_can_date_was_made_before(at: str, since: str) -> None:
    """A time that cannot be read vouches for nothing."""
    assert _is_before(at, since)
    assert not _is_before(AT, AT)


@pytest.mark.fault("K11")
@pytest.mark.parametrize("field", ["count", "highest", "expires", "doubted"])
@pytest.mark.parametrize("value", [-1, MAX_COUNT + 1, True, False, 3.0, "3", "soon", None, []], ids=str)
def test_k11_a_number_or_time_of_another_form_is_damage(field: str, value: Any) -> None:
    """Each field of what was seen, out of its range or of another type: refused, whatever it would mean."""
    text = SEEN.to_json()
    assert Seen.from_json(text) == SEEN
    with pytest.raises(ValueError, match="damaged"):
        Seen.from_json(json.dumps(json.loads(text) | {field: value}))


@pytest.mark.fault("K3")
def test_k3_the_highest_count_there_is_can_be_remembered() -> None:
    """A thief moves the channel to it: what the host notes then is no damage that would stop it for ever."""
    seen = Seen(MAX_COUNT, digest_of(b"move"), MAX_COUNT, digest_of(b"record"), {ANNA.public: MAX_COUNT})
    assert Seen.from_json(seen.to_json()) == seen


@pytest.mark.fault("K3", "K9")
def test_k3_who_signed_the_generation_before_does_not_vouch_for_the_next() -> None:
    """Bob's stolen key signs generation 2; he is removed: Anna, who signed 1, must be able to sign another 2."""
    trust = trusting(ANNA, BOB)
    seen = judge_offer(trust, Seen(), an_offer(1, ONE, ANNA)).seen
    seen = judge_offer(trust, seen, an_offer(2, TWO, BOB)).seen
    assert seen.signed_by == (BOB.public,)
    honest = a_generation(2, note="another")
    with pytest.raises(Untrusted, match="two generations 2"):
        judge_generation(seen, 2, digest_of(honest))
    judge_generation(recover(seen, trusting(ANNA), AT), 2, digest_of(honest))
    # the same generation again, signed by others, too: all of them vouch for it
    seen = judge_offer(trusting(ANNA, BOB, CARL), seen, an_offer(3, TWO, CARL)).seen
    assert seen.signed_by == tuple(sorted([BOB.public, CARL.public]))
