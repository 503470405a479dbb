"""Which line of a TOML text a key is on; tomllib keeps no positions."""

from __future__ import annotations

import tomllib
from typing import Any

Loc = tuple[str | int, ...]
"""A key's place: ``("publish", 0, "folder")``."""


def locate(text: str) -> dict[Loc, int]:
    """Map every key and table of a TOML text to the line (from 1) where it begins.

    tomllib keeps no positions. The text must have passed :func:`tomllib.loads`; of any other the result is
    merely incomplete.
    """
    scanner = _Scanner(text)
    try:
        scanner.document()
    except (IndexError, tomllib.TOMLDecodeError):
        return scanner.lines
    return scanner.lines


class _Scanner:
    """Walks the statements of a TOML text; every step consumes at least one character."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n") + "\n"
        self.at = 0
        self.line = 1
        self.lines: dict[Loc, int] = {}
        self.counts: dict[Loc, int] = {}

    def document(self) -> None:
        table: Loc = ()
        while True:
            self.blank("\n \t")
            if self.at >= len(self.text):
                return
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.pair(table, ends="\n")

    def blank(self, chars: str) -> None:
        """Skip white space and comments."""
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                self.move(self.text.index("\n", self.at) - self.at)
            elif self.text[self.at] in chars:
                self.move(1)
            else:
                return

    def move(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def header(self) -> Loc:
        line = self.line
        many = self.text.startswith("[[", self.at)
        self.move(2 if many else 1)
        names = self.key("]")
        self.move(2 if many else 1)
        loc: Loc = ()
        for name in names[:-1]:
            loc = self.current((*loc, name))
        loc = (*loc, names[-1])
        if many:
            self.counts[loc] = self.counts.get(loc, -1) + 1
            self.lines.setdefault(loc, line)
            loc = (*loc, self.counts[loc])
        self.lines.setdefault(loc, line)
        return loc

    def current(self, loc: Loc) -> Loc:
        return (*loc, self.counts[loc]) if loc in self.counts else loc

    def key(self, end: str) -> list[str]:
        """Read a dotted key up to ``end``; tomllib itself decodes quotes and escapes."""
        start = self.at
        while self.text[self.at] != end:
            if self.text[self.at] in "\"'":
                self.string()
            else:
                self.move(1)
        found: Any = tomllib.loads(f"{self.text[start : self.at]} = 0")
        names = []
        while isinstance(found, dict) and found:
            name, found = next(iter(found.items()))
            names.append(name)
        if not names:  # a comment where a key belongs
            raise IndexError(start)
        return names

    def pair(self, table: Loc, *, ends: str) -> None:
        line = self.line
        loc = table
        for name in self.key("="):
            loc = (*loc, name)
            self.lines.setdefault(loc, line)
        self.move(1)
        self.blank(" \t")
        self.value(loc, ends)

    def value(self, loc: Loc, ends: str) -> None:
        char = self.text[self.at]
        if char in "\"'":
            self.string()
        elif char == "[":
            self.items(loc)
        elif char == "{":
            self.inline(loc)
        else:
            while self.text[self.at] not in ends + "#\n":
                self.move(1)

    def string(self) -> None:
        quote = self.text[self.at]
        closing = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.move(len(closing))
        while not self.text.startswith(closing, self.at):
            self.move(2 if quote == '"' and self.text[self.at] == "\\" else 1)
            if self.at >= len(self.text):
                raise IndexError(self.at)
        self.move(len(closing))
        while len(closing) > 1 and self.text.startswith(quote, self.at):  # """a"""" ends in a quote of its own
            self.move(1)

    def items(self, loc: Loc) -> None:
        self.move(1)
        number = 0
        while True:
            self.blank("\n \t,")
            if self.text[self.at] == "]":
                self.move(1)
                return
            self.lines.setdefault((*loc, number), self.line)
            self.value((*loc, number), ",]")
            number += 1

    def inline(self, loc: Loc) -> None:
        self.move(1)
        while True:
            self.blank("\n \t,")
            if self.text[self.at] == "}":
                self.move(1)
                return
            self.pair(loc, ends=",}")
