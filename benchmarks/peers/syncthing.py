"""Syncthing: one instance per side, told of each other, no discovery and no relays.

Destinations are done when every file has the size and the time of its source: Syncthing gives a file both by one
rename after it has checked the content.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.request
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.peers.base import DELTA, EIGHT, FIRST, PACKAGES, Peer, Session
from benchmarks.peers.waiting import SYNC_SECONDS, stamps, wait_for, wait_for_port, wait_for_stamps
from benchmarks.processes import measured, service
from tests.support.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.processes import Legs
    from benchmarks.world import World

FOLDER = "bench"
KEY = "benchmark"


@dataclass
class Instance:
    """One Syncthing with one folder."""

    home: Path
    folder: Path
    gui: int = field(default_factory=free_port)
    port: int = field(default_factory=free_port)
    device: str = ""
    pid: int = 0
    _running: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def generate(self) -> None:
        """Make keys; the device's name is their fingerprint."""
        self.home.mkdir(parents=True)
        self.folder.mkdir(exist_ok=True)
        command = ["syncthing", "generate", "--no-default-folder", "--skip-port-probing", f"--home={self.home}"]
        subprocess.run(command, check=True, capture_output=True)
        device = ET.parse(self.home / "config.xml").find("device")
        assert device is not None
        self.device = device.attrib["id"]

    def configure(self, others: Sequence[Instance], kind: str, *, paused: bool) -> None:
        """Share the folder with the others, and with nobody else."""
        tree = ET.parse(self.home / "config.xml")
        root = tree.getroot()
        for tag in ("device", "folder", "gui", "options"):
            for element in root.findall(tag):
                root.remove(element)
        folder = ET.SubElement(
            root, "folder", id=FOLDER, label=FOLDER, path=str(self.folder), type=kind,
            rescanIntervalS="3600", fsWatcherEnabled="false",
        )  # fmt: skip
        ET.SubElement(folder, "paused").text = str(paused).lower()
        for one in (self, *others):
            ET.SubElement(folder, "device", id=one.device)
            device = ET.SubElement(root, "device", id=one.device, name=one.home.name)
            ET.SubElement(device, "address").text = f"tcp://127.0.0.1:{one.port}"
        gui = ET.SubElement(root, "gui", enabled="true", tls="false")
        ET.SubElement(gui, "address").text = f"127.0.0.1:{self.gui}"
        ET.SubElement(gui, "apikey").text = KEY
        options = ET.SubElement(root, "options")
        for name, value in {
            "listenAddress": f"tcp://127.0.0.1:{self.port}",
            "globalAnnounceEnabled": "false",
            "localAnnounceEnabled": "false",
            "relaysEnabled": "false",
            "natEnabled": "false",
            "startBrowser": "false",
            "urAccepted": "-1",
            "autoUpgradeIntervalH": "0",
            "crashReportingEnabled": "false",
            "reconnectionIntervalS": "1",
        }.items():
            ET.SubElement(options, name).text = value
        tree.write(self.home / "config.xml")

    def start(self) -> None:
        command = ["syncthing", "serve", "--no-browser", "--no-restart", "--no-upgrade", f"--home={self.home}"]
        log = self.home / "syncthing.log"
        self.pid = self._running.enter_context(service(command, log, HOME=str(self.home))).pid

    def stop(self) -> None:
        self._running.close()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.gui}/rest/{path}",
            method=method,
            headers={"X-API-Key": KEY},
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=SYNC_SECONDS) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def connected(self, count: int) -> bool:
        found = self.call("GET", "system/connections")["connections"]
        return sum(one["connected"] for one in found.values()) == count


@dataclass
class SyncthingSession(Session):
    source: Instance
    targets: list[Instance]
    started: bool = False

    def start(self) -> None:
        for one in (self.source, *self.targets):
            one.start()
        for one in (self.source, *self.targets):
            wait_for_port(one.gui)

    def wait_connected(self) -> None:
        wait_for(lambda: self.source.connected(len(self.targets)), "Syncthing to connect", SYNC_SECONDS)

    def sync(self) -> Legs:
        with measured(self._services()) as leg:
            if self.started:
                self.source.call("POST", f"db/scan?folder={FOLDER}")
            else:
                self.source.call("PATCH", f"config/folders/{FOLDER}", {"paused": False})
            self.started = True
            wanted = stamps(self.source.folder)
            for target in self.targets:
                wait_for_stamps(target.folder, wanted)
        return {"sync": leg}

    def _services(self) -> dict[str, list[int]]:
        return {"source": [self.source.pid], "command": [one.pid for one in self.targets]}


class Syncthing(Peer):
    name = "syncthing"
    label = "Syncthing"
    programs = ("syncthing",)
    cases = FIRST | PACKAGES | DELTA | EIGHT
    slow = True

    @contextlib.contextmanager
    def session(self, world: World, source: Path, targets: Sequence[Path]) -> Iterator[Session]:
        directory = world.new("syncthing")
        first = Instance(directory / "source", source)
        others = [Instance(directory / f"target-{number}", target) for number, target in enumerate(targets)]
        (source / ".stfolder").mkdir(exist_ok=True)
        for one in (first, *others):
            one.generate()
        first.configure(others, "sendonly", paused=True)
        for one in others:
            (one.folder / ".stfolder").mkdir(exist_ok=True)
            one.configure([first], "receiveonly", paused=False)
        session = SyncthingSession(first, others)
        try:
            session.start()
            session.wait_connected()
            yield session
        finally:
            for one in (first, *others):
                one.stop()
            shutil.rmtree(source / ".stfolder")
