"""Figures as Markdown: tables between two markers of a document, and a plot beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import aims, plot
from benchmarks.figures import Figures, percentile
from benchmarks.packages import UPDATES
from benchmarks.peers import PEERS
from benchmarks.trees import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

BEGIN = "<!-- benchmarks: begin -->"
END = "<!-- benchmarks: end -->"
PLOT = "performance.svg"
HEAD = (
    "", "seconds", "push + pull", "beside rsync", "CPU, s", "MB up", "MB per destination", "peak MB", "server MB",
    "raw seconds",
)  # fmt: skip

COUNTED = """\
* *seconds* are of whole commands, from their start to their end, the start of Python included; for syncd and the
  nats-py loop the push and the pull are added. Medians; *raw seconds* stand at the end of a row.
* *MB* are 10^6 bytes on the loopback interface of the run's own network namespace while the tool worked: both
  directions, with the headers of TCP and IP, counted by the kernel for all tools alike. *up* is the push.
* *CPU* is of all processes of a tool, servers included. *peak* is the most resident memory (VmHWM) of the largest
  command, *server* that of nats-server, or of the tool's daemon at the source.
* Syncthing's seconds are those from the moment its running instances are told to begin to the last file in place."""


def write(document: Path, text: str, run: dict[str, Any]) -> None:
    """Replace what is between the markers, and draw the plot.

    :raises SystemExit: the document has no markers.
    """
    old = document.read_text()
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{document} has no lines {BEGIN} and {END}")
    picture = f"![Seconds and bytes of syncd and its peers]({PLOT})\n\n"
    plot.draw(Figures(run["values"]), document.with_name(PLOT))
    document.write_text(f"{head}{BEGIN}\n\n{picture}{text.strip()}\n\n{END}{tail}")


def render(run: dict[str, Any]) -> str:
    """Return all tables for which there are figures."""
    figures, scale = Figures(run["values"], run["notes"]), run["scale"]
    parts = [_machine(run), _aims(figures, scale)]
    parts += [_syncs(figures, case, title) for case, title in titles(scale).items()]
    parts += [_fleet(figures), _latency(figures, scale), _restart(figures, scale), _memory(figures, scale)]
    return "\n\n".join(part for part in parts if part)


def titles(scale: dict[str, Any]) -> dict[str, str]:
    """What each synchronisation is called."""
    size = f"{scale['delta'] // MIB:,} MiB"
    found = {
        "large": f"First sync: one incompressible file of {scale['large'] // MIB:,} MiB",
        "small": f"First sync: {scale['files']:,} files of 100 B to 32 KiB, mean 8.6 KiB",
        "eight": f"First sync to eight destinations at once: {scale['mixed'] // MIB:,} MiB in small and large files",
    }
    for update in UPDATES:
        found[f"packages_{update.name}_first"] = f"First sync: {update.project} {update.old}, the unpacked wheel"
        found[f"packages_{update.name}_update"] = f"Update: {update.label}"
    return found | {
        "delta_runs": f"{size}, of which {scale['runs']} runs of 64 KiB changed",
        "delta_scattered": f"{size}, of which {scale['scattered']} runs of 4 KiB changed",
        "delta_insert": f"{size}, with 1 MiB inserted at the front",
    }


def _machine(run: dict[str, Any]) -> str:
    it, startup = run["machine"], run["values"].get("startup.syncd.seconds")
    text = (
        f"Measured on {it['date']}: {it['cpu']}, {it['cores']} cores, {it['memory_gib']} GiB, Linux {it['kernel']}, "
        f"{it['filesystem']}; Python {it['python']}, nats-server {it['nats_server']}, nats-py {it['nats_py']}, "
        f"layout {run['layout']}; loopback, file storage, one replica. Load before the run: {it['load']}."
    )
    if run["quick"]:
        text = f"**A quick run on small data: these are no figures.**\n\n{text}"
    if startup:
        text += f" `syncd --version`, which every command of syncd pays for first: {min(startup):.2f} s."
    return "\n\n".join([text, *run["notes"], COUNTED])


def _aims(figures: Figures, scale: dict[str, Any]) -> str:
    rows = [(one.aim, one.measured, "met" if one.met else "**missed**") for one in aims.judge(figures, scale)]
    return f"### Aims\n\n{_table(('aim', 'measured', ''), rows)}" if rows else ""


def _syncs(figures: Figures, case: str, title: str) -> str:
    """One workload: a row per tool, the fastest first."""
    names = [name for name in PEERS if figures.has(f"{case}.{name}.seconds")]
    names.sort(key=lambda name: figures.median(f"{case}.{name}.seconds"))
    count = 8 if case == "eight" else 1
    rows = [_sync_row(figures, case, name, count) for name in names]
    return f"### {title}\n\n{_table(HEAD, rows)}" if rows else ""


def _sync_row(figures: Figures, case: str, peer: str, count: int) -> list[str]:
    name, rsync = f"{case}.{peer}", f"{case}.rsync.seconds"
    seconds, pushes = f"{name}.seconds", f"{name}.push"
    split = up = ""
    if figures.has(f"{pushes}.seconds"):
        split = f"{figures.median(f'{pushes}.seconds'):.2f} + {figures.median(f'{name}.pull.seconds'):.2f}"
        up = _megabytes(figures.median(f"{pushes}.wire"))
    wire = "" if figures.has(f"{name}.copy.wire") else _megabytes(aims.down(figures, name) / count)
    label = PEERS[peer].label
    return [
        f"**{label}**" if peer == "syncd" else label,
        f"{figures.median(seconds):.2f}",
        split,
        f"{figures.ratio(seconds, rsync):.2f}x" if figures.has(rsync) else "",
        f"{figures.median(f'{name}.cpu'):.2f}",
        up,
        wire,
        _peak(figures, name, ("command",)),
        _peak(figures, name, ("server", "source")),
        _raw(figures.values[seconds]),
    ]


def _peak(figures: Figures, name: str, roles: Iterable[str]) -> str:
    endings = tuple(f".{role}.peak" for role in roles)
    found = [figures.most(one) for one in figures.values if one.startswith(f"{name}.") and one.endswith(endings)]
    return f"{max(found) / 1e6:.0f}" if found and max(found) else ""


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}" if size < 1e7 else f"{size / 1e6:.1f}"


def _fleet(figures: Figures) -> str:
    rows = [
        [
            count,
            f"{figures.median(f'fleet.{count}.seconds'):.2f}",
            f"{figures.median(f'fleet.{count}.publisher.cpu'):.2f}",
            _megabytes(figures.median(f"fleet.{count}.publisher.wire")),
        ]
        for count in ("1", "8")
        if figures.has(f"fleet.{count}.seconds")
    ]
    if not rows:
        return ""
    head = ("subscribers", "seconds to the last mirror", "publisher's CPU, s", "publisher's MB")
    return (
        f"### The same tree, running daemons\n\n{_table(head, rows)}\n\n"
        "The tree appears in the source by one rename. The publisher's bytes are those that nats-server counted on its "
        "connections, in and out."
    )


def _latency(figures: Figures, scale: dict[str, Any]) -> str:
    rows = []
    for name, label in (("syncd", "**two syncd daemons**"), ("lsyncd", PEERS["lsyncd"].label)):
        if figures.has(f"latency.{name}.ms"):
            values = figures.values[f"latency.{name}.ms"]
            shown = [*(percentile(values, percent) for percent in (50, 90, 99)), min(values), max(values)]
            rows.append([label, *(f"{value:.0f} ms" for value in shown)])
    if not rows:
        return ""
    low, high = scale["pause"]
    return (
        f"### From an edit to the mirror, in a tree of {scale['tree']:,} files\n\n"
        f"{_table(('', 'p50', 'p90', 'p99', 'least', 'most'), rows)}\n\n"
        f"{scale['edits']} edits of 4 KiB ({scale['edits_beside']} with lsyncd), one at a time after random pauses of "
        f"{low:g} to {high:g} s, default settings."
    )


def _restart(figures: Figures, scale: dict[str, Any]) -> str:
    names = [name for name in PEERS if figures.has(f"restart.{name}.seconds")]
    rows = []
    for name in names:
        legs = [leg for leg in ("push", "pull") if figures.has(f"restart.{name}.{leg}.seconds")]
        if name == "syncd":
            rows += [_restart_row(f"`syncd {leg}`", figures.values[f"restart.{name}.{leg}.seconds"]) for leg in legs]
        else:
            rows.append(_restart_row(PEERS[name].label, figures.values[f"restart.{name}.seconds"]))
    if figures.has("restart_daemons.seconds"):
        rows.append(_restart_row("both syncd daemons, start to in sync", figures.values["restart_daemons.seconds"]))
    title = f"### Nothing changed, {scale['restart_files']:,} files"
    return f"{title}\n\n{_table(('', 'seconds', 'raw seconds'), rows)}" if rows else ""


def _restart_row(label: str, values: list[float]) -> list[str]:
    return [label, f"{percentile(values, 50):.2f}", _raw(values)]


def _memory(figures: Figures, scale: dict[str, Any]) -> str:
    """The daemons of every case; the commands' peaks stand in the tables above."""
    cases = {
        "fleet.8": "eight subscribers, the tree above",
        "latency": f"{scale['tree']:,} files, then edits",
        "restart_daemons": f"first sync of {scale['restart_files']:,} files",
        "memory": f"first sync of one file of {scale['memory_size'] // MIB:,} MiB",
    }
    rows = [
        [text, *(f"{figures.most(f'{case}.{role}.peak') / 1e6:.0f}" for role in ("publisher", "subscriber", "server"))]
        for case, text in cases.items()
        if figures.has(f"{case}.publisher.peak")
    ]
    head = ("", "publisher", "subscriber", "nats-server")
    return f"### Peak memory of the daemons, MB\n\n{_table(head, rows)}" if rows else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _raw(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
