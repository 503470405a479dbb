"""Streams and refusals of the JetStream API, in our words."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.errors import (
    BucketNotFound,
    BucketSealed,
    StoreFull,
    StoreRejected,
    SyncdError,
    Unavailable,
    WriteConflict,
)
from syncd.store.api import (
    ApiError,
    Busy,
    NoJetStream,
    api_error,
    header_int,
    missing_flags,
    new_stream,
    read_json,
    read_state,
)
from syncd.store.base import BucketSpec
from syncd.store.hints import consumer_seq

GOOD = new_stream("B", BucketSpec())


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, 10077, StoreFull),
        (503, 10047, StoreFull),
        (503, 10023, StoreFull),
        (400, 10071, WriteConflict),
        (400, 10164, Busy),
        (400, 10109, BucketSealed),
        (404, 10059, BucketNotFound),
        (503, 10039, NoJetStream),
        (503, 10076, NoJetStream),
        (503, 10008, Busy),
        (429, 10210, Busy),
        (409, 10158, Busy),
        (400, 10174, ApiError),
        (400, 1, ApiError),
    ],
)
def test_a_refusal_has_a_word_by_its_code(status: int, code: int, kind: type[SyncdError]) -> None:
    """The code decides, whatever the text says."""
    error = api_error({"code": status, "err_code": code, "description": "any text"}, "publish")
    assert type(error) is kind
    assert error.transient is (kind not in {ApiError, BucketSealed})


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(
        lambda value: json.dumps({"error": value}).encode()
    )
)
def test_any_answer_is_read_or_refused(payload: bytes) -> None:
    """Nothing but our errors comes out of an answer, whoever sent it."""
    with contextlib.suppress(SyncdError):
        assert isinstance(read_json(payload, "x"), dict)


def test_an_existing_bucket_of_ours_lacks_nothing() -> None:
    """Adopting it asks for no change."""
    assert missing_flags("B", GOOD) == {}


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"allow_atomic": False, "allow_msg_ttl": None}, {"allow_atomic", "allow_msg_ttl"}),
        ({"republish": None}, {"republish"}),
        ({"republish": {"src": ">", "dest": "theirs.>"}}, set()),
        ({"allow_rollup_hdrs": False, "deny_purge": True}, set()),
        ({"sealed": True, "allow_direct": False}, set()),
        ({"mirror": {"name": "OBJ_A"}, "subjects": None, "republish": None}, set()),
    ],
)
def test_only_what_changes_nothing_else_is_added(changes: dict[str, Any], lacking: set[str]) -> None:
    """What somebody set up otherwise on purpose stays."""
    assert set(missing_flags("B", GOOD | changes)) == lacking


def test_a_stream_of_another_kind_is_refused() -> None:
    """Its name alone makes no bucket."""
    with pytest.raises(StoreRejected):
        missing_flags("B", {"name": "OBJ_B", "subjects": ["orders.>"]})


def test_a_specification_becomes_a_stream() -> None:
    """Sizes in bytes, times in nanoseconds, nothing where nothing is said."""
    spec = BucketSpec("d", "memory", 3, 1000, 60.5, "c", ("t",), compression=True, metadata={"k": "v"})
    stream = new_stream("B", spec)
    assert (stream["max_bytes"], stream["max_age"], stream["compression"]) == (1000, 60_500_000_000, "s2")
    assert stream["duplicate_window"] <= stream["max_age"]
    assert stream["placement"] == {"cluster": "c", "tags": ["t"]}
    assert stream["metadata"]["k"] == "v"
    assert (GOOD["max_bytes"], GOOD["max_age"], "placement" in GOOD) == (-1, 0, False)


def test_odd_values_in_a_state_are_nothing() -> None:
    """An answer through an import mapping may come from anybody."""
    info = {"config": {"max_bytes": None, "metadata": 5, "republish": "x"}, "state": {"last_seq": "9", "bytes": True}}
    state = read_state("B", info)
    assert (state.max_bytes, state.metadata, state.republished, state.last_seq, state.size) == (None, {}, False, 0, 0)


@pytest.mark.parametrize(
    ("told", "now_ns"),
    [
        ({"ts": "2026-11-21T16:10:59.5Z"}, 1_795_277_459_500_000_000),
        ({}, 0),
        ({"ts": "soon"}, 0),
        ({"ts": 17}, 0),
    ],
)
def test_a_server_that_does_not_tell_its_time(told: dict[str, object], now_ns: int) -> None:
    """Servers before 2.10 say nothing."""
    assert read_state("B", told).now_ns == now_ns


@pytest.mark.parametrize(
    ("text", "value"),
    [("17", 17), ("", 0), ("-1", 0), ("x", 0), ("٣", 0), ("9" * 25, 0)],
)
def test_a_header_is_a_number_or_nothing(text: str, value: int) -> None:
    """Notifications can be forged."""
    assert header_int({"Nats-Sequence": text}, "Nats-Sequence") == value


@pytest.mark.parametrize(
    ("reply", "seq"),
    [
        ("$JS.ACK.OBJ_B.c.1.42.7.1700000000000000000.0", 42),
        ("$JS.ACK.hub.ACCHASH.OBJ_B.c.1.42.7.1700000000000000000.0.token", 42),
        ("", 0),
        ("$JS.ACK.x", 0),
        ("$JS.ACK.OBJ_B.c.1.x.7.1.0", 0),
    ],
)
def test_a_consumers_reply_subject_tells_the_sequence(reply: str, seq: int) -> None:
    """With and without a JetStream domain."""
    assert consumer_seq(reply) == seq


def test_an_unreadable_answer_is_no_answer() -> None:
    """It may be read next time."""
    with pytest.raises(Unavailable):
        read_json(b"[]", "x")
