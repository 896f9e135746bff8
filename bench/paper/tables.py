"""The studies as Markdown: each of the paper's tables with our figures beside its own, and the claims."""

from __future__ import annotations

import math
import statistics
from typing import Any

from bench.paper.claims import claims, difference
from bench.paper.collecting import RESULTS, entries_of, read_document
from bench.paper.scales import PAPER_CARDINALITY, Scale
from bench.paper.studies import Point, Study, resnext, studies
from bench.paper.timing import median_ms


def markdown(scale: Scale, document: dict[str, Any]) -> str:
    """All of it."""
    lines = ["# The paper's studies, on CIFAR-10", "", *_setting(scale, document), "", "## What they show", ""]
    lines += ["| the paper says | here | verdict |", "| --- | --- | --- |"]
    for claim in claims(scale, document):
        lines.append(f"| {claim.claim} | {claim.found} | {claim.verdict or 'not run'} |")
    lines += ["", *(_latency(scale, document))]
    for study in sorted(studies(scale), key=lambda study: study.name):
        lines += [
            "",
            f"## Table {study.name.removeprefix('table')}: {study.title}",
            "",
            *_table(scale, document, study),
        ]
    lines += [
        "",
        "## Figures",
        "",
        f"![accuracy against multiply-adds and against measured latency]({scale.name}_pareto.svg)",
        "",
        f"![group counts by layer]({scale.name}_groups.svg)",
        "",
        f"![gates and group counts over training]({scale.name}_dynamics.svg)",
    ]
    return "\n".join(lines) + "\n"


def _setting(scale: Scale, document: dict[str, Any]) -> list[str]:
    """What was run, where and how."""
    runs = [entry for of in document["runs"].values() for entry in of.values()]
    hours = sum(entry["seconds"] for entry in runs) / 3600
    where, used = document.get("machine", {}), scale.config("", 0)
    kind = where.get("gpu") or f"{where.get('processor')}, {where.get('usable_cores')} cores"
    blocks = ", ".join(f"{n} × {scale.width << i} → {2 * scale.width << i}" for i, n in enumerate(scale.blocks))
    frozen = (
        f" Gates stop after {used.freeze_gates:.0%} of the epochs, once ζ ≤ o, which the paper does not do: so "
        "short a run would otherwise end with gates that still change sign."
        if used.freeze_gates < 1
        else ""
    )
    return [
        f"`python -m bench.paper train --scale {scale.name} --images CIFAR10`, then `latency` and `tables`: "
        f"{len(runs)} networks, {hours:.1f} hours of training processes in all, pauses included, on {kind}, "
        f"torch {where.get('torch')}. "
        "Seeds count from 0. **Ours are CIFAR-10 photographs as JPEG files and a network of "
        f"{sum(scale.blocks)} blocks ({blocks}), trained for {used.epochs} epochs; the paper's are ImageNet and "
        "50 or 101 layers. Compare differences, never the figures themselves.**",
        "",
        f"Batches of {used.batch_size}, SGD with momentum {used.momentum}, learning rate "
        f"{used.learning_rate} along a cosine, weight decay {used.weight_decay:g}, random crop and flip, "
        "a = −0.02. A tenth of the training images chooses the epoch that is kept; accuracy is that of the kept epoch "
        f"on the 10,000 test images. ResNeXt has {scale.cardinality} groups, so the paper's b are multiplied by "
        f"{scale.cardinality}/{PAPER_CARDINALITY}.{frozen}",
        "",
        "Tables give mean and range over seeds; differences are paired by seed, with the 95 % interval of their mean "
        "(Student's t). Given and learned groups are trained by the same code, from the same weights.",
    ]


def _table(scale: Scale, document: dict[str, Any], study: Study) -> list[str]:
    other = [f"paper's {study.other}"] if study.other else []
    head = ["here", "seeds", "top-1 %", "less ResNeXt", "GConv MACs", "all MACs", "parameters", "latency"]
    head += ["| paper (ImageNet)".removeprefix("| "), "paper's top-1 %", *other]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    base = entries_of(document, resnext(scale))
    for row in study.rows:
        cells = [row.point.name, *_cells(document, row.point, resnext(scale), base)]
        cells += [row.paper_name, "–" if math.isnan(row.paper_top1) else f"{row.paper_top1}"]
        cells += [row.paper_other] if other else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cells(document: dict[str, Any], point: Point, base: Point, base_runs: dict[int, dict[str, Any]]) -> list[str]:
    runs = entries_of(document, point)
    if not runs:
        return ["–"] * 7
    less = difference(document, point, base) if point.key != base.key else None
    ratios = [
        entry["group_conv_macs"] / base_runs[seed]["group_conv_macs"]
        for seed, entry in runs.items()
        if seed in base_runs
    ]
    times = [ms for entry in runs.values() if (ms := median_ms(entry)) is not None]
    return [
        str(len(runs)),
        _spread([entry["test_accuracy"] for entry in runs.values()], "{:.2f}"),
        "" if less is None else str(less),
        f"{statistics.fmean(ratios):.2f}×" if ratios else "",
        f"{statistics.fmean(entry['macs'] for entry in runs.values()) / 1e6:.2f} M",
        f"{statistics.fmean(entry['params'] for entry in runs.values()) / 1e3:.0f} k",
        f"{statistics.fmean(times):.3f} ms" if times else "",
    ]


def _spread(values: list[float], shown: str) -> str:
    mean = shown.format(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ({shown.format(min(values))}–{shown.format(max(values))})"


def _latency(scale: Scale, document: dict[str, Any]) -> list[str]:
    """What the paper did not measure: whether fewer multiply-adds are faster once folded and packed."""
    timed = [
        (entry["group_conv_macs"], entry["speed_up_over_resnext"])
        for row in next(study for study in studies(scale) if study.name == "table3").rows
        for entry in entries_of(document, row.point).values()
        if "speed_up_over_resnext" in entry
    ]
    if not timed:
        return []
    values = [ratio["value"] for _, ratio in timed]
    faster = sum(ratio["low"] > 1 for _, ratio in timed)
    slower = sum(ratio["high"] < 1 for _, ratio in timed)
    return [
        f"Folded, packed and timed beside ResNeXt (ONNX Runtime fp32, one thread, one image), the {len(timed)} "
        f"networks with learned groups of Table 3 are {min(values):.2f} to {max(values):.2f} times as fast: {faster} "
        f"faster beyond the interval, {slower} slower."
    ]


def main(scale: Scale) -> None:
    """Write the tables beside the results."""
    (RESULTS / f"{scale.name}.md").write_text(markdown(scale, read_document(scale)), encoding="utf-8")
