"""Fold batch norm into the convolution before it.

Given, with y = γ·(x − μ)/√(σ² + ε) + β per channel::

    %a = Conv2d(%x)                   weight W, bias c
    %b = BatchNorm2d(%a)

Result::

    %b = Conv2d(%x)                   weight W·γ/√(σ² + ε), bias (c − μ)·γ/√(σ² + ε) + β

The new weights are computed and kept in float64; they are rounded once, when the network is emitted.

1. The convolution has no other user.
2. Neither module, nor a parameter of theirs, is used elsewhere.
3. The batch norm has running statistics, so that it is an affine map in evaluation mode.
4. The convolution has not taken in a batch norm before: the certificate repeats one folding, not a chain of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from foldgroup.channels import shared_modules
from foldgroup.forms import conv_like
from foldgroup.pipeline import Note, Pass, PassResult, Stage
from foldgroup.trace import called_module, fork


class FoldBatchNorm(Pass):
    """Fold every BatchNorm2d that follows a convolution of its own."""

    name = "fold_batchnorm"
    requires = Stage.SHUFFLE

    def run(self, graph: fx.GraphModule) -> PassResult:
        """Fold what can be folded, and say why the rest cannot."""
        result = fork(graph)
        shared = shared_modules(result)
        rewrites, skips = [], []
        for node in list(result.graph.nodes):
            norm = called_module(result, node)
            if type(norm) is not nn.BatchNorm2d:
                continue
            source = node.all_input_nodes[0]
            conv = called_module(result, source)
            if type(conv) is not nn.Conv2d:
                skips.append(Note(str(node.target), f"it follows {source.name}, which is no convolution"))
            elif len(source.users) > 1:  # rule 1
                skips.append(Note(str(node.target), f"{source.target} has other users"))
            elif shared & {source.target, node.target}:  # rule 2
                skips.append(Note(str(node.target), "it or its convolution is used more than once"))
            elif norm.running_mean is None:  # rule 3
                skips.append(Note(str(node.target), "no running statistics"))
            elif "took_in" in source.meta:  # rule 4
                skips.append(Note(str(node.target), f"{source.target} took in {source.meta['took_in']} already"))
            else:
                result.add_submodule(str(source.target), fold(conv, norm))
                source.meta |= {"origin": node.meta["origin"], "took_in": node.target}
                node.replace_all_uses_with(source)
                result.graph.erase_node(node)
                rewrites.append(Note(str(node.target), f"folded into {source.target}"))
        result.delete_all_unused_submodules()
        return PassResult(result, tuple(rewrites), tuple(skips))


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """``norm(conv(x))`` as one convolution with float64 weights."""

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(torch.float64)

    weight, bias = fuse_conv_bn_weights(
        double(conv.weight),  # type: ignore[arg-type]  # not None
        double(conv.bias),
        double(norm.running_mean),  # type: ignore[arg-type]  # not None, by rule 3
        double(norm.running_var),  # type: ignore[arg-type]  # by rule 3
        norm.eps,
        double(norm.weight),
        double(norm.bias),
    )
    return conv_like(conv, weight, bias, conv.groups)
