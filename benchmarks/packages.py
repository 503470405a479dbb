"""Two successive releases of real packages, from the registry that pip is configured for; kept for later runs."""

from __future__ import annotations

import calendar
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

PIP_SECONDS = 300.0
PLATFORM = ("--platform", "manylinux2014_x86_64", "--implementation", "cp", "--python-version", "3.12")
"""The same wheels on every machine that measures."""


@dataclass(frozen=True)
class Update:
    """A package, and the two releases between which it is updated."""

    name: str
    project: str
    old: str
    new: str
    label: str


UPDATES = (
    Update("python", "Django", "5.2.7", "5.2.8", "Django 5.2.7 to 5.2.8 (pure Python)"),
    Update("binary", "numpy", "2.1.2", "2.1.3", "numpy 2.1.2 to 2.1.3 (binaries)"),
)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncd-benchmarks"


def fetch(update: Update, cache: Path) -> str:
    """Download both wheels unless they are there.

    :returns: "" when both are there, else why not.
    """
    for version in (update.old, update.new):
        directory = _directory(update, version, cache)
        if any(directory.glob("*.whl")):
            continue
        directory.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
            *PLATFORM, "--dest", str(directory), f"{update.project}=={version}",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"pip did not download {update.project} {version} within {PIP_SECONDS:g} s"
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            return f"pip download {update.project}=={version} failed: {lines[-1] if lines else done.returncode}"
    return ""


def unpack(update: Update, version: str, cache: Path, target: Path) -> Path:
    """Unpack a fetched wheel with the times that it holds, as ``unzip`` would."""
    wheel = next(_directory(update, version, cache).glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
        for member in archive.infolist():
            seconds = calendar.timegm(member.date_time)
            os.utime(target / member.filename, (seconds, seconds))
    return target


def _directory(update: Update, version: str, cache: Path) -> Path:
    return cache / f"{update.project}-{version}"
