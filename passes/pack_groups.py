"""Pack groups: merge neighbouring groups of a convolution until their width is one that the target likes.

Given, in any number of dimensions, with weight W [C_out, w, …], G groups of w inputs and v outputs::

    %y = Conv(%x, groups=G)

Result, for the least m that divides G and makes m·w and m·v multiples of the width asked for::

    %y = Conv(%x, groups=G/m)         V[o, j] = W[o, j − w·r]  if w·r ≤ j < w·(r+1), else 0,   r = (o div v) mod m

It is exact: V adds products with 0 alone. It costs m times the multiply-adds and is often faster all the same, because
vector units and tensor cores work on whole widths.

1. Depthwise layers (w = v = 1) stay: runtimes have kernels of their own for them.
2. Where no m fits, the layer stays and the reason is noted.
3. A layer called several times is packed once.
4. Transposed convolutions stay, and so do subclasses of torch's own, which may compute anything.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn.modules.conv import _ConvNd

from foldgroup.forms import CONVS, conv_like
from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.trace import called_module, fork


class PackGroups(Pass):
    """Merge the groups of grouped convolutions until widths are multiples of ``multiple``."""

    name = "pack_groups"
    requires = Stage.SHUFFLE

    def __init__(self, multiple: int = 1) -> None:
        self.multiple = multiple

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Pack every grouped convolution that is neither depthwise nor wide enough."""
        result = fork(graph)
        rewrites, skips = [], []
        layers = {str(n.target): called_module(graph, n) for n in graph.graph.nodes if n.op == "call_module"}  # rule 3
        for target, layer in layers.items():
            if not isinstance(layer, _ConvNd) or layer.groups == 1:
                continue
            if type(layer) not in CONVS:  # rule 4
                skips.append(Note(target, f"a {type(layer).__name__} is not packed"))
                continue
            factor = packing_factor(layer, self.multiple)
            if layer.groups == layer.in_channels == layer.out_channels:  # rule 1
                skips.append(Note(target, "depthwise"))
            elif factor is None:  # rule 2
                skips.append(Note(target, f"no packing makes its widths multiples of {self.multiple}"))
            elif factor > 1:
                result.add_submodule(target, pack(layer, factor))
                rewrites.append(Note(target, f"{layer.groups} groups packed into {layer.groups // factor}"))
        return PassResult(result, tuple(rewrites), tuple(skips))


def packing_factor(conv: _ConvNd, multiple: int) -> int | None:
    """The least m dividing the groups for which both widths become multiples of ``multiple``; None if there is none."""
    width_in, width_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    factors = (m for m in range(1, conv.groups + 1) if conv.groups % m == 0)
    return next((m for m in factors if m * width_in % multiple == 0 and m * width_out % multiple == 0), None)


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
