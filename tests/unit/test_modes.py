"""Which permissions things get in a mirror, a sentence per row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.model import Entry, Kind
from syncd.modes import ModePolicy, parse_modes

MODES = st.integers(0, 0o7777)


def file(mode: int) -> Entry:
    return Entry(Kind.FILE, mode, 5, 3, "aa")


def folder(mode: int) -> Entry:
    return Entry(Kind.DIR, mode, 5)


@pytest.mark.parametrize(
    ("policy", "entry", "mode"),
    [
        ({}, file(0o4755), 0o4755),  # preserve is exact, set-id bits included
        ({}, folder(0o1777), 0o1777),
        ({"files": 0o644}, file(0o600), 0o644),  # a plain file gets what is configured
        ({"files": 0o644}, file(0o755), 0o755),  # a program stays one: x where r
        ({"files": 0o640}, file(0o755), 0o750),  # ... and only for those who may read it
        ({"files": 0o600}, file(0o010), 0o700),  # any x bit makes a program
        ({"files": 0o755}, file(0o644), 0o755),  # everything executable, if that is said
        ({"files": 0o744}, file(0o755), 0o744),  # ... and exactly so
        ({"files": 0o644}, folder(0o700), 0o700),  # a mode for files says nothing of directories
        ({"dirs": 0o755}, folder(0o700), 0o755),
        ({"dirs": 0o750}, file(0o666), 0o666),  # nor the reverse
        ({"files": 0o644, "special": "drop"}, file(0o4711), 0o755),
        ({"files": 0o644, "special": "keep"}, file(0o4711), 0o4755),
        ({"special": "drop"}, file(0o6755), 0o755),
        ({"special": "drop"}, folder(0o3777), 0o777),
        ({"dirs": 0o2775, "special": "drop"}, folder(0o755), 0o2775),  # the administrator's own bits stay
        ({"dirs": 0o2775, "special": "keep"}, folder(0o1700), 0o3775),
        ({"read_only": True}, file(0o4766), 0o4544),
        ({"read_only": True}, folder(0o777), 0o555),
        ({"files": 0o664, "dirs": 0o775, "read_only": True}, file(0o700), 0o555),
    ],
)
@pytest.mark.fault("M1")
def test_each_kind_gets_its_mode(policy: dict[str, object], entry: Entry, mode: int) -> None:
    """Files and directories with set-id, sticky, tight and wide modes go through each policy of modes.

    They get the mode of their row in the table, and all but the mode stays.
    """
    assert ModePolicy(**policy).apply(entry) == entry._replace(mode=mode)


@pytest.mark.parametrize("policy", [ModePolicy(0o600, 0o700, "drop", read_only=True), ModePolicy()])
def test_symlinks_have_no_mode_and_unchanged_entries_are_the_same_object(policy: ModePolicy) -> None:
    link = Entry(Kind.SYMLINK, 0o777, 5, target="x")
    assert policy.apply(link) is link
    kept = policy.apply(file(0o600))
    assert policy.apply(kept) is kept


@given(MODES, st.builds(ModePolicy, st.none() | MODES, st.none() | MODES, st.sampled_from(["drop", "keep"])), MODES)
def test_applying_twice_changes_nothing_more(mode: int, policy: ModePolicy, other: int) -> None:
    """What a mirror has is what it would be given: otherwise every round would repair it again."""
    for entry in (file(mode), folder(other)):
        once = policy.apply(entry)
        assert policy.apply(once) == once
        assert 0 <= once.mode <= 0o7777


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        ("preserve", ModePolicy()),
        ({}, ModePolicy()),
        ({"files": "0644", "dirs": "0755"}, ModePolicy(0o644, 0o755, "drop")),
        ({"files": "644"}, ModePolicy(0o644, None, "drop")),
        ({"dirs": "2775", "special": "keep"}, ModePolicy(None, 0o2775, "keep")),
        ({"special": "drop"}, ModePolicy(None, None, "drop")),
    ],
)
def test_the_setting_is_read(value: object, policy: ModePolicy) -> None:
    """A table that sets a mode drops published set-id bits, unless it says that it keeps them."""
    assert parse_modes(value) == policy


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("0644", "must be"),
        (None, "must be"),
        ([], "must be"),
        ({"file": "0644"}, "unknown key 'file'"),
        ({"files": 644}, "octal text"),  # decimal, in TOML
        ({"files": True}, "octal text"),
        ({"files": "0888"}, "octal text"),
        ({"files": "00644"}, "octal text"),
        ({"files": "0644\n"}, "octal text"),
        ({"files": "-644"}, "octal text"),
        ({"files": ""}, "octal text"),
        ({"files": "4755"}, "no set-id"),
        ({"files": "0044"}, "keep the owner from reading"),
        ({"dirs": "0644"}, "keep the owner out"),
        ({"dirs": "4755"}, "set-user-id"),
        ({"special": "allow"}, "special must be"),
        ({"special": ["drop"]}, "special must be"),
    ],
)
def test_what_cannot_be_meant_is_refused(value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_modes(value)


def test_policies_are_told_apart_by_their_fingerprints() -> None:
    """A mirror whose policy changed is looked at anew."""
    policies = [
        ModePolicy(),
        ModePolicy(0o644),
        ModePolicy(None, 0o644),
        ModePolicy(0o644, special="drop"),
        ModePolicy(read_only=True),
    ]
    assert len({policy.fingerprint for policy in policies}) == len(policies)
    assert ModePolicy().fingerprint == ""
