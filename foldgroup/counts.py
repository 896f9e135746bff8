"""What a network costs, counted from its graph: multiply-adds and parameters.

A convolution makes H_out·W_out·C_out results per image and each takes kH·kW·C_in/G multiply-adds; a transposed one
spends kH·kW·C_out/G on each of its H_in·W_in·C_in inputs; likewise in one and three dimensions. A linear layer spends
C_in on each result. MACs are always for one image; FLOPs = 2·MACs. Nodes must carry shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from foldgroup.conv_shape import MOST_PARTS
from foldgroup.errors import TraceError
from foldgroup.nn.dgconv import DGConv

_CONV_CALLS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED_CALLS = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_COUNTED_CALLS = (*_CONV_CALLS, *_TRANSPOSED_CALLS, functional.linear)

Kind = Literal["conv", "conv_transpose", "linear"]


@dataclass(frozen=True)
class LayerCost:
    """What one call of a layer costs for one image.

    A layer called twice has two entries, and its parameters stand in both. ``groups`` of a DGConv is 1: as trained, it
    pays for the dense kernel. ``params`` leaves its gates out. A functional call is named after its node.
    """

    name: str
    kind: Kind
    in_channels: int
    out_channels: int
    groups: int
    macs: int
    params: int


def layer_costs(graph: fx.GraphModule) -> tuple[LayerCost, ...]:
    """Every convolution, transposed convolution and linear layer that ``graph`` runs, in order, in any dimensions.

    Nodes carry their shape in ``meta["shape"]`` (batch first), as :func:`foldgroup.trace.trace` leaves them. Layers
    count, and the calls of :mod:`torch.nn.functional` whose weight is a tensor of the network's; normalisation,
    pooling, additions and calls with a computed weight do not.

    Raises:
        TraceError: if a shape that is needed is missing.
    """
    costs = []
    for node in graph.graph.nodes:
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, _ConvNd | nn.Linear):
            costs.append(_layer_cost(node, layer))
        elif node.op == "call_function" and node.target in _COUNTED_CALLS:
            weight = _argument(node, 1, "weight")
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                costs.append(_call_cost(graph, node, weight))
    return tuple(costs)


def learned_costs(training: fx.GraphModule, graph: fx.GraphModule) -> dict[str, tuple[LayerCost, ...]]:
    """For every DGConv layer of ``training`` what stands for it in ``graph``: one layer, or the parts it is split into.

    Raises:
        TraceError: if a shape that is needed is missing.
    """
    found: dict[str, tuple[LayerCost, ...]] = {
        str(node.target): ()
        for node in training.graph.nodes
        if node.op == "call_module" and isinstance(training.get_submodule(str(node.target)), DGConv)
    }
    parts = {f"{name}_part{i}": name for name in found for i in range(MOST_PARTS)}
    for cost in layer_costs(graph):
        name = parts.get(cost.name, cost.name)
        if name in found:
            found[name] += (cost,)
    return found


def _layer_cost(node: fx.Node, layer: _ConvNd | nn.Linear) -> LayerCost:
    kind: Kind = "linear" if isinstance(layer, nn.Linear) else "conv_transpose" if layer.transposed else "conv"
    params = sum(p.numel() for key, p in layer.named_parameters() if not _is_gate(layer, key))
    return _cost(str(node.target), kind, node, tuple(layer.weight.shape), getattr(layer, "groups", 1), params)


def _call_cost(graph: fx.GraphModule, node: fx.Node, weight: fx.Node) -> LayerCost:
    kind: Kind = "linear" if node.target is functional.linear else "conv"
    if node.target in _TRANSPOSED_CALLS:
        kind = "conv_transpose"
    over = node if kind == "conv_transpose" else _argument(node, 0, "input")
    assert isinstance(over, fx.Node)
    shape = _shape(weight)  # groups may be given as a size, which is no number here
    groups = 1 if kind == "linear" else _shape(over)[1 - len(shape)] // shape[1]
    held = (_attribute(graph, n) for n in (weight, _argument(node, 2, "bias")) if isinstance(n, fx.Node))
    params = sum(tensor.numel() for tensor in held if isinstance(tensor, nn.Parameter))
    return _cost(node.name, kind, node, shape, groups, params)


def _cost(name: str, kind: Kind, node: fx.Node, weight: tuple[int, ...], groups: int, params: int) -> LayerCost:
    """``weight`` is the shape [C_out, C_in/G, …]; that of a transposed convolution [C_in, C_out/G, …]."""
    rows, columns = (1, *weight)[-2:] if kind == "linear" else (weight[0], weight[1] * groups)
    if kind == "linear":  # its weight may be one row without an axis for it
        return LayerCost(name, kind, columns, rows, 1, math.prod(_shape(node)[1:]) * columns, params)
    transposed = kind == "conv_transpose"
    over = _argument(node, 0, "input") if transposed else node
    assert isinstance(over, fx.Node)
    positions = _shape(over)[2 - len(weight) :]
    ins, outs = (rows, columns) if transposed else (columns, rows)
    return LayerCost(name, kind, ins, outs, groups, math.prod(positions) * math.prod(weight), params)


def _argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """An argument of a call, whether it is given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape: tuple[int, ...] | None = node.meta.get("shape")
    if not shape:
        raise TraceError(f"node {node.name} has no shape: call foldgroup.trace.attach_shapes on the graph first")
    return shape


def _is_gate(module: nn.Module, parameter: str) -> bool:
    return isinstance(module, DGConv) and parameter == "gate"


def macs(graph: fx.GraphModule) -> int:
    """Multiply-adds of one image through all layers of ``graph``; FLOPs are twice that.

    Raises:
        TraceError: if a shape that is needed is missing.
    """
    return sum(cost.macs for cost in layer_costs(graph))


def grouped_macs(costs: Iterable[LayerCost]) -> int:
    """Multiply-adds of one image in layers with more than one group."""
    return sum(cost.macs for cost in costs if cost.groups > 1)


def params(graph: fx.GraphModule) -> int:
    """Parameters that ``graph`` uses, each counted once however often it is used.

    Gates of DGConv layers are left out: they end as a few bits, which the paper discards after training.
    """
    return sum(parameter.numel() for parameter in {id(p): p for p in _parameters(graph)}.values())


def _parameters(graph: fx.GraphModule) -> Iterator[nn.Parameter]:
    """The parameters of every layer that a node calls or reads; what no node reaches is no part of the network."""
    for node in graph.graph.nodes:
        if node.op == "call_module":
            for module in graph.get_submodule(str(node.target)).modules():
                yield from (p for key, p in module.named_parameters(recurse=False) if not _is_gate(module, key))
        elif node.op == "get_attr":
            value = _attribute(graph, node)
            if isinstance(value, nn.Parameter):
                yield value


def _attribute(graph: fx.GraphModule, node: fx.Node) -> object:
    owner, _, key = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), key, None)
