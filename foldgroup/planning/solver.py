"""The best plan, or one that is known to be nearly as good.

A problem is a sum of functions of one or two sites over the flags of a :class:`FlagTree`; the least of it is found
exactly by eliminating sites (:mod:`foldgroup.planning.elimination`), each with the flags that it may need
(:mod:`foldgroup.planning.domains`). A residual network never has a site with more than two neighbours.

Where that is too much work, the sites that would have to be tried with each of their flags are held at one and improved
in turn, and in the end the flags are cut down to those that the links with most to gain ask for. The plan found is then
an upper bound. A lower one is the best plan of a problem in which every function of a held site may choose a flag of
its own for it, and in which links whose flags were cut off cost what they cost with all their groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod

import networkx as nx
import numpy as np

from foldgroup.planning.domains import domains, joined
from foldgroup.planning.elimination import STEP, Between, Functions, TooMuchWork, Work, least, to_try
from foldgroup.planning.flags import FlagTree, TooManyFlags, flag_tree
from foldgroup.planning.functions import LinkFunction, mount_costs, mount_table
from foldgroup.planning.problem import Flag, Link, Mount, Problem, Tie

MAX_FLAGS = 50_000
"""Flags of a component, at most; more are cut down."""

MAX_WORK = 1_000_000_000
"""Values that are looked at for a component, at most, which is a matter of seconds."""

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
    """Exactly if it fits; else with sites held, and at last with the flags of ever fewer links."""
    links = sorted(problem.links, key=lambda link: _nominal(problem, link) - link.costs[1])
    kept = len(links)
    while True:
        few, rest, room = links[:kept], links[kept:], (max_flags, max_work) if kept else (1_000_000, inf)
        try:
            found = _Component(problem, sites, _tree(problem, few, room[0], rest), room[1]).solution()
            if rest:  # no plan is better than one to which the rest is as good as it can be
                part = replace(problem, links=tuple(few))
                bound = _Component(part, sites, _tree(part, few, room[0]), room[1]).solution().bound
                found = replace(found, bound=bound + sum(_nominal(problem, link) for link in rest))
            return found
        except (TooManyFlags, TooMuchWork):
            kept = kept * 3 // 4


def _nominal(problem: Problem, link: Link) -> float:
    """What a layer costs with all its groups."""
    return link.costs[problem.groups(link.digits)]


def _tree(problem: Problem, links: Sequence[Link], limit: int, besides: Sequence[Link] = ()) -> FlagTree:
    """The flags that ``links`` ask for, and one for each of those ``besides``."""
    wanted = {*problem.wanted.values()}
    above = {mount.above for mount in problem.mounts if mount.deep}
    paths = {*problem.pins.values(), *(mount.above for mount in problem.mounts)}
    demands = {link.digits for link in links} | wanted
    demands |= {demand - lacked for lacked in {*problem.lacks.values()} for demand in demands}
    return flag_tree(demands, paths, limit, above, [tuple(sorted(link.digits)) for link in besides])


class _Component:
    """A connected problem over the flags of a tree, as functions."""

    def __init__(self, problem: Problem, sites: list[int], tree: FlagTree, max_work: float) -> None:
        self.problem, self.tree, self.max_work = problem, tree, max_work
        self.root_of = joined(sites, (tie for tie in problem.ties if tie.cost == inf))
        self.domains = domains(problem, sites, tree, self.root_of)

    def functions(self) -> Functions:
        """All of them."""
        functions, tree = Functions(self.domains), self.tree
        for tie in self.problem.ties:
            if tie.cost < inf:
                functions.add(self.root_of[tie.a], self.root_of[tie.b], Between(tie.cost))
        for mount in self.problem.mounts:
            a, b = self.root_of[mount.a], self.root_of[mount.b]
            if mount.deep:
                table = mount_table(mount, tree, self.domains[a], self.domains[b])
                functions.add(a, b, Between(functions=(table,)))
            else:
                functions.unary[b] += mount_costs(mount, tree)[self.domains[b]]
        for link in self.problem.links:
            a, b = self.root_of[link.a], self.root_of[link.b]
            between = LinkFunction.of(self.problem, link, tree, self.domains[a], self.domains[b])
            functions.add(a, b, Between(functions=(between,)))
        return functions

    def solution(self) -> Solution:
        """The best plan that can be found with the flags of the tree, and a bound for all with these.

        Raises:
            TooMuchWork: if none can be found.
        """
        if not all(map(len, self.domains.values())):
            return Solution(((),) * self.problem.sites, inf, inf)
        functions = self.functions()
        held = to_try(functions)
        tries = prod(len(self.domains[site]) for site in held)
        if held and tries * len(self.root_of) * STEP > self.max_work:
            flags = self._improved(held)
            return Solution(flags, self._cost(flags), self._bound(held))
        chosen, cost = least(functions, Work(self.max_work))
        flags = self._flags(chosen)
        return Solution(flags, self._cost(flags), cost)

    def _flags(self, chosen: Mapping[int, int]) -> tuple[Flag, ...]:
        flags: list[Flag] = [()] * self.problem.sites
        for site, root in self.root_of.items():
            flags[site] = self.tree.flags[self.domains[root][chosen[root]]]
        return tuple(flags)

    def _cost(self, flags: Sequence[Flag]) -> float:
        return self.problem.cost(dict(enumerate(flags)))

    def _bound(self, held: list[int]) -> float:
        """A cost that no plan can be below: with ``held`` sites' flags chosen anew by all that is between."""
        functions, total = self.functions(), 0.0
        for site in held:
            functions, own = functions.without(site, None)
            total += own
        return total + least(functions, Work(self.max_work))[1]

    def _improved(self, held: list[int]) -> tuple[Flag, ...]:
        """A plan that no one of the sites ``held`` can better by itself.

        They are held, the others planned exactly around them; then each takes the flag that is best for it, and so on.
        At first a layer's side is held at the layer's own digits, and what is no layer's as it was.
        """
        functions = self.functions()
        flag_of = {site: int(functions.unary[site].argmin()) for site in held}
        places = {flag: node for node, flag in enumerate(self.tree.flags)}
        for link in sorted(self.problem.links, key=lambda link: link.costs[1]):
            own = places.get(tuple(sorted(link.digits)), 0)
            for root in {self.root_of[link.a], self.root_of[link.b]} & {*held}:
                place = int(np.searchsorted(self.domains[root], own))
                if own in self.domains[root] and functions.unary[root][place] < inf:
                    flag_of[root] = place
        best: tuple[tuple[Flag, ...], float] = (), inf
        for _ in range(ROUNDS):
            left = functions
            for site, flag in flag_of.items():
                left, _ = left.without(site, flag)
            chosen = least(left, Work(self.max_work))[0] | flag_of
            flags = self._flags(chosen)
            cost = self._cost(flags)
            if best[0] and not cost < best[1] * (1 - 1e-9):
                break
            best = flags, cost
            for site in held:
                near = functions.near[site].items()
                rows = (functions.row(other, chosen[other], site, between.turned()) for other, between in near)
                flag_of[site] = chosen[site] = int(sum(rows, start=functions.unary[site]).argmin())
        return best[0]


def without_shuffles(problem: Problem) -> Solution:
    """The best plan that keeps no shuffle between sites that are tied: every conflict is settled by fewer groups."""
    return solve(replace(problem, ties=tuple(replace(tie, cost=inf) for tie in problem.ties)))
