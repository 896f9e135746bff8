"""Which rule describes which operation."""

from __future__ import annotations

import builtins
import operator

import torch
import torchvision
from torch import nn
from torch.nn import functional

from foldgroup.forms import CONVS, TRANSPOSED_CONVS, ChannelShuffle
from foldgroup.rules.kinds import RuleOf
from foldgroup.rules.operations import (
    INSTANCE_NORMS,
    attribute,
    concatenation,
    convolution,
    dropping,
    either,
    elementwise,
    group_norm,
    item,
    layer_norm,
    linear,
    narrow,
    of_first,
    over_positions,
    padding,
    per_channel,
    permute,
    prelu,
    reduction,
    reshape,
    shape_only,
    shuffle,
    spatial,
    splitting,
    stacking,
    transpose,
)

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Sigmoid, nn.LogSigmoid, nn.Tanh),
    *(nn.Softsign, nn.Tanhshrink, nn.Threshold),
)
_NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

MODULE_RULES: dict[type[nn.Module], RuleOf] = {
    **dict.fromkeys((*_ACTIVATIONS, *_NO_OPS), of_first),
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.LPPool1d), spatial(1)),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d), spatial(2)),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), spatial(3)),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), over_positions),
    **dict.fromkeys((nn.ZeroPad1d, nn.ConstantPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d), spatial(1)),
    **dict.fromkeys((nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d), spatial(2)),
    **dict.fromkeys((nn.ZeroPad3d, nn.ConstantPad3d, nn.ReflectionPad3d, nn.ReplicationPad3d), spatial(3)),
    **dict.fromkeys((nn.CircularPad1d,), spatial(1)),
    **dict.fromkeys((nn.CircularPad2d,), spatial(2)),
    **dict.fromkeys((nn.CircularPad3d,), spatial(3)),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d), of_first),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), reshape),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *INSTANCE_NORMS), per_channel),
    **dict.fromkeys((*CONVS, *TRANSPOSED_CONVS), convolution),
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
    nn.PReLU: prelu,
    nn.Linear: linear,
    ChannelShuffle: shuffle,
}
"""By exact class: a subclass may compute anything, so it has no rule until it is given one."""

_BINARY = ("add", "sub", "mul", "truediv")
_POINTWISE = (
    *("abs", "exp", "log", "neg", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sqrt", "square"),
    *("tanh", "sin", "cos", "erf", "floor", "ceil", "sign", "trunc", "exp2", "expm1", "log1p", "log2", "log10", "atan"),
)
_FUNCTIONALS = (
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "hardswish"),
    *("hardsigmoid", "hardtanh", "logsigmoid", "softsign", "normalize", "hardshrink", "softshrink", "tanhshrink"),
    *("rrelu", "elu_", "celu_", "selu_", "leaky_relu_", "hardtanh_", "rrelu_"),
)


def _functions() -> dict[object, RuleOf]:
    """Functions, and methods by name."""
    rules: dict[object, RuleOf] = {}
    for name in _BINARY:
        rules |= dict.fromkeys((getattr(operator, name), getattr(operator, f"i{name}")), elementwise)
    rules[operator.pow] = elementwise
    for name in ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "pow", "clamp", "clip"):
        rules |= dict.fromkeys((getattr(torch, name), name, f"{name}_"), elementwise)
    rules |= dict.fromkeys((torch.clamp_, torch.clip_), elementwise)
    for name in ("maximum", "minimum"):
        rules |= dict.fromkeys((getattr(torch, name), name), elementwise)
    rules |= dict.fromkeys((torch.where, torch.lerp, torch.addcmul, "expand_as"), elementwise)
    rules |= dict.fromkeys((torch.max, torch.min, "max", "min"), either)
    for name in _POINTWISE:
        rules |= dict.fromkeys((getattr(torch, name), getattr(torch, f"{name}_", name), name, f"{name}_"), of_first)
    rules |= dict.fromkeys((getattr(functional, name) for name in _FUNCTIONALS), of_first)
    rules |= dict.fromkeys((operator.neg, torch.clone, "contiguous", "clone", "detach"), of_first)
    rules |= dict.fromkeys(("float", "double", "half", "bfloat16", "to"), of_first)
    rules |= dict.fromkeys((functional.dropout, functional.dropout2d, functional.dropout3d), dropping(2))
    rules |= {torch.dropout: dropping(2, "train"), torchvision.ops.stochastic_depth: dropping(3)}
    for n in (1, 2, 3):
        for pool in (f"max_pool{n}d", f"avg_pool{n}d", f"adaptive_avg_pool{n}d", f"adaptive_max_pool{n}d"):
            rules[getattr(functional, pool)] = spatial(n)
    rules[functional.interpolate] = over_positions
    rules[functional.pad] = padding
    rules |= dict.fromkeys((functional.softmax, functional.log_softmax, torch.softmax, torch.log_softmax), of_first)
    rules |= dict.fromkeys(("softmax", "log_softmax"), of_first)
    rules[functional.layer_norm] = layer_norm
    for name in ("flatten", "reshape", "squeeze", "unsqueeze", "unflatten"):
        rules |= dict.fromkeys((getattr(torch, name), name), reshape)
    rules["view"] = reshape
    rules |= dict.fromkeys((torch.permute, "permute"), permute)
    rules |= dict.fromkeys((torch.transpose, torch.swapaxes, "transpose", "swapaxes"), transpose)
    for name in ("mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp"):
        rules |= dict.fromkeys((getattr(torch, name), name), reduction())
    rules |= dict.fromkeys((torch.norm, torch.linalg.vector_norm, "norm"), reduction(2))
    rules |= dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenation)
    rules[torch.stack] = stacking
    rules |= dict.fromkeys((torch.chunk, "chunk"), splitting(torch.chunk, "chunks"))
    rules |= dict.fromkeys((torch.split, "split"), splitting(torch.split, "split_size_or_sections"))
    rules |= dict.fromkeys((torch.narrow, "narrow"), narrow)
    rules[operator.getitem] = item
    rules |= dict.fromkeys(("size", "dim", "numel", "ndimension"), shape_only)
    rules[builtins.getattr] = attribute
    return rules


CALL_RULES: dict[object, RuleOf] = _functions()
"""Functions, and methods by name."""
