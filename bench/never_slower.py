"""Does tuning ever lose: random G-ResNeXts, tuned and not, timed whole.

    python -m bench.never_slower --networks 50

Depth (one to four stages of one to four blocks), widths (16 to 512), image size and gates are drawn from a seed. Each
network is compiled without packing, packed by the shipped model, and tuned. Where two of these are the same file they
are equally fast; the others are timed interleaved, one thread, batch 1, apart from the tuning's own comparison. An
interval of 95 % lies on one side of 1 by chance one time in twenty, so a network that seems slower is timed again,
three times as long, and both results are kept.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import foldgroup
from foldgroup.measure import Measurement, interleave, machine
from foldgroup.nn.dgconv import DGConv2d
from foldgroup.nn.resnext import BottleneckConfig, GroupableResNet, StageConfig
from foldgroup.targets import Variant, find_target, make_runner

RESULTS = Path(__file__).parent / "results"
FORMS: Mapping[str, Mapping[str, Any]] = {"nominal": {"packing": False}, "packed": {}, "tuned": {"tune": True}}


def random_network(seed: int) -> tuple[nn.Module, int]:
    """A G-ResNeXt and the size of its images."""
    draw = random.Random(seed)
    width = draw.choice((16, 32, 64, 128))
    stages = tuple(
        StageConfig(draw.randint(1, 4), min(width << i, 512), 2 * min(width << i, 512))
        for i in range(draw.randint(1, 4))
    )
    torch.manual_seed(seed)
    stem = draw.choice(("imagenet", "cifar"))
    size = draw.choice((32, 48, 64)) if stem == "cifar" else draw.choice((96, 128, 160, 224))
    network = GroupableResNet(BottleneckConfig(stem, stages, stem_channels=32, num_classes=10))
    likely = draw.uniform(0.2, 0.8)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, DGConv2d):
                ones = [draw.random() < likely for _ in module.gate]
                module.gate.copy_(torch.tensor([1e-2 if one else -1e-2 for one in ones]))
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(0.5)
    return network.eval(), size


def compare(seed: int, folder: Path, variant: Variant, seconds: float) -> dict[str, Any]:
    """One network in its three forms."""
    network, size = random_network(seed)
    contents, bundles = {}, {}
    for name, options in FORMS.items():
        bundles[name] = foldgroup.compile(
            network,
            folder / f"{seed}_{name}",
            example_input=(1, 3, size, size),
            target=[f"{variant.target.name}:{variant.precision}"],
            engine=False,
            tuning_db=folder / "tuning.sqlite",
            tune_budget=12.0,
            **options,
        )
        contents[name] = bundles[name].content(variant)
    distinct = {name: content for name, content in contents.items() if content not in _before(contents, name)}
    inputs = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    layers = bundles["nominal"].manifest["layers"]
    result: dict[str, Any] = {
        "seed": seed,
        "size": size,
        "layers": [[layer["in_channels"], layer["groups"]] for layer in layers],
        "same_files": {name: _first(contents, content) for name, content in contents.items()},
        "own_comparison": bundles["tuned"].verification["tuning"][str(variant)].get("whole"),
    }
    if len(distinct) > 1:
        measured = _timed(distinct, variant, inputs, seconds)
        result |= _ratios(measured, result["same_files"])
        if any(entry["high"] < 1 for entry in result["speed_ups"].values()):
            again = _timed(distinct, variant, inputs, 3 * seconds)
            result["again"] = _ratios(again, result["same_files"])
    return result


def _before(contents: Mapping[str, bytes], name: str) -> list[bytes]:
    names = list(contents)
    return [contents[other] for other in names[: names.index(name)]]


def _first(contents: Mapping[str, bytes], content: bytes) -> str:
    """The first form that is this file."""
    return next(name for name, other in contents.items() if other == content)


def _timed(contents: Mapping[str, bytes], variant: Variant, inputs: Any, seconds: float) -> Measurement:
    with ExitStack() as stack:
        runners = {n: stack.enter_context(make_runner(variant, c, threads=1)) for n, c in contents.items()}
        calls = {name: partial(runner.outputs, inputs) for name, runner in runners.items()}
        return interleave(calls, max_seconds=seconds, min_rounds=20, max_rounds=100_000)


def _ratios(measured: Measurement, same: Mapping[str, str]) -> dict[str, Any]:
    """The tuned network over the others, where they differ."""
    tuned = same["tuned"]
    return {
        "median_ms": {name: measured.stats(name).median_ms for name in measured.samples},
        "speed_ups": {
            f"over {other}": asdict(measured.ratio(same[other], tuned))
            for other in ("nominal", "packed")
            if same[other] != tuned
        },
    }


def main() -> None:
    """Compare every network and write the JSON file; one that is interrupted goes on where it stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", type=int, default=50)
    parser.add_argument("--variant", default="onnxruntime:fp32")
    parser.add_argument("--seconds", type=float, default=4, help="to time one network in")
    parser.add_argument("--name", default="never_slower")
    arguments = parser.parse_args()
    target, _, precision = arguments.variant.partition(":")
    variant = Variant(find_target(target), precision)
    path = RESULTS / f"{arguments.name}.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"networks": []}
    known = {entry["seed"] for entry in document["networks"]}
    for seed in (seed for seed in range(arguments.networks) if seed not in known):
        with tempfile.TemporaryDirectory() as folder:
            entry = compare(seed, Path(folder), variant, arguments.seconds)
        document["networks"].append(entry)
        document |= {"variant": str(variant), "threads": 1, "batch": 1, "machine": machine(), **summary(document)}
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(seed, entry.get("speed_ups", "all one file"), file=sys.stderr, flush=True)
    print(json.dumps(summary(document), indent=1))


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """How often tuning won and lost; a loss is one that was measured twice."""
    found: dict[str, Any] = {}
    for other in ("nominal", "packed"):
        key = f"over {other}"
        entries = [entry for entry in document["networks"] if key in entry.get("speed_ups", {})]
        ratios = [entry["speed_ups"][key] for entry in entries]
        lost = [
            entry["seed"]
            for entry in entries
            if entry["speed_ups"][key]["high"] < 1 and entry.get("again", entry)["speed_ups"][key]["high"] < 1
        ]
        found[key] = {
            "same_file": len(document["networks"]) - len(entries),
            "faster": sum(ratio["low"] > 1 for ratio in ratios),
            "no_difference": sum(ratio["low"] <= 1 <= ratio["high"] for ratio in ratios),
            "seemed_slower_once": sum(ratio["high"] < 1 for ratio in ratios),
            "slower": lost,
            "median_speed_up": float(np.median([ratio["value"] for ratio in ratios])) if ratios else None,
        }
    return {"summary": found}


if __name__ == "__main__":
    main()
