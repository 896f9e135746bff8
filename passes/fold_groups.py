"""Fold masks into groups: MaskedConv → shuffle, grouped convolution, shuffle, in any number of dimensions.

Given, with p and q the grouping's orders of inputs and outputs, G groups and weight W [C_out, C_in, …] zero where the
mask is::

    %y = MaskedConv(%x)

Result::

    %a = ChannelShuffle(%x)           a = x[:, p]
    %b = Conv(%a, groups=G)           V[o, j] = W[q[o], p[γ·C_in/G + j]] with γ = o div C_out/G
    %y = ChannelShuffle(%b)           y = b[:, q⁻¹]

It is exact: b[:, o] sums W[q[o], p[i]]·x[:, p[i]] over all i, and W vanishes for every i outside group γ, so the G
blocks V are all there is to sum, and q⁻¹ puts the outputs back where they were.

1. Shuffles that are the identity are not inserted (adjacent groups, dense and depthwise layers).
2. A layer called several times is folded once, with shuffles around each call.
3. A layer that reads a single example without batch dimension is refused: shuffles act on dimension 1.
"""

from __future__ import annotations

from torch import fx
from torch.nn.modules.conv import _ConvNd

from foldgroup.channel_order import ChannelOrder
from foldgroup.errors import PassError
from foldgroup.forms import ChannelShuffle, MaskedConv, conv_like
from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.trace import add_module, called_module, fork, shape_of


class FoldGroups(Pass):
    """Replace every MaskedConv by a grouped convolution between the shuffles that make its groups contiguous."""

    name = "fold_groups"
    requires = Stage.DECODED
    gives = Stage.SHUFFLE

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Fold every masked convolution.

        Raises:
            PassError: by rule 3.
        """
        result = fork(graph)
        rewrites = []
        for node in list(result.graph.nodes):
            target = str(node.target)
            layer = called_module(graph, node)
            if not isinstance(layer, MaskedConv):
                continue
            if len(shape_of(node)) != layer.weight.ndim:  # rule 3
                raise PassError(f"{target} reads a tensor without batch dimension: unsqueeze(0) it first")
            grouping = layer.grouping
            if isinstance(called_module(result, node), MaskedConv):  # rule 2
                result.add_submodule(target, _grouped(layer))
            node.meta["out_order"] = grouping.out_order
            inserted = 0
            if not grouping.in_order.is_identity:
                source = node.all_input_nodes[0]
                with result.graph.inserting_before(node):
                    shuffle = _insert(result, f"{node.name}_in", grouping.in_order, source, target)
                node.replace_input_with(source, shuffle)
                inserted += 1
            if not grouping.out_order.is_identity:
                with result.graph.inserting_after(node):
                    shuffle = _insert(result, f"{node.name}_out", grouping.out_order.inverse(), node, target)
                node.replace_all_uses_with(shuffle, delete_user_cb=lambda user, shuffle=shuffle: user is not shuffle)
                inserted += 1
            rewrites.append(
                Note(
                    target,
                    f"{grouping.groups} groups of {grouping.in_width}→{grouping.out_width} channels, "
                    f"{inserted} shuffles inserted",
                )
            )
        return PassResult(result, tuple(rewrites))


def _grouped(layer: MaskedConv) -> _ConvNd:
    """The grouped convolution of the orders' blocks, [C_out, C_in/G, …]."""
    grouping = layer.grouping
    rows = grouping.out_order.index
    columns = grouping.in_order.index.reshape(grouping.groups, grouping.in_width)
    columns = columns.repeat_interleave(grouping.out_width, dim=0)  # [C_out, C_in/G]: the inputs each output sums
    weight = layer.weight.detach()[rows[:, None], columns]
    bias = None if layer.bias is None else layer.bias.detach()[rows]
    return conv_like(layer, weight, bias, grouping.groups)


def _insert(graph: fx.GraphModule, name: str, order: ChannelOrder, source: fx.Node, layer: str) -> fx.Node:
    name = add_module(graph, name, ChannelShuffle(order, inserted_for=layer))
    shuffle = graph.graph.call_module(name, (source,))
    shuffle.meta = {"origin": source.meta["origin"], "shape": source.meta["shape"]}
    return shuffle
