"""A minimum passes through every kind of function as it does through all its values."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from foldgroup.planning.flags import flag_tree
from foldgroup.planning.functions import Function, LinkFunction, Table, joint, least_by, mount_table, summed
from foldgroup.planning.problem import Link, Mount, Problem, common_prefix

SETS = st.sets(st.sets(st.integers(0, 4), min_size=1).map(frozenset), min_size=1, max_size=5)
SIZES = dict.fromkeys(range(5), 2)


def every_value(function: Function) -> np.ndarray:
    """f(a, b) of all flags a and b."""
    rows, columns = len(function.rows), len(function.columns)
    return function.at(np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)).reshape(rows, columns)


def check(function: Function, draws: np.random.Generator) -> None:
    """Push, row and turn it."""
    dense = every_value(function)
    own = draws.integers(0, 20, (3, len(function.rows))).astype(float)
    pushed = function.push(least_by(function.rows, function.shape[0], own, np.arange(own.shape[1])))
    assert np.array_equal(pushed[:, function.columns], (own[:, :, None] + dense).min(axis=1))
    for a in range(len(dense)):
        assert np.array_equal(function.row(a), dense[a])
    assert np.array_equal(every_value(function.turned()), dense.T)


@given(SETS, st.randoms(use_true_random=False), st.integers(0, 2**32 - 1))
@quick(60)
def test_layers_see_the_deepest_common_node_and_sums_are_sums(demands, random, seed):
    draws = np.random.default_rng(seed)
    tree = flag_tree(demands, [], 10_000)
    a, b = (np.flatnonzero(draws.random(len(tree)) < 0.8) for _ in range(2))
    a, b = (domain if len(domain) else np.array([0]) for domain in (a, b))
    functions = []
    for digits in random.choices(sorted(demands, key=sorted), k=2):
        costs = {2**n: 50.0 - 7 * n for n in range(6)}
        function = LinkFunction.of(Problem(2, SIZES), Link(0, 1, digits, costs), tree, a, b)
        expected = [
            [costs[2 ** len(common_prefix(tree.flags[i], tree.flags[j], digits))] for j in b.tolist()]
            for i in a.tolist()
        ]
        assert np.array_equal(every_value(function), expected)
        check(function, draws)
        functions.append(function)
    total = summed(functions)
    assert np.array_equal(every_value(total), sum(map(every_value, functions)))
    check(total, draws)


@given(SETS, st.permutations(range(5)), st.integers(0, 3), st.booleans())
@quick(60)
def test_a_deep_mount_serves_what_the_segment_is_sorted_by(demands, above, length, reverse):
    mount = Mount(0, 1, 3.0, tuple(above[:length]), deep=True)
    tree = flag_tree(demands, [mount.above], 10_000, [mount.above])
    every = np.arange(len(tree))[:: -1 if reverse else 1]
    table = mount_table(mount, tree, every, every)
    for i, a in enumerate(every):
        for j, b in enumerate(every):
            free = mount.free(tree.flags[a], tree.flags[b])
            # what no node stands for costs: the tree has every flag that a site can gain from
            assert table.at(np.array([i]), np.array([j]))[0] in ((0.0, 3.0) if free else (3.0,))
    check(table, np.random.default_rng(0))


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from([0.5, 1.0, np.inf])), min_size=1))
@quick(60)
def test_joint_classes_agree_in_every_key(pairs):
    keys = [np.array(key) for key in zip(*pairs, strict=True)]
    first, classes = joint(*keys)
    assert [pairs[i] for i in first[classes]] == pairs
    assert len(set(pairs)) == len(first) == classes.max() + 1


def test_tables_push_by_the_shorter_side():
    draws = np.random.default_rng(0)
    for rows, given_rows in ((3, 5), (5, 3)):
        table = Table(draws.random((rows, 4)), np.arange(rows), np.arange(4))
        given_values = draws.random((given_rows, rows))
        assert np.array_equal(table.push(given_values), (given_values[:, :, None] + table.values).min(axis=1))
