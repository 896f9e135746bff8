"""A folded network in each precision: the typed graph, the ONNX file, and how it came about.

::

    folded graph ─► typed fp32 | fp16 | bf16 ─► ONNX
    folded graph ─► pack_groups ─► typed fp32 ─► ONNX ─► quantiser, calibrated ─► ONNX with Q/DQ       (int8)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from foldgroup.certificate import certify
from foldgroup.emit.onnx import export_onnx
from foldgroup.emit.precision import DTYPES, layers_named, typed
from foldgroup.emit.quantize import Calibration, Quantizer
from foldgroup.emit.sensitivity import most_sensitive
from foldgroup.errors import EquivalenceError, TargetError
from foldgroup.folding import Folded
from foldgroup.measure import layer_costs
from foldgroup.nn.dgconv import DGConv2d
from foldgroup.trace import called_module

INT8_WIDTH = 4
"""TensorRT's int8 convolutions want group widths that are multiples of this."""

AUTO = "auto"
"""In place of a layer's name: choose by measuring."""


@dataclass(frozen=True)
class CalibrationData:
    """Real images [N, C, H, W], as the network takes them, and how ranges are read off them."""

    images: npt.NDArray[np.float32]
    method: Calibration = "minmax"


@dataclass(frozen=True)
class Lowered:
    """A network in one precision. ``graph`` is what ``model``, the ONNX file, was made from (int8: before rounding)."""

    precision: str
    graph: fx.GraphModule
    model: bytes
    keep_float: tuple[str, ...] = ()
    """The layers that stay in float32."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the manifest: multiply-adds of one image, the layers kept in float, packed groups, the calibration."""


def packed_for(precision: str, folded: Folded) -> Folded:
    """The folded network with groups as wide as ``precision`` needs them, certified again if that changed anything.

    Raises:
        EquivalenceError: if packing broke the network.
    """
    from passes import PackGroups

    if precision != "int8":
        return folded
    result = PackGroups(INT8_WIDTH).run(folded.folded)
    if not result.rewrites:
        return folded
    certificate = certify(folded.training, result.graph)
    if not certificate.holds:
        raise EquivalenceError(f"packing groups for {precision}: {certificate.failure}")
    return replace(folded, folded=result.graph, certificate=certificate)


def lower(
    folded: Folded,
    precision: str,
    *,
    packed: Folded | None = None,
    batch: int | None = None,
    keep_float: Sequence[str] = (),
    calibration: CalibrationData | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Lowered:
    """The network in ``precision``, with a dynamic batch or a fixed one; ``packed`` is :func:`packed_for` it, if known.

    ``keep_float`` are names or wildcards of layers to keep in float32; ``auto`` adds the few that int8 hurts most,
    measured on the calibration images.

    Raises:
        EmitError, EquivalenceError: if a step is refused or goes wrong.
        TargetError: if int8 is asked for without calibration images.
    """
    if calibration is None and precision == "int8":
        raise TargetError("int8 needs real images to read ranges off: name a folder of them with --calibrate")
    shape = (batch or 1, *folded.input_shape[1:])
    fixed = batch is not None
    before = folded.folded
    folded = packed or packed_for(precision, folded)
    kept = layers_named(folded.folded, [pattern for pattern in keep_float if pattern != AUTO])
    learned = {str(n.target) for n in folded.training.graph.nodes if is_learned(folded.training, n)}
    costs = layer_costs(folded.folded)
    facts: dict[str, Any] = {
        "macs": sum(cost.macs for cost in costs),
        "learned_macs": sum(cost.macs for cost in costs if cost.name in learned),
    }
    if folded.folded is not before:
        facts["packed"] = _packed(before, folded.folded)

    if precision == "int8":
        assert calibration is not None
        graph = typed(folded.folded, torch.float32)
        exact = export_onnx(graph, shape, fixed_batch=fixed)
        quantizer = Quantizer(exact, calibration.images, method=calibration.method, batch=batch)
        on_step("calibration")
        facts["calibration"] = {
            "images": len(calibration.images),
            "sha256": hashlib.sha256(calibration.images.tobytes()).hexdigest(),
            "method": calibration.method,
            "quantizer": quantizer.version,
        }
        if AUTO in keep_float:
            layers = [name for name in quantizer.layers if name not in kept]
            held = kept
            kept += most_sensitive(
                layers, lambda others: quantizer.quantize((*held, *others)), exact, calibration.images, on_step
            )
        model = quantizer.quantize(kept)
    else:
        kept = () if precision == "fp32" else kept
        graph = typed(folded.folded, DTYPES[precision], kept)
        model = export_onnx(graph, shape, fixed_batch=fixed)
    if kept:
        facts["keep_float"] = list(kept)
    on_step(f"ONNX {precision}")
    return Lowered(precision, graph, model, kept, facts)


def is_learned(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` of a training form calls a layer whose groups were learned."""
    return isinstance(called_module(graph, node), DGConv2d)


def _packed(before: fx.GraphModule, after: fx.GraphModule) -> dict[str, int]:
    """Executed groups of every layer that packing changed."""
    changed = {}
    for name, module in after.named_modules():
        groups = getattr(module, "groups", None)
        if groups is not None and groups != getattr(before.get_submodule(name), "groups", None):
            changed[name] = int(groups)
    return changed
