"""The rule of every operation, checked by doing what it says: permuted operands give the result, permuted."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from graphs import (
    Call,
    Leaf,
    Scale,
    TiedWeights,
    Twice,
    assert_same_function,
    compiled,
    compiled_case,
    conv,
    depthwise,
    filled,
    learned,
    node_of,
)
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.equivalence import seeded_inputs
from foldgroup.forms import ChannelShuffle
from foldgroup.rules import (
    CALL_RULES,
    MODULE_RULES,
    Barrier,
    Constant,
    Groups,
    Joins,
    Mixes,
    Reads,
    Rule,
    Shuffles,
    Splits,
    Takes,
    Through,
    rules_of,
    shared_modules,
)
from foldgroup.trace import called_module, shape_of, trace
from passes.absorb_shuffles import most_groups, regrouped, reordered

Layer = nn.Module | Callable[[Tensor], Any]

IMAGE, SIGNAL, VOLUME, VECTOR = (2, 8, 6, 6), (2, 8, 6), (2, 8, 4, 4, 4), (2, 8)
SHUFFLE = ChannelOrder((1, 2, 3, 0, 5, 6, 7, 4))


class Own(nn.Module):
    """A function of the input and of parameters that it reads itself."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.own = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(self.own[i] for i in range(len(self.own))))


def traced(layer: Layer, shape: tuple[int, ...] = IMAGE) -> fx.GraphModule:
    module = layer if isinstance(layer, nn.Module) else Call(layer)
    return trace(filled(nn.Sequential(module)).double(), shape, to_train=True)  # which computes nothing beforehand


# ---- what a rule says, done ----------------------------------------------------------------------------------------


class Values(fx.Interpreter):
    """Keeps every value of a graph."""

    def __init__(self, graph: fx.GraphModule, seed: int) -> None:
        super().__init__(graph)
        self.kept: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(seeded_inputs(shape_of(next(iter(graph.graph.nodes))), seed=seed).double())

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.kept[n] = copied(value)  # a later operation may overwrite it
        return value

    def again(self, node: fx.Node, values: dict[fx.Node, Any], module: nn.Module | None) -> Any:
        """The value of ``node`` for other operands, and with another module."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copied(values.get(n, self.kept[n])))
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return (module if node.op == "call_module" else node.target)(*args, **kwargs)


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def random_order(width: int, groups: int = 1, sequence: Tensor | None = None) -> ChannelOrder:
    """Any order that keeps groups of channels together; ``sequence`` is the order of the groups."""
    sequence = torch.randperm(groups) if sequence is None else sequence
    inside = torch.stack([torch.randperm(width // groups) for _ in range(groups)])
    return ChannelOrder(tuple((inside + sequence[:, None] * (width // groups)).reshape(-1).tolist()))


def spread(order: ChannelOrder, repeat: int) -> ChannelOrder:
    return ChannelOrder(tuple(c * repeat + i for c in order for i in range(repeat)))


def along(value: Any, axis: int | None, order: ChannelOrder) -> Any:
    return value.index_select(axis, order.index)


def assert_rule_holds(graph: fx.GraphModule, node: fx.Node, seed: int = 0) -> None:
    """Reorder the operands as the rule of ``node`` allows; its value must be reordered as the rule says."""
    rules, axes = rules_of(graph)
    rule, values, given = rules[node], Values(graph, seed), called_module(graph, node)
    old: Any = values.kept[node]
    torch.manual_seed(seed)
    operands: dict[fx.Node, Any] = {}
    module, expected = given, old

    def width(operand: fx.Node) -> int:
        return shape_of(operand)[axes[operand] or 0]

    def permute(operand: fx.Node, order: ChannelOrder) -> ChannelOrder:
        operands[operand] = along(values.kept[operand], axes[operand], order)
        return order

    if isinstance(rule, Through):
        order = random_order(width(rule.operands[0]), rule.groups)
        for operand in rule.operands:
            permute(operand, order)
        order = spread(order, rule.repeat)
        expected = along(old, rule.axis, order)
        module = reordered(given, None, order) if rule.carries else given
    elif isinstance(rule, Mixes):
        before, after = permute(rule.operand, random_order(width(rule.operand))), random_order(width(node))
        module, expected = reordered(given, before, after), along(old, rule.axis, after)
    elif isinstance(rule, Groups):
        sequence = torch.randperm(rule.groups)
        before = permute(rule.operand, random_order(width(rule.operand), rule.groups, sequence))
        after = random_order(width(node), rule.groups, sequence)
        assert most_groups(rule.groups, before, after) == rule.groups
        module = regrouped(given, before, after, rule.groups)
        expected = along(old, rule.axis, after)
    elif isinstance(rule, Joins):
        orders = {operand: permute(operand, random_order(width(operand))) for operand in rule.operands}
        at, joined = 0, []
        for operand in rule.operands:
            joined += [at + channel for channel in orders[operand]]
            at += width(operand)
        expected = along(old, rule.axis, ChannelOrder(tuple(joined)))
    elif isinstance(rule, Splits):
        parts = [random_order(size) for size in rule.sizes]
        starts = [sum(rule.sizes[:i]) for i in range(len(parts))]
        permute(rule.operand, ChannelOrder(tuple(s + c for s, part in zip(starts, parts, strict=True) for c in part)))
        expected = tuple(along(value, rule.axis, part) for value, part in zip(old, parts, strict=True))
    elif isinstance(rule, Takes):
        split = rules[rule.operand]
        source = split.operand if isinstance(split, Splits) else rule.operand
        inside, rest = random_order(rule.stop - rule.start), [*range(rule.start), *range(rule.stop, width(source))]
        rest = [rest[i] for i in random_order(len(rest))]
        taken = [rule.start + channel for channel in inside]
        permute(source, ChannelOrder((*rest[: rule.start], *taken, *rest[rule.start :])))
        if isinstance(split, Splits):
            operands[rule.operand] = values.again(rule.operand, operands, None)
        expected = along(old, rule.axis, inside)
    elif isinstance(rule, Shuffles):
        expected = along(values.kept[rule.operand], rule.axis, rule.order)
    elif isinstance(rule, Reads):
        for operand in node.all_input_nodes:
            if axes[operand] is not None:
                permute(operand, random_order(width(operand)))
    else:
        raise AssertionError(f"{node.name} has no rule: {rule}")
    assert axes[node] == (None if isinstance(rule, Reads | Splits) else rule.axis)
    with torch.no_grad():
        new = values.again(node, operands, module)
    if isinstance(rule, Reads) and not isinstance(old, Tensor):
        assert new == expected
    else:
        torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)


def last(graph: fx.GraphModule) -> fx.Node:
    """The node before the output."""
    return list(graph.graph.nodes)[-2]


def last_rule(graph: fx.GraphModule) -> Rule:
    return rules_of(graph)[0][last(graph)]


# ---- channels go through -------------------------------------------------------------------------------------------

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Sigmoid, nn.LogSigmoid, nn.Tanh),
    *(nn.Softsign, nn.Tanhshrink, nn.Identity, nn.PReLU),
    *(nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_POINTWISE = (
    *("abs", "clamp", "clip", "exp", "log", "neg", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sqrt", "square"),
    *("tanh", "sin", "cos", "erf", "floor", "ceil", "sign", "trunc", "exp2", "expm1", "log1p", "log2", "log10", "atan"),
)
_ARITHMETIC = ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "pow", "maximum", "minimum")
_FUNCTIONALS = (
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "hardswish"),
    *("hardsigmoid", "hardtanh", "logsigmoid", "softsign", "normalize", "hardshrink", "softshrink", "tanhshrink"),
    *("rrelu", "elu_", "celu_", "selu_", "leaky_relu_", "hardtanh_", "rrelu_"),
)
_DROPS = ("dropout", "dropout2d", "dropout3d")
_REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp")
_CLAMPED = {"clamp": {"min": -1, "max": 1}, "clip": {"min": -1, "max": 1}}


def function(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    return Call(lambda x: target(x, *args, **kwargs))


def method(name: str, *args: Any, **kwargs: Any) -> Call:
    return Call(lambda x: getattr(x, name)(*args, **kwargs))


def positive(layer: Call) -> nn.Module:
    """``layer`` on numbers between 1 and 2, for roots, logarithms and powers."""
    return nn.Sequential(nn.Sigmoid(), Call(lambda x: x + 1), layer)


def last_channels(layer: Layer) -> nn.Module:
    """``layer`` on [N, H, W, C]."""
    return nn.Sequential(Call(lambda x: x.permute(0, 2, 3, 1)), layer if isinstance(layer, nn.Module) else Call(layer))


def vectors(layer: Layer) -> nn.Module:
    """``layer`` on [N, C]."""
    return nn.Sequential(Call(lambda x: x.mean((2, 3))), layer if isinstance(layer, nn.Module) else Call(layer))


def with_half(function: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """A function of a tensor and of one that goes its own way."""
    return Call(lambda x: function(x, torch.sigmoid(x)))


def binary(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(torch, name)(x, torch.sigmoid(x))


THROUGH: dict[str, tuple[Layer, tuple[int, ...]]] = {
    **{kind.__name__: (kind(), IMAGE) for kind in _ACTIVATIONS},
    "Dropout1d": (nn.Dropout1d(), SIGNAL),
    "Threshold": (nn.Threshold(0.1, 3.0), IMAGE),
    **{f"torch.{n}": (positive(function(getattr(torch, n), **_CLAMPED.get(n, {}))), IMAGE) for n in _POINTWISE},
    **{
        f"torch.{n}_": (positive(function(getattr(torch, f"{n}_"), **_CLAMPED.get(n, {}))), IMAGE)
        for n in _POINTWISE
        if hasattr(torch, f"{n}_")
    },
    **{f".{n}()": (positive(method(n, **_CLAMPED.get(n, {}))), IMAGE) for n in _POINTWISE},
    **{f".{n}_()": (positive(method(f"{n}_", **_CLAMPED.get(n, {}))), IMAGE) for n in _POINTWISE},
    **{f"functional.{n}": (function(getattr(functional, n)), IMAGE) for n in _FUNCTIONALS},
    **{f"functional.{n}": (function(getattr(functional, n), training=False), IMAGE) for n in _DROPS},
    "torch.dropout": (function(torch.dropout, 0.5, False), IMAGE),
    "stochastic depth": (torchvision.ops.StochasticDepth(0.5, "row"), IMAGE),
    **{f"torch.{n} of two": (with_half(getattr(torch, n)), IMAGE) for n in ("max", "min")},
    **{f".{n}() of two": (Call(lambda x, n=n: getattr(x, n)(x.sigmoid())), IMAGE) for n in ("max", "min")},
    "expanded as": (lambda x: x.mean((2, 3), keepdim=True).expand_as(x), IMAGE),
    "- x": (lambda x: -x, IMAGE),
    "clone": (torch.clone, IMAGE),
    **{f".{n}()": (method(n), IMAGE) for n in ("contiguous", "clone", "detach", "double")},
    **{f".{n}()": (method(n), IMAGE) for n in ("float", "half", "bfloat16")},
    ".to()": (method("to", torch.float64), IMAGE),
    "normalize over positions": (function(functional.normalize, dim=2), IMAGE),
    "relu by keyword": (lambda x: functional.relu(input=x), IMAGE),
    # pooling, resizing and padding
    **{
        f"{kind}{n}d": (getattr(nn, f"{kind}{n}d")(2), (2, 8, *(6,) * n))
        for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
        for n in (1, 2, 3)
    },
    "LPPool1d": (nn.LPPool1d(2, 3), SIGNAL),
    "LPPool2d": (nn.LPPool2d(2, 3), IMAGE),
    **{
        f"{kind}{n}d": (function(getattr(functional, f"{kind}{n}d"), 2), (2, 8, *(6,) * n))
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
        for n in (1, 2, 3)
    },
    "Upsample": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "Upsample of a signal": (nn.Upsample(scale_factor=2), SIGNAL),
    "UpsamplingNearest2d": (nn.UpsamplingNearest2d(scale_factor=2), IMAGE),
    "UpsamplingBilinear2d": (nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
    "interpolate": (lambda x: functional.interpolate(x, size=x.shape[2:]), IMAGE),
    "interpolate a volume": (function(functional.interpolate, scale_factor=2), VOLUME),
    **{
        f"{kind}{n}d": (getattr(nn, f"{kind}{n}d")(1, *more), (2, 8, *(6,) * n))
        for kind, more in (
            *(("ZeroPad", ()), ("ConstantPad", (2.0,)), ("ReflectionPad", ())),
            *(("ReplicationPad", ()), ("CircularPad", ())),
        )
        for n in (1, 2, 3)
    },
    "pad": (function(functional.pad, (1, 2, 0, 1)), IMAGE),
    "pad a signal": (function(functional.pad, [1, 2], mode="reflect"), SIGNAL),
    "pad rows behind permute": (nn.Sequential(method("transpose", 1, 2), function(functional.pad, (0, 1))), IMAGE),
    # normalisation
    **{f"BatchNorm{n}d": (getattr(nn, f"BatchNorm{n}d")(8), (2, 8, *(4,) * n)) for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": (getattr(nn, f"InstanceNorm{n}d")(8), (2, 8, *(4,) * n)) for n in (1, 2, 3)},
    "BatchNorm1d of vectors": (nn.BatchNorm1d(8), VECTOR),
    "InstanceNorm with everything": (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), IMAGE),
    **{f"GroupNorm of {n}": (nn.GroupNorm(n, 8), IMAGE) for n in (1, 2, 4, 8)},
    "GroupNorm of vectors": (nn.GroupNorm(4, 8, affine=False), VECTOR),
    "LayerNorm, channels last": (last_channels(nn.LayerNorm(8)), IMAGE),
    "LayerNorm of vectors": (vectors(nn.LayerNorm(8)), IMAGE),
    "LayerNorm of all": (nn.LayerNorm([8, 6, 6]), IMAGE),
    "LayerNorm of rows": (nn.LayerNorm(6), IMAGE),
    "LayerNorm without weights": (last_channels(nn.LayerNorm(8, elementwise_affine=False)), IMAGE),
    "layer_norm": (last_channels(Own(lambda x, w, b: functional.layer_norm(x, (8,), w, b), (8,), (8,))), IMAGE),
    "layer_norm of all": (Own(lambda x, w: functional.layer_norm(x, [8, 6, 6], weight=w), (8, 6, 6)), IMAGE),
    "layer_norm of rows and channels": (
        nn.Sequential(method("transpose", 1, 2), Own(lambda x, w: functional.layer_norm(x, [6, 8, 6], w), (6, 8, 6))),
        IMAGE,
    ),
    "layer_norm of rows": (Own(lambda x, w: functional.layer_norm(x, [6], w), (6,)), IMAGE),
    "layer_norm of the last axis": (function(functional.layer_norm, (6,)), IMAGE),
    **{f"Softmax over {dim}": (nn.Softmax(dim), IMAGE) for dim in (1, 2, 3, -1, -3)},
    "Softmax, channels last": (last_channels(nn.Softmax(-1)), IMAGE),
    "LogSoftmax": (nn.LogSoftmax(1), IMAGE),
    "Softmin": (nn.Softmin(1), VECTOR),
    "Softmax2d": (nn.Softmax2d(), IMAGE),
    "functional.softmax": (function(functional.softmax, dim=1), IMAGE),
    "functional.log_softmax": (function(functional.log_softmax, 1), IMAGE),
    "torch.softmax": (function(torch.softmax, 1), IMAGE),
    "torch.log_softmax": (function(torch.log_softmax, dim=2), IMAGE),
    ".softmax()": (method("softmax", -1), IMAGE),
    ".log_softmax()": (method("log_softmax", 1), IMAGE),
    "PReLU of channels": (nn.PReLU(8), IMAGE),
    "PReLU of vectors": (nn.PReLU(8), VECTOR),
    # arithmetic
    **{f"operator.{n}": (with_half(getattr(operator, n)), IMAGE) for n in ("add", "sub", "mul", "truediv")},
    "operator.pow": (positive(with_half(operator.pow)), IMAGE),
    **{f"operator.i{n}": (with_half(getattr(operator, f"i{n}")), IMAGE) for n in ("add", "sub", "mul", "truediv")},
    **{f"torch.{n}": (positive(with_half(getattr(torch, n))), IMAGE) for n in _ARITHMETIC},
    **{f".{n}(y)": (positive(with_half(lambda x, y, n=n: getattr(x, n)(y))), IMAGE) for n in _ARITHMETIC},
    **{
        f".{n}_(y)": (positive(with_half(lambda x, y, n=n: getattr(x, f"{n}_")(y))), IMAGE)
        for n in _ARITHMETIC
        if n not in ("maximum", "minimum")
    },
    "add a number": (lambda x: 1 + x, IMAGE),
    "add to itself": (lambda x: torch.add(x, x, alpha=2), IMAGE),
    "where": (lambda x: torch.where(torch.tensor([True, False]).repeat(3), x, torch.sigmoid(x)), IMAGE),
    "where by channel": (lambda x: torch.where(torch.arange(8).view(8, 1, 1) < 3, x, torch.sigmoid(x)), IMAGE),
    "lerp": (lambda x: torch.lerp(x, torch.sigmoid(x), 0.3), IMAGE),
    "addcmul": (lambda x: torch.addcmul(x, torch.sigmoid(x), torch.tanh(x), value=2), IMAGE),
    "clamp by channel": (Own(lambda x, low, high: torch.clamp(x, low, high), (8, 1, 1), (1, 8, 1, 1)), IMAGE),
    "clamp by channel, a method": (Own(lambda x, low: x.clamp(min=low), (8, 6, 6)), IMAGE),
    "times one map": (lambda x: x * x.mean(1, keepdim=True), IMAGE),
    "times a number for each channel": (lambda x: x * x.mean((2, 3), keepdim=True), IMAGE),
    "times one image": (Own(lambda x, s: x * s, (6, 6)), IMAGE),
    "vectors times vectors": (lambda x: x.mean((2, 3)) * x.amax((2, 3)), IMAGE),
    "scale of [C, 1, 1]": (Scale(8, 1, 1), IMAGE),
    "scale of [1, C, 1, 1]": (Scale(1, 8, 1, 1), IMAGE),
    "scale of [C, H, W]": (Scale(8, 6, 6), IMAGE),
    "scale of [C], channels last": (last_channels(Scale(8)), IMAGE),
    "scale of [W]": (Scale(6), IMAGE),
    "scale of one": (Scale(1), IMAGE),
    "scale of vectors": (Scale(8), VECTOR),
    # shapes
    "flatten a vector": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGE),
    "flatten an image": (nn.Flatten(), IMAGE),
    "flatten positions": (method("flatten", 2), IMAGE),
    "flatten rows into channels": (method("flatten", 1, 2), IMAGE),
    "torch.flatten": (function(torch.flatten, 1), VOLUME),
    "view with the batch's size": (lambda x: x.view(x.size(0), -1), IMAGE),
    "view with its shape": (lambda x: x.view(x.shape[0], x.shape[1], -1), IMAGE),
    "reshape": (method("reshape", 2, 8, 36), IMAGE),
    "torch.reshape": (function(torch.reshape, (2, 8, 3, 12)), IMAGE),
    "reshape, channels last": (last_channels(method("reshape", 2, 36, 8)), IMAGE),
    "Unflatten": (nn.Unflatten(2, (2, 3)), IMAGE),
    "torch.unflatten": (function(torch.unflatten, 3, (3, 2)), IMAGE),
    ".unflatten()": (method("unflatten", -1, (3, 2)), IMAGE),
    "squeeze": (lambda x: x.mean((2, 3), keepdim=True).squeeze(3).squeeze(), IMAGE),
    "torch.squeeze": (lambda x: torch.squeeze(x.mean((2, 3), keepdim=True), -1), IMAGE),
    "unsqueeze": (lambda x: x.unsqueeze(1), IMAGE),
    "torch.unsqueeze": (lambda x: torch.unsqueeze(x.mean((2, 3)), -1), IMAGE),
    "permute": (method("permute", 0, 2, 3, 1), IMAGE),
    "torch.permute": (function(torch.permute, (0, -3, 3, 2)), IMAGE),
    "transpose": (method("transpose", 1, 2), IMAGE),
    "torch.transpose": (function(torch.transpose, -1, 1), IMAGE),
    "swapaxes": (method("swapaxes", 2, 3), IMAGE),
    "torch.swapaxes": (function(torch.swapaxes, 1, 3), IMAGE),
    **{f"torch.{n} over positions": (function(getattr(torch, n), (2, 3)), IMAGE) for n in _REDUCTIONS if n != "prod"},
    **{f".{n} over rows": (method(n, 2, keepdim=True), IMAGE) for n in _REDUCTIONS},
    "torch.prod over rows": (function(torch.prod, -2), IMAGE),
    "mean of columns behind permute": (last_channels(method("mean", (1, 2))), IMAGE),
    "mean by keyword": (lambda x: torch.mean(x, dim=[-1, -2], keepdim=True), IMAGE),
    "mean by numpy's keyword": (lambda x: x.mean(axis=(2, 3)), IMAGE),
    "norm of positions": (lambda x: torch.linalg.vector_norm(x, 2, (2, 3), True), IMAGE),
    "norm behind permute": (last_channels(method("norm", p=2, dim=(1, 2), keepdim=True)), IMAGE),
    "stack": (lambda x: torch.stack([x, torch.tanh(x)], 1), IMAGE),
    "stack behind the channels": (lambda x: torch.stack((x, x), dim=-1), IMAGE),
    "stack of sums": (lambda x: torch.stack([x, torch.tanh(x), x.abs()]).sum(dim=0), IMAGE),
    "cat of positions": (lambda x: torch.cat([x, torch.tanh(x), x], 3), IMAGE),
    "cat of images": (lambda x: torch.cat([x, torch.tanh(x)]), IMAGE),
    "slice of positions": (lambda x: x[:, :, 1:, ::2], IMAGE),
    "slice behind an ellipsis": (lambda x: x[..., 1:], IMAGE),
    "one row": (lambda x: x[:, :, 0], IMAGE),
    "one position": (lambda x: x[:, :, 0, -1], IMAGE),
    "a row, channels last": (last_channels(lambda x: x[:, 0]), IMAGE),
    "slice of images": (lambda x: x[:1], IMAGE),
    "new dimensions": (lambda x: x.mean((2, 3))[:, :, None, None], IMAGE),
    "new dimensions behind an ellipsis": (lambda x: x[:, None, ..., :3, None], IMAGE),
    "narrow of rows": (method("narrow", 2, 1, 3), IMAGE),
    # layers with a channel each
    "depthwise": (depthwise(8), IMAGE),
    "depthwise, 1-D": (nn.Conv1d(8, 8, 3, groups=8), SIGNAL),
    "depthwise, 3-D": (nn.Conv3d(8, 8, 3, groups=8), VOLUME),
    "depthwise, transposed": (nn.ConvTranspose2d(8, 8, 3, groups=8), IMAGE),
}


def checked(graph: fx.GraphModule, seeds: int = 2) -> Rule:
    """The rule of the last node, after it was found to hold."""
    for seed in range(seeds):
        assert_rule_holds(graph, last(graph), seed)
    return last_rule(graph)


@pytest.mark.parametrize("name", THROUGH)
def test_channels_go_through(name):
    assert isinstance(checked(traced(*THROUGH[name])), Through)


CARRIES = [
    nn.BatchNorm2d(8),
    nn.InstanceNorm2d(8),
    nn.GroupNorm(2, 8),
    nn.LayerNorm([8, 6, 6]),
    nn.PReLU(8),
    depthwise(8),
]


@pytest.mark.parametrize("layer", CARRIES, ids=lambda layer: type(layer).__name__)
def test_per_channel_tensors_are_carried(layer):
    graph = traced(layer)
    groups = 2 if isinstance(layer, nn.GroupNorm) else 1
    assert last_rule(graph) == Through((next(iter(graph.graph.nodes)),), carries=True, groups=groups)


@pytest.mark.parametrize("layer", [nn.PReLU(), nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False)])
def test_what_is_the_same_for_every_channel_is_not_carried(layer):
    rule = last_rule(traced(layer))
    assert isinstance(rule, Through) and not rule.carries


def test_a_broadcast_channel_is_no_operand():
    rule = last_rule(traced(lambda x: x * x.mean(1, keepdim=True)))
    assert [operand.op for operand in rule.operands] == ["placeholder"]


def test_a_constant_has_its_channels_where_its_reader_expects_them():
    for layer, shape, axis in (
        *((Scale(8, 1, 1), IMAGE, 0), (Scale(1, 8, 1, 1), IMAGE, 1), (Scale(8), VECTOR, 0)),
        *((Scale(6), IMAGE, None), (Scale(1), IMAGE, None), (last_channels(Scale(8)), IMAGE, 0)),
    ):
        rules, axes = rules_of(traced(layer, shape))
        ((node, rule),) = ((node, rule) for node, rule in rules.items() if node.op == "get_attr")
        assert (rule, axes[node]) == (Constant(axis), axis)


# ---- weights, parts, shuffles ------------------------------------------------------------------------------------

MIXES: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "1-D": (nn.Conv1d(8, 4, 3), SIGNAL),
    "2-D": (nn.Conv2d(8, 12, 3, stride=2, padding=1), IMAGE),
    "3-D": (nn.Conv3d(8, 4, 3), VOLUME),
    "to one channel": (nn.Conv2d(8, 1, 1), IMAGE),
    "circular": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), IMAGE),
    "transposed, 1-D": (nn.ConvTranspose1d(8, 4, 3), SIGNAL),
    "transposed, 2-D": (nn.ConvTranspose2d(8, 12, 3, 2, 1, 1), IMAGE),
    "transposed, 3-D": (nn.ConvTranspose3d(8, 4, 3), VOLUME),
    "linear": (nn.Linear(8, 4), VECTOR),
    "linear, channels last": (last_channels(nn.Linear(8, 12)), IMAGE),
    "linear behind flatten": (nn.Sequential(nn.Flatten(), nn.Linear(288, 4)), IMAGE),
}
GROUPS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "1-D": (nn.Conv1d(8, 4, 3, groups=4), SIGNAL),
    "2-D": (conv(8, 8, 3, groups=2), IMAGE),
    "3-D": (nn.Conv3d(8, 12, 3, groups=4), VOLUME),
    "depth multiplier": (conv(8, 16, 3, groups=8, bias=True), IMAGE),
    "fewer outputs": (conv(8, 4, groups=4), IMAGE),
}
JOINS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "cat": (lambda x: torch.cat([x, torch.tanh(x)], 1), IMAGE),
    "concat by keyword": (lambda x: torch.concat(tensors=(x, x.neg()), dim=1), IMAGE),
    "concatenate by NumPy's keyword": (lambda x: torch.concatenate([x.neg(), x, x.abs()], axis=1), IMAGE),
    "from behind": (lambda x: torch.cat((x[:, :3], x), -3), IMAGE),
    "channels last": (last_channels(lambda x: torch.cat([x, x.neg()], -1)), IMAGE),
    "the same twice": (lambda x: torch.cat([x, x], 1), IMAGE),
    "of one": (lambda x: torch.cat([x], 1), IMAGE),
}
SPLITS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "torch.chunk": (lambda x: torch.chunk(x, 2, 1)[1], IMAGE),
    "chunks of different size": (lambda x: x.chunk(3, dim=1)[2], IMAGE),
    "chunk by keyword": (lambda x: x.chunk(chunks=4, dim=-3)[-1], IMAGE),
    "torch.split": (lambda x: torch.split(x, 3, 1)[0], IMAGE),
    "split by sizes": (lambda x: x.split([1, 5, 2], dim=1)[1], IMAGE),
    "torch.split by keyword": (lambda x: torch.split(x, split_size_or_sections=4, dim=1)[1], IMAGE),
    "split by keyword": (lambda x: x.split(split_size=4, dim=1)[1], IMAGE),
    "channels last": (last_channels(lambda x: x.split(2, -1)[3]), IMAGE),
}
TAKES: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "slice": (lambda x: x[:, 2:5], IMAGE),
    "slice from behind": (lambda x: x[:, -3:], IMAGE),
    "one channel by slice": (lambda x: x[:, :1], IMAGE),
    "slice and positions": (lambda x: x[:, 1:3, 0, ::2], IMAGE),
    "slice with a new dimension": (lambda x: x[:, None, 1:3], IMAGE),
    "slice behind an ellipsis": (last_channels(lambda x: x[..., 4:]), IMAGE),
    "torch.narrow": (lambda x: torch.narrow(x, 1, 2, 3), IMAGE),
    "narrow by keyword": (lambda x: x.narrow(dim=1, start=-3, length=2), IMAGE),
}


@pytest.mark.parametrize("name", MIXES)
def test_weights_mix(name):
    assert isinstance(checked(traced(*MIXES[name])), Mixes)


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_weights_connect_runs(name):
    assert isinstance(checked(traced(*GROUPS[name]), 4), Groups)


@pytest.mark.parametrize("name", JOINS)
def test_concatenation_joins(name):
    assert isinstance(checked(traced(*JOINS[name])), Joins)


@pytest.mark.parametrize("name", SPLITS)
def test_splitting_splits_and_takes(name):
    graph = traced(*SPLITS[name])
    assert isinstance(checked(graph), Takes)
    node = last(graph).all_input_nodes[0]
    rule = rules_of(graph)[0][node]
    assert isinstance(rule, Splits) and sum(rule.sizes) == 8
    assert_rule_holds(graph, node)


@pytest.mark.parametrize("name", TAKES)
def test_slices_take(name):
    assert isinstance(checked(traced(*TAKES[name])), Takes)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_shuffle_shuffles(dim):
    graph = traced(nn.Sequential(Call(lambda x: x.transpose(1, dim)), Leaf()) if dim > 1 else Leaf())
    node = last(graph)
    graph.add_submodule(str(node.target), ChannelShuffle(SHUFFLE, "layer", dim))
    assert checked(graph) == Shuffles(node.all_input_nodes[0], SHUFFLE, dim)


READS: dict[str, Layer] = {
    "activation of sums": lambda x: torch.relu(x.mean((0, 1, 2))),
    **{f"torch.{name} over channels": function(getattr(torch, name), 1) for name in _REDUCTIONS},
    "mean over channels and positions": method("mean", (-3, 2), keepdim=True),
    "norm over channels": lambda x: torch.norm(x, 2, 1),
    "norm over everything": method("norm"),
    "mean over everything": lambda x: x.mean(),
    "sum over everything": lambda x: torch.sum(x, dim=None),
    "size": lambda x: x.size(),
    "size of a dimension": lambda x: x.size(1),
    "dim": lambda x: x.dim(),
    "ndimension": lambda x: x.ndimension(),
    "numel": lambda x: x.numel(),
    "shape": lambda x: x.shape,
    "dtype": lambda x: x.dtype,
    "a number of sizes": lambda x: x.shape[1] // 2,
}


@pytest.mark.parametrize("name", READS)
def test_sums_and_shapes_read(name):
    graph = traced(READS[name])
    assert checked(graph) == Reads()


# ---- barriers ----------------------------------------------------------------------------------------------------


class Computed(nn.Module):
    """A convolution whose kernel the network computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, 2 * self.weight)


class Attention(nn.Module):
    """Over the positions, in torch's own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


def one_image(layer: Layer) -> nn.Module:
    """``layer`` on a tensor of three dimensions, [N, C, H], which torch may take for one image [C, H, W]."""
    return nn.Sequential(Call(lambda x: x.mean(3)), layer if isinstance(layer, nn.Module) else Call(layer))


BARRIERS: dict[str, tuple[Layer, str]] = {
    "max along an axis": (lambda x: x.max(1, keepdim=True)[0], "no rule for call_method max"),
    # nothing that is known
    "learned layer": (learned(8, 8, (1, 0, 1)), "no rule for DGConv2d (0)"),
    "leaf": (Leaf(), "no rule for Leaf (0)"),
    "subclass": (type("MyReLU", (nn.ReLU,), {"__module__": "torch.nn.mine"})(), "no rule for MyReLU (0)"),
    "attention": (Attention(), "no rule for MultiheadAttention (0.attention)"),
    "pixel shuffle": (nn.PixelShuffle(2), "no rule for PixelShuffle (0)"),
    "local response norm": (nn.LocalResponseNorm(3), "no rule for LocalResponseNorm (0)"),
    "channel shuffle of torch's": (nn.ChannelShuffle(2), "no rule for ChannelShuffle (0)"),
    "flatten of images": (nn.Flatten(0), "_0 reshapes a tensor without channels, or its batch"),
    "cumulative sum": (lambda x: torch.cumsum(x, 1), "no rule for call_function cumsum"),
    "unknown method": (lambda x: x.flip(1), "no rule for call_method flip"),
    "index_select": (lambda x: x.index_select(1, torch.tensor([1, 0])), "no rule for call_method index_select"),
    "stack of other axes": (
        lambda x: torch.stack([x[:, :6], x[:, :6].transpose(1, 2)], 1),
        "stack joins tensors with channels on different axes",
    ),
    "stack along an axis of the moment": (
        lambda x: torch.stack([x, x], x.shape[0]),
        "stack joins tensors with channels on different axes",
    ),
    "roll": (lambda x: torch.roll(x, 1, 1), "no rule for call_function roll"),
    "matmul": (lambda x: torch.matmul(x, x.transpose(2, 3)), "no rule for call_function matmul"),
    "operator of matmul": (lambda x: x @ x, "no rule for call_function matmul"),
    "computed kernel": (Computed(), "no rule for call_function conv2d"),
    "greatest with its place": (lambda x: torch.max(x, 1), "no rule for call_function max"),
    "attribute": (lambda x: x.mT, "reads an attribute that has no rule"),
    "from nothing": (Own(lambda x, s: s.expand(8), ()), "expand makes a tensor from none"),
    "a parameter by itself": (Own(lambda x, s: s.exp(), (8,)), "exp has no operand with channels"),
    # layers
    "grouped transposed convolution": (
        nn.ConvTranspose2d(8, 8, 1, groups=2),
        "0 is transposed and has 2 groups of fixed channels",
    ),
    "convolution of one image": (one_image(conv(2, 4)), "0.1 reads a tensor that is not [N, C] and 2 more"),
    "linear over the width": (nn.Linear(6, 6), "0 is linear over an axis other than the channels"),
    "instance norm of one image": (one_image(nn.InstanceNorm2d(2)), "0.1 works on dimension 1, which is not the"),
    "group norm of rows": (
        nn.Sequential(method("transpose", 1, 2), nn.GroupNorm(2, 6)),
        "0.1 works on dimension 1, which is not the channels",
    ),
    "PReLU of rows": (
        nn.Sequential(method("transpose", 1, 2), nn.PReLU(6)),
        "0.1 works on dimension 1, which is not the channels",
    ),
    "layer norm of more than the channels": (
        nn.Sequential(method("transpose", 1, 2), nn.LayerNorm([6, 8, 6])),
        "0.1 normalises over dimensions before the channels too",
    ),
    "layer_norm of dimensions of the moment": (
        Own(lambda x, w: functional.layer_norm(x, x.shape[1:], w), (8, 6, 6)),
        "layer_norm normalises over dimensions that are not fixed",
    ),
    "layer_norm by computed weights": (
        Own(lambda x, w: functional.layer_norm(x, (8, 6, 6), 2 * w), (8, 6, 6)),
        "layer_norm has weights that are computed",
    ),
    # pooling and padding
    "pooling of one image": (one_image(function(functional.max_pool2d, 2, 1)), "pools a tensor that is not [N, C] and"),
    "pooling layer of one image": (one_image(nn.AdaptiveAvgPool2d(8)), "pools a tensor that is not [N, C] and 2 more"),
    "pooling of rows": (
        nn.Sequential(method("transpose", 1, 2), nn.MaxPool2d(2)),
        "works on dimension 1, which is not the channels",
    ),
    "pooling with indices": (nn.MaxPool2d(2, return_indices=True), "pools a tensor that is not [N, C] and 2 more"),
    "interpolation of rows": (
        nn.Sequential(method("transpose", 1, 2), nn.Upsample(scale_factor=2)),
        "works on dimension 1, which is not the channels",
    ),
    "padding of channels": (function(functional.pad, (0, 0, 0, 0, 1, 1)), "pad pads the channels"),
    "padding, channels last": (last_channels(function(functional.pad, (1, 0))), "pad pads the channels"),
    "padding of the moment": (
        lambda x: functional.pad(x, (0, 8 - x.shape[3])),
        "pad pads in a way that is not fixed",
    ),
    # training
    "dropout in training": (function(functional.dropout), "dropout is in training mode"),
    "dropout2d in training": (function(functional.dropout2d, 0.5, True), "dropout2d is in training mode"),
    "torch's dropout in training": (function(torch.dropout, 0.5, train=True), "dropout is in training mode"),
    # shapes
    "taken apart": (lambda x: x.view(2, 2, 4, 6, 6), "view takes the channels apart"),
    "Unflatten of channels": (nn.Unflatten(1, (2, 4)), "takes the channels apart"),
    "flatten of everything": (lambda x: x.flatten(), "flatten reshapes a tensor without channels, or its batch"),
    "images among positions": (
        last_channels(lambda x: x.reshape(-1, 8)),
        "reshape reshapes a tensor without channels, or its batch",
    ),
    "columns into channels": (last_channels(lambda x: x.flatten(2)), "flatten takes the channels apart"),
    "permute to the batch's place": (method("permute", 1, 0, 2, 3), "permute moves the channels to the batch's place"),
    "transpose of the moment": (
        lambda x: x.transpose(1, x.dim() - 1),
        "transpose swaps dimensions that are not fixed",
    ),
    "permute of sums": (
        nn.Sequential(method("sum", 1), method("permute", 0, 2, 1)),
        "permute moves dimensions of a tensor without channels",
    ),
    "mean over an axis of the moment": (
        lambda x: x.mean((2, x.dim() - 3)),
        "mean reduces dimensions that are not fixed",
    ),
    # parts
    "every second channel": (lambda x: x[:, ::2], "takes every 2th channel"),
    "a single channel": (lambda x: x[:, 3], "takes a single channel"),
    "no channel": (lambda x: x[:, 5:3], "it takes no channel"),
    "one image": (lambda x: x[0], "takes one image, or puts a dimension before the batch's"),
    "a dimension before the batch": (lambda x: x[None], "takes one image, or puts a dimension before the batch's"),
    "channels by list": (lambda x: x[:, [1, 0]], "takes parts in a way that has no rule"),
    "channels of the moment": (lambda x: x[:, : x.shape[2]], "takes a part that is not fixed"),
    "some parts": (lambda x: x.chunk(4, 1)[1:][0], "takes a part that is not fixed"),
    "split of positions": (lambda x: x.chunk(2, 2)[0], "chunk splits a dimension other than the channels"),
    "split by a size of the moment": (lambda x: x.split(x.size(1) // 2, 1)[0], "splits in a way that is not fixed"),
    "split by sizes of the moment": (lambda x: x.split([x.size(2), 2], 1)[0], "splits in a way that is not fixed"),
    "split by a keyword of the moment": (
        lambda x: x.split(split_size=x.size(2), dim=1)[0],
        "in a way that is not fixed",
    ),
    "narrow to the moment": (lambda x: x.narrow(1, 0, x.size(2)), "narrow takes channels that are not fixed"),
    # operands
    "other channels": (lambda x: x * x.transpose(1, 2)[:, :, :6].mean(1, keepdim=True), "on different axes"),
    "no channels": (lambda x: x.sum(1) + 1, "add has no operand with channels"),
    "images as channels": (
        nn.Sequential(Call(lambda x: x[:, :2]), Call(lambda x: x + x.sum(1))),
        "whose order is fixed",
    ),
    "cat of sums": (
        lambda x: torch.cat([x, x.sum(1, keepdim=True)], 1),
        "joins tensors with channels on different axes",
    ),
    "cast like another": (lambda x: x.to(x.tanh()), "to reads tanh too"),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_what_no_rule_describes_is_a_barrier(name):
    layer, reason = BARRIERS[name]
    rule = last_rule(traced(layer))
    assert isinstance(rule, Barrier)
    assert reason in rule.reason


def test_inputs_and_outputs_are_barriers():
    graph = traced(nn.ReLU())
    first, *_, end = graph.graph.nodes
    rules, axes = rules_of(graph)
    assert (rules[first], rules[end]) == (Barrier("network input"), Barrier("network output"))
    assert axes[first] == 1


def test_every_rule_was_tried():
    """Each entry of both tables, by the node whose rule was checked or by its split."""
    tried: set[object] = set()
    for table in (
        THROUGH,
        MIXES,
        GROUPS,
        JOINS,
        SPLITS,
        TAKES,
        {name: (layer, IMAGE) for name, layer in READS.items()},
    ):
        for layer, shape in table.values():
            graph = traced(layer, shape)
            for node in (last(graph), *last(graph).all_input_nodes):
                module = called_module(graph, node)
                tried.add(node.target if module is None else type(module))
    assert set(MODULE_RULES) - tried == {ChannelShuffle}  # which is tried above
    assert not set(CALL_RULES) - tried


# ---- what serves two places --------------------------------------------------------------------------------------


def test_shared_modules_are_those_called_twice_or_tied_or_read():
    class ReadsIt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = conv(8, 8), conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.layer(x)) * self.layer.weight.sum()

    twice = trace(filled(nn.Sequential(conv(8, 8), Twice(conv(8, 8)))), IMAGE)
    assert shared_modules(twice) == {"1.layer"}
    assert shared_modules(trace(TiedWeights(), (2, 3, 6, 6))) == {"first", "second"}
    assert shared_modules(traced(ReadsIt())) == {"0.layer"}
    assert shared_modules(compiled_case("bottleneck").training) == set()


@pytest.mark.parametrize("layer", [conv(8, 8), nn.BatchNorm2d(8, affine=False), nn.PReLU(8), conv(8, 8, groups=2)])
def test_a_shared_module_whose_tensors_would_follow_is_a_barrier(layer):
    graph = traced(Twice(layer))
    rules, as_it_is = rules_of(graph)[0], rules_of(graph, to_change=False)[0]
    for node in (node for node in graph.graph.nodes if node.target == "0.layer"):
        assert rules[node] == Barrier("0.layer is used more than once")
        assert not isinstance(as_it_is[node], Barrier)


def test_a_shared_module_without_tensors_is_none():
    graph = traced(Twice(nn.ReLU()))
    rules, _ = rules_of(graph)
    assert all(isinstance(rules[node], Through) for node in graph.graph.nodes if node.target == "0.layer")


@pytest.mark.parametrize("layer", [conv(6, 4), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, groups=3)])
def test_what_a_layer_takes_for_channels_begins_before_it(layer):
    graph = traced(nn.Sequential(method("transpose", 1, 2), nn.ReLU(), layer))
    rules, axes = rules_of(graph)
    _, before, relu, *_ = graph.graph.nodes  # a pass may drop what keeps the shape, so they begin where it is made
    assert rules[before] == Barrier("transpose makes channels of something else")
    assert rules[relu] == Through((before,), 1)
    assert axes[before] == 1 and not isinstance(checked(graph), Barrier)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.unflatten(1, (2, 4)).amax(1),
        lambda x: torch.stack(x.chunk(2, 1), 1).sum(1).sigmoid(),
        lambda x: torch.stack([x[:, :4], x[:, 4:]]).mean(0),
        lambda x: functional.dropout(x.unflatten(1, (2, 4)).amax(1), training=False),
        lambda x: x.flatten(2).transpose(1, 2)[:, :4].unsqueeze(-1),
    ],
)
def test_networks_that_make_channels_of_something_else_are_compiled_and_proven(function):
    """As maxout, selective kernels and split attention do."""
    model = nn.Sequential(
        conv(3, 8), Call(function), learned(4, 8, (1, 0)), nn.BatchNorm2d(8), learned(8, 8, (0, 1, 0))
    )
    case = compiled(filled(model), (2, 3, 6, 6))
    assert certify(case.training, case.result.graph).holds
    assert_same_function(case.training, case.result.graph, (2, 3, 6, 6))


def test_a_parameter_that_is_read_along_two_axes_follows_neither():
    graph = traced(Own(lambda x, s: torch.relu(x + s).mean((2, 3)) * s, (8,)), (2, 8, 8, 8))
    (rule,) = (rule for node, rule in rules_of(graph)[0].items() if node.op == "get_attr")
    assert rule == Barrier("0.own.0 is read along several axes")


def test_a_parameter_has_one_order_for_all_its_readers():
    graph = traced(Own(lambda x, s: torch.tanh(x * s) * s, (8, 1, 1)))
    assert [rule for node, rule in rules_of(graph)[0].items() if node.op == "get_attr"] == [Constant(0)]
    assert isinstance(checked(graph), Through)
    graph = traced(Own(lambda x, s: (x * s).transpose(1, 2) * s, (8, 8, 1)), (2, 8, 8, 8))
    assert "has operands with channels on different axes" in rules_of(graph, to_change=False)[0][last(graph)].reason
    rules = {node.name: rule for node, rule in rules_of(graph)[0].items()}
    assert "has operands with channels on different axes" in rules["mul"].reason  # the parameter stays as it is
    assert isinstance(checked(graph), Through)


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale) * self.scale


def test_a_buffer_that_is_read_twice_is_a_barrier():
    graph = traced(ReadTwice())
    barriers = [rule for node, rule in rules_of(graph)[0].items() if node.op == "get_attr"]
    assert barriers == [Barrier("0.scale is used more than once")] * 2
    as_they_are = [rule for node, rule in rules_of(graph, to_change=False)[0].items() if node.op == "get_attr"]
    assert set(as_they_are) == {Constant(0)}


def test_a_parameter_of_a_layer_that_is_called_too_is_a_barrier():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(x).transpose(1, 3) * self.norm.weight).transpose(1, 3)

    graph = traced(Both())
    rules, _ = rules_of(graph)
    assert rules[node_of(graph, "0.norm")] == Barrier("0.norm is used more than once")
    assert rules[node_of(graph, "0.norm.weight")] == Barrier("0.norm.weight is used more than once")
