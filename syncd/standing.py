"""How a mirror stands with its generations: which ended well, which is refused, whose hooks are still due.

One note in the index, written in the transaction of what it tells about, so that a crash anywhere leaves a state that
the next start goes on from. Blocking; the folder's thread.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

from syncd.crashpoints import crash_point

if TYPE_CHECKING:
    from syncd.index import Index

STANDING: Final = "standing"
MAX_REFUSED: Final = 64
"""Refused generations that are remembered; the oldest is forgotten first."""


@dataclass(slots=True)
class _State:
    """What is noted.

    :ivar number, record, tree: the generation that is applied; 0 and "" for none.
    :ivar good, good_record: the last one that ended well.
    :ivar due: hooks after an apply are still to run, or to run again.
    :ivar back: it is a return: its hooks run, but nothing is returned from.
    :ivar left: the generation that was applied before it.
    :ivar tries: how often its hooks began.
    :ivar going, begins: the generation that is being brought into place, and how often that began.
    :ivar refused: record -> why it is not gone to.
    """

    number: int = 0
    record: str = ""
    tree: str = ""
    good: int = 0
    good_record: str = ""
    due: bool = False
    back: bool = False
    left: int = 0
    tries: int = 0
    going: str = ""
    begins: int = 0
    refused: dict[str, str] = field(default_factory=dict)


class Standing:
    """See the module.

    :param hooked: whether anything is to run after an apply; without, what is applied has ended well.
    """

    def __init__(self, index: Index, *, hooked: bool) -> None:
        self._index = index
        self._hooked = hooked
        self._state = _read(index.note(STANDING))

    @property
    def at(self) -> tuple[int, str]:
        """Number and record of the generation to be at while another one is refused; (0, "") for none."""
        state = self._state
        if state.record not in state.refused:
            return state.number, state.record
        return (state.good, state.good_record) if state.good_record not in state.refused else (0, "")

    @property
    def number(self) -> int:
        """The number of what is applied, 0 for nothing."""
        return self._state.number

    @property
    def record(self) -> str:
        """The record of what is applied, "" for nothing."""
        return self._state.record

    @property
    def tree(self) -> str:
        """What tells the applied tree from others, "" for nothing."""
        return self._state.tree

    @property
    def good_record(self) -> str:
        """The record of the last generation that ended well, "" for none."""
        return self._state.good_record

    def before(self, number: int) -> int:
        """Return the generation that a hook of ``number`` comes after, 0 for none."""
        state = self._state
        return state.left if number == state.number else state.number

    @property
    def due(self) -> bool:
        """Whether hooks are to run for what is applied."""
        return self._state.due

    @property
    def is_return(self) -> bool:
        """Whether what is applied was returned to."""
        return self._state.back

    def refused(self, record: str) -> str:
        """Return why a generation is not gone to, "" where it may be."""
        return self._state.refused.get(record, "")

    @property
    def holds(self) -> bool:
        """Whether anything is refused."""
        return bool(self._state.refused)

    def adopt(self, number: int, record: str) -> None:
        """Take over what an older version applied, which knew nothing of this."""
        if record and not self._state.record:
            self._state.number = self._state.good = number
            self._state.record = self._state.good_record = record
            self._write()

    def returns_to(self, record: str) -> bool:
        """Tell whether going to a generation is a return from one that is refused now."""
        state = self._state
        return record == state.good_record and state.record != record and state.record in state.refused

    def arrived(self, number: int, record: str, tree: str) -> None:
        """A generation is in place, whole.

        :param tree: what tells its tree, as this mirror takes it, from others. Nothing is run for the same one again.
        """
        state = self._state
        state.going, state.begins = "", 0
        same, state.tree = tree == state.tree, tree
        if same and state.record:
            if state.good_record == state.record:
                state.good, state.good_record = number, record
            state.number, state.record = number, record
            self._write()
            return
        state.back = self.returns_to(record)
        state.left = state.number
        state.number, state.record = number, record
        state.due, state.tries = self._hooked, 0
        if not self._hooked:
            state.good, state.good_record = number, record
        self._write()

    def begin(self, record: str) -> int:
        """A generation is about to be brought into place; return how often that began."""
        state = self._state
        state.begins = state.begins + 1 if record == state.going else 1
        state.going = record
        self._write(durable=True)
        return state.begins

    def gave_up(self) -> None:
        """It ended, well or not, and was not cut off: that does not count."""
        if self._state.begins:
            self._state.begins -= 1
            self._write()

    def try_hooks(self) -> int:
        """The hooks begin; return how often they did for this generation."""
        self._state.tries += 1
        self._write(durable=True)
        return self._state.tries

    def stopped(self) -> None:
        """The hooks were ended because we are: that says nothing about the generation."""
        self._state.tries = max(0, self._state.tries - 1)
        self._write()

    def ended_well(self) -> None:
        """The hooks have run and the generation is good."""
        state = self._state
        state.due, state.tries = False, 0
        state.good, state.good_record = state.number, state.record
        self._write()

    def refuse(self, record: str, reason: str) -> None:
        """Do not go to a generation until a person asks for it."""
        state = self._state
        state.refused[record] = reason
        while len(state.refused) > MAX_REFUSED:
            del state.refused[next(iter(state.refused))]
        if record == state.record:
            state.due = False
        self._write(durable=True)
        crash_point("refused")

    def forget_refusals(self) -> None:
        """A person wants everything tried again: the hooks of what is in place, too, if it was refused for them."""
        state = self._state
        if state.record in state.refused:
            state.due, state.tries = self._hooked, 0
        state.going, state.begins = "", 0
        state.refused.clear()
        self._write()

    def _write(self, *, durable: bool = False) -> None:
        """Note it.

        :param durable: no power cut may undo it: what comes now may be what cuts the power, at each start.
        """
        self._index.set_note(STANDING, json.dumps(asdict(self._state)))
        if durable:
            self._index.sync()


def _read(note: str) -> _State:
    """Read what was noted; "", as in a new index, and what is damaged are a new beginning."""
    blank = _State()
    try:
        state = _State(**json.loads(note))
    except (ValueError, TypeError, RecursionError):
        return blank
    sound = all(type(getattr(state, name)) is type(value) for name, value in asdict(blank).items())
    return state if sound else blank
