"""Functions of two sites' flags that tell only some of them apart, and how a minimum passes through each.

A function f(a, b) is given by a table over classes of flags, ``f(a, b) = values[rows[a], columns[b]]``: a layer whose
digits are Z sees of a flag no more than its longest prefix within Z. ``push`` takes the minimum over a. Flags are
places in the domains of their sites (:mod:`foldgroup.planning.domains`); values are costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from foldgroup.planning.flags import FlagTree
from foldgroup.planning.problem import Link, Mount, Problem

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


class Function:
    """A function f(a, b) of two flags, by their classes."""

    rows: Places
    columns: Places
    shape: tuple[int, int]

    @property
    def values(self) -> Array:
        """By class of a and class of b."""
        raise NotImplementedError

    def turned(self) -> Function:
        """The same with a and b exchanged."""
        raise NotImplementedError

    def work(self, rows: int) -> int:
        """How many values ``push`` looks at for ``rows`` rows of ``given``."""
        raise NotImplementedError

    def push(self, given: Array) -> Array:
        """Min over the classes p of a of given[x, p] + values[p, q], [x, q]."""
        raise NotImplementedError

    def at(self, a: Places, b: Places) -> Array:
        """f(a, b), flag by flag."""
        result: Array = self.values[self.rows[a], self.columns[b]]
        return result

    def row(self, a: int) -> Array:
        """f(a, b) for all b."""
        result: Array = self.values[self.rows[a]][self.columns]
        return result


class Table(Function):
    """Values [p, q] as they are."""

    def __init__(self, values: Array, rows: Places, columns: Places) -> None:
        self._values, self.rows, self.columns = values, rows, columns
        self.shape = values.shape[0], values.shape[1]

    @property
    def values(self) -> Array:
        """By class of a and class of b."""
        return self._values

    def turned(self) -> Function:
        """The same with a and b exchanged."""
        return Table(self._values.T, self.columns, self.rows)

    def work(self, rows: int) -> int:
        """All pairs, for every row."""
        return rows * self._values.size

    def push(self, given: Array) -> Array:
        """Min over the classes p of a of given[x, p] + values[p, q], [x, q]."""
        result = np.full((len(given), self.shape[1]), np.inf)
        if len(given) < self.shape[0]:
            for x, row in enumerate(given):
                np.min(row[:, None] + self._values, axis=0, out=result[x])
        else:
            for column, row in zip(given.T, self._values, strict=True):
                np.minimum(result, column[:, None] + row, out=result)
        return result


class LinkFunction(Function):
    """The cost at the deepest node that two flags share, of those within the link's digits Z.

    The classes are these nodes, in preorder; the cost does not rise from a node to its children. So

        min over a of g(a) + f(a, b)  =  min over the ancestors t of b of c(t) + min over a below t of g(a),

    which takes a step for each node and not one for each pair.
    """

    def __init__(self, costs: Array, parent: Places, end: Places, rows: Places, columns: Places) -> None:
        self.costs, self.parent, self.end, self.rows, self.columns = costs, parent, end, rows, columns
        self.shape = len(costs), len(costs)

    @classmethod
    def of(cls, problem: Problem, link: Link, tree: FlagTree, a: Places, b: Places) -> LinkFunction:
        """For sites whose domains are the nodes ``a`` and ``b``."""
        nodes = np.flatnonzero(tree.within(link.digits))
        costs = [link.costs[problem.groups(frozenset(tree.flags[node]))] for node in nodes.tolist()]
        parent, end = np.searchsorted(nodes, tree.parent[nodes]), np.searchsorted(nodes, tree.end[nodes])
        deepest = tree.deepest(nodes)
        return cls(np.array(costs, dtype=float), parent, end, deepest[a], deepest[b])

    @cached_property
    def values(self) -> Array:
        """By class of a and class of b."""
        values = np.full(self.shape, self.costs[0])
        for node in range(1, len(self.costs)):
            if self.costs[node] != self.costs[self.parent[node]]:
                values[node : self.end[node], node : self.end[node]] = self.costs[node]
        return values

    def turned(self) -> Function:
        """The same with a and b exchanged."""
        return LinkFunction(self.costs, self.parent, self.end, self.columns, self.rows)

    def work(self, rows: int) -> int:
        """Every node twice, for every row."""
        return 2 * rows * len(self.costs)

    def push(self, given: Array) -> Array:
        """Min over the classes p of a of given[x, p] + values[p, q], [x, q]."""
        best = given.T.copy()
        for node in range(len(best) - 1, 0, -1):
            above = self.parent[node]
            np.minimum(best[above], best[node], out=best[above])
        best += self.costs[:, None]
        for node in range(1, len(best)):
            np.minimum(best[node], best[self.parent[node]], out=best[node])
        return best.T

    def row(self, a: int) -> Array:
        """f(a, b) for all b."""
        return self._row(int(self.rows[a]))[self.columns]

    def _row(self, node: int) -> Array:
        values = np.full(len(self.costs), self.costs[0])
        path = []
        while node != 0:
            path.append(node)
            node = int(self.parent[node])
        for node in reversed(path):
            values[node : self.end[node]] = self.costs[node]
        return values


def mount_costs(mount: Mount, tree: FlagTree) -> Array:
    """What each node costs as the flag of the site, whatever the segment's: 0 where it says no more than ``above``."""
    top = mount.above
    shortest = len(top) if mount.strict else 0
    free = (top[: len(flag)] == flag and len(flag) >= shortest for flag in tree.flags)
    return np.where(np.fromiter(free, dtype=bool, count=len(tree)), 0.0, mount.cost)


def served(mount: Mount, tree: FlagTree) -> dict[int, int]:
    """For a deep mount: the segment's nodes of which the site can be sorted by as much, each with the site's node."""
    places = {flag: node for node, flag in enumerate(tree.flags)}
    pairs = ((node, places.get(mount.above + flag)) for node, flag in enumerate(tree.flags) if flag)
    return {node: site for node, site in pairs if mount.deep and site is not None}


def mount_table(mount: Mount, tree: FlagTree, segment: Places, site: Places) -> Table:
    """A deep mount as a function of the segment's flag and the site's, whose domains are given."""
    serves = served(mount, tree)
    nodes = np.array([0, *serves])
    values = np.full((len(nodes), 2 + len(serves)), mount.cost)  # of the site: 0 always free, 1 never, then by node
    values[:, 0] = 0
    of_site = np.where(mount_costs(mount, tree) == 0, 0, 1)
    for place, (node, target) in enumerate(serves.items(), 2):
        values[(nodes >= node) & (nodes < tree.end[node]), place] = 0
        of_site[target] = place if of_site[target] else 0
    return Table(values, tree.deepest(nodes)[segment], of_site[site])


def summed(functions: Sequence[Function]) -> Function:
    """The sum of functions of the same two sites."""
    if len(functions) == 1:
        return functions[0]
    rows, of_row = joint(*(function.rows for function in functions))
    columns, of_column = joint(*(function.columns for function in functions))
    total = sum(f.values[np.ix_(f.rows[rows], f.columns[columns])] for f in functions)
    return Table(np.asarray(total), of_row, of_column)


def joint(*keys: npt.NDArray[np.generic]) -> tuple[Places, Places]:
    """The classes that agree in all keys: a member of each, and the class of every place."""
    classes = np.zeros(len(keys[0]), dtype=np.int64)
    first = classes[:1]
    for key in keys:
        _, number = np.unique(key, return_inverse=True)
        _, first, classes = np.unique(classes * (number.max(initial=0) + 1) + number, True, True)
    return first, classes


def least_by(classes: Places, count: int, given: Array, columns: Places) -> Array:
    """The least of ``given[:, columns[i]]`` over all i of each class, [x, class]; infinite where a class has none."""
    members, _ = joint(classes, columns)
    members = members[np.argsort(classes[members], kind="stable")]
    present, starts = np.unique(classes[members], return_index=True)
    result = np.full((len(given), count), np.inf)
    result[:, present] = np.minimum.reduceat(given[:, columns[members]], starts, axis=1)
    return result
