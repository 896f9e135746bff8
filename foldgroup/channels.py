"""Channel spaces of a graph, and the question that they put to the planner.

The sites of the planner are the segments of the graph (:mod:`foldgroup.segments`). A *space* is what ties connect. Its
channels have common numbers, those of a pinned tensor if it has one, and every digit that a grouped convolution sorts
by is a function of them. Digits of different spaces that one convolution relates are one digit to the planner. Where
names would clash (a convolution that relates a digit to another one of the same space, or ties that lead around a
circle to another numbering) a tie is cut: a shuffle stays there, unless a layer that runs dense takes what comes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

import networkx as nx
import numpy as np
from torch import fx, nn

from foldgroup import rules as ops
from foldgroup.channel_order import ChannelOrder
from foldgroup.conv_calls import conv_shape
from foldgroup.forms import ChannelShuffle
from foldgroup.grouping import group_digits, prime_factors
from foldgroup.planning.problem import Flag, Link, Mount, Problem, Tie
from foldgroup.segments import Bond, Index, Mounting, Segment, SegmentGraph, passed
from foldgroup.trace import called_module


@dataclass
class Space:
    """Segments that ties connect, with common numbers for their channels."""

    index: int
    width: int
    segments: list[Segment]
    pins: list[str]
    """Why the order of some of them is fixed; empty for a free space."""


@dataclass(frozen=True)
class Grouped:
    """A convolution with groups, between two segments: a link of the planner."""

    node: fx.Node
    reads: Segment
    writes: Segment
    groups: int
    digits: tuple[int, ...]
    """The planner's names of the digits of its group number, most significant first."""
    costs: Mapping[int, float]


class ChannelGraph(SegmentGraph):
    """The channel axes of a graph, how they are tied, and the planner's question about them."""

    def __post_init__(self) -> None:
        """Cut, tie, number and name."""
        super().__post_init__()
        self.entangled: list[str] = []
        """Sides of convolutions that are planned by themselves, because their digits would clash."""
        while not self._name():
            pass

    # ---- numbers and names -----------------------------------------------------------------------------------

    def _name(self) -> bool:
        """Number the channels of every space and name the digits; False if a tie had to be cut first."""
        self.spaces: list[Space] = []
        self._space_of: dict[int, Space] = {}
        ties = nx.MultiGraph()
        ties.add_nodes_from(range(len(self._sites)))
        ties.add_edges_from((bond.a.site, bond.b.site, {"bond": bond}) for bond in self._bonds)
        self._numbers: dict[int, Index] = {}
        for component in nx.connected_components(ties):
            members = [self._sites[site] for site in sorted(component)]
            if not self._number(ties, members):
                return False
        return self._digits()

    def _number(self, ties: nx.MultiGraph, members: list[Segment]) -> bool:
        """Common numbers for the channels of a space, from the widest pinned segment on."""
        width = max(segment.width for segment in members)
        root = max(members, key=lambda s: (s.site in self.pinned, s.width == width, -s.site))
        self._numbers[root.site] = np.arange(root.width)
        for _, _, bond in _breadth_first(ties, root.site):
            known, new = (bond.a, bond.b) if bond.a.site in self._numbers else (bond.b, bond.a)
            forward = passed(bond, self._numbers[known.site], onward=known is bond.a)
            if forward is None:  # runs that other ties mix
                self._bonds.remove(bond)
                self._pin((bond.a, bond.b), f"{bond.b.node.name} makes runs of channels that are shuffled elsewhere")
                return False
            if new.site in self._numbers and not np.array_equal(forward, self._numbers[new.site]):
                self._cut_loose(bond)
                return False
            self._numbers[new.site] = forward
        pins = list(dict.fromkeys(self.pinned[s.site] for s in members if s.site in self.pinned))
        self.spaces.append(Space(len(self.spaces), width, members, pins))
        self._space_of.update((segment.site, self.spaces[-1]) for segment in members)
        return True

    def _fine(self, segment: Segment, values: Index) -> Index:
        """A function of a segment's channels as one of its space's finest numbers."""
        factor = self._space_of[segment.site].width // segment.width
        result = np.empty(segment.width * factor, dtype=np.int64)
        result.reshape(segment.width, factor)[self._numbers[segment.site]] = values[:, None]
        return result

    def _coarse(self, segment: Segment, fine: Index) -> Index | None:
        """The same back: a function of the segment's channels, or None if it is none."""
        blocks = fine.reshape(segment.width, -1)[self._numbers[segment.site]]
        values: Index = blocks[:, 0]
        return values if (blocks == values[:, None]).all() else None

    def _digits(self) -> bool:
        """Name the digits: equal functions of a space are one digit, and so are those that a convolution relates."""
        self.sizes: dict[int, int] = {}
        name = _Namer(self)
        self.grouped: list[Grouped] = []
        ports: dict[int, dict[int, Index]] = defaultdict(dict)
        for node, reads, writes, groups in self._links:
            found = []
            for size, ins, outs in zip(
                prime_factors(groups),
                group_digits(reads.width, groups),
                group_digits(writes.width, groups),
                strict=True,
            ):
                a, b = name.digit(reads, ins, size), name.digit(writes, outs, size)
                if not name.relate(a, b):
                    self._cut_loose(next(bond for bond in self._bonds if bond.b is reads))
                    return False
                ports[reads.site][a], ports[writes.site][b] = ins, outs
                found.append(a)
            self.grouped.append(Grouped(node, reads, writes, groups, tuple(found), self._costs(node, groups)))
        for mounting in self._mountings:
            self._mount(mounting, ports[mounting.port.site], name)
        wanted = [
            (s, [name.digit(s, v, size) for v, size in zip(group_digits(s.width, g), prime_factors(g), strict=True)])
            for s, g in self._wanted
        ]
        first = name.first()
        self.sizes = {name: size for name, size in self.sizes.items() if first[name] == name}
        self.grouped = [replace(g, digits=tuple(first[d] for d in g.digits)) for g in self.grouped]
        self._orders: dict[int, tuple[int, Index]] = {}
        self.lying: dict[int, Mounting] = {}  # by the digit that says so
        for mounting in self._mountings:
            if mounting.strict:
                mounting.above = (-1 - len(self.lying) - len(self._sites),)
                self.lying[mounting.above[0]] = mounting
            else:
                mounting.above = tuple(first[digit] for digit in mounting.above)
        self.wanted = {s.site: frozenset(first[d] for d in found) for s, found in wanted}
        self._functions: dict[int, dict[int, Index]] = defaultdict(dict)  # by space and digit
        for (digit, space), fine in name.functions.items():
            self._functions[space][first[digit]] = fine
        return True

    def _cut_loose(self, bond: Bond) -> None:
        """Cut a tie. At a convolution's port it becomes a mount that serves a dense layer alone."""
        self._bonds.remove(bond)
        cost = self._move(bond.a.node, 1) if bond.cost == inf else bond.cost / bond.b.width
        if any(bond.b is port for port in self.port.values()):
            self.entangled.append(bond.b.node.name)
            self._mountings.append(Mounting(bond.b, [bond.a], np.arange(bond.b.width), cost))
        else:
            self.fixed += cost * bond.b.width

    def _mount(self, mounting: Mounting, digits: Mapping[int, Index], name: _Namer) -> None:
        """Find the digits of a port that number the segments it lies on, and those that sort each of them alike.

        A strict one gets a digit of its own for the order in which the segments lie.
        """
        if mounting.strict:
            return
        ends = {segment.start for segment in mounting.segments}
        block = width = mounting.port.width
        on_axis = {digit: values[mounting.channel] for digit, values in digits.items()}
        above: list[int] = []
        while True:
            for digit, values in on_axis.items():
                size = self.sizes[digit]
                run = np.tile(np.repeat(np.arange(size), block // size), width // block)
                if digit in above or block % size or not np.array_equal(values, run):
                    continue
                if ends.issuperset(range(0, width, block // size)):
                    above.append(digit)
                    block //= size
                    break
            else:
                break
        mounting.above = tuple(above)
        mounting.deep = len(mounting.segments) > 1 and all(s.width == block for s in mounting.segments)
        for digit, values in on_axis.items() if mounting.deep else ():
            parts = [values[segment.start : segment.stop] for segment in mounting.segments]
            size = self.sizes[digit]
            if digit not in above and all(np.array_equal(np.bincount(p), np.full(size, block // size)) for p in parts):
                mounting.deep &= all(
                    name.relate(digit, name.digit(segment, part, size))
                    for segment, part in zip(mounting.segments, parts, strict=True)
                )

    def _costs(self, node: fx.Node, groups: int) -> dict[int, float]:
        """What a convolution costs by the groups it runs; never more for more groups, which can be packed."""
        conv = called_module(self.graph, node)
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        shape = conv_shape(node, conv)
        return {count: self.cost.layer(shape.run_as(count)) for count in range(1, groups + 1) if groups % count == 0}

    def space_of(self, segment: Segment) -> Space:
        """The space that a segment belongs to."""
        return self._space_of[segment.site]

    @property
    def shuffles(self) -> list[tuple[fx.Node, float]]:
        """Every ChannelShuffle of the graph, and what it would cost to keep it."""
        found = ((node, rule) for node, rule in self.rules.items() if isinstance(rule, ops.Shuffles))
        return [(node, self._move(node, len(rule.order))) for node, rule in found]

    def wanted_by(self, node: fx.Node) -> str:
        """The layer that a ChannelShuffle was put in for; empty for one of the network's own."""
        shuffle = called_module(self.graph, node)
        assert isinstance(shuffle, ChannelShuffle)
        return shuffle.inserted_for

    def digit_text(self, space: Space, digit: int) -> str:
        """A digit of a space as its stride among the channels: "8s" is the digit of eights."""
        if digit in self.lying:
            return "as its parts lie"
        if digit in self._orders:
            return "as it was"
        fine = self._functions[space.index].get(digit)
        if fine is None:
            return "–"
        changes = np.flatnonzero(np.diff(fine))
        stride = int(changes[0]) + 1 if len(changes) else space.width
        size = self.sizes[digit]
        regular = np.array_equal(fine, np.arange(space.width) // stride % size)
        return f"{stride}s" if regular else f"set of {size}"

    # ---- the planner's question, and its answer --------------------------------------------------------------

    @cached_property
    def problem(self) -> Problem:
        """Sites, ties and links as numbers."""
        ties = tuple(Tie(b.a.site, b.b.site, b.cost) for b in self._bonds if b.a.site != b.b.site)
        links = tuple(Link(g.reads.site, g.writes.site, frozenset(g.digits), g.costs) for g in self.grouped)
        mounts = tuple(
            Mount(segment.site, m.port.site, m.cost * segment.width, m.above, m.deep, m.strict)
            for m in self._mountings
            for segment in m.segments
        )
        pins = {site: self._natural(self._sites[site]) for site in self.pinned}
        lacks = {s.site: missing for s in self._sites if (missing := self._lacked(s))}
        sizes = {**self.sizes, **dict.fromkeys((*self._orders, *self.lying), 1)}
        return Problem(len(self._sites), sizes, ties, links, mounts, pins, self.wanted, lacks)

    def follows(self, port: Segment, flags: Sequence[Flag]) -> bool:
        """Whether a side of a convolution is served by the segments it lies on as they are."""
        mounts = [mount for mount in self.problem.mounts if mount.b == port.site and not mount.strict]
        return bool(mounts) and all(mount.free(flags[mount.a], flags[mount.b]) for mount in mounts)

    def _lacked(self, segment: Segment) -> frozenset[int]:
        """The digits of its space that are no function of this segment's channels, these being fewer or more."""
        space = self._space_of[segment.site]
        mine = self._functions[space.index].items()
        known = {name: len(order) for name, (index, order) in self._orders.items() if index == space.index}
        known |= {name: m.port.width for name, m in self.lying.items() if self.space_of(m.port) is space}
        orders = {name for name, width in known.items() if width != segment.width}
        return frozenset(name for name, fine in mine if self._coarse(segment, fine) is None) | orders

    def _values(self, segment: Segment) -> Iterator[tuple[int, Index]]:
        space = self._space_of[segment.site]
        for name, fine in self._functions[space.index].items():
            if (values := self._coarse(segment, fine)) is not None:
                yield name, values

    def _natural(self, segment: Segment) -> Flag:
        """The flag of a segment in its old order: the digits that sort it, one after the other, as far as they go.

        If that is not the order of the space's numbers either, a digit of its own at the end says so.
        """
        found: list[int] = []
        block = segment.width
        digits = dict(self._values(segment))
        while True:
            for name, values in digits.items():
                size = self.sizes[name]
                run = np.tile(np.repeat(np.arange(size), block // size), segment.width // block)
                if name not in found and block % size == 0 and np.array_equal(values, run):
                    found.append(name)
                    block //= size
                    break
            else:
                break
        numbers = self._numbers[segment.site]
        if not np.array_equal(numbers, np.arange(segment.width)):
            space = self._space_of[segment.site].index
            known = (n for n, (at, order) in self._orders.items() if at == space and np.array_equal(order, numbers))
            name = next(known, -1 - len(self._orders))
            self._orders[name] = (space, numbers)
            found.append(name)
        return tuple(found)

    def settle(self, flags: Sequence[Flag]) -> None:
        """Find the orders of the axes that lie as their segments do, now that all have flags."""
        waiting = {name: m for name, m in self.lying.items() if flags[m.port.site] == (name,)}
        while waiting:
            ready = [
                name
                for name, m in waiting.items()
                if not any(waiting.keys() & set(flags[segment.site]) for segment in m.segments)
            ]
            for name in ready or list(waiting):
                mounting = waiting.pop(name)
                space = self.space_of(mounting.port)
                self._orders[name] = (space.index, np.arange(mounting.port.width))  # if they wait for each other
                parts = (s.start + self.order(s, flags[s.site]) for s in mounting.segments)
                lying = mounting.channel[np.concatenate(list(parts))]  # the port's channels, as they lie
                self._orders[name] = (space.index, self._numbers[mounting.port.site][lying])

    def order(self, segment: Segment, flag: Flag) -> Index:
        """The order of a segment's channels that a flag describes: position i holds its channel result[i]."""
        numbers = self._numbers[segment.site]
        space, known = self._orders.get(flag[-1], (-1, numbers)) if flag else (-1, numbers)
        if space == self._space_of[segment.site].index:
            place = np.argsort(known)  # the position of every number
            return np.argsort(place[numbers], kind="stable")
        values = dict(self._values(segment)) if flag else {}
        keys = [numbers]
        for name in flag:
            if name not in values:
                break  # no layer at this segment can use what follows
            keys.append(values[name])
        return np.lexsort((keys[0], *reversed(keys[1:])))


class _Namer:
    """Gives digits names, and knows which are the same."""

    def __init__(self, channels: ChannelGraph) -> None:
        self.channels = channels
        self.names: dict[tuple[int, bytes], int] = {}
        self.functions: dict[tuple[int, int], Index] = {}
        """By name and space."""
        self.same: Any = nx.utils.UnionFind()
        self.held: dict[int, dict[int, int]] = {}
        """For a digit the name of its function in every space."""

    def digit(self, segment: Segment, values: Index, size: int) -> int:
        """The name of a function of a segment's channels."""
        space = self.channels.space_of(segment).index
        fine = self.channels._fine(segment, values)
        name = self.names.setdefault((space, fine.tobytes()), len(self.names))
        self.functions[name, space] = fine
        self.channels.sizes[name] = size
        self.held.setdefault(self.same[name], {space: name})
        return name

    def relate(self, a: int, b: int) -> bool:
        """Make two digits one; False if that would make two functions of one space the same."""
        one, other = self.held[self.same[a]], self.held[self.same[b]]
        if any(one.get(space, name) != name for space, name in other.items()):
            return False
        self.same.union(a, b)
        self.held[self.same[a]] = one | other
        return True

    def first(self) -> dict[int, int]:
        """For every name that of its digit: the least of the names that are one."""
        return {name: min(group) for group in self.same.to_sets() for name in group}


def _breadth_first(ties: nx.MultiGraph, root: int) -> Iterator[tuple[int, int, Bond]]:
    """Every bond of the root's component once, each with an end that was met before."""
    met, todo, done = {root}, [root], set()
    while todo:
        here = todo.pop(0)
        for _, there, data in ties.edges(here, data=True):
            bond = data["bond"]
            if id(bond) not in done:
                done.add(id(bond))
                if there not in met:
                    met.add(there)
                    todo.append(there)
                yield here, there, bond


def as_order(index: Index) -> ChannelOrder:
    """An order from its numbers."""
    return ChannelOrder(tuple(index.tolist()))
