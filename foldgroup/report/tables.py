"""Results as tables for the terminal: what was inspected, compiled, verified and measured, and what each pass did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foldgroup.report.layout import bar, count, facts, grid, groups_in_words, heading, paragraph, size
from foldgroup.report.plan import plan_of, plan_report

if TYPE_CHECKING:
    from foldgroup.benchmarking import BenchmarkReport
    from foldgroup.bundle import Bundle
    from foldgroup.earlier import Change
    from foldgroup.inspection import Inspection
    from foldgroup.predict import Prediction
    from foldgroup.verifier import Verification

CELLS = 20
"""Cells of a full bar."""


def inspection_table(inspection: Inspection) -> Group:
    """The learned layers, their groups as a bar chart, and the totals. MACs are for one image."""
    learned = inspection.learned_macs
    of_dense = _ratio(learned, inspection.learned_dense_macs)
    of_uniform = _ratio(learned, inspection.learned_uniform_macs)
    totals = [
        ("Learned layers", f"{count(learned)} MACs: {of_dense} of dense kernels, {of_uniform} of 32 uniform groups"),
        ("Complexity", f"ζ = {inspection.zeta:,} ones of {inspection.dense_zeta:,} in the masks,"),
        ("", f"as many as b = {inspection.equivalent_b:.1f} uniform groups would leave"),
    ]
    learned_layers: list[RenderableType] = [_layer_table(inspection), "", _group_chart(inspection)]
    if not inspection.layers:
        totals, learned_layers = [], [paragraph("No layer learned its groups.")] if not inspection.found else []
    if inspection.found:
        learned_layers += [""] * bool(learned_layers) + [_found_table(inspection)]
    return Group(
        heading(f"{inspection.arch} in {inspection.kind} {inspection.name}"),
        paragraph(
            f"input {_sizes(inspection.input_shape)}, {_gives(inspection)}, {inspection.dialect} layout, "
            f"checkpoint {inspection.sha256[:12]}"
        ),
        "",
        *learned_layers,
        "",
        _before_after(
            inspection.macs_training, inspection.macs_executed, inspection.params_training, inspection.params_folded
        ),
        "",
        facts([*totals, *(("Note", note) for note in inspection.notes)]),
    )


def _sizes(shape: Sequence[int | str]) -> str:
    return "×".join(map(str, shape))


def _gives(inspection: Inspection) -> str:
    if inspection.classes is not None:
        return f"{inspection.classes} classes"
    return ", ".join(f"{name} {_sizes(shape[1:])}" for name, shape in inspection.outputs)


def _layer_table(inspection: Inspection) -> Table:
    packed = any(layer.executed_groups != layer.groups for layer in inspection.layers)
    columns = ["layer", "channels", "bits", "groups", "width", "MACs", "MACs of\ndense", "of 32\ngroups"]
    table = grid(columns + ["runs as"] * packed, left=(0, 1, 2))
    for layer in inspection.layers:
        width = str(layer.in_width) if layer.in_width == layer.out_width else f"{layer.in_width}→{layer.out_width}"
        row = [
            layer.name,
            f"{layer.in_channels}→{layer.out_channels}",
            "".join(map(str, layer.gate_bits)),
            str(layer.groups),
            width,
            count(layer.macs),
            _ratio(layer.macs, layer.dense_macs),
            _ratio(layer.macs, layer.uniform_macs),
        ]
        table.add_row(*map(Text, row + [f"{layer.executed_groups} groups"] * packed))
    return table


def _found_table(inspection: Inspection) -> Table:
    table = grid(["layer", "groups in its zeros"], left=(0, 1))
    for layer in inspection.found:
        table.add_row(Text(layer["name"]), Text(groups_in_words(layer["groups"])))
    return table


def _group_chart(inspection: Inspection) -> Table:
    """Groups on a log2 scale, two cells a doubling, and MACs as a share of the dense kernel's."""
    table = grid(["layer", "groups, each ██ doubles", "", "MACs of dense", ""], left=(0, 1, 3))
    for layer in inspection.layers:
        share = layer.executed_macs / layer.dense_macs
        row = (
            layer.name,
            bar(2 * math.log2(layer.groups)),
            str(layer.groups),
            bar(CELLS * share, CELLS),
            f"{share:.1%}",
        )
        table.add_row(*map(Text, row))
    return table


def _before_after(macs_before: int, macs_after: int, params_before: int, params_after: int) -> Table:
    table = grid(["one image, whole network", "training form", "folded form", "times fewer"])
    rows = (
        ("MACs", macs_before, macs_after),
        ("FLOPs (2·MACs)", 2 * macs_before, 2 * macs_after),
        ("parameters", params_before, params_after),
    )
    for name, before, after in rows:
        table.add_row(name, count(before), count(after), f"{before / after:.2f}" if after else "n/a")
    return table


def _ratio(part: int, whole: int | None) -> str:
    return f"{part / whole:.3g}" if whole else "n/a"


def benchmark_table(report: BenchmarkReport) -> Group:
    """Times, costs and speed-ups of a benchmark, and a plain sentence for each comparison."""
    one = _sizes(report.input_shape)
    threads = "default" if report.threads is None else report.threads
    times = grid(["subject", "runs on", "median ms", "p90 ms", "p99 ms", "cv", "images/s"], left=(0, 1))
    costs = grid(["one image", "MACs", "FLOPs", "grouped\nMACs", "share", "parameters", "file"])
    for s in report.subjects:
        latency = s.latency
        quantiles = (latency.median_ms, latency.p90_ms, latency.p99_ms)
        milliseconds = (f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}" for ms in quantiles)
        times.add_row(s.name, s.runs_on, *milliseconds, f"{latency.cv:.1%}", f"{s.images_per_second:.1f}")
        grouped = (count(s.grouped_macs), f"{s.grouped_share:.1%}")
        costs.add_row(s.name, count(s.macs), count(s.flops), *grouped, count(s.params), size(s.file_bytes))
    ratios = grid(["speed-up of", "over", "ratio", "interval", "it is"], left=(0, 1, 4))
    for comparison in report.comparisons:
        r = comparison.ratio
        interval = f"{r.low:.3f} to {r.high:.3f} ({r.confidence:.0%})"
        ratios.add_row(comparison.subject, comparison.other, f"{r.value:.3f}", interval, comparison.folded_is)
    notes = [
        "FLOPs = 2·MACs. Grouped MACs are those of layers that learned groups (in the training form, of their dense "
        "kernels) or, in a baseline, of convolutions with more than one group."
    ]
    if any(s.kind == "baseline" for s in report.subjects):
        notes.append("Baselines have random weights: their accuracy is not compared.")
    isa = " ".join(report.machine.get("isa") or ())
    runtimes = dict.fromkeys(
        " ".join(str(s.runtime[key]) for key in ("runtime", "version", "provider")) for s in report.subjects
    )
    where = [
        *(("Runtime", runtime) for runtime in runtimes),
        *(("Not run", note) for note in report.notes),
        ("Machine", f"{report.machine.get('processor')}, {report.machine.get('usable_cores')} usable cores, {isa}"),
    ]
    streams = f", {report.streams} streams at a time" if report.streams > 1 else ""
    loaded = f", loaded {report.sessions} times" if report.sessions > 1 else ""
    return Group(
        heading(f"{report.checkpoint['arch']}, batch {report.batch} of {one}, threads: {threads}{streams}"),
        paragraph(f"{report.rounds} rounds, every subject once a round in random order{loaded}"),
        "",
        times,
        "",
        costs,
        "",
        ratios,
        "",
        *(paragraph(comparison.conclusion) for comparison in report.comparisons),
        "",
        *(paragraph(note) for note in notes),
        facts(where),
    )


def comparison_table(changes: Sequence[Change]) -> Group:
    """Every subject's time then and now."""
    table = grid(["subject", "then ms", "now ms", "times as fast"])
    for change in changes:
        table.add_row(change.subject, f"{change.before_ms:.3f}", f"{change.now_ms:.3f}", f"{change.speed_up:.3f}")
    note = "Two runs, not interleaved: the machine's drift stands in these ratios, and they have no interval."
    return Group("", table, "", paragraph(note))


def prediction_table(predictions: Sequence[Prediction]) -> Group:
    """The likeliest classes of every image, with their probabilities as bars."""
    parts: list[RenderableType] = []
    for prediction in predictions:
        table = grid(["class", "probability", ""], left=(0, 1))
        for name, probability in prediction.entries:
            table.add_row(Text(name), bar(CELLS * probability, CELLS), f"{probability:.1%}")
        parts += [heading(str(prediction.path)), table, ""]
    return Group(*parts, paragraph(f"Run on {predictions[0].runs_on}."))


def compile_summary(bundle: Bundle) -> Group:
    """What a compile folded, proved and wrote."""
    manifest = bundle.manifest
    shuffles = manifest["shuffles"]
    groups = [layer["groups"] for layer in manifest["layers"]]
    kept = shuffles["kept"]
    coarsened = f"{shuffles['coarsened']} avoided by fewer groups, " if shuffles.get("coarsened") else ""
    fates = f"{shuffles['absorbed']} absorbed, {shuffles['cancelled']} cancelled, {coarsened}{len(kept)} kept"
    folded = [
        ("Layers", _learned(groups, len(manifest.get("found", ())))),
        ("Shuffles", f"{shuffles['inserted']} inserted: {fates}"),
        *(("  kept", f"{entry['node']}: {entry['reason']}") for entry in kept),
        *_equality(bundle),
        *_engines(bundle),
        *(("Note", note) for note in bundle.passes["notes"]),
    ]
    macs, params = manifest["macs"], manifest["params"]
    found = (file for file in bundle.path.rglob("*") if file.is_file())
    written = sorted((file.relative_to(bundle.path).as_posix(), file.stat().st_size) for file in found)
    table = grid(["file", "size"])
    for name, length in written:
        table.add_row(Text(name), size(length))
    table.add_row("total", size(sum(length for _, length in written)))
    return Group(
        heading(f"{manifest['checkpoint']['arch']} → {bundle.path.name}"),
        "",
        facts(folded),
        "",
        _before_after(macs["training"], macs["executed"], params["training"], params["folded"]),
        "",
        table,
    )


def _learned(groups: Sequence[int], found: int) -> str:
    zeros = [f"{found} with groups in their zeros"] if found else []
    if not groups:
        return zeros[0] if found else "none learned its groups"
    between = f"{min(groups)} to {max(groups)} groups" if len(set(groups)) > 1 else f"{groups[0]} groups each"
    return ", ".join([f"{len(groups)} learned", between, *zeros])


def _equality(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Certificate, float64 error and runtime tiers, one fact each."""
    from foldgroup.equivalence import FLOAT64_LIMIT  # with torch, which who asks for these has loaded

    proof = bundle.manifest["certificate"]
    if proof["holds"]:
        kept, pruned = proof["weights_kept"], proof["weights_pruned"]
        yield "Certificate", f"holds: {kept:,} weights bit-equal, {pruned:,} pruned where a mask is 0"
    else:
        yield "Certificate", f"DOES NOT HOLD: {proof.get('failure')}"
    error = bundle.verification["float64_max_error"]
    yield "float64", f"max error {error:.1e} of the largest output (limit {FLOAT64_LIMIT:.0e})"
    for name, tier in sorted(bundle.verification["tiers"].items()):
        top1 = tier["top1_agreement"]
        agreement = "" if top1 is None else f"top-1 agreement {top1:.2%} of "
        limit = f"limit {tier['limits']['max_error']:g}"
        yield name, f"max error {tier['max_error']:.1e} ({limit}), {agreement}{tier['images']} inputs"
    for precision, layers in sorted(bundle.verification.get("worst_layers", {}).items()):
        worst = ", ".join(f"{entry['layer']} {entry['error']:.1e}" for entry in layers[:3])
        yield f"{precision} costs", f"most at {worst}"
    for precision, model in sorted(bundle.models.items()):
        if "keep_float" in model:
            yield "Kept in float", f"{precision}: {', '.join(model['keep_float'])}"
    yield from _tuning(bundle)
    for name, reason in sorted(bundle.verification.get("not_run", {}).items()):
        yield name, f"not run here: {reason}"


def _tuning(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """By which form layers run on each target, how that was decided, and what it came to as a whole."""
    for name, tuning in bundle.verification.get("tuning", {}).items():
        layers = tuning["layers"]
        other = sum((layer["runs"], layer["parts"]) != (layer["groups"], 1) for layer in layers)
        if not layers:
            continue
        how = "measured" if tuning["source"] == "measured" else "expected to be fastest; --tune measures"
        yield f"{name} runs", f"{other} of {_plural(len(layers), 'layer')} with groups in another form ({how})"
        whole = tuning.get("whole", {})
        if "ratio" in whole:
            ratio = whole["ratio"]
            speed = f"{whole['challenger']}: {ratio['value']:.3f} times as fast as untuned"
            yield (
                "  as a whole",
                f"{speed} (95% interval {ratio['low']:.3f} to {ratio['high']:.3f}); {whole['reason']}",
            )
        elif "reason" in whole:
            yield "  as a whole", whole["reason"]
        if tuning.get("unmeasured"):
            yield "  no time for", "; ".join(tuning["unmeasured"])


def _engines(bundle: Bundle) -> Iterator[tuple[str, str]]:
    engines: Sequence[dict[str, Any]] = bundle.engines["engines"]
    for engine in engines:
        gpus = engine.get("compute_capabilities")
        targets = "" if gpus is None else f" for {gpus if isinstance(gpus, str) else ', '.join(gpus)}"
        least, _, greatest = engine["batch"] or (None, None, None)
        batch = f", batch {least} to {greatest}" if engine["batch"] else ", fixed batch"
        yield "Engine", f"{engine['file']} by {engine['builder']} {engine['version']}{targets}{batch}"
        for step in engine.get("fallbacks", ()):
            yield "  fell back", step
    if not engines:
        yield "Engine", f"none: {bundle.engines.get('note', 'not built')}"
    for name, reason in sorted(bundle.engines.get("not_served", {}).items()):
        yield "Not in triton/", f"{name}: {reason}"


def verification_table(verification: Verification) -> Group:
    """Every check of a bundle, what it found, and the verdict."""
    table = grid(["check", "result", "finding"], left=(0, 1, 2))
    words = {True: "passed", False: "FAILED", None: "not run"}
    for check in verification.checks:
        table.add_row(Text(check.name), words[check.passed], Text(check.finding))
    failed = sum(check.passed is False for check in verification.checks)
    verdict = f"{failed} of {len(verification.checks)} checks failed" if failed else "The bundle is the network it says"
    if not failed and not verification.tiers:
        verdict = "Nothing was run: its files are the ones that were compiled, and that is all that is known"
    return Group(table, "", paragraph(f"{verdict}."))


def explain_report(bundle: Bundle) -> Group:
    """What each pass did, what it left and why, in full; then what became of every channel shuffle."""
    parts: list[RenderableType] = []
    ledger: list[dict[str, Any]] = []
    for number, record in enumerate(bundle.passes["passes"], start=1):
        rewrites, skips = record["rewrites"], record["skips"]
        changed = "changed the graph" if record["changed"] else "changed nothing"
        done = f"{_plural(len(rewrites), 'rewrite')}, {_plural(len(skips), 'skip')}"
        parts += [heading(f"{number}. {record['name']}: {changed}; {done}")]
        if rewrites or skips:
            parts.append(_notes(rewrites, skips))
        parts.append("")
        ledger += record["shuffles"]
    plan = plan_of(bundle)
    if plan is not None:
        parts += [plan_report(plan), ""]
    if not ledger:
        return Group(*parts, paragraph("No channel shuffle was inserted."))
    table = grid(["shuffle", "channels", "put in by", "fate", "by, or why"], left=(0, 2, 3, 4))
    for entry in ledger:
        origin = entry.get("put_in_by", "folding")
        table.add_row(Text(entry["node"]), str(entry["channels"]), origin, entry["fate"], Text(entry["reason"]))
    kept = sum(entry["fate"] == "kept" for entry in ledger)
    return Group(*parts, heading(f"{_plural(len(ledger), 'channel shuffle')}, {kept} kept"), table)


def _notes(rewrites: Sequence[dict[str, str]], skips: Sequence[dict[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for label, notes in (("rewrote", rewrites), ("left", skips)):
        for note in notes:
            table.add_row(f"  {label}", Text(note["node"]), Text(note["reason"]))
    return table


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
