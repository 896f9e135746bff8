"""Find the groups in a kernel's zeros: Conv → the cheapest exact form of it, in any number of dimensions.

Given, with one group and a weight W [C_out, C_in, …] that is zero between channels of different components::

    %y = Conv(%x)

Result, whichever costs least by :func:`foldgroup.mask_forms.cheapest_form`: if the components pack into G equal groups,
which fold_groups then folds::

    %y = MaskedConv(%x)               the same weight, grouping of G groups

if they are unequal, with p the components' inputs one after the other, q their outputs, and parts k = 0, 1, … of
components of one size, starting at input s_k::

    %a = ChannelShuffle(%x)           a = x[:, p]
    %r_k = narrow(%a, 1, s_k, w_k)
    %b_k = Conv(%r_k, groups=G_k)     W's block of the part; it writes outputs q_k of the training form
    %b = cat([%b_0, %b_1, …], 1)
    %y = ChannelShuffle(%b)           y = b[:, q⁻¹]

or, where groups share inputs or are padded to one size, with reads r_k and writes q_k that may repeat a channel::

    %r_k = ChannelSelect(%x)          x[:, r_k]
    %b_k = Conv(%r_k, groups=G_k)     V[o, j] = W[q_k[o], r_k[γ·w + j]], 0 if the group reads that input at a lower j
    %b = cat([%b_0, %b_1, …], 1)
    %y = ChannelSelect(%b)            the first of each output

It is exact: every output sums the same products, each once, but for products with 0.

1. Only torch's own convolutions with one group that read [N, C, …]: a grouped one has been told its groups.
2. A layer called several times is rewritten once, with slices and selections around each call; its costs are summed.
3. A layer whose tensors another node reads directly stays.
4. Slices of everything, concatenations of one part, and orders and selections that are the identity are not inserted;
   inputs that follow one another are sliced.
5. A kernel with no zeros, or no groups in its zeros, is dense and not mentioned, unless most of it is zero.

A part's node has the training layer for its origin and in ``meta["out_index"]`` the training output channels it holds.
Slices and selections have the origin of what they read.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Argument
from torch.nn.modules.conv import _ConvNd

from foldgroup.channel_order import ChannelOrder, as_ranges
from foldgroup.forms import CONVS, ChannelSelect, ChannelShuffle, MaskedConv, conv_like
from foldgroup.mask_forms import Cost, Form, Geometry, Part, cheapest_form
from foldgroup.masks import components
from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.planning.cost import CostModel
from foldgroup.trace import add_module, fork, shape_of

MOSTLY = 0.5
"""Share of zero kernels from which on a layer without groups is mentioned."""


class FindGroups(Pass):
    """Give every dense convolution whose zeros separate channels the cheapest form, by ``cost``."""

    name = "find_groups"
    requires = Stage.DECODED

    def __init__(self, cost: Cost | None = None) -> None:
        self.cost = cost or CostModel()

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite each layer once, however often it is called."""
        result = fork(graph)
        read = {str(node.target).rpartition(".")[0]: node.name for node in graph.graph.nodes if node.op == "get_attr"}
        calls: dict[str, list[fx.Node]] = {}
        for node in result.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        rewrites, skips, found = [], [], []
        for target, nodes in calls.items():
            layer = graph.get_submodule(target)
            if not isinstance(layer, _ConvNd) or type(layer) not in CONVS or layer.groups != 1:  # rule 1
                continue
            if any(len(shape_of(node)) != layer.weight.ndim for node in nodes):
                continue
            form, reason = self._form(layer, nodes)
            if form is None:
                skips += [Note(target, reason)] * bool(reason)
            elif target in read:  # rule 3
                skips.append(Note(target, f"{reason}, but {read[target]} reads its tensors"))
            else:
                _rewrite(result, target, nodes, layer, form)
                rewrites.append(Note(target, reason))
                channels = {"in_channels": layer.in_channels, "out_channels": layer.out_channels}
                found.append({"name": target, **channels, "groups": _groups(form)})
        result.delete_all_unused_submodules()
        return PassResult(result, tuple(rewrites), tuple(skips), details={"layers": found} if found else {})

    def _form(self, layer: _ConvNd, nodes: list[fx.Node]) -> tuple[Form | None, str]:
        """The form to give ``layer``, None for the one it has, and what to note of it, nothing for a dense kernel."""
        connected = (layer.weight.detach() != 0).flatten(2).any(2)
        zero = 1 - float(connected.float().mean())
        if not zero or zero == 1:
            return None, "all its weights are zero" if zero else ""
        mask = connected.T.cpu().numpy()
        geometry = Geometry(
            prod(layer.kernel_size),
            sum(prod(shape_of(node.all_input_nodes[0])[2:]) for node in nodes),
            sum(prod(shape_of(node)[2:]) for node in nodes),
        )
        form = cheapest_form(mask, geometry, self.cost)
        if form.kind != "dense":
            return form, _described(form)
        found = components(mask)
        kinds = (
            (len(found.blocks), "groups"),
            (len(found.unread), "inputs unread"),
            (len(found.silent), "outputs silent"),
        )
        left = [f"{count} {kind}" for count, kind in kinds if count > (kind == "groups")]
        if left:
            return None, f"its zeros leave {', '.join(left)}, and no form of that costs less than the dense one"
        return None, f"{zero:.0%} of it is zero, and yet all its channels are connected" if zero >= MOSTLY else ""


def _described(form: Form) -> str:
    parts = ", ".join(f"{part['count']} of {part['in_width']}→{part['out_width']}" for part in _groups(form))
    if form.grouping is not None:
        return f"{parts.replace(' of ', ' groups of ')} channels in its zeros"
    return f"{form.kind}: groups in its zeros, {parts} channels"


def _groups(form: Form) -> list[dict[str, Any]]:
    """How many groups of which widths and which channels, one group after the other, for those that look for them."""
    whole = form.grouping
    parts = form.parts if whole is None else [Part(whole.groups, whole.in_order.source, whole.out_order.source)]
    return [
        {
            "count": part.groups,
            "in_width": part.in_width,
            "out_width": part.out_width,
            "reads": as_ranges(part.reads),
            "writes": as_ranges(part.writes),
        }
        for part in parts
    ]


def _rewrite(graph: fx.GraphModule, target: str, nodes: list[fx.Node], layer: _ConvNd, form: Form) -> None:
    """Put ``form`` in the place of ``layer``, which ``nodes`` call."""
    if form.grouping is not None:
        found = MaskedConv.from_dense(layer, form.grouping, ())
        # The very kernel, which is masked already: from_dense makes every −0 a 0.
        found.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        graph.add_submodule(target, found)
        return
    names: list[str] = []
    for part in form.parts:
        names.append(add_module(graph, f"{target}_part{len(names)}", part_of(layer, part)))
    for node in nodes:
        _replace(graph, target, node, form, names)


def part_of(layer: _ConvNd, part: Part) -> _ConvNd:
    """The grouped convolution of ``part``, [len(writes), in_width, …]."""
    writes = torch.tensor(part.writes)
    reads = torch.tensor(part.reads).reshape(part.groups, part.in_width)
    ascending, order = reads.sort(dim=1, stable=True)
    again = torch.zeros_like(reads, dtype=torch.bool)
    again[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    again = torch.zeros_like(again).scatter_(1, order, again)  # in the order of reads: its group has read it before

    def of_outputs(of_groups: torch.Tensor) -> torch.Tensor:
        return of_groups.repeat_interleave(part.out_width, dim=0)

    weight = layer.weight.detach()[writes[:, None], of_outputs(reads)]
    weight[of_outputs(again)] = 0
    bias = None if layer.bias is None else layer.bias.detach()[writes]
    return conv_like(layer, weight, bias, part.groups)


def _replace(graph: fx.GraphModule, target: str, node: fx.Node, form: Form, names: list[str]) -> None:
    """Compute ``node`` by the parts of ``form``, whose modules are ``names``."""
    source = node.all_input_nodes[0]
    meta = {"origin": node.meta["origin"]}
    shape = shape_of(node)
    with graph.graph.inserting_before(node):
        start = iter([0] * len(names))
        if form.kind == "split":
            reads = [channel for part in form.parts for channel in part.reads]
            unread = sorted(set(range(shape_of(source)[1])) - set(reads))
            source = _shuffled(graph, f"{node.name}_in", source, ChannelOrder((*reads, *unread)), target)
            start = accumulate((part.in_channels for part in form.parts), initial=0)
        pieces: list[fx.Node] = []
        for name, part in zip(names, form.parts, strict=True):
            if form.kind == "split":
                taken = _narrowed(graph, source, next(start), part.in_channels)
            else:
                taken = _selected(graph, f"{node.name}_in{len(pieces)}", source, part.reads, target)
            named: dict[str, Argument] = {"input": taken} if node.kwargs else {}  # as the network gives it
            piece = graph.graph.call_module(name, () if named else (taken,), named)
            piece.meta = {**meta, "shape": (shape[0], part.out_channels, *shape[2:]), "out_index": part.writes}
            pieces.append(piece)
        joined = pieces[0]
        writes = [channel for part in form.parts for channel in part.writes]
        if len(pieces) > 1:
            joined = graph.graph.call_function(torch.cat, (pieces, 1))
            joined.meta = {**meta, "shape": (shape[0], len(writes), *shape[2:])}
        place = {channel: at for at, channel in reversed(list(enumerate(writes)))}  # of the first, if there are two
        order = tuple(place[channel] for channel in range(shape[1]))
        result = _selected(graph, f"{node.name}_out", joined, order, target)
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)


def _selected(graph: fx.GraphModule, name: str, source: fx.Node, index: tuple[int, ...], target: str) -> fx.Node:
    """``source[:, index]``, by the simplest operation that does it."""
    channels = shape_of(source)[1]
    if index == tuple(range(index[0], index[0] + len(index))):
        return _narrowed(graph, source, index[0], len(index))
    if sorted(index) == list(range(channels)):
        return _shuffled(graph, name, source, ChannelOrder(index), target)
    node = graph.graph.call_module(add_module(graph, name, ChannelSelect(index, target)), (source,))
    node.meta = _with_channels(source, len(index))
    return node


def _shuffled(graph: fx.GraphModule, name: str, source: fx.Node, order: ChannelOrder, target: str) -> fx.Node:
    if order.is_identity:
        return source
    node = graph.graph.call_module(add_module(graph, name, ChannelShuffle(order, inserted_for=target)), (source,))
    node.meta = _with_channels(source, len(order))
    return node


def _narrowed(graph: fx.GraphModule, source: fx.Node, start: int, length: int) -> fx.Node:
    if length == shape_of(source)[1]:
        return source
    node = graph.graph.call_function(torch.narrow, (source, 1, start, length))
    node.meta = _with_channels(source, length)
    return node


def _with_channels(source: fx.Node, channels: int) -> dict[str, object]:
    """The metadata of a selection of ``source``'s channels."""
    shape = shape_of(source)
    return {"origin": source.meta["origin"], "shape": (shape[0], channels, *shape[2:])}
