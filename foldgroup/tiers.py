"""The third tier of equality: a runtime and a precision against the float64 reference, in all and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
from torch import fx

from foldgroup.emit.onnx import intermediate_outputs
from foldgroup.emit.precision import DTYPES
from foldgroup.equivalence import (
    LIMITS,
    ErrorStatistics,
    TierResult,
    rounded_layer_errors,
    runtime_layer_errors,
)
from foldgroup.errors import EquivalenceError, UnavailableError
from foldgroup.evaluation import evaluate_rounded
from foldgroup.golden import Golden
from foldgroup.outputs import outputs_of
from foldgroup.run.base import Runner, all_outputs
from foldgroup.targets import Variant, find_target, make_runner, missing

Array = npt.NDArray[Any]


@dataclass
class Tiers:
    """The variants that ran, with their results, and those that cannot run here, with the reason."""

    results: dict[str, TierResult] = field(default_factory=dict)
    runtimes: dict[str, dict[str, str | int]] = field(default_factory=dict)
    """What really ran: the runners' own descriptions."""
    not_run: dict[str, str] = field(default_factory=dict)

    def add(self, other: Tiers) -> None:
        """Take up what ``other`` found."""
        self.results |= other.results
        self.runtimes |= other.runtimes
        self.not_run |= other.not_run


def run_tier(variant: Variant, runner: Runner, golden: Golden) -> TierResult:
    """Run the golden inputs that suit the precision, and compare with the training form's float64 outputs.

    Raises:
        RunnerError: if the runtime refuses the inputs.
        EquivalenceError: if the outputs are of another shape or not finite.
    """
    inputs, reference = golden.suited_to(variant.precision)
    outputs = all_outputs(runner, inputs.numpy())
    return tier_of(str(variant), variant.precision, outputs, [output.numpy() for output in reference])


def tier_of(name: str, precision: str, outputs: Sequence[Array], reference: Sequence[Array]) -> TierResult:
    """Outputs against float64 ones, by the limits of ``precision``.

    Raises:
        EquivalenceError: if the outputs are of another shape or not finite; the message begins with ``name``.
    """
    try:
        return TierResult(name, ErrorStatistics.of_all(outputs, reference), LIMITS[precision], precision)
    except EquivalenceError as error:
        advice = "keep layers in float with --keep-float, or use bf16"
        if precision == "fp32":
            advice = "its values are too large for float32, as trained; rescale its weights"
        raise EquivalenceError(f"{name}: {error}; {advice}") from error


def run_tiers(contents: Mapping[Variant, bytes], golden: Golden) -> Tiers:
    """Run every variant on the bytes of its ONNX file or engine. What cannot be had on this machine is noted.

    Raises:
        RunnerError: if a runtime refuses its network.
        EquivalenceError: as :func:`run_tier`.
    """
    tiers = Tiers()
    for variant, content in contents.items():
        try:
            with make_runner(variant, content) as runner:
                tiers.results[str(variant)] = run_tier(variant, runner, golden)
                tiers.runtimes[str(variant)] = runner.describe()
        except UnavailableError as error:
            tiers.not_run[str(variant)] = str(error)
    return tiers


def stand_in(precision: str) -> Variant | None:
    """Where an ONNX file can be judged on this machine, for engines that cannot run here; None if nowhere."""
    for target in (find_target("onnxruntime"), find_target("openvino")):
        if precision in target.precisions and missing(target) is None:
            return Variant(target, precision)
    return None


def rounded_tier(
    precision: str, graph: fx.GraphModule, keep_float: Sequence[str], golden: Golden, errors: Mapping[str, float]
) -> TierResult:
    """fp16 or bf16 as a 16-bit device computes it, whatever runs here: ONNX Runtime's CPU kernels widen float16.

    ``errors`` are those of the layers.

    Raises:
        EquivalenceError: if a layer overflows, naming the first.
    """
    overflows = next((name for name, error in errors.items() if math.isinf(error)), None)
    if overflows is not None:
        raise EquivalenceError(
            f"{overflows} overflows in {precision}: keep it in float with --keep-float {overflows}, or use bf16"
        )
    inputs, reference = golden.suited_to(precision)
    values = evaluate_rounded(graph, inputs, DTYPES[precision], keep_float)
    outputs = [values[node.name].numpy() for node in outputs_of(graph).values()]
    return tier_of(f"rounded {precision}", precision, outputs, [output.numpy() for output in reference])


def layer_errors(
    precision: str,
    graph: fx.GraphModule,
    model: bytes,
    keep_float: Sequence[str],
    golden: Golden,
    *,
    batch: int | None = None,
    openvino: bool = False,
) -> dict[str, float]:
    """What ``precision`` costs at every layer of ``graph``, relative to the layer's largest value in float64.

    fp32 and int8 are taken from the ONNX file under ONNX Runtime, or every precision under OpenVINO. fp16 and bf16 are
    else rounded as a GPU does it. ``batch`` is that of a model whose batch is fixed.

    Raises:
        RunnerError: if the runtime refuses the network.
    """
    inputs, _ = golden.suited_to(precision)
    if batch is not None:
        inputs = inputs[torch.arange(batch) % len(inputs)]
    if openvino:
        from foldgroup.run.ov import intermediate

        return runtime_layer_errors(graph, intermediate(model, inputs.numpy(), precision=precision), inputs)
    if precision in ("fp16", "bf16"):
        return rounded_layer_errors(graph, DTYPES[precision], keep_float, inputs)
    return runtime_layer_errors(graph, intermediate_outputs(model, inputs.numpy()), inputs)
