"""Hostile bytes for fuzz tests: honest ones spoiled in the ways that decoders stumble over, and bounds for the reading.

``SYNCD_FUZZ_EXAMPLES=100000`` makes every test that is decorated with :func:`fuzz` a long one.
"""

from __future__ import annotations

import json
import os
import re
import time
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from syncd.nodes import BLOB_MAX, NODE_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Spoil = Callable[[st.DrawFn, bytearray, list[bytes]], None]

EXAMPLES = int(os.environ.pop("SYNCD_FUZZ_EXAMPLES", "0"))
SECONDS = 2.0
"""Of processor time, for one input; the largest takes some milliseconds."""
MEMORY = 3 * 1024 * 1024


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=EXAMPLES or examples,
        deadline=None,  # the machine may be busy: see SECONDS
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


# -- spoiling ----------------------------------------------------------------------------------------------------------

NUMBERS = sorted(
    {0, 1, 2, 12, 13, 0x7F, 0xFF, 0x7FFF, 0xFFFF, BLOB_MAX - 1, BLOB_MAX, BLOB_MAX + 1, NODE_MAX, NODE_MAX + 1}
    | {1_000_000, 1_000_001}
    | {(1 << bits) + step for bits in (31, 32, 53, 63, 64) for step in (-1, 0, 1)}
)
TOKENS = [
    *(b'0 -0 -1 01 1.0 1e3 1e999 NaN Infinity true false null [] {} [[[[ ]] "" "x" , : \\u0000 \\ud800 \\'.split()),
    b"9" * 5000,
    b"[" * 3000,
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xc0\xae",
    b"../",
    b'{"a":1,"a":2}',
]
DIGITS = re.compile(rb"-?[0-9]+")
VALUES = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9]+|true|false|null')


@st.composite
def spoiled(draw: st.DrawFn, valid: list[bytes], spoils: Sequence[Spoil] = ()) -> bytes:
    """Honest bytes, changed some times in one of the ways that decoders stumble over."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        spoil = draw(st.sampled_from(spoils or SPOILS))
        spoil(draw, data, valid)
    return bytes(data)


def _at(draw: st.DrawFn, data: bytearray) -> int:
    return draw(st.integers(0, max(0, len(data) - 1)))


def flip(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    if data:
        data[_at(draw, data)] ^= 1 << draw(st.integers(0, 7))


def cut(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    at = _at(draw, data)
    del data[at : at + draw(st.sampled_from([1, 2, 4, 8, 32, 1 << 20]))]


def grow(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    at = draw(st.integers(0, len(data)))
    data[at:at] = draw(st.binary(min_size=1, max_size=40) | st.sampled_from(TOKENS))


def double(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    at = _at(draw, data)
    part = data[at : at + draw(st.integers(1, 80))]
    data[at:at] = part * draw(st.sampled_from([1, 2, 50]))


def splice(draw: st.DrawFn, data: bytearray, valid: list[bytes]) -> None:
    other = draw(st.sampled_from(valid))
    data[_at(draw, data) :] = other[draw(st.integers(0, len(other))) :]


def swap(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    one, other, size = _at(draw, data), _at(draw, data), draw(st.sampled_from([1, 4, 32]))
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def lie(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    """Put a number where a length might be."""
    size = draw(st.sampled_from([1, 2, 4, 8]))
    number = draw(st.sampled_from([*NUMBERS, len(data), max(0, len(data) - 13)]) | st.integers(0, 1 << 64))
    at = _at(draw, data)
    data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")


def count(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    """Write another number where digits are."""
    _replace(draw, data, DIGITS, st.sampled_from(NUMBERS).map(lambda number: b"%d" % number) | st.sampled_from(TOKENS))


def retype(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    """Put a value of another kind where JSON has one."""
    _replace(draw, data, VALUES, st.sampled_from(TOKENS))


def escape(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    """Put into a text what no text should hold."""
    places = [found.start() + 1 for found in VALUES.finditer(data[:4096]) if found[0][:1] == b'"']
    if places:
        at = draw(st.sampled_from(places))
        data[at:at] = draw(
            st.sampled_from([rb"\ud800", rb"\u0000", rb"\u0061", rb"\/", b"\x7f", b"\xff", b"\n", b"/../"])
        )


def nest(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    """Put something deep where JSON has a value."""
    _replace(draw, data, VALUES, st.sampled_from([b"[" * 3000, b'{"a":' * 3000, b"[" * 2000 + b"]" * 2000]))


def restyle(draw: st.DrawFn, data: bytearray, _: list[bytes]) -> None:
    """Write the same JSON in another form."""
    try:
        value = json.loads(bytes(data))
        styles: list[dict[str, Any]] = [
            {"indent": 1},
            {"separators": (", ", ":")},
            {"separators": (",", ":"), "ensure_ascii": True},
        ]
        again = json.dumps(value, **draw(st.sampled_from(styles))).encode()
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict) and value and draw(st.booleans()):
        name = json.dumps(draw(st.sampled_from(sorted(value)))).encode()
        again = bytes(data).replace(b"{", b"{" + name + b":0,", 1)
    data[:] = draw(st.sampled_from([again, b" " + bytes(data), bytes(data) + b"\n", b"\xef\xbb\xbf" + bytes(data)]))


def _replace(
    draw: st.DrawFn, data: bytearray, pattern: re.Pattern[bytes], replacement: st.SearchStrategy[bytes]
) -> None:
    places = [found.span() for found in pattern.finditer(data[:4096])]
    if places:
        begin, end = draw(st.sampled_from(places))
        data[begin:end] = draw(replacement)


SPOILS = [flip, cut, grow, double, splice, swap, lie, count, retype, escape, nest, restyle]
noise = st.binary(max_size=300)


def bounded(read: Callable[[], Any], errors: tuple[type[BaseException], ...]) -> Any:
    """Read; ``None``: refused. Any other exception, even one derived from these, and long work are failures."""
    began = time.process_time()
    found, refusal = None, None
    try:
        found = read()
    except errors as error:
        refusal = error
    assert time.process_time() - began < SECONDS
    assert refusal is None or (type(refusal) in errors and len(str(refusal)) < 10_000)
    return found
