"""A folded network in each precision: the typed graph, the ONNX file, and how it came about.

::

    folded graph ─► groups packed for the target ─► typed fp32 | fp16 | bf16 ─► ONNX
    folded graph ─► groups packed for the target ─► typed fp32 ─► ONNX ─► quantiser, calibrated ─► ONNX with Q/DQ (int8)

What is written is the network that :class:`passes.PackGroups` makes, whose certificate holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from foldgroup.certificate import certify
from foldgroup.claims import Certificate
from foldgroup.conv_shape import Choose, Execution
from foldgroup.counts import layer_costs, learned_costs
from foldgroup.emit.onnx import export_onnx
from foldgroup.emit.precision import DTYPES, layers_named, typed
from foldgroup.emit.quantize import Calibration, Quantizer
from foldgroup.emit.sensitivity import most_sensitive
from foldgroup.errors import EquivalenceError, PassError, TargetError
from foldgroup.folding import Folded

if TYPE_CHECKING:
    from passes import PackGroups

INT8_WIDTH = 4
"""TensorRT's int8 convolutions want group widths that are multiples of this."""

AUTO = "auto"
"""In place of a layer's name: choose by measuring."""


@dataclass(frozen=True)
class CalibrationData:
    """Real images [N, C, H, W], as the network takes them, and how ranges are read off them.

    ``reduce_range`` as for :class:`foldgroup.emit.quantize.Quantizer`.
    """

    images: npt.NDArray[np.float32]
    method: Calibration = "minmax"
    reduce_range: bool | None = None


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
    """A folded graph as one precision on one target needs it, without the dense kernels that it came from."""

    graph: fx.GraphModule
    nominal: fx.GraphModule
    """The same with the groups that were learned."""
    executions: Mapping[str, Execution]
    """How those layers run that do not run as they were learned."""
    input_shape: tuple[int, ...]
    facts: dict[str, Any]
    """For the manifest: multiply-adds of one image, in all and in the learned layers, packed groups, split layers."""
    certificate: Certificate

    def same_as(self, other: Form) -> bool:
        """Whether both are one network, run alike."""
        return self.nominal is other.nominal and self.executions == other.executions


def form_for(precision: str, folded: Folded, choose: Choose | None = None) -> Form:
    """The folded network, every convolution with groups run as ``choose`` says; see :class:`passes.PackGroups`.

    Without a choice it has the groups that were learned, but for int8: as wide as that needs them. What comes of it is
    certified, whatever was certified before.

    Raises:
        EquivalenceError: if folding or packing broke the network.
    """
    from passes import PackGroups

    return _form(precision, folded, PackGroups(INT8_WIDTH if precision == "int8" else 1, choose))


def recorded_form(model: Mapping[str, Any], precision: str, folded: Folded) -> Form:
    """The form that a manifest's entry ``model`` says a network runs in.

    Raises:
        EquivalenceError: if the network has no such form.
    """
    from passes import PackGroups

    none = "the manifest's packed groups are none of this network"
    try:
        packed, split = dict(model.get("packed", {})), dict(model.get("split", {}))
        wanted = {name: Execution(groups, split.get(name, 1)) for name, groups in packed.items()}
    except (ValueError, TypeError) as error:
        raise EquivalenceError(f"{none}: {error}") from error
    packing = PackGroups(1, lambda name, calls, _: wanted.get(name, Execution(calls[0].groups)))
    try:
        form = _form(precision, folded, packing)
    except PassError as error:
        raise EquivalenceError(f"{none}: {error}") from error
    strange = sorted(map(str, {*wanted, *split} - set(form.executions)))
    if strange:
        raise EquivalenceError(f"{none}: {', '.join(strange)} runs as it was learned")
    return form


def _form(precision: str, folded: Folded, packing: PackGroups) -> Form:
    graph = packing.run(folded.folded).graph
    executions = packing.chosen
    if not executions:
        graph = folded.folded
    certificate = certify(folded.training, graph) if executions else folded.certificate
    if not certificate.holds:
        folded.check_certificate()  # was it broken before?
        raise EquivalenceError(f"packing groups for {precision}: {certificate.failure}")
    facts: dict[str, Any] = {
        "macs": sum(cost.macs for cost in layer_costs(graph)),
        "learned_macs": sum(cost.macs for costs in learned_costs(folded.training, graph).values() for cost in costs),
    }
    packed = {name: form.groups for name, form in executions.items()}
    split = {name: form.parts for name, form in executions.items() if form.parts > 1}
    facts |= ({"packed": packed} if packed else {}) | ({"split": split} if split else {})
    return Form(graph, folded.folded, executions, folded.input_shape, facts, certificate)


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
        quantizer = Quantizer(
            exact,
            calibration.images,
            method=calibration.method,
            batch=batch,
            reduce_range=calibration.reduce_range,
        )
        on_step("calibration")
        facts["calibration"] = {
            "images": len(calibration.images),
            "sha256": hashlib.sha256(calibration.images.tobytes()).hexdigest(),
            "method": calibration.method,
            "quantizer": quantizer.version,
            "weight_bits": 7 if quantizer.reduce_range else 8,
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
