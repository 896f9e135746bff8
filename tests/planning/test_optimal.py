"""No orders, no shuffles and no coarser groups beat the plan of a network: all permutations of four channels are tried.

The brute force knows nothing of digits, flags, spaces or segments. It gives every tensor of the graph any of the 4!
orders, puts a shuffle wherever two neighbours' differ, before a tensor's readers part or behind, and runs every layer
in as many groups as its orders leave apart. Every cost is of one or two orders, so elimination finds the least.
"""

from __future__ import annotations

import itertools
from math import inf, prod

import numpy as np
import pytest
from graphs import Call, Leaf, Residual, conv, depthwise, filled, learned
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import fx, nn

from foldgroup import rules, segments
from foldgroup.channels import ChannelGraph
from foldgroup.pipeline import Pipeline
from foldgroup.planning.cost import CostModel
from foldgroup.planning.solver import solve
from foldgroup.trace import called_module, fork, shape_of, trace
from passes import AbsorbShuffles, default_pipeline

CHANNELS = 4
ORDERS = np.array(list(itertools.permutations(range(CHANNELS))))
EQUAL = np.eye(len(ORDERS), dtype=bool)
STEPS = default_pipeline().passes
BEFORE = Pipeline(STEPS[: [step.name for step in STEPS].index(AbsorbShuffles.name)])

Factor = tuple[tuple[object, ...], np.ndarray]


def shuffled(order: tuple[int, ...]) -> np.ndarray:
    """Whether v = u[:, order] is free: position i holds the same channel on both sides, for all orders of u and v."""
    through = np.array(order)[ORDERS]  # the channels of u at the positions of v
    return (ORDERS[:, None] == through[None]).all(2)


def groups_kept(groups: int) -> np.ndarray:
    """In how many groups a layer can run, for all orders of its inputs and outputs."""
    result = np.ones((len(ORDERS), len(ORDERS)), dtype=int)
    for runs in (n for n in range(2, groups + 1) if groups % n == 0):
        parts = [
            [frozenset(run) for run in (np.array(order) * groups // CHANNELS).reshape(runs, -1).tolist()]
            for order in ORDERS.tolist()
        ]
        whole = [len(frozenset().union(*part)) == sum(map(len, part)) for part in parts]
        for (i, a), (j, b) in itertools.product(enumerate(parts), repeat=2):
            if whole[i] and whole[j] and a == b:
                result[i, j] = runs
    return result


def brute_force(graph: fx.GraphModule, cost: CostModel) -> float:
    """The least cost of any plan of a graph in shuffle form, all of whose tied tensors have four channels."""
    rule_of, axes = rules.rules_of(graph)
    factors: list[Factor] = []
    identity = np.where((np.arange(CHANNELS) == ORDERS).all(1), 0.0, inf)
    trunk: dict[fx.Node, object] = {}

    def move(node: fx.Node) -> float:
        return cost.move(8 * prod(shape_of(node)[1:]))

    for node in graph.graph.nodes:
        rule, planned = rule_of[node], axes[node] is not None and shape_of(node)[1] == CHANNELS
        if planned:
            trunk[node] = node
            factors.append(((node,), np.zeros(len(ORDERS))))
        if isinstance(rule, rules.Through) and planned:
            factors += [((trunk[o], node), np.where(EQUAL, 0, move(o))) for o in rule.operands]
        elif isinstance(rule, rules.Shuffles):
            factors.append(((trunk[rule.operand], node), np.where(shuffled(rule.order.source), 0, move(node))))
        elif isinstance(rule, rules.Groups):
            port: object = rule.operand
            if not (isinstance(rule_of[rule.operand], rules.Shuffles) and len(rule.operand.users) == 1):
                port = ("port", node)
                factors.append(((trunk[rule.operand], port), np.where(EQUAL, 0, move(rule.operand))))
            layer = called_module(graph, node)
            dense = layer.weight.numel() * layer.groups
            moved = prod(shape_of(node)[1:]) + prod(shape_of(rule.operand)[1:])
            positions = prod(shape_of(node)[2:])
            kept = groups_kept(rule.groups)
            prices = {n: cost.conv(dense * positions / n, 4 * (moved + dense / n)) for n in set(kept.flat)}
            factors.append(((port, node), np.vectorize(prices.get)(kept).astype(float)))
        elif isinstance(rule, rules.Barrier):
            for operand in (o for o in node.all_input_nodes if o in trunk):
                factors.append(((trunk[operand],), np.minimum(identity, move(operand))))
            if planned:
                factors.append(((node,), identity))
        readers = sum(not isinstance(rule_of[user], rules.Mixes | rules.Reads) for user in node.users)
        if planned and readers > 1:
            trunk[node] = ("trunk", node)
            factors.append(((node, trunk[node]), np.where(EQUAL, 0, move(node))))
    return minimum(factors)


def minimum(factors: list[Factor]) -> float:
    """The least of a sum of functions, by eliminating one variable after the other."""
    total = 0.0
    while variables := {v for names, _ in factors for v in names}:
        near = {v: {w for names, _ in factors if v in names for w in names} for v in variables}
        first = min(variables, key=lambda v: (len(near[v]), str(v)))
        scope = (*sorted(near[first] - {first}, key=str), first)
        assert len(scope) <= 3, "24⁴ entries are too many"
        table = np.zeros((len(ORDERS),) * len(scope))
        for names, values in (f for f in factors if first in f[0]):
            axes = [scope.index(name) for name in names]
            ordered = values if axes == sorted(axes) else values.T
            table += ordered.reshape([len(ORDERS) if i in axes else 1 for i in range(len(scope))])
        factors = [f for f in factors if first not in f[0]]
        if len(scope) == 1:
            total += float(table.min())
        else:
            factors.append((scope[:-1], table.min(-1)))
    return total


@st.composite
def small_networks(draw: st.DrawFn) -> nn.Module:
    """Learned layers of four channels, in a row or in residual branches, with what may stand between them."""

    def layer() -> nn.Module:
        kind = draw(st.sampled_from(["learned"] * 5 + ["norm", "relu", "depthwise", "pool", "leaf", "dense", "flip"]))
        if kind == "learned":
            bits = draw(st.sampled_from([(0, 1), (1, 0), (1, 0), (0, 0), (1, 1)]))
            return learned(CHANNELS, CHANNELS, bits, kernel=draw(st.sampled_from([1, 3])))
        return {
            "norm": lambda: nn.BatchNorm2d(CHANNELS),
            "relu": nn.ReLU,
            "depthwise": lambda: depthwise(CHANNELS),
            "pool": lambda: nn.MaxPool2d(3, 1, 1),
            "leaf": Leaf,
            "dense": lambda: conv(CHANNELS, CHANNELS),
            "flip": lambda: Call(lambda x: x.flip(1)),
        }[kind]()

    layers: list[nn.Module] = [conv(3, CHANNELS)]
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.integers(0, 2)):
            layers.append(layer())
        else:
            layers.append(Residual(*(layer() for _ in range(draw(st.integers(1, 3))))))
    layers += [conv(CHANNELS, 5)] if draw(st.booleans()) else []
    return nn.Sequential(*layers)


@given(small_networks(), st.sampled_from([0.02, 0.5, 3.5, 30]))
@quick(40)
def test_no_order_no_shuffle_and_no_coarser_groups_beat_the_plan(model, macs_per_byte):
    cost = CostModel(macs_per_byte)
    graph = BEFORE.run(trace(filled(model), (2, 3, 5, 5))).graph
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "FUSED", 1.0)  # the brute force knows no fusing
        asked = ChannelGraph(fork(graph), cost)
        solution = solve(asked.problem)
    assert solution.exact and not asked.entangled
    assert solution.cost + asked.fixed == pytest.approx(brute_force(graph, cost))
