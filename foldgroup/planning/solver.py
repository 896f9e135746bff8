"""The best plan: sites are eliminated one by one, each into a table over what is left of its neighbours.

A problem is a sum of functions of one or two sites over the flags of a :class:`FlagTree`. Eliminating a site with
neighbours A replaces all functions that mention it by their minimum over its flags, a function of A alone; the minimum
of the last one is the cost of the best plan, and going back in reverse order finds its flags. This is exact dynamic
programming over flags, whatever the graph. Its cost is that of its largest table, so sites go in the order of their
degree: a residual network never has more than two neighbours at a time.

Neither kind of function needs its L × L values for L flags. With F(a) the minimum so far,

* a tie of cost s gives         min(F(b), s + min_a F(a)),
* a link with cost c(node)      min over the ancestors t of b of c(t) + min_{a below t} F(a),

because c does not rise from a node to its children. So one elimination takes O(L) for a neighbour and O(L²) for two,
or O(L³) if both are behind tables. Where every site left has three neighbours or more, one of them is tried with each
of its flags.

Where even that is too large, the sites that would have to be tried are held at one flag each and improved in turn, and
the flags are cut down to those that the links with most to gain ask for. The plan found is then an upper bound, and
what every link costs with all its groups and no shuffle anywhere a lower one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import inf

import networkx as nx
import numpy as np

from foldgroup.planning.flags import FlagTree, TooManyFlags, flag_tree
from foldgroup.planning.functions import Array, Function, LinkFunction, MountFunction, Table, TieFunction
from foldgroup.planning.problem import Flag, Link, Mount, Problem, Tie

MAX_FLAGS = 20_000
"""Flags of a component, at most; more are cut down."""

MAX_WORK = 1_000_000_000
"""Entries of all tables of a component together, at most, which is a matter of seconds; more flags are cut down."""


MAX_STEPS = 200_000
"""Sites that are eliminated in all, at most, where some have to be tried with every flag."""

ROUNDS = 6
"""How often a plan that cannot be found exactly is improved, at most."""


@dataclass(frozen=True)
class Solution:
    """A plan: a flag for every site, what it costs, and a cost that no plan can be below.

    ``exact`` says that nothing was cut down: then ``bound`` is ``cost``.
    """

    flags: tuple[Flag, ...]
    cost: float
    bound: float

    @property
    def exact(self) -> bool:
        """Whether no plan is cheaper."""
        return self.cost <= self.bound * (1 + 1e-9)


_Unary = dict[int, Array]
"""For every site what each of its flags costs by itself."""
_Pairs = defaultdict[tuple[int, int], list["Function"]]
"""For every two sites, the lesser first, the functions between them."""


def solve(problem: Problem, max_flags: int = MAX_FLAGS, max_work: int = MAX_WORK) -> Solution:
    """The plan of least cost, component by component."""
    graph = nx.Graph()
    graph.add_nodes_from(range(problem.sites))
    graph.add_edges_from((tie.a, tie.b) for tie in problem.ties)
    graph.add_edges_from((link.a, link.b) for link in problem.links)
    graph.add_edges_from((mount.a, mount.b) for mount in problem.mounts)
    flags: list[Flag] = [()] * problem.sites
    cost = bound = 0.0
    components = list(nx.connected_components(graph))
    for component, part in zip(components, _parts(problem, components), strict=True):
        solution = _solve_component(part, sorted(component), max_flags, max_work)
        for site in component:
            flags[site] = solution.flags[site]
        cost += solution.cost
        bound += solution.bound
    return Solution(tuple(flags), cost, bound)


def _parts(problem: Problem, components: Sequence[Collection[int]]) -> Iterator[Problem]:
    """The problem of each component."""
    part_of = {site: number for number, component in enumerate(components) for site in component}
    ties: dict[int, list[Tie]] = defaultdict(list)
    links: dict[int, list[Link]] = defaultdict(list)
    mounts: dict[int, list[Mount]] = defaultdict(list)
    for tie in problem.ties:
        ties[part_of[tie.a]].append(tie)
    for link in problem.links:
        links[part_of[link.a]].append(link)
    for mount in problem.mounts:
        mounts[part_of[mount.a]].append(mount)
    for number, component in enumerate(components):
        yield replace(
            problem,
            ties=tuple(ties[number]),
            links=tuple(links[number]),
            mounts=tuple(mounts[number]),
            pins={site: problem.pins[site] for site in component if site in problem.pins},
            wanted={site: problem.wanted[site] for site in component if site in problem.wanted},
            lacks={site: problem.lacks[site] for site in component if site in problem.lacks},
        )


def _solve_component(problem: Problem, sites: list[int], max_flags: int, max_work: int) -> Solution:
    """Exactly if it fits; else with the flags of ever fewer links."""
    least = sum(link.costs[problem.groups(link.digits)] for link in problem.links)
    by_gain = sorted(problem.links, key=lambda link: link.costs[problem.groups(link.digits)] - link.costs[1])
    wanted = {*problem.wanted.values()}
    above = {mount.above for mount in problem.mounts if mount.deep}
    paths = {*problem.pins.values(), *(mount.above for mount in problem.mounts)}
    tables, products, fixed = _tables(problem, sites)
    work = max(1, tables) * max(1, len(sites) // 100)

    def tree(kept: int, limit: int) -> FlagTree | None:
        """The flags that the ``kept`` links with most to gain ask for, and one for each other; None if too many."""
        besides = [tuple(sorted(link.digits)) for link in by_gain[kept:]]
        demands = {link.digits for link in by_gain[:kept]} | wanted
        demands |= {demand - lacked for lacked in {*problem.lacks.values()} for demand in demands}
        try:
            return flag_tree(demands, paths, limit, above, besides)
        except TooManyFlags:
            return None

    limit = max_flags if not tables + len(fixed) else int((max_work / work) ** (1 / (2 + len(fixed))))
    if fixed:  # an elimination of all sites for every choice of flags there
        limit = min(limit, int(max(1, MAX_STEPS / len(sites)) ** (1 / len(fixed))))
    largest = int((max_work / products) ** (1 / 3)) if products else max_flags
    every = tree(len(by_gain), min(limit, largest, max_flags))
    if every is not None:
        flags, cost = _Elimination(problem, sites, every).run()
        return Solution(flags, cost, cost)
    limit = max(min(int((max_work / work) ** 0.5), largest, max_flags), 1 + sum(map(len, paths)))
    best, kept, too_many = tree(0, 1_000_000), 0, len(by_gain) + 1
    while too_many - kept > 1:  # the most links whose flags fit
        middle = (kept + too_many) // 2
        found = tree(middle, limit)
        best, kept, too_many = (found, middle, too_many) if found is not None else (best, kept, middle)
    assert best is not None
    flags, cost = _Elimination(problem, sites, best).improve(fixed)
    return Solution(flags, cost, least)


_TIE, _STRUCTURED, _TABULATED = range(3)
"""What may be between two sites: nothing but a tie, one function that is no table, or anything else."""


def _tables(problem: Problem, sites: list[int]) -> tuple[int, int, list[int]]:
    """How many tables of two sites an elimination makes, how many of them from two others, and the sites to fix first.

    These are fixed so that no table has more than two sites.
    """
    root_of = _merged(problem, sites)
    near: dict[int, dict[int, int]] = {root: {} for root in root_of.values()}
    free = dict.fromkeys(near, True)

    def join(a: int, b: int, kind: int) -> None:
        near[a][b] = near[b][a] = _TABULATED if b in near[a] else kind

    joints: list[Tie | Mount | Link] = [*problem.ties, *problem.mounts, *problem.links]
    for joint in joints:
        a, b = root_of[joint.a], root_of[joint.b]
        if a != b:
            join(a, b, _TIE if isinstance(joint, Tie) else _STRUCTURED)
        elif not isinstance(joint, Tie):
            free[a] = False
    for site in (*problem.pins, *problem.lacks, *problem.wanted):
        free[root_of[site]] = False
    tables, products, fixed = 0, 0, []
    least = _Least(near)
    while near:
        site = least.site()
        if len(near[site]) > 2:
            site = max(near, key=lambda s: (len(near[s]), -s))
            fixed.append(site)
            others = near.pop(site)
            for other in others:
                del near[other][site]
                free[other] = False
            least.changed(others)
            continue
        others = near.pop(site)
        for other in others:
            del near[other][site]
            free[other] = free[other] and len(others) > 1
        if len(others) == 2:
            light = free[site] and not any(others.values())
            tables += not light
            products += min(others.values()) == _TABULATED
            a, b = others
            join(a, b, _TIE if light else _TABULATED)
        least.changed(others)
    return tables, products, fixed


class _Least:
    """The site with the fewest neighbours, the lowest of several: kept in a heap, as there may be thousands."""

    def __init__(self, near: Mapping[int, Sized]) -> None:
        self.near = near
        self.heap = [(len(others), site) for site, others in near.items()]
        heapify(self.heap)

    def changed(self, sites: Iterable[int]) -> None:
        """Take note that ``sites`` have other neighbours now; what was known of them is passed over later."""
        for site in sites:
            heappush(self.heap, (len(self.near[site]), site))

    def site(self) -> int:
        """The site; there must be one."""
        while True:
            count, site = self.heap[0]
            if site in self.near and len(self.near[site]) == count:
                return site
            heappop(self.heap)


class _Elimination:
    """The functions of one component, while its sites are eliminated."""

    def __init__(self, problem: Problem, sites: list[int], tree: FlagTree) -> None:
        self.problem = problem
        self.tree = tree
        self.flags = len(tree)
        self.root_of = _merged(problem, sites)
        self.sites = sorted(set(self.root_of.values()))
        self.unary = {site: np.zeros(self.flags) for site in self.sites}
        self.pairs: _Pairs = defaultdict(list)
        self._restrict(sites)
        for tie in problem.ties:
            if tie.cost < inf:
                self._add(self.root_of[tie.a], self.root_of[tie.b], TieFunction(tie, len(tree)))
        for mount in problem.mounts:
            self._add(self.root_of[mount.a], self.root_of[mount.b], MountFunction(mount, tree))
        for link in problem.links:
            self._add(self.root_of[link.a], self.root_of[link.b], LinkFunction(problem, link, tree))

    def _restrict(self, sites: list[int]) -> None:
        """Forbid the flags that a site cannot have."""
        for site in sites:
            unary = self.unary[self.root_of[site]]
            if site in self.problem.pins:
                pinned = self.tree.node(self.problem.pins[site])
                unary[np.arange(self.flags) != pinned] = inf
            lacked = self.problem.lacks.get(site, frozenset())
            wanted = self.problem.wanted.get(site, frozenset())
            if lacked or wanted:
                for node, flag in enumerate(self.tree.flags):
                    prefixes = (frozenset(flag[:i]) for i in range(len(flag) + 1))
                    if lacked & set(flag) or (wanted and wanted not in prefixes):
                        unary[node] = inf

    def _add(self, a: int, b: int, function: Function) -> None:
        if a == b:
            self.unary[a] += function.diagonal()
        else:
            _add(self.pairs, a, b, function)

    def run(self) -> tuple[tuple[Flag, ...], float]:
        """The flags of the sites, by number, and the cost."""
        chosen, cost = self._best(self.unary, self.pairs)
        return self._every(chosen), cost

    def improve(self, fixed: list[int]) -> tuple[tuple[Flag, ...], float]:
        """A plan that no one of the sites ``fixed`` can better by itself, and its cost.

        They are held, the others planned exactly around them; then each takes the flag that is best for it, and so on.
        At first a layer's side is held at the layer's own digits, and what is no layer's as it was.
        """
        held = {site: int(self.unary[site].argmin()) for site in fixed}
        places = {flag: node for node, flag in enumerate(self.tree.flags)}
        for link in sorted(self.problem.links, key=lambda link: link.costs[1]):
            own = places.get(tuple(sorted(link.digits)), 0)
            held |= {
                s: own for s in (self.root_of[link.a], self.root_of[link.b]) if s in held and self.unary[s][own] < inf
            }
        best: tuple[Flag, ...] = ()
        least = inf
        for _ in range(ROUNDS):
            unary, pairs = dict(self.unary), self.pairs
            for site, flag in held.items():
                unary, pairs, _ = _without(site, flag, unary, pairs)
            chosen, _ = self._best(unary, pairs)
            chosen |= held
            flags = self._every(chosen)
            cost = self.problem.cost({site: flags[site] for site in range(self.problem.sites)})
            if best and not cost < least * (1 - 1e-9):
                break
            best, least = flags, cost
            for site in fixed:
                total = self.unary[site].copy()
                for (a, b), functions in self.pairs.items():
                    for function in functions if site in (a, b) else ():
                        turned = function.turned() if a == site else function
                        total += turned.row(chosen[b if a == site else a])
                held[site] = chosen[site] = int(total.argmin())
        return best, least

    def _every(self, chosen: Mapping[int, int]) -> tuple[Flag, ...]:
        every: list[Flag] = [()] * self.problem.sites
        for site, root in self.root_of.items():
            every[site] = self.tree.flags[chosen[root]]
        return tuple(every)

    def _best(self, unary: _Unary, pairs: _Pairs) -> tuple[dict[int, int], float]:
        """The best flags and their cost."""
        unary, pairs = dict(unary), defaultdict(list, {key: list(functions) for key, functions in pairs.items()})
        near: dict[int, set[int]] = {site: set() for site in unary}
        for a, b in pairs:
            near[a].add(b)
            near[b].add(a)
        order: list[tuple[int, list[tuple[int, list[Function]]], Array]] = []
        chosen: dict[int, int] = {}
        cost = 0.0
        least = _Least(near)
        while unary:
            site = least.site()
            if len(near[site]) > 2:
                chosen, rest = self._fix(max(near, key=lambda s: (len(near[s]), -s)), unary, pairs)
                cost += rest
                break
            others = sorted(near.pop(site))
            functions = [(other, _taken(pairs, other, site)) for other in others]  # each as other → site
            order.append((site, functions, unary[site]))
            cost += self._eliminate(unary.pop(site), functions, unary, pairs)
            for other in others:
                near[other].remove(site)
                near[other].update(o for o in others if o != other)
            least.changed(others)
        for site, functions, total in reversed(order):
            chosen[site] = int(sum((f.row(chosen[o]) for o, between in functions for f in between), total).argmin())
        return chosen, cost

    def _fix(self, site: int, unary: _Unary, pairs: _Pairs) -> tuple[dict[int, int], float]:
        """Try every flag of ``site``, whose functions become functions of one site each."""
        best: tuple[dict[int, int], float] = {}, inf
        for flag in np.flatnonzero(unary[site] < inf).tolist():
            left, remaining, own = _without(site, flag, unary, pairs)
            chosen, cost = self._best(left, remaining)
            if own + cost < best[1] or not best[0]:
                best = {**chosen, site: flag}, own + cost
        return best

    def _eliminate(
        self, own: Array, functions: list[tuple[int, list[Function]]], unary: _Unary, pairs: _Pairs
    ) -> float:
        """Replace a site by a function of its neighbours; the constant that it leaves if it has none."""
        if not functions:
            return float(own.min())
        if len(functions) == 1:
            ((other, between),) = functions
            if len(between) == 1:
                unary[other] = unary[other] + between[0].turned().push(own[None, :])[0]
            else:
                unary[other] = unary[other] + (_total(between, self.flags) + own).min(axis=1)
            return 0.0
        (a, at_a), (b, at_b) = functions
        if not own.any() and len(at_a) == len(at_b) == 1 and _both_ties(at_a[0], at_b[0]):
            _add(pairs, a, b, min(at_a[0], at_b[0], key=lambda f: f.tie.cost))  # type: ignore[attr-defined]
            return 0.0
        if len(at_b) > 1 or isinstance(at_b[0], Table):
            (a, at_a), (b, at_b) = (b, at_b), (a, at_a)
        towards = at_b[0].turned() if len(at_b) == 1 else Table(_total(at_b, self.flags).T)
        _add(pairs, a, b, Table(towards.push(_total(at_a, self.flags) + own)))
        return 0.0


def _without(site: int, flag: int, unary: _Unary, pairs: _Pairs) -> tuple[_Unary, _Pairs, float]:
    """What is left for the others when ``site`` has a flag, and what that costs by itself."""
    left = {other: values for other, values in unary.items() if other != site}
    remaining: _Pairs = defaultdict(list)
    for (a, b), functions in pairs.items():
        if site not in (a, b):
            remaining[a, b] = functions
        for function in functions if site in (a, b) else ():
            other = b if a == site else a
            left[other] = left[other] + (function if a == site else function.turned()).row(flag)
    return left, remaining, float(unary[site][flag])


def _add(pairs: _Pairs, a: int, b: int, function: Function) -> None:
    pairs[min(a, b), max(a, b)].append(function if a < b else function.turned())


def _taken(pairs: _Pairs, other: int, site: int) -> list[Function]:
    functions = pairs.pop((min(other, site), max(other, site)))
    return functions if other < site else [function.turned() for function in functions]


def _merged(problem: Problem, sites: list[int]) -> dict[int, int]:
    """For every site the least of those that ties of infinite cost make one with it."""
    same = nx.Graph()
    same.add_nodes_from(sites)
    same.add_edges_from((tie.a, tie.b) for tie in problem.ties if tie.cost == inf)
    return {site: min(group) for group in nx.connected_components(same) for site in group}


def _both_ties(a: Function, b: Function) -> bool:
    return isinstance(a, TieFunction) and isinstance(b, TieFunction)


def _total(functions: list[Function], flags: int) -> Array:
    return sum((function.table(flags) for function in functions[1:]), start=functions[0].table(flags))


def without_shuffles(problem: Problem) -> Solution:
    """The best plan that keeps no shuffle between sites that are tied: every conflict is settled by fewer groups."""
    return solve(replace(problem, ties=tuple(replace(tie, cost=inf) for tie in problem.ties)))
