"""The charts of a bundle's page, from its documents."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from foldgroup.equivalence import HISTOGRAM_FROM
from foldgroup.report.svg import path, rect, svg, text

WIDTH = 680.0
LABEL = 24
"""Characters of a layer's name beside its bar; of a longer one the end is shown."""
ROWS = 24
"""Bars in one drawing, at most."""
Layers = Sequence[Mapping[str, Any]]


def groups_chart(layers: Layers) -> str:
    """Learned groups of every layer as bars over depth, on a log₂ axis; what runs as marks."""
    top = max(1, math.ceil(math.log2(max(layer["groups"] for layer in layers))))
    left, height, step = 34.0, 190.0, (WIDTH - 40) / len(layers)
    scale = (height - 30) / top
    body = []
    for power in range(top + 1):
        y = height - power * scale
        body += [path([(left, y), (WIDTH, y)], "line"), text(left - 6, y + 4, str(2**power), "end", "soft")]
    before, free = None, 0.0
    for i, layer in enumerate(layers):
        x = left + i * step
        tall = max(2.0, math.log2(layer["groups"]) * scale)
        words = f"{layer['name']}: {layer['groups']} groups learned, {layer['executed_groups']} run"
        body.append(rect(x + step * 0.15, height - tall, step * 0.7, tall, "one", words))
        y = height - math.log2(max(layer["executed_groups"], 1)) * scale
        body.append(path([(x + step * 0.05, y), (x + step * 0.95, y)], "mark"))
        if layer["out_channels"] != before and x >= free:
            before, free = layer["out_channels"], x + 34
            body.append(text(x + 2, height + 16, f"{before}", "start", "soft"))
    body.append(text(left, height + 32, "channels of the layer, from the input to the output", "start", "soft"))
    return svg(WIDTH, height + 38, "groups learned and run, by layer", body)


def histogram(name: str, counts: Sequence[int]) -> str:
    """Errors by decade, as shares."""
    step, height, total = 34.0, 70.0, max(sum(counts), 1)
    body = []
    for i, count in enumerate(counts):
        tall = height * count / max(*counts, 1)
        power = HISTOGRAM_FROM + i
        body.append(rect(i * step + 2, height - tall, step - 4, tall, "one", f"{count / total:.2%} below 1e{power}"))
        label = "≥1" if i == len(counts) - 1 else f"1e{power}"
        body.append(text(i * step + step / 2, height + 14, label, "middle", "soft"))
    body.append(text(0, height + 30, "errors below, of the largest output", "start", "soft"))
    return svg(step * len(counts), height + 36, f"errors of {name} by decade", body)


def kinds_bar(profile: Mapping[str, Any], learned: set[str]) -> str:
    """The time of a network by kind of layer, stacked, over the limit of each kind."""
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer in profile["layers"]:
        kind = "learned groups" if layer["name"] in learned else str(layer["kind"])
        times[kind][0] += layer["us"]
        times[kind][1] += layer["limit_us"]
    total = sum(us for us, _ in times.values()) or 1.0
    ranked = sorted(times.items(), key=lambda item: -item[1][0])
    body, y = [], 0.0
    for i, (kind, (us, limit)) in enumerate(ranked[:8]):
        y = i * 26.0
        body.append(text(0, y + 15, kind))
        body.append(rect(150, y + 3, 380 * us / total, 16, "one", _took(us)))
        x = 150 + 380 * limit / total
        body.append(path([(x, y), (x, y + 22)], "mark"))
        end = 156 + 380 * max(us, limit) / total
        body.append(text(end, y + 15, f"{_took(us)}, {us / total:.0%}", kind="soft"))
    return svg(WIDTH, y + 28, "time by kind of layer, and its limit", body)


def _took(us: float) -> str:
    return f"{us:.0f} µs" if us < 1000 else f"{us / 1e3:.2f} ms"


def layer_bars(layers: Layers) -> str:
    """The time of every layer as a bar, the least it could take as a mark; in drawings that fit on paper."""
    longest = max((max(layer["us"], layer["limit_us"]) for layer in layers), default=1.0) or 1.0
    return "".join(_bars(layers[i : i + ROWS], longest) for i in range(0, len(layers), ROWS))


def _bars(layers: Layers, longest: float) -> str:
    body = []
    for i, layer in enumerate(layers):
        y = i * 18.0
        name = str(layer["name"])
        body.append(text(206, y + 12, name if len(name) <= LABEL else f"…{name[1 - LABEL :]}", "end"))
        body.append(rect(212, y + 2, 380 * layer["us"] / longest, 12, "one", f"{name}: {layer['us']:.0f} µs"))
        x = 212 + 380 * layer["limit_us"] / longest
        body.append(path([(x, y), (x, y + 16)], "mark"))
        end = 218 + 380 * max(layer["us"], layer["limit_us"]) / longest
        body.append(text(end, y + 12, f"{layer['us']:.0f}", kind="soft"))
    return svg(WIDTH, 18.0 * len(layers) + 4, "time of every layer in µs, and its limit", body)


def packing_curve(layer: Mapping[str, Any]) -> str:
    """What one layer takes by the groups that it runs as, both axes logarithmic; what runs is marked."""
    points = sorted((c["runs"], c["ns"]) for c in layer["candidates"] if c["parts"] == 1)
    width, height = 210.0, 96.0
    if len(points) < 2:
        return ""
    low, high = (math.log(extreme(ns for _, ns in points)) for extreme in (min, max))
    first, last = math.log2(points[-1][0]), math.log2(points[0][0])
    left, top, bottom = 58.0, 10.0, 54.0

    def place(runs: int, ns: float) -> tuple[float, float]:
        across = (first - math.log2(runs)) / max(first - last, 1)
        return left + across * (width - left - 12), bottom - (bottom - top) * (math.log(ns) - low) / max(
            high - low, 1e-9
        )

    ends = {bottom: math.exp(low), top: math.exp(high)}
    body = [text(left - 10, y + 4, f"{_us(ns)} µs", "end", "soft") for y, ns in ends.items()]
    body.append(path([place(*point) for point in points]))
    for runs, ns in points:
        x, y = place(runs, ns)
        chosen = runs == layer["runs"] and layer["parts"] == 1
        size = 9.0 if chosen else 5.0
        kind = "two" if chosen else "one"
        body.append(rect(x - size / 2, y - size / 2, size, size, kind, f"{runs} groups: {_us(ns)} µs"))
        body.append(text(x, height - 20, str(runs), "middle", "soft") if len(points) <= 7 or chosen else "")
    body.append(text((left + width - 12) / 2, height - 4, "groups that run", "middle", "soft"))
    return svg(width, height, f"times of {layer.get('shape', layer['name'])}", body)


def _us(ns: float) -> str:
    return f"{ns / 1e3:.0f}" if ns >= 9950 else f"{ns / 1e3:.1f}"
