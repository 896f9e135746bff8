"""Every target and precision of one network: compiled, verified and timed, interleaved in one run.

    python -m bench.targets examples/g_resnext17_cifar10.pt --calibrate TRAIN --data TEST --name targets_example
    python -m bench.targets g_resnext50 --calibrate IMAGES --variant onnxruntime:fp32 --variant openvino:int8
    python -m bench.targets g_resnext50 --gpu --tune 60 --calibrate IMAGES --name targets_gpu_g_resnext50

The network is a checkpoint, or the name of one to make with random weights and gates. With ``--data`` every variant's
accuracy on labelled images is measured too. ``--gpu`` measures what needs one: ONNX Runtime's CUDA provider,
AOTInductor for CUDA and TensorRT-RTX; what this GPU refuses is recorded with the reason. ``--tune`` chooses every
layer's form by measuring it first. Writes ``bench/results/<name>.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.synthetic import write_checkpoint
from foldgroup.benchmarking import benchmark
from foldgroup.bundle import Bundle
from foldgroup.compiler import compile
from foldgroup.emit.engine import BATCH_RANGE
from foldgroup.errors import FoldgroupError, TuningError
from foldgroup.report.tables import benchmark_table, verification_table
from foldgroup.verifier import verify

RESULTS = Path(__file__).parent / "results"

CPU = ("onnxruntime:fp32", "openvino:fp32", "openvino:bf16", "openvino:int8", "aotinductor:fp32")
GPU = (
    *(f"onnxruntime-cuda:{precision}" for precision in ("fp32", "fp16", "bf16")),
    *(f"aotinductor-cuda:{precision}" for precision in ("fp32", "fp16", "bf16")),
    *(f"tensorrt-rtx:{precision}" for precision in ("fp32", "fp16", "bf16", "int8")),
)


def main() -> None:
    """Compile, verify, measure, print the tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("network", help="a checkpoint, or the name of a network to make one of")
    parser.add_argument("--variant", action="append", help="TARGET:PRECISION; default: all on this processor")
    parser.add_argument("--gpu", action="store_true", help="all on this GPU instead")
    parser.add_argument("--calibrate", type=Path, help="folder of images for int8")
    parser.add_argument("--data", type=Path, help="folder of labelled images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tune", type=float, metavar="SECONDS", help="to measure forms in, for each variant")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result file; default: targets_<network>")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write it to")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(arguments.network)
        if not checkpoint.is_file():
            checkpoint = Path(folder, f"{arguments.network}.pt")
            write_checkpoint(checkpoint, arguments.network, arguments.seed)
        asked = arguments.variant or (GPU if arguments.gpu else CPU)
        start = time.perf_counter()
        options: dict[str, Any] = {"calibrate": arguments.calibrate}
        if arguments.tune is not None:
            batch = (1, arguments.batch, max(arguments.batch, BATCH_RANGE[-1]))
            options |= {"tune": True, "tune_budget": arguments.tune, "threads": arguments.threads, "batch": batch}
            options |= {"tuning_db": Path(folder, "tuning.sqlite")}  # so that it is measured here and now
        bundle, refused = build(checkpoint, Path(folder, "bundle"), asked, options)
        seconds = time.perf_counter() - start
        run = [name for name in asked if name not in refused]
        if not run:
            raise SystemExit("nothing runs here: " + "; ".join(dict.fromkeys(refused.values())))
        verification = verify(bundle.path, target=run, data=arguments.data)
        console.print(verification_table(verification))
        report = benchmark(
            bundle.path,
            target=run,
            threads=arguments.threads,
            batch=arguments.batch,
            streams=arguments.streams,
            max_seconds=arguments.seconds,
            on_step=lambda step: print(f"{step} ready", file=sys.stderr),
        )
        console.print(benchmark_table(report))
        document = {
            **report.as_dict(),
            "compile_seconds": round(seconds, 1),
            "engines": bundle.engines["engines"],
            "models": bundle.models,
            "file_bytes": {name: entry["bytes"] for name, entry in bundle.manifest["files"].items()},
            "worst_layers": bundle.verification["worst_layers"],
            "verification": verification.as_dict(),
            "refused": refused,
        }
    arguments.results.mkdir(exist_ok=True)
    target = arguments.results / f"{arguments.name or 'targets_' + checkpoint.stem}.json"
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def build(
    checkpoint: Path, bundle: Path, asked: Sequence[str], options: Mapping[str, Any]
) -> tuple[Bundle, dict[str, str]]:
    """A bundle with every variant asked for, compiled with ``options``, and why those refused are not in it."""
    refused: dict[str, str] = {}
    while True:
        left = [name for name in asked if name not in refused]
        if not left:
            raise SystemExit("nothing can be built here: " + "; ".join(dict.fromkeys(refused.values())))
        try:
            images = options["calibrate"] if any(name.endswith(":int8") for name in left) else None
            built = compile(checkpoint, bundle, target=left, **{**options, "calibrate": images})
        except TuningError as error:
            options = {**options, "tune": False}
            print(f"not tuned: {error}", file=sys.stderr)
            continue
        except FoldgroupError as error:
            guilty = refused_by(str(error), left)
            if not guilty:
                raise
            refused |= dict.fromkeys(guilty, str(error))
            print(f"refused: {error}", file=sys.stderr)
            continue
        not_run = {name.replace(" ", ":"): reason for name, reason in built.verification["not_run"].items()}
        return built, refused | not_run


def refused_by(message: str, asked: Sequence[str]) -> list[str]:
    """Those that an error is about: it begins with the variant, or with the target if that cannot be had at all."""
    return [name for name in asked if message.startswith(name.replace(":", " "))] or [
        name for name in asked if message.startswith(f"{name.partition(':')[0]} ")
    ]


if __name__ == "__main__":
    main()
