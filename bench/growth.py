"""How the cost of compiling grows: wall time and peak memory against depth and against width.

    python -m bench.growth

Depth: 16 blocks (a network of 50 layers) to 500, of one width. Width: 4 blocks whose last 3×3 has 512 to 4,096
channels. Each network is compiled in a fresh process, without engines. Every process pays the same to start, load its
libraries, trace and time the limits; what counts is what each further weight costs. For two networks a and b the
*exponent* is log(t_b/t_a) / log(weights_b/weights_a): at most 1 where cost grows no faster than the weights.

Like :mod:`bench.compile_time`, whose memory figures these are, this process imports no torch before it is done.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.compile_time import compile_once

RESULTS = Path(__file__).parent / "results"
DEPTH = ("3-4-6-3x32", "3-4-23-3x32", "3-8-36-3x32", "3-8-86-3x32", "3-8-186-3x32", "3-8-486-3x32")
"""16 to 500 blocks; the first three are those of ResNet-50, -101 and -152."""
WIDTH = ("1-1-1-1x64", "1-1-1-1x128", "1-1-1-1x256", "1-1-1-1x512")
"""Widths up to 512, 1024, 2048 and 4096."""


def exponents(runs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The exponent of ``key`` from every run to the next."""
    return [
        math.log(after[key] / before[key]) / math.log(after["weights"] / before["weights"])
        for before, after in pairwise(runs)
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """The result as tables."""
    lines = ["# How the cost of compiling grows", ""]
    lines += [f"By `python -m bench.growth`, on {document['threads']} cores of {document['machine']['processor']}.", ""]
    for name, runs in document["series"].items():
        times, memory = (exponents(runs, key) for key in ("wall_seconds", "peak_rss_bytes"))
        lines += [
            f"| {name} | blocks | widest | weights | seconds | exponent | peak memory | exponent |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for number, run in enumerate(runs):
            time, space = (f"{values[number - 1]:.2f}" if number else "" for values in (times, memory))
            lines.append(
                f"| {run['arch']} | {run['blocks']} | {run['widest']} | {run['weights'] / 1e6:.1f} M | "
                f"{run['wall_seconds']:.1f} | {time} | {run['peak_rss_bytes'] / 1e9:.2f} GB | {space} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Compile every network that the result does not hold yet; write it and its tables after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use")
    parser.add_argument("--name", default="growth")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    path = RESULTS / f"{arguments.name}.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"series": {}}
    for name, archs in (("depth", DEPTH), ("width", WIDTH)):
        runs = document["series"].setdefault(name, [])
        known = {run["arch"] for run in runs}
        for arch in (arch for arch in archs if arch not in known):
            run = compile_once(arch, 0, engine=False)
            runs.append(
                {
                    **{key: run[key] for key in ("arch", "seed", "wall_seconds", "peak_rss_bytes", "step_seconds")},
                    "blocks": len(run["channels"]),
                    "widest": max(run["channels"]),
                    "weights": run["params"]["training"],
                    "shuffles_kept": run["shuffles_kept"],
                    "float64_max_error": run["float64_max_error"],
                }
            )
            document["threads"] = arguments.threads
            path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            print(json.dumps({key: runs[-1][key] for key in ("arch", "wall_seconds", "weights")}), file=sys.stderr)
    from foldgroup.measure import machine

    document["machine"] = machine()
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    main()
