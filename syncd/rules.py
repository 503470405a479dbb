"""Which paths take part: gitignore patterns from the configuration and from ``.syncdignore`` files.

Rules kept here, all of them git's (gitignore(5)):
 * of one list the last pattern that matches decides; ``!`` takes back; a list nearer to the path
   overrules one farther up, and a ``.syncdignore`` overrules the configuration;
 * what lies below an excluded directory is excluded whatever the patterns say;
 * a pattern with a slash before its end is anchored at its list's directory, one without matches a
   base name at any depth; a slash at the end means directories only.

``include`` reads the other way round: where it is not empty, only what it matches takes part, and
everything below a directory that it matches. pathspec turns globs into regular expressions; which
pattern decides is decided here, because pathspec's own specs are made for lists of files: they match a
path through its parents, too, and so cannot say of a *directory* what git says (``*`` followed by
``!*/``; pathspec 1.1).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from syncd.errors import ConfigError
from syncd.paths import ancestors, is_private, parent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

IGNORE_FILE = ".syncdignore"

_REMEMBERED_DIRS = 1000


@dataclass(frozen=True, slots=True)
class _Glob:
    """A pattern without its ``!`` and its trailing slash.

    :ivar depths: for every number of components (1, 2, ...) what a path's beginning of that length
        must match so that something below it can match; shorter than the pattern where ``**`` makes
        everything possible.
    """

    anchored: bool
    slashes: int | None  # exactly so many; None: the pattern has ``**``
    regex: re.Pattern[str]
    depths: tuple[re.Pattern[str], ...] | None

    def matches(self, path: str) -> bool:
        if not self.anchored:
            return self.regex.fullmatch(path.rpartition("/")[2]) is not None
        # The count keeps a class like [!a] from matching a slash, which pathspec's expressions allow.
        if self.slashes is not None and path.count("/") != self.slashes:
            return False
        return self.regex.fullmatch(path) is not None

    def may_match_below(self, path: str) -> bool:
        if not self.anchored or self.depths is None:
            return True
        if self.slashes is not None and path.count("/") >= self.slashes:
            return False
        parts = path.split("/")[: len(self.depths)]
        if not parts:
            return True  # begins with ``**``
        return self.depths[len(parts) - 1].fullmatch("/".join(parts)) is not None


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One line of a list.

    :ivar glob: ``None`` matches every path (``*``, ``**``).
    :ivar inside: the pattern ended in ``/**``: it matches what is below a match of the glob, not the
        match itself.
    """

    positive: bool
    dirs_only: bool
    inside: bool
    glob: _Glob | None

    def matches(self, path: str, *, is_dir: bool) -> bool:
        if self.dirs_only and not is_dir:
            return False
        if self.inside:
            return any(self.glob is None or self.glob.matches(above) for above in ancestors(path))
        return self.glob is None or self.glob.matches(path)

    def may_match_below(self, path: str) -> bool:
        return self.positive and (
            self.glob is None or self.glob.may_match_below(path) or (self.inside and self.glob.matches(path))
        )


def _translate(glob: str) -> re.Pattern[str]:
    """Return the expression of an anchored glob, for ``fullmatch`` on a path without a trailing slash."""
    regex, _ = GitIgnoreSpecPattern.pattern_to_regex("/" + glob)
    if regex is None:
        raise ValueError("unfinished character class")
    return re.compile(regex, re.DOTALL)  # a name may hold a newline


def _glob(text: str, *, anchored: bool) -> _Glob:
    if not anchored:
        return _Glob(anchored=False, slashes=0, regex=_translate(text), depths=None)
    parts = text.split("/")
    fixed = parts[: parts.index("**")] if "**" in parts else parts
    depths = tuple(_translate("/".join(parts[: number + 1])) for number in range(len(fixed)))
    if "**" in parts:
        return _Glob(anchored=True, slashes=None, regex=_translate(text), depths=depths)
    return _Glob(anchored=True, slashes=text.count("/"), regex=_translate(text), depths=depths[:-1])


def _parse(line: str) -> _Pattern | None:
    """Read one line; ``None`` for a blank one or a comment.

    :raises ValueError: it does not parse.
    """
    if not line.endswith("\\ "):
        line = line.rstrip(" \t\r")
    if not line or line.startswith("#") or line == "/":
        return None
    body = line.removeprefix("!")
    core = body.strip("/")
    while "**/**" in core:
        core = core.replace("**/**", "**")
    if not core:
        raise ValueError("nothing left of the pattern")
    anchored = "/" in body.rstrip("/")
    inside = core.endswith("/**")
    if inside:
        core = core.removesuffix("/**")
    every = core in {"**", "**/*"} or (core == "*" and not anchored)
    try:
        glob = None if every else _glob(core, anchored=anchored)
    except re.error as exc:
        raise ValueError(str(exc)) from exc
    return _Pattern(body is line, body.endswith("/"), inside, glob)


def _parse_all(lines: Iterable[str]) -> tuple[tuple[_Pattern, ...], list[str]]:
    """Return the patterns, the last line first, and what is wrong with the other lines."""
    patterns: list[_Pattern] = []
    problems: list[str] = []
    for line in lines:
        try:
            pattern = _parse(line)
        except ValueError as exc:
            problems.append(f"pattern {line!r} does not parse: {exc}")
        else:
            if pattern is not None:
                patterns.append(pattern)
    return tuple(reversed(patterns)), problems


def _verdict(patterns: tuple[_Pattern, ...], path: str, *, is_dir: bool) -> bool | None:
    for pattern in patterns:
        if pattern.matches(path, is_dir=is_dir):
            return pattern.positive
    return None


class Rules:
    """The paths of a folder that take part. Immutable, and cheap to ask: directories' answers are remembered.

    :ivar fingerprint: the configured patterns as text, "" for none; without those of ``.syncdignore`` files.
    :raises ConfigError: naming every pattern that does not parse.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self._include, wrong = _parse_all(include)
        excluded, wrong_too = _parse_all(exclude)
        if wrong or wrong_too:
            problems = (*wrong, *wrong_too)
            raise ConfigError(problems[0], problems=problems, hint="patterns are written as in .gitignore")
        self._lists: tuple[tuple[str, tuple[_Pattern, ...]], ...] = (("", excluded),) if excluded else ()
        self._dirs: dict[str, tuple[bool, bool]] = {"": (False, not self._include)}
        self.fingerprint = json.dumps([list(include), list(exclude)]) if include or exclude else ""

    def __eq__(self, other: object) -> bool:
        """Tell whether two take the same part of every tree (a reload asks this of configured ones)."""
        if not isinstance(other, Rules):
            return NotImplemented
        return (self.fingerprint, self._lists) == (other.fingerprint, other._lists)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def with_ignore_file(self, directory: str, text: str, *, skipped: list[str] | None = None) -> Rules:
        """Return rules that also obey a ``.syncdignore`` in ``directory`` ("" is the root).

        Files must be added from the outside inwards. ``.syncdignore`` is UTF-8, one pattern per line.

        :param skipped: takes a line of text per pattern that does not parse; the others count.
        :raises ConfigError: such a pattern, where ``skipped`` is ``None``.
        """
        patterns, problems = _parse_all(text.removeprefix("\ufeff").split("\n"))
        if problems and skipped is None:
            raise ConfigError(problems[0], problems=tuple(problems))
        if skipped is not None:
            skipped += problems
        if not patterns:
            return self
        nested = Rules.__new__(Rules)
        nested._include = self._include  # noqa: SLF001 - our own class
        nested._lists = ((f"{directory}/" if directory else "", patterns), *self._lists)  # noqa: SLF001
        nested._dirs = {"": self._dirs[""]}  # noqa: SLF001
        return nested

    def takes(self, path: str, *, is_dir: bool) -> bool:
        """Tell whether a path takes part: not excluded, and included where ``include`` is not empty.

        A directory may be needed although it does not take part by itself: as the parent of something
        that does.
        """
        if is_private(path):
            return False
        if not self._lists and not self._include:
            return True
        excluded, included = self._judge(path, is_dir=is_dir)
        return included and not excluded

    def may_descend(self, path: str) -> bool:
        """Tell whether something below a directory may take part; False is certain. "" is the root."""
        if is_private(path):
            return False
        if not path or (not self._lists and not self._include):
            return True
        excluded, included = self._judge(path, is_dir=True)
        return not excluded and (included or any(pattern.may_match_below(path) for pattern in self._include))

    def _judge(self, path: str, *, is_dir: bool) -> tuple[bool, bool]:
        """Return (excluded, included): by itself, else as its directory is."""
        if is_dir and path in self._dirs:
            return self._dirs[path]
        excluded, included = self._judge(parent(path), is_dir=True)
        if not excluded:
            excluded = self._excludes(path, is_dir=is_dir)
        if self._include:
            verdict = _verdict(self._include, path, is_dir=is_dir)
            included = included if verdict is None else verdict
        if is_dir:
            if len(self._dirs) > _REMEMBERED_DIRS:
                self._dirs = {"": self._dirs[""]}
            self._dirs[path] = (excluded, included)
        return excluded, included

    def _excludes(self, path: str, *, is_dir: bool) -> bool:
        for prefix, patterns in self._lists:
            if path.startswith(prefix):
                verdict = _verdict(patterns, path[len(prefix) :], is_dir=is_dir)
                if verdict is not None:
                    return verdict
        return False
