"""Functions of two sites' flags, and how a minimum passes through each without its L × L values.

See :mod:`foldgroup.planning.solver` for the mathematics. Values are costs; [a, b] runs over the nodes of a FlagTree.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from foldgroup.planning.flags import FlagTree
from foldgroup.planning.problem import Link, Mount, Problem, Tie

Array = npt.NDArray[np.float64]


class Function:
    """A function f(a, b) of two flags."""

    def table(self, flags: int) -> Array:
        """All values, [a, b]."""
        raise NotImplementedError

    def turned(self) -> Function:
        """The same with a and b exchanged; most are symmetric."""
        return self

    def diagonal(self) -> Array:
        """f(a, a) for all a."""
        raise NotImplementedError

    def row(self, a: int) -> Array:
        """f(a, b) for all b."""
        raise NotImplementedError

    def push(self, given: Array) -> Array:
        """Min over a of given[x, a] + f(a, b), [x, b]."""
        raise NotImplementedError


class TieFunction(Function):
    """0 for equal flags, else the tie's cost."""

    def __init__(self, tie: Tie, flags: int) -> None:
        self.tie = tie
        self.flags = flags

    def table(self, flags: int) -> Array:
        """All values, [a, b]."""
        return np.where(np.eye(flags, dtype=bool), 0.0, self.tie.cost)

    def diagonal(self) -> Array:
        """f(a, a) for all a."""
        return np.zeros(self.flags)

    def row(self, a: int) -> Array:
        """f(a, b) for all b."""
        values = np.full(self.flags, self.tie.cost)
        values[a] = 0
        return values

    def push(self, given: Array) -> Array:
        """Min over a of given[x, a] + f(a, b), [x, b]."""
        result: Array = np.minimum(given, given.min(axis=1, keepdims=True) + self.tie.cost)
        return result


class MountFunction(Function):
    """0 where the site's flag says no more than the segment's, else the mount's cost; [segment, site], or turned."""

    def __init__(self, mount: Mount, tree: FlagTree, *, upward: bool = False) -> None:
        self.mount = mount
        self.tree = tree
        self.upward = upward
        places = {flag: node for node, flag in enumerate(tree.flags)}
        top = mount.above
        shortest = len(top) if mount.strict else 0
        self.always = [i for i, flag in enumerate(tree.flags) if top[: len(flag)] == flag and len(flag) >= shortest]
        """The site's flags that serve any segment, and below: for a segment's node the site's flag that it serves."""
        served = ((node, places.get(top + flag)) for node, flag in enumerate(tree.flags) if flag)
        self.serves = {node: site for node, site in served if mount.deep and site is not None}

    def turned(self) -> MountFunction:
        """The same with a and b exchanged."""
        return MountFunction(self.mount, self.tree, upward=not self.upward)

    def table(self, flags: int) -> Array:
        """All values, [a, b]."""
        values = np.full((flags, flags), self.mount.cost)  # [segment, site]
        values[:, self.always] = 0
        for node, site in self.serves.items():
            values[node : self.tree.end[node], site] = 0
        return values.T if self.upward else values

    def diagonal(self) -> Array:
        """f(a, a) for all a."""
        return self.table(len(self.tree)).diagonal().copy()

    def row(self, a: int) -> Array:
        """f(a, b) for all b."""
        values: Array = self.table(len(self.tree))[a]
        return values

    def push(self, given: Array) -> Array:
        """Min over a of given[x, a] + f(a, b), [x, b]."""
        least = given.min(axis=1)
        if not self.upward:
            below = _least_below(self.tree, given)
            result = np.tile((least + self.mount.cost)[:, None], (1, given.shape[1]))
            for node, site in self.serves.items():
                result[:, site] = np.minimum(result[:, site], below[node])
            result[:, self.always] = least[:, None]
            return result
        free = np.minimum(given[:, self.always].min(axis=1), least + self.mount.cost)
        best = np.tile(free, (given.shape[1], 1))  # [segment, x]
        for node in range(1, len(self.tree)):
            np.minimum(best[node], best[self.tree.parent[node]], out=best[node])
            if node in self.serves:
                np.minimum(best[node], given[:, self.serves[node]], out=best[node])
        return best.T


def _least_below(tree: FlagTree, given: Array) -> Array:
    """The least value of every node's subtree, [node, x], of values [x, node]."""
    below = given.T.copy()
    for node in range(len(tree) - 1, 0, -1):
        parent = tree.parent[node]
        np.minimum(below[parent], below[node], out=below[parent])
    return below


class LinkFunction(Function):
    """The cost at the deepest node that two flags share."""

    def __init__(self, problem: Problem, link: Link, tree: FlagTree) -> None:
        self.tree = tree
        self.costs = np.empty(len(tree))
        for node, flag in enumerate(tree.flags):
            inside = link.digits.issuperset(flag)
            self.costs[node] = link.costs[problem.groups(frozenset(flag))] if inside else self.costs[tree.parent[node]]

    def table(self, flags: int) -> Array:
        """All values, [a, b]."""
        values = np.full((flags, flags), self.costs[0])
        for node in range(1, len(self.tree)):
            below = slice(node, self.tree.end[node])
            if self.costs[node] != self.costs[self.tree.parent[node]]:
                values[below, below] = self.costs[node]
        return values

    def diagonal(self) -> Array:
        """f(a, a) for all a."""
        return self.costs

    def row(self, a: int) -> Array:
        """f(a, b) for all b."""
        values = np.full(len(self.tree), self.costs[0])
        path = []
        while a != 0:
            path.append(a)
            a = int(self.tree.parent[a])
        for node in reversed(path):
            values[node : self.tree.end[node]] = self.costs[node]
        return values

    def push(self, given: Array) -> Array:
        """Min over a of given[x, a] + f(a, b), [x, b]."""
        best = _least_below(self.tree, given) + self.costs[:, None]
        for node in range(1, len(self.tree)):
            np.minimum(best[node], best[self.tree.parent[node]], out=best[node])
        return best.T


class Table(Function):
    """Values [a, b] as they are."""

    def __init__(self, values: Array) -> None:
        self.values = values

    def table(self, flags: int) -> Array:
        """All values, [a, b]."""
        return self.values

    def turned(self) -> Function:
        """The same with a and b exchanged."""
        return Table(self.values.T)

    def diagonal(self) -> Array:
        """f(a, a) for all a."""
        return self.values.diagonal().copy()

    def row(self, a: int) -> Array:
        """f(a, b) for all b."""
        row: Array = self.values[a]
        return row

    def push(self, given: Array) -> Array:
        """Min over a of given[x, a] + f(a, b), [x, b]."""
        result: Array = np.stack([(row[:, None] + self.values).min(axis=0) for row in given])
        return result
