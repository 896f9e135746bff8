"""The plots of the comparison and of the packing curves, from the committed results.

    python -m bench.plots

* ``latency_macs.svg``: latency against multiply-adds, batch 1, one thread, ONNX Runtime fp32, and the machine's limit;
* ``time_by_layer.svg``: where the time of a network goes, layer upon layer, beside the limit of each;
* ``packing.svg``: time of the 3×3 layers of ResNeXt by the width of the groups they run as, per processor, runtime and
  precision.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from bench.fit_costs import processor_name
from foldgroup.conv_shape import ConvShape
from foldgroup.tuning.database import read_export

RESULTS = Path(__file__).parent / "results"
MARKERS = {"training": "X", "shuffle": "v", "folded": "o", "packed": "s", "tuned": "D", "plain": "o"}
LAYERS = ("g_resnext50@32#0 folded", "g_resnext50@32#0 tuned", "g_resnext50@128#0 tuned", "resnext50_32x4d plain")
"""Whose layers are drawn; each in the first setting that profiled it."""
KINDS = ("stem", "pointwise", "3×3 in groups", "downsampling", "classifier", "all else")
CHANNELS = ((128, 56), (256, 28), (512, 14), (1024, 7))
"""Channels and extent of the 3×3 layers of ResNeXt-50 32×4d."""
HASH = "foldgroup"
Curves: TypeAlias = dict[tuple[int, int], list[tuple[int, float]]]
"""By channels and extent: width as run, and time over that of dense."""


def latency_macs(document: Mapping[str, Any]) -> plt.Figure:
    """A point for every network and form, from the first setting that timed it."""
    figure, axes = plt.subplots(figsize=(7.5, 5), constrained_layout=True)
    points: dict[tuple[str, str], tuple[float, float]] = {}
    for name, setting in document["settings"].items():
        if not name.endswith(" latency") or "#0" not in name:
            continue
        for subject, entry in setting["subjects"].items():
            network, _, form = subject.partition(" ")
            if form in MARKERS:
                points.setdefault((network, form), (entry["macs"] / 1e9, entry["median_ms"]))
    networks = sorted({network for network, _ in points}, key=lambda name: (name.partition("@")[0], len(name), name))
    for (network, form), (macs, ms) in points.items():
        colour = f"C{networks.index(network) % 10}"
        axes.plot(macs, ms, MARKERS[form], color=colour, markersize=6, alpha=0.8)
    rates = [
        limits["macs_per_ns"]
        for setting in document["settings"].values()
        for key, limits in setting.get("limits", {}).items()
        if key == "onnxruntime fp32"
    ]
    ends = [bound(macs for macs, _ in points.values()) for bound in (min, max)]
    axes.plot(ends, [macs * 1e3 / max(rates) for macs in ends], ":", color="black")
    handles = [plt.Line2D([], [], color=f"C{i % 10}", marker="o", linestyle="") for i in range(len(networks))]
    labels = [label(network) for network in networks]
    forms = [form for form in MARKERS if any(form == of for _, of in points) and form != "plain"]
    handles += [plt.Line2D([], [], color="grey", marker=MARKERS[form], linestyle="") for form in forms]
    handles += [plt.Line2D([], [], color="black", linestyle=":")]
    labels += [form if form != "folded" else "folded or plain" for form in forms] + ["dense rate of the machine"]
    axes.legend(handles, labels, fontsize="small", loc="lower right")
    axes.set(xlabel="multiply-adds of one image in 10⁹", ylabel="median latency in ms", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize="small")
    axes.grid(which="both", linewidth=0.3)
    axes.set_title("ONNX Runtime fp32, batch 1, one thread", fontsize="medium")
    return figure


def time_by_layer(profiles: Iterable[Mapping[str, Any]]) -> plt.Figure:
    """Two bars a network: its layers' times stacked from the input on, and below them their limits."""
    found: dict[str, list[list[Any]]] = {}
    for entry in profiles:
        if entry["subject"] in LAYERS:
            found.setdefault(entry["subject"], entry["layers"])
    figure, axes = plt.subplots(figsize=(9, 0.9 * len(found) + 1.4), constrained_layout=True)
    for row, layers in enumerate(found.values()):
        for column, shift, height in ((2, 0.0, 0.45), (3, 0.36, 0.22)):
            left = 0.0
            for layer in layers:
                kind = KINDS.index(kind_of(layer[0]))
                faint = 1.0 if column == 2 else 0.55
                ms = layer[column] / 1e3
                axes.barh(row + shift, ms, height, left, color=f"C{kind}", alpha=faint, edgecolor="white", lw=0.3)
                left += ms
    axes.set_yticks(range(len(found)), [label(name) for name in found])
    axes.invert_yaxis()
    axes.set_xlabel("ms; the lower bar of each is its limit")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(KINDS))]
    figure.legend(handles, KINDS, fontsize="small", ncols=len(KINDS), loc="outside lower center")
    return figure


def kind_of(layer: str) -> str:
    """The kind of a layer by its name in torchvision's ResNets."""
    last = layer.split(" + ")[0]
    if last.endswith("conv2"):
        return "3×3 in groups"
    if ".downsample" in last:
        return "downsampling"
    if last.endswith((".conv1", ".conv3")):
        return "pointwise"
    return {"conv1": "stem", "fc": "classifier"}.get(last, "all else")


def packing(results: Path = RESULTS) -> plt.Figure:
    """A row for every processor, a panel for every layer of ResNeXt: time over that of dense by the width as run."""
    drawn: dict[str, dict[str, Curves]] = defaultdict(dict)
    for path in sorted(results.glob("packing_*_*.json")):
        curves: Curves = {}
        found = read_export(path)
        for (_, shape), timings in found.items():
            if isinstance(shape, ConvShape) and shape.kernel == (3, 3) and shape.stride == (1, 1):
                runs = {e.groups: t.ns for e, t in timings.items() if e.parts == 1}
                widths = sorted((shape.in_channels // g, ns / runs[1]) for g, ns in runs.items())
                curves[shape.in_channels, shape.size[0]] = widths
        setting, _ = next(iter(found))
        drawn[processor_name(setting)][f"{setting.target} {setting.precision}"] = curves
    colours = {name: f"C{i}" for i, name in enumerate(sorted({name for row in drawn.values() for name in row}))}
    size = (12, 2.7 * len(drawn) + 0.5)
    figure, grid = plt.subplots(
        len(drawn), len(CHANNELS), figsize=size, sharex="col", sharey=True, squeeze=False, constrained_layout=True
    )
    for row, (processor, mine) in zip(grid, drawn.items(), strict=True):
        for axes, place in zip(row, CHANNELS, strict=True):
            for name, curves in mine.items():
                axes.plot(*zip(*curves[place], strict=True), color=colours[name], marker=".")
            axes.set_yscale("log")
            axes.set_xscale("log", base=2)
        row[0].set_ylabel(f"{processor}\ntime over that of dense")
    for (channels, extent), axes in zip(CHANNELS, grid[0], strict=True):
        axes.set_title(f"{channels} channels at {extent}×{extent}")
    for axes in grid[-1]:
        axes.set_xlabel("channels in a group as run")
    lines = [Line2D([], [], color=colour, marker=".", label=name) for name, colour in colours.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize="small")
    return figure


def label(subject: str) -> str:
    """A subject's name for people: "g_resnext50@32#0 tuned" is "G-ResNeXt-50, b = 32, tuned"."""
    network, _, form = subject.partition(" ")
    arch, _, rest = network.partition("@")
    name = arch.replace("g_resnext", "G-ResNeXt-").replace("resnext", "ResNeXt-").replace("resnet", "ResNet-")
    name = name.replace("_", " ")
    budget = f", b = {rest.partition('#')[0]}" if rest else ""
    return name + budget + (f", {form}" if form and form != "plain" else "")


def save(figure: plt.Figure, name: str, folder: Path = RESULTS) -> None:
    """The same bytes for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": HASH}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw them all."""
    save(latency_macs(json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))), "latency_macs")
    lines = (RESULTS / "compare_layers.jsonl").read_text(encoding="utf-8").splitlines()
    save(time_by_layer(map(json.loads, lines)), "time_by_layer")
    save(packing(), "packing")


if __name__ == "__main__":
    main()
