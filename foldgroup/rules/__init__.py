"""What each operation does to channels: one rule per kind of operation, unknown = barrier, never a guess.

A tensor has at most one *channel axis*: dimension 1 of the network's input and of what convolutions return, the last
one behind a permute to channels-last, none where channels were summed away. A rule is a function of a :class:`Call`
that says how the channel axes of its operands and of its result relate:

* :class:`Through`: the result has its operands' channels in their order (ReLU, Add, pooling, flatten …).
* :class:`Mixes`: a dense weight reads the operand's channels and makes new ones. It takes up any order of either side.
* :class:`Groups`: the same for a grouped weight, which connects neighbouring channels only.
* :class:`Joins`, :class:`Splits`, :class:`Takes`: concatenation, splitting and slicing of the channel axis.
* :class:`Shuffles`: a fixed reordering.
* :class:`Constant`: a parameter that the network reads directly; it can be written in any order.
* :class:`Reads`: the result does not depend on the order (sums over channels, shapes) and has no channels.
* :class:`Barrier`: positions matter in a way that no rule describes. Operands and result keep their order.

A rule is added by one entry in :data:`MODULE_RULES` or :data:`CALL_RULES` (``table.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set

from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from foldgroup.forms import ChannelShuffle
from foldgroup.rules.kinds import (
    Barrier,
    Call,
    Constant,
    Groups,
    Joins,
    Mixes,
    Reads,
    Rule,
    Shuffles,
    Splits,
    Takes,
    Through,
)
from foldgroup.rules.table import CALL_RULES, MODULE_RULES
from foldgroup.trace import called_module, shape_of

__all__ = [
    "CALL_RULES",
    "MODULE_RULES",
    "Barrier",
    "Call",
    "Constant",
    "Groups",
    "Joins",
    "Mixes",
    "Reads",
    "Rule",
    "Shuffles",
    "Splits",
    "Takes",
    "Through",
    "rules_of",
    "shared_modules",
]


def rules_of(graph: fx.GraphModule, *, to_change: bool = True) -> tuple[dict[fx.Node, Rule], dict[fx.Node, int | None]]:
    """The rule of every node of ``graph``, whose nodes carry shapes, and the channel axis of every tensor.

    What is used in several places cannot follow the orders of all of them: unless the graph is only to be read, and not
    ``to_change``, it is a barrier. So is what makes a convolution's input of something other than channels, such as the
    largest of two halves: the convolution's channels begin there, in their order.
    """
    shared: Set[str] = shared_modules(graph) if to_change else set()
    reads = Counter(node.target for node in graph.graph.nodes if node.op == "get_attr")
    read_often = {target for target, count in reads.items() if count > 1} if to_change else set()
    barriers: dict[fx.Node, Barrier] = {}
    while True:
        rules, axes = _rules(graph, shared, read_often, barriers)
        found = {node: Barrier(f"{node.name} makes channels of something else") for node in _begin(graph, axes, rules)}
        if to_change:
            found |= {
                node: Barrier(f"{node.target} is read along several axes") for node in _read_otherwise(rules, axes)
            }
        if not found.keys() - barriers.keys():
            return rules, axes
        barriers |= found


def _rules(
    graph: fx.GraphModule, shared: Set[str], read_often: Set[object], barriers: Mapping[fx.Node, Barrier]
) -> tuple[dict[fx.Node, Rule], dict[fx.Node, int | None]]:
    rules: dict[fx.Node, Rule] = {}
    axes: dict[fx.Node, int | None] = {}
    for node in graph.graph.nodes:
        call = Call(graph, node, rules, called_module(graph, node), axes)
        rule = barriers[node] if node in barriers else _rule(call, shared)
        if isinstance(rule, Constant) and (node.target in read_often or _owner(node) in shared):
            rule = Barrier(f"{node.target} is used more than once")
        axes.setdefault(node, _axis_of(rule, call))
        rules[node] = rule
    for node, rule in rules.items():
        if isinstance(rule, Constant):
            rules[node] = Constant(axes[node])
    return rules, axes


def _begin(graph: fx.GraphModule, axes: Mapping[fx.Node, int | None], rules: Mapping[fx.Node, Rule]) -> set[fx.Node]:
    """Where something other than channels becomes what a layer takes for channels, along dimension 1."""
    found = set()
    for node in graph.graph.nodes:
        module = called_module(graph, node)
        if isinstance(module, _ConvNd | _BatchNorm) or (isinstance(module, ChannelShuffle) and module.dim == 1):
            operand = node.all_input_nodes[0]
            if len(shape_of(operand)) >= 2 and axes[operand] != 1:
                while isinstance(rules[operand], Reads | Through) and [shape_of(operand)] == [
                    *map(shape_of, operand.all_input_nodes)
                ]:
                    operand = operand.all_input_nodes[0]  # as before what keeps the shape, which a pass may drop
                found.add(operand)
    return found


def _read_otherwise(rules: Mapping[fx.Node, Rule], axes: Mapping[fx.Node, int | None]) -> set[fx.Node]:
    """Tensors of the network with channels to one reader, which another reads along other axes."""

    def carries(reader: fx.Node, tensor: fx.Node) -> bool:
        rule = rules[reader]
        return tensor in (*getattr(rule, "operands", ()), getattr(rule, "operand", None))

    constants = (node for node, rule in rules.items() if isinstance(rule, Constant) and axes[node] is not None)
    return {node for node in constants if not all(carries(reader, node) for reader in node.users)}


def _rule(call: Call, shared: Set[str]) -> Rule:
    node, module = call.node, call.module
    if node.op == "placeholder":
        return Barrier("network input")
    if node.op == "output":
        return Barrier("network output")
    if node.op == "get_attr":
        return Constant()
    if module is not None:
        if type(module) not in MODULE_RULES:
            return Barrier(f"no rule for {type(module).__name__} ({node.target})")
        rule = MODULE_RULES[type(module)](call)
        follows = isinstance(rule, Mixes | Groups) or (isinstance(rule, Through) and rule.carries)
        if follows and node.target in shared:
            return Barrier(f"{node.target} is used more than once")
        return rule
    if not any(shape_of(o) or isinstance(call.rules[o], Splits | Barrier) for o in node.all_input_nodes):
        return Reads() if not shape_of(node) else Barrier(f"{node.name} makes a tensor from none")
    if node.target not in CALL_RULES:
        return Barrier.unknown(node)
    return CALL_RULES[node.target](call)


def _axis_of(rule: Rule, call: Call) -> int | None:
    if isinstance(rule, Barrier):
        return 1 if len(call.shape) >= 2 else None
    return getattr(rule, "axis", None) if call.shape else None


def shared_modules(graph: fx.GraphModule) -> set[str]:
    """Names of modules that several nodes call, or whose parameters another module holds or a node reads directly."""
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    calls = Counter(targets)
    holders: dict[int, set[str]] = {}
    for target in calls:
        for tensor in graph.get_submodule(target).parameters():
            holders.setdefault(id(tensor), set()).add(target)
    tied = {target for group in holders.values() if len(group) > 1 for target in group}
    read = {_owner(n) for n in graph.graph.nodes if n.op == "get_attr"}
    return tied | (calls.keys() & read) | {target for target, count in calls.items() if count > 1}


def _owner(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0]
