"""What adds positions, in ONNX, for :mod:`foldgroup.emit.direct`: padding, interpolation, pixels out of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from foldgroup.emit.direct.graph import Operation, Unfamiliar, Value, Writer
from foldgroup.emit.direct.layout import whole
from foldgroup.trace import called_module, shape_of


def padded(
    writer: Writer,
    node: fx.Node,
    x: Value,
    pads: Sequence[tuple[int, int]],
    mode: str,
    value: float = 0.0,
    **how: Any,
) -> Value:
    """``x`` with ``pads`` before and after each of its last axes."""
    modes = {"constant": "constant", "zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if mode not in modes or len(pads) >= len(x.shape) or any(not whole(n) or n < 0 for both in pads for n in both):
        raise Unfamiliar(f"{node.name} pads with {mode} by {pads}")
    every = [(0, 0)] * (len(x.shape) - len(pads)) + list(pads)
    shape = tuple(size + sum(both) for size, both in zip(x.shape, every, strict=True))
    amounts = writer.constant(node, (*(a for a, _ in every), *(b for _, b in every)))
    filling = [writer.constant(node, float(value), x.dtype)] if modes[mode] == "constant" else []
    return writer.emit(node, "Pad", [x, amounts, *filling], shape=shape, mode=modes[mode], **how)


_PADDINGS = {"Zero": "constant", "Constant": "constant", "Reflection": "reflect", "Replication": "replicate"}
_PADDINGS |= {"Circular": "circular"}


def pad(writer: Writer, node: fx.Node) -> Value:
    """Zeros, a number, what lies at the edge, the mirror image or the other end, around the last axes."""
    module: Any = called_module(writer.graph, node)
    if module is not None:
        mode = _PADDINGS[type(module).__name__[: -len("Pad2d")]]
        x, (amounts, value) = writer.setting(node, padding=(), value=0.0)
    else:
        x, (amounts, mode, value) = writer.setting(node, pad=(), mode="constant", value=None)
    if not isinstance(amounts, tuple | list) or len(amounts) % 2:
        raise Unfamiliar(f"{node.name} pads by {amounts}")
    both = [*zip(amounts[::2], amounts[1::2], strict=True)][::-1]  # torch begins with the last axis
    return padded(writer, node, x, both, mode, value or 0.0)


def interpolate(writer: Writer, node: fx.Node) -> Value:
    """To another size: nearest by whole factors, where rounding cannot matter, or linear or cubic by any.

    The scales are those that torch computes with. ONNX takes for size what is left of size times scale, rounded down.
    """
    x, (_, factor, mode, corners, again, smooth) = writer.setting(node, **_INTERPOLATION)
    sizes, results = np.array(x.shape[2:]), np.array(shape_of(node)[2:])
    if factor is None or again:
        scales = (results / sizes).astype(np.float32)
        scales = np.where(scales * sizes.astype(float) < results, np.nextafter(scales, np.float32(np.inf)), scales)
    else:
        scales = np.array(factor if isinstance(factor, tuple | list) else [factor] * len(sizes), np.float32)
    how: dict[str, Any] = {"mode": _MODES.get(mode), "coordinate_transformation_mode": "pytorch_half_pixel"}
    if mode == "nearest":
        how |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    elif corners:
        how["coordinate_transformation_mode"] = "align_corners"
    if mode == "bicubic":
        how["cubic_coeff_a"] = -0.75
    exact = all(np.array_equal(np.floor(sizes.astype(kind) * scales), results) for kind in (np.float32, np.float64))
    if (
        how["mode"] is None
        or smooth
        or not exact
        or 1 in results
        or (mode == "nearest" and not all(map(_even, scales)))
    ):
        raise Unfamiliar(f"{node.name} resizes {x.shape[2:]} to {shape_of(node)[2:]} by {mode}")
    by = writer.constant(node, (1.0, 1.0, *map(float, scales)), torch.float32)
    return writer.emit(node, "Resize", [x, None, by], **how)


def _even(scale: float) -> bool:
    """Whether x / scale is exact for every whole x that matters: a whole number, or one over a power of two."""
    return float(scale).is_integer() or math.log2(scale).is_integer()


_INTERPOLATION: dict[str, Any] = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
_INTERPOLATION |= {"recompute_scale_factor": None, "antialias": False}
_MODES = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}


def pixel_shuffle(writer: Writer, node: fx.Node) -> Value:
    """[N, C·r², H, W] → [N, C, H·r, W·r]."""
    x, (factor,) = writer.setting(node, upscale_factor=None)
    if len(x.shape) != 4 or not whole(factor):
        raise Unfamiliar(f"{node.name} is applied to {len(x.shape)} axes")
    return writer.emit(node, "DepthToSpace", [x], blocksize=int(factor), mode="CRD")


RESIZING: dict[Any, Operation] = {
    **{getattr(nn, f"{kind}Pad{n}d"): pad for kind in _PADDINGS for n in (1, 2, 3)},
    functional.pad: pad,
    **dict.fromkeys((nn.Upsample, functional.interpolate), interpolate),
    **dict.fromkeys((nn.PixelShuffle, functional.pixel_shuffle), pixel_shuffle),
}
"""By exact class or function."""
