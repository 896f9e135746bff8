"""Verifying a bundle: is what stands in it still the network that was trained.

Without the checkpoint: every file has its recorded hash, and every runtime at hand gives the golden float64 outputs in
every precision. With it, everything is done again from the checkpoint: the passes, the certificate, the weights in the
ONNX files, the float64 tier, the runtime tiers, and the error of every layer. With labelled images: accuracy, and
agreement with the training form in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from foldgroup.baked import baked_tier
from foldgroup.bundle import IMAGE_MODEL, PASSES, Bundle, precision_of, read_bundle
from foldgroup.checkpoint import load_network
from foldgroup.emit.onnx import stored_weights_match
from foldgroup.equivalence import (
    FLOAT64_LIMIT,
    TierResult,
    first_layer_over,
    float64_error,
    float64_outputs,
    worst_layer,
)
from foldgroup.errors import BundleError, EquivalenceError, RunnerError, UnavailableError
from foldgroup.folding import Folded, fold, pipeline_here
from foldgroup.golden import Golden
from foldgroup.images import labelled_batches, sample
from foldgroup.lowering import recorded_form
from foldgroup.manifest import learned_layers
from foldgroup.own_model import ModelSource
from foldgroup.pipeline import Pipeline
from foldgroup.run import Runner
from foldgroup.run.base import run_all
from foldgroup.targets import Variant, make_runner, parse_variants
from foldgroup.tiers import layer_errors, rounded_tier, run_tier, stand_in, tier_of
from foldgroup.tuning.table import CostTable

Array = npt.NDArray[Any]

BAKED_IMAGES = 100
"""Images on which preprocessing in the graph is compared with torchvision's."""


@dataclass(frozen=True)
class CheckResult:
    """One check: what was compared, whether it passed (None: it cannot be made here), and the finding in words."""

    name: str
    passed: bool | None
    finding: str


@dataclass(frozen=True)
class Accuracy:
    """Shares of labelled images whose class is the largest logit, or among the five largest."""

    images: int
    top1: float
    top5: float


@dataclass
class Verification:
    """All checks of a bundle; truthy if every one that could be made passed."""

    checks: list[CheckResult] = field(default_factory=list)
    tiers: dict[str, TierResult] = field(default_factory=dict)
    accuracy: dict[str, Accuracy] = field(default_factory=dict)
    """On the labelled images, by variant."""

    def __bool__(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    @property
    def top1_accuracy(self) -> float | None:
        """Share of the labelled images that the first variant gets right."""
        return next((accuracy.top1 for accuracy in self.accuracy.values()), None)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "passed": bool(self),
            "checks": [{"name": c.name, "passed": c.passed, "finding": c.finding} for c in self.checks],
            "tiers": {name: tier.as_dict() for name, tier in self.tiers.items()},
            "top1_accuracy": self.top1_accuracy,
            "accuracy": {
                name: {"images": a.images, "top1": a.top1, "top5": a.top5} for name, a in self.accuracy.items()
            },
        }


def verify(
    bundle: str | Path,
    checkpoint: str | Path | nn.Module | None = None,
    *,
    model: ModelSource | None = None,
    pipeline: Pipeline | None = None,
    target: Sequence[str] = (),
    data: str | Path | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Check ``bundle``, against ``checkpoint`` if given, on the labelled images in the folder ``data`` if given.

    ``checkpoint`` may be the module that was compiled. ``model`` names the function that builds a checkpoint's network,
    if one was named when it was compiled: the bundle knows its name, but no bundle decides what code is run.
    ``pipeline`` are the passes that it was compiled with, if they were not the default ones.

    ``target`` are names such as ``openvino`` or ``openvino:int8``; by default every target and precision that the
    bundle was compiled for. What cannot run here is reported, and a precision left without a target is judged by its
    ONNX file. The checkpoint is read with the options it was compiled with (recorded in the bundle).

    Raises:
        FoldgroupError: if the bundle, the checkpoint or the data cannot be read, or a target asked for cannot run; a
            check that fails does not raise.
    """
    opened = read_bundle(Path(bundle))
    if data is not None:
        opened.check_classifier()
    wanted = parse_variants(target, opened.variants) if target else opened.variants
    result = Verification()
    with _recorded(result, "files"):
        result.checks.append(CheckResult("files", True, f"{opened.check_files()} files have their recorded SHA-256"))
    on_step("files")
    golden = Golden.load(opened)
    folded = _fold_again(opened, checkpoint, model, pipeline, result) if checkpoint is not None else None
    on_step("training form")
    if folded is not None:
        golden = golden.again(folded.training)
        golden.check_seen(folded.traced.checkpoint.model, folded.training)
        _check_models(opened, folded, result)
        error = float64_error(golden.outputs, folded.folded, golden.inputs)
        finding = f"max error {error:.1e} of the largest output, limit {FLOAT64_LIMIT:.0e}"
        result.checks.append(CheckResult("float64", error <= FLOAT64_LIMIT, finding))
        on_step("float64")
    layers = _LayerErrors(opened, folded, golden)
    if folded is not None:
        _add_rounded(result, layers)
    with ExitStack() as stack:
        runners = _enter(stack, opened, wanted, result, must=bool(target))
        for variant, runner in runners.items():
            with _recorded(result, f"{variant}, golden inputs"):
                _add(result, "golden inputs", run_tier(variant, runner, golden), variant, layers)
            on_step(str(variant))
        if data is not None:
            _check_images(opened, runners, Path(data), layers, result)
            on_step("images")
            if IMAGE_MODEL in opened.manifest["files"]:
                _check_baked(opened, Path(data), result)
                on_step("preprocessing")
    return result


class _recorded:
    """Turns a check that raises into one that is recorded as failed."""

    def __init__(self, result: Verification, name: str) -> None:
        self.result = result
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, EquivalenceError):
            self.result.checks.append(CheckResult(self.name, False, str(error)))
            return True
        return False


def _fold_again(
    bundle: Bundle,
    checkpoint: str | Path | nn.Module,
    model: ModelSource | None,
    pipeline: Pipeline | None,
    result: Verification,
) -> Folded | None:
    options = bundle.passes["options"]
    built_by, shape = options.get("model"), options.get("input_shape")  # older bundles have neither
    reading = {"arch": options["arch"], "gate_order": options["gate_order"], "zero_gates": options["zero_gates"]}
    if isinstance(checkpoint, nn.Module):
        reading = {}
    elif built_by and model is None:
        raise BundleError(
            f"{bundle.path}: its network was built by {built_by}: give that, or what it is now, as --model"
        )
    loaded = load_network(checkpoint, **reading, model=model)
    same = loaded.sha256 == bundle.manifest["checkpoint"]["sha256"]
    finding = "the file that was compiled" if same else "not the file that was compiled: judged by its weights alone"
    result.checks.append(CheckResult("checkpoint", True, finding))
    with _recorded(result, "certificate"):
        _check_passes(bundle, pipeline)
        cost = _costs(bundle)
        size = None if shape else options["input_size"]
        folded = fold(loaded, pipeline=pipeline, cost=cost, input_shape=shape, input_size=size)
        counts = folded.certificate
        finding = f"{counts.weights_kept:,} weights bit-equal, {counts.weights_pruned:,} pruned where the mask is zero"
        result.checks.append(CheckResult("certificate", True, finding))
        return folded
    return None


def _check_passes(bundle: Bundle, pipeline: Pipeline | None) -> None:
    """Refuse to judge by other passes than those that the bundle was compiled with."""
    try:
        ran = [str(record["name"]) for record in bundle.passes["passes"]]
    except (LookupError, TypeError) as error:
        raise BundleError(f"{bundle.path / PASSES}: its passes cannot be read ({error!r}); compile again") from error
    here = [step.name for step in (pipeline or pipeline_here()).passes]
    if ran != here:
        raise EquivalenceError(
            f"it was compiled by other passes ({', '.join(ran)}) than there are here ({', '.join(here)}): install the "
            "package that they are from, or in Python give verify() the pipeline, or compile again"
        )


def _costs(bundle: Bundle) -> CostTable | None:
    """What channel orders were planned by; None in older bundles, which counted."""
    if "costs" not in bundle.passes:
        return None
    try:
        return CostTable.from_dict(bundle.passes["costs"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{bundle.path / PASSES}: its costs cannot be read ({error!r}); compile again") from error


def _check_models(bundle: Bundle, folded: Folded, result: Verification) -> None:
    """The weights of every ONNX file against the folded network, in the form that it runs in."""
    for key, model in bundle.models.items():
        if "file" not in model:  # of an engine, from a file that is not kept
            continue
        name = "ONNX weights" if key == bundle.manifest["precision"] else f"ONNX weights {key}"
        with _recorded(result, name):
            precision = precision_of(key)
            content = bundle.checked(model["file"], bundle.manifest["files"])
            graph = recorded_form(model, precision, folded).graph
            if key == bundle.manifest["precision"]:
                _check_layers(bundle, learned_layers(folded, graph))
            count = stored_weights_match(content, graph)
            how = "within half a step of" if precision == "int8" else "bit-equal to"
            result.checks.append(CheckResult(name, True, f"{count} layers are {how} the folded network"))


def _check_layers(bundle: Bundle, layers: Sequence[Mapping[str, Any]]) -> None:
    """What the manifest says of the learned layers against what they are."""
    stored = bundle.manifest["layers"]
    if not isinstance(stored, list) or len(stored) != len(layers):
        raise EquivalenceError(f"the manifest does not list the network's {len(layers)} learned layers")
    for said, found in zip(stored, layers, strict=True):
        wrong = [key for key, value in found.items() if not isinstance(said, dict) or said.get(key, value) != value]
        if wrong:
            raise EquivalenceError(f"the manifest's {', '.join(wrong)} of {found['name']} are not the network's")


def _enter(
    stack: ExitStack, bundle: Bundle, wanted: Sequence[Variant], result: Verification, *, must: bool
) -> dict[Variant, Runner]:
    """Load every variant; what cannot be had here is recorded as not run, unless it must be.

    A precision that is left without one is judged by its ONNX file, where this machine can.

    Raises:
        UnavailableError: if one must run and cannot.
    """
    runners: dict[Variant, Runner] = {}

    def enter(variant: Variant) -> None:
        try:
            with _recorded(result, str(variant)):
                runners[variant] = stack.enter_context(make_runner(variant, bundle.content(variant)))
        except UnavailableError as error:
            if must:
                raise
            result.checks.append(CheckResult(str(variant), None, str(error)))
        except RunnerError as error:
            result.checks.append(CheckResult(str(variant), False, str(error)))

    for variant in wanted:
        enter(variant)
    if not must:
        ran = {variant.precision for variant in runners}
        left = [p for p in dict.fromkeys(map(precision_of, bundle.models)) if p not in ran]
        for other in map(stand_in, left):
            if other is not None and other not in wanted:
                enter(other)
    return runners


@dataclass
class _LayerErrors:
    """Every layer's error in a precision, worked out once; empty without the checkpoint."""

    bundle: Bundle
    folded: Folded | None
    golden: Golden
    known: dict[object, Mapping[str, float]] = field(default_factory=dict)

    def of(self, precision: str, *, openvino: bool = False) -> Mapping[str, float]:
        if self.folded is None:
            return {}
        if (precision, openvino) not in self.known:
            model = self.bundle.models[precision]
            self.known[precision, openvino] = layer_errors(
                precision,
                recorded_form(model, precision, self.folded).graph,
                self.bundle.read(model["file"]),
                model.get("keep_float", ()),
                self.golden,
                batch=self.bundle.fixed_batch,
                openvino=openvino,
            )
        return self.known[precision, openvino]


def _add_rounded(result: Verification, layers: _LayerErrors) -> None:
    """fp16 and bf16 as a 16-bit device computes them."""
    assert layers.folded is not None
    for precision, model in layers.bundle.models.items():
        if precision in ("fp16", "bf16"):  # packing changes no value
            with _recorded(result, f"rounded {precision}, golden inputs"):
                kept, errors = model.get("keep_float", ()), layers.of(precision)
                tier = rounded_tier(precision, layers.folded.folded, kept, layers.golden, errors)
                _add(result, "golden inputs", tier, None, layers)


def _add(result: Verification, what: str, tier: TierResult, variant: Variant | None, layers: _LayerErrors) -> None:
    """Record a runtime's tier, with the layer that is off most or, if it failed, the first over the limit."""
    name = f"{tier.name}, {what}"
    result.tiers[name] = tier
    finding = tier.statistics.summary
    if not tier:
        finding = "; ".join(tier.violations)
        errors = layers.of(tier.precision, openvino=variant is not None and variant.target.module == "openvino")
        first = first_layer_over(errors, tier.limits.max_error)
        finding += f"; first layer over: {first}" if first else ""
    elif tier.precision != "fp32" and what == "golden inputs":
        worst = worst_layer(layers.of(tier.precision))
        finding += f"; worst layer {worst[0]}, {worst[1]:.1e}" if worst else ""
    result.checks.append(CheckResult(name, bool(tier), finding))


def _check_images(
    bundle: Bundle, runners: Mapping[Variant, Runner], data: Path, layers: _LayerErrors, result: Verification
) -> None:
    """Accuracy of every variant on labelled images and, with the checkpoint, its agreement with float64."""
    outputs: dict[Variant, list[Array]] = {variant: [] for variant in runners}
    references, labels = [], []
    for images, numbers in labelled_batches(bundle, data):
        labels.append(numbers.numpy())
        for variant, runner in runners.items():
            outputs[variant].append(run_all(runner, images.numpy()))
        if layers.folded is not None:
            references.append(float64_outputs(layers.folded.training, images)[0].numpy())
    classes = np.concatenate(labels)
    reference = np.concatenate(references) if references else None
    for variant, batches in outputs.items():
        logits = np.concatenate(batches)
        with _recorded(result, f"{variant}, images"):
            accuracy = _accuracy(str(variant), logits, classes)
            result.accuracy[str(variant)] = accuracy
            finding = f"top-1 {accuracy.top1:.2%}, top-5 {accuracy.top5:.2%} of {accuracy.images} images"
            result.checks.append(CheckResult(f"{variant}, accuracy", True, finding))
            if reference is not None:
                tier = tier_of(str(variant), variant.precision, [logits], [reference])
                _add(result, "images", tier, variant, layers)


def _check_baked(bundle: Bundle, data: Path, result: Verification) -> None:
    """The preprocessing that is part of a graph, on the first of the images."""
    name = "preprocessing in the graph"
    images = sample(data, BAKED_IMAGES)
    try:
        with _recorded(result, name):
            tier = baked_tier(bundle, images)
            result.tiers[name] = tier
            finding = "; ".join(tier.violations) or tier.statistics.summary
            result.checks.append(CheckResult(name, bool(tier), finding))
    except RunnerError as error:  # bfloat16, for one
        result.checks.append(CheckResult(name, None, str(error)))


def _accuracy(name: str, logits: Array, classes: Array) -> Accuracy:
    if not np.isfinite(logits).all():
        raise EquivalenceError(f"{name}: {np.count_nonzero(~np.isfinite(logits))} outputs are infinite or not a number")
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    hits = ranked == classes[:, None]
    return Accuracy(len(classes), float(hits[:, 0].mean()), float(hits.any(1).mean()))
