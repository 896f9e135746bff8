"""Which flags each site may need.

Let c be a set of sites joined by ties. Its links see of a flag no more than its longest prefix within their digits. So
let W_c be the nodes within the digits of one of these links, and besides, each with the nodes above it,

* the pins of sites in c, and the prefixes that they want,
* the flag ``above`` a site in c, where a mount lets nothing else pass (``strict``),
* every x of which a deep mount serves the flag ``above + x`` to a site whose set has that.

Replace the flag of every site in c by its longest prefix in W_c. Flags that were equal stay equal, so no tie breaks. No
common prefix within a link's digits becomes shorter. What a mount serves, it still serves: a prefix of what the site
was sorted by needs no more than the same prefix of the segment's. Pins stay, and so do wanted prefixes; and a prefix
has no digit that the flag had not. So no site needs another flag than those of W_c that its own pin, want and lack
allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import networkx as nx
import numpy as np
import numpy.typing as npt

from foldgroup.planning.flags import FlagTree
from foldgroup.planning.functions import Places, served
from foldgroup.planning.problem import Problem, Tie

Nodes = npt.NDArray[np.bool_]


def joined(sites: Iterable[int], ties: Iterable[Tie]) -> dict[int, int]:
    """For every site the least of those that ``ties`` join to it."""
    same = nx.Graph()
    same.add_nodes_from(sites)
    same.add_edges_from((tie.a, tie.b) for tie in ties)
    return {site: min(group) for group in nx.connected_components(same) for site in group}


def domains(problem: Problem, sites: list[int], tree: FlagTree, root_of: Mapping[int, int]) -> dict[int, Places]:
    """For every root of ``root_of``, in which sites are one that ties of infinite cost join, its nodes of the tree.

    Empty where what is asked for contradicts itself.
    """
    useful = _useful(problem, sites, tree)
    for site in sites:
        allowed = useful[root_of[site]]
        if site in problem.pins:
            allowed &= np.arange(len(tree)) == tree.node(problem.pins[site])
        if site in problem.lacks:
            allowed &= tree.within(frozenset(tree.digits) - problem.lacks[site])
        if problem.wanted.get(site):
            allowed &= _behind(tree, problem.wanted[site])
    return {root: np.flatnonzero(useful[root]) for root in {*root_of.values()}}


def _useful(problem: Problem, sites: list[int], tree: FlagTree) -> dict[int, Nodes]:
    """For every site W_c, each in an array of its own."""
    tied = joined(sites, problem.ties)
    sets = {root: np.arange(len(tree)) == 0 for root in tied.values()}
    for link in problem.links:
        within = tree.within(link.digits)
        sets[tied[link.a]] |= within
        sets[tied[link.b]] |= within
    for site, flag in (*problem.pins.items(), *((m.b, m.above) for m in problem.mounts if m.strict)):
        sets[tied[site]][tree.path(tree.node(flag))] = True
    for site, digits in problem.wanted.items():
        sets[tied[site]] |= tree.within(digits)
    serves = [(tied[m.a], tied[m.b], served(m, tree).items()) for m in problem.mounts if m.deep]
    found = True
    while found:
        found = False
        for segment, site, pairs in serves:
            for node, target in pairs:
                if sets[site][target] and not sets[segment][node]:
                    sets[segment][tree.path(node)] = found = True
    return {site: sets[tied[site]].copy() for site in sites}


def _behind(tree: FlagTree, wanted: frozenset[int]) -> Nodes:
    """The nodes that have these digits first."""
    first = ({*flag[: len(wanted)]} == wanted for flag in tree.flags)
    return np.fromiter(first, dtype=bool, count=len(tree))
