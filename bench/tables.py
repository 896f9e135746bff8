"""The comparison as Markdown, from the committed result of each processor.

python -m bench.tables
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.plots import LAYERS, kind_of, label

RESULTS = Path(__file__).parent / "results"


def markdown(document: Mapping[str, Any]) -> str:
    """A table for every setting."""
    machine = document["machine"]
    lines = ["# The comparison", ""]
    lines += [
        f"By `python -m bench.compare` on {machine['processor']}, {machine['usable_cores']} cores, "
        f"{', '.join(machine['isa'])}; ONNX Runtime {machine['onnxruntime']}. Gates are synthetic: random, at exactly "
        "the budget b. *Speed-up* is the median time of the subject over that of the setting's tuned network (bold), "
        "with a 95 % interval; above 1 the tuned network is faster. *Limit* is what the machine must take for the "
        "subject's multiply-adds and bytes, and the share of the time that is.",
        "",
    ]
    for name, setting in document["settings"].items():
        lines += ["", f"## {name}", "", *_setting(setting)]
    return "\n".join(lines) + "\n"


def where_it_goes(profiles: Iterable[Mapping[str, Any]], subjects: Collection[str]) -> list[str]:
    """For each of ``subjects``: time, limit and the difference by kind of layer and extent, the largest loss first."""
    lines = ["", "# Where the time goes", ""]
    lines += ["Measured time, limit and what lies between them, by kind of layer and stage; one thread, batch 1."]
    for name, layers in {e["subject"]: e["layers"] for e in reversed(list(profiles))}.items():
        if name not in subjects:
            continue
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for layer, _, us, limit_us in layers:
            stage = re.match(r"layer\d", layer)
            place = sums[kind_of(layer), stage[0] if stage else ""]
            place[0] += us / 1e3
            place[1] += limit_us / 1e3
        total = [sum(place[i] for place in sums.values()) for i in (0, 1)]
        lines += [
            "",
            f"## {label(name)}",
            "",
            "| layers | ms | limit | reached | lost ms |",
            "| --- | --- | --- | --- | --- |",
        ]
        rows = [(" ".join(filter(None, place)), *values) for place, values in sums.items()]
        rows.sort(key=lambda row: row[2] - row[1])
        for what, ms, limit in [*rows, ("all", *total)]:
            lines.append(f"| {what} | {ms:.2f} | {limit:.2f} | {limit / ms:.0%} | {ms - limit:.2f} |")
    return lines


def _setting(setting: Mapping[str, Any]) -> list[str]:
    subjects = setting["subjects"]
    mains = list(dict.fromkeys(entry["of"] for entry in setting["speed_ups"]))
    batch = setting["batch"]
    head = ["subject", "median ms", "p90"] + (["images/s"] if batch > 1 else [])
    head += [f"speed-up of {label(main)}" for main in mains]
    head += ["MACs", "weights", "file", "peak memory", "compile", "limit"]
    lines = [f"Batch {batch}, {setting['threads']} thread{'s' * (setting['threads'] > 1)}.", ""]
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    ratios = {(entry["of"], entry["over"]): entry for entry in setting["speed_ups"]}
    for name, entry in sorted(subjects.items(), key=lambda item: item[1]["median_ms"]):
        row = [f"**{label(name)}**" if name in mains else label(name)]
        row += [f"{entry['median_ms']:.2f}", f"{entry['p90_ms']:.2f}"]
        row += [f"{entry['images_per_second']:.1f}"] if batch > 1 else []
        row += [_interval(ratios.get((main, name))) for main in mains]
        row += [_scaled(entry.get("macs"), 1e9, "G", 2), _scaled(entry.get("params"), 1e6, "M")]
        row += [_scaled(entry.get("file_bytes"), 1e6, "MB"), _scaled(entry.get("peak_bytes"), 1e6, "MB", 0)]
        row += [_scaled(entry.get("compile_seconds"), 1, "s")]
        row += [f"{entry['limit_ms']:.2f} ms, {entry['fraction']:.0%}" if "limit_ms" in entry else ""]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _interval(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['value']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"


def _scaled(value: float | None, scale: float, unit: str, digits: int = 1) -> str:
    return "" if value is None else f"{value / scale:.{digits}f} {unit}"


def main() -> None:
    """Write the tables beside the result of each processor."""
    for path in sorted(RESULTS.glob("compare*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        layers = path.with_name(f"{path.stem}_layers.jsonl")
        profiles = map(json.loads, layers.read_text(encoding="utf-8").splitlines() if layers.is_file() else ())
        lines = where_it_goes(profiles, LAYERS)
        path.with_suffix(".md").write_text(markdown(document) + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
