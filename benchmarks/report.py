"""Figures as Markdown: tables between two markers of a document."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.world import MIB, Figures, percentile

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from benchmarks.cases import Scale

BEGIN = "<!-- benchmarks: begin -->"
END = "<!-- benchmarks: end -->"
AIM_UP, AIM_DOWN, AIM_SMALL, AIM_P50_MS, AIM_PEAK_MB = 3.0, 20.0, 5.0, 100.0, 150.0


def write(document: Path, text: str) -> None:
    """Replace what is between the markers.

    :raises SystemExit: the document has no markers.
    """
    old = document.read_text()
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{document} has no lines {BEGIN} and {END}")
    document.write_text(f"{head}{BEGIN}\n\n{text.strip()}\n\n{END}{tail}")


def render(figures: Figures, scale: Scale, machine: dict[str, Any], *, quick: bool) -> str:
    """Return all tables for which there are figures."""
    parts = [_machine(machine, quick=quick)]
    values = figures.values
    if "large.syncd.up.seconds" in values:
        parts.append(_large(figures, scale))
    if "small.syncd.up.seconds" in values:
        parts.append(_small(figures, scale))
    if "latency.ms" in values:
        parts.append(_latency(figures, scale))
    if "restart.publisher" in values:
        parts.append(_restart(figures, scale))
    if any(name.startswith("memory.") for name in values):
        parts.append(_memory(figures))
    return "\n\n".join(parts)


def _machine(it: dict[str, Any], *, quick: bool) -> str:
    text = (
        f"Measured on {it['date']}: {it['cpu']}, {it['cores']} cores, {it['memory_gib']} GiB, Linux {it['kernel']}, "
        f"{it['filesystem']}; Python {it['python']}, nats-server {it['nats_server']}, nats-py {it['nats_py']}; "
        f"loopback, file storage, one replica. Load before the run: {it['load']}."
    )
    return f"**A quick run on small data: these are no figures.**\n\n{text}" if quick else text


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _raw(values: Iterable[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _rate(figures: Figures, name: str, amount: float, unit: str) -> list[str]:
    seconds = figures.median(f"{name}.seconds")
    rate = amount / seconds
    return [
        f"{rate:,.0f} {unit}" if rate >= 10 else f"{rate:.1f} {unit}",
        f"{seconds:.2f}",
        f"{figures.median(f'{name}.wall'):.2f}",
        f"{figures.median(f'{name}.cpu'):.2f}",
        _raw(figures.values[f"{name}.seconds"]),
        _mb(statistics.median(figures.values[f"{name}.peak"])),
    ]


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def _aim(ratio: float, aim: float) -> str:
    return f"{ratio:.1f}x (aim {aim:g}x{'' if ratio >= aim else ', missed'})"


RATE_HEAD = ["", "rate", "seconds", "command, s", "CPU, s", "raw seconds", "peak MB", "syncd is"]


def _large(figures: Figures, scale: Scale) -> str:
    size, plain = scale.large / MIB, scale.slow_get / MIB
    rate = {way: size / figures.median(f"large.syncd.{way}.seconds") for way in ("up", "down")}
    up = size / figures.median("large.nats.up.seconds")
    into = size / figures.median("large.nats.down.seconds")
    get = plain / figures.median("large_plain.nats.down.seconds")
    rows = [
        ["syncd push", *_rate(figures, "large.syncd.up", size, "MiB/s"), ""],
        ["nats-py `put(file)`", *_rate(figures, "large.nats.up", size, "MiB/s"), _aim(rate["up"] / up, AIM_UP)],
        ["syncd pull", *_rate(figures, "large.syncd.down", size, "MiB/s"), ""],
        [
            f"nats-py `get()`, of {plain:.0f} MiB only",
            *_rate(figures, "large_plain.nats.down", plain, "MiB/s"),
            _aim(rate["down"] / get, AIM_DOWN),
        ],
        [
            "nats-py `get(writeinto=file)`",
            *_rate(figures, "large.nats.down", size, "MiB/s"),
            f"{rate['down'] / into:.1f}x",
        ],
    ]
    return (
        f"### One incompressible file of {size:,.0f} MiB\n\n{_table(RATE_HEAD, rows)}\n\n"
        f"nats-py's plain `get()` is quadratic in the size, so it was measured with {plain:.0f} MiB; with "
        f"{size:,.0f} MiB its rate would be lower still, and the ratio higher. The aim of {AIM_DOWN:g}x refers to it. "
        "`get(writeinto=)` is not quadratic."
    )


def _small(figures: Figures, scale: Scale) -> str:
    rows = []
    for label, way, loop in (("push", "up", "put"), ("pull", "down", "get")):
        ratio = figures.median(f"small.nats.{way}.seconds") / figures.median(f"small.syncd.{way}.seconds")
        rows.append([f"syncd {label}", *_rate(figures, f"small.syncd.{way}", scale.files, "files/s"), ""])
        nats = _rate(figures, f"small.nats.{way}", scale.files, "files/s")
        rows.append([f"nats-py `{loop}` loop", *nats, _aim(ratio, AIM_SMALL)])
    return f"### {scale.files:,} files of 100 B to 32 KiB, mean 8.6 KiB\n\n{_table(RATE_HEAD, rows)}"


def _latency(figures: Figures, scale: Scale) -> str:
    values = figures.values["latency.ms"]
    p50 = percentile(values, 50)
    row = [
        f"{p50:.0f} ms (aim {AIM_P50_MS:g}{'' if p50 < AIM_P50_MS else ', missed'})",
        *(f"{percentile(values, percent):.0f} ms" for percent in (90, 99)),
        f"{min(values):.0f} ms",
        f"{max(values):.0f} ms",
    ]
    return (
        f"### From an edit to the mirror, in a tree of {scale.tree:,} files\n\n"
        f"{_table(['p50', 'p90', 'p99', 'least', 'most'], [row])}\n\n"
        f"{len(values)} edits of 4 KiB, one at a time after random pauses of 0.05 to 5 s, default settings "
        "(the publisher waits 50 ms until a file is quiet, the subscriber 10 ms)."
    )


def _restart(figures: Figures, scale: Scale) -> str:
    rows = [
        [f"{role} daemon, start to in sync", f"{figures.median(name):.2f}", _raw(figures.values[name])]
        for role, name in (("publisher", "restart.publisher"), ("subscriber", "restart.subscriber"))
    ]
    rows += [
        [f"`syncd {way}`, whole command", f"{figures.median(name):.2f}", _raw(figures.values[name])]
        for way, name in (("push", "restart.push.wall"), ("pull", "restart.pull.wall"))
    ]
    return f"### Nothing changed, {scale.tree:,} files\n\n{_table(['', 'seconds', 'raw seconds'], rows)}"


def _memory(figures: Figures) -> str:
    roles = ("push", "pull", "publisher", "subscriber", "server")
    rows = []
    most = 0.0
    for name in dict.fromkeys(name.rpartition(".")[0] for name in figures.values if name.startswith("memory.")):
        _, kind, amount = name.split(".")
        label = f"one file of {int(amount) // MIB:,} MiB" if kind == "size" else f"{int(amount):,} files"
        peaks = [figures.median(f"{name}.{role}") for role in roles]
        most = max(most, *peaks[:-1])
        rows.append([label, *map(_mb, peaks)])
    verdict = "" if most < AIM_PEAK_MB * 1e6 else ", missed"
    head = ["first sync of", "`syncd push`", "`syncd pull`", "publisher daemon", "subscriber daemon", "nats-server"]
    return (
        f"### Peak memory, MB\n\n{_table(head, rows)}\n\n"
        f"The most resident memory of each process (VmHWM, 10^6 bytes). Most of syncd: {_mb(most)} MB "
        f"(aim {AIM_PEAK_MB:g}{verdict})."
    )
