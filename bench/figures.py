"""Write the README's figures from the committed results, so that none is typed by hand.

``python -m bench.figures`` rewrites the text between the two markers; a test checks that it is up to date.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from bench.growth import exponents
from bench.paper.claims import claims
from bench.paper.collecting import read_document
from bench.paper.scales import SCALES
from bench.plots import label

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
OTHERS = ("its training form", "its shuffle form", "its folded form", "ResNeXt", "tuned ResNeXt", "ResNet")
START, END = "<!-- figures: python -m bench.figures -->", "<!-- end of figures -->"


def figures() -> str:
    """The Markdown between the markers."""
    compare, compiles = _read(RESULTS / "compare.json"), _read(RESULTS / "compile_time.json")
    lines = [_where(compare["machine"]), "", *_comparison(compare["settings"]), ""]
    lines += [*_throughput(compare["settings"]), *_precisions(compare["settings"]), ""]
    for path in sorted(RESULTS.glob("compare_*.json")):
        elsewhere = _read(path)
        lines += [f"On {_cpu(elsewhere['machine'])} ([more]({path.relative_to(ROOT).with_suffix('.md')})):", ""]
        lines += [*_latency(elsewhere["settings"]), ""]
        lines += [*_throughput(elsewhere["settings"]), *_precisions(elsewhere["settings"]), ""]
    lines += [*_compiling(compiles), ""]
    grown = _read(RESULTS / "growth.json")
    for name, runs in grown["series"].items():
        steepest = {key: max(exponents(runs, key)) for key in ("wall_seconds", "peak_rss_bytes")}
        lines.append(
            f"- Compiling networks of {runs[0]['weights'] / 1e6:.1f} to {runs[-1]['weights'] / 1e6:.0f} million "
            f"weights, more with {name}, takes time that grows as a power of at most {steepest['wall_seconds']:.2f} of "
            f"the weights, and memory of {steepest['peak_rss_bytes']:.2f} ([growth.md](bench/results/growth.md))."
        )
    lines += [_studies(read_document(SCALES[path.stem])) for path in sorted((RESULTS / "paper").glob("*.json"))]
    for path in sorted(RESULTS.glob("targets_*.json")):
        lines += ["", *_targets(_read(path))]
    engines = RESULTS / "engines.json"
    if engines.is_file():
        lines += ["", *_engines(_read(engines))]
    return "\n".join(lines)


def _studies(document: dict[str, Any]) -> str:
    """How the paper's claims fared at a scale."""
    scale = SCALES[document["scale"]["name"]]
    found = Counter(claim.verdict for claim in claims(scale, document) if claim.verdict is not None)
    seconds = sum(entry["seconds"] for runs in document["runs"].values() for entry in runs.values())
    return (
        f"- Of {found.total()} claims of the paper that were tried on CIFAR-10, with networks of "
        f"{sum(scale.blocks)} blocks, {scale.config('', 0).epochs} epochs and at most {scale.seeds} seeds "
        f"({seconds / 3600:.1f} hours of training processes, pauses included), {found['supported']} are supported, "
        f"{found['contradicted']} contradicted, and {found['open']} cannot be told at this scale "
        f"([{scale.name}.md](bench/results/paper/{scale.name}.md))."
    )


def _compiling(document: dict[str, Any]) -> list[str]:
    """What compiling takes, and its longest steps."""
    lines = [
        f"From a checkpoint to a verified bundle, in a fresh process, on {_cpu(document['machine'])}:",
        "",
        "| network | to | seconds (range) | memory | shuffles inserted, kept | float64 error | longest steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in document["runs"]:
        around = run["wall_seconds"] - sum(run["step_seconds"].values())
        steps = {**run["step_seconds"], "importing torch and writing files": around}
        longest = sorted(steps.items(), key=lambda item: -item[1])[:4]
        row = [label(run["arch"]), "ONNX, engine for three GPUs" if run["engines"] else "ONNX"]
        every = run["wall_seconds_all"]
        row += [f"{run['wall_seconds']:.1f} ({every[0]:.1f}–{every[-1]:.1f})", f"{run['peak_rss_bytes'] / 1e9:.1f} GB"]
        row += [f"{run['shuffles_inserted']}, {run['shuffles_kept']}", f"{run['float64_max_error']:.0e}"]
        row += [", ".join(f"{name} {seconds:.1f} s" for name, seconds in longest)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _comparison(settings: dict[str, Any]) -> list[str]:
    """The tuned network against every other form and the baselines, a row for each network; then the spread."""
    lines = ["Times as fast as … the tuned network is (95 % interval), ONNX Runtime fp32, one thread, batch 1:", ""]
    lines += _latency(settings)
    lines += ["", f"Over {_seeds(settings, 'g_resnext50@32')[0]} seeds of gates, median and range:", ""]
    for b in (32, 128):
        _, found = _seeds(settings, f"g_resnext50@{b}")
        spread = (
            f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f}) {other}"
            for other, values in found.items()
        )
        lines.append(f"- b = {b}: {', '.join(spread)}.")
    lines += ["", "Gates are random, with fewer groups in low layers and as many ones in all masks as b uniform groups"]
    return [*lines, "leave; a ratio below 1 means that the tuned network is slower."]


def _latency(settings: dict[str, Any]) -> list[str]:
    """A row for each network that was timed with its limit."""
    lines = [
        f"| tuned network | ms | of its limit | {' | '.join(OTHERS)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in OTHERS)} |",
    ]
    for name, setting in settings.items():
        if "limits" in setting and name.endswith("#0 latency"):
            network = name.partition(" ")[0]
            tuned = setting["subjects"][f"{network} tuned"]
            found = {_other(entry["over"]): entry for entry in setting["speed_ups"]}
            row = [label(network), f"{tuned['median_ms']:.1f}", f"{tuned['fraction']:.0%}"]
            row += [_ratio(found.get(other)) for other in OTHERS]
            lines.append(f"| {' | '.join(row)} |")
    return lines


def _throughput(settings: dict[str, Any]) -> list[str]:
    """A line for each setting of several images or threads: how fast the tuned network is, and than what."""
    lines = []
    for setting in settings.values():
        if setting["batch"] > 1 and setting["speed_ups"]:
            tuned = setting["speed_ups"][0]["of"]
            found = {_other(entry["over"]): entry for entry in setting["speed_ups"]}
            than = [f"{_ratio(found[other], 2)} times {other}" for other in OTHERS if other in found]
            lines.append(
                f"- {label(tuned)}, batch {setting['batch']}, {setting['threads']} thread"
                f"{'s' * (setting['threads'] > 1)}: {setting['subjects'][tuned]['images_per_second']:.1f} images/s, "
                f"{', '.join(than)}."
            )
    return lines


def _precisions(settings: dict[str, Any]) -> list[str]:
    """A line for each network: how much faster it is tuned for other runtimes and precisions than for the first."""
    lines = []
    for name, setting in settings.items():
        ratios = {(entry["of"], entry["over"]): entry for entry in setting["speed_ups"]}
        first = f"{name.partition(' ')[0]} tuned"
        others = [
            subject
            for subject in setting["subjects"]
            if subject.startswith(f"{first}, ") and (subject, first) in ratios
        ]
        if name.endswith(" precisions") and others:
            than = [f"{other.partition(', ')[2]} {_ratio(ratios[other, first])} times as fast" for other in others]
            lines.append(f"- {label(first)}, batch 1, 1 thread, against onnxruntime fp32: {', '.join(than)}.")
    return lines


def _seeds(settings: dict[str, Any], network: str) -> tuple[int, dict[str, list[float]]]:
    """How many settings time ``network`` with gates of some seed, and in each the tuned network's speed-ups."""
    mine = [setting for name, setting in settings.items() if re.fullmatch(rf"{network}#\d+ latency", name)]
    found: dict[str, list[float]] = {}
    for setting in mine:
        for entry in setting["speed_ups"]:
            if _other(entry["over"]) in OTHERS:
                found.setdefault(_other(entry["over"]), []).append(entry["value"])
    return len(mine), {other: values for other, values in found.items() if len(values) == len(mine)}


def _other(subject: str) -> str:
    """What the tuned network is compared with, in a column's words."""
    network, _, form = subject.partition(" ")
    if "@" in network:
        return f"its {form} form"
    family = label(network).partition("-")[0]
    return family if form == "plain" else f"{form} {family}"


def _ratio(entry: dict[str, float] | None, digits: int = 3) -> str:
    """With its 95 % interval; nothing if it was not measured."""
    if not entry:
        return ""
    value, low, high = (f"{entry[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def _targets(document: dict[str, Any]) -> list[str]:
    """The folded form on every target and in every precision, against the first; one interleaved run."""
    _, _, height, width = document["input_shape"]
    folded = [subject for subject in document["subjects"] if subject["kind"] == "folded form"]
    accuracy = document["verification"]["accuracy"]
    known = next(iter(accuracy.values()))["images"] if accuracy else 0
    head = ["runs on", "median ms", "times as fast as the first (95 % interval)", "file"]
    head += [f"top-1 of {known:,} test images"] if known else []
    lines = [
        f"{document['checkpoint']['arch']}, {height}×{width}, folded form, {document['threads']} thread, "
        f"batch {document['batch']}, {document['machine'].get('gpu') or _cpu(document['machine'])}:",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
    ]
    ratios = {entry["subject"]: entry for entry in document["speed_ups"]}
    for number, subject in enumerate(folded):
        ratio = ratios[subject["name"]] if number else None
        row = [subject["runs_on"], f"{subject['median_ms']:.2f}"]
        row += [_ratio(ratio, 2)]
        row += [f"{subject['file_bytes'] / 1e6:.1f} MB"]
        if known:
            row += [f"{accuracy[subject['runs_on']]['top1']:.2%}"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _engines(document: dict[str, Any]) -> list[str]:
    """Build seconds and sizes of TensorRT-RTX's plans."""
    gpus = ", ".join(document["compute_capabilities"])
    entries = document["engines"]
    builder = entries[0]["builder"].replace("_", "-")
    lines = [
        f"{builder} engines, each one plan for {gpus}, dynamic batch, built with no GPU on {_cpu(document['machine'])} "
        "(not yet run on one):",
        "",
        "| network | precision | build s | plan | ONNX |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        if isinstance(entry["batch"], list):
            sizes = f"{entry['plan_bytes'] / 1e6:.1f} MB | {entry['onnx_bytes'] / 1e6:.1f} MB"
            lines.append(f"| {entry['network']} | {entry['precision']} | {entry['seconds']:.1f} | {sizes} |")
    return lines


def readme_with(text: str, readme: str) -> str:
    """The README with ``text`` between its markers."""
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n\n{text}\n\n{END}{tail}"


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _where(machine: dict[str, Any]) -> str:
    return f"Measured on {_cpu(machine)}:"


def _cpu(machine: dict[str, Any]) -> str:
    return f"{machine['processor']}, {machine['usable_cores']} cores ({', '.join(machine['isa'])})"


def main() -> None:
    """Rewrite the README in place."""
    readme = ROOT / "README.md"
    readme.write_text(readme_with(figures(), readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
