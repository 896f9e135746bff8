"""The convolutions that a graph calls, as shapes (:mod:`foldgroup.conv_shape`)."""

from __future__ import annotations

from torch import fx
from torch.nn.modules.conv import _ConvNd

from foldgroup.conv_shape import ConvShape
from foldgroup.forms import CONVS
from foldgroup.trace import called_module, shape_of


def conv_shape(node: fx.Node, conv: _ConvNd) -> ConvShape:
    """The shape of ``conv`` where ``node`` calls it on [N, C, …]."""
    ends = conv._reversed_padding_repeated_twice  # for each dimension, the last first, both ends
    padding = tuple(max(ends[i], ends[i + 1]) for i in range(0, len(ends), 2))[::-1]
    size = shape_of(node.all_input_nodes[0])[-len(conv.kernel_size) :]
    extents = (conv.kernel_size, conv.stride, padding, conv.dilation, size)
    return ConvShape(conv.in_channels, conv.out_channels, conv.groups, *(tuple(map(int, extent)) for extent in extents))


def grouped_convs(graph: fx.GraphModule) -> dict[str, tuple[ConvShape, ...]]:
    """Every convolution of ``graph`` with groups that is one of torch's own, with its shape at every call."""
    found: dict[str, tuple[ConvShape, ...]] = {}
    for node in graph.graph.nodes:
        layer = called_module(graph, node)
        if isinstance(layer, _ConvNd) and type(layer) in CONVS and layer.groups > 1:
            target = str(node.target)
            found[target] = (*found.get(target, ()), conv_shape(node, layer))
    return found
