"""How a mirror stands with its generations: each condition of :mod:`syncd.standing` by itself, and over restarts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from syncd.index import Index
from syncd.standing import MAX_REFUSED, STANDING, Standing

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def index() -> Iterator[Index]:
    found = Index(None)
    yield found
    found.close()


def at(index: Index, *generations: int, hooked: bool = True) -> Standing:
    """One that went to these generations, one after the other, and all of them ended well."""
    standing = Standing(index, hooked=hooked)
    for number in generations:
        standing.arrived(number, f"r{number}", f"t{number}")
        standing.ended_well()
    return standing


def told(standing: Standing) -> dict[str, Any]:
    """What it says; a new one that reads the same note says the same."""
    again = Standing(standing._index, hooked=standing._hooked)
    assert again._state == standing._state, "it was not written"
    names = ("number", "record", "tree", "good_record", "due", "is_return", "holds", "at")
    return {name: getattr(standing, name) for name in names}


# -- what an older version applied -------------------------------------------------------------------------------------


def test_what_an_older_version_applied_counts_as_good(index: Index) -> None:
    """It knew of no hooks: none is due for it, and it is what is gone back to."""
    standing = Standing(index, hooked=True)
    standing.adopt(4, "r4")
    assert told(standing) | {"tree": ""} == {
        "number": 4, "record": "r4", "tree": "", "good_record": "r4", "due": False, "is_return": False,
        "holds": False, "at": (4, "r4"),
    }  # fmt: skip


def test_nothing_is_adopted_where_there_is_something(index: Index) -> None:
    """At each start the index says again what is applied: what is known of that is not forgotten."""
    standing = at(index, 1)
    standing.arrived(2, "r2", "t2")
    standing.adopt(2, "r2")
    assert (standing.good_record, standing.due) == ("r1", True)
    standing.adopt(1, "r1")
    assert (standing.number, standing.record) == (2, "r2")


def test_nothing_is_adopted_where_nothing_was_applied(index: Index) -> None:
    """A new mirror's index says 0 and ""."""
    standing = Standing(index, hooked=True)
    standing.adopt(0, "")
    assert index.note(STANDING) == ""
    assert standing.at == (0, "")


# -- arriving ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("R1")
def test_a_new_tree_has_hooks_due_and_is_not_good_yet(index: Index) -> None:
    """What was good before stays what is gone back to."""
    standing = at(index, 1)
    standing.arrived(2, "r2", "t2")
    assert told(standing) == {
        "number": 2, "record": "r2", "tree": "t2", "good_record": "r1", "due": True, "is_return": False,
        "holds": False, "at": (2, "r2"),
    }  # fmt: skip
    assert (standing.before(2), standing.before(3)) == (1, 2)
    standing.ended_well()
    assert (told(standing)["due"], standing.good_record, standing._state.good) == (False, "r2", 2)


def test_without_hooks_what_is_applied_is_good(index: Index) -> None:
    """Nothing runs that could say otherwise."""
    standing = at(index, 1, hooked=False)
    standing.arrived(2, "r2", "t2")
    assert (told(standing)["due"], standing.good_record, standing._state.good) == (False, "r2", 2)


@pytest.mark.parametrize("good", [True, False])
def test_the_same_tree_again_runs_nothing(index: Index, good: bool) -> None:
    """Committed anew under another number: as good as before, and what was due is due still."""
    standing = at(index, 1)
    standing.arrived(2, "r2", "t2")
    if good:
        standing.ended_well()
    standing.try_hooks()
    standing.arrived(3, "r3", "t2")
    state = told(standing)
    assert (state["number"], state["record"], state["due"], state["is_return"]) == (3, "r3", not good, False)
    assert (standing.good_record, standing._state.good) == (("r3", 3) if good else ("r1", 1))
    assert standing.before(3) == 1
    assert standing.try_hooks() == 2


def test_a_first_tree_is_no_same_one(index: Index) -> None:
    """A mirror that takes nothing of a folder has a tree "" as one that has nothing."""
    standing = Standing(index, hooked=True)
    standing.arrived(1, "r1", "")
    assert (told(standing)["due"], standing.record) == (True, "r1")


def test_a_tree_that_an_older_version_applied_is_not_known(index: Index) -> None:
    """Its hooks run once more: rather that than a tree whose hooks never ran."""
    standing = Standing(index, hooked=True)
    standing.adopt(1, "r1")
    standing.arrived(1, "r1", "t1")
    assert (told(standing)["due"], standing.is_return, standing.before(1)) == (True, False, 1)


# -- tries -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("C7")
def test_begins_are_counted_for_each_generation(index: Index) -> None:
    """Over restarts; another one begins anew; one that ended, well or not, does not count."""
    for count in (1, 2, 3):
        assert Standing(index, hooked=True).begin("r2") == count
    standing = Standing(index, hooked=True)
    assert standing.begin("r3") == 1
    assert standing.begin("r2") == 1
    assert Standing(index, hooked=True).begin("r2") == 2
    for _ in range(3):
        standing.gave_up()
        told(standing)
    assert standing.begin("r2") == 1
    standing.arrived(2, "r2", "t2")
    assert Standing(index, hooked=True).begin("r2") == 1


def test_what_never_began_cannot_be_given_up(index: Index) -> None:
    """A count below nothing would be one more try than there are."""
    standing = Standing(index, hooked=True)
    standing.gave_up()
    assert standing.begin("r1") == 1


@pytest.mark.fault("C7")
def test_tries_of_hooks_are_counted_for_each_generation(index: Index) -> None:
    """Over restarts; a stop of ours does not count, and a new tree or a good end begins anew."""
    standing = Standing(index, hooked=True)
    standing.arrived(1, "r1", "t1")
    for count in (1, 2):
        assert Standing(index, hooked=True).try_hooks() == count
    standing = Standing(index, hooked=True)
    for count in (1, 0, 0):
        standing.stopped()
        told(standing)
        assert standing._state.tries == count
    assert standing.try_hooks() == 1
    standing.ended_well()
    told(standing)
    assert standing.try_hooks() == 1
    standing.arrived(2, "r2", "t2")
    told(standing)
    assert standing.try_hooks() == 1


# -- refusing ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("R1")
def test_what_failed_is_gone_back_from(index: Index) -> None:
    """Refused: nothing is due for it any more, the one before is to be at, and going there is a return."""
    standing = at(index, 1)
    standing.arrived(2, "r2", "t2")
    assert not standing.returns_to("r1")  # nothing is refused
    standing.refuse("r2", "why")
    assert told(standing) == {
        "number": 2, "record": "r2", "tree": "t2", "good_record": "r1", "due": False, "is_return": False,
        "holds": True, "at": (1, "r1"),
    }  # fmt: skip
    assert (standing.refused("r2"), standing.refused("r1")) == ("why", "")
    assert (standing.returns_to("r1"), standing.returns_to("r2"), standing.returns_to("r0")) == (True, False, False)
    standing.arrived(1, "r1", "t1")
    assert (told(standing)["is_return"], standing.due, standing.before(1)) == (True, True, 2)
    assert not standing.returns_to("r1")  # it is there
    standing.ended_well()
    standing.arrived(3, "r3", "t3")
    assert not told(standing)["is_return"]


def test_what_was_never_applied_is_refused_and_nothing_else_changes(index: Index) -> None:
    """By a check hook: what is applied keeps the hooks that are due."""
    standing = at(index, 1)
    standing.arrived(2, "r2", "t2")
    standing.refuse("r3", "why")
    assert (told(standing)["due"], standing.at) == (True, (2, "r2"))
    assert not standing.returns_to("r1")


def test_a_refused_one_is_nowhere_to_be(index: Index) -> None:
    """Neither what is applied nor what was good: then there is nothing to be at."""
    standing = at(index, 1)
    standing.refuse("r1", "why")
    assert told(standing)["at"] == (0, "")
    assert not standing.returns_to("r1")
    assert Standing(Index(None), hooked=True).at == (0, "")


def test_the_oldest_refusals_are_forgotten_first(index: Index) -> None:
    """Their number is bounded."""
    standing = Standing(index, hooked=True)
    for number in range(MAX_REFUSED + 2):
        standing.refuse(f"r{number}", f"why {number}")
    known = [number for number in range(MAX_REFUSED + 2) if standing.refused(f"r{number}")]
    assert known == list(range(2, MAX_REFUSED + 2))
    told(standing)


@pytest.mark.parametrize("hooked", [True, False])
def test_a_persons_word_forgets_refusals(index: Index, hooked: bool) -> None:
    """The hooks of what is in place and was refused are due again, from the first try; of what was not they are not."""
    standing = Standing(index, hooked=hooked)
    standing.arrived(1, "r1", "t1")
    for _ in range(3):
        standing.try_hooks()
    standing.refuse("r1", "why")
    for _ in range(3):
        standing.begin("r2")
    standing.refuse("r2", "why")
    standing.forget_refusals()
    assert (told(standing)["due"], standing.holds) == (hooked, False)
    assert standing.try_hooks() == 1
    assert standing.begin("r2") == 1
    standing.ended_well()
    standing.refuse("r3", "why")
    standing.forget_refusals()
    assert (told(standing)["due"], standing.holds) == (False, False)


# -- the note ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("C6")
@pytest.mark.parametrize(
    "damage",
    [
        *("", "{", "[]", '"text"', "null", "{}", '{"unknown": 1}', "[" * 100_000),
        *('{"number": "1"}', '{"number": true}', '{"due": 1}', '{"refused": []}', '{"good": 1.5}', '{"record": null}'),
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_note_is_a_new_beginning(index: Index, damage: str) -> None:
    """A field of another type, an unknown one, no JSON: nothing of it is believed."""
    index.set_note(STANDING, damage)
    standing = Standing(index, hooked=True)
    assert (standing.at, standing.due, standing.holds, standing.begin("r1")) == ((0, ""), False, False, 1)
    standing.arrived(1, "r1", "t1")
    assert told(standing)["number"] == 1


def test_a_note_of_a_version_before_is_read(index: Index) -> None:
    """What it had no fields for is as at the beginning."""
    index.set_note(STANDING, json.dumps({"number": 3, "record": "r3", "good": 2, "good_record": "r2", "due": True}))
    standing = Standing(index, hooked=True)
    assert (standing.at, standing.good_record, standing.due) == ((3, "r3"), "r2", True)
