"""Which paths take part: gitignore patterns from the configuration and from ``.syncdignore`` files.

Rules kept here, all of them git's (gitignore(5)):
 * of one list the last pattern that matches decides; ``!`` takes back; a list nearer to the path
   overrules one farther up, and a ``.syncdignore`` overrules the configuration;
 * what lies below an excluded directory is excluded whatever the patterns say;
 * a pattern with a slash before its end is anchored at its list's directory, one without matches a
   base name at any depth; a slash at the end means directories only.

``include`` reads the other way round: where it is not empty, only what it matches takes part, and
everything below a directory that it matches. pathspec turns globs into regular expressions, one per
component; how components go together, and which pattern decides, is decided here, because pathspec's
own specs are made for lists of files: they match a path through its parents, too, and so cannot say of
a *directory* what git says (``*`` followed by ``!*/``; pathspec 1.1).
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

MAX_PATTERN = 8192
MAX_ANY = 8
"""Each ``**`` may be anywhere: a mirrored ``.syncdignore`` decides about every path, and paths are deep."""
_REMEMBERED_DIRS = 1000
_STAR = "[^/]*"
_END = "(?:(?P<ps_d>/)|$)"
"""What pathspec (1.1) writes for a star, and at the end of a pattern that names both files and directories."""


@dataclass(frozen=True, slots=True)
class _Glob:
    """A pattern without its ``!`` and its trailing slash.

    :ivar parts: an expression for each component; ``None`` is ``**``: any number of components, also none.
    """

    anchored: bool
    parts: tuple[re.Pattern[str] | None, ...]

    def matches(self, path: str) -> bool:
        if not self.anchored:
            [part] = self.parts
            return part is None or part.fullmatch(path.rpartition("/")[2]) is not None
        return self._fits(path.split("/"))

    def _fits(self, names: Sequence[str]) -> bool:
        """Match name by name. After ``**`` the first place where the rest fits is as good as any later one."""
        parts = self.parts
        at = part = 0
        star = resume = -1
        while at < len(names):
            if part < len(parts) and parts[part] is None:
                star, resume = part, at
                part += 1
            elif part < len(parts) and _is(parts[part], names[at]):
                at += 1
                part += 1
            elif star >= 0:
                resume += 1
                at, part = resume, star + 1
            else:
                return False
        return all(one is None for one in parts[part:])

    def may_match_below(self, path: str) -> bool:
        if not self.anchored:
            return True
        names = path.split("/")
        for part, name in zip(self.parts, names, strict=False):
            if part is None:
                return True
            if not _is(part, name):
                return False
        return len(names) < len(self.parts)


def _is(part: re.Pattern[str] | None, name: str) -> bool:
    return part is not None and part.fullmatch(name) is not None


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
    """Return the expression of one component's glob, for ``fullmatch`` on a name, which takes time linear in that.

    A mirrored ``.syncdignore`` is the publisher's word, and pathspec's expressions go back through all ways to share a
    name among their stars. Of two stars with something between them the first may as well take as little as it can:
    what lies between is of fixed length, and the later star takes the rest (as in CPython's ``fnmatch``).
    """
    bare = glob.rstrip(" \t")
    blanks = glob[len(bare) :]  # pathspec takes them off; a backslash before keeps the first
    if blanks and (len(bare) - len(bare.rstrip("\\"))) % 2:
        bare, blanks = bare + blanks[0], blanks[1:]
    regex, _ = GitIgnoreSpecPattern.pattern_to_regex("/" + bare + "".join("\\" + blank for blank in blanks))
    if regex is None:
        raise ValueError("unfinished character class")
    body = regex.removeprefix("^").removesuffix(_END)
    first, *others = body.split(_STAR)
    if others:
        *middle, last = others
        body = first + "".join(f"(?>{_STAR}?{one})" for one in middle if one) + _STAR + last
    return re.compile(body, re.DOTALL)  # a name may hold a newline


def _glob(text: str, *, anchored: bool) -> _Glob:
    return _Glob(anchored, tuple(None if part == "**" else _translate(part) for part in text.split("/")))


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
    if len(core) > MAX_PATTERN:
        raise ValueError("longer than any path")
    if core.split("/").count("**") > MAX_ANY:
        raise ValueError(f"more than {MAX_ANY} times **")
    if "[[:" in core:
        raise ValueError("classes like [[:alpha:]] are not known")
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
            problems.append(f"pattern {line[:200]!r} does not parse: {exc}")
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
        verdict = self._dirs.get(path) if is_dir else None
        if verdict is not None:
            return verdict
        above = parent(path)
        unknown = []
        while (verdict := self._dirs.get(above)) is None:
            unknown.append(above)
            above = parent(above)
        while unknown:
            above = unknown.pop()
            verdict = self._decide(above, verdict, is_dir=True)
            self._remember(above, verdict)
        verdict = self._decide(path, verdict, is_dir=is_dir)
        if is_dir:
            self._remember(path, verdict)
        return verdict

    def _decide(self, path: str, above: tuple[bool, bool], *, is_dir: bool) -> tuple[bool, bool]:
        excluded, included = above
        if not excluded:
            excluded = self._excludes(path, is_dir=is_dir)
        if self._include:
            verdict = _verdict(self._include, path, is_dir=is_dir)
            included = included if verdict is None else verdict
        return excluded, included

    def _remember(self, path: str, verdict: tuple[bool, bool]) -> None:
        if len(self._dirs) > _REMEMBERED_DIRS:
            self._dirs = {"": self._dirs[""]}
        self._dirs[path] = verdict

    def _excludes(self, path: str, *, is_dir: bool) -> bool:
        for prefix, patterns in self._lists:
            if path.startswith(prefix):
                verdict = _verdict(patterns, path[len(prefix) :], is_dir=is_dir)
                if verdict is not None:
                    return verdict
        return False
