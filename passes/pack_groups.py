"""Pack groups: run every convolution with groups in the exact form that is fastest on the target.

Given, in any number of dimensions, with weight W [C_out, w, …], G groups of w inputs and v outputs::

    %y = Conv(%x, groups=G)

Result, packed, for an m that divides G::

    %y = Conv(%x, groups=G/m)         V[o, j] = W[o, j − w·r]  if w·r ≤ j < w·(r+1), else 0,   r = (o div v) mod m

or split into n parts, after packing G down to n groups, for runtimes whose kernels for groups are poor::

    %r_k = narrow(%x, 1, k·C_in/n, C_in/n)
    %b_k = Conv(%r_k)                 rows k·C_out/n … of V
    %y = cat([%b_0, …, %b_n-1], 1)

It is exact: V adds products with 0 alone. Packing costs m times the multiply-adds and is often faster all the same,
because vector units and tensor cores work on whole widths. Which is fastest is for ``choose`` to say.

1. Depthwise layers (w = v = 1) need no width: runtimes have kernels of their own for them. Unless there is a choice,
   they stay.
2. Where nothing has the widths asked for, the layer stays and the reason is noted.
3. A layer called several times is rewritten once, and the choice is for all its calls.
4. Transposed convolutions stay, and so do subclasses of torch's own, which may compute anything.
5. A layer whose tensors another node reads directly is packed, which leaves these alone, but never split.

A part's node has the layer's origin and in ``meta["out_index"]`` the training output channels it holds.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import Argument
from torch.nn.modules.conv import _ConvNd

from foldgroup.conv_calls import conv_shape
from foldgroup.conv_shape import Choose, Execution
from foldgroup.errors import PassError
from foldgroup.forms import CONVS, conv_like
from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.trace import add_module, called_module, fork, shape_of


class PackGroups(Pass):
    """Give convolutions with groups widths that are multiples of ``multiple``, in the form that ``choose`` prefers.

    Without ``choose`` it is the least packing.
    """

    name = "pack_groups"
    requires = Stage.SHUFFLE

    def __init__(self, multiple: int = 1, choose: Choose | None = None) -> None:
        self.multiple = multiple
        self.choose = choose
        self.chosen: dict[str, Execution] = {}
        """What the last run made of each layer that it changed."""

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite every convolution with groups that is to run in another form.

        Raises:
            PassError: if ``choose`` names an execution that is not open to its layer.
        """
        result = fork(graph)
        rewrites, skips = [], []
        self.chosen = {}
        layers: dict[str, list[fx.Node]] = {}
        for node in result.graph.nodes:
            if isinstance(called_module(result, node), _ConvNd):
                layers.setdefault(str(node.target), []).append(node)  # rule 3
        for target, nodes in layers.items():
            layer = graph.get_submodule(target)
            if not isinstance(layer, _ConvNd) or layer.groups == 1:
                continue
            if type(layer) not in CONVS:  # rule 4
                skips.append(Note(target, f"a {type(layer).__name__} is not packed"))
                continue
            form, reason = self._form(graph, layer, nodes)
            if form == Execution(layer.groups):
                skips += [Note(target, reason)] * bool(reason)
                continue
            self.chosen[target] = form
            rewrites.append(Note(target, _described(layer, form)))
            packed = pack(layer, layer.groups // form.groups)
            result.add_submodule(target, packed)
            if form.parts > 1:
                _split(result, target, nodes, packed, form)
        result.delete_all_unused_submodules()
        return PassResult(result, tuple(rewrites), tuple(skips))

    def _form(self, graph: fx.GraphModule, layer: _ConvNd, nodes: list[fx.Node]) -> tuple[Execution, str]:
        """How to run ``layer``, and if that is as it stands, why nothing else was possible."""
        calls = [conv_shape(node, layer) for node in nodes]
        own, depthwise = Execution(layer.groups), calls[0].depthwise
        read = any(str(node.target).rpartition(".")[0] == str(nodes[0].target) for node in _attributes(graph))
        open_to = [e for e in calls[0].executions if self._fits(layer, e) and not (read and e.parts > 1)]  # rule 5
        if depthwise and own not in open_to:  # rule 1
            open_to.insert(0, own)
        if not open_to:  # rule 2
            return own, f"no packing makes its widths multiples of {self.multiple}"
        if self.choose is None:
            return open_to[0], "depthwise" if depthwise else ""
        form = self.choose(str(nodes[0].target), calls, open_to)
        if form not in open_to:
            raise PassError(f"{nodes[0].target} cannot run as {form}: it has {layer.groups} groups")
        return form, ""

    def _fits(self, layer: _ConvNd, form: Execution) -> bool:
        widths = (layer.in_channels // form.groups, layer.out_channels // form.groups)
        return all(width % self.multiple == 0 for width in widths)


def _attributes(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "get_attr"]


def _described(layer: _ConvNd, form: Execution) -> str:
    packed = f"{layer.groups} groups packed into {form.groups}" if form.groups < layer.groups else ""
    split = f"split into {form.parts} convolutions side by side" if form.parts > 1 else ""
    return ", ".join(filter(None, (packed, split)))


def pack(conv: _ConvNd, factor: int) -> _ConvNd:
    """The same convolution with every ``factor`` neighbouring groups written as one, zeros between them."""
    weight = conv.weight.detach()
    out_channels, width, *kernel = weight.shape
    groups = conv.groups // factor
    # [packed group, member, outputs of a member, member, inputs of a member, …]: the diagonal holds the old weights
    blocks = weight.new_zeros(groups, factor, out_channels // conv.groups, factor, width, *kernel)
    member = torch.arange(factor)
    blocks[:, member, :, member] = weight.reshape(groups, factor, -1, width, *kernel).transpose(0, 1)
    return conv_like(conv, blocks.reshape(out_channels, factor * width, *kernel), conv.bias, groups)


def _split(graph: fx.GraphModule, target: str, nodes: list[fx.Node], layer: _ConvNd, form: Execution) -> None:
    """Compute ``nodes``, which call ``layer``, by one convolution for every part."""
    rows, width = layer.out_channels // form.parts, layer.in_channels // form.parts
    names = []
    for part in range(form.parts):
        own = slice(part * rows, (part + 1) * rows)
        bias = None if layer.bias is None else layer.bias.detach()[own]
        piece = conv_like(layer, layer.weight.detach()[own], bias, form.groups // form.parts)
        names.append(add_module(graph, f"{target}_part{part}", piece))
    for node in nodes:
        source, shape = node.all_input_nodes[0], shape_of(node)
        order = node.meta.get("out_order")
        held = order.source if order is not None else node.meta.get("out_index", tuple(range(shape[1])))
        origin = {"origin": node.meta["origin"]}
        pieces: list[fx.Node] = []
        with graph.graph.inserting_before(node):
            for part, name in enumerate(names):
                taken = graph.graph.call_function(torch.narrow, (source, 1, part * width, width))
                batch, _, *extent = shape_of(source)
                taken.meta = {"origin": source.meta["origin"], "shape": (batch, width, *extent)}
                named: dict[str, Argument] = {"input": taken} if node.kwargs else {}  # as the network gives it
                call = graph.graph.call_module(name, () if named else (taken,), named)
                channels = tuple(held[part * rows : (part + 1) * rows])
                call.meta = {**origin, "shape": (shape[0], rows, *shape[2:]), "out_index": channels}
                pieces.append(call)
            joined = graph.graph.call_function(torch.cat, (pieces, 1))
            joined.meta = {**origin, "shape": shape}
        node.replace_all_uses_with(joined)
        graph.graph.erase_node(node)
