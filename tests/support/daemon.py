"""A syncd daemon of the test's own, as a separate process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Daemon:
    """``python -m syncd`` with a configuration in a directory of its own; its log is kept as JSON lines."""

    def __init__(self, directory: Path, config: str, **environ: str) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.config = directory / "syncd.toml"
        self.write_config(config)
        self.log = directory / "syncd.log"
        self.environ = environ
        self.process: subprocess.Popen[bytes] | None = None

    def write_config(self, config: str) -> None:
        head = f'[daemon]\nstate_dir = "{self.directory / "state"}"\nlog_format = "json"\n'
        self.config.write_text(head + config)

    def start(self, **environ: str) -> Daemon:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "syncd", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=os.environ | self.environ | environ,
                cwd=self.directory,
            )
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, seconds: float = 10.0) -> int:
        """SIGTERM; the exit code. Still there after ``seconds``: a failure with the log's end."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"did not end within {seconds} s: {self.log.read_text()[-3000:]}") from None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def wait(self, seconds: float = 30.0) -> int:
        assert self.process is not None
        code = self.process.wait(seconds)
        self.process = None
        return code

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        found = []
        for line in self._lines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if name is None or event.get("event") == name:
                found.append(event)
        return found

    def _lines(self) -> Iterator[str]:
        if self.log.exists():
            yield from self.log.read_text().splitlines()

    def wait_event(self, name: str, *, count: int = 1, seconds: float = 30.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            found = self.events(name)
            if len(found) >= count:
                return found[count - 1]
            ended = self.process is None or self.process.poll() is not None
            assert not ended, f"the daemon ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no {name} within {seconds} s: {self.log.read_text()[-3000:]}"
            time.sleep(0.02)

    def status(self) -> dict[str, dict[str, Any]]:
        """Role-folder -> status, as the daemon wrote it."""
        found = {}
        for file in (self.directory / "state" / "status").glob("[!.]*.json"):
            try:
                data = json.loads(file.read_text())
            except FileNotFoundError:  # a folder that was taken out of the configuration meanwhile
                continue
            if "role" in data:
                found[f"{data['role']}-{data['folder']}"] = data
        return found

    def run(self, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """One command with this configuration."""
        return subprocess.run(
            [sys.executable, "-m", "syncd", *arguments, "--config", str(self.config)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | self.environ,
            check=False,
        )
