"""``report.html``: what a bundle is, on one page that needs nothing else; a pure function of the bundle's documents.

All that comes from the documents is escaped: names of layers are those of whoever made the checkpoint. Without its
script, and on paper, the page shows the maps of all layers one after another; the script shows those of one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from foldgroup.channel_order import from_ranges
from foldgroup.report import charts, deploy
from foldgroup.report.layout import count, groups_in_words, size
from foldgroup.report.svg import MOST_CELLS, blocks, diagonal, mask, scattered

Document = Mapping[str, Any]
Section = tuple[str, str, str]
"""Identifier, heading and content."""

_SCRIPT = """
const choose = document.getElementById("layer");
if (choose) {
  const show = () => document.querySelectorAll(".layer-maps").forEach(m => {
    m.hidden = m.dataset.layer !== choose.value;
  });
  choose.parentElement.hidden = false;
  choose.addEventListener("change", show);
  show();
}
"""


def report_page(
    name: str,
    manifest: Document,
    passes: Document,
    verification: Document,
    engines: Document,
    preprocessing: Document,
) -> str:
    """The page of the bundle ``name``, from its JSON documents; equal documents give equal pages."""
    sections = [
        ("groups", "Groups by layer", _groups(manifest)),
        ("maps", "Which channels go together", _maps(manifest, passes)),
        ("shuffles", "What became of every channel shuffle", _ledger(passes)),
        ("equality", "Is it the network that was trained?", _equality(manifest, verification)),
        ("time", "Where the time goes", _time(manifest, verification)),
        ("tuning", "How every layer runs", _tuning(verification)),
        ("deploy", "How to deploy it", deploy.section(name, manifest, engines, preprocessing)),
        ("provenance", "Where it comes from", _provenance(manifest, verification)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{heading}</h2>{content}</section>' for key, heading, content in shown)
    style = (files("foldgroup.report") / "page.css").read_text(encoding="utf-8")
    title = escape(f"{manifest['checkpoint']['arch']}: {name}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>\n{style}</style></head><body>"
        f"<header><h1>{title}</h1>{_headline(manifest, verification)}</header>"
        f'<nav aria-label="On this page"><ul>{links}</ul></nav><main>{body}</main>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _headline(manifest: Document, verification: Document) -> str:
    macs, params, proof = manifest["macs"], manifest["params"], manifest["certificate"]
    failed = [name for name, tier in verification["tiers"].items() if not tier["passed"]]
    good = proof["holds"] and not failed
    verdict = "proven equal to the trained network" if good else "NOT shown equal to the trained network"
    cards = [
        ("multiply-adds as trained", count(macs["training"]), "of one image"),
        ("as it runs", count(macs["executed"]), f"{macs['training'] / max(macs['executed'], 1):.2f} times fewer"),
        ("with the groups learned", count(macs["nominal"]), "multiply-adds"),
        ("parameters", count(params["folded"]), f"of {count(params['training'])} as trained"),
        ("float64 error", f"{verification['float64_max_error']:.0e}", "of the largest output"),
    ]
    profile = verification.get("profile")
    if profile:
        cards.append(
            ("time of one batch", f"{profile['median_ms']:.2f} ms", f"{profile['target']} {profile['precision']}")
        )
    items = "".join(
        f'<div class="card"><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>'
        for label, value, note in cards
    )
    return f'<p class="{"good" if good else "bad"}">{verdict}</p><dl class="cards">{items}</dl>'


def _groups(manifest: Document) -> str:
    learned, found = manifest["layers"], manifest.get("found", [])
    if not learned and not found:
        return "<p>No layer of this network learned its groups.</p>"
    return (_learned(learned) if learned else "") + (_found(found) if found else "")


def _found(layers: Sequence[Document]) -> str:
    rows = [(layer["name"], groups_in_words(layer["groups"])) for layer in layers]
    return (
        "<p class=how>These layers have no gates: their kernels are zero between groups of channels, and so they run "
        "as groups. Widths are those of inputs and outputs.</p>"
        f"{table('groups found in zeros', ('layer', 'groups in its zeros'), rows, words=(0, 1))}"
    )


def _learned(layers: Sequence[Document]) -> str:
    rows = [
        (
            layer["name"],
            f"{layer['in_channels']} → {layer['out_channels']}",
            "".join(map(str, layer["gate_bits"])),
            layer["groups"],
            layer["in_channels"] // layer["groups"],
            layer["executed_groups"],
            count(layer["macs"]),
            count(layer["executed_macs"]),
        )
        for layer in layers
    ]
    head = ("layer", "channels", "gate bits", "groups", "width", "groups run", "MACs", "MACs run")
    return (
        "<p class=how>Bars are the groups that each layer learned; the marks are the groups that it runs as, fewer and "
        "wider where that is faster. MACs are multiply-adds of one image, FLOPs twice as many.</p>"
        f"{_scroll(charts.groups_chart(layers))}{table('learned layers', head, rows, words=(0,))}"
    )


def _maps(manifest: Document, passes: Document) -> str:
    layers = manifest["layers"]
    records = (record for record in passes["passes"] if record["name"] == "find_groups")
    found = [layer for record in records for layer in record.get("details", {}).get("layers", ())]
    if not layers and not found:
        return ""
    options = "".join(f"<option>{escape(layer['name'])}</option>" for layer in (*layers, *found))
    figures = "".join((*map(_layer_maps, layers), *map(_found_maps, found)))
    gates = (
        " A gate bit of 1 lets channels connect across its digit, a 0 only where the digit is the same. Sorted by the "
        "digits whose bit is 0 the groups are neighbours, and the order goes into the weights around the layer."
    )
    shades = (
        f" Of more than {MOST_CELLS} channels in a layer without gates neighbours are one cell, the darker the more of "
        "them connect."
    )
    return (
        "<p class=how>Inputs from top to bottom, outputs from left to right; coloured where they connect."
        f"{gates if layers else ''}{shades if found else ''}</p>"
        f'<p class="choose" hidden><label for="layer">Layer</label> <select id="layer">{options}</select></p>{figures}'
    )


def _layer_maps(layer: Document) -> str:
    name, groups, runs = str(layer["name"]), layer["groups"], layer["executed_groups"]
    bits = "".join(map(str, layer["gate_bits"]))
    drawn = [
        (mask(name, layer["in_channels"], layer["out_channels"], layer["gate_bits"]), f"as trained: gate bits {bits}"),
        (blocks(f"groups of {name}", groups), f"reordered: {groups} groups"),
        (
            blocks(f"{name} as it runs", groups, within=runs),
            f"as it runs: {runs} groups, zeros beside what was learned",
        ),
    ]
    return _maps_of(name, drawn if runs < groups else drawn[:2])


def _found_maps(layer: Document) -> str:
    name, groups = str(layer["name"]), layer["groups"]
    connected = np.zeros((layer["in_channels"], layer["out_channels"]), dtype=bool)
    for part in groups:
        reads, writes = (np.reshape(from_ranges(part[side]), (part["count"], -1)) for side in ("reads", "writes"))
        for ins, outs in zip(reads, writes, strict=True):
            connected[np.ix_(ins, outs)] = True
    widths = [(part["in_width"], part["out_width"]) for part in groups for _ in range(part["count"])]
    drawn = [
        (scattered(f"mask of {name} in its zeros", connected), "as trained: groups in its zeros"),
        (diagonal(f"groups of {name}", widths), f"reordered: {groups_in_words(groups)}"),
    ]
    return _maps_of(name, drawn)


def _maps_of(name: str, drawn: Iterable[tuple[str, str]]) -> str:
    figures = "".join(f"<figure>{drawing}<figcaption>{escape(words)}</figcaption></figure>" for drawing, words in drawn)
    return f'<div class="maps layer-maps" data-layer="{escape(name)}"><h3>{_name(name)}</h3>{figures}</div>'


def _ledger(passes: Document) -> str:
    entries = [entry for record in passes["passes"] for entry in record["shuffles"]]
    if not entries:
        return "<p>None was needed.</p>"
    fates = Counter(entry["fate"] for entry in entries)
    words = ", ".join(f"{number} {fate}" for fate, number in sorted(fates.items()))
    rows = [
        (entry["node"], entry["channels"], entry.get("put_in_by", "folding"), entry["fate"], entry["reason"])
        for entry in entries
    ]
    listed = table(
        "shuffles", ("shuffle", "channels", "put in by", "fate", "by what, or why"), rows, words=(0, 2, 3, 4)
    )
    return (
        f"<p>{len(entries)} in all: {escape(words)}. Absorbed ones are gone at run time: the weights named write or "
        f"read their channels in another order.</p><details><summary>Every shuffle</summary>{listed}</details>"
    )


def _equality(manifest: Document, verification: Document) -> str:
    proof = manifest["certificate"]
    if proof["holds"]:
        verdict = (
            f'<span class="good">The certificate holds</span>, with no tolerance: {proof["weights_kept"]:,} weights '
            f"are bit-equal to the checkpoint's, {proof['weights_pruned']:,} were left out because a mask is 0 there, "
            "and every operation reads what it read in training."
        )
    else:
        verdict = f'<span class="bad">The certificate does not hold:</span> {escape(str(proof.get("failure")))}'
    rows, drawings = [], []
    for name, tier in sorted(verification["tiers"].items()):
        agreement = tier.get("top1_agreement")
        rows.append(
            (
                name,
                "passed" if tier["passed"] else "FAILED",
                f"{tier['max_error']:.1e}",
                f"{tier['limits']['max_error']:g}",
                f"{tier['median_error']:.1e}",
                "–" if agreement is None else f"{agreement:.2%}",
                tier["images"],
            )
        )
        if tier.get("histogram"):
            drawings.append(
                f"<figure>{charts.histogram(name, tier['histogram'])}<figcaption>{escape(name)}</figcaption></figure>"
            )
    head = ("runtime", "result", "largest error", "limit", "median", "top-1 agreement", "inputs")
    missing = "".join(
        f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in sorted(verification.get("not_run", {}).items())
    )
    return (
        f"<p>{verdict} In float64 the largest difference is {verification['float64_max_error']:.1e} of the largest "
        "output. Each runtime and precision is then compared with the float64 outputs of the trained network.</p>"
        f"{table('runtimes', head, rows, words=(0, 1))}<div class='maps wide'>{''.join(drawings)}</div>"
        + (f"<p>Not run on the machine that compiled it:</p><ul>{missing}</ul>" if missing else "")
    )


def _time(manifest: Document, verification: Document) -> str:
    profile = verification.get("profile")
    if not profile:
        return ""
    learned = {layer["name"] for layer in manifest["layers"]}
    limits, layers = profile["limits"], profile["layers"]
    rows = [
        (
            layer["name"],
            layer["kind"],
            f"{layer['us']:.0f}",
            f"{layer['limit_us']:.0f}",
            count(layer["macs"]),
            size(layer["bytes"]),
            f"{layer['macs'] / layer['us'] / 1e3:.0f}" if layer["us"] and layer["macs"] else "–",
        )
        for layer in layers
    ]
    head = ("layer", "kind", "µs", "limit µs", "MACs", "bytes", "MACs/ns")
    return (
        f"<p class=how>{escape(profile['target'])} {escape(profile['precision'])}, {_threads(profile['threads'])}, "
        f"batch {profile['batch']}: {profile['median_ms']:.2f} ms. This machine multiplies at "
        f"{limits['macs_per_ns']:.0f} multiply-adds a nanosecond at best and moves {limits['bytes_per_ns']:.1f} bytes "
        f"a nanosecond; the marks are what each kind of layer must take by that, {profile['limit_ms']:.2f} ms in all: "
        f"<strong>{profile['fraction']:.0%}</strong> of the time measured.</p>"
        f"{_scroll(charts.kinds_bar(profile, learned))}"
        f"<details><summary>Every layer</summary>{_scroll(charts.layer_bars(layers))}"
        f"{table('layers', head, rows, words=(0, 1))}</details>"
    )


def _tuning(verification: Document) -> str:
    parts = []
    for name, tuning in verification.get("tuning", {}).items():
        if not tuning.get("layers"):
            continue
        measured = tuning["source"] == "measured"
        how = (
            "measured on the machine that compiled it" if measured else "expected, by a model learned from measurements"
        )
        words = f"{how}; {_threads(tuning['threads'])}, batch {tuning['batch']}. The square is what runs."
        whole = tuning.get("whole", {})
        if "ratio" in whole:
            ratio = whole["ratio"]
            words += (
                f" As a whole, {whole.get('challenger', 'tuned')} it is {ratio['value']:.3f} times as fast as the "
                f"untuned network (95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}): {whole.get('reason', '')}."
            )
        alike: dict[tuple[str, int, int], list[Any]] = {}
        for layer in tuning["layers"]:
            shape = str(layer.get("shape", layer["name"]))
            alike.setdefault((shape, layer["runs"], layer["parts"]), []).append(layer)
        figures = "".join(
            f"<figure>{charts.packing_curve(layers[0])}<figcaption>{escape(shape)} learned, {runs} run; "
            f"{len(layers)} layer{'s' * (len(layers) > 1)}</figcaption></figure>"
            for (shape, runs, _), layers in alike.items()
        )
        parts.append(f"<h3>{escape(name)}</h3><p class=how>{escape(words)}</p><div class=maps>{figures}</div>")
    if not parts:
        return ""
    return (
        "<p>Fewer multiply-adds are often slower. Each curve is the time of a layer by the number of groups that it "
        "runs as, from those it learned to one (dense); less is better.</p>" + "".join(parts)
    )


def _provenance(manifest: Document, verification: Document) -> str:
    made = ", ".join(f"{name} {version}" for name, version in sorted(manifest["versions"].items()))
    here = verification.get("machine", {})
    machine = ", ".join(f"{key}: {_plain(value)}" for key, value in sorted(here.items()) if value is not None)
    rows = [("checkpoint, SHA-256", manifest["checkpoint"]["sha256"]), ("read as", manifest["checkpoint"]["dialect"])]
    rows += [("made by", made), ("measured on", machine)]
    return table("provenance", ("what", "which"), rows, words=(0, 1))


def _threads(number: int | None) -> str:
    return "threads as the runtime chooses" if number is None else f"{number} thread{'s' * (number != 1)}"


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], words: Sequence[int] = ()) -> str:
    """A table with a caption; the columns numbered in ``words`` hold text, the others numbers."""
    kinds = [' class="w"' if i in words else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind}>{_name(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    inside = f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{lines}</tbody>"
    return _scroll(f"<table>{inside}</table>")


def _scroll(wide: str) -> str:
    """What scrolls by itself on a narrow screen, where it would be too small to read."""
    return f'<div class="scroll">{wide}</div>'


def _name(value: object) -> str:
    """Escaped; the name of a layer may break before a word of it."""
    return re.sub(r"([._])(?=[^\W\d_])", r"\1<wbr>", escape(str(value)))
