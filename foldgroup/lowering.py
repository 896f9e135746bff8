"""A folded network in each precision: the typed graph, the ONNX file, and how it came about.

::

    folded graph ─► typed fp32 | fp16 | bf16 ─► ONNX
    folded graph ─► pack_groups ─► typed fp32 ─► ONNX ─► quantiser, calibrated ─► ONNX with Q/DQ       (int8)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from foldgroup.nn.dgconv import DGConv
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


@dataclass(frozen=True)
class Form:
    """A folded graph as one precision needs it, without the dense kernels that it came from."""

    graph: fx.GraphModule
    input_shape: tuple[int, ...]
    facts: dict[str, Any]
    """For the manifest: multiply-adds of one image, in all and in the learned layers, and packed groups."""


def form_for(precision: str, folded: Folded) -> Form:
    """The folded network with groups as wide as ``precision`` needs them, certified again if that changed anything.

    Raises:
        EquivalenceError: if packing broke the network.
    """
    from passes import PackGroups

    graph, packed = folded.folded, {}
    if precision == "int8":
        graph = PackGroups(INT8_WIDTH).run(folded.folded).graph
        packed = _packed(folded.folded, graph)
        certificate = certify(folded.training, graph) if packed else folded.certificate
        if not certificate.holds:
            raise EquivalenceError(f"packing groups for {precision}: {certificate.failure}")
    training = folded.training
    learned = {str(n.target) for n in training.graph.nodes if isinstance(called_module(training, n), DGConv)}
    costs = layer_costs(graph)
    facts: dict[str, Any] = {
        "macs": sum(cost.macs for cost in costs),
        "learned_macs": sum(cost.macs for cost in costs if cost.name in learned),
    }
    return Form(graph, folded.input_shape, facts | ({"packed": packed} if packed else {}))


def lower(
    form: Form,
    precision: str,
    *,
    batch: int | None = None,
    keep_float: Sequence[str] = (),
    calibration: CalibrationData | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Lowered:
    """The network in ``precision``, with a dynamic batch or a fixed one.

    ``keep_float`` are names or wildcards of layers to keep in float32; ``auto`` adds the few that int8 hurts most,
    measured on the calibration images.

    Raises:
        EmitError, EquivalenceError: if a step is refused or goes wrong.
        TargetError: if int8 is asked for without calibration images.
    """
    if calibration is None and precision == "int8":
        raise TargetError("int8 needs real images to read ranges off: name a folder of them with --calibrate")
    shape = (batch or 1, *form.input_shape[1:])
    fixed = batch is not None
    kept = layers_named(form.graph, [pattern for pattern in keep_float if pattern != AUTO])
    facts = dict(form.facts)
    if precision == "int8":
        assert calibration is not None
        graph = typed(form.graph, torch.float32)
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
        graph = typed(form.graph, DTYPES[precision], kept)
        model = export_onnx(graph, shape, fixed_batch=fixed)
    if kept:
        facts["keep_float"] = list(kept)
    on_step(f"ONNX {precision}")
    return Lowered(precision, graph, model, kept, facts)


def _packed(before: fx.GraphModule, after: fx.GraphModule) -> dict[str, int]:
    """Executed groups of every layer that packing changed."""
    changed = {}
    for name, module in after.named_modules():
        groups = getattr(module, "groups", None)
        if groups is not None and groups != getattr(before.get_submodule(name), "groups", None):
            changed[name] = int(groups)
    return changed
