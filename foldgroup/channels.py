"""Channel spaces of a graph: which tensors must share one channel order, and what each operation does to the channels.

Every operation has one rule, a function of its node that says how dimension 1 of its operands relates to dimension 1 of
its result:

* :class:`Through`: result and operands have the same channels in the same order (ReLU, Add, pooling). Per-channel
  parameters (batch norm, depthwise kernels) follow the order.
* :class:`Mixes`: the operand's channels are summed over by a weight, which makes new ones (dense convolution,
  linear). A weight takes up any order of either side for free.
* :class:`Shuffles`: a ChannelShuffle; the one operation that an order can remove.
* :class:`Barrier`: the channels' positions matter in a way no rule describes. Operands and result keep their order.
  What has no rule is a barrier: never a guess.

A *channel space* is a connected component of tensors under Through. It is free if all that reads and writes it is
Mixes, Through or Shuffles, and pinned otherwise.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.channel_order import ChannelOrder
from foldgroup.forms import ChannelShuffle, with_tensors
from foldgroup.trace import called_module, shape_of


@dataclass(frozen=True)
class Through:
    """The result's channels are those of all ``operands``; with ``carries``, per-channel tensors follow them."""

    operands: tuple[fx.Node, ...]
    carries: bool = False


@dataclass(frozen=True)
class Mixes:
    """A weight [C_out, C_in, …] reads the channels of ``operand`` and writes new ones."""

    operand: fx.Node


@dataclass(frozen=True)
class Shuffles:
    """The result is ``operand[:, order]``."""

    operand: fx.Node
    order: ChannelOrder


@dataclass(frozen=True)
class Barrier:
    """All operands and the result keep their order, for ``reason``."""

    reason: str


Rule = Through | Mixes | Shuffles | Barrier


@dataclass
class ChannelSpace:
    """Tensors (nodes) that share one channel order, and the modules whose tensors depend on it."""

    index: int
    channels: int
    tensors: list[fx.Node]
    writers: list[fx.Node] = field(default_factory=list)
    """Mixes nodes whose output channels are this space."""
    readers: list[fx.Node] = field(default_factory=list)
    """Mixes nodes whose input channels are this space."""
    carriers: list[fx.Node] = field(default_factory=list)
    """Through nodes with per-channel tensors."""
    pins: list[str] = field(default_factory=list)
    """Why the order cannot change; empty for a free space."""


@dataclass
class ChannelSpaces:
    """The spaces of a graph, and the shuffles between them as (node, index of space before, of space after, order)."""

    spaces: list[ChannelSpace]
    of: dict[fx.Node, ChannelSpace]
    shuffles: list[tuple[fx.Node, int, int, ChannelOrder]]


def channel_spaces(graph: fx.GraphModule) -> ChannelSpaces:
    """The channel spaces of ``graph``, whose nodes carry ``meta["shape"]``."""
    shared = shared_modules(graph)
    rules = {node: rule_of(graph, node, shared) for node in graph.graph.nodes}
    tensors = [node for node in graph.graph.nodes if len(shape_of(node)) >= 2]
    same = nx.Graph()
    same.add_nodes_from(tensors)
    for node, rule in rules.items():
        if isinstance(rule, Through):
            same.add_edges_from((node, operand) for operand in rule.operands)
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    result = ChannelSpaces([], {}, [])
    for component in sorted(
        (sorted(c, key=position.__getitem__) for c in nx.connected_components(same)), key=lambda c: position[c[0]]
    ):
        space = ChannelSpace(len(result.spaces), shape_of(component[0])[1], component)
        result.spaces.append(space)
        result.of.update(dict.fromkeys(component, space))
    for node, rule in rules.items():
        if isinstance(rule, Mixes):
            result.of[rule.operand].readers.append(node)
            result.of[node].writers.append(node)
        elif isinstance(rule, Shuffles):
            result.shuffles.append((node, result.of[rule.operand].index, result.of[node].index, rule.order))
        elif isinstance(rule, Through):
            if rule.carries:
                result.of[node].carriers.append(node)
        else:
            for tensor in (*node.all_input_nodes, node):
                if tensor in result.of:
                    result.of[tensor].pins.append(rule.reason)
    return result


def rule_of(graph: fx.GraphModule, node: fx.Node, shared: Set[str] = frozenset()) -> Rule:
    """What ``node`` does to channels. Unknown operations are barriers, and modules in ``shared``, whose tensors cannot
    follow the orders of two places.
    """
    if node.op == "placeholder":
        return Barrier("network input")
    if node.op == "output":
        return Barrier("network output")
    module = called_module(graph, node)
    if type(module) in MODULE_RULES:
        assert module is not None
        rule = MODULE_RULES[type(module)](node, module)
        follows = isinstance(rule, Mixes | Shuffles) or (isinstance(rule, Through) and rule.carries)
        if follows and node.target in shared:
            return Barrier(f"{node.target} is used more than once")
    elif module is not None:
        return Barrier(f"no rule for {type(module).__name__} ({node.target})")
    elif node.op in ("call_function", "call_method") and node.target in CALL_RULES:
        rule = CALL_RULES[node.target](node)
    else:
        return Barrier(f"no rule for {node.op} {getattr(node.target, '__name__', node.target)}")
    if isinstance(rule, Through) and not (rule.operands and all(_same_channels(node, o) for o in rule.operands)):
        return Barrier(f"{node.name} changes the channel axis")
    return rule


def reordered(module: nn.Module, before: ChannelOrder | None, after: ChannelOrder | None) -> nn.Module:
    """A copy of ``module`` that reads channels in order ``before`` and writes them in order ``after``.

    Dense convolution and linear: ``weight[after][:, before]`` and ``bias[after]``. Per-channel modules carry one order,
    given as ``after``: every tensor of length C follows it. None leaves a side as it is.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        result = tensor.detach()
        if after is not None and result.ndim:
            result = result[after.index.to(result.device)]
        if before is not None and name == "weight":
            result = result[:, before.index.to(result.device)]
        if result is not tensor and result.ndim:
            tensors[name] = result
    return with_tensors(module, tensors)


def shared_modules(graph: fx.GraphModule) -> set[str]:
    """Names of modules that several nodes call, or whose parameters another module holds or a node reads directly."""
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    calls = Counter(targets)
    holders: dict[int, set[str]] = {}
    for target in calls:
        for tensor in graph.get_submodule(target).parameters():
            holders.setdefault(id(tensor), set()).add(target)
    tied = {target for group in holders.values() if len(group) > 1 for target in group}
    read = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    tied |= {target for target in calls if any(name.startswith(target + ".") for name in read)}
    return tied | {target for target, count in calls.items() if count > 1}


# ---- one rule per kind of operation ----------------------------------------------------------------------------


def _first(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _same_channels(node: fx.Node, other: fx.Node) -> bool:
    return len(shape_of(node)) > 1 and shape_of(node)[1:2] == shape_of(other)[1:2]


def _elementwise_module(node: fx.Node, module: nn.Module) -> Rule:
    return Through((_first(node),))


def _elementwise_call(node: fx.Node) -> Rule:
    return Through((_first(node),))


def _pooling(node: fx.Node, module: nn.Module | None = None) -> Rule:
    """Over positions; torch takes a tensor of rank 3 for one image, whose dimension 1 is not its channels."""
    if len(shape_of(_first(node))) != 4:
        return Barrier(f"{node.name} pools a tensor that is not [N, C, H, W]")
    return Through((_first(node),))


def _elementwise(node: fx.Node) -> Rule:
    """Operands that broadcast: those with the result's rank and channel count share its channels."""
    shape = shape_of(node)
    operands = [o for o in node.all_input_nodes if shape_of(o)]
    if any(len(shape_of(o)) != len(shape) for o in operands):
        return Barrier(f"{node.name} broadcasts tensors of different rank")
    return Through(tuple(o for o in operands if _same_channels(node, o)))


def _per_channel(node: fx.Node, module: nn.Module) -> Rule:
    return Through((_first(node),), carries=True)


def _prelu(node: fx.Node, module: nn.Module) -> Rule:
    assert isinstance(module, nn.PReLU)
    return Through((_first(node),), carries=module.num_parameters > 1)


def _conv(node: fx.Node, module: nn.Module) -> Rule:
    assert isinstance(module, nn.Conv2d)
    if len(shape_of(_first(node))) != 4:
        return Barrier(f"{node.target} reads a tensor that is not [N, C, H, W]")
    if module.groups == 1:
        return Mixes(_first(node))
    if module.groups == module.in_channels == module.out_channels:
        return Through((_first(node),), carries=True)
    return Barrier(f"{node.target} has {module.groups} groups of fixed channels")


def _linear(node: fx.Node, module: nn.Module) -> Rule:
    if len(shape_of(_first(node))) != 2:
        return Barrier(f"{node.target} is linear over an axis other than the channels")
    return Mixes(_first(node))


def _flatten(node: fx.Node, module: nn.Module | None = None) -> Rule:
    operand = _first(node)
    if shape_of(operand)[:2] == shape_of(node) and all(n == 1 for n in shape_of(operand)[2:]):
        return Through((operand,))
    return Barrier(f"{node.name} flattens channels and positions into one axis")


def _mean(node: fx.Node) -> Rule:
    operand = _first(node)
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = dims if isinstance(dims, list | tuple) else [dims]
    rank = len(shape_of(operand))
    if rank < 2 or not axes or not all(isinstance(axis, int) and axis % rank > 1 for axis in axes):
        return Barrier(f"{node.name} averages over channels")
    return Through((operand,))


def _shuffle(node: fx.Node, module: nn.Module) -> Rule:
    assert isinstance(module, ChannelShuffle)
    return Shuffles(_first(node), module.order)


MODULE_RULES: dict[type[nn.Module], Callable[[fx.Node, nn.Module], Rule]] = {
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.ELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU),
        _elementwise_module,
    ),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), _elementwise_module),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), _pooling),
    nn.Flatten: _flatten,
    nn.BatchNorm2d: _per_channel,
    nn.PReLU: _prelu,
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    ChannelShuffle: _shuffle,
}
"""By exact class: a subclass may compute anything, so it has no rule until it is given one."""

CALL_RULES: dict[object, Callable[[fx.Node], Rule]] = {
    **dict.fromkeys(
        (operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.isub), _elementwise
    ),
    **dict.fromkeys((torch.add, torch.mul, torch.sub, "add", "add_", "mul", "mul_", "sub", "sub_"), _elementwise),
    **dict.fromkeys(
        (torch.relu, functional.relu, torch.sigmoid, torch.tanh, functional.silu, "relu", "relu_"), _elementwise_call
    ),
    **dict.fromkeys((functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d), _pooling),
    **dict.fromkeys((functional.dropout, "contiguous"), _elementwise_call),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.mean, "mean"), _mean),
}
"""Functions, and methods by name."""
