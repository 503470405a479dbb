"""Relative path <-> object name, and the refusal of every name that could leave the root.

Rules kept here:
 * a path is relative, POSIX, UTF-8, without empty, ``.`` or ``..`` components or NUL; a backslash is an ordinary
   character (systemd's escaped unit names have them), never a separator;
 * the name ``.syncd`` is ours on every host, wherever it stands in a path (a mirror may lie within another one) and
   however it is spelled where a filesystem makes no difference; it is never distributed in either direction;
 * a name that would not fit the server's control line is refused before it reaches the connection, because
   nats-server closes such a connection for good (nats-py 2.16, nats-server 2.15).
"""

from __future__ import annotations

import base64
import re
import unicodedata

from syncd.errors import BadName

PRIVATE_DIR = ".syncd"
MAX_COMPONENT_BYTES = 255
MAX_PATH_BYTES = 2800
"""base64 makes 3736 bytes of it; with subject prefix and reply inbox that stays below the control line of 4096."""

_INVISIBLE = "[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]*"
"""Format characters, which a filesystem without case does not see either."""
_PRIVATE = re.compile(
    rf"(?:\A|/){_INVISIBLE}{''.join(re.escape(char) + _INVISIBLE for char in PRIVATE_DIR)}(?:/|\Z)", re.IGNORECASE
)


def check_path(name: str) -> str:
    """Return ``name`` unchanged if it is safe as a path below a root.

    :raises BadName: with the reason, for every name that FAULTS class P lists.
    """
    if not name:
        raise BadName("empty name")
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raise BadName("name is not valid UTF-8") from None
    if len(raw) > MAX_PATH_BYTES:
        raise BadName(f"path of {len(raw)} bytes is longer than {MAX_PATH_BYTES}")
    if "\0" in name:
        raise BadName("name holds a NUL byte")
    if name.startswith("/"):
        raise BadName("name is absolute")
    parts = name.split("/")
    for part in parts:
        if part == "":
            raise BadName("name has an empty component")
        if part in {".", ".."}:
            raise BadName(f"name has a {part!r} component")
        if len(part.encode()) > MAX_COMPONENT_BYTES:
            raise BadName(f"a component is longer than {MAX_COMPONENT_BYTES} bytes")
    if is_private(name):
        raise BadName(f"{PRIVATE_DIR!r} is reserved for syncd's own files")
    return name


def is_usable(name: str) -> bool:
    """Tell whether :func:`check_path` accepts a name."""
    try:
        check_path(name)
    except BadName:
        return False
    return True


def is_private(name: str) -> bool:
    """Tell whether a relative path is one of syncd's own files, of this tree or of another one within it."""
    if name.isascii():  # asked of every path: as cheap as can be
        folded = name.lower()
        return PRIVATE_DIR in folded and PRIVATE_DIR in folded.split("/")
    return _PRIVATE.search(name) is not None


def parent(name: str) -> str:
    """Return the path of the directory that holds ``name``; "" is the root."""
    return name.rpartition("/")[0]


def ancestors(name: str) -> list[str]:
    """Return all proper ancestors, outermost first, without the root: ``a/b/c`` -> ``["a", "a/b"]``."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def sort_key(name: str) -> bytes:
    """Return bytes that order paths component by component, so that a directory's children follow it at once.

    Reversible by :func:`from_sort_key`, since a path never holds NUL.
    """
    return name.encode().replace(b"/", b"\0")


def from_sort_key(key: bytes) -> str:
    """Invert :func:`sort_key`."""
    return key.replace(b"\0", b"/").decode()


def subject_token(name: str) -> str:
    """Return the last token of an object's metadata subject: padded base64url of the UTF-8 name (ADR-20)."""
    return base64.urlsafe_b64encode(name.encode()).decode()


def object_name(subject: str) -> str:
    """Invert :func:`subject_token` for the last token of a subject; the subject itself where that is not possible."""
    try:
        return base64.b64decode(subject.rpartition(".")[2], altchars=b"-_", validate=True).decode()
    except ValueError:
        return subject


_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"}
"""Unicode categories that a terminal acts on or does not show."""
_BYTE_SURROGATES = range(0xDC80, 0xDD00)
"""What Python makes of undecodable bytes (PEP 383)."""


def printable(name: str | bytes) -> str:
    r"""Return a name that is safe in a terminal, a log line and a metric label.

    Control characters, line separators, bidirectional marks, surrogates and undecodable bytes become
    ``\xNN``/``\uNNNN`` escapes; everything else stays as it is.
    """
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) if unicodedata.category(char) in _HIDDEN else char for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if code in _BYTE_SURROGATES:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"  # noqa: PLR2004
