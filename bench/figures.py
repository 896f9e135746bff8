"""Write the README's figures from the committed results, so that none is typed by hand.

``python -m bench.figures`` rewrites the text between the two markers; a test checks that it is up to date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
START, END = "<!-- figures: python -m bench.figures -->", "<!-- end of figures -->"


def figures() -> str:
    """The Markdown between the markers."""
    latency = [_read(path) for path in sorted(RESULTS.glob("latency_*.json"))]
    compiles = _read(RESULTS / "compile_time.json")
    lines = [_where(latency[0]["machine"]), ""]
    lines += ["| network | MACs | FLOPs | parameters | median ms | folded form's speed-up (95 % interval) |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for document in latency:
        over = {entry["over"]: entry for entry in document["speed_ups"]}
        for subject in document["subjects"]:
            name = subject["name"]
            arch = document["checkpoint"]["arch"]
            label = f"**{arch}, {name}**" if subject["kind"] == "folded form" else name
            label = f"{arch}, {name}" if subject["kind"] == "training form" else label
            ratio = over.get(name)
            speed = f"{ratio['value']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else ""
            costs = f"{subject['macs'] / 1e9:.2f} G | {subject['flops'] / 1e9:.2f} G | {subject['params'] / 1e6:.1f} M"
            lines.append(f"| {label} | {costs} | {subject['median_ms']:.1f} | {speed} |")
    lines += ["", "Gates are random here, which gives more multiply-adds than 32 uniform groups; a ratio below 1 means"]
    lines += ["that the folded network is slower than that baseline. ONNX Runtime fp32, one thread, batch 1.", ""]
    for run in compiles["runs"]:
        lines.append(
            f"- Compiling {run['arch']} with an engine for three GPUs took {run['wall_seconds']:.0f} s and "
            f"{run['peak_rss_bytes'] / 1e9:.1f} GB on {compiles['threads']} cores: {run['shuffles_inserted']} shuffles "
            f"inserted, {run['shuffles_kept']} kept, float64 error {run['float64_max_error']:.0e}."
        )
    for path in sorted(RESULTS.glob("targets_*.json")):
        lines += ["", *_targets(_read(path))]
    engines = RESULTS / "engines.json"
    if engines.is_file():
        lines += ["", *_engines(_read(engines))]
    return "\n".join(lines)


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
        row += [f"{ratio['value']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else ""]
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
