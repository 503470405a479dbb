"""The picture: seconds and bytes of every tool, one group of bars per workload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import aims
from benchmarks.peers import PEERS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.figures import Figures

COLOURS = {
    "syncd": "#c1272d",
    "rsync": "#1f4e79",
    "rsync-z": "#4f81bd",
    "rsync-whole": "#9dc3e6",
    "cp": "#7f7f7f",
    "nats-py": "#e69f00",
    "syncthing": "#009e73",
    "unison": "#8064a2",
    "rclone": "#b5a642",
}
TIMES = {
    "large": "large file",
    "small": "small files",
    "eight": "to eight",
    "packages_python_update": "Python update",
    "packages_binary_update": "binary update",
    "delta_runs": "64 KiB runs",
    "delta_scattered": "4 KiB runs",
    "delta_insert": "insertion",
    "restart": "nothing changed",
}
BYTES = {
    "packages_python_first": "Python, first",
    "packages_python_update": "Python, update",
    "packages_binary_first": "binary, first",
    "packages_binary_update": "binary, update",
    "delta_runs": "64 KiB runs",
    "delta_scattered": "4 KiB runs",
    "delta_insert": "insertion",
}
WIDTH = 0.8
"""Of a group, in units of the axis."""


def draw(figures: Figures, file: Path) -> None:
    """Write the picture as SVG; the same figures give the same bytes."""
    import matplotlib as mpl  # noqa: PLC0415 - large, and only wanted here

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "syncd", "font.size": 8, "axes.axisbelow": True})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (above, below) = plt.subplots(2, figsize=(10, 6.4), layout="constrained")
    used = _bars(above, TIMES, lambda case, peer: _seconds(figures, case, peer))
    above.set(title="Seconds (push and pull together), less is better", yscale="log", ylabel="seconds")
    used |= _bars(below, BYTES, lambda case, peer: _megabytes(figures, case, peer))
    below.set(title="Bytes to one destination, both directions, less is better", yscale="log", ylabel="MB")
    handles = [mpl.patches.Patch(color=COLOURS[name], label=PEERS[name].label) for name in COLOURS if name in used]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _bars(axes, cases: dict[str, str], value: Callable[[str, str], float | None]) -> set[str]:
    """Draw the groups that have values; returns the peers that were drawn."""
    groups = []
    for case, label in cases.items():
        found = {peer: number for peer in COLOURS if (number := value(case, peer)) is not None}
        if found:
            groups.append((label, found))
    for position, (_, found) in enumerate(groups):
        width = WIDTH / len(found)
        for number, (peer, height) in enumerate(found.items()):
            place = position - WIDTH / 2 + (number + 0.5) * width
            axes.bar(place, height, width * 0.92, color=COLOURS[peer])
            axes.text(
                place, height, f"{height:.2g}" if height < 10 else f"{height:.0f}", ha="center", va="bottom", size=6
            )
    axes.set_xticks(range(len(groups)), [label for label, _ in groups])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.3)
    axes.margins(y=0.15)
    return {peer for _, found in groups for peer in found}


def _seconds(figures: Figures, case: str, peer: str) -> float | None:
    name = f"{case}.{peer}.seconds"
    return figures.median(name) if figures.has(name) else None


def _megabytes(figures: Figures, case: str, peer: str) -> float | None:
    return aims.down(figures, f"{case}.{peer}") / 1e6 if figures.has(f"{case}.{peer}.seconds") else None
