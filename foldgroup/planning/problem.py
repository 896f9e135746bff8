"""The question that a plan answers: digit orders for sites, ties that want equal orders, links that want common
prefixes.

**Sites** are channel axes that need one order each. An order is described by its *flag*: a sequence of digits (d_1,
d_2, …), most significant first, by which the channels are sorted; what the flag leaves open keeps its old order.

**Ties** join two sites between which channels pass unchanged. Equal flags cost nothing; otherwise a shuffle is kept
there, for the cost of moving the tensor.

**Links** are convolutions with learned groups. A layer whose zero-bit digits are Z can run as groups by the digits of a
set T ⊆ Z iff the channels that agree in T are neighbours, on both of its sides and in the same sequence: T must be a
prefix of both flags, the same prefix. So between sites with flags a and b the layer runs

    G = Π_{d ∈ T} n_d groups,   T = the longest common prefix of a and b that is a subset of Z,

and costs what that many groups cost. Fewer groups than learned are *coarser* ones: exact, more multiply-adds, no
shuffle. The costs never rise with G, because neighbouring groups can be packed.

**Mounts** join a site to one part of an axis that concatenation or splitting has cut into segments. The site's layer
does not need an order of its own there if its flag says no more than the segments do anyway: if it is a prefix of
``above``, the digits that number the segments themselves; or, where the segments are alike (``deep``), ``above``
followed by a prefix of the segment's flag. Otherwise the segment is shuffled, for its cost.

**Pins** fix the flag of a site: the order of the network's input, its output and of whatever has no rule.

A *plan* chooses a flag for every site; its cost is the sum over ties and links. Orders other than digit orders need not
be looked at: in any order, the digit sets whose blocks are contiguous form a chain (two of them, T_1 and T_2, are both
contiguous only if one contains the other, since their blocks meet in equally many channels), and across a link the
chains agree on the subsets of T. Sorting every site by its chain, ties among digits broken alike everywhere, keeps
every block contiguous, every sequence equal and every equal pair of orders equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, prod

Digit = int
Flag = tuple[Digit, ...]


@dataclass(frozen=True)
class Tie:
    """Sites ``a`` and ``b`` share an order, or pay ``cost``."""

    a: int
    b: int
    cost: float

    def free(self, a: Flag, b: Flag) -> bool:
        """Whether nothing has to be moved."""
        return a == b


@dataclass(frozen=True)
class Mount:
    """Segment ``a`` of a cut axis serves site ``b`` as it is, or is shuffled for ``cost``.

    If ``strict``, the site has other uses than one layer: nothing but the flag ``above`` is what the segments are.
    """

    a: int
    b: int
    cost: float
    above: Flag = ()
    deep: bool = False
    strict: bool = False

    def free(self, a: Flag, b: Flag) -> bool:
        """Whether nothing has to be moved."""
        within = self.above + a if self.deep else self.above
        return b == self.above if self.strict else within[: len(b)] == b


@dataclass(frozen=True)
class Link:
    """A layer between sites ``a`` (inputs) and ``b`` (outputs) with zero-bit digits ``digits``.

    ``costs`` has the cost by group count for every product of a subset of the digits; it does not rise with the count.
    """

    a: int
    b: int
    digits: frozenset[Digit]
    costs: Mapping[int, float]


@dataclass(frozen=True)
class Problem:
    """Sites 0 … ``sites`` − 1, digits with their ``sizes``, and what holds between sites.

    ``pins`` give some sites a flag. ``wanted`` give sites digit sets that their flags must have as a prefix. ``lacks``
    are the digits that a site cannot be sorted by.
    """

    sites: int
    sizes: Mapping[Digit, int]
    ties: tuple[Tie, ...] = ()
    links: tuple[Link, ...] = ()
    mounts: tuple[Mount, ...] = ()
    pins: Mapping[int, Flag] = field(default_factory=dict)
    wanted: Mapping[int, frozenset[Digit]] = field(default_factory=dict)
    lacks: Mapping[int, frozenset[Digit]] = field(default_factory=dict)

    def groups(self, digits: frozenset[Digit]) -> int:
        """How many groups a set of digits makes."""
        return prod(self.sizes[digit] for digit in digits)

    def cost(self, flags: Mapping[int, Flag]) -> float:
        """What a plan costs, straight from the definition."""
        total = 0.0
        for site, pinned in self.pins.items():
            total += 0.0 if flags[site] == pinned else inf
        for site, digits in self.lacks.items():
            total += inf if digits & set(flags[site]) else 0.0
        for site, digits in self.wanted.items():
            prefixes = [set(flags[site][:i]) for i in range(len(flags[site]) + 1)]
            total += 0.0 if digits in prefixes else inf
        joints: list[Tie | Mount] = [*self.ties, *self.mounts]
        for joint in joints:
            total += 0.0 if joint.free(flags[joint.a], flags[joint.b]) else joint.cost
        for link in self.links:
            total += link.costs[self.groups(common_prefix(flags[link.a], flags[link.b], link.digits))]
        return total


def common_prefix(a: Flag, b: Flag, within: frozenset[Digit]) -> frozenset[Digit]:
    """The longest common prefix of two flags that is a subset of ``within``, as a set."""
    taken: set[Digit] = set()
    for one, other in zip(a, b, strict=False):
        if one != other or one not in within:
            break
        taken.add(one)
    return frozenset(taken)
