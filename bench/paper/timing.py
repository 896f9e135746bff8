"""How long the folded networks take: what the paper never measured.

Every network is compiled as ``foldgroup compile`` does, and all are timed interleaved in one run: ONNX Runtime,
float32, one thread, one image.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import foldgroup
from bench.paper.collecting import collect, document_path
from bench.paper.scales import Scale
from bench.paper.studies import resnext, runs
from bench.paper.training import result_path, write
from foldgroup.bundle import read_bundle
from foldgroup.measure import interleave, machine
from foldgroup.targets import Variant, find_target, make_runner

VARIANT = Variant(find_target("onnxruntime"), "fp32")


def time_all(scale: Scale, work: Path, seconds: float) -> None:
    """Compile what is not compiled yet, time every network, and add medians and ratios to the document."""
    document = collect(scale, work)
    contents: dict[tuple[str, int], bytes] = {}
    shape: tuple[int, ...] = ()
    for point, seed in runs(scale):
        checkpoint = result_path(work, point, seed).with_suffix(".pt")
        if str(seed) not in document["runs"].get(point.key, {}) or not checkpoint.is_file():
            continue
        folder = checkpoint.with_suffix(".foldgroup")
        made = folder.is_dir()  # a bundle is written whole or not at all
        bundle = read_bundle(folder) if made else foldgroup.compile(checkpoint, folder, engine=False)
        contents[point.key, seed] = bundle.content(VARIANT)
        shape = bundle.input_shape
        print(f"{point.key}, seed {seed}: ready", file=sys.stderr, flush=True)
    images = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    with ExitStack() as stack:
        calls = {}
        for name, content in contents.items():
            runner = stack.enter_context(make_runner(VARIANT, content, threads=1))
            calls[_name(*name)] = partial(runner.outputs, images)
        measured = interleave(calls, warmup=5, min_rounds=20, max_rounds=10**6, max_seconds=seconds)
    for (key, seed), content in contents.items():
        entry = document["runs"][key][str(seed)]
        entry["latency"] = asdict(measured.stats(_name(key, seed))) | {"file_bytes": len(content)}
        base = resnext(scale).key
        if key != base and (base, seed) in contents:
            ratio = measured.ratio(_name(base, seed), _name(key, seed))
            entry["speed_up_over_resnext"] = asdict(ratio)
    document["latency_machine"] = machine()
    write(document_path(scale), document)


def _name(key: str, seed: int) -> str:
    return f"{key} #{seed}"


def median_ms(entry: dict[str, Any]) -> float | None:
    """The measured median of a run, or None if it was not timed."""
    return entry["latency"]["median_ms"] if "latency" in entry else None
