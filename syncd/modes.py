"""Which permissions things get in a mirror: the setting ``modes`` as a function from entry to entry. Pure.

Rules kept here:
 * a file's mode in the configuration is for plain files. What its publisher made executable (any x bit) stays
   executable, for everybody whom the mode lets read it: ``"0644"`` makes 0755 of a program, ``"0640"`` makes 0750. That
   is chmod's ``X``, and what git keeps of a mode; an exact ``"0644"`` for everything would break every tree that holds
   a script. A mode that has x bits itself is exact: ``"0755"`` makes every file executable, as it says;
 * set-user-id, set-group-id and sticky bits come from whoever publishes. They stay under ``"preserve"`` (the tree as
   it was published) and go where a mode is configured, unless ``special`` says otherwise. What the configuration itself
   sets on directories (``dirs = "2775"``) stays in any case;
 * symlinks have no mode. Devices, fifos and sockets are no entries: no publisher sends them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from syncd.model import MODE_BITS, Entry, Kind

PRESERVE: Final = "preserve"
SPECIAL_BITS: Final = 0o7000
WRITE_BITS: Final = 0o222
_READ_BITS: Final = 0o444
_EXECUTE_BITS: Final = 0o111
_PERMISSIONS: Final = 0o777
_SET_USER_ID: Final = 0o4000
_OWNER_READS: Final = 0o400
_OWNER_ENTERS: Final = 0o500
_OCTAL: Final = re.compile(r"[0-7]{3,4}")
_KEYS: Final = ("files", "dirs", "special")

Special = Literal["drop", "keep"]


@dataclass(frozen=True, slots=True)
class ModePolicy:
    """How modes of a tree become modes of a mirror.

    :ivar files: permissions of files, ``None``: as published.
    :ivar dirs: mode of directories, ``None``: as published.
    :ivar special: what becomes of published set-user-id, set-group-id and sticky bits.
    :ivar read_only: nobody may write (the files and directories of a release).
    """

    files: int | None = None
    dirs: int | None = None
    special: Special = "keep"
    read_only: bool = False

    def apply(self, entry: Entry) -> Entry:
        """Return the entry as this mirror keeps it; the very same object where nothing changes."""
        if entry.kind is Kind.SYMLINK:
            return entry
        mode = self._mode(entry.mode, self.dirs if entry.kind is Kind.DIR else self._file(entry.mode))
        return entry if mode == entry.mode else entry._replace(mode=mode)

    def _file(self, published: int) -> int | None:
        if self.files is None or self.files & _EXECUTE_BITS or not published & _EXECUTE_BITS:
            return self.files
        return self.files | (self.files & _READ_BITS) >> 2

    def _mode(self, published: int, configured: int | None) -> int:
        mode = published & _PERMISSIONS if configured is None else configured
        if self.special == "keep":
            mode |= published & SPECIAL_BITS
        if self.read_only:
            mode &= ~WRITE_BITS
        return mode & MODE_BITS

    @property
    def fingerprint(self) -> str:
        """What tells one policy from another as text, "" for one that changes nothing."""
        if self == ModePolicy():
            return ""
        files, dirs = (PRESERVE if mode is None else f"{mode:04o}" for mode in (self.files, self.dirs))
        return f"{files} {dirs} {self.special}{' read-only' if self.read_only else ''}"


def parse_modes(value: object) -> ModePolicy:
    """Read the setting: ``"preserve"``, or a table of ``files``, ``dirs`` (octal text) and ``special``, all optional.

    :raises ValueError: it is neither, or a mode that would lock syncd itself out.
    """
    if value == PRESERVE:
        return ModePolicy()
    if not isinstance(value, Mapping):
        raise ValueError('must be "preserve" or a table such as { files = "0644", dirs = "0755" }')  # noqa: TRY004
    if unknown := sorted(str(key) for key in value.keys() - set(_KEYS)):
        raise ValueError(f"unknown key {unknown[0]!r}, known are {', '.join(_KEYS)}")
    files = None if "files" not in value else _parse_file_mode(value["files"])
    dirs = None if "dirs" not in value else _parse_dir_mode(value["dirs"])
    special = value.get("special", "keep" if files is None and dirs is None else "drop")
    if special not in ("drop", "keep"):
        raise ValueError('special must be "drop" or "keep"')
    return ModePolicy(files, dirs, special)


def _parse_file_mode(value: object) -> int:
    mode = _parse_octal("files", value)
    if mode & SPECIAL_BITS:
        raise ValueError("files takes no set-id or sticky bits: every file would have them")
    if not mode & _OWNER_READS:
        raise ValueError(f"files = {value!r} would keep the owner from reading")
    return mode


def _parse_dir_mode(value: object) -> int:
    mode = _parse_octal("dirs", value)
    if mode & _SET_USER_ID:
        raise ValueError("set-user-id means nothing on a directory")
    if mode & _OWNER_ENTERS != _OWNER_ENTERS:
        raise ValueError(f"dirs = {value!r} would keep the owner out: a directory needs r and x")
    return mode


def _parse_octal(key: str, value: object) -> int:
    """Read a mode. A number is refused: 644 in TOML is decimal, and not what is meant."""
    if not isinstance(value, str) or _OCTAL.fullmatch(value) is None:
        raise ValueError(f'{key} must be octal text such as "0644"')
    return int(value, 8)
