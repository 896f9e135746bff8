"""Activations in ONNX, for :mod:`foldgroup.emit.direct`: modules, functions and methods of single values."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from foldgroup.emit.onnx_graph import Operation, Unfamiliar, Value, Writer, bound
from foldgroup.trace import called_module


def _elementwise(kind: str, **attributes: Any) -> Operation:
    """One ONNX node of one operand; ``inplace`` makes no difference (see :mod:`foldgroup.purity`)."""

    def write(writer: Writer, node: fx.Node) -> Value:
        x, _ = _setting(writer, node)
        if not x.dtype.is_floating_point:
            raise Unfamiliar(f"{node.name} may be of another type than what it reads")
        return writer.emit(node, kind, [x], **attributes)

    return write


def _setting(writer: Writer, node: fx.Node, **defaults: Any) -> tuple[Value, list[Any]]:
    """What an activation reads, and its settings: a module's attributes or a function's arguments, named in order."""
    module: Any = called_module(writer.graph, node)
    if module is not None:
        return writer.only(node), [getattr(module, name) for name in defaults]
    given, *settings = bound(node, "input", **defaults, inplace=False)
    return writer.computed(node, given), settings[:-1]


def silu(writer: Writer, node: fx.Node) -> Value:
    """Every x times sigmoid(x)."""
    x, _ = _setting(writer, node)
    return writer.emit(node, "Mul", [x, writer.emit(node, "Sigmoid", [x], last=False)])


def leaky_relu(writer: Writer, node: fx.Node) -> Value:
    """Negative values times a slope."""
    x, (slope,) = _setting(writer, node, negative_slope=0.01)
    return writer.emit(node, "LeakyRelu", [x], alpha=float(slope))


def gelu(writer: Writer, node: fx.Node) -> Value:
    """By the error function, or approximately by tanh."""
    if node.op == "call_module":
        x, (approximate,) = _setting(writer, node, approximate="none")
    else:
        given, approximate = bound(node, "input", approximate="none")
        x = writer.computed(node, given)
    if approximate not in ("none", "tanh"):
        raise Unfamiliar(f"{node.name} is approximated by {approximate!r}")
    return writer.emit(node, "Gelu", [x], approximate=approximate)


def clip(writer: Writer, node: fx.Node) -> Value:
    """ReLU6 and Hardtanh."""
    module: Any = called_module(writer.graph, node)
    x, _ = _setting(writer, node)
    limits = (0, 6) if module is None else (module.min_val, module.max_val)
    return writer.emit(node, "Clip", [x, *(writer.constant(node, float(at), x.dtype) for at in limits)])


ACTIVATIONS: dict[Any, Operation] = {
    **dict.fromkeys((nn.ReLU, functional.relu, torch.relu, "relu"), _elementwise("Relu")),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, "sigmoid"), _elementwise("Sigmoid")),
    **dict.fromkeys((nn.Tanh, torch.tanh, "tanh"), _elementwise("Tanh")),
    **dict.fromkeys((nn.Hardswish, functional.hardswish), _elementwise("HardSwish")),
    **dict.fromkeys((nn.Hardsigmoid, functional.hardsigmoid), _elementwise("HardSigmoid", alpha=1 / 6, beta=0.5)),
    nn.Mish: _elementwise("Mish"),
    **dict.fromkeys((nn.SiLU, functional.silu), silu),
    **dict.fromkeys((nn.LeakyReLU, functional.leaky_relu), leaky_relu),
    **dict.fromkeys((nn.GELU, functional.gelu), gelu),
    **dict.fromkeys((nn.ReLU6, nn.Hardtanh, functional.relu6), clip),
}
"""By exact class, function or method."""
