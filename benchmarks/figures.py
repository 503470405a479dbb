"""Named series of raw values, and what could not be measured; what is written as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.processes import Legs


@dataclass
class Figures:
    """A name is ``CASE.PEER.WHAT`` or ``CASE.PEER.LEG.WHAT``; see :meth:`add_legs`."""

    values: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, *values: float) -> None:
        """Append raw values."""
        self.values.setdefault(name, []).extend(values)

    def add_legs(self, name: str, legs: Legs) -> None:
        """Append all that is known of one synchronisation; its seconds are the sum of its legs."""
        self.add(f"{name}.seconds", sum(leg.seconds for leg in legs.values()))
        self.add(f"{name}.cpu", sum(use.cpu for leg in legs.values() for use in leg.uses.values()))
        for key, leg in legs.items():
            self.add(f"{name}.{key}.seconds", leg.seconds)
            self.add(f"{name}.{key}.wire", leg.wire)
            for role, use in leg.uses.items():
                self.add(f"{name}.{key}.{role}.cpu", use.cpu)
                self.add(f"{name}.{key}.{role}.peak", use.peak)

    def note(self, text: str) -> None:
        """Say once what the reader must know of this run."""
        if text not in self.notes:
            self.notes.append(text)

    def has(self, *names: str) -> bool:
        return all(name in self.values for name in names)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def most(self, name: str) -> float:
        return max(self.values[name])

    def ratio(self, name: str, other: str) -> float:
        """The quotient of two medians."""
        return self.median(name) / self.median(other)


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that at least this share does not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]
