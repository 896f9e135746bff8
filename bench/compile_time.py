"""How long does a compile take, and how much memory: full-size networks with random gates, each in a fresh process.

    python -m bench.compile_time

Every compile is made several times, in turns with the others; what is kept is the one of median time, with the range.

This process imports no torch before the compiles have ended: a child's peak memory, as the system counts it, is at
least what its parent held when it was started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "compile_time.json"
GPUS = "sm80,sm89,sm120"


def compile_once(arch: str, seed: int, engine: bool) -> dict[str, Any]:
    """Write a synthetic checkpoint, compile it with the command line, and read from the bundle what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder, f"{arch}.pt"), Path(folder, f"{arch}.foldgroup")
        synthetic = [sys.executable, "-m", "bench.synthetic", arch, str(checkpoint), "--seed", str(seed)]
        subprocess.run(synthetic, check=True)
        options = ["--gpu", GPUS] if engine else ["--no-engine"]
        command = [sys.executable, "-m", "foldgroup", "compile", str(checkpoint), "-o", str(bundle), *options]
        seconds, peak = run_measured(command)
        manifest, verification, engines = (
            json.loads((bundle / name).read_text(encoding="utf-8"))
            for name in ("manifest.json", "verification.json", "engines.json")
        )
        return {
            "arch": arch,
            "seed": seed,
            "wall_seconds": round(seconds, 2),
            "peak_rss_bytes": peak,
            "step_seconds": verification["seconds"],
            "checkpoint_bytes": checkpoint.stat().st_size,
            "onnx_bytes": manifest["files"]["model.onnx"]["bytes"],
            "engines": [
                {key: entry[key] for key in ("file", "bytes", "builder", "version", "compute_capabilities")}
                for entry in engines["engines"]
            ],
            "params": manifest["params"],
            "channels": [layer["in_channels"] for layer in manifest["layers"]],
            "groups": [layer["groups"] for layer in manifest["layers"]],
            "shuffles_inserted": manifest["shuffles"]["inserted"],
            "shuffles_kept": len(manifest["shuffles"]["kept"]),
            "certificate": manifest["certificate"],
            "float64_max_error": verification["float64_max_error"],
        }


def run_measured(command: list[str]) -> tuple[float, int]:
    """Wall seconds and the peak of resident memory in bytes of a command and what it starts; needs POSIX."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the compile failed with exit status {process.returncode}: see its message above")
    return seconds, usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024  # macOS counts bytes


def main() -> None:
    """Compile each network named, print a line for each and write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", action="append", help="default: g_resnext50 and g_resnext101")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=5, help="how often to compile each")
    parser.add_argument("--no-engine", action="store_true", help="leave the TensorRT-RTX engine out")
    parser.add_argument("--json", type=Path, default=RESULT, help="file to write")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if hasattr(os, "sched_setaffinity"):  # for what does not ask OpenMP, such as ONNX Runtime; children inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    kinds = [
        (arch, engine)
        for arch in arguments.arch or ["g_resnext50", "g_resnext101"]
        for engine in ((False,) if arguments.no_engine else (False, True))
    ]
    made: dict[tuple[str, bool], list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repeat):
        for arch, engine in kinds:
            result = compile_once(arch, arguments.seed, engine)
            made[arch, engine].append(result)
            print(
                f"{arch}: {result['wall_seconds']:.1f} s, {result['peak_rss_bytes'] / 1e9:.2f} GB, "
                f"{result['shuffles_kept']} of {result['shuffles_inserted']} shuffles kept, "
                f"certificate {'holds' if result['certificate']['holds'] else 'FAILS'}, "
                f"float64 error {result['float64_max_error']:.1e}, "
                f"engine {sum(engine['bytes'] for engine in result['engines']) / 1e6:.0f} MB"
            )
    from foldgroup.measure import machine

    document = {
        "threads": arguments.threads,
        "runs": [_median(results) for results in made.values()],
        "machine": machine(),
    }
    arguments.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median time, with all times under ``wall_seconds_all``."""
    ranked = sorted(results, key=lambda result: float(result["wall_seconds"]))
    return {**ranked[len(ranked) // 2], "wall_seconds_all": [result["wall_seconds"] for result in ranked]}


if __name__ == "__main__":
    main()
