"""The planner finds the least cost: brute force over all flags of all sites never beats it."""

from __future__ import annotations

import itertools
import math
import random
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from foldgroup.planning.flags import TooManyFlags, flag_tree
from foldgroup.planning.problem import Flag, Link, Mount, Problem, Tie, common_prefix
from foldgroup.planning.solver import solve, without_shuffles


def flags_of(digits: int) -> list[Flag]:
    """Every sequence of distinct digits."""
    return [flag for n in range(digits + 1) for flag in itertools.permutations(range(digits), n)]


def products(sizes: dict[int, int], digits: frozenset[int], dense: float) -> dict[int, float]:
    """The cost of a layer by group count: a share of the dense one."""
    subsets = (subset for n in range(len(digits) + 1) for subset in itertools.combinations(sorted(digits), n))
    counts = {math.prod(sizes[digit] for digit in subset) for subset in subsets}
    return {count: dense / count + 1 for count in counts}


@st.composite
def problems(draw: st.DrawFn, sites: int = 4, digits: int = 3) -> Problem:
    """Small problems with everything in them: ties of any cost, links, mounts, pins, what is wanted and lacked."""
    digits = draw(st.integers(1, digits))
    sizes = {digit: draw(st.sampled_from([2, 2, 3])) for digit in range(digits)}
    count = draw(st.integers(2, sites))
    two = st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True)
    some = st.sets(st.integers(0, digits - 1)).map(frozenset)
    flag = st.sampled_from(flags_of(digits))
    ties = [Tie(*draw(two), draw(st.sampled_from([1, 2, 5, 30, inf]))) for _ in range(draw(st.integers(0, 4)))]
    links = []
    for _ in range(draw(st.integers(1, 4))):
        wanted, dense = draw(some), draw(st.integers(1, 60))
        ends = draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2))
        links.append(Link(*ends, wanted, products(sizes, wanted, dense)))
    kinds = st.sampled_from([(False, False), (True, False), (False, True)])  # deep, strict
    mounts = [
        Mount(*draw(two), draw(st.sampled_from([1, 5, 20])), draw(flag)[:2], *draw(kinds))
        for _ in range(draw(st.integers(0, 2)))
    ]
    pins = {site: draw(flag) for site in draw(st.sets(st.integers(0, count - 1), max_size=2))}
    wants = {site: draw(some) for site in draw(st.sets(st.integers(0, count - 1), max_size=1))}
    lacks = {site: draw(some) for site in draw(st.sets(st.integers(0, count - 1), max_size=1))}
    return Problem(count, sizes, tuple(ties), tuple(links), tuple(mounts), pins, wants, lacks)


def least(problem: Problem) -> float:
    """The least cost of all plans, each costed by the definition."""
    every = flags_of(len(problem.sizes))
    return min(problem.cost(dict(enumerate(flags))) for flags in itertools.product(every, repeat=problem.sites))


@given(problems(sites=3))
@quick(120)
def test_no_plan_is_cheaper(problem):
    best = least(problem)
    solution = solve(problem)
    assert solution.exact
    assert solution.cost == pytest.approx(best) or solution.cost == best == inf
    assert problem.cost(dict(enumerate(solution.flags))) == pytest.approx(solution.cost) or best == inf


@given(problems(sites=5, digits=2))
@quick(60)
def test_no_plan_is_cheaper_with_more_sites(problem):
    assert solve(problem).cost == pytest.approx(least(problem)) or least(problem) == inf


@given(problems(sites=4), st.integers(2, 60))
@quick(60)
def test_what_is_cut_down_says_how_far_off_it_may_be(problem, work):
    """With hardly any room, plans get worse, but what is said of them stays true."""
    solution = solve(problem, max_flags=work, max_work=work)
    best = solve(problem).cost
    if best < inf:
        assert solution.bound <= best * (1 + 1e-9)
        assert solution.cost >= best * (1 - 1e-9)
        assert problem.cost(dict(enumerate(solution.flags))) == pytest.approx(solution.cost)


@given(problems(sites=3))
@quick(60)
def test_without_shuffles_every_tie_holds(problem):
    solution = without_shuffles(problem)
    if solution.cost < inf:
        assert all(solution.flags[tie.a] == solution.flags[tie.b] for tie in problem.ties)
        assert solution.cost >= solve(problem).cost * (1 - 1e-9)


@pytest.mark.parametrize("sites", [5, 6])
def test_sites_that_all_touch_each_other_are_tried_one_by_one(sites):
    """A complete graph leaves no site with two neighbours, so some have to be fixed."""
    sizes = {0: 2, 1: 2}
    pairs = list(itertools.combinations(range(sites), 2))
    links = tuple(
        Link(a, b, frozenset({(a + b) % 2}), products(sizes, frozenset({(a + b) % 2}), 10 + a * b)) for a, b in pairs
    )
    problem = Problem(sites, sizes, tuple(Tie(a, b, 1 + (a * b) % 3) for a, b in pairs), links)
    assert solve(problem).cost == pytest.approx(least(problem))


@pytest.mark.parametrize("seed", range(3))
def test_a_deep_residual_network_is_planned_exactly(seed):
    """Twelve blocks of three layers, each with random digits of eight, around one residual stream."""
    draw = random.Random(seed)
    sizes, sites = dict.fromkeys(range(8), 2), itertools.count()
    ties: list[Tie] = []
    links: list[Link] = []
    stream = next(sites)
    for _ in range(12):
        reads = next(sites)
        ties.append(Tie(stream, reads, 40))
        for _ in range(3):
            digits = frozenset(digit for digit in sizes if draw.random() < 0.5)
            reads, before = next(sites), reads
            links.append(Link(before, reads, digits, products(sizes, digits, draw.randint(50, 400))))
        stream, before = next(sites), stream
        ties += [Tie(before, stream, 40), Tie(reads, stream, 40)]
    problem = Problem(next(sites), sizes, tuple(ties), tuple(links), pins={0: (), stream: ()})
    solution = solve(problem)
    assert solution.exact
    assert problem.cost(dict(enumerate(solution.flags))) == pytest.approx(solution.cost)
    for site in range(1, stream):  # no site can better it by itself with a flag of another
        for flag in {*solution.flags}:
            flags = {**dict(enumerate(solution.flags)), site: flag}
            assert problem.cost(flags) >= solution.cost * (1 - 1e-9)


def test_a_chain_of_two_conflicts_has_three_ways_out():
    """Between two layers, one sorted by digit 0 and one by digit 1: shuffle, or run one of them dense."""

    def problem(shuffle: float, first: float, second: float) -> Problem:
        sizes = {0: 2, 1: 2}
        zero, one = frozenset({0}), frozenset({1})
        links = (Link(0, 1, zero, {1: first, 2: first / 2}), Link(2, 3, one, {1: second, 2: second / 2}))
        return Problem(4, sizes, (Tie(1, 2, shuffle),), links)

    assert solve(problem(1, 10, 10)).cost == 1 + 5 + 5
    assert solve(problem(1, 10, 10)).flags == ((0,), (0,), (1,), (1,))
    assert solve(problem(9, 10, 12)).cost == 10 + 6
    assert solve(problem(9, 10, 12)).flags[1:] == ((1,), (1,), (1,))  # the cheaper of the two layers runs dense
    assert solve(problem(9, 12, 10)).flags[:3] == ((0,), (0,), (0,))


def test_nested_demands_need_neither():
    sizes = {0: 2, 1: 2, 2: 2}
    wide, narrow = frozenset({0, 2}), frozenset({2})
    links = (Link(0, 1, wide, {1: 8, 2: 4, 4: 2}), Link(1, 2, narrow, {1: 8, 2: 4}))
    solution = solve(Problem(3, sizes, (), links))
    assert solution.cost == 2 + 4
    assert solution.flags[1] == (2, 0)


# ---- the tree of flags -------------------------------------------------------------------------------------------


SETS = st.sets(st.sets(st.integers(0, 5), min_size=1).map(frozenset), max_size=6)


@given(SETS, st.sets(st.permutations(range(4)).map(tuple)))
@quick(100)
def test_the_tree_is_in_preorder_and_has_every_path(demands, pins):
    pins = {tuple(pin) for pin in pins}
    tree = flag_tree(demands, pins, 100_000)
    assert tree.flags[0] == () and len(set(tree.flags)) == len(tree)
    assert pins <= set(tree.flags)
    for node, flag in enumerate(tree.flags):
        assert len(set(flag)) == len(flag)
        below = [i for i, other in enumerate(tree.flags) if other[: len(flag)] == flag]
        assert below == list(range(node, tree.end[node]))
        parent = tree.flags[tree.parent[node]]
        assert flag[: len(parent)] == parent
    assert all(any(frozenset(flag) == demand for flag in tree.flags) for demand in demands)


def test_flags_that_cannot_matter_are_not_in_the_tree():
    one = flag_tree([frozenset(range(10))], [], 100)
    assert one.flags == ((), tuple(range(10)))
    nested = flag_tree([frozenset(range(k)) for k in range(1, 8)], [], 100)
    assert len(nested) == 8
    assert len(flag_tree([frozenset(range(5)), frozenset(range(5, 10))], [], 100)) == 3
    with pytest.raises(TooManyFlags):
        flag_tree([frozenset({a, b}) for a in range(5) for b in range(5)], [], 5)


def test_a_common_prefix_stays_within_the_set():
    assert common_prefix((0, 1, 2), (0, 1, 3), frozenset({0, 1, 2, 3})) == {0, 1}
    assert common_prefix((0, 1), (0, 1), frozenset({0})) == {0}
    assert common_prefix((1, 0), (0, 1), frozenset({0, 1})) == frozenset()
