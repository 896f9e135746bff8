"""Packing curves on a GPU: every 3×3 of G-ResNeXt-50 and -101, from depthwise to dense, through cuDNN and inductor.

    python -m bench.gpu_packing                       # everything, resumable; results/gpu_packing.json and .svg
    python -m bench.gpu_packing --seconds 500         # as much as that, the most telling first
    python -m bench.gpu_packing --plot-only

Both networks have the same distinct 3×3 layers. Each is run in float16 with bias and ReLU, for batches of 1, 8, 64 and
256 and both memory layouts, as g = C, C/2, … 1 groups. A sample is the mean of :data:`LAUNCHES` launches, recorded
once as a CUDA graph so that the host's share is left out, between two CUDA events; the group counts of one layer are
sampled in turn, in an order drawn anew each round. Beside them stand this GPU's copy bandwidth and dense rate, and the
time that a layer's bytes and multiply-adds must take by these.

``--device cpu --dtype float32`` runs the same code without a GPU, to test it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from foldgroup.conv_shape import ConvShape
from foldgroup.measure import Measurement, machine

RESULTS = Path(__file__).parent / "results"
LAUNCHES, ROUNDS = 20, 15
BATCHES = (1, 64, 8, 256)
"""One image and a full batch first: what a run that is cut short should hold."""
LAYOUTS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
LAYERS = ((128, 56, 1), (256, 56, 2), (256, 28, 1), (512, 28, 2), (512, 14, 1), (1024, 14, 2), (1024, 7, 1))
"""Channels, size of the input and stride."""


def shape_of_layer(channels: int, size: int, stride: int) -> ConvShape:
    """A 3×3 with as many groups as channels."""
    return ConvShape(channels, channels, channels, (3, 3), (stride, stride), (1, 1), (1, 1), (size, size))


def layer(shape: ConvShape, device: str, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    """The convolution with its ReLU; weights are random."""
    conv = nn.Conv2d(
        shape.in_channels,
        shape.out_channels,
        shape.kernel,
        shape.stride,
        shape.padding,
        groups=shape.groups,  # type: ignore[arg-type]
    )
    network = nn.Sequential(conv, nn.ReLU()).eval().requires_grad_(False)
    return network.to(device=device, dtype=dtype, memory_format=layout)


def sampler(call: Callable[[], object], device: str, launches: int) -> Callable[[], float]:
    """A function that gives the milliseconds of one call, the mean of ``launches``."""
    if device == "cpu":

        def sample() -> float:
            start = perf_counter()
            for _ in range(launches):
                call()
            return (perf_counter() - start) * 1e3 / launches

        return sample
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # a graph is recorded on a stream that has run the kernels before
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / launches

    return sample


def measure(samplers: Mapping[str, Callable[[], float]], rounds: int) -> Measurement:
    """Sample each in turn, in a fresh order every round."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order, shuffle = list(samplers), random.Random(0).shuffle
    for sample in samplers.values():
        sample()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return Measurement({name: tuple(times) for name, times in samples.items()})


@torch.inference_mode()
def limits(device: str, dtype: torch.dtype, size: int) -> dict[str, float]:
    """The greatest rates measured: bytes read and written per ns by a copy, multiply-adds per ns by a product."""
    source = torch.ones(size * size * 8, device=device, dtype=dtype)
    target, square = torch.empty_like(source), torch.ones(size, size, device=device, dtype=dtype)
    copied = sampler(lambda: target.copy_(source), device, 5)
    product = sampler(lambda: torch.mm(square, square), device, 5)
    best = {name: min(sample() for _ in range(10)) * 1e6 for name, sample in (("copy", copied), ("mm", product))}
    moved = 2 * source.numel() * source.element_size()
    return {"bytes_per_ns": moved / best["copy"], "macs_per_ns": size**3 / best["mm"]}


def curve(
    shape: ConvShape, batch: int, layout: str, compiler: str, device: str, dtype: torch.dtype, rounds: int
) -> list[dict[str, float]]:
    """The times of every group count; what the library refuses is left out with its reason."""
    torch.manual_seed(0)
    found: dict[str, Callable[[], float]] = {}
    refused: list[dict[str, Any]] = []
    images = torch.randn(batch, shape.in_channels, *shape.size, device=device, dtype=dtype)
    images = images.to(memory_format=LAYOUTS[layout])
    for execution in (e for e in shape.executions if e.parts == 1):
        network = layer(shape.run_as(execution.groups), device, dtype, LAYOUTS[layout])
        run: Callable[[Tensor], Tensor] = network
        if compiler == "inductor":
            torch.compiler.reset()
            run = torch.compile(network, mode="max-autotune-no-cudagraphs", dynamic=False)
        try:
            run(images)
            found[str(execution.groups)] = sampler(lambda run=run: run(images), device, LAUNCHES)
        except Exception as error:  # libraries raise what they like
            refused.append({"runs": execution.groups, "refused": str(error).strip().split("\n")[-1]})
    if not found:
        return refused
    measured = measure(found, rounds)
    fastest = min(found, key=lambda name: measured.stats(name).median_ms)
    entries: list[dict[str, Any]] = []
    for name in found:
        ratio, stats = measured.ratio(name, fastest), measured.stats(name)
        base = measured.stats(fastest).median_ms * 1e6
        entries.append(
            {"runs": int(name), "ns": stats.median_ms * 1e6, "low": ratio.low * base, "high": ratio.high * base}
        )
    return entries + refused


@torch.inference_mode()
def run(arguments: argparse.Namespace, path: Path) -> None:
    """Measure what the file does not hold yet, saving after every curve."""
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    torch.backends.cudnn.benchmark = True
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"curves": []}
    known = {_key(entry) for entry in document["curves"]}
    document |= {"machine": machine(), "dtype": arguments.dtype, "cudnn": torch.backends.cudnn.version()}
    document["limits"] = limits(arguments.device, dtype, arguments.square)
    end = perf_counter() + arguments.seconds
    for setting in settings(arguments):
        if _key(setting) in known:
            continue
        if perf_counter() > end:
            raise SystemExit(f"{path} is not complete: run it again to go on")
        shape = shape_of_layer(*setting["layer"])
        at = (setting["batch"], setting["layout"], setting["compiler"], arguments.device, dtype, arguments.rounds)
        document["curves"].append({**setting, "candidates": curve(shape, *at)})
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(setting, file=sys.stderr, flush=True)


def settings(arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """What there is to measure: what compiles at once first, then by batch."""
    for compiler in arguments.compiler or ("cudnn", "inductor"):
        for batch in arguments.batch or BATCHES:
            for layout in LAYOUTS:
                for of_layer in LAYERS[: arguments.layers]:
                    yield {"layer": list(of_layer), "batch": batch, "layout": layout, "compiler": compiler}


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*entry["layer"], entry["batch"], entry["layout"], entry["compiler"])


def bound_ns(entry: Mapping[str, Any], groups: int, rates: Mapping[str, float], value_bytes: int) -> float:
    """The time that a layer's bytes and multiply-adds must take when it runs as ``groups`` groups."""
    shape = shape_of_layer(*entry["layer"]).run_as(groups)
    moved = value_bytes * (entry["batch"] * shape.values + shape.weights)
    return max(moved / rates["bytes_per_ns"], entry["batch"] * shape.macs / rates["macs_per_ns"])


def plot(document: Mapping[str, Any], path: Path) -> None:
    """One panel a layer and batch: time by group width, a line for each compiler and layout, and the limit."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    layers = sorted({tuple(entry["layer"]) for entry in document["curves"]}, key=lambda item: (item[0], -item[1]))
    batches = sorted({entry["batch"] for entry in document["curves"]})
    figure, grid = plt.subplots(
        len(layers), len(batches), figsize=(3.2 * len(batches), 2.4 * len(layers)), squeeze=False
    )
    value_bytes = torch.empty(0, dtype=getattr(torch, document["dtype"])).element_size()
    for row, of_layer in enumerate(layers):
        for column, batch in enumerate(batches):
            axes = grid[row][column]
            mine = [e for e in document["curves"] if tuple(e["layer"]) == of_layer and e["batch"] == batch]
            for entry in mine:
                points = sorted((of_layer[0] // c["runs"], c["ns"] / 1e3) for c in entry["candidates"] if "ns" in c)
                style = "-" if entry["compiler"] == "cudnn" else "--"
                label = f"{entry['compiler']}, {entry['layout'].replace('_', ' ')}"
                axes.plot([p[0] for p in points], [p[1] for p in points], style, marker=".", label=label)
            if mine:
                widths = [2**k for k in range(int(math.log2(of_layer[0])) + 1)]
                lowest = [bound_ns(mine[0], of_layer[0] // w, document["limits"], value_bytes) / 1e3 for w in widths]
                axes.plot(widths, lowest, ":", color="black", label="limit")
            axes.set(xscale="log", yscale="log", title=f"{of_layer[0]} channels at {of_layer[1]}², batch {batch}")
            axes.set_xlabel("channels in a group as run")
            axes.set_ylabel("µs")
    grid[0][0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--compiler", choices=("cudnn", "inductor"), action="append")
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="so many of them")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no curve is begun")
    parser.add_argument(
        "--square", type=int, default=8192, help="side of the product that the dense rate is taken from"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot-only", action="store_true")
    arguments = parser.parse_args()
    path = arguments.out / "gpu_packing.json"
    if not arguments.plot_only:
        run(arguments, path)
    plot(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
