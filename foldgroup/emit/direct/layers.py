"""Layers in ONNX, for :mod:`foldgroup.emit.direct`: what has weights, norms and pooling."""

from __future__ import annotations

from math import prod
from numbers import Integral
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.emit.direct.arithmetic import mean_over
from foldgroup.emit.direct.graph import Operation, Unfamiliar, Value, Writer
from foldgroup.emit.direct.layout import reshaped
from foldgroup.emit.direct.resizing import padded
from foldgroup.forms import CONVS, TRANSPOSED_CONVS
from foldgroup.trace import called_module, shape_of

# ---- weights -----------------------------------------------------------------------------------------------------


def convolution(writer: Writer, node: fx.Node) -> Value:
    """[N, C_in, …] → [N, C_out, …]. Padding with other than zeros is a node before it."""
    conv: Any = called_module(writer.graph, node)
    x, axes = writer.only(node), len(conv.kernel_size)
    kernel, dilation = tuple(conv.weight.shape[2:]), _each(conv.dilation, axes)
    if isinstance(conv.padding, str):
        both = [d * (k - 1) if conv.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        pads = [(total // 2, total - total // 2) for total in both]
    else:
        pads = [(n, n) for n in _each(conv.padding, axes)]
    if len(x.shape) != axes + 2:
        raise Unfamiliar(f"{node.target} is applied to {len(x.shape)} axes")
    if conv.padding_mode != "zeros":
        x = padded(writer, node, x, pads, conv.padding_mode, last=False, beside=True)
        pads = [(0, 0)] * axes
    attributes = _window(0, conv.stride, kernel, axes) | {"dilations": dilation}
    attributes["pads"] = [*(n for n, _ in pads), *(n for _, n in pads)]
    return writer.emit(node, "Conv", [x, *_weights(writer, node, x)], group=conv.groups, **attributes)


def transposed_convolution(writer: Writer, node: fx.Node) -> Value:
    """[N, C_in, …] → [N, C_out, …]."""
    conv: Any = called_module(writer.graph, node)
    x, axes = writer.only(node), len(conv.kernel_size)
    if len(x.shape) != axes + 2:
        raise Unfamiliar(f"{node.target} is applied to {len(x.shape)} axes")
    attributes = _window(conv.padding, conv.stride, conv.kernel_size, axes)
    attributes |= {"dilations": _each(conv.dilation, axes), "output_padding": _each(conv.output_padding, axes)}
    return writer.emit(node, "ConvTranspose", [x, *_weights(writer, node, x)], group=conv.groups, **attributes)


def linear(writer: Writer, node: fx.Node) -> Value:
    """[N, C_in] → [N, C_out]; of the last of more axes it is a product and, beside it, a sum."""
    module: Any = called_module(writer.graph, node)
    x = writer.only(node)
    if len(x.shape) == 2:
        scale: dict[str, Any] = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
        return writer.emit(node, "Gemm", [x, *_weights(writer, node, x)], **scale)
    weight, bias = _stored(writer, node, x, "weight", module.weight.T), _weights(writer, node, x, "bias")
    if not bias:
        return writer.emit(node, "MatMul", [x, weight])
    product = writer.emit(node, "MatMul", [x, weight], last=False, value="*.matmul")
    return writer.emit(node, "Add", [product, *bias], beside=True, value=product.name.removesuffix(".matmul"))


def prelu(writer: Writer, node: fx.Node) -> Value:
    """Negative values times a slope, or one for each channel."""
    module: Any = called_module(writer.graph, node)
    x = writer.only(node)
    slope = module.weight.reshape(1, -1, *[1] * (len(x.shape) - 2))
    return writer.emit(node, "PRelu", [x, _stored(writer, node, x, "weight", slope)])


def _weights(writer: Writer, node: fx.Node, x: Value, *names: str) -> list[Value]:
    """Those tensors of a module that there are, of the type of what it reads; by default its weight and bias."""
    module = called_module(writer.graph, node)
    tensors = {name: getattr(module, name) for name in names or ("weight", "bias")}
    return [_stored(writer, node, x, name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _stored(writer: Writer, node: fx.Node, x: Value, name: str, tensor: Tensor) -> Value:
    if tensor.dtype != x.dtype:
        raise Unfamiliar(f"{node.target} is in another type than what it reads")
    return writer.store(f"{node.target}.{name}", tensor)


# ---- norms -------------------------------------------------------------------------------------------------------


def batch_norm(writer: Writer, node: fx.Node) -> Value:
    """With the statistics that were kept."""
    norm: Any = called_module(writer.graph, node)
    x = writer.only(node)
    names = ("weight", "bias", "running_mean", "running_var")
    if any(getattr(norm, name) is None for name in (*names, "momentum")):
        raise Unfamiliar(f"{node.target} has no scale, no shift, no statistics or no momentum")
    numbers: dict[str, Any] = {"epsilon": float(norm.eps), "momentum": 1 - float(norm.momentum)}
    return writer.emit(node, "BatchNormalization", [x, *_weights(writer, node, x, *names)], **numbers)


def layer_norm(writer: Writer, node: fx.Node) -> Value:
    """Over the last axes."""
    norm: Any = called_module(writer.graph, node)
    x, axes = writer.only(node), len(norm.normalized_shape)
    if axes >= len(x.shape) or norm.weight is None:
        raise Unfamiliar(f"{node.target} normalises the batch or has no scale")
    how: dict[str, Any] = {"axis": -axes, "epsilon": float(norm.eps), "stash_type": 1}
    return writer.emit(node, "LayerNormalization", [x, *_weights(writer, node, x)], **how)


def group_norm(writer: Writer, node: fx.Node) -> Value:
    """A group is one channel of an instance norm; what follows scales and shifts the channels."""
    norm: Any = called_module(writer.graph, node)
    x, groups = writer.only(node), norm.num_groups
    affine = [(kind, name) for kind, name in (("Mul", "weight"), ("Add", "bias")) if getattr(norm, name) is not None]
    grouped = reshaped(writer, node, x, (groups, prod(x.shape[1:]) // groups), last=False)
    y = _instance_norm(writer, node, grouped, [], norm.eps, last=False)
    y = reshaped(writer, node, y, x.shape[1:], last=not affine)
    for i, (kind, name) in enumerate(affine, 1):
        by_channel = getattr(norm, name).reshape(-1, *[1] * (len(x.shape) - 2))
        weight = _stored(writer, node, x, name, by_channel)
        y = writer.emit(node, kind, [y, weight], last=i == len(affine))
    return y


def instance_norm(writer: Writer, node: fx.Node) -> Value:
    """Every channel of every image by its own mean and variance."""
    norm: Any = called_module(writer.graph, node)
    x = writer.only(node)
    if norm.running_mean is not None or len(x.shape) < 3:
        raise Unfamiliar(f"{node.target} has kept statistics, or there are {len(x.shape)} axes")
    return _instance_norm(writer, node, x, _weights(writer, node, x), norm.eps, last=True)


def _instance_norm(writer: Writer, node: fx.Node, x: Value, weights: list[Value], eps: Any, *, last: bool) -> Value:
    weights = weights or [writer.constant(node, (value,) * x.shape[1], x.dtype) for value in (1.0, 0.0)]
    how: dict[str, Any] = {"epsilon": float(eps)}
    return writer.emit(node, "InstanceNormalization", [x, *weights], shape=x.shape, last=last, **how)


# ---- pooling -----------------------------------------------------------------------------------------------------


def max_pool(writer: Writer, node: fx.Node) -> Value:
    """The greatest of every window."""
    x, (kernel, stride, padding, dilation, up, indices) = writer.setting(
        node, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    )
    axes = _positions(writer, node, x)
    window = _window(padding, kernel if stride is None else stride, kernel, axes) | {"dilations": _each(dilation, axes)}
    if indices:
        raise Unfamiliar(f"{node.name} returns indices")
    if up:
        window |= _rounded_up(node, x, window)
    return writer.emit(node, "MaxPool", [x], ceil_mode=0, storage_order=0, **window)


def average_pool(writer: Writer, node: fx.Node) -> Value:
    """The mean of every window, with the padding or without, but always without what rounding up has added."""
    x, (kernel, stride, padding, up, count, divisor) = writer.setting(
        node, kernel_size=None, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    )
    axes = _positions(writer, node, x)
    window = _window(padding, kernel if stride is None else stride, kernel, axes)
    more = _rounded_up(node, x, window) if up else {}
    if divisor is not None:
        y = writer.emit(node, "AveragePool", [x], last=False, ceil_mode=0, count_include_pad=1, **window | more)
        factor = writer.constant(node, prod(window["kernel_shape"]) / divisor, x.dtype)
        return writer.emit(node, "Mul", [y, factor])
    if more and count and any(window["pads"]):
        raise Unfamiliar(f"{node.name} counts some of its padding")
    count = bool(count) and not more
    return writer.emit(node, "AveragePool", [x], ceil_mode=0, count_include_pad=int(count), **window | more)


def adaptive_average_pool(writer: Writer, node: fx.Node) -> Value:
    """To one position the mean over all of them, to others the means of equal windows, or of unequal ones as products.

    Window i of n over m positions holds those from ⌊i·m/n⌋ to ⌈(i + 1)·m/n⌉ (torch's documentation of the layer).
    """
    x, (size,) = writer.setting(node, output_size=None)
    axes = _positions(writer, node, x)
    extent = x.shape[2:]
    sizes = [n or m for n, m in zip(size, extent, strict=True)] if isinstance(size, tuple | list) else [size] * axes
    if all(n == 1 for n in sizes):
        return mean_over(writer, node, x, tuple(range(2, 2 + axes)), True)
    uneven = any(m % n for n, m in zip(sizes, extent, strict=True))
    if uneven and axes == 3:
        raise Unfamiliar(f"{node.name} pools {list(extent)} to {size}")
    if uneven:
        if axes == 2:
            rows = writer.constant(node, _means(extent[0], sizes[0]), x.dtype)
            x = writer.emit(node, "MatMul", [rows, x], shape=(*x.shape[:2], sizes[0], extent[1]), last=False)
        columns = (*zip(*_means(extent[-1], sizes[-1]), strict=True),)
        return writer.emit(node, "MatMul", [x, writer.constant(node, columns, x.dtype)])
    each = [m // n for n, m in zip(sizes, extent, strict=True)]
    if all(n == 1 for n in each):
        return x
    return writer.emit(node, "AveragePool", [x], ceil_mode=0, count_include_pad=1, **_window(0, each, each, axes))


def _means(size: int, count: int) -> tuple[tuple[float, ...], ...]:
    """[count, size]: what each of ``size`` positions adds to the means of so many windows."""
    ends = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    return tuple(tuple((start <= j < end) / (end - start) for j in range(size)) for start, end in ends)


def _positions(writer: Writer, node: fx.Node, x: Value) -> int:
    """How many axes are pooled, which a class or function is named after, of ``x`` [N, C, …]."""
    module = called_module(writer.graph, node)
    kind: Any = node.target if module is None else type(module)
    axes = int(kind.__name__[-2])
    if len(x.shape) != axes + 2:
        raise Unfamiliar(f"{node.target} is applied to {len(x.shape)} axes")
    return axes


def _rounded_up(node: fx.Node, x: Value, window: dict[str, Any]) -> dict[str, Any]:
    """Padding at the end for the windows that begin in ``x`` and end behind it; empty if there are none.

    Runtimes differ in the number of windows that ONNX's own attribute for this gives.
    """
    axes = len(window["strides"])
    reach = [d * (k - 1) + 1 for d, k in zip(window.get("dilations", [1] * axes), window["kernel_shape"], strict=True)]
    begin, counts = window["pads"][:axes], shape_of(node)[2:]
    ends = [
        max((count - 1) * stride + extent - size - before, pad)
        for count, stride, extent, size, before, pad in zip(
            counts, window["strides"], reach, x.shape[2:], begin, window["pads"][axes:], strict=True
        )
    ]
    if any(end >= kernel for end, kernel in zip(ends, window["kernel_shape"], strict=True)):
        raise Unfamiliar(f"{node.name} rounds up by a kernel or more")
    return {"pads": [*begin, *ends]} if ends != window["pads"][axes:] else {}


def _each(given: Any, axes: int) -> list[int]:
    """Whole numbers for so many ``axes``; one stands for all."""
    numbers = list(given) if isinstance(given, tuple | list) else [given]
    numbers = numbers * axes if len(numbers) == 1 else numbers
    if len(numbers) != axes or not all(isinstance(number, Integral) for number in numbers):
        raise Unfamiliar(f"{given!r} is no whole number for each of {axes} axes")
    return [int(number) for number in numbers]


def _window(padding: Any, stride: Any, kernel: Any, axes: int) -> dict[str, Any]:
    """The attributes of what slides over positions along so many ``axes``."""
    pads, strides, sizes = (_each(given, axes) for given in (padding, stride, kernel))
    return {"auto_pad": "NOTSET", "pads": pads * 2, "strides": strides, "kernel_shape": sizes}


LAYERS: dict[Any, Operation] = {
    **dict.fromkeys(CONVS, convolution),
    **dict.fromkeys(TRANSPOSED_CONVS, transposed_convolution),
    nn.Linear: linear,
    nn.PReLU: prelu,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), batch_norm),
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), instance_norm),
    **{getattr(nn, f"MaxPool{n}d"): max_pool for n in (1, 2, 3)},
    **{getattr(functional, f"max_pool{n}d"): max_pool for n in (1, 2, 3)},
    **{getattr(nn, f"AvgPool{n}d"): average_pool for n in (1, 2, 3)},
    **{getattr(functional, f"avg_pool{n}d"): average_pool for n in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveAvgPool{n}d"): adaptive_average_pool for n in (1, 2, 3)},
    **{getattr(functional, f"adaptive_avg_pool{n}d"): adaptive_average_pool for n in (1, 2, 3)},
}
"""By exact class or function."""
