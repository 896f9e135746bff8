"""The flags that can matter, as a tree.

Every flag is a path from the root; its digits beyond the last set that some link could still use are left out. Even so
there are n! flags of n digits, but most are never needed. Let 𝒵 be the digit sets of the links and P the digits of a
path. Only the sets that contain P can still gain from what follows: 𝒵_P = {Z ∈ 𝒵 : P ⊆ Z}. For a digit d that some of
them have, let

    cl(P + d) = ∩ {Z ∈ 𝒵_P : d ∈ Z}.

Whoever places d may place all of cl(P + d) right behind it, for no set that d leaves in play is lost by that; and where
cl(P + d) contains a smaller cl(P + e), e may go first. This rewrites flags one and all, digit by digit from the root,
so flags that agreed still agree, and no common prefix within a Z becomes shorter. Hence only the smallest closures are
children of P. With one set in play there is one child, the whole set.

Under a mount, what a site is sorted by is ``above`` and then what the segment is sorted by. So that both find the same
flags there, every set is also put below ``above``, and those that have it are also put without it.

A site that lacks digits needs the sets without them too; the solver puts them in.

A pinned flag is as it is, and so is the flag above a segment: its path is in the tree digit by digit, and a closure
that contains its next digit is reached through it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import numpy.typing as npt

from foldgroup.planning.problem import Digit, Flag


class TooManyFlags(Exception):
    """The tree has more nodes than were allowed."""


@dataclass(frozen=True)
class FlagTree:
    """Nodes in preorder. Node i is ``flags[i]``; its subtree are the nodes i … ``end[i]`` − 1; the root is its own
    parent.
    """

    flags: tuple[Flag, ...]
    parent: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.flags)

    def node(self, flag: Flag) -> int:
        """The node of a flag that is in the tree."""
        return self.flags.index(flag)

    def within(self, digits: frozenset[Digit]) -> npt.NDArray[np.bool_]:
        """Of every node whether it has no other digits than these; with a node, all its ancestors are."""
        others = [column for column, digit in enumerate(self.digits) if digit not in digits]
        return np.logical_not(self._has[:, others].any(axis=1))

    @cached_property
    def digits(self) -> list[Digit]:
        """All that occur."""
        return sorted({digit for flag in self.flags for digit in flag})

    @cached_property
    def _has(self) -> npt.NDArray[np.bool_]:
        """[node, place in ``digits``]."""
        column = {digit: place for place, digit in enumerate(self.digits)}
        has = np.zeros((len(self), len(column)), dtype=bool)
        for node, flag in enumerate(self.flags):
            has[node, [column[digit] for digit in flag]] = True
        return has

    def path(self, node: int) -> list[int]:
        """A node and all above it."""
        nodes = [node]
        while nodes[-1]:
            nodes.append(int(self.parent[nodes[-1]]))
        return nodes

    def deepest(self, nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """For every node the place in ``nodes``, of which the first is the root, of its nearest ancestor or itself."""
        result = np.zeros(len(self), dtype=np.int64)
        for place, node in sorted(enumerate(nodes.tolist()), key=lambda item: item[1]):
            result[node : self.end[node]] = place
        return result


def flag_tree(
    demands: Collection[frozenset[Digit]],
    paths: Collection[Flag],
    limit: int,
    above: Collection[Flag] = (),
    besides: Collection[Flag] = (),
) -> FlagTree:
    """The tree for the digit sets of the links and what else is wanted, with the flags in ``paths``.

    These are the pins and the flags above segments; ``above`` has those of deep mounts once more. The flags in
    ``besides`` are put behind all others, as if they had nothing in common with them.

    Raises:
        TooManyFlags: if it has more than ``limit`` nodes.
    """
    below = {demand - set(top) for top in above for demand in demands if demand.issuperset(top)}
    demands = {*demands, *below}
    demands |= {demand.union(top) for top in above for demand in demands}
    digits = sorted(frozenset().union(*demands, *paths))
    bit = {digit: 1 << place for place, digit in enumerate(digits)}
    flags: list[Flag] = []
    parents: list[int] = []
    end: list[int] = []

    def grow(flag: Flag, placed: int, alive: list[int], paths: list[Flag], parent: int) -> None:
        if len(flags) == limit:
            raise TooManyFlags
        here = len(flags)
        flags.append(flag)
        parents.append(max(parent, 0))
        end.append(0)
        following = {path[len(flag)] for path in paths if len(path) > len(flag)}
        for digit in sorted(following):
            now = placed | bit[digit]
            left = [path for path in paths if len(path) > len(flag) and path[len(flag)] == digit]
            grow((*flag, digit), now, [demand for demand in alive if demand & now == now], left, here)
        reached = sum(bit[digit] for digit in following)
        for closure in _smallest(alive, placed):
            if not closure & reached:
                now = placed | closure
                step = tuple(digit for digit in digits if bit[digit] & closure)
                grow((*flag, *step), now, [demand for demand in alive if demand & now == now], [], here)
        end[here] = len(flags)

    masks = sorted({sum(bit[digit] for digit in demand) for demand in demands})
    grow((), 0, masks, list(paths), -1)
    for flag in sorted(set(besides) - set(flags)):
        flags.append(flag)
        parents.append(0)
        end.append(len(flags))
    end[0] = len(flags)
    return FlagTree(tuple(flags), np.array(parents), np.array(end))


def _smallest(alive: list[int], placed: int) -> list[int]:
    """The smallest closures of ``placed`` and one digit more, without ``placed``; sets are bit masks."""
    closures: set[int] = set()
    left = reduce(operator.or_, alive, 0) & ~placed
    while left:
        digit = left & -left
        closure = reduce(operator.and_, (demand for demand in alive if demand & digit)) & ~placed
        closures.add(closure)
        left &= ~digit
    return sorted(c for c in closures if not any(other & c == other and other != c for other in closures))
