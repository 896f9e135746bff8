"""Is the preprocessing in ``model.image.onnx`` that of torchvision? Measured on real images, under ONNX Runtime.

Both ways begin with the same decoded images: through the graph, and through ``Preprocessing.transform()`` and
``model.onnx``. What differs is the rounding of grey levels alone, so the logits may differ a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foldgroup.bundle import IMAGE_MODEL, Bundle
from foldgroup.emit.preprocess import IMAGE
from foldgroup.equivalence import ErrorStatistics, Limits, TierResult
from foldgroup.errors import FoldgroupError, RunnerError
from foldgroup.images import preprocessing_of, read_batch, read_image
from foldgroup.run.base import import_runtime, run_all
from foldgroup.run.ort import OnnxRuntimeRunner

LIMITS = Limits(max_error=0.1, median_error=1e-2, top1_agreement=0.95)
"""A grey level is 1/255 of the range; one pixel in a thousand may be one off, and int8 may round it further."""


def baked_tier(bundle: Bundle, images: Sequence[Path]) -> TierResult:
    """Compare the two ways for ``images``.

    Raises:
        RunnerError: if ONNX Runtime cannot run the network's precision on the CPU.
        EquivalenceError: if a file is not the one that was compiled.
        ImageError: if an image cannot be read.
    """
    preprocessing, _ = preprocessing_of(bundle)
    onnxruntime = import_runtime("onnxruntime", "onnxruntime")
    recorded = bundle.manifest["files"]
    with OnnxRuntimeRunner(bundle.checked(bundle.models[bundle.manifest["precision"]]["file"], recorded)) as runner:
        expected = run_all(runner, read_batch(images, preprocessing))
        least, _ = runner.batch_range or (1, 1)
    outputs = []
    try:
        session = onnxruntime.InferenceSession(
            bundle.checked(IMAGE_MODEL, recorded), providers=["CPUExecutionProvider"]
        )
        for path in images:
            pixels = np.asarray(read_image(path))
            (logits,) = session.run(None, {IMAGE: np.repeat(pixels[None], least, axis=0)})
            outputs.append(logits[:1])
    except FoldgroupError:
        raise
    except Exception as error:  # ONNX Runtime's own classes have no common base
        raise RunnerError(f"ONNX Runtime could not run {IMAGE_MODEL}: {error}") from error
    return TierResult("preprocessing", ErrorStatistics.of(np.concatenate(outputs), expected), LIMITS)
