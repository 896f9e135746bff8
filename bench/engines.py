"""TensorRT-RTX engines of the example and of full-size networks, in every precision, on a machine with no GPU.

    python -m bench.engines --calibrate IMAGES

Each network is folded once; each engine is one plan for sm80, sm86, sm89 and sm120. Build seconds and sizes go to
``bench/results/engines.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.synthetic import write_checkpoint
from foldgroup.checkpoint import load_checkpoint
from foldgroup.emit.quantize import BATCH
from foldgroup.engines import EngineSettings, build
from foldgroup.equivalence import seeded_inputs
from foldgroup.folding import fold
from foldgroup.images import unlabelled
from foldgroup.lowering import CalibrationData, form_for, lower
from foldgroup.measure import machine
from foldgroup.targets import PRECISIONS, Variant, find_target

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "g_resnext17_cifar10.pt"
GPUS = ("sm80", "sm86", "sm89", "sm120")


def main() -> None:
    """Build them all, print a line for each and write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("network", nargs="*", default=[str(EXAMPLE), "g_resnext50", "g_resnext101"])
    parser.add_argument("--calibrate", type=Path, help="folder of images for int8; default: noise")
    parser.add_argument("--batch", type=int, help="fixed; default: dynamic, 1 to 32")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "engines.json")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for network in arguments.network:
            checkpoint = Path(network)
            if not checkpoint.is_file():
                checkpoint = Path(folder, f"{network}.pt")
                write_checkpoint(checkpoint, network)
            results += engines_of(checkpoint, arguments.calibrate, arguments.batch)
    document = {"engines": results, "compute_capabilities": GPUS, "machine": machine()}
    arguments.output.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def engines_of(path: Path, calibrate: Path | None, batch: int | None) -> list[dict[str, Any]]:
    """One engine in every precision."""
    checkpoint = load_checkpoint(path)
    folded = fold(checkpoint)
    if calibrate is not None:
        images = unlabelled(calibrate, checkpoint.preprocessing, limit=BATCH)
    else:
        images = seeded_inputs((BATCH, *folded.input_shape[1:])).numpy()
    results = []
    for precision in PRECISIONS:
        form = form_for(precision, folded)
        low = lower(form, precision, batch=batch, calibration=CalibrationData(images))
        variant = Variant(find_target("tensorrt-rtx"), precision)
        start = time.perf_counter()
        engine = build(variant, low, folded.input_shape, EngineSettings(gpu=GPUS), fixed_batch=batch is not None)
        seconds = time.perf_counter() - start
        results.append(
            {
                "network": checkpoint.arch,
                "precision": precision,
                "batch": engine.facts["batch"] or batch,
                "seconds": round(seconds, 2),
                "plan_bytes": len(engine.content),
                "onnx_bytes": len(low.model),
                "fallbacks": engine.facts["fallbacks"],
                "builder": f"{engine.builder} {engine.version}",
            }
        )
        print(f"{checkpoint.arch} {precision}: {seconds:.2f} s, {len(engine.content) / 1e6:.1f} MB")
    return results


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
