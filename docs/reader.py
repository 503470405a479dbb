"""Check a tree out of a bucket of the generations layout; written from docs/format.md, without anything of syncd.

    python docs/reader.py --server nats://127.0.0.1:4222 BUCKET DIR [--channel head | --generation N]

Needs nats-py and blake3, and zstandard where a blob is compressed. DIR must not exist: the tree is built in
DIR.partial and renamed when all of it is there and verified. Exit code 1: something is not as the format says.
"""
# ruff: noqa: INP001, PLR2004, PTH101, PTH102, PTH211, ASYNC240, SIM905, TC003, PLC0415, PTH123, ASYNC230

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
from blake3 import blake3

BLOB_MAX, NODE_MAX, NODE_MIN = 524_288, 67_108_864, 13
FILE, DIRECTORY, SYMLINK = range(3)
BLOB, RECIPE, SLICE, BESIDE = range(4)
KEYS = set("added allowed bytes changed created expires files folder format note number parent".split())


def check(claim: object, complaint: str) -> None:
    """Refuse what a claim does not hold for."""
    if not claim:
        raise ValueError(complaint)


class Bucket:
    """Reads messages by direct get, and what is made of them."""

    def __init__(self, client: nats.NATS, name: str) -> None:
        self.client, self.name, self.kept = client, name, dict[bytes, bytes]()

    async def get(self, subject: str) -> bytes:
        """Return the last message of a subject."""
        subject = f"$O.{self.name}.{subject}"
        answer = await self.client.request(f"$JS.API.DIRECT.GET.OBJ_{self.name}.{subject}", b"", timeout=10)
        check("Status" not in (answer.headers or {}), f"there is no {subject}")
        return answer.data

    async def meta(self, name: str) -> Any:
        """Return the metadata of an object."""
        return json.loads(await self.get(f"M.{base64.urlsafe_b64encode(name.encode()).decode()}"))

    async def record(self, name: str) -> Any:
        """Return the record of a generation object."""
        meta = await self.meta(name)
        data = await self.get(f"C.{meta['nuid']}")
        digest = f"SHA-256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()}"
        check(meta["digest"] == digest and meta["size"] == len(data) <= 16_384, "the record is not the object's")
        found = json.loads(data)
        check(found["format"] == 1, f"format {found['format']} is not known")
        check(found.keys() == KEYS | {"publisher", "removed", "root", "tree"}, "the record has other fields")
        canonical = json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        check(canonical == data and name == f"generations/{found['number']:010d}", "the record is another one")
        check(found["folder"] == self.name, "the record is of another folder")
        check(NODE_MIN <= found["root"]["length"] <= NODE_MAX, "the root is of an impossible length")
        return found

    async def blob(self, digest: bytes) -> bytes:
        """Return a blob, verified; the last few are kept, since many contents come from one pack."""
        if digest not in self.kept:
            payload = await self.get(f"C.{digest.hex()}")
            check(payload[:1] in {b"\0", b"\1"}, f"blob {digest.hex()} is gone, or of an unknown codec")
            data = payload[1:]
            if payload[0]:
                import zstandard

                check(0 < zstandard.frame_content_size(data) <= BLOB_MAX, "a frame without a size that blobs have")
                data = zstandard.decompress(data, BLOB_MAX)
            check(len(data) <= BLOB_MAX and blake3(data).digest() == digest, f"blob {digest.hex()} is damaged")
            self.kept = dict(list(self.kept.items())[-31:]) | {digest: data}
        return self.kept[digest]

    async def content(self, where: int, blob: bytes, offset: int, size: int, below: int = 4) -> AsyncIterator[bytes]:
        """Yield the bytes at a location."""
        data = await self.blob(blob) if size else b""
        if where != RECIPE:
            check(offset + size <= len(data) if where == SLICE else size == len(data), "a blob has another length")
            yield data[offset : offset + size]
            return
        check(len(data) > 10 and len(data) % 40 == 10 and data[0] == 1, "a recipe is not readable")
        _, level, total = struct.unpack_from("<BBQ", data)
        listed = list(struct.iter_unpack("<32sQ", data[10:]))
        check(level < below and total == size == sum(length for _, length in listed), "a recipe does not fit")
        for digest, length in listed:
            check(0 < length <= (size if level else BLOB_MAX), "a piece does not fit")
            async for piece in self.content(RECIPE if level else BLOB, digest, 0, length, level):
                yield piece


def children(node: bytes, tree: bytes, pack: bytes) -> Iterator[tuple[Any, ...]]:
    """Yield name, kind, mode, mtime, digest or target, where, blob, offset, size of what is there."""
    version, count, size, packs = struct.unpack_from("<BIII", node)
    at = NODE_MIN + 32 * packs
    end = place = at + size
    check(version == 1 and count <= 1_000_000 and end <= len(node), "a directory node is not readable")
    check(blake3(node[at:end]).digest() == tree, "a directory node does not match its tree digest")
    last, used, table = b"", 0, [node[start : start + 32] for start in range(NODE_MIN, at, 32)]
    for _ in range(count):
        name_size, kind, mode, mtime, size = struct.unpack_from("<HBHqQ", node, at)
        name = node[at + 21 : at + 21 + name_size]
        at += 21 + name_size
        usable = name_size < 256 and re.fullmatch(r"(?!\.{1,2}\Z)[^/\0]+", name.decode())
        check(usable and last < name, f"the name {name!r}")
        check(kind <= SYMLINK and mode <= 0o7777 and size < (1 if kind else 1 << 63), "an unknown kind, mode or size")
        start, at = (at, at + 32) if kind != SYMLINK else (at + 2, at + 2 + struct.unpack_from("<H", node, at)[0])
        check(at <= end, "a directory node's lengths lie")
        last, digest = name, node[start:at]
        target = kind != SYMLINK or (mode == 0o777 and 0 < len(digest) < 4_096 and "\0" not in digest.decode())
        check(target, f"the symlink {name!r}")
        check(kind != FILE or (size == 0) == (digest == blake3(b"").digest()), "a file has the digest of another size")
        where, blob, offset = BLOB, digest, 0
        if kind == DIRECTORY or (kind == FILE and size):
            where, place = node[place], place + 1
            check(where <= (BESIDE if pack else SLICE), "an unknown location")
            if where == RECIPE or (where == BLOB and kind == DIRECTORY):
                blob, place = node[place : place + 32], place + 32
            elif where == SLICE:
                number, offset = struct.unpack_from("<II", node, place)
                check(number <= used, "packs are not listed in the order of their use")
                used, blob, place = max(used, number + 1), table[number], place + 8
            elif where == BESIDE:
                (offset,), blob, where, place = struct.unpack_from("<I", node, place), pack, SLICE, place + 4
            if kind == DIRECTORY:
                (size,), place = struct.unpack_from("<I", node, place), place + 4
                check(NODE_MIN <= size <= NODE_MAX, "a directory node of an impossible length")
            check(place <= len(node) and (where == RECIPE or offset + size <= BLOB_MAX), "a location that no blob has")
        yield name, kind, mode, mtime, digest, where, blob, offset, size
    check(at == end and place == len(node) and used == packs == len(set(table) - {pack}), "a node with a remainder")


async def checkout(bucket: Bucket, record: dict[str, Any], base: bytes) -> None:
    """Write a tree below a directory that is made for it: every directory in it is ours, so nothing leads outside."""
    root = record["root"]
    place = ("blob", "recipe", "pack").index(root["where"]), bytes.fromhex(root["blob"]), root["offset"], root["length"]
    waiting, made = [(b"", bytes.fromhex(record["tree"]), place)], []
    os.mkdir(base, 0o700)
    while waiting:
        above, tree, place = waiting.pop()
        node = b"".join([data async for data in bucket.content(*place)])
        for name, kind, mode, mtime, digest, *at in list(children(node, tree, place[1] if place[0] == SLICE else b"")):
            path, target = above + name, base + b"/" + above + name
            check(b".syncd" not in path.lower().split(b"/") and len(path) <= 2_800, f"the path {path!r}")
            if kind == DIRECTORY:
                os.mkdir(target, 0o700)
                made.append((target, mode, mtime))
                waiting.append((path + b"/", digest, tuple(at)))
            elif kind == FILE:
                hasher = blake3()
                with open(target, "xb") as file:
                    async for data in bucket.content(*at):
                        hasher.update(data)
                        file.write(data)
                    os.fchmod(file.fileno(), mode)
                check(hasher.digest() == digest, f"the content of {path!r} does not match its digest")
            else:
                os.symlink(digest, target)
            os.utime(target, ns=(mtime, mtime), follow_symlinks=False)
    for target, mode, mtime in reversed(made):  # children before parents: a child that is written changes a time
        os.utime(target, ns=(mtime, mtime))
        os.chmod(target, mode)


async def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says."""
    async with await nats.connect(arguments.server, allow_reconnect=False) as client:
        bucket, name = Bucket(client, arguments.bucket), f"generations/{arguments.generation:010d}"
        if not arguments.generation:
            link = (await bucket.meta(f"channels/{arguments.channel}"))["options"]["link"]
            check(link["bucket"] == bucket.name and (name := link["name"]), "the channel leads to another bucket")
        partial = Path(f"{arguments.directory}.partial")
        await checkout(bucket, await bucket.record(name), os.fsencode(partial))
        partial.rename(arguments.directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", default="nats://127.0.0.1:4222")
    parser.add_argument("--channel", default="head")
    parser.add_argument("--generation", type=int, default=0)
    parser.add_argument("bucket")
    parser.add_argument("directory", type=Path)
    try:
        asyncio.run(run(parser.parse_args()))
    except Exception as error:  # noqa: BLE001 - whatever the bucket holds, the answer is one line
        sys.exit(f"refused: {type(error).__name__}: {error}")
