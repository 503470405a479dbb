"""Readers of a mirror while it changes under them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import Daemons, publish, subscribe
from tests.support.trees import equal_trees, eventually

if TYPE_CHECKING:
    from pathlib import Path

GENERATIONS = 1000

READER = """
import hashlib, json, sys
path, seen, opened, wrong = sys.argv[1], set(), 0, []
sys.stdin = open(0, "rb", buffering=0)
import os; os.set_blocking(0, False)
print("reading", flush=True)
while sys.stdin.read(1) is None:
    for _ in range(20):
        opened += 1
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            wrong.append(repr(error))
            continue
        digest, _, body = data.partition(b"\\n")
        if hashlib.md5(body).hexdigest().encode() != digest:
            wrong.append(f"{len(data)} bytes: {data[:60]!r}")
        else:
            seen.add(body[:8])
print(json.dumps({"opened": opened, "seen": len(seen), "wrong": wrong[:5], "last": max(seen).decode()}), flush=True)
"""


def generation(number: int) -> bytes:
    """Content that proves itself, of a length that differs from that of its neighbours."""
    body = f"{number:08d}".encode() * (1 + number * 37 % 3000)
    return hashlib.md5(body).hexdigest().encode() + b"\n" + body


@pytest.mark.slow
@pytest.mark.fault("O3")
async def test_a_reader_in_a_tight_loop_never_sees_a_partial_empty_or_missing_file(
    tmp_path: Path, daemons: Daemons
) -> None:
    """One file is replaced and published 1,000 times while another process opens its mirror as fast as it can.

    Every open finds the whole of one published content, and the last one in the end.
    """
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    source.mkdir()
    fresh, file, target = tmp_path / "fresh", source / "file", mirror / "file"
    file.write_bytes(generation(0))
    daemons.start("p", publish(source, extra="settle_ms = 0\n"))
    subscriber = daemons.start("s", subscribe(mirror, extra="settle_ms = 0\n"))
    await equal_trees(source, mirror)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        for number in range(1, GENERATIONS + 1):
            content = generation(number)
            fresh.write_bytes(content)
            fresh.replace(file)
            soon = time.monotonic() + 0.04
            while time.monotonic() < soon and target.stat().st_size != len(content):
                await asyncio.sleep(0.002)
        await equal_trees(source, mirror)
        await eventually(lambda: target.read_bytes() == generation(GENERATIONS))
        answer, _ = reader.communicate("stop", timeout=30)
    finally:
        reader.kill()
        reader.wait()
    told = json.loads(answer)
    mirrored = sum(event["placed"] for event in subscriber.events("mirrored"))
    print(told, mirrored)
    assert told["wrong"] == []
    assert told["seen"] > 100
    assert told["opened"] > 10 * told["seen"]
    assert told["last"] == f"{GENERATIONS:08d}"
    assert mirrored > GENERATIONS / 10
