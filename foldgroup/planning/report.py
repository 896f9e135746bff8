"""A plan in words and numbers, for ``explain`` and the ledger. Costs are in the planner's unit (:class:`Cost`)."""

from __future__ import annotations

from collections import defaultdict
from math import isfinite
from typing import Any

from foldgroup import rules as ops
from foldgroup.channels import ChannelGraph, Grouped, Space
from foldgroup.planning.problem import Flag, Problem, common_prefix
from foldgroup.planning.solver import Solution, without_shuffles
from foldgroup.segments import Segment


def describe(channels: ChannelGraph, solution: Solution) -> dict[str, Any]:
    """The plan as a JSON document: its cost beside that of the simple ways out, spaces, layers and what joins them."""
    problem = channels.problem
    nominal = sum(layer.costs[layer.groups] for layer in channels.grouped)
    coarse = without_shuffles(problem).cost + channels.fixed
    numbered = {space.index: number for number, space in enumerate(_shown(channels))}
    cost = solution.cost + channels.fixed
    kept: dict[str, float] = defaultdict(float)
    for node, moved in channels.shuffles:
        kept[channels.wanted_by(node)] += moved
    bent = channels.entangled or channels.lying
    exact = solution.exact and not bent and not channels.fixed
    return {
        "unit": channels.cost.unit,
        "cost": cost,
        "bound": cost if exact else nominal if bent else solution.bound,
        "exact": exact,
        "alternatives": {
            "keep every shuffle": nominal + sum(kept.values()),
            "coarsen everything": coarse if isfinite(coarse) else None,
        },
        "spaces": _spaces(channels, solution),
        "layers": [
            _layer(channels, solution, layer, numbered, kept[str(layer.node.target)]) for layer in channels.grouped
        ],
        "dense": [
            {"name": str(node.target), "reads": numbered[a.index], "writes": numbered[b.index]}
            for node, rule in channels.rules.items()
            if isinstance(rule, ops.Mixes)
            for a in {channels.space_of(s).index: channels.space_of(s) for s in channels.trunk[rule.operand]}.values()
            for b in {channels.space_of(s).index: channels.space_of(s) for s in channels.own[node]}.values()
            if a.index in numbered and b.index in numbered
        ],
    }


def _shown(channels: ChannelGraph) -> list[Space]:
    """The spaces that a layer with groups reads or writes."""
    wanted = {channels.space_of(side).index for layer in channels.grouped for side in (layer.reads, layer.writes)}
    return [space for space in channels.spaces if space.index in wanted]


def _spaces(channels: ChannelGraph, solution: Solution) -> list[dict[str, Any]]:
    sides: dict[int, list[tuple[Grouped, str]]] = defaultdict(list)
    for layer in channels.grouped:
        for side, segment in (("inputs", layer.reads), ("outputs", layer.writes)):
            sides[channels.space_of(segment).index].append((layer, side))
    return [_space(channels, solution, space, sides[space.index]) for space in _shown(channels)]


def _space(
    channels: ChannelGraph, solution: Solution, space: Space, sides: list[tuple[Grouped, str]]
) -> dict[str, Any]:
    """``sides`` of layers are in it."""
    orders: dict[Flag, list[str]] = defaultdict(list)
    for segment in space.segments:
        orders[solution.flags[segment.site]].append(str(segment))
    demands = [
        {
            "layer": str(layer.node.target),
            "side": side,
            "groups": layer.groups,
            "met": _runs(channels.problem, solution, layer),
        }
        for layer, side in sides
    ]
    return {
        "channels": space.width,
        "pins": space.pins,
        "orders": [
            {"sorted_by": [channels.digit_text(space, digit) for digit in flag], "tensors": tensors}
            for flag, tensors in orders.items()
        ],
        "demands": demands,
    }


def _layer(
    channels: ChannelGraph, solution: Solution, layer: Grouped, numbered: dict[int, int], shuffles: float
) -> dict[str, Any]:
    """``shuffles`` is what those cost that were put in for the layer."""
    runs = _runs(channels.problem, solution, layer)
    sides = {"reads": layer.reads, "writes": layer.writes}
    return {
        "name": str(layer.node.target),
        "groups": layer.groups,
        "runs": runs,
        "cost": layer.costs[runs],
        "alternatives": {"its groups and its shuffles": layer.costs[layer.groups] + shuffles, "dense": layer.costs[1]},
        **{name: numbered[channels.space_of(side).index] for name, side in sides.items()},
    }


def _runs(problem: Problem, solution: Solution, layer: Grouped) -> int:
    shared = common_prefix(solution.flags[layer.reads.site], solution.flags[layer.writes.site], frozenset(layer.digits))
    return problem.groups(shared)


def conflict(channels: ChannelGraph, segments: list[Segment]) -> str:
    """Who wants an order where these segments are, and what fixes one: why a shuffle among them stays."""
    spaces = {channels.space_of(segment).index: channels.space_of(segment) for segment in segments}
    wanted = [
        f"{layer.node.target} ({side})"
        for layer in channels.grouped
        for side, segment in (("inputs", layer.reads), ("outputs", layer.writes))
        if channels.space_of(segment).index in spaces
    ]
    pins = [f"fixed by {pin}" for space in spaces.values() for pin in space.pins]
    asked = [f"wanted by {_some(wanted)}"] if wanted else []
    joined = [] if wanted or pins else ["made of channels that are joined before it or split behind it"]
    return f"the order here is {' and '.join((*asked, *dict.fromkeys(pins), *joined))}"


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
