"""The plan of channel orders, shuffles and groups: as tables, and as a drawing of the channel spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from foldgroup.bundle import Bundle
from foldgroup.errors import BundleError
from foldgroup.report.layout import grid, heading, paragraph

PASS = "absorb_shuffles"
_UNITS = {"MACs": (1e6, "M multiply-adds"), "ns": (1e3, "µs")}
"""By the unit of a plan's costs, what they are divided by and then counted in."""


def plan_of(bundle: Bundle) -> Mapping[str, Any] | None:
    """The plan that a bundle was compiled by; None if the network has no grouped convolution."""
    for record in bundle.passes["passes"]:
        if record["name"] == PASS and record.get("details"):
            details: Mapping[str, Any] = record["details"]
            return details if details["layers"] else None
    return None


def plan_report(plan: Mapping[str, Any]) -> Group:
    """What the plan costs beside the simple ways out; every space with its orders and demands; every layer."""
    scale, unit = _UNITS[plan.get("unit", "MACs")]
    parts: list[RenderableType] = [heading("The plan"), _costs(plan, scale, unit), ""]
    for number, space in enumerate(plan["spaces"]):
        parts += [heading(f"space {number}: {space['channels']} channels"), *_space(space), ""]
    layers = grid(["layer", "groups", "run", "cost", "with all groups, between its shuffles", "dense"], left=(0,))
    for layer in plan["layers"]:
        others = layer["alternatives"]
        layers.add_row(
            Text(layer["name"]),
            *(str(layer["groups"]), str(layer["runs"]), _scaled(layer["cost"], scale)),
            *(_scaled(others["its groups and its shuffles"], scale), _scaled(others["dense"], scale)),
        )
    return Group(*parts, heading(f"Layers with groups ({unit})"), layers)


def _costs(plan: Mapping[str, Any], scale: float, unit: str) -> RenderableType:
    proof = "no plan costs less" if plan["exact"] else f"no plan costs less than {_scaled(plan['bound'], scale)} {unit}"
    lines = [f"{_scaled(plan['cost'], scale)} {unit}: {proof}."]
    for way, cost in plan["alternatives"].items():
        more = f"{cost / plan['cost']:.2f} times as much" if cost and plan["cost"] else "not possible here"
        lines.append(f"To {way} would cost {_scaled(cost, scale)} {unit}, {more}." if cost else f"To {way} is {more}.")
    return paragraph(" ".join(lines))


def _space(space: Mapping[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if space["pins"]:
        parts.append(paragraph(f"Fixed by {', '.join(space['pins'])}."))
    orders = grid(["sorted by", "tensors"], left=(0, 1))
    for order in space["orders"]:
        orders.add_row(", ".join(order["sorted_by"]) or "nothing: as it was", Text(_some(order["tensors"])))
    demands = grid(["wanted by", "side", "groups", "run"], left=(0, 1))
    for demand in space["demands"]:
        demands.add_row(Text(demand["layer"]), demand["side"], str(demand["groups"]), str(demand["met"]))
    return [*parts, orders, demands]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def _scaled(cost: float | None, scale: float) -> str:
    return "–" if cost is None else f"{cost / scale:.2f}"


def plan_dot(bundle: Bundle) -> str:
    """The spaces as a graph in Graphviz's language: an arrow for every convolution, bold for one with groups.

    Raises:
        BundleError: if the bundle has no plan to draw.
    """
    plan = plan_of(bundle)
    if plan is None:
        raise BundleError(f"{bundle.path}: no layer of it runs groups, so there are no spaces to draw")
    lines = ["digraph spaces {", "  rankdir=LR;", '  node [shape=box, fontname="sans-serif", fontsize=10];']
    lines.append('  edge [fontname="sans-serif", fontsize=9];')
    for number, space in enumerate(plan["spaces"]):
        orders = len(space["orders"])
        text = [f"space {number}", f"{space['channels']} channels"]
        text += [f"fixed: {space['pins'][0]}"] if space["pins"] else []
        text += [f"{orders} orders, shuffles between"] if orders > 1 else []
        colour = "#f4d6cc" if orders > 1 else "#d9e8d4"
        lines.append(f'  s{number} [label={_quoted(chr(10).join(text))}, style=filled, fillcolor="{colour}"];')
    for layer in plan["layers"]:
        runs = str(layer["groups"]) if layer["runs"] == layer["groups"] else f"{layer['runs']} of {layer['groups']}"
        label = _quoted(f"{layer['name']}\n{runs} groups")
        lines.append(f"  s{layer['reads']} -> s{layer['writes']} [label={label}, penwidth=2];")
    for layer in plan["dense"]:
        lines.append(f"  s{layer['reads']} -> s{layer['writes']} [label={_quoted(layer['name'])}, color=grey];")
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
