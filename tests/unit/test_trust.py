"""Trust: the attacks of class K, each by its name, at the place where they are decided; and the bytes of both records.

tests/vectors/moves.json and keys.json hold the bytes for readers in other languages; `python -m tests.unit.test_trust`
writes them anew.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nkeys
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd import errors, nodes
from syncd.errors import EXIT_NOPERM, FormatTooNew, ObjectCorrupt, SyncdError, Untrusted
from syncd.model import Entry, Kind
from syncd.nodes import (
    Child,
    Generation,
    Location,
    Node,
    NodeRef,
    Where,
    digest_of,
    encode_node,
    encode_record,
    identity,
    tree_digest,
)
from syncd.retry import is_transient
from syncd.signatures import Signature, Signer, decode_signatures, encode_signatures, generate, signers
from syncd.trust import (
    CLOCK_SLACK_SECONDS,
    EVER,
    MAX_COUNT,
    RECORD_MAX,
    WHO_MAX,
    WHY_MAX,
    Accepted,
    KeySet,
    Move,
    Offer,
    Seen,
    Statement,
    Step,
    Trust,
    advance,
    check_move,
    check_signed,
    decode_keys,
    decode_move,
    encode_keys,
    encode_move,
    follow,
    is_expired,
    judge_generation,
    judge_move,
    judge_offer,
    keys_name,
    recover,
    resume,
    seconds_of,
    start_at,
    statement_of,
)

VECTORS = Path(__file__).parents[2] / "tests/vectors"
AT = "2026-11-21T02:02:45.600984Z"


def signer(number: int) -> Signer:
    """A signer of its own for each number, the same in every run."""
    return Signer(nkeys.encode_seed(bytes([number]) * 32, nkeys.PREFIX_BYTE_USER).decode())


ANNA, BOB, CARL, EVE = (signer(number) for number in range(1, 5))
"""Eve is never trusted, but where she stole a key."""


def trusting(*whom: Signer, threshold: int = 1) -> Trust:
    return Trust(frozenset(one.public for one in whom), threshold)


def signed(kind: Statement, data: bytes, *by: Signer) -> str:
    return encode_signatures([one.sign(statement_of(kind, data)) for one in by])


def a_generation(number: int, *, folder: str = "app", note: str = "") -> bytes:
    root = NodeRef(digest_of(b"tree"), Location(Where.BLOB, digest_of(b"node")), 100)
    return encode_record(Generation(folder, number, root, AT, "web-1:/srv/app", note=note))


def a_move(count: int, record: bytes, **changes: Any) -> Move:
    found = nodes.decode_record(record)
    move = Move(found.folder, "head", count, found.number, digest_of(record), AT, who="anna@web-1")
    return replace(move, **changes)


def an_offer(count: int, record: bytes, *by: Signer, number: int = 0, **changes: Any) -> Offer:
    """What a channel says after an honest move, signed by some."""
    data = encode_move(a_move(count, record, **changes))
    return Offer(
        folder="app",
        channel="head",
        number=number or nodes.decode_record(record).number,
        record=record,
        record_signatures=signed(Statement.GENERATION, record, *by),
        move=data.decode(),
        move_signatures=signed(Statement.MOVE, data, *by),
    )


def key_set(after: Trust, *keys: Signer, threshold: int = 1, **changes: Any) -> bytes:
    """The next key set."""
    publics = tuple(sorted(one.public for one in keys))
    return encode_keys(replace(KeySet("app", after.version + 1, publics, threshold, AT, after.digest), **changes))


def refused(trust: Trust, seen: Seen, offer: Offer, why: str) -> None:
    """The offer is refused for one reason, in words for a person, and not tried again by itself."""
    with pytest.raises(Untrusted, match=why) as caught:
        judge_offer(trust, seen, offer)
    assert caught.value.exit_code == EXIT_NOPERM
    assert not is_transient(caught.value)


ONE, TWO, THREE = (a_generation(number) for number in (1, 2, 3))


# -- what is right -----------------------------------------------------------------------------------------------------


def test_a_signed_move_to_a_signed_generation_is_followed() -> None:
    """And what has to be remembered of it is said."""
    offer = an_offer(7, TWO, ANNA, EVE)
    move, seen = judge_offer(trusting(ANNA, BOB), Seen(), offer)
    assert move == a_move(7, TWO)
    by = (ANNA.public,)
    assert seen == Seen(7, digest_of(offer.move.encode()), 2, digest_of(TWO), moved={ANNA.public: 7}, signed_by=by)
    ends = "2026-11-22T00:00:00Z"
    assert judge_offer(trusting(ANNA, BOB), Seen(), an_offer(7, TWO, ANNA, expires=ends)).seen.expires == ends


def test_the_same_offer_again_is_nothing_new() -> None:
    """It is followed, and nothing has to be remembered."""
    offer = an_offer(7, TWO, ANNA)
    seen = judge_offer(trusting(ANNA), Seen(), offer).seen
    assert judge_offer(trusting(ANNA), seen, offer) == Accepted(a_move(7, TWO), seen)


def test_a_newer_move_leads_back() -> None:
    """The highest number stays remembered, with its record and who signed it."""
    seen = judge_offer(trusting(ANNA, BOB), Seen(), an_offer(7, THREE, ANNA)).seen
    back = judge_offer(trusting(ANNA, BOB), seen, an_offer(8, ONE, BOB)).seen
    assert (back.count, back.highest, back.record, back.signed_by) == (8, 3, digest_of(THREE), (ANNA.public,))
    assert back.moved == {ANNA.public: 7, BOB.public: 8}
    forth = judge_offer(trusting(ANNA, BOB), back, an_offer(9, THREE, BOB)).seen
    assert (forth.count, forth.highest, forth.signed_by) == (9, 3, tuple(sorted([ANNA.public, BOB.public])))


def test_different_keys_may_have_signed_the_generation_and_the_move() -> None:
    """The publisher the one, the operator the other."""
    offer = an_offer(1, ONE, ANNA)._replace(
        move_signatures=signed(Statement.MOVE, encode_move(a_move(1, ONE)), BOB),
    )
    seen = judge_offer(trusting(ANNA, BOB), Seen(), offer).seen
    assert (seen.moved, seen.signed_by) == ({BOB.public: 1}, (ANNA.public,))


# -- attacks -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("K1")
def test_k1_arbitrary_content_is_refused() -> None:
    """An offer is unsigned, signed by a stranger, even under a trusted name, for something else, or changed since.

    Each is refused, and the honest one is followed.
    """
    trust, good = trusting(ANNA), an_offer(1, ONE, ANNA)
    eves = an_offer(1, a_generation(1, note="evil"), EVE)
    anna_for_one, evil = good.record_signatures, a_generation(1, note="evil")
    refused(trust, Seen(), eves, "the channel's move has 0 good signatures by trusted keys where 1 are needed")
    refused(trust, Seen(), good._replace(record=evil), "the generation has 0 good signatures")
    refused(trust, Seen(), good._replace(record_signatures=""), "the generation has 0 good signatures")
    refused(trust, Seen(), good._replace(move_signatures=""), "the channel's move has 0 good signatures")
    refused(trust, Seen(), good._replace(move=""), "without a signed move")
    refused(trust, Seen(), good._replace(record_signatures="[]"), "cannot be trusted: signatures that are no list")
    refused(trust, Seen(), good._replace(move=good.move.replace("anna@", "evil@")), "0 good signatures")
    # Eve puts Anna's name before her own signature
    (theirs,) = decode_signatures(signed(Statement.GENERATION, evil, EVE))
    forged = encode_signatures([Signature(ANNA.public, theirs.sig)])
    refused(trust, Seen(), good._replace(record=evil, record_signatures=forged), "0 good signatures")
    # a good record, reached by a move of Anna's that leads to another one
    refused(trust, Seen(), good._replace(record=TWO), "the generation has 0 good signatures")
    two = an_offer(1, TWO, ANNA)
    refused(trust, Seen(), two._replace(move=good.move, move_signatures=good.move_signatures), "leads to generation 1")
    other = an_offer(1, a_generation(1, note="an older attempt"), ANNA)
    swapped = good._replace(record=other.record, record_signatures=other.record_signatures)
    refused(trust, Seen(), swapped, "leads to another generation 1 than the bucket has")
    assert judge_offer(trust, Seen(), good).move.number == 1
    assert anna_for_one != other.record_signatures


@pytest.mark.fault("K1")
def test_k1_a_move_that_is_not_unicode_is_refused_as_any_other() -> None:
    """A lone surrogate, which JSON can hold and UTF-8 cannot, is put into a move and into its signatures.

    Both are refused as any other; nothing else escapes.
    """
    good = an_offer(1, ONE, ANNA)
    refused(trusting(ANNA), Seen(), good._replace(move=good.move.replace("anna@", "\ud800@")), "0 good signatures")
    refused(trusting(ANNA), Seen(), good._replace(move_signatures="\ud800"), "cannot be trusted")


@pytest.mark.fault("K1 K8")
def test_k1_a_signature_of_one_kind_is_none_of_another() -> None:
    """A trusted key signs the same bytes as a generation, a move and a key set; each signature is shown for the others.

    It counts for its own kind alone, and one over the bare bytes for none.
    """
    trust = trusting(ANNA)
    kinds = list(Statement)
    data = b'{"the same":"bytes"}'
    for kind in kinds:
        for other in kinds:
            text = signed(other, data, ANNA)
            if kind is other:
                assert check_signed(trust, kind, data, text) == {ANNA.public}
            else:
                with pytest.raises(Untrusted, match="0 good signatures"):
                    check_signed(trust, kind, data, text)
    with pytest.raises(Untrusted):
        check_signed(trust, Statement.MOVE, data, encode_signatures([ANNA.sign(data)]))
    assert [statement_of(kind, b"{}") for kind in kinds] == [
        b"syncd-generation-v1\n{}",
        b"syncd-move-v1\n{}",
        b"syncd-keys-v1\n{}",
    ]


@pytest.mark.fault("K2")
def test_k2_rollback_is_refused() -> None:
    """A host that has seen move 8 is shown move 7, signed as it was then.

    It is refused as rollback or replay.
    """
    trust, yesterday = trusting(ANNA), an_offer(7, TWO, ANNA)
    seen = judge_offer(trust, Seen(), an_offer(8, THREE, ANNA)).seen
    refused(trust, seen, yesterday, "move 7 of channel 'head' is offered after move 8: rollback or replay")


@pytest.mark.fault("K2")
def test_k2_replay_of_a_move_that_an_operator_took_back_is_refused() -> None:
    """A host has seen move 8 and the operator's rollback of it, move 9; move 8 is shown again.

    It is refused as rollback or replay.
    """
    trust, bad = trusting(ANNA), an_offer(8, THREE, ANNA)
    seen = judge_offer(trust, Seen(), bad).seen
    seen = judge_offer(trust, seen, an_offer(9, TWO, ANNA)).seen
    refused(trust, seen, bad, "rollback or replay")


@pytest.mark.fault("K2")
def test_k2_a_link_alone_leads_nowhere() -> None:
    """The link, which nobody signs, is pointed at an older signed generation, with the present move beside it.

    It is refused: the move leads elsewhere.
    """
    trust, present, older = trusting(ANNA), an_offer(2, TWO, ANNA), an_offer(1, ONE, ANNA)
    seen = judge_offer(trust, Seen(), present).seen
    moved = older._replace(move=present.move, move_signatures=present.move_signatures)
    refused(trust, seen, moved, "the move leads to generation 2, but channel 'head' points at 1")


@pytest.mark.fault("K2")
def test_k2_two_histories_are_refused() -> None:
    """A trusted key signs two moves of one count, or two records of one number.

    A host that has seen the one refuses the other, also after it went back.
    """
    trust = trusting(ANNA)
    seen = judge_offer(trust, Seen(), an_offer(7, TWO, ANNA)).seen
    refused(trust, seen, an_offer(7, THREE, ANNA), "there are two moves 7 of channel 'head': two histories")
    refused(trust, seen, an_offer(7, TWO, ANNA, why="otherwise"), "two moves 7")
    refused(trust, seen, an_offer(8, a_generation(2, note="x"), ANNA), "there are two generations 2: two histories")
    assert judge_offer(trust, seen, an_offer(8, ONE, ANNA)).seen.highest == 2
    back = judge_offer(trust, seen, an_offer(8, ONE, ANNA)).seen
    refused(trust, back, an_offer(9, a_generation(2, note="x"), ANNA), "two generations 2")


def later(seconds: float) -> str:
    """A time so long after that of all records here."""
    moment = seconds_of(AT)
    assert moment is not None
    return datetime.fromtimestamp(moment + seconds, UTC).isoformat().replace("+00:00", "Z")


HOUR = 3600.0


@pytest.mark.fault("K3")
def test_k3_fast_forward_and_recovery() -> None:
    """A stolen key signs a move with the highest count there is; a key set of the other key then revokes it.

    Honest moves are refused until that is followed, then accepted again; the thief's moves are not.
    """
    trust = trusting(ANNA, BOB)
    evil = an_offer(MAX_COUNT, a_generation(nodes.MAX_GENERATION), ANNA)
    seen = judge_offer(trust, Seen(), evil).seen
    honest = an_offer(9, THREE, BOB, at=later(HOUR))
    refused(trust, seen, honest, "rollback or replay")
    assert recover(seen, trust, later(HOUR)) == seen
    record = key_set(trust, BOB, at=later(HOUR))
    reached, _, (step,) = follow(trust, {1: (record, signed(Statement.KEYS, record, BOB))}, folder="app")
    assert step == Step(reached, later(HOUR))
    refused(reached, seen, honest, "rollback or replay")
    seen = recover(seen, *step)
    assert seen == Seen(MAX_COUNT, digest_of(evil.move.encode()), doubted=later(HOUR))
    after = judge_offer(reached, seen, honest).seen
    assert (after.count, after.highest, after.doubted) == (9, 3, "")
    refused(reached, seen, evil, "0 good signatures")
    refused(reached, after, an_offer(8, THREE, BOB, at=later(2 * HOUR)), "rollback or replay")


@pytest.mark.fault("K3", "K8")
def test_k3_thieves_of_the_threshold_are_rid_of_when_their_last_key_is_gone() -> None:
    """Two stolen keys of three, two being needed, sign the highest count; they are removed one after the other.

    With one left nothing changes; with both gone the count is that which the third had vouched for.
    """
    trust = trusting(ANNA, BOB, CARL, threshold=2)
    seen = judge_offer(trust, Seen(), an_offer(5, ONE, BOB, CARL)).seen
    seen = judge_offer(trust, seen, an_offer(MAX_COUNT, TWO, ANNA, BOB)).seen
    honest = an_offer(6, ONE, CARL, EVE, at=later(HOUR))
    one_left = recover(seen, trusting(BOB, CARL, threshold=2), later(HOUR))
    assert (one_left.floor, one_left.doubted) == (MAX_COUNT, "")
    both_gone = recover(one_left, trusting(CARL, EVE, threshold=2), later(HOUR))
    assert (both_gone.floor, both_gone.doubted) == (5, later(HOUR))
    assert judge_offer(trusting(CARL, EVE, threshold=2), both_gone, honest).seen.count == 6


@pytest.mark.fault("K2")
def test_k2_what_a_remaining_key_has_signed_stays_with_a_removed_one() -> None:
    """One of two keys that both signed a move is removed, and the other one's older move is shown.

    It is refused as replay: what a remaining key vouches for stays remembered.
    """
    trust = trusting(ANNA, BOB)
    seen = judge_offer(trust, Seen(), an_offer(8, THREE, ANNA, BOB)).seen
    after = trusting(BOB, CARL)
    kept = recover(seen, after, later(HOUR))
    assert kept == replace(seen, moved={BOB.public: 8}, signed_by=(BOB.public,))
    refused(after, kept, an_offer(7, TWO, BOB, at=later(2 * HOUR)), "rollback or replay")
    # the one without the other
    publishers, operators = replace(seen, signed_by=(ANNA.public,)), replace(seen, moved={ANNA.public: 8})
    assert recover(publishers, after, EVER) == Seen(8, seen.move, moved={BOB.public: 8})
    found = recover(operators, after, EVER)
    assert found == Seen(8, seen.move, 3, seen.record, signed_by=(BOB.public,), doubted=EVER)
    # two are needed now, and only one of those who signed is still trusted: it is none of the thieves
    assert recover(seen, trusting(BOB, CARL, threshold=2), EVER) == kept


@pytest.mark.fault("K2", "K9")
def test_k2_a_higher_threshold_makes_nobody_forget() -> None:
    """The threshold is raised from one to two with the same keys, and an older move is shown, signed by both.

    Nothing is forgotten: it is refused as rollback or replay.
    """
    seen = judge_offer(trusting(ANNA, BOB), Seen(), an_offer(8, THREE, ANNA)).seen
    both = trusting(ANNA, BOB, threshold=2)
    assert recover(seen, both, EVER) == seen
    refused(both, recover(seen, both, EVER), an_offer(7, TWO, ANNA, BOB), "rollback or replay")


@pytest.mark.fault("K2", "K9")
def test_k2_an_old_move_of_a_remaining_key_is_no_recovery() -> None:
    """A key that alone had signed the newest moves is removed; older ones of the remaining key are shown.

    They are refused, seen before or not; what is newer and made after the removal is followed.
    """
    trust, after = trusting(ANNA, BOB), trusting(BOB)
    bobs_first = an_offer(1, ONE, BOB)
    seen = judge_offer(trust, Seen(), bobs_first).seen
    seen = judge_offer(trust, seen, an_offer(5, THREE, ANNA)).seen
    doubting = recover(seen, after, later(HOUR))
    assert (doubting.floor, doubting.count) == (1, 5)
    refused(after, doubting, bobs_first, "rollback or replay")
    refused(after, doubting, an_offer(1, ONE, BOB, at=later(2 * HOUR)), "rollback or replay")
    refused(after, doubting, an_offer(3, TWO, BOB), "before the keys that vouched for that were removed")
    refused(after, doubting, an_offer(5, TWO, BOB), "before the keys that vouched for that were removed")
    slack = later(HOUR - CLOCK_SLACK_SECONDS)
    assert judge_offer(after, doubting, an_offer(3, TWO, BOB, at=slack)).seen.count == 3
    # the very move that was seen, signed by Bob as well meanwhile, and what goes on from there
    assert judge_offer(after, doubting, an_offer(5, THREE, BOB)).seen.doubted == ""
    assert judge_offer(after, doubting, an_offer(6, THREE, BOB)).seen.count == 6
    # another key goes: it is doubted since the first time
    assert recover(doubting, trusting(CARL), later(9 * HOUR)).doubted == later(HOUR)


@pytest.mark.fault("K2")
def test_k2_signatures_that_are_left_out_make_nobody_forget_who_vouched() -> None:
    """A move that was seen with two signatures is shown again without Bob's, and then the other key is removed.

    Its count and number stay remembered: Bob has vouched for them.
    """
    trust = trusting(ANNA, BOB)
    seen = judge_offer(trust, Seen(), an_offer(8, THREE, ANNA, BOB)).seen
    again = judge_offer(trust, seen, an_offer(8, THREE, ANNA)).seen
    assert again == seen
    assert recover(again, trusting(BOB), later(HOUR)).floor == 8
    assert recover(again, trusting(BOB), later(HOUR)).highest == 3


@pytest.mark.fault("K4")
def test_k4_freeze_is_seen_at_the_end_of_a_record() -> None:
    """A signed move with an end is judged by clocks before and after it, with slack and without; its end is changed.

    It counts as expired from its end on, and the changed end spoils its signature.
    """
    offer = an_offer(1, ONE, ANNA, expires="2026-11-22T00:00:00Z")
    move = judge_offer(trusting(ANNA), Seen(), offer).move
    end = 1795305600.0
    assert seconds_of(move.expires) == end
    assert not is_expired(move.expires, end - 1)
    assert is_expired(move.expires, end)
    assert not is_expired(move.expires, end + 299, slack=300)
    assert is_expired(move.expires, end + 300, slack=300)
    assert not is_expired("", 1e12)
    assert is_expired("whenever", 0.0)
    # the end is part of what is signed
    refused(trusting(ANNA), Seen(), offer._replace(move=offer.move.replace("2026-11-22", "2036-11-22")), "0 good")


@pytest.mark.fault("K5")
def test_k5_mix_and_match_across_folders_and_channels_is_refused() -> None:
    """A move or record that a trusted key signed for another channel or folder is put into an offer.

    Each is refused, whichever part it is.
    """
    trust = trusting(ANNA)
    canary = an_offer(9, THREE, ANNA, channel="canary")
    refused(trust, Seen(), canary, "the move is that of channel 'canary' of folder 'app', not of 'head' of 'app'")
    good, web = an_offer(1, ONE, ANNA), a_generation(1, folder="web")
    theirs = good._replace(record=web, record_signatures=signed(Statement.GENERATION, web, ANNA))
    refused(trust, Seen(), theirs, "that of generation 1 of folder 'web', not of generation 1 of folder 'app'")
    move = encode_move(a_move(1, web))
    mixed = good._replace(move=move.decode(), move_signatures=signed(Statement.MOVE, move, ANNA))
    refused(trust, Seen(), mixed, "the move is that of channel 'head' of folder 'web'")
    with pytest.raises(Untrusted, match="folder 'web'"):
        check_move(a_move(1, web), folder="app", channel="head", number=1, record=digest_of(web))


@pytest.mark.fault("K5")
def test_k5_a_generation_under_another_number_is_refused() -> None:
    """The signed record of generation 1 is offered as number 3, with a signed move that says 3.

    It is refused: the record says another number.
    """
    data = encode_move(a_move(5, ONE, number=3))
    offer = an_offer(5, ONE, ANNA, number=3)._replace(
        move=data.decode(), move_signatures=signed(Statement.MOVE, data, ANNA)
    )
    refused(trusting(ANNA), Seen(), offer, "that of generation 1 of folder 'app', not of generation 3")


@pytest.mark.fault("K6")
def test_k6_a_partial_set_is_refused() -> None:
    """A file is left out of a node, and the signed record is changed to name that node's tree.

    The node does not match the tree digest that was signed, and the changed record has no good signature.
    """

    def a_node(*names: str) -> tuple[bytes, str]:
        children = [
            Child(
                name, Entry(Kind.FILE, 0o644, 1, 2, digest_of(b"hi")), location=Location(Where.BLOB, digest_of(b"hi"))
            )
            for name in names
        ]
        identities = [identity(child) for child in children]
        stored = [(child.entry.kind, child.location, 0) for child in children]
        return encode_node(identities, stored), tree_digest(identities)

    whole, tree = a_node("app.conf", "firewall.conf")
    part, other = a_node("app.conf")
    record = encode_record(
        Generation("app", 1, NodeRef(tree, Location(Where.BLOB, digest_of(whole)), len(whole)), AT, "web-1:/srv/app")
    )
    judge_offer(trusting(ANNA), Seen(), an_offer(1, record, ANNA))
    root = nodes.decode_record(record).root
    assert Node(whole, root.tree).count == 2
    with pytest.raises(ObjectCorrupt, match="does not match its tree digest"):
        Node(part, root.tree)
    forged = record.replace(tree.encode(), other.encode())
    offer = an_offer(1, record, ANNA)
    refused(trusting(ANNA), Seen(), offer._replace(record=forged), "the generation has 0 good signatures")


@pytest.mark.fault("K7")
def test_k7_replay_for_another_folder_is_refused() -> None:
    """Another folder's move, record and key set, all signed by the trusted key, are shown in this one's place.

    They are refused: each names its folder.
    """
    trust = trusting(ANNA)
    theirs = an_offer(99, a_generation(99, folder="web"), ANNA)
    refused(trust, Seen(), theirs, "folder 'web', not of generation 99 of folder 'app'")
    record = key_set(trust, EVE, folder="web")
    with pytest.raises(Untrusted, match="the key set is that of folder 'web', not of 'app'"):
        advance(trust, record, signed(Statement.KEYS, record, ANNA), folder="app")


@pytest.mark.fault("K8")
def test_k8_a_threshold_of_zero_or_out_of_reach_is_refused() -> None:
    """A threshold of 0, -1 or 3 of two keys is configured, remembered, or put into a key set; so are 0 and 17 keys.

    Each is refused.
    """
    keys = frozenset({ANNA.public, BOB.public})
    for threshold in (0, -1, 3):
        with pytest.raises(ValueError, match="of 2 keys cannot be what is needed"):
            Trust(keys, threshold)
        text = Trust(keys, 1).to_json().replace('"threshold": 1', f'"threshold": {threshold}')
        with pytest.raises(ValueError):
            Trust.from_json(text)
        with pytest.raises(ValueError):
            key_set(Trust(keys, 1), ANNA, BOB, threshold=threshold)
    with pytest.raises(ValueError, match="0 keys where 1 to 16 are possible"):
        Trust(frozenset(), 0)
    with pytest.raises(ValueError, match="17 keys where"):
        trusting(*map(signer, range(1, 18)))
    with pytest.raises(ValueError, match="no public nkey"):
        Trust(frozenset({ANNA.public, "UABC"}), 1)
    with pytest.raises(ValueError, match="version -1 does not go with the digest"):
        Trust(keys, 1, -1, digest_of(b"x"))


@pytest.mark.fault("K14")
def test_k14_a_seed_among_the_trusted_keys_is_not_shown() -> None:
    """A seed is configured as a trusted key.

    It is refused, and the error does not hold it.
    """
    seed, _ = generate()
    with pytest.raises(ValueError, match="no public nkey") as caught:
        Trust(frozenset({seed}), 1)
    assert seed[2:] not in str(caught.value)


@pytest.mark.fault("K8")
def test_k8_one_key_counted_twice_is_refused() -> None:
    """Two of three have to sign, and one key's signature is there twice, or beside a stranger's.

    It is refused; with a second trusted key it counts.
    """
    trust, record = trusting(ANNA, BOB, CARL, threshold=2), ONE
    one = json.loads(signed(Statement.GENERATION, record, ANNA))[0]
    twice = json.dumps([one, one], separators=(",", ":"))
    with pytest.raises(Untrusted, match="there twice"):
        check_signed(trust, Statement.GENERATION, record, twice)
    statement = statement_of(Statement.GENERATION, record)
    assert signers(statement, [ANNA.sign(statement)] * 2, trust.keys) == {ANNA.public}
    with pytest.raises(Untrusted, match="has 1 good signatures by trusted keys where 2 are needed"):
        check_signed(trust, Statement.GENERATION, record, signed(Statement.GENERATION, record, ANNA, EVE))
    text = signed(Statement.GENERATION, record, ANNA, CARL, EVE)
    assert check_signed(trust, Statement.GENERATION, record, text) == {ANNA.public, CARL.public}


@pytest.mark.fault("K8")
@pytest.mark.parametrize(
    "row",
    [
        {"key": ANNA.public, "sig": ""},
        {"key": ANNA.public, "sig": "A" * 86},
        {"key": ANNA.public, "sig": ANNA.public},
        {"key": ANNA.public, "alg": "none", "sig": ""},
        {"key": ANNA.public, "alg": "ed25519"},
        {"key": ANNA.public},
        {"sig": "A" * 86},
        {},
    ],
    ids=lambda row: json.dumps(row)[:200],
)
def test_k8_unknown_algorithms_and_empty_signatures_are_refused(row: dict[str, str]) -> None:
    """A row of the list of signatures is empty, has an empty or false signature, or an `alg` field.

    It is refused: there is one algorithm, and no field to name another by.
    """
    with pytest.raises(Untrusted):
        check_signed(trusting(ANNA), Statement.MOVE, b"{}", json.dumps([row], separators=(",", ":")))


@pytest.mark.fault("K9")
def test_k9_rotation() -> None:
    """A key set that the old key signed names two new keys, which both have to sign.

    What one of them signs is refused before and after; what both sign is followed. After it what the old key signs,
    alone or with one of them, is refused, as an offer and as another key set.
    """
    start = trusting(ANNA)
    assert (start.version, start.digest) == (0, "")
    refused(start, Seen(), an_offer(1, ONE, BOB), "0 good signatures")
    record = key_set(start, BOB, CARL, threshold=2, why="Anna left")
    after = advance(start, record, signed(Statement.KEYS, record, ANNA), folder="app")
    assert (after.version, after.digest, after.threshold) == (1, digest_of(record), 2)
    assert after.keys == {BOB.public, CARL.public}
    assert after.anchor == start.anchor != ""
    refused(after, Seen(), an_offer(1, ONE, BOB), "1 good signatures by trusted keys where 2")
    assert judge_offer(after, Seen(), an_offer(1, ONE, BOB, CARL)).seen.count == 1
    refused(after, Seen(), an_offer(1, ONE, ANNA), "0 good signatures")
    refused(after, Seen(), an_offer(1, ONE, ANNA, BOB), "1 good signatures by trusted keys where 2")
    back = key_set(after, ANNA)
    for by in ([ANNA], [ANNA, BOB]):
        with pytest.raises(Untrusted, match="good signatures by trusted keys where 2"):
            advance(after, back, signed(Statement.KEYS, back, *by), folder="app")


@pytest.mark.fault("K9")
def test_k9_a_revoked_key_is_refused() -> None:
    """A key that a key set dropped signs an offer, and a key set that brings it back.

    Both are refused, and the set that was followed already is not followed again.
    """
    start = trusting(ANNA, BOB)
    record = key_set(start, BOB)
    after = advance(start, record, signed(Statement.KEYS, record, BOB), folder="app")
    refused(after, Seen(), an_offer(1, ONE, ANNA), "0 good signatures")
    again = key_set(after, ANNA)
    with pytest.raises(Untrusted, match="the key set has 0 good signatures"):
        advance(after, again, signed(Statement.KEYS, again, ANNA), folder="app")
    with pytest.raises(Untrusted, match="version 1 where 2 is due"):
        advance(after, record, signed(Statement.KEYS, record, ANNA, BOB), folder="app")


@pytest.mark.fault("K9")
def test_k9_only_the_old_keys_introduce_new_ones() -> None:
    """A key set is unsigned, signed by the new key, by one old key where two are needed, or as another kind of record.

    It is refused.
    """
    trust = trusting(ANNA, BOB, threshold=2)
    record = key_set(trust, EVE)
    for text in (
        "",
        signed(Statement.KEYS, record, EVE),
        signed(Statement.KEYS, record, ANNA, EVE),
        signed(Statement.GENERATION, record, ANNA, BOB),
    ):
        with pytest.raises(Untrusted, match="good signatures by trusted keys where 2 are needed"):
            advance(trust, record, text, folder="app")


@pytest.mark.fault("K9")
def test_k9_key_sets_follow_one_another() -> None:
    """A trusted key signs a key set that leaves one out, one that follows another history, and `{}`.

    Each is refused.
    """
    start = trusting(ANNA)
    first = key_set(start, ANNA, BOB)
    after = advance(start, first, signed(Statement.KEYS, first, ANNA), folder="app")
    skipped = key_set(after, BOB, version=3)
    with pytest.raises(Untrusted, match="version 3 where 2 is due"):
        advance(after, skipped, signed(Statement.KEYS, skipped, ANNA), folder="app")
    elsewhere = key_set(after, BOB, parent=digest_of(b"another first key set"))
    with pytest.raises(Untrusted, match="key set 2 does not follow the one that is trusted here"):
        advance(after, elsewhere, signed(Statement.KEYS, elsewhere, ANNA), folder="app")
    with pytest.raises(ObjectCorrupt):
        advance(start, b"{}", signed(Statement.KEYS, b"{}", ANNA), folder="app")


def chain(*sets: tuple[tuple[Signer, ...], Signer]) -> tuple[dict[int, tuple[bytes, str]], list[Trust]]:
    """Key sets one after the other (keys, who signed), and what each leads to."""
    trust, records = trusting(ANNA), {}
    trusts = [trust]
    for keys, by in sets:
        record = key_set(trust, *keys)
        records[trust.version + 1] = record, signed(Statement.KEYS, record, by)
        trust = advance(trust, *records[trust.version + 1], folder="app")
        trusts.append(trust)
    return records, trusts


@pytest.mark.fault("K9")
def test_k9_all_key_sets_are_followed_at_once() -> None:
    """Hosts at each point of a chain of key sets get all of it, and then one whose last set is badly signed.

    They get to its end, or stop before the bad one and say why.
    """
    records, trusts = chain(((ANNA, BOB), ANNA), ((BOB,), ANNA), ((BOB, CARL), BOB))
    for trust in trusts:
        assert follow(trust, records, folder="app")[:2] == (trusts[-1], None)
    assert follow(trusts[0], {}, folder="app") == (trusts[0], None, ())
    assert [step.trust for step in follow(trusts[0], records, folder="app").steps] == trusts[1:]
    bad = {**records, 3: (records[3][0], records[2][1])}
    for trust in trusts[:3]:
        reached, problem, _ = follow(trust, bad, folder="app")
        assert reached == trusts[2]
        assert isinstance(problem, Untrusted)
    reached, problem, _ = follow(trusts[1], {2: (b"{}", signed(Statement.KEYS, b"{}", ANNA))}, folder="app")
    assert (reached, type(problem)) == (trusts[1], ObjectCorrupt)


@pytest.mark.fault("K9")
def test_k9_a_host_set_up_late_knows_only_the_present_keys() -> None:
    """A host whose configuration names only the newest keys gets the whole chain of key sets.

    It starts at the set that names exactly these; other sets, or a stranger's host, have no start there.
    """
    records, trusts = chain(((ANNA, BOB), ANNA), ((BOB,), ANNA))
    late = trusting(BOB)
    assert follow(late, records, folder="app") == (late, None, ())
    start = start_at(late, 2, records[2][0], "app")
    assert start == replace(trusts[2], anchor=late.anchor)
    longer, after = chain(((ANNA, BOB), ANNA), ((BOB,), ANNA), ((BOB, CARL), BOB))
    last = replace(after[3], anchor=late.anchor)
    assert follow(late, longer, folder="app") == (last, None, (Step(last, AT),))  # what was before it, drops nothing
    # what names other keys, another threshold, folder or version, or is nothing, is no start
    assert start_at(trusting(ANNA), 2, records[2][0], "app") is None
    assert start_at(trusting(ANNA, BOB, threshold=2), 1, records[1][0], "app") is None
    assert start_at(late, 2, records[2][0], "web") is None
    assert start_at(late, 1, records[2][0], "app") is None
    assert start_at(late, 1, b"", "app") is None
    # a stranger's folder: no start, and the reason is said
    reached, problem, _ = follow(trusting(EVE), longer, folder="app")
    assert (reached, type(problem)) == (trusting(EVE), Untrusted)


@pytest.mark.fault("K9")
def test_k9_a_forged_start_is_of_no_use() -> None:
    """Unsigned key sets that name a host's keys are planted, one of them with a successor by a stolen, revoked key.

    They are not gone on from: the chain from the beginning goes first.
    """
    longer, after = chain(((ANNA, BOB), ANNA), ((BOB,), ANNA), ((BOB, CARL), BOB))
    late = trusting(BOB)
    forged = encode_keys(KeySet("app", 9, (BOB.public,), 1, AT, digest_of(b"anything")))
    assert follow(late, {9: (forged, "")}, folder="app") == (late, None, ())
    assert follow(late, {**longer, 9: (forged, "")}, folder="app")[:2] == (replace(after[3], anchor=late.anchor), None)
    # Anna's key was stolen and revoked; the thief builds a side way for hosts that still name it
    records, trusts = chain(((BOB,), ANNA))
    fork = encode_keys(KeySet("app", 5, (ANNA.public,), 1, AT, digest_of(b"anything")))
    evil = encode_keys(KeySet("app", 6, tuple(sorted([ANNA.public, EVE.public])), 1, AT, digest_of(fork)))
    side = {**records, 5: (fork, ""), 6: (evil, signed(Statement.KEYS, evil, ANNA))}
    assert follow(trusting(ANNA), side, folder="app")[:2] == (trusts[1], None)


@pytest.mark.fault("K11")
def test_k11_what_was_remembered_goes_before_the_configuration() -> None:
    """A host starts again with a configuration that names a key revoked since, and a bucket with old key sets or none.

    The stored trust is what counts: what that key signs is refused.
    """
    configured = trusting(ANNA)
    records, trusts = chain(((ANNA, BOB), ANNA), ((BOB,), ANNA))
    stored = Trust.from_json(trusts[2].to_json())
    assert stored == trusts[2]
    trust = resume(stored, configured)
    assert trust == trusts[2]
    refused(trust, Seen(), an_offer(1, ONE, ANNA), "0 good signatures")
    # the bucket shows only older key sets, or none
    assert follow(trust, {1: records[1]}, folder="app") == (trust, None, ())
    assert follow(trust, {}, folder="app") == (trust, None, ())


@pytest.mark.fault("K11")
def test_k11_rollback_is_refused_after_a_restart_too() -> None:
    """What a host saw is written as text and read again; then an older move and a second record are shown.

    Nothing of it was lost, and both are refused.
    """
    seen = judge_offer(trusting(ANNA), Seen(), an_offer(8, THREE, ANNA, BOB)).seen
    restored = Seen.from_json(seen.to_json())
    assert restored == seen
    assert Seen.from_json(Seen().to_json()) == Seen()
    refused(trusting(ANNA), restored, an_offer(7, TWO, ANNA), "rollback or replay")
    refused(trusting(ANNA), restored, an_offer(9, a_generation(3, note="x"), ANNA), "two histories")


@pytest.mark.fault("K11")
def test_k11_a_changed_configuration_is_a_persons_word() -> None:
    """Between two starts the configuration names other keys, more keys, another threshold, or those trusted anyway.

    It goes before what was stored; in the last case the version that was reached stays known.
    """
    _, trusts = chain(((ANNA, BOB), ANNA), ((BOB,), ANNA))
    stored = trusts[2]
    assert resume(None, trusting(CARL)) == trusting(CARL)
    assert resume(stored, trusting(CARL)) == trusting(CARL)
    assert resume(stored, trusting(ANNA, CARL)) == trusting(ANNA, CARL)
    assert resume(trusts[1], trusting(ANNA, BOB, threshold=2)) == trusting(ANNA, BOB, threshold=2)
    caught_up = resume(stored, trusting(BOB))
    assert caught_up == replace(stored, anchor=trusting(BOB).anchor)
    assert resume(caught_up, trusting(BOB)) == caught_up
    assert resume(caught_up, trusting(ANNA)) == trusting(ANNA)
    assert trusting(ANNA, BOB).anchor != trusting(ANNA, BOB, threshold=2).anchor != trusting(ANNA).anchor


TRUST_TEXT = replace(trusting(ANNA, BOB), version=3, digest=digest_of(b"x")).to_json()
SEEN_TEXT = Seen(
    7, digest_of(b"m"), 2, digest_of(b"r"), {ANNA.public: 6}, (BOB.public,), "2026-11-22T00:00:00Z", AT
).to_json()
OLD_SEEN = {
    "count": 7,
    "move": digest_of(b"m"),
    "highest": 2,
    "record": digest_of(b"r"),
    "moved_by": [ANNA.public],
    "signed_by": [BOB.public],
}
"""As versions before wrote it."""
DAMAGED: dict[str, tuple[Any, str]] = {
    "trust: nothing": (Trust, ""),
    "trust: cut off": (Trust, TRUST_TEXT[:-1]),
    "trust: a list": (Trust, "[]"),
    "trust: lists, one inside the other": (Trust, "[" * 100_000),
    "trust: a field less": (Trust, TRUST_TEXT.replace('"version": 3, ', "")),
    "trust: a field more": (Trust, TRUST_TEXT.replace("{", '{"x": 1, ')),
    "trust: keys that are none": (Trust, TRUST_TEXT.replace(ANNA.public, "U")),
    "trust: keys that are numbers": (Trust, TRUST_TEXT.replace(f'"{ANNA.public}"', "1")),
    "trust: no list of keys": (Trust, json.dumps({**json.loads(TRUST_TEXT), "keys": ANNA.public})),
    "trust: no keys": (Trust, json.dumps({**json.loads(TRUST_TEXT), "keys": []})),
    "trust: version 0 with a digest": (Trust, TRUST_TEXT.replace('"version": 3', '"version": 0')),
    "trust: a version that is a truth": (Trust, TRUST_TEXT.replace('"version": 3', '"version": true')),
    "trust: a negative version": (Trust, TRUST_TEXT.replace('"version": 3', '"version": -3')),
    "trust: a version without digest": (Trust, TRUST_TEXT.replace(digest_of(b"x"), "")),
    "trust: a digest that is none": (Trust, TRUST_TEXT.replace(digest_of(b"x"), "x")),
    "trust: an anchor that is none": (Trust, TRUST_TEXT.replace(trusting(ANNA, BOB).anchor, "x")),
    "trust: an anchor that is a number": (Trust, TRUST_TEXT.replace(f'"{trusting(ANNA, BOB).anchor}"', "1")),
    "seen: nothing": (Seen, ""),
    "seen: null": (Seen, "null"),
    "seen: cut off": (Seen, SEEN_TEXT[:-1]),
    "seen: a field less": (Seen, SEEN_TEXT.replace('"count": 7, ', "")),
    "seen: a count as text": (Seen, SEEN_TEXT.replace("7", '"7"', 1)),
    "seen: a count of 1e3": (Seen, SEEN_TEXT.replace("7", "1e3", 1)),
    "seen: a count without its move": (Seen, SEEN_TEXT.replace(digest_of(b"m"), "")),
    "seen: a move without its count": (Seen, SEEN_TEXT.replace('"count": 7', '"count": 0')),
    "seen: a number without its record": (Seen, SEEN_TEXT.replace(digest_of(b"r"), "")),
    "seen: a record without its number": (Seen, SEEN_TEXT.replace('"highest": 2', '"highest": 0')),
    "seen: who signed is no list": (Seen, json.dumps({**json.loads(SEEN_TEXT), "signed_by": ANNA.public})),
    "seen: who moved is a list": (Seen, json.dumps({**json.loads(SEEN_TEXT), "moved": [ANNA.public]})),
    "seen: a key's count is a text": (Seen, json.dumps({**json.loads(SEEN_TEXT), "moved": {ANNA.public: "6"}})),
    "seen: a key's count is 0": (Seen, json.dumps({**json.loads(SEEN_TEXT), "moved": {ANNA.public: 0}})),
    "seen: a key's count above all": (Seen, json.dumps({**json.loads(SEEN_TEXT), "moved": {ANNA.public: 8}})),
    "seen: nobody vouches, and it is not doubted": (Seen, json.dumps({**json.loads(SEEN_TEXT), "doubted": ""})),
    "seen: doubted, and vouched for": (Seen, json.dumps({**json.loads(SEEN_TEXT), "moved": {ANNA.public: 7}})),
    "seen: an end that is no time": (Seen, json.dumps({**json.loads(SEEN_TEXT), "expires": "tomorrow"})),
    "seen: doubted since no time": (Seen, json.dumps({**json.loads(SEEN_TEXT), "doubted": "1"})),
    "seen, of before: a field more": (Seen, json.dumps({**OLD_SEEN, "moved": {}})),
    "seen, of before: a field less": (Seen, json.dumps({k: v for k, v in OLD_SEEN.items() if k != "moved_by"})),
    "seen, of before: who moved is no list": (Seen, json.dumps({**OLD_SEEN, "moved_by": 1})),
}


@pytest.mark.fault("K11")
@pytest.mark.parametrize(("kind", "text"), DAMAGED.values(), ids=DAMAGED)
def test_k11_damaged_memory_is_an_error_and_no_new_beginning(kind: Any, text: str) -> None:
    """Stored trust or memory is cut off, has fields less, more or of other types, or contradicts itself.

    Reading it is an error: who can damage a note must not make a host forget.
    """
    with pytest.raises(ValueError):
        kind.from_json(text)


def test_the_damaged_notes_are_damaged_for_one_reason_only() -> None:
    """What they are made of is read."""
    assert Trust.from_json(TRUST_TEXT).version == 3
    seen = Seen.from_json(SEEN_TEXT)
    assert (seen.count, seen.moved, seen.doubted) == (7, {ANNA.public: 6}, AT)
    assert Seen.from_json(json.dumps(OLD_SEEN)).count == 7


@pytest.mark.fault("K2", "K11")
def test_k11_what_a_version_before_remembered_is_vouched_for_by_all_it_trusted() -> None:
    """A memory as older versions wrote it, without a count for each key, is read where two keys are trusted.

    Both count as having vouched for all of it, so nothing leads back when one of them goes.
    """
    keys = sorted([ANNA.public, BOB.public])
    seen = Seen.from_json(json.dumps(OLD_SEEN), keys)
    assert seen == Seen(7, digest_of(b"m"), 2, digest_of(b"r"), dict.fromkeys(keys, 7), tuple(keys))
    assert recover(seen, trusting(BOB), EVER).floor == 7
    nothing = {**OLD_SEEN, "count": 0, "move": "", "highest": 0, "record": "", "moved_by": [], "signed_by": []}
    assert Seen.from_json(json.dumps(nothing), keys) == Seen()


def test_judging_by_parts_says_the_same() -> None:
    """The parts of judge_offer, as others use them."""
    move, digest = a_move(7, TWO), digest_of(encode_move(a_move(7, TWO)))
    seen = Seen(7, digest, 2, digest_of(TWO))
    judge_move(Seen(), move, digest)
    judge_move(seen, move, digest)
    judge_generation(seen, 2, digest_of(TWO))
    judge_generation(seen, 1, digest_of(ONE))
    with pytest.raises(Untrusted, match="two histories"):
        judge_generation(seen, 2, digest_of(ONE))
    assert keys_name(7) == "keys/0000000007"


# -- the bytes of both records ----------------------------------------------------------------------------------------

MOVES = {
    "the first move": Move("app", "head", 1, 1, digest_of(ONE), "2026-11-21T02:02:45Z"),
    "everything set": Move(
        "app",
        "stable",
        MAX_COUNT,
        nodes.MAX_GENERATION,
        digest_of(TWO),
        AT,
        who="anna@web-1",
        why='läuft\n\t"\\\x01\x7f\u2028\U0001f642',
        expires="2027-01-01T00:00:00.000000001Z",
    ),
    "the longest texts": Move("f" * 256, "c" * 256, 2, 3, digest_of(THREE), AT, who="é" * WHO_MAX, why="\1" * WHY_MAX),
}
BOTH = tuple(sorted((ANNA.public, BOB.public)))
KEY_SETS = {
    "the first key set": KeySet("app", 1, (ANNA.public,), 1, AT),
    "two of two": KeySet("app", 2, BOTH, 2, AT, digest_of(b"the first"), "Bob joins"),
    "as many as there may be": KeySet(
        "app",
        9_999_999_999,
        tuple(sorted(signer(n).public for n in range(1, 17))),
        16,
        AT,
        digest_of(b"x"),
        "\1" * WHY_MAX,
    ),
}
GOOD_MOVE = encode_move(MOVES["the first move"])
GOOD_KEYS = encode_keys(KEY_SETS["two of two"])


def move_rows() -> list[dict[str, Any]]:
    """What is accepted, with the statement's signatures by two keys, then what is refused."""
    rows: list[dict[str, Any]] = []
    for name, move in MOVES.items():
        data = encode_move(move)
        rows.append(
            {
                "name": name,
                "digest": digest_of(data),
                "bytes": data.decode(),
                "signatures": signed(Statement.MOVE, data, ANNA, BOB),
            }
        )
    return rows + [{"refused": why, "error": error, "hex": data.hex()} for why, (data, error) in BAD_MOVES.items()]


def key_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, keys in KEY_SETS.items():
        data = encode_keys(keys)
        rows.append(
            {
                "name": name,
                "digest": digest_of(data),
                "bytes": data.decode(),
                "signatures": signed(Statement.KEYS, data, ANNA, BOB),
            }
        )
    return rows + [{"refused": why, "error": error, "hex": data.hex()} for why, (data, error) in BAD_KEYS.items()]


def spoiled(good: bytes, old: str, new: str, error: str = "ObjectCorrupt") -> tuple[bytes, str]:
    assert good.count(old.encode()) == 1, old
    return good.replace(old.encode(), new.encode("utf-8", "surrogatepass")), error


def m(old: str, new: str, error: str = "ObjectCorrupt") -> tuple[bytes, str]:
    return spoiled(GOOD_MOVE, old, new, error)


def k(old: str, new: str, error: str = "ObjectCorrupt") -> tuple[bytes, str]:
    return spoiled(GOOD_KEYS, old, new, error)


EVERY: dict[str, Any] = {
    "nothing": lambda good: b"",
    "no JSON": lambda good: good[:-1],
    "a list": lambda good: b"[]",
    "an empty object": lambda good: b"{}",
    "a blank": lambda good: good.replace(b",", b", ", 1),
    "a line feed": lambda good: good + b"\n",
    "a byte order mark": lambda good: b"\xef\xbb\xbf" + good,
    "UTF-16": lambda good: good.decode().encode("utf-16-le"),
    "not UTF-8": lambda good: good.replace(b'"why":"', b'"why":"\xff'),
    "a doubled key": lambda good: good.replace(b'"folder":"app"', b'"folder":"web","folder":"app"'),
    "keys in another order": lambda good: b'{"folder":"app",' + good[1:].replace(b'"folder":"app",', b"", 1),
    "an escape where none is needed": lambda good: good.replace(b'"app"', b'"\\u0061pp"'),
    "an escaped solidus": lambda good: good.replace(b'"why":"', b'"why":"\\/'),
    "an escape in capitals": lambda good: good.replace(b'"why":"', b'"why":"\\u001F'),
    "a lone surrogate, escaped": lambda good: good.replace(b'"why":"', b'"why":"\\ud800'),
    "a lone surrogate, encoded": lambda good: good.replace(b'"why":"', b'"why":"\xed\xa0\x80'),
    "a pair of surrogates, escaped": lambda good: good.replace(b'"why":"', b'"why":"\\ud83d\\ude42'),
    "a raw control character": lambda good: good.replace(b'"why":"', b'"why":"\x01'),
    "an unknown field": lambda good: good.replace(b"}", b',"x":1}'),
    "a field less": lambda good: good.replace(b'"folder":"app",', b""),
    "a folder that is no text": lambda good: good.replace(b'"app"', b"1"),
    "no folder": lambda good: good.replace(b'"app"', b'""'),
    "a folder of 257 characters": lambda good: good.replace(b"app", b"a" * 257),
    "a reason that is no text": lambda good: good.replace(b'"why":"', b'"why":null,"":"'),
    "a reason of more than 1,024 characters": lambda good: good.replace(b'"why":"', b'"why":"' + b"w" * 1025),
    "no time": lambda good: good.replace(b'"at":"2026', b'"at":"'),
    "a month 13": lambda good: good.replace(b"2026-11-21", b"2026-13-21"),
    "a day that does not exist": lambda good: good.replace(b"2026-11-21", b"2026-02-29"),
    "the year 0": lambda good: good.replace(b"2026-11-21", b"0000-11-21"),
    "a leap second": lambda good: good.replace(b":02:45", b":02:60"),
    "digits of another script": lambda good: good.replace(b"2026-11-21", "٢٠٢٦-11-21".encode()),
    "format 0": lambda good: good.replace(b'"format":1', b'"format":0'),
    "a negative format": lambda good: good.replace(b'"format":1', b'"format":-1'),
    "a format as 1.0": lambda good: good.replace(b'"format":1', b'"format":1.0'),
    "a format as text": lambda good: good.replace(b'"format":1', b'"format":"1"'),
    "a format that is a truth": lambda good: good.replace(b'"format":1', b'"format":true'),
    "a format of null": lambda good: good.replace(b'"format":1', b'"format":null'),
}
FORMAT_2: dict[str, Any] = {
    "format 2": lambda good: good.replace(b'"format":1', b'"format":2'),
    "format 2, and nothing else that is known": lambda good: b'{"format":2,"x":[1.5]}',
}


def every(good: bytes) -> dict[str, tuple[bytes, str]]:
    rows = {why: (make(good), "ObjectCorrupt") for why, make in EVERY.items()}
    rows |= {why: (make(good), "FormatTooNew") for why, make in FORMAT_2.items()}
    assert all(data != good for data, _ in rows.values())
    return rows


BAD_MOVES: dict[str, tuple[bytes, str]] = every(GOOD_MOVE) | {
    "a count of 0": m('"count":1', '"count":0'),
    "a negative count": m('"count":1', '"count":-1'),
    "a count as 1.0": m('"count":1', '"count":1.0'),
    "a count as 1e0": m('"count":1', '"count":1e0'),
    "a count with a leading zero": m('"count":1', '"count":01'),
    "a count with a sign": m('"count":1', '"count":+1'),
    "a count as text": m('"count":1', '"count":"1"'),
    "a count that is a truth": m('"count":1', '"count":true'),
    "a count beyond 2^53 - 1": m('"count":1', '"count":9007199254740992'),
    "a count of 5,000 digits": m('"count":1', '"count":' + "9" * 5000),
    "not a number": m('"count":1', '"count":NaN'),
    "infinity": m('"count":1', '"count":1e999'),
    "generation 0": m('"number":1', '"number":0'),
    "a generation of eleven digits": m('"number":1', '"number":10000000000'),
    "no channel": m('"channel":"head"', '"channel":""'),
    "a channel of 257 characters": m('"channel":"head"', '"channel":"' + "c" * 257 + '"'),
    "no record": m(digest_of(ONE), ""),
    "a digest in capitals": m(digest_of(ONE), digest_of(ONE).upper()),
    "a digest of 63 digits": m(digest_of(ONE), digest_of(ONE)[1:]),
    "a digest of 65 digits": m(digest_of(ONE), digest_of(ONE) + "0"),
    "a digest and a line feed": m(digest_of(ONE), digest_of(ONE) + "\\n"),
    "an end that is no time": m('"expires":""', '"expires":"never"'),
    "an end in a zone": m('"expires":""', '"expires":"2026-11-22T00:00:00+00:00"'),
    "an end with a line feed": m('"expires":""', '"expires":"2026-11-22T00:00:00Z\\n"'),
    "a mover of 257 characters": m('"who":""', '"who":"' + "w" * 257 + '"'),
    "a mover that is a list": m('"who":""', '"who":[]'),
    "lists, one inside the other": m('"who":""', '"who":' + "[" * 7000 + "]" * 7000),
    "more than 16,384 bytes": (GOOD_MOVE + b" " * RECORD_MAX, "ObjectCorrupt"),
    "a key set": (GOOD_KEYS, "ObjectCorrupt"),
}
BAD_KEYS: dict[str, tuple[bytes, str]] = every(GOOD_KEYS) | {
    "no keys": k(json.dumps(BOTH, separators=(",", ":")), "[]"),
    "seventeen keys": k(
        json.dumps(BOTH, separators=(",", ":")),
        json.dumps(sorted(signer(n).public for n in range(1, 18)), separators=(",", ":")),
    ),
    "keys out of order": k(json.dumps(BOTH, separators=(",", ":")), json.dumps(BOTH[::-1], separators=(",", ":"))),
    "a key twice": k(BOTH[1], BOTH[0]),
    "an account's key": k(BOTH[0], "A" + BOTH[0][1:]),
    "a key with a wrong checksum": k(BOTH[0], BOTH[0][:-1] + ("A" if BOTH[0][-1] != "A" else "B")),
    "a key that is a number": k(f'"{BOTH[0]}"', "1"),
    "keys that are a number": k(json.dumps(BOTH, separators=(",", ":")), "2"),
    "keys that are no list": k(json.dumps(BOTH, separators=(",", ":")), f'"{BOTH[0]}"'),
    "a threshold of 0": k('"threshold":2', '"threshold":0'),
    "a threshold out of reach": k('"threshold":2', '"threshold":3'),
    "a negative threshold": k('"threshold":2', '"threshold":-1'),
    "a threshold that is a truth": k('"threshold":2', '"threshold":true'),
    "a threshold as 2.0": k('"threshold":2', '"threshold":2.0'),
    "version 0": k('"version":2', '"version":0'),
    "a version of eleven digits": k('"version":2', '"version":10000000000'),
    "no parent": k(digest_of(b"the first"), ""),
    "a parent that is no digest": k(digest_of(b"the first"), "x"),
    "a parent of the first": k('"version":2', '"version":1'),
    "a move": (GOOD_MOVE, "ObjectCorrupt"),
}


def stored(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text())


def accepted(name: str) -> list[dict[str, Any]]:
    return [row for row in stored(name) if "name" in row]


@pytest.mark.parametrize("row", accepted("moves"), ids=lambda row: row["name"])
def test_a_move_has_the_bytes_of_its_vector(row: dict[str, Any]) -> None:
    """Both ways, and both keys have signed it."""
    data = row["bytes"].encode()
    assert decode_move(data) == MOVES[row["name"]]
    assert encode_move(MOVES[row["name"]]) == data
    assert digest_of(data) == row["digest"]
    trust = trusting(ANNA, BOB, threshold=2)
    assert check_signed(trust, Statement.MOVE, data, row["signatures"]) == trust.keys


@pytest.mark.parametrize("row", accepted("keys"), ids=lambda row: row["name"])
def test_a_key_set_has_the_bytes_of_its_vector(row: dict[str, Any]) -> None:
    """Both ways, and both keys have signed it."""
    data = row["bytes"].encode()
    assert decode_keys(data) == KEY_SETS[row["name"]]
    assert encode_keys(KEY_SETS[row["name"]]) == data
    assert digest_of(data) == row["digest"]
    trust = trusting(ANNA, BOB, threshold=2)
    assert check_signed(trust, Statement.KEYS, data, row["signatures"]) == trust.keys


def test_the_vectors_are_complete() -> None:
    """The files hold exactly the tables of this module, but the few rows that are refused for their size alone."""
    assert stored("moves") == shown(move_rows())
    assert stored("keys") == shown(key_rows())


@pytest.mark.fault("K10")
@pytest.mark.parametrize(("data", "error"), BAD_MOVES.values(), ids=BAD_MOVES)
def test_k10_a_move_has_one_form(data: bytes, error: str) -> None:
    """A move's JSON has doubled keys, blanks, other numbers, escapes, times or another order, or too much of anything.

    Each is refused: this version would not have written it so.
    """
    with pytest.raises(getattr(errors, error)) as caught:
        decode_move(data)
    assert type(caught.value).__name__ == error
    assert len(caught.value.message) < 200


@pytest.mark.fault("K10")
@pytest.mark.parametrize(("data", "error"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_k10_a_key_set_has_one_form(data: bytes, error: str) -> None:
    """A key set's JSON has doubled or unsorted keys, blanks, other numbers, escapes, or thresholds out of reach.

    Each is refused: this version would not have written it so.
    """
    with pytest.raises(getattr(errors, error)) as caught:
        decode_keys(data)
    assert type(caught.value).__name__ == error
    assert len(caught.value.message) < 200


@pytest.mark.fault("K10")
@pytest.mark.parametrize("decode", [decode_move, decode_keys])
def test_k10_a_long_record_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch, decode: Any) -> None:
    """16,385 opening brackets are read as a move and as a key set, and one less, which a parser gets to see.

    They are refused for their length, and not one of them is parsed; one less is refused as no JSON.
    """
    parsed: list[int] = []

    def loads(text: str) -> Any:
        parsed.append(len(text))
        return json.loads(text)

    monkeypatch.setattr("syncd.trust.json", SimpleNamespace(loads=loads))
    with pytest.raises(ObjectCorrupt, match="of 16385 bytes"):
        decode(b"[" * (RECORD_MAX + 1))
    with pytest.raises(ObjectCorrupt, match="not JSON"):
        decode(b"[" * RECORD_MAX)
    assert parsed == [RECORD_MAX]


def test_a_writer_writes_nothing_that_readers_refuse() -> None:
    """A mistake of ours is seen before anybody signs it."""
    move, keys = MOVES["the first move"], KEY_SETS["two of two"]
    for bad in (
        replace(move, folder=""),
        replace(move, channel="c" * 257),
        replace(move, count=0),
        replace(move, number=0),
        replace(move, record=""),
        replace(move, at=""),
        replace(move, at="2026-11-21T02:02:45.600984+00:00"),
        replace(move, who="w" * 257),
        replace(move, why="\ud800"),
        replace(move, expires="never"),
    ):
        with pytest.raises(ValueError):
            encode_move(bad)
    for worse in (
        replace(keys, keys=()),
        replace(keys, keys=keys.keys[::-1]),
        replace(keys, keys=keys.keys + keys.keys),
        replace(keys, threshold=0),
        replace(keys, threshold=3),
        replace(keys, parent=""),
        replace(keys, version=1),
        replace(keys, why="w" * 1025),
    ):
        with pytest.raises(ValueError):
            encode_keys(worse)


publics = st.sampled_from([signer(number).public for number in range(1, 17)])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
digests = st.binary(max_size=4).map(digest_of)
times = st.datetimes().map(lambda when: when.isoformat() + "Z")
moves = st.builds(
    Move,
    folder=st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True),
    channel=st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True),
    count=st.integers(1, MAX_COUNT),
    number=st.integers(1, nodes.MAX_GENERATION),
    record=digests,
    at=times,
    who=texts,
    why=texts,
    expires=st.just("") | times,
)


@st.composite
def key_sets(draw: st.DrawFn) -> KeySet:
    keys = tuple(sorted(draw(st.sets(publics, min_size=1))))
    version = draw(st.integers(1, 9_999_999_999))
    parent = draw(digests) if version > 1 else ""
    return KeySet("app", version, keys, draw(st.integers(1, len(keys))), draw(times), parent, draw(texts))


@given(moves)
def test_a_move_survives_its_bytes(move: Move) -> None:
    assert decode_move(encode_move(move)) == move


@given(key_sets())
def test_a_key_set_survives_its_bytes(keys: KeySet) -> None:
    assert decode_keys(encode_keys(keys)) == keys


@given(st.text(max_size=30) | times)
def test_times_are_read_as_those_of_generation_records(text: str) -> None:
    """One rule for all records."""
    assert (seconds_of(text) is not None) is nodes._is_time(text)


@given(st.datetimes())
def test_a_time_is_the_seconds_it_says(when: Any) -> None:
    seconds = seconds_of(when.isoformat() + "Z")
    assert seconds == pytest.approx(when.replace(tzinfo=UTC).timestamp(), abs=1e-4)


@st.composite
def mutated(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """Valid bytes with some bytes changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from(valid)))
    tokens = [b"", b"\0", b"\xff", b"0", b"1e3", b"NaN", b"{}", b"[[", b'"', b"\\u0000", b"\\ud800", b"null", b","]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.sampled_from(tokens) | st.binary(max_size=6))
    return bytes(data)


@pytest.mark.fault("K10")
@settings(max_examples=300)
@given(mutated([encode_move(MOVES["everything set"]), GOOD_MOVE]) | st.binary(max_size=300))
def test_k10_whatever_a_move_is_read_from_it_has_one_form(data: bytes) -> None:
    """Bytes of valid moves are changed, cut out and put in, or all are made up.

    They are refused, or written again exactly so; nothing else escapes.
    """
    try:
        move = decode_move(data)
    except (ObjectCorrupt, FormatTooNew):
        return
    assert encode_move(move) == data


@pytest.mark.fault("K10")
@settings(max_examples=300)
@given(mutated([encode_keys(KEY_SETS["the first key set"]), GOOD_KEYS]) | st.binary(max_size=300))
def test_k10_whatever_a_key_set_is_read_from_it_has_one_form(data: bytes) -> None:
    """Bytes of valid key sets are changed, cut out and put in, or all are made up.

    They are refused, or written again exactly so; nothing else escapes.
    """
    try:
        keys = decode_keys(data)
    except (ObjectCorrupt, FormatTooNew):
        return
    assert encode_keys(keys) == data


@pytest.mark.fault("K1 K10")
@settings(max_examples=300)
@given(st.data())
def test_any_offer_is_accepted_as_it_was_signed_or_refused(data: st.DataObject) -> None:
    """The number, record, move or signatures of an honest, signed offer are mutated or made up, one in each example.

    Only the honest offer is followed, and nothing but our own errors escapes.
    """
    good = an_offer(7, TWO, ANNA)
    field = data.draw(st.sampled_from(Offer._fields[2:]))
    value = getattr(good, field)
    if isinstance(value, int):
        other: Any = data.draw(st.integers(0, 5))
    elif isinstance(value, bytes):
        other = data.draw(mutated([value, ONE, THREE]) | st.binary(max_size=50))
    else:
        other = data.draw(
            mutated([value.encode()]).map(lambda raw: raw.decode("utf-8", "surrogateescape")) | st.text(max_size=50)
        )
    offer = good._replace(**{field: other})
    try:
        accepted = judge_offer(trusting(ANNA), Seen(), offer)
    except SyncdError:
        assert offer != good
        return
    assert offer == good
    assert accepted.move == a_move(7, TWO)


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if len(row.get("hex", "")) < 5_000]


def write_vectors() -> None:
    """Write the vectors anew; the format is permanent, so only additions are right."""
    for name, rows in {"moves": move_rows(), "keys": key_rows()}.items():
        lines = ",\n".join(json.dumps(row, ensure_ascii=True) for row in shown(rows))
        (VECTORS / f"{name}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    write_vectors()
