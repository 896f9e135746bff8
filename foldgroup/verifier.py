"""Verifying a bundle: is what stands in it still the network that was trained.

Without the checkpoint: every file has its recorded hash, and ONNX Runtime reproduces the golden float64 logits. With
it, everything is done again from the checkpoint: the passes, the certificate, the weights in ``model.onnx`` bit for
bit, the float64 tier and the runtime tier. With labelled images: accuracy, and agreement with the training form in
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foldgroup.bundle import GOLDEN, Bundle, read_bundle
from foldgroup.checkpoint import Preprocessing, load_checkpoint
from foldgroup.compiler import Folded, fold
from foldgroup.emit.onnx import MODEL, intermediate_outputs, stored_weights_match
from foldgroup.equivalence import (
    FLOAT64_LIMIT,
    LIMITS,
    ErrorStatistics,
    TierResult,
    first_layer_over,
    float64_error,
    runtime_layer_errors,
)
from foldgroup.errors import BundleError, EquivalenceError, FoldgroupError
from foldgroup.run import OnnxRuntimeRunner
from foldgroup.trace import evaluate

BATCH = 50
"""Images run at a time."""


@dataclass(frozen=True)
class CheckResult:
    """One check: what was compared, whether it passed, and the finding in words."""

    name: str
    passed: bool
    finding: str


@dataclass
class Verification:
    """All checks of a bundle; truthy if every one passed."""

    checks: list[CheckResult] = field(default_factory=list)
    tiers: dict[str, TierResult] = field(default_factory=dict)
    top1_accuracy: float | None = None
    """Share of the labelled images that the bundle's model gets right."""

    def __bool__(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "passed": bool(self),
            "checks": [{"name": c.name, "passed": c.passed, "finding": c.finding} for c in self.checks],
            "tiers": {name: tier.as_dict() for name, tier in self.tiers.items()},
            "top1_accuracy": self.top1_accuracy,
        }


def verify(
    bundle: str | Path,
    checkpoint: str | Path | None = None,
    *,
    data: str | Path | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Check ``bundle``, against ``checkpoint`` if given, on the labelled images in the folder ``data`` if given.

    The checkpoint is read with the options it was compiled with (recorded in the bundle).

    Raises:
        FoldgroupError: if the bundle, the checkpoint or the data cannot be read; a check that fails does not raise.
    """
    opened = read_bundle(Path(bundle))
    result = Verification()
    with _recorded(result, "files"):
        result.checks.append(CheckResult("files", True, f"{opened.check_files()} files have their recorded SHA-256"))
    on_step("files")
    folded = _fold_again(opened, Path(checkpoint), result) if checkpoint is not None else None
    on_step("training form")
    model = opened.read(MODEL)
    inputs, reference = _golden(opened)
    if folded is not None:
        with _recorded(result, "ONNX weights"):
            count = stored_weights_match(model, folded.folded)
            result.checks.append(
                CheckResult("ONNX weights", True, f"{count} layers are bit-equal to the folded network")
            )
        reference = evaluate(folded.training, inputs)["output"]
        error = float64_error(reference, folded.folded, inputs)
        finding = f"max error {error:.1e} of the largest output, limit {FLOAT64_LIMIT:.0e}"
        result.checks.append(CheckResult("float64", error <= FLOAT64_LIMIT, finding))
        on_step("float64")
    with OnnxRuntimeRunner(model) as runner:
        _add_tier(
            result, "onnxruntime fp32, golden inputs", runner.run(inputs.numpy()), reference, model, folded, inputs
        )
        on_step("ONNX Runtime")
        if data is not None:
            _check_images(result, opened, runner, Path(data), model, folded)
            on_step("images")
    return result


def _fold_again(bundle: Bundle, checkpoint: Path, result: Verification) -> Folded | None:
    options = bundle.passes["options"]
    loaded = load_checkpoint(
        checkpoint, arch=options["arch"], gate_order=options["gate_order"], zero_gates=options["zero_gates"]
    )
    same = loaded.sha256 == bundle.manifest["checkpoint"]["sha256"]
    finding = "the file that was compiled" if same else "not the file that was compiled: judged by its weights alone"
    result.checks.append(CheckResult("checkpoint", True, finding))
    with _recorded(result, "certificate"):
        folded = fold(loaded, input_size=options["input_size"])
        counts = folded.certificate
        finding = f"{counts.weights_kept:,} weights bit-equal, {counts.weights_pruned:,} pruned where the mask is zero"
        result.checks.append(CheckResult("certificate", True, finding))
        return folded
    return None


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


def _golden(bundle: Bundle) -> tuple[Tensor, Tensor]:
    from safetensors.torch import load

    try:
        tensors = load(bundle.read(GOLDEN))
        return tensors["input"], tensors["logits"]
    except FoldgroupError:
        raise
    except Exception as error:
        raise BundleError(f"{bundle.path / GOLDEN}: not the golden inputs ({error}); compile again") from error


def _add_tier(
    result: Verification,
    name: str,
    outputs: np.ndarray[Any, Any],
    reference: Tensor,
    model: bytes,
    folded: Folded | None,
    inputs: Tensor,
) -> None:
    """Record a runtime's outputs against the reference; if they fail, find the first layer that is off."""
    precision = name.split()[1].rstrip(",")
    with _recorded(result, name):
        tier = TierResult(name, ErrorStatistics.of(outputs, reference.numpy()), LIMITS[precision])
        result.tiers[name] = tier
        seen = tier.statistics
        finding = f"max error {seen.max_error:.1e}, top-1 agreement {seen.top1_agreement:.2%} of {seen.images}"
        if not tier:
            finding = "; ".join(tier.violations)
            if folded is not None:
                values = intermediate_outputs(model, inputs.numpy())
                errors = runtime_layer_errors(folded.folded, values, inputs)
                finding += f"; first layer over: {first_layer_over(errors, LIMITS[precision].max_error)}"
        result.checks.append(CheckResult(name, bool(tier), finding))


def _check_images(
    result: Verification, bundle: Bundle, runner: OnnxRuntimeRunner, data: Path, model: bytes, folded: Folded | None
) -> None:
    right = total = 0
    outputs, references, last = [], [], None
    for images, labels in _labelled_batches(bundle, data):
        logits = runner.run(images.numpy())
        right += int((logits.argmax(1) == labels.numpy()).sum())
        total += len(labels)
        if folded is not None:
            outputs.append(logits)
            references.append(evaluate(folded.training, images)["output"])
            last = images
    result.top1_accuracy = right / total
    result.checks.append(CheckResult("accuracy", True, f"top-1 {right / total:.2%} of {total} images ({right} right)"))
    if last is not None:
        name = "onnxruntime fp32, images"
        _add_tier(result, name, np.concatenate(outputs), torch.cat(references), model, folded, last)


def _labelled_batches(bundle: Bundle, data: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images [N, C, H, W] and class numbers [N], by the network's class names if it has any."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    settings = dict(bundle.preprocessing)
    names = settings.pop("classes")
    channels, *_ = bundle.input_shape
    if channels != 3:
        raise BundleError(f"{data}: images have 3 channels, the network takes {channels}")
    try:
        images = ImageFolder(data, Preprocessing(**settings).transform())
    except OSError as error:
        raise BundleError(f"{data}: not a folder with one sub-folder of images per class ({error})") from error
    unknown = [name for name in images.classes if names and name not in names]
    classes = bundle.manifest["output"]["shape"][1]
    if unknown or (not names and len(images.classes) != classes):
        what = f"{unknown[0]!r} is none of the network's classes" if unknown else f"the network has {classes} classes"
        raise BundleError(f"{data}: {len(images.classes)} class folders, but {what}")
    number = torch.tensor([names.index(name) if names else i for i, name in enumerate(images.classes)])
    fixed = bundle.manifest["input"]["shape"][0]
    batch = fixed if isinstance(fixed, int) else BATCH
    try:
        for batch_images, labels in DataLoader(images, batch_size=batch, drop_last=isinstance(fixed, int)):
            yield batch_images, number[labels]
    except OSError as error:  # Pillow's errors are
        raise BundleError(f"{data}: an image cannot be read ({error}); remove or replace it") from error
