"""Whether a graph may be read as equations: every value is what its node computes, and stays so.

Passes move, merge and drop nodes, and the certificate follows values from node to node. Both are right only if

1. every module that is called runs its class's ``forward`` in evaluation mode and nothing else: no hooks, no method
   replaced on the instance;
2. what an in-place operation overwrites is read by nothing else, nor is any value that it may be a view of.

Functions and modules that foldgroup does not know are taken to keep to this: that they compute a result from their
operands and change none, unless their name or a flag says so.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.fx.graph import inplace_methods
from torch.nn import functional

from foldgroup.forms import (
    CONVS,
    TRANSPOSED_CONVS,
    ChannelSelect,
    ChannelShuffle,
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
)
from foldgroup.nn.dgconv import DGConv1d, DGConv2d, DGConv3d
from foldgroup.trace import called_module, is_no_op

_IN_PLACE_OPERATORS = {getattr(operator, name) for name in inplace_methods}

_WITH_WEIGHTS = {
    ChannelSelect,
    *(*CONVS, *TRANSPOSED_CONVS, DGConv1d, DGConv2d, DGConv3d, MaskedConv1d, MaskedConv2d, MaskedConv3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.PReLU),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}
_ACTIVATIONS = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
}
_POOLINGS = {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool1d, nn.AvgPool1d, nn.MaxPool3d, nn.AvgPool3d}
_ARITHMETIC = {operator.add, operator.mul, operator.sub, torch.add, torch.mul, torch.sub, torch.cat, torch.mean}
_FUNCTIONALS = {
    *(torch.relu, torch.sigmoid, torch.tanh, functional.relu, functional.silu, functional.gelu),
    *(functional.conv1d, functional.conv2d, functional.conv3d, functional.linear, torch.matmul, operator.matmul),
    *(
        functional.batch_norm,
        functional.group_norm,
        functional.layer_norm,
        functional.max_pool2d,
        functional.avg_pool2d,
    ),
}
_CREATIONS = {
    *("clone", "new_full", "new_ones", "new_tensor", "new_zeros", torch.clone, torch.full, torch.ones, torch.zeros),
    *(torch.eye, torch.full_like, torch.ones_like, torch.zeros_like, torch.index_select, "index_select"),
}
_NEW = _WITH_WEIGHTS | _ACTIVATIONS | _POOLINGS | _ARITHMETIC | _FUNCTIONALS | _CREATIONS
"""What returns a new tensor when it does not work in place; all else might return a view of its operands."""

_ABOUT = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"}
ASKING = {"size", "dim", "numel", "ndimension", "is_floating_point"}
"""Attributes and methods that tell about a tensor, and nothing of its values."""


def impurity(graph: fx.GraphModule) -> str | None:
    """What keeps ``graph`` from being read as equations, and what to do about it; None if nothing does."""
    for node in graph.graph.nodes:
        module = called_module(graph, node)
        for part in module.modules() if module is not None else ():
            if part.training:
                return f"{node.target} is in training mode: call eval() on it"
            if part._forward_hooks or part._forward_pre_hooks:
                return f"{node.target} has hooks: remove them (torch has functions for weight norm, pruning and so on)"
            replaced = [name for name, value in vars(part).items() if callable(value) and hasattr(type(part), name)]
            if replaced:
                return f"{node.target} has a {replaced[0]}() of its own: make it a class"
        for value in overwritten(graph, node):
            reader = other_reader(graph, value, node)
            if reader is not None:
                return f"{node.name} overwrites {value.name}, which {reader} too: do not work in place"
    return None


def overwritten(graph: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The tensors that ``node`` overwrites: its first operand if it works in place, and what is given as ``out``."""
    module = called_module(graph, node)
    if module is not None:
        in_place = bool(getattr(module, "inplace", False)) and not is_no_op(module)
    elif node.op in ("call_function", "call_method"):
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        in_place = (
            node.target in _IN_PLACE_OPERATORS
            or (name.endswith("_") and not name.endswith("__"))
            or bool(node.kwargs.get("inplace", False))
        )
    else:
        return []
    written = [*(node.all_input_nodes[:1] if in_place else ()), node.kwargs.get("out")]
    return [value for value in written if isinstance(value, fx.Node) and "shape" in value.meta]


def read_what_is_written(graph: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Let what reads a tensor after ``node`` has overwritten it read the result of ``node``, which is that tensor.

    Returns the tensors that it overwrites.
    """
    written = overwritten(graph, node)
    for value in written:
        if len(value.users) > 1:
            later, following = set(), node.next
            while following.op != "root":
                later.add(following)
                following = following.next
            for reader in later.intersection(value.users):
                reader.replace_input_with(value, node)
    return written


def other_reader(graph: fx.GraphModule, value: fx.Node, reader: fx.Node) -> str | None:
    """Who but ``reader`` reads ``value`` or something that ``value`` may be a view of."""
    if value.op == "get_attr":
        return "the next call reads"
    others = [user.name for user in value.users if user is not reader and not asks(user)]
    if others or _is_new(graph, value):
        return f"{others[0]} reads" if others else None
    operands = overwritten(graph, value) or value.all_input_nodes  # an in-place operation returns what it overwrote
    return next((found for operand in operands if (found := other_reader(graph, operand, value)) is not None), None)


def asks(node: fx.Node) -> bool:
    """Whether a node asks about a tensor, and reads none of its values."""
    attribute = node.op == "call_function" and node.target is getattr and node.args[1] in _ABOUT
    return attribute or (node.op == "call_method" and node.target in ASKING)


def _is_new(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the value of ``node`` is certainly no view of its operands."""
    module = called_module(graph, node)
    if isinstance(module, ChannelShuffle):
        return not module.order.is_identity
    if node.target is operator.getitem and isinstance(node.args[1], tuple):  # by tensors or lists it copies
        return any(isinstance(i, list) or (isinstance(i, fx.Node) and "shape" in i.meta) for i in node.args[1])
    kind = node.target if module is None else type(module)
    return kind in _NEW and not overwritten(graph, node)
