"""Channel spaces of a graph, and the question that they put to the planner.

Every tensor's channel axis is cut into *segments*: the shortest runs of channels such that an order may move channels
within a run but never across its ends. Most axes are one segment; concatenation and splitting cut them. A segment is a
site of the planner (:mod:`foldgroup.planning.problem`), and so is the *trunk* of a tensor with several readers: the
order in which they find it. Sites are tied where channels pass from one to the other, at the price of a shuffle there:

* from a tensor to its trunk, and from the trunk to each reader through which channels pass or which has groups;
* across a ChannelShuffle v = u[:, s], whose two sides agree iff v's channel i stands where u's channel s[i] does. Such
  a tie that holds removes the shuffle.

A *space* is what ties connect. Its channels have common numbers, those of a pinned tensor if it has one, and every
digit that a grouped convolution sorts by is a function of them. Digits of different spaces that one convolution relates
are one digit to the planner. Where names would clash (a convolution that relates a digit to another one of the same
space, or ties that lead around a circle to another numbering) a tie is cut: a shuffle stays there, unless a layer that
runs dense takes what comes.

A convolution with groups that reads or writes an axis of several segments does so through a *mount*: it is served as it
is by whatever the segments are sorted by that numbers its groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import inf, prod
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from torch import fx, nn

from foldgroup import rules as ops
from foldgroup.channel_order import ChannelOrder
from foldgroup.conv_shape import conv_shape
from foldgroup.forms import ChannelShuffle
from foldgroup.grouping import prime_factors
from foldgroup.planning.cost import BYTES, Cost, CostModel
from foldgroup.planning.problem import Flag, Link, Mount, Problem, Tie
from foldgroup.rules import rules_of
from foldgroup.trace import called_module, shape_of

Index = npt.NDArray[np.int64]

_FUSED = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.GELU,
)

FUSED = 2.0
"""How much more a shuffle costs between a convolution and what runtimes fuse into it: a pass over the tensor."""


@dataclass(frozen=True)
class Segment:
    """A run of channels of a tensor that is ordered by itself."""

    site: int
    node: fx.Node
    start: int
    stop: int
    channels: int
    """Of the whole axis."""
    role: str = ""
    """Empty for the tensor's own; "trunk" for its readers', "in" and "out" for the sides of a grouped convolution."""

    @property
    def width(self) -> int:
        """Its channels."""
        return self.stop - self.start

    def __str__(self) -> str:
        run = "" if self.width == self.channels else f"[{self.start}:{self.stop}]"
        return f"{self.node.name}{run}{f' ({self.role})' if self.role else ''}"


@dataclass
class _Bond:
    """A tie before it is numbered; ``shuffle`` is s for v = u[:, s], and a channel of a makes ``repeat`` of b's."""

    a: Segment
    b: Segment
    cost: float
    shuffle: Index | None = None
    repeat: int = 1


@dataclass
class _Mounting:
    """A side of a convolution, ``port``, and the segments it lies on: position i of theirs is its ``channel[i]``."""

    port: Segment
    segments: list[Segment]
    channel: Index
    cost: float
    """Of moving one channel."""
    above: tuple[int, ...] = ()
    deep: bool = False
    strict: bool = False
    """The port is no convolution's side but an axis like others, which may lie as the segments do."""


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


@dataclass
class ChannelGraph:
    """The channel axes of a graph, how they are tied, and the planner's question about them."""

    graph: fx.GraphModule
    cost: Cost = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        """Cut, tie, number and name."""
        self.rules, self.axes = rules_of(self.graph)
        self._sites: list[Segment] = []
        self._bonds: list[_Bond] = []
        self._mountings: list[_Mounting] = []
        self.pinned: dict[int, str] = {}
        self.fixed = 0.0
        """The cost of shuffles that stay whatever the plan."""
        self.entangled: list[str] = []
        """Sides of convolutions that are planned by themselves, because their digits would clash."""
        self._links: list[tuple[fx.Node, Segment, Segment, int]] = []
        self._wanted: list[tuple[Segment, int]] = []
        self.own: dict[fx.Node, list[Segment]] = {}
        self.trunk: dict[fx.Node, list[Segment]] = {}
        self.port: dict[fx.Node, Segment] = {}
        """The input side of every grouped convolution."""
        self.cuts = self._cut()
        for node in self.graph.graph.nodes:
            self._tie(node)
        while not self._name():
            pass

    # ---- cuts ------------------------------------------------------------------------------------------------

    def _cut(self) -> dict[fx.Node, list[int]]:
        """Where every channel axis is cut: the least cuts that concatenations and splits make, carried everywhere."""
        cuts = {node: {0, _channels(node, axis)} for node, axis in self.axes.items() if axis is not None}
        links: list[tuple[fx.Node, fx.Node, int, int, int, int]] = []  # a, b, start and stop in a, start in b, repeat
        for node, rule in self.rules.items():
            if isinstance(rule, ops.Through):
                links += [(o, node, 0, _channels(o, self.axes[o]), 0, rule.repeat) for o in rule.operands]
            elif isinstance(rule, ops.Joins):
                at = 0
                for operand in rule.operands:
                    width = _channels(operand, self.axes[operand])
                    links.append((operand, node, 0, width, at, 1))
                    cuts[node].add(at)
                    at += width
            elif isinstance(rule, ops.Takes):
                source = self.source(rule)
                cuts[source] |= {rule.start, rule.stop}
                links.append((source, node, rule.start, rule.stop, 0, 1))
        near: dict[fx.Node, list[int]] = defaultdict(list)
        for i, (a, b, *_) in enumerate(links):
            near[a].append(i)
            near[b].append(i)
        todo = list(range(len(links)))
        while todo:
            a, b, start, stop, at, repeat = links[todo.pop()]
            down = {at + (cut - start) * repeat for cut in cuts[a] if start <= cut <= stop}
            up = {start + -(-(cut - at) // repeat) for cut in cuts[b] if at <= cut <= at + (stop - start) * repeat}
            for node, found in ((b, down), (a, up)):
                if not found <= cuts[node]:
                    cuts[node] |= found
                    todo += near[node]
        return {node: sorted(found) for node, found in cuts.items()}

    def source(self, rule: ops.Takes) -> fx.Node:
        """The tensor that a slice is taken from, behind a split."""
        split = self.rules[rule.operand]
        return split.operand if isinstance(split, ops.Splits) else rule.operand

    # ---- sites and ties --------------------------------------------------------------------------------------

    def _segments(self, node: fx.Node, role: str = "", cuts: Sequence[int] | None = None) -> list[Segment]:
        cuts = self.cuts[node] if cuts is None else cuts
        made = []
        for start, stop in pairwise(cuts):
            made.append(Segment(len(self._sites), node, start, stop, cuts[-1], role))
            self._sites.append(made[-1])
        return made

    def _tie(self, node: fx.Node) -> None:
        """Make the sites of ``node`` and tie them to what it reads."""
        rule, axis = self.rules[node], self.axes[node]
        if axis is not None:
            self.own[node] = self.trunk[node] = self._segments(node)
        if isinstance(rule, ops.Through):
            self._through(node, rule)
        elif isinstance(rule, ops.Joins):
            parts = iter(self.own[node])
            for operand in rule.operands:
                twice = rule.operands.count(operand) > 1  # one reader, so one order
                for segment in self.trunk[operand]:
                    self._bond(segment, next(parts), inf if twice else self._move(operand, segment.width))
        elif isinstance(rule, ops.Takes):
            inside = (s for s in self.trunk[self.source(rule)] if rule.start <= s.start and s.stop <= rule.stop)
            for segment, own in zip(inside, self.own[node], strict=True):
                self._bond(segment, own, inf)
        elif isinstance(rule, ops.Shuffles):
            self._shuffled(node, rule)
        elif isinstance(rule, ops.Groups):
            self._grouped(node, rule)
        elif isinstance(rule, ops.Barrier):
            self._barrier(node, rule)
        for operand in node.all_input_nodes:
            split = self.rules[operand]
            if isinstance(split, ops.Splits) and not isinstance(rule, ops.Takes):
                self._pin(self.trunk[split.operand], f"{node.name} takes parts in a way that has no rule")
        readers = sum(self._is_tied(user) for user in node.users)
        readers += isinstance(rule, ops.Through) and rule.repeat > 1  # its own order is its operand's
        if axis is not None and readers > 1 and self.trunk[node] is self.own[node]:
            self.trunk[node] = self._segments(node, "trunk")
            for own, trunk in zip(self.own[node], self.trunk[node], strict=True):
                self._bond(own, trunk, self._move(node, own.width))

    def _is_tied(self, user: fx.Node) -> bool:
        return not isinstance(self.rules[user], ops.Mixes | ops.Reads)

    def _through(self, node: fx.Node, rule: ops.Through) -> None:
        own = self.own[node]
        for operand in rule.operands:
            before = self.trunk[operand]
            if [segment.width * rule.repeat for segment in before] != [segment.width for segment in own]:
                self._pin((*before, *own), f"{node.name} has runs of {rule.repeat} channels that are cut apart")
                return
            fixed = isinstance(self.rules[operand], ops.Constant)
            for segment, result in zip(before, own, strict=True):
                free = self._move(operand, segment.width) * self._fusing(operand, node)
                self._bond(segment, result, inf if fixed or rule.repeat > 1 else free, repeat=rule.repeat)
        if rule.groups > 1 and len(own) == 1:
            self._wanted.append((own[0], rule.groups))
        elif rule.groups > 1:
            self._pin(own, f"{node.target} normalises groups of channels that were joined")

    def _shuffled(self, node: fx.Node, rule: ops.Shuffles) -> None:
        before, after = self.trunk[rule.operand], self.own[node]
        cost, order = self._move(node, 1) * self._fusing(rule.operand, node), np.array(rule.order.source)
        if len(before) == len(after) == 1:
            self._bonds.append(_Bond(before[0], after[0], cost * len(order), order))
        elif self._is_port(node):
            self._mountings.append(_Mounting(after[0], before, np.argsort(order), cost))
        elif isinstance(self.rules[rule.operand], ops.Groups) and len(rule.operand.users) == 1:
            self._mountings.append(_Mounting(before[0], after, order, cost))
        elif len(after) == 1:
            self._mountings.append(_Mounting(after[0], before, np.argsort(order), cost, strict=True))
        elif len(before) == 1:
            self._mountings.append(_Mounting(before[0], after, order, cost, strict=True))
        else:
            self.fixed += cost * len(order)

    def _is_port(self, node: fx.Node) -> bool:
        """Whether a shuffle is the input side of a convolution with groups, and of nothing else."""
        rules = [self.rules[user] for user in node.users]
        return len(rules) == 1 and isinstance(rules[0], ops.Groups)

    def _grouped(self, node: fx.Node, rule: ops.Groups) -> None:
        """The link of a convolution with groups. A side without a shuffle of its own becomes a site, its port."""
        operand, channels = rule.operand, _channels(rule.operand)
        before, after = self.trunk[operand], self.own[node]
        if isinstance(self.rules[operand], ops.Shuffles) and self._is_port(operand):
            reads = before[0]
        else:
            (reads,) = self._segments(operand, f"read by {node.name}", [0, channels])
            self._lie(reads, before, self._move(operand, 1))
        writes = after[0]
        if len(after) > 1:
            (writes,) = self._segments(node, "before it is cut", [0, _channels(node)])
            self.own[node], self.trunk[node] = [writes], after
            self._lie(writes, after, self._move(node, 1))
        self.port[node] = reads
        self._links.append((node, reads, writes, rule.groups))

    def _lie(self, port: Segment, segments: list[Segment], cost: float) -> None:
        """Tie a port to the axis it lies on."""
        if len(segments) == 1:
            self._bond(segments[0], port, cost * port.width)
        else:
            self._mountings.append(_Mounting(port, segments, np.arange(port.width), cost))

    def _barrier(self, node: fx.Node, rule: ops.Barrier) -> None:
        for operand in node.all_input_nodes:
            if operand in self.trunk:
                for segment in self.trunk[operand]:
                    (end,) = self._segments(operand, f"read by {node.name}", [segment.start, segment.stop])
                    self._bond(segment, end, self._move(operand, segment.width))
                    self._pin([end], rule.reason)
        if node in self.own:
            self._pin(self.own[node], rule.reason)

    def _pin(self, segments: Sequence[Segment], reason: str) -> None:
        for segment in segments:
            self.pinned.setdefault(segment.site, reason)

    def _bond(self, a: Segment, b: Segment, cost: float, repeat: int = 1) -> None:
        self._bonds.append(_Bond(a, b, cost, repeat=repeat))

    def _move(self, node: fx.Node, channels: int) -> float:
        """The cost of a shuffle of ``channels`` channels of ``node``."""
        shape, axis = shape_of(node), self.axes[node]
        assert axis is not None
        positions = prod(n for dim, n in enumerate(shape) if dim not in (0, axis))
        return self.cost.move(2 * BYTES * channels * positions)

    def _fusing(self, operand: fx.Node, node: fx.Node) -> float:
        """How much more a shuffle costs behind ``operand``, if that is a convolution into which ``node`` is fused."""
        while isinstance(self.rules[node], ops.Shuffles) and len(node.users) == 1:
            node = next(iter(node.users))
        fused = isinstance(called_module(self.graph, node), _FUSED)
        while isinstance(self.rules[operand], ops.Shuffles) or isinstance(called_module(self.graph, operand), _FUSED):
            operand = operand.all_input_nodes[0]
        return FUSED if fused and isinstance(self.rules[operand], ops.Mixes | ops.Groups) else 1.0

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
            forward = _passed(bond, self._numbers[known.site], onward=known is bond.a)
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
                prime_factors(groups), _digits_of(reads.width, groups), _digits_of(writes.width, groups), strict=True
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
            (s, [name.digit(s, v, n) for n, v in zip(prime_factors(g), _digits_of(s.width, g), strict=True)])
            for s, g in self._wanted
        ]
        first = name.first()
        self.sizes = {name: size for name, size in self.sizes.items() if first[name] == name}
        self.grouped = [replace(g, digits=tuple(first[d] for d in g.digits)) for g in self.grouped]
        self._orders: dict[int, tuple[int, Index]] = {}
        self.lying: dict[int, _Mounting] = {}  # by the digit that says so
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

    def _cut_loose(self, bond: _Bond) -> None:
        """Cut a tie. At a convolution's port it becomes a mount that serves a dense layer alone."""
        self._bonds.remove(bond)
        cost = self._move(bond.a.node, 1) if bond.cost == inf else bond.cost / bond.b.width
        if any(bond.b is port for port in self.port.values()):
            self.entangled.append(bond.b.node.name)
            self._mountings.append(_Mounting(bond.b, [bond.a], np.arange(bond.b.width), cost))
        else:
            self.fixed += cost * bond.b.width

    def _mount(self, mounting: _Mounting, digits: Mapping[int, Index], name: _Namer) -> None:
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


def _channels(node: fx.Node, axis: int | None = 1) -> int:
    return shape_of(node)[1 if axis is None else axis]


def _digits_of(width: int, groups: int) -> list[Index]:
    """The digits of the number of a channel's group, most significant first, as functions of the channel."""
    group = np.arange(width) // (width // groups)
    digits, left = [], groups
    for size in prime_factors(groups):
        left //= size
        digits.append(group // left % size)
    return digits


def _passed(bond: _Bond, numbers: Index, *, onward: bool) -> Index | None:
    """The numbers of the channels at the other end of a bond; None if they are not whole runs there."""
    if bond.shuffle is not None:
        return numbers[bond.shuffle] if onward else numbers[np.argsort(bond.shuffle)]
    if bond.repeat == 1:
        return numbers
    if onward:
        return (numbers[:, None] * bond.repeat + np.arange(bond.repeat)).reshape(-1)
    runs = numbers.reshape(-1, bond.repeat)
    first = runs[:, 0] // bond.repeat
    return first if np.array_equal(first[:, None] * bond.repeat + np.arange(bond.repeat), runs) else None


def _breadth_first(ties: nx.MultiGraph, root: int) -> Iterator[tuple[int, int, _Bond]]:
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
