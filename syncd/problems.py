"""Paths that could not be dealt with: logged when they appear or change, kept until they are looked at again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncd.model import Problem


class ProblemBook:
    """The problems of one folder, or of one side of it.

    :param event: the log event of a problem that is new or changed.
    """

    def __init__(self, log: Any, event: str) -> None:
        self._log = log
        self._event = event
        self._now: dict[str, Problem] = {}
        self._before: dict[str, Problem] = {}

    def note(self, problem: Problem) -> None:
        """Keep a problem; it is logged unless it is the one that the path had before."""
        if self._now.get(problem.path, self._before.get(problem.path)) != problem:
            self._log.warning(self._event, path=problem.path, code=problem.code, text=problem.text)
        self._now[problem.path] = problem

    def clear(self, path: str) -> None:
        """Forget the problem of a path."""
        self._now.pop(path, None)

    def begin(self) -> None:
        """Forget all: everything is looked at again. What comes back unchanged is not logged again."""
        self._before, self._now = self._now, {}

    def code(self, path: str) -> str:
        """Return the code of a path's problem, "" where it has none."""
        problem = self._now.get(path)
        return "" if problem is None else problem.code

    def all(self) -> list[Problem]:
        """Return the problems by path."""
        return [self._now[path] for path in sorted(self._now)]
