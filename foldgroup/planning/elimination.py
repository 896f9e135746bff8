"""Functions of sites' flags, and the flags that make their sum least, found by eliminating one site after the other.

Eliminating a site with neighbours A replaces all functions that mention it by their minimum over its flags, a function
of A alone; the minimum of the last one is the least sum, and going back in reverse order finds its flags. Where every
site left has three neighbours or more, one of them is tried with each of its flags. This is exact, whatever the graph.

A tie of cost s is kept apart from the functions of classes (:mod:`foldgroup.planning.functions`), as the minimum passes
through it with what else is between two sites, f, without telling their flags apart:

    min over a of g(x, a) + f(a, b) + s·[a ≠ b]  =  min( g(x, b) + f(b, b),  s + min over a of g(x, a) + f(a, b) )

depends on b by no more than g's class of b, f's row of b and f's column of b.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf, prod

import numpy as np

from foldgroup.planning.functions import Array, Function, Places, Table, joint, least_by, summed

STEP = 20_000
"""As many values could be looked at in the time that an elimination takes besides."""

MAX_TABLE = 40_000_000
"""Values of one function, at most."""


class TooMuchWork(Exception):
    """More values would have to be looked at, or kept, than were allowed."""


@dataclass
class Work:
    """How many values may still be looked at."""

    left: float

    def spend(self, values: float, kept: float = 0) -> None:
        """Take note of ``values`` to look at, and of a function with as many as ``kept``.

        Raises:
            TooMuchWork: if that is too many.
        """
        self.left -= values + kept
        if self.left < 0 or (kept > MAX_TABLE and self.left < inf):
            raise TooMuchWork


@dataclass(frozen=True)
class Between:
    """What is between two sites a and b: a tie of a cost, which may be 0, and functions of a and b."""

    tie: float = 0.0
    functions: tuple[Function, ...] = ()

    def plus(self, other: Between) -> Between:
        """Both."""
        return Between(self.tie + other.tie, self.functions + other.functions)

    def turned(self) -> Between:
        """The same with a and b exchanged."""
        return Between(self.tie, tuple(function.turned() for function in self.functions))

    def classes(self, side: int) -> int:
        """How many flags of a (0) or b (1) the functions tell apart, at most."""
        every = len((self.functions[0].rows, self.functions[0].columns)[side])
        return min(every, prod(function.shape[side] for function in self.functions))


@dataclass
class Functions:
    """Those of the sites that are left. A flag is a place in the site's domain, which has nodes in rising order.

    ``unary[a]`` is what each flag of a costs by itself, and ``near[a][b]`` what is between a and b, from a to b.
    """

    domains: Mapping[int, Places]
    unary: dict[int, Array] = field(default_factory=dict)
    near: dict[int, dict[int, Between]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in () if self.unary else self.domains:
            self.unary[site], self.near[site] = np.zeros(len(self.domains[site])), {}

    def add(self, a: int, b: int, between: Between) -> None:
        """Add what is between ``a`` and ``b``, or what each flag costs if they are one site."""
        if not between.tie and not between.functions:
            return
        if a == b:
            every = np.arange(len(self.domains[a]))
            for function in between.functions:
                self.unary[a] = self.unary[a] + function.at(every, every)
            return
        self.near[a][b] = self.near[a].get(b, Between()).plus(between)
        self.near[b][a] = self.near[b].get(a, Between()).plus(between.turned())

    def row(self, a: int, flag: int, b: int, between: Between) -> Array:
        """What is ``between`` a with its ``flag`` and each flag of b."""
        tie = np.where(self.domains[b] == self.domains[a][flag], 0.0, between.tie)
        return sum((function.row(flag) for function in between.functions), start=tie)

    def without(self, site: int, flag: int | None) -> tuple[Functions, float]:
        """What is left for the others when ``site`` has a flag, and what that costs by itself.

        Without a flag: a lower bound of that, where what is between the site and each other may choose its own.
        """
        left = Functions(self.domains, dict(self.unary), {other: dict(near) for other, near in self.near.items()})
        own, near = left.take(site)
        for other, between in near.items():
            if flag is not None:
                left.unary[other] = left.unary[other] + self.row(site, flag, other, between)
                continue
            for function in between.functions:
                lowest = function.push(np.zeros((1, function.shape[0])))[0]
                left.unary[other] = left.unary[other] + lowest[function.columns]
        return left, float(own.min() if flag is None else own[flag])

    def take(self, site: int) -> tuple[Array, dict[int, Between]]:
        """Take a site out: what its flags cost, and what is between it and its neighbours."""
        near = self.near.pop(site)
        for other in near:
            del self.near[other][site]
        return self.unary.pop(site), near

    def work(self, site: int) -> float:
        """About as many values as the function of its two neighbours that a site leaves is made of; 0 if it has not
        two.
        """
        if len(self.near[site]) != 2:
            return 0.0
        rows = (
            len(self.domains[other]) if between.tie else between.classes(1)
            for other, between in self.near[site].items()
        )
        return float(min(rows) * len(self.domains[site]))

    def eliminate(self, site: int, work: Work) -> tuple[Array, dict[int, Between], float]:
        """Replace a site by a function of its neighbours, two at most: what it was, and the cost if it had none."""
        work.spend(STEP)
        own, near = self.take(site)
        if not near:
            return own, near, float(own.min())
        if len(near) == 1:
            ((b, at_b),) = near.items()
            first, classes = joint(own)
            values, columns = self._through(own[None, first], classes, site, b, at_b, work)
            self.unary[b] = self.unary[b] + values[0][columns]
            return own, near, 0.0
        (a, at_a), (b, at_b) = near.items()
        if self._passes(site, own, near):
            self.add(a, b, Between(min(at_a.tie, at_b.tie)))
            return own, near, 0.0
        if bool(at_a.tie) > bool(at_b.tie) or (not at_b.tie and _cheaper(at_b, at_a)):
            (a, at_a), (b, at_b) = (b, at_b), (a, at_a)
        at_site = self._table(site, a, at_a, work).turned()
        first, classes = joint(at_site.columns, own)
        work.spend(0, at_site.shape[0] * len(first))
        given = at_site.values[:, at_site.columns[first]] + own[first]
        values, columns = self._through(given, classes, site, b, at_b, work)
        self.add(a, b, Between(functions=(Table(values, at_site.rows, columns),)))
        return own, near, 0.0

    def _passes(self, site: int, own: Array, near: Mapping[int, Between]) -> bool:
        """Whether there is nothing but ties at a site, which may have every flag that its neighbours have."""
        bare = not own.any() and all(between.tie and not between.functions for between in near.values())
        return bare and all((self._same(site, other) >= 0).all() for other in near)

    def _same(self, site: int, other: int) -> Places:
        """For each flag of ``other`` its place among those of ``site``, or −1."""
        domain = self.domains[site]
        places = np.searchsorted(domain, self.domains[other]).clip(max=len(domain) - 1)
        return np.where(domain[places] == self.domains[other], places, -1)

    def _table(self, a: int, b: int, between: Between, work: Work) -> Function:
        """What is between two sites as one function; a tie tells all flags apart."""
        if not between.tie:
            return self._sum(between, work)
        size = len(self.domains[a]) * len(self.domains[b])
        work.spend(size, size)
        values = np.where(self.domains[a][:, None] == self.domains[b], 0.0, between.tie)
        for function in between.functions:
            values += function.values[np.ix_(function.rows, function.columns)]
        return Table(values, np.arange(len(values)), np.arange(values.shape[1]))

    def _sum(self, between: Between, work: Work) -> Function:
        if len(between.functions) > 1:
            work.spend(0, between.classes(0) * between.classes(1))
        return summed(between.functions)

    def _through(
        self, given: Array, classes: Places, site: int, other: int, between: Between, work: Work
    ) -> tuple[Array, Places]:
        """Min over the flags s of ``site`` of ``given[x, classes[s]]`` and what is ``between`` it and ``other``.

        Returns values [x, class of the other's flag], and these classes.
        """
        function = self._sum(between, work) if between.functions else None
        if function is None:
            values, columns = given.min(axis=1, keepdims=True), np.zeros(len(self.domains[other]), dtype=np.int64)
        else:
            work.spend(given.size + function.work(len(given)), len(given) * function.shape[1])
            values = function.push(least_by(function.rows, function.shape[0], given, classes))
            columns = function.columns
        if not between.tie:
            return values, columns
        here = self._same(site, other)
        keys = [columns, np.where(here >= 0, classes[here], -1)]
        first, result = joint(*keys, *([] if function is None else [np.where(here >= 0, function.rows[here], -1)]))
        work.spend(0, len(given) * len(first))
        values = values[:, columns[first]] + between.tie
        both = np.flatnonzero(here[first] >= 0)
        equal = given[:, classes[here[first[both]]]]
        if function is not None:
            work.spend(0, prod(function.shape))
            equal = equal + function.at(here[first[both]], first[both])
        values[:, both] = np.minimum(values[:, both], equal)
        return values, result


def _cheaper(at_a: Between, at_b: Between) -> bool:
    """Whether a minimum had better pass from a to b than from b to a."""

    def work(given: Between, through: Between) -> int:
        return sum(function.work(given.classes(1)) for function in through.functions)

    return work(at_a, at_b) < work(at_b, at_a)


class _Queue:
    """The sites by how many neighbours they have, then by the work of eliminating them, then by number.

    It is a heap, as there may be thousands; what was known of a site that has changed is passed over later.
    """

    def __init__(self, functions: Functions) -> None:
        self.functions = functions
        self.heap = [self._entry(site) for site in functions.near]
        self.known = {entry[-1]: entry for entry in self.heap}
        heapify(self.heap)

    def _entry(self, site: int) -> tuple[int, float, int]:
        return len(self.functions.near[site]), self.functions.work(site), site

    def changed(self, sites: Iterable[int]) -> None:
        """Take note that ``sites`` have other functions now."""
        for site in sites:
            self.known[site] = self._entry(site)
            heappush(self.heap, self.known[site])

    def first(self) -> int:
        """The first site; there must be one."""
        while True:
            entry = self.heap[0]
            if entry[-1] in self.functions.near and self.known[entry[-1]] == entry:
                return entry[-1]
            heappop(self.heap)


def least(functions: Functions, work: Work) -> tuple[dict[int, int], float]:
    """The flags of all sites that make the sum least, and the sum. ``functions`` is used up.

    Raises:
        TooMuchWork: if that needs more than ``work``.
    """
    order: list[tuple[int, Array, dict[int, Between]]] = []
    chosen: dict[int, int] = {}
    cost = 0.0
    queue = _Queue(functions)
    while functions.unary:
        site = queue.first()
        if len(functions.near[site]) > 2:
            chosen, rest = _tried(functions, hardest(functions.near, functions.domains), work)
            cost += rest
            break
        own, near, constant = functions.eliminate(site, work)
        order.append((site, own, near))
        cost += constant
        queue.changed(near)
    for site, own, near in reversed(order):
        rows = (functions.row(other, chosen[other], site, near[other].turned()) for other in near)
        chosen[site] = int(sum(rows, start=own).argmin())
    return chosen, cost


def _tried(functions: Functions, site: int, work: Work) -> tuple[dict[int, int], float]:
    """Try every flag of ``site``, whose functions become functions of one site each."""
    best: tuple[dict[int, int], float] = {}, inf
    for flag in range(len(functions.domains[site])):
        left, own = functions.without(site, flag)
        if own == inf and best[0]:
            continue
        chosen, cost = least(left, work)
        if own + cost < best[1] or not best[0]:
            best = {**chosen, site: flag}, own + cost
    return best


def hardest(near: Mapping[int, Iterable[int]], domains: Mapping[int, Places]) -> int:
    """The site with the most neighbours; of several, that with the fewest flags, then the first."""
    return max(near, key=lambda site: (len(list(near[site])), -len(domains[site]), -site))


def to_try(functions: Functions) -> list[int]:
    """Sites without which no site ever has more than two neighbours."""
    near = {site: set(others) for site, others in functions.near.items()}
    tried: list[int] = []
    light = list(near)
    while near:
        if light:
            site = light.pop()
            if site not in near or len(near[site]) > 2:
                continue
        else:
            site = hardest(near, functions.domains)
            tried.append(site)
        others = near.pop(site)
        for other in others:
            near[other].remove(site)
            near[other] |= others - {other} if len(others) == 2 else set()
        light += others
    return tried
