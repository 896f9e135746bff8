"""Where the channels of a graph are cut into segments, and how these are tied.

Every tensor's channel axis is cut into *segments*: the shortest runs of channels such that an order may move channels
within a run but never across its ends. Most axes are one segment; concatenation and splitting cut them. A segment is a
site of the planner (:mod:`foldgroup.planning.problem`), and so is the *trunk* of a tensor with several readers: the
order in which they find it. Sites are tied where channels pass from one to the other, at the price of a shuffle there:

* from a tensor to its trunk, and from the trunk to each reader through which channels pass or which has groups;
* across a ChannelShuffle v = u[:, s], whose two sides agree iff v's channel i stands where u's channel s[i] does. Such
  a tie that holds removes the shuffle.

A convolution with groups that reads or writes an axis of several segments does so through a *mount*: it is served as it
is by whatever the segments are sorted by that numbers its groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, prod

import numpy as np
import numpy.typing as npt
from torch import fx, nn

from foldgroup import rules as ops
from foldgroup.planning.cost import BYTES, Cost, CostModel
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
class Bond:
    """A tie before it is numbered; ``shuffle`` is s for v = u[:, s], and a channel of a makes ``repeat`` of b's."""

    a: Segment
    b: Segment
    cost: float
    shuffle: Index | None = None
    repeat: int = 1


@dataclass
class Mounting:
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
class SegmentGraph:
    """The segments of a graph and their ties."""

    graph: fx.GraphModule
    cost: Cost = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        """Cut and tie."""
        self.rules, self.axes = rules_of(self.graph)
        self._sites: list[Segment] = []
        self._bonds: list[Bond] = []
        self._mountings: list[Mounting] = []
        self.pinned: dict[int, str] = {}
        """Why the order of a site is fixed."""
        self.fixed = 0.0
        """The cost of shuffles that stay whatever the plan."""
        self._links: list[tuple[fx.Node, Segment, Segment, int]] = []
        self._wanted: list[tuple[Segment, int]] = []
        self.own: dict[fx.Node, list[Segment]] = {}
        self.trunk: dict[fx.Node, list[Segment]] = {}
        self.port: dict[fx.Node, Segment] = {}
        """The input side of every grouped convolution."""
        self.cuts = self._cut()
        for node in self.graph.graph.nodes:
            self._tie(node)

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
            self._bonds.append(Bond(before[0], after[0], cost * len(order), order))
        elif self._is_port(node):
            self._mountings.append(Mounting(after[0], before, np.argsort(order), cost))
        elif isinstance(self.rules[rule.operand], ops.Groups) and len(rule.operand.users) == 1:
            self._mountings.append(Mounting(before[0], after, order, cost))
        elif len(after) == 1:
            self._mountings.append(Mounting(after[0], before, np.argsort(order), cost, strict=True))
        elif len(before) == 1:
            self._mountings.append(Mounting(before[0], after, order, cost, strict=True))
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
            self._mountings.append(Mounting(port, segments, np.arange(port.width), cost))

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
        self._bonds.append(Bond(a, b, cost, repeat=repeat))

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


def _channels(node: fx.Node, axis: int | None = 1) -> int:
    return shape_of(node)[1 if axis is None else axis]


def passed(bond: Bond, numbers: Index, *, onward: bool) -> Index | None:
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
