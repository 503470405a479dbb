"""A real filesystem whose power is cut: a loop device, and the kernel's own way to drop what was not written.

The shutdown ioctl (ext4, XFS and F2FS have it for exactly this) stops a mounted filesystem at once. What was not
written to its device by then is lost; with ``journal=True`` the journal is written first, so that names are kept whose
bytes are not. Mounting it again replays the journal, as after a real power cut. It takes root, loop devices and mkfs;
:func:`why_not` says what is missing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Self

SHUTDOWN = 0x8004587D
_WITH_JOURNAL, _WITHOUT = struct.pack("I", 1), struct.pack("I", 2)

QUIET_EXT4 = "commit=600"  # the journal is written when somebody asks for it, not after some seconds
KINDS: dict[str, tuple[list[str], str, int]] = {
    "ext4": (["mkfs.ext4", "-q", "-F"], QUIET_EXT4, 24),
    "ext4, careless": (["mkfs.ext4", "-q", "-F"], f"{QUIET_EXT4},data=writeback,noauto_da_alloc", 24),
    "xfs": (["mkfs.xfs", "-q", "-f"], "", 320),
}
"""The command that makes it, the options of its mount, and MiB of the (sparse) image."""


def _run(*command: str | Path) -> str:
    """Run a program of the system; return what went wrong, "" for nothing."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    return "" if done.returncode == 0 else done.stderr.strip() or f"{command[0]}: exit code {done.returncode}"


class LossyDisk:
    """A filesystem of its own in an image file.

    Each mount is of a file of its own: a loop device goes away some time after its filesystem is unmounted, perhaps
    late (another mount namespace may hold it), and until then the kernel gives out the filesystem that was stopped.

    :ivar root: where it is mounted.
    """

    def __init__(self, directory: Path, kind: str) -> None:
        self.root = directory / "mounted"
        self._image = directory / "image"
        self._saved = directory / "image.saved"
        self._make, self._options, self._size = KINDS[kind]
        self._mounted = False
        self._copies = 0

    def make(self) -> Self:
        """Make the filesystem and mount it.

        :raises OSError: that is not possible here.
        """
        self.root.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(self._size * 1024 * 1024)
        failure = _run(*self._make, self._image)
        if failure:
            raise OSError(failure)
        self._mount(self._image)
        return self

    def _mount(self, image: Path) -> None:
        """Mount a copy of an image, which replays its journal."""
        self._copies += 1
        fresh = self._image.with_name(f"image.{self._copies}")
        failure = _run("cp", "--sparse=always", image, fresh)
        failure = failure or _run("mount", "-o", ",".join(filter(None, ["loop", self._options])), fresh, self.root)
        if failure:
            raise OSError(failure)
        self._image.unlink()
        self._image = fresh
        self._mounted = True

    def cut(self, *, journal: bool) -> None:
        """Cut the power, and mount it again: what is not on the device by now is lost.

        :param journal: names may be kept whose bytes are lost.
        :raises OSError: this filesystem cannot be stopped.
        """
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, _WITH_JOURNAL if journal else _WITHOUT)
        finally:
            os.close(fd)
        self.unmount()
        self._mount(self._image)

    def unmount(self) -> None:
        """Take it away; nothing happens where it is not mounted."""
        if self._mounted:
            self._mounted = False
            failure = _run("umount", self.root)
            if failure:
                _run("umount", "--lazy", self.root)  # nothing stays behind, whatever comes of the test
            assert not failure, failure

    def save(self) -> None:
        """Remember the state that it has now, all of it written."""
        self.unmount()
        failure = _run("cp", "--sparse=always", self._image, self._saved)
        assert not failure, failure
        self._mount(self._image)

    def remove(self) -> None:
        """Give it back."""
        self.unmount()
        self._image.unlink(missing_ok=True)
        self._saved.unlink(missing_ok=True)

    def restore(self) -> None:
        """Go back to what was remembered."""
        self.unmount()
        self._mount(self._saved)


@cache
def why_not(kind: str) -> str:
    """Say why such a filesystem cannot be had here, "" where it can."""
    program = KINDS[kind][0][0]
    if os.geteuid() != 0:
        return "only root may mount filesystems"
    if shutil.which(program) is None:
        return f"there is no {program}"
    with tempfile.TemporaryDirectory() as directory:
        disk = LossyDisk(Path(directory) / "try", kind)
        try:
            disk.make()
            disk.cut(journal=False)
        except OSError as exc:
            return f"{kind}: {exc}"
        finally:
            disk.remove()
    return ""
