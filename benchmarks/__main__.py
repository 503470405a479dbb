"""``python -m benchmarks [--quick] [--only NAME] [--json FILE] [--write docs/performance.md]``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks import report
from benchmarks.cases import CASES, FULL, QUICK
from benchmarks.world import Figures, World, machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure syncd beside nats-py.")
    parser.add_argument("--quick", action="store_true", help="small data, one repetition: does it work at all?")
    parser.add_argument("--only", action="append", choices=list(CASES), help="this case (may be repeated)")
    parser.add_argument("--dir", type=Path, help="where to work; its filesystem is what is measured (default: TMPDIR)")
    parser.add_argument("--json", type=Path, help="write all raw values")
    parser.add_argument(
        "--from", dest="past", type=Path, help="render the values of an earlier --json, measure nothing"
    )
    parser.add_argument("--write", type=Path, help="replace the tables between the markers of this document")
    arguments = parser.parse_args()

    if arguments.past:
        past = json.loads(arguments.past.read_text())
        figures, about, quick = Figures(past["values"]), past["machine"], past["quick"]
    else:
        quick = arguments.quick
        with tempfile.TemporaryDirectory(prefix="syncd-bench-", dir=arguments.dir) as directory:
            about = machine(Path(directory))
            figures = measure(World(Path(directory)), arguments.only or list(CASES), quick=quick)
    if arguments.json:
        scale = asdict(QUICK if quick else FULL)
        data = {"machine": about, "quick": quick, "scale": scale, "values": figures.values}
        arguments.json.write_text(json.dumps(data, indent=1))
    text = report.render(figures, QUICK if quick else FULL, about, quick=quick)
    print(text)
    if arguments.write:
        report.write(arguments.write, text)


def measure(world: World, names: list[str], *, quick: bool) -> Figures:
    figures = Figures()
    for name in names:
        begin = time.monotonic()
        print(f"{name} ...", file=sys.stderr, end=" ", flush=True)
        CASES[name](world, QUICK if quick else FULL, figures)
        print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    return figures


main()
