"""Activations in ONNX, for :mod:`foldgroup.emit.direct`: modules, functions and methods of single values."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from foldgroup.emit.direct.graph import Operation, Unfamiliar, Value, Writer


def _elementwise(kind: str, **attributes: Any) -> Operation:
    """One ONNX node of one operand; ``inplace`` makes no difference (see :mod:`foldgroup.purity`)."""

    def write(writer: Writer, node: fx.Node) -> Value:
        x, _ = writer.setting(node)
        if not x.dtype.is_floating_point:
            raise Unfamiliar(f"{node.name} may be of another type than what it reads")
        return writer.emit(node, kind, [x], **attributes)

    return write


def silu(writer: Writer, node: fx.Node) -> Value:
    """Every x times sigmoid(x)."""
    x, _ = writer.setting(node)
    return writer.emit(node, "Mul", [x, writer.emit(node, "Sigmoid", [x], last=False)])


def leaky_relu(writer: Writer, node: fx.Node) -> Value:
    """Negative values times a slope."""
    x, (slope,) = writer.setting(node, negative_slope=0.01)
    return writer.emit(node, "LeakyRelu", [x], alpha=float(slope))


def gelu(writer: Writer, node: fx.Node) -> Value:
    """By the error function, or approximately by tanh."""
    if node.op == "call_module":
        x, (approximate,) = writer.setting(node, approximate="none")
    else:
        given, approximate = writer.arguments(node, "input", approximate="none")
        x = writer.computed(node, given)
    if approximate not in ("none", "tanh"):
        raise Unfamiliar(f"{node.name} is approximated by {approximate!r}")
    return writer.emit(node, "Gelu", [x], approximate=approximate)


def elu(writer: Writer, node: fx.Node) -> Value:
    """Negative values by an exponential."""
    x, (alpha,) = writer.setting(node, alpha=1.0)
    return writer.emit(node, "Elu", [x], alpha=float(alpha))


def softplus(writer: Writer, node: fx.Node) -> Value:
    """The logarithm of 1 + exp(x); torch takes x for it from a threshold on, where float32 knows no difference."""
    x, (beta, threshold) = writer.setting(node, beta=1, threshold=20)
    if beta != 1 or threshold < 20:
        raise Unfamiliar(f"{node.name} is sharper or ends at {threshold}")
    return writer.emit(node, "Softplus", [x])


def relu6(writer: Writer, node: fx.Node) -> Value:
    """Between 0 and 6."""
    x, _ = writer.setting(node)
    return _clip(writer, node, x, 0, 6)


def hardtanh(writer: Writer, node: fx.Node) -> Value:
    """Between two numbers."""
    x, limits = writer.setting(node, min_val=-1.0, max_val=1.0)
    return _clip(writer, node, x, *limits)


def clamp(writer: Writer, node: fx.Node) -> Value:
    """Between two numbers of which either may be missing."""
    x, limits = writer.setting(node, min=None, max=None)
    return _clip(writer, node, x, *limits)


def _clip(writer: Writer, node: fx.Node, x: Value, *limits: Any) -> Value:
    if not all(limit is None or isinstance(limit, int | float) for limit in limits):
        raise Unfamiliar(f"{node.name} is clipped by what is computed")
    given = [None if limit is None else writer.constant(node, float(limit), x.dtype) for limit in limits]
    return writer.emit(node, "Clip", [x, *given])


def rsqrt(writer: Writer, node: fx.Node) -> Value:
    """One over the square root."""
    x, _ = writer.setting(node)
    return writer.emit(node, "Reciprocal", [writer.emit(node, "Sqrt", [x], last=False)])


ACTIVATIONS: dict[Any, Operation] = {
    **dict.fromkeys((nn.ReLU, functional.relu, torch.relu, torch.relu_, "relu", "relu_"), _elementwise("Relu")),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), _elementwise("Sigmoid")),
    **dict.fromkeys((nn.Tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), _elementwise("Tanh")),
    **dict.fromkeys((nn.Hardswish, functional.hardswish), _elementwise("HardSwish")),
    **dict.fromkeys((nn.Hardsigmoid, functional.hardsigmoid), _elementwise("HardSigmoid", alpha=1 / 6, beta=0.5)),
    nn.Mish: _elementwise("Mish"),
    **dict.fromkeys((nn.SiLU, functional.silu), silu),
    **dict.fromkeys((nn.LeakyReLU, functional.leaky_relu, functional.leaky_relu_), leaky_relu),
    **dict.fromkeys((nn.GELU, functional.gelu), gelu),
    **dict.fromkeys((nn.ReLU6, functional.relu6), relu6),
    **dict.fromkeys((nn.Hardtanh, functional.hardtanh, functional.hardtanh_), hardtanh),
    **dict.fromkeys((torch.clamp, torch.clamp_, "clamp", "clamp_"), clamp),
    **dict.fromkeys((nn.ELU, functional.elu, functional.elu_), elu),
    **dict.fromkeys((nn.Softplus, functional.softplus), softplus),
    **dict.fromkeys((torch.abs, "abs"), _elementwise("Abs")),
    **dict.fromkeys((torch.exp, "exp"), _elementwise("Exp")),
    **dict.fromkeys((torch.log, "log"), _elementwise("Log")),
    **dict.fromkeys((torch.sqrt, "sqrt"), _elementwise("Sqrt")),
    **dict.fromkeys((torch.rsqrt, "rsqrt"), rsqrt),
}
"""By exact class, function or method."""
