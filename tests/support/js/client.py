"""The JavaScript client (@nats-io/obj) as a Python object: driver.js in a node process, JSON lines on its pipes.

The packages are installed outside the repository, once per test session; npm's own cache serves the next ones.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
INSTALL_SECONDS = 100
CALL_SECONDS = 15.0
LINE_BYTES = 64 * 1024 * 1024


class JsError(Exception):
    """What the JavaScript client said."""


def missing() -> str:
    """Why the JavaScript client cannot be run here; "" if it can."""
    absent = [program for program in ("node", "npm") if shutil.which(program) is None]
    return f"{' and '.join(absent)} not on PATH: the JavaScript client is not tested here" if absent else ""


def install(directory: Path) -> Path:
    """Install the packages into ``directory`` (outside the repository); the driver's path."""
    for name in ("package.json", ".npmrc", "driver.js"):
        shutil.copy(HERE / name, directory / name)
    done = subprocess.run(
        ["npm", "install", "--prefer-offline", "--no-progress"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"npm install failed:\n{done.stdout}{done.stderr}"
    return directory / "driver.js"


class JsClient:
    """An async context manager; every call has a deadline."""

    def __init__(self, driver: Path, url: str) -> None:
        self._driver = driver
        self._url = url
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._updates: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._process: asyncio.subprocess.Process
        self._reader: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            "node",
            str(self._driver),
            self._url,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )
        ready = self._answers[0] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())
        await asyncio.wait_for(ready, CALL_SECONDS)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), CALL_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if "watch" in message:
                self._updates.setdefault(message["watch"], asyncio.Queue()).put_nowait(message)
                continue
            answer = self._answers.pop(message.get("id", 0))
            if answer.done():  # given up
                continue
            if "error" in message:
                answer.set_exception(JsError(message["error"]))
            else:
                answer.set_result(message.get("value"))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(JsError("the node process ended"))

    async def _ask(self, op: str, bucket: str, fields: dict[str, Any]) -> tuple[int, asyncio.Future[Any]]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        request = {"id": number, "op": op, "bucket": bucket, **fields}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        await self._process.stdin.drain()
        return number, answer

    async def call(self, op: str, bucket: str = "", *, seconds: float = CALL_SECONDS, **fields: Any) -> Any:
        """One operation of driver.js.

        :raises JsError: it failed. :raises TimeoutError: it did not answer.
        """
        async with asyncio.timeout(seconds):
            _, answer = await self._ask(op, bucket, fields)
            return await answer

    async def put(self, bucket: str, name: str, data: bytes, **meta: Any) -> dict[str, Any]:
        info: dict[str, Any] = await self.call("put", bucket, name=name, data=base64.b64encode(data).decode(), **meta)
        return info

    async def get(self, bucket: str, name: str, *, seconds: float = CALL_SECONDS) -> bytes | None:
        """The content; ``None`` where there is no such object."""
        data = await self.call("get", bucket, name=name, seconds=seconds)
        return None if data is None else base64.b64decode(data)

    async def info(self, bucket: str, name: str) -> dict[str, Any] | None:
        info: dict[str, Any] | None = await self.call("info", bucket, name=name)
        return info

    async def list(self, bucket: str) -> list[dict[str, Any]]:
        infos: list[dict[str, Any]] = await self.call("list", bucket)
        return infos

    async def watch(self, bucket: str, **options: Any) -> JsWatch:
        """Begin to watch; it listens when this returns."""
        async with asyncio.timeout(CALL_SECONDS):
            number, answer = await self._ask("watch", bucket, {"options": options})
            updates = self._updates.setdefault(number, asyncio.Queue())
            await answer
        return JsWatch(updates)


class JsWatch:
    """What ``watch()`` yields."""

    def __init__(self, queue: asyncio.Queue[dict[str, Any]]) -> None:
        self._queue = queue

    async def next(self, seconds: float = CALL_SECONDS) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            message = await self._queue.get()
        if "error" in message:
            raise JsError(message["error"])
        info: dict[str, Any] = message["info"]
        return info

    async def until(self, name: str, seconds: float = CALL_SECONDS) -> dict[str, Any]:
        """Skip updates up to the one of ``name``."""
        async with asyncio.timeout(seconds):
            while (info := await self.next(seconds))["name"] != name:
                continue
        return info
