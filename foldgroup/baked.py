"""Is the preprocessing in ``model.image.onnx`` that of torchvision? Measured on real images, under ONNX Runtime.

Both ways begin with the same decoded images: through the graph, and through ``Preprocessing.transform()`` and
``model.onnx``. What differs is the rounding of grey levels alone, so the logits may differ a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foldgroup.bundle import IMAGE_MODEL, Bundle
from foldgroup.checkpoint import Preprocessing
from foldgroup.emit.preprocess import IMAGE
from foldgroup.equivalence import ErrorStatistics, Limits, TierResult
from foldgroup.images import read_batch, read_image
from foldgroup.run.base import import_runtime, run_all
from foldgroup.run.ort import OnnxRuntimeRunner

LIMITS = Limits(max_error=0.1, median_error=1e-2, top1_agreement=0.95)
"""A grey level is 1/255 of the range; one pixel in a thousand may be one off, and int8 may round it further."""


def baked_tier(bundle: Bundle, images: Sequence[Path]) -> TierResult:
    """Compare the two ways for ``images``.

    Raises:
        RunnerError: if ONNX Runtime cannot run the network's precision on the CPU.
        ImageError: if an image cannot be read.
    """
    settings = dict(bundle.preprocessing)
    settings.pop("classes")
    onnxruntime = import_runtime("onnxruntime", "onnxruntime")
    with OnnxRuntimeRunner(bundle.read(bundle.models[bundle.manifest["precision"]]["file"])) as runner:
        expected = run_all(runner, read_batch(images, Preprocessing(**settings)))
        least, _ = runner.batch_range or (1, 1)
    session = onnxruntime.InferenceSession(bundle.read(IMAGE_MODEL), providers=["CPUExecutionProvider"])
    outputs = []
    for path in images:
        pixels = np.asarray(read_image(path))
        (logits,) = session.run(None, {IMAGE: np.repeat(pixels[None], least, axis=0)})
        outputs.append(logits[:1])
    return TierResult("preprocessing", ErrorStatistics.of(np.concatenate(outputs), expected), LIMITS)
