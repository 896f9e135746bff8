"""The studies as plots: the paper's Figures 2, 5 and 6, and accuracy against MACs and against measured latency."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.paper.collecting import RESULTS, entries_of, read_document
from bench.paper.scales import Scale
from bench.paper.studies import BUDGETS, Point, learned, resnext, studies
from bench.paper.timing import median_ms
from bench.plots import save

BASE = "ResNeXt50 32×4d"
PAPER = {
    BASE: (1.00, 77.9),
    "b = 32": (0.83, 78.4),
    "b = 48": (0.61, 78.2),
    "b = 64": (0.39, 78.0),
    "b = 96": (0.27, 78.0),
    "b = 128": (0.20, 77.8),
}
"""GConv FLOPs over ResNeXt-50's, and top-1 in percent on ImageNet (Table 3)."""


def pareto(scale: Scale, document: dict[str, Any]) -> plt.Figure:
    """Accuracy against MACs, as the paper shows it; against latency, which it does not; and the paper's own points."""
    figure, (by_macs, by_time, papers) = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    points = list(dict.fromkeys(row.point for study in studies(scale) for row in study.rows))
    known = [point for point in points if entries_of(document, point)]
    for number, point in enumerate(known):
        for axes, measure in ((by_macs, _macs), (by_time, median_ms)):
            _draw(axes, document, point, measure, f"C{number % 10}", "os^D"[number // 10])
    by_macs.set(xlabel="multiply-adds of one image in 10⁶, as folded", ylabel="top-1 in % (CIFAR-10)")
    by_time.set(xlabel="median latency in ms, folded and packed")
    for name, (ratio, top1) in PAPER.items():
        papers.plot(ratio, top1, "s" if name == BASE else "o", color="C0" if name == BASE else "C1")
        below = name == "b = 64"  # which is as high as b = 96
        papers.annotate(name, (ratio, top1), (4, -12 if below else 4), textcoords="offset points", fontsize="small")
    papers.set(
        xlabel="GConv FLOPs over ResNeXt-50's",
        ylabel="top-1 in % (ImageNet)",
        xlim=(0, 1.4),
        ylim=(77.7, 78.5),
    )
    papers.set_title("the paper's Table 3", fontsize="medium")
    by_macs.set_title("here, mean and range over seeds", fontsize="medium")
    by_time.set_title("here, by the clock", fontsize="medium")
    figure.legend(*by_macs.get_legend_handles_labels(), fontsize="x-small", ncols=5, loc="outside lower center")
    for axes in (by_macs, by_time, papers):
        axes.grid(linewidth=0.3)
    return figure


def _macs(entry: dict[str, Any]) -> float:
    return float(entry["macs"] / 1e6)


def _draw(
    axes: plt.Axes,
    document: dict[str, Any],
    point: Point,
    measure: Callable[[dict[str, Any]], float | None],
    colour: str,
    marker: str,
) -> None:
    runs = [
        (x, entry["test_accuracy"])
        for entry in entries_of(document, point).values()
        if (x := measure(entry)) is not None
    ]
    if not runs:
        return
    xs, ys = zip(*runs, strict=True)
    (x, across), (y, up) = _mean_and_range(xs), _mean_and_range(ys)
    errors = {"xerr": across, "yerr": up}
    axes.errorbar(x, y, fmt=marker, color=colour, markersize=5, elinewidth=0.8, label=point.name, **errors)


def _mean_and_range(values: Sequence[float]) -> tuple[float, list[list[float]]]:
    """The mean and how far the least and the greatest lie from it; of equal values it may be off in the last bit."""
    mean = min(max(statistics.fmean(values), min(values)), max(values))
    return mean, [[mean - min(values)], [max(values) - mean]]


def groups(scale: Scale, document: dict[str, Any]) -> plt.Figure:
    """Group count by layer for each budget, a thin line a seed and a thick one for their mean (Figures 2 and 5)."""
    figure, grid = plt.subplots(1, len(BUDGETS), figsize=(13, 3.2), sharey=True, constrained_layout=True)
    for axes, paper_b in zip(grid, BUDGETS, strict=True):
        runs = list(entries_of(document, learned(scale, paper_b)).values())
        for entry in runs:
            axes.plot(entry["groups"], "o-", color="C1", alpha=0.35, linewidth=1, markersize=3)
        if runs:
            means = [statistics.geometric_mean(counts) for counts in zip(*(e["groups"] for e in runs), strict=True)]
            axes.plot(means, color="C1", linewidth=2)
            axes.set_xticks(range(len(means)), [str(c) for c in runs[0]["channels"]])
        axes.axhline(scale.cardinality, color="C0", linestyle="--", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(title=f"b = {scale.b(paper_b):g} (the paper's {paper_b})", xlabel="channels of the layer")
        axes.grid(linewidth=0.3)
    grid[0].set_ylabel("groups; dashed: ResNeXt")
    return figure


def dynamics(document: dict[str, Any]) -> plt.Figure:
    """Groups and gates of every layer over training, b = 32 of the paper, seed 0 (Figure 6)."""
    told = document["dynamics"]
    layers = told["layers"]
    figure, grid = plt.subplots(
        2, len(layers), figsize=(2.6 * len(layers), 5), sharex=True, sharey="row", constrained_layout=True
    )
    for column, (name, layer) in enumerate(layers.items()):
        grid[0][column].step(told["epochs"], layer["groups"], where="post", color="C1")
        grid[0][column].set_yscale("log", base=2)
        grid[0][column].yaxis.set_major_formatter("{x:g}")
        grid[0][column].set_title(name, fontsize="medium")
        grid[1][column].plot(told["epochs"], layer["gates"], linewidth=1)
        grid[1][column].axhline(0, color="black", linewidth=0.6)
        grid[1][column].set_xlabel("epoch")
    grid[0][0].set_ylabel("groups")
    grid[1][0].set_ylabel("gates")
    return figure


def main(scale: Scale) -> None:
    """Draw what the results hold."""
    document = read_document(scale)
    if resnext(scale).key in document["runs"]:
        save(pareto(scale, document), f"{scale.name}_pareto", RESULTS)
        save(groups(scale, document), f"{scale.name}_groups", RESULTS)
    if "dynamics" in document:
        save(dynamics(document), f"{scale.name}_dynamics", RESULTS)
