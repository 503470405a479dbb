"""What the project wants to reach, judged by one run's figures. Aims without figures are not shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.figures import percentile
from benchmarks.packages import UPDATES
from benchmarks.trees import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.figures import Figures

AVERAGE_CHUNK = 128 * KIB
OTHERS = ("nats-py", "syncthing", "unison", "rclone")
OWN_PEAKS = (".syncd.push.command.peak", ".syncd.pull.command.peak", ".publisher.peak", ".subscriber.peak")
CPU_SLACK, BYTES_SLACK = 1.25, 1.05
"""What "independent of their number" may differ by: the clock of the kernel has ticks of 10 ms."""


@dataclass(frozen=True)
class Verdict:
    """One aim: its sentence, what was measured, and whether that is enough."""

    aim: str
    measured: str
    met: bool


def judge(figures: Figures, scale: Mapping[str, Any]) -> list[Verdict]:
    """All aims for which there are figures."""
    parts = (_first_syncs(figures), _fan_out(figures), _packages(figures), _delta(figures, scale), _daemons(figures))
    return [verdict for part in parts for verdict in part]


def down(figures: Figures, name: str) -> float:
    """Bytes of one synchronisation between the server or source and the destinations, both directions."""
    return figures.median(next(f"{name}.{leg}.wire" for leg in ("pull", "sync") if figures.has(f"{name}.{leg}.wire")))


def _ratio(aim: str, ratio: float, most: float) -> Verdict:
    return Verdict(f"{aim}: at most {most:g}x", f"{ratio:.2f}x", ratio <= most)


def _first_syncs(figures: Figures) -> Iterator[Verdict]:
    for case, text, most in (("large", "the large file", 3.0), ("small", "small files", 1.8)):
        ours, rsync = f"{case}.syncd.seconds", f"{case}.rsync.seconds"
        if figures.has(ours, rsync):
            yield _ratio(f"First sync of {text}, time beside rsync", figures.ratio(ours, rsync), most)
        others = [name for name in OTHERS if figures.has(ours, f"{case}.{name}.seconds")]
        if others:
            seconds = {name: figures.median(f"{case}.{name}.seconds") for name in others}
            fastest = min(seconds, key=seconds.__getitem__)
            measured = f"{figures.median(ours):.2f} s; {fastest}, the fastest of them, {seconds[fastest]:.2f} s"
            met = figures.median(ours) < seconds[fastest]
            yield Verdict(f"First sync of {text}: ahead of {', '.join(others)}", measured, met)


def _fan_out(figures: Figures) -> Iterator[Verdict]:
    rsync = "eight.rsync.seconds"
    if figures.has("fleet.8.seconds", rsync):
        ratio = figures.ratio("fleet.8.seconds", rsync)
        yield _ratio("Eight destinations, daemons, time beside eight rsyncs", ratio, 2.0)
    if figures.has("eight.syncd.seconds", rsync):
        ratio = figures.ratio("eight.syncd.seconds", rsync)
        yield _ratio("Eight destinations, one-shot commands, time beside eight rsyncs", ratio, 2.0)
    for what, most in (("cpu", CPU_SLACK), ("wire", BYTES_SLACK)):
        eight, one = (f"fleet.{count}.publisher.{what}" for count in (8, 1))
        if figures.has(eight, one):
            text = {"cpu": "processor time", "wire": "bytes"}[what]
            yield _ratio(f"The publisher's {text} with eight subscribers beside one", figures.ratio(eight, one), most)


def _packages(figures: Figures) -> Iterator[Verdict]:
    for update in UPDATES:
        for kind, most in (("first", 1.15), ("update", 2.0)):
            name = f"packages_{update.name}_{kind}"
            ours, theirs = f"{name}.syncd", f"{name}.rsync-z"
            if figures.has(f"{ours}.seconds", f"{theirs}.seconds"):
                wire = max(down(figures, ours), figures.median(f"{ours}.push.wire"))
                text = f"{update.project}, {'first sync' if kind == 'first' else 'update'}"
                ratio = wire / down(figures, theirs)
                yield _ratio(f"{text}: bytes, up or down, beside `rsync -z`", ratio, most)


def _delta(figures: Figures, scale: Mapping[str, Any]) -> Iterator[Verdict]:
    cases = (
        ("delta_insert", "1 MiB inserted at the front", 1.3, MIB + 2 * AVERAGE_CHUNK),
        ("delta_runs", f"{scale['runs']} runs of 64 KiB", 3.0, 2 * AVERAGE_CHUNK * scale["runs"]),
        ("delta_scattered", f"{scale['scattered']} runs of 4 KiB", None, 2 * AVERAGE_CHUNK * scale["scattered"]),
    )
    for case, text, most, upload in cases:
        ours = f"{case}.syncd"
        if not figures.has(f"{ours}.seconds"):
            continue
        wire = down(figures, ours)
        if most and figures.has(f"{case}.rsync.seconds"):
            yield _ratio(f"{text}: bytes to a destination beside rsync", wire / down(figures, f"{case}.rsync"), most)
        if not most and figures.has(f"{case}.syncthing.seconds"):
            theirs = down(figures, f"{case}.syncthing")
            measured = f"{wire / 1e6:.1f} MB; {theirs / 1e6:.1f} MB"
            yield Verdict(f"{text}: fewer bytes to a destination than Syncthing", measured, wire < theirs)
        up = figures.median(f"{ours}.push.wire")
        limit = f"at most {upload / 1e6:.1f} MB"
        yield Verdict(
            f"{text}: upload of about two average chunks per place, {limit}", f"{up / 1e6:.1f} MB", up <= upload
        )


def _daemons(figures: Figures) -> Iterator[Verdict]:
    if figures.has("latency.syncd.ms"):
        for percent, most in ((50, 60.0), (99, 200.0)):
            value = percentile(figures.values["latency.syncd.ms"], percent)
            yield Verdict(f"From an edit to the mirror, p{percent}: under {most:g} ms", f"{value:.0f} ms", value < most)
    restarts = {
        "`syncd push`": "restart.syncd.push.seconds",
        "`syncd pull`": "restart.syncd.pull.seconds",
        "both daemons": "restart_daemons.seconds",
    }
    known = {text: figures.median(name) for text, name in restarts.items() if figures.has(name)}
    if known:
        measured = ", ".join(f"{text} {seconds:.2f} s" for text, seconds in known.items())
        yield Verdict("Nothing changed, start of Python included: under 3 s", measured, max(known.values()) < 3.0)
    peaks = syncd_peaks(figures)
    if peaks:
        name = max(peaks, key=peaks.__getitem__)
        measured = f"{peaks[name] / 1e6:.0f} MB ({name})"
        yield Verdict("Peak memory of each process of syncd: under 150 MB", measured, peaks[name] < 150e6)


def syncd_peaks(figures: Figures) -> dict[str, float]:
    """Case and process -> the most memory that a process of syncd had there."""
    return {name.removesuffix(".peak"): figures.most(name) for name in figures.values if name.endswith(OWN_PEAKS)}
