"""What a network sees in images: the likeliest classes of each.

::

    image.jpg ─► images.py ─► runner ─► softmax ─► the few largest, by name
      file        [3, S, S]    logits    float64
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from foldgroup.bundle import PREPROCESSING, Bundle, precision_of, read_bundle
from foldgroup.errors import EquivalenceError, RunnerError
from foldgroup.images import BATCH, preprocessing_of, read_batch
from foldgroup.run.base import Runner, run_all
from foldgroup.targets import Variant, find_target, make_runner, parse_variants


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, the likeliest first."""

    path: Path
    entries: tuple[tuple[str, float], ...]
    """Class name, or number where the names are unknown, and probability from 0 to 1."""
    runs_on: str
    """The runtime and precision that really ran."""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        classes = [{"class": name, "probability": probability} for name, probability in self.entries]
        return {"image": str(self.path), "runs_on": self.runs_on, "classes": classes}


def predict_with(
    bundle: str | Path, images: Sequence[Path], *, target: str | None = None, top: int = 5
) -> list[Prediction]:
    """The ``top`` likeliest classes of every image, by the network of ``bundle``.

    ``target`` is a name such as ``openvino`` or ``openvino:int8``; by default the first that the bundle was compiled
    for and that can run here, or else ONNX Runtime.

    Raises:
        FoldgroupError: if the bundle or an image cannot be read, or the target cannot run.
    """
    opened = read_bundle(Path(bundle))
    opened.checked(PREPROCESSING, opened.manifest["files"])
    with ExitStack() as stack:
        return predict(_first_that_runs(stack, opened, target), opened, images, top)


def predict(runner: Runner, bundle: Bundle, images: Sequence[Path], top: int = 5) -> list[Prediction]:
    """The ``top`` likeliest classes of every image, in the order of ``images``; ``runner`` is open.

    Any number of images goes through a network whose batch is fixed. All formats that Pillow reads are taken, as
    :func:`foldgroup.images.read_image` says.

    Raises:
        BundleError: if the network takes no RGB images, or does not classify them.
        ImageError: naming the first image that cannot be read.
        RunnerError: if the network does not run.
        EquivalenceError: if it gives no numbers.
    """
    bundle.check_classifier()
    preprocessing, names = preprocessing_of(bundle)
    runs_on = "{runtime} {precision} ({provider})".format(**runner.describe())
    predictions = []
    for start in range(0, len(images), BATCH):
        paths = images[start : start + BATCH]
        logits = run_all(runner, read_batch(paths, preprocessing))
        if not np.isfinite(logits).all():
            raise EquivalenceError(f"{bundle.path}: {runs_on} gives infinite logits; run 'foldgroup verify' on it")
        probabilities = _softmax(logits)
        ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        for path, order, shares in zip(paths, ranked, probabilities, strict=True):
            entries = tuple((names[i] if names else str(i), float(shares[i])) for i in order)
            predictions.append(Prediction(path, entries, runs_on))
    return predictions


def _softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Probabilities [N, classes] in float64; the largest logit is taken off first, so that none overflows."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return result


def _first_that_runs(stack: ExitStack, bundle: Bundle, target: str | None) -> Runner:
    reasons: list[RunnerError] = []
    for variant in _candidates(bundle, target):
        try:
            return stack.enter_context(make_runner(variant, bundle.content(variant)))
        except RunnerError as error:
            reasons.append(error)
    raise reasons[0]


def _candidates(bundle: Bundle, target: str | None) -> Iterator[Variant]:
    if target is not None:
        yield from parse_variants([target], bundle.variants)
        return
    yield from bundle.variants
    onnxruntime = find_target("onnxruntime")  # for a bundle made for other machines
    precisions = dict.fromkeys(map(precision_of, bundle.models))
    yield from (Variant(onnxruntime, name) for name in precisions if name in onnxruntime.precisions)
