"""``python -m benchmarks [--quick] [--only CASE] [--peers NAME,...] [--json FILE] [--write docs/performance.md]``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import network, packages, report
from benchmarks.cases import CASES, FULL, QUICK, Bench, Scale
from benchmarks.figures import Figures
from benchmarks.peers import PEERS
from benchmarks.world import REPOSITORY, World, machine

if TYPE_CHECKING:
    from benchmarks.peers.base import Peer


PREFIXES = {"eight": ("eight", "fleet")}
"""Under which names a case keeps its figures, where that is not its own name."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure syncd beside other tools.")
    parser.add_argument("--quick", action="store_true", help="small data, one repetition: does it work at all?")
    parser.add_argument("--only", action="append", choices=list(CASES), help="this case (may be repeated)")
    parser.add_argument("--peers", type=_peers, default=list(PEERS), help=f"of {','.join(PEERS)} (default: all)")
    parser.add_argument("--layout", choices=["generations", "objects"], default="generations")
    parser.add_argument("--dir", type=Path, help="where to work; its filesystem is what is measured (default: TMPDIR)")
    parser.add_argument("--cache", type=Path, default=packages.default_cache(), help="keeps the downloaded packages")
    parser.add_argument("--json", type=Path, help="write all raw values")
    parser.add_argument(
        "--from", dest="past", type=Path, help="render an earlier --json; with --only, measure those anew"
    )
    parser.add_argument("--write", type=Path, help="replace the tables between the markers of this document, and plot")
    return parser.parse_args()


def _peers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"no peer {', '.join(sorted(unknown))}")
    return names


def main() -> None:
    arguments = parse()
    past = json.loads(arguments.past.read_text()) if arguments.past else None
    if past and not arguments.only:
        run = past
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that all that we started ends too
        if past and (past["scale"], past["layout"]) != (as_json(scale(arguments)), arguments.layout):
            raise SystemExit(f"{arguments.past} is of another scale or layout")
        run = measure(arguments)
        if past:
            run = merge(past, run, arguments.only)
    if arguments.json:
        arguments.json.write_text(json.dumps(run, indent=1) + "\n")
    text = report.render(run)
    print(text)
    if arguments.write:
        report.write(arguments.write, text, run)


def scale(arguments: argparse.Namespace) -> Scale:
    return QUICK if arguments.quick else FULL


def as_json(it: Scale) -> dict:
    return json.loads(json.dumps(asdict(it)))


def measure(arguments: argparse.Namespace) -> dict:
    """Run the cases; returns what ``--json`` keeps."""
    names = arguments.only or list(CASES)
    figures = Figures()
    peers = present(arguments.peers, figures)
    updates = fetch_updates(arguments.cache, figures) if "packages" in names else []
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # what is measured is this checkout
    if reason := network.isolate():  # from here on nothing outside is reachable
        figures.note(f"Bytes on the wire are those of the machine's loopback, whoever sent them ({reason}).")
    with tempfile.TemporaryDirectory(prefix="syncd-bench-", dir=arguments.dir) as directory:
        about = machine(Path(directory))
        bench = Bench(
            World(Path(directory), arguments.layout), scale(arguments), figures, peers, arguments.cache, updates
        )
        for name in names:
            begin = time.monotonic()
            print(f"{name} ...", file=sys.stderr, end=" ", flush=True)
            CASES[name](bench)
            print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    return {
        "machine": about,
        "quick": arguments.quick,
        "layout": arguments.layout,
        "scale": as_json(scale(arguments)),
        "notes": figures.notes,
        "values": figures.values,
    }


def merge(past: dict, new: dict, names: list[str]) -> dict:
    """Return an earlier run with some of its cases measured anew."""
    prefixes = tuple(prefix for name in names for prefix in PREFIXES.get(name, (name,)))
    kept = {name: values for name, values in past["values"].items() if not name.startswith(prefixes)}
    notes = list(dict.fromkeys([*past["notes"], *new["notes"], f"Measured anew later: {', '.join(names)}."]))
    return new | {"values": kept | new["values"], "notes": notes}


def present(names: list[str], figures: Figures) -> list[Peer]:
    """The peers that can run; the others are named."""
    found = []
    for name in names:
        if program := PEERS[name].missing():
            figures.note(f"Left out: {PEERS[name].label} ({program} is not installed).")
        else:
            found.append(PEERS[name])
    return found


def fetch_updates(cache: Path, figures: Figures) -> list[packages.Update]:
    """The package updates whose wheels are at hand; the others are named."""
    found = []
    for update in packages.UPDATES:
        if reason := packages.fetch(update, cache):
            figures.note(f"Left out: {update.label}. {reason}")
        else:
            found.append(update)
    return found


main()
