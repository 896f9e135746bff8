"""The third tier of equality: a runtime and a precision against the float64 reference, in all and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from foldgroup.emit.onnx import intermediate_outputs
from foldgroup.emit.precision import DTYPES
from foldgroup.equivalence import (
    LIMITS,
    ErrorStatistics,
    TierResult,
    rounded_layer_errors,
    runtime_layer_errors,
)
from foldgroup.errors import HardwareError
from foldgroup.folding import Folded
from foldgroup.golden import Golden
from foldgroup.run.base import Runner, run_all
from foldgroup.targets import Variant, find_target, make_runner, missing


@dataclass
class Tiers:
    """The variants that ran, with their results, and those that cannot run here, with the reason."""

    results: dict[str, TierResult] = field(default_factory=dict)
    runtimes: dict[str, dict[str, str | int]] = field(default_factory=dict)
    """What really ran: the runners' own descriptions."""
    not_run: dict[str, str] = field(default_factory=dict)


def run_tier(variant: Variant, runner: Runner, golden: Golden) -> TierResult:
    """Run the golden inputs that suit the precision, and compare with the training form's float64 logits.

    Raises:
        RunnerError: if the runtime refuses the inputs.
        EquivalenceError: if the outputs are of another shape or not finite.
    """
    inputs, reference = golden.suited_to(variant.precision)
    outputs = run_all(runner, inputs.numpy())
    return TierResult(str(variant), ErrorStatistics.of(outputs, reference.numpy()), LIMITS[variant.precision])


def run_tiers(contents: Mapping[Variant, bytes], golden: Golden) -> Tiers:
    """Run every variant on the bytes of its ONNX file or engine. What this machine has no hardware for is noted.

    Raises:
        RunnerError: if a runtime is missing or refuses its network.
    """
    tiers = Tiers()
    for variant, content in contents.items():
        try:
            with make_runner(variant, content) as runner:
                tiers.results[str(variant)] = run_tier(variant, runner, golden)
                tiers.runtimes[str(variant)] = runner.describe()
        except HardwareError as error:
            tiers.not_run[str(variant)] = str(error)
    return tiers


def run_stand_ins(models: Mapping[str, bytes], golden: Golden) -> Tiers:
    """Run ONNX files, by precision, under ONNX Runtime as far as it takes them: for engines that cannot run here."""
    onnxruntime = find_target("onnxruntime")
    if missing(onnxruntime) is not None:
        return Tiers()
    variants = {Variant(onnxruntime, p): model for p, model in models.items() if p in onnxruntime.precisions}
    return run_tiers(variants, golden)


def precision_layer_errors(
    precision: str, folded: Folded, model: bytes, keep_float: tuple[str, ...], golden: Golden
) -> dict[str, float]:
    """What ``precision`` costs at every layer, relative to the layer's largest value in float64.

    fp32 and int8 are taken from the ONNX file under ONNX Runtime. fp16 and bf16 are rounded as a GPU does it, because
    ONNX Runtime computes them in float32 on the CPU, if at all.
    """
    inputs, _ = golden.suited_to(precision)
    if precision in ("fp16", "bf16"):
        return rounded_layer_errors(folded.folded, DTYPES[precision], keep_float, inputs)
    return runtime_layer_errors(folded.folded, intermediate_outputs(model, inputs.numpy()), inputs)
