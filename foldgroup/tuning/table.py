"""Costs of a network's convolutions with groups, in nanoseconds, as the planner and the packing take them.

A table holds for every dense shape (one group) what its executions take. Layers that differ in groups alone share an
entry: a layer of G groups can run as any execution whose groups divide G. What the table does not hold, ``predict``
gives. Numbers are whole nanoseconds, so that a table that was written down gives the same decisions when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from foldgroup.conv_shape import ConvShape, Execution, shape_from_key
from foldgroup.planning.cost import CostModel
from foldgroup.tuning.race import CLOSE

Predict: TypeAlias = Callable[[ConvShape], Mapping[Execution, float]]
"""Nanoseconds of the executions of a convolution."""

MACS_PER_NS = 107.0
"""By which :func:`counted` turns :class:`CostModel`'s multiply-adds into time; its decisions do not depend on it."""


def counted(shape: ConvShape) -> dict[Execution, float]:
    """By counting alone: no execution is better than the groups that were learned."""
    packed = (execution for execution in shape.executions if execution.parts == 1)
    return {execution: CostModel().layer(shape.run_as(execution.groups)) / MACS_PER_NS for execution in packed}


SOURCES = ("counted", "model", "measured")
MOST_NS = 10**18
"""No convolution takes so many nanoseconds."""
PER_WEIGHT = 1e-6
"""Nanoseconds by which equally fast group counts are told apart: the planner is to keep what was learned."""


@dataclass(frozen=True)
class CostTable:
    """``entries`` are by dense shape; ``ns_per_byte`` is what a shuffle takes for each byte read or written."""

    entries: Mapping[ConvShape, Mapping[Execution, int]] = field(default_factory=dict)
    ns_per_byte: float = CostModel().macs_per_byte / MACS_PER_NS
    predict: Predict = counted
    source: Literal["counted", "model", "measured"] = "counted"
    margin: float = CLOSE
    """Ratio below which two executions count as equally fast."""

    @property
    def unit(self) -> str:
        """Nanoseconds."""
        return "ns"

    def executions(self, shape: ConvShape) -> dict[Execution, int]:
        """What is known of the executions that are open to ``shape``."""
        known = self.entries.get(shape.run_as(1), {})
        open_to = {e: ns for e, ns in known.items() if shape.groups % e.groups == 0}
        return open_to or {e: round(ns) for e, ns in self.predict(shape).items()}

    def best(self, calls: Sequence[ConvShape], among: Collection[Execution]) -> Execution:
        """The fastest of ``among``, exact executions of a layer that is called on ``calls``.

        Of those within the margin of it, the one with the fewest multiply-adds. The first of ``among`` if nothing is
        known of any.
        """
        known = [self.executions(shape) for shape in calls]
        total = {e: sum(times[e] for times in known) for e in among if all(e in times for times in known)}
        close = [e for e, ns in total.items() if ns <= self.margin * min(total.values())]
        return max(close, key=lambda e: (e.groups, -e.parts), default=next(iter(among)))

    def choose(self, _: str, calls: Sequence[ConvShape], among: Sequence[Execution]) -> Execution:
        """:meth:`best`, as :class:`passes.PackGroups` asks for it."""
        return self.best(calls, among)

    def layer(self, shape: ConvShape) -> float:
        """The time of the fastest execution open to ``shape``; fewer groups that run as fast cost a trace more."""
        return min(self.executions(shape).values()) + PER_WEIGHT * shape.weights

    def move(self, bytes_moved: float) -> float:
        """The time of a shuffle that reads and writes ``bytes_moved`` bytes in all."""
        return self.ns_per_byte * bytes_moved

    def as_dict(self) -> dict[str, Any]:
        """For ``passes.json``; :meth:`from_dict` reads it."""
        layers = [
            {"layer": shape.key(), "ns": [[e.groups, e.parts, ns] for e, ns in sorted(times.items())]}
            for shape, times in sorted(self.entries.items())
        ]
        return {"source": self.source, "margin": self.margin, "ns_per_byte": self.ns_per_byte, "layers": layers}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> CostTable:
        """The table that was written down as ``document``.

        Raises:
            ValueError, KeyError, TypeError, OverflowError: if it is none.
        """
        entries = {}
        for entry in document["layers"]:
            shape = shape_from_key(entry["layer"])
            if not isinstance(shape, ConvShape):
                raise ValueError(f"{entry['layer']} is no convolution")
            entries[shape] = {Execution(groups, parts): ns for groups, parts, ns in entry["ns"]}
            if not all(isinstance(ns, int) and 0 < ns < MOST_NS for ns in entries[shape].values()):
                raise ValueError(f"{entry['ns']} are no whole nanoseconds")
        margin, ns_per_byte = float(document["margin"]), float(document["ns_per_byte"])
        if not (1 <= margin < math.inf and 0 <= ns_per_byte < math.inf):
            raise ValueError(f"{margin} is no margin, or {ns_per_byte} no speed of shuffles")
        if document["source"] not in SOURCES:
            raise ValueError(f"{document['source']!r} is no source of costs")
        return cls(entries, ns_per_byte, source=document["source"], margin=margin)


def table_of(
    shapes: Mapping[ConvShape, Mapping[Execution, float]],
    ns_per_byte: float,
    source: Literal["model", "measured"],
    margin: float = CLOSE,
) -> CostTable:
    """A table of what is known of ``shapes``, which may have any groups."""
    entries: dict[ConvShape, dict[Execution, int]] = {}
    for shape, times in shapes.items():
        entries.setdefault(shape.run_as(1), {}).update({e: max(1, round(ns)) for e, ns in times.items()})
    return CostTable(entries, ns_per_byte, source=source, margin=margin)
