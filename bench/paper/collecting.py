"""What the runs left in the working folder → one committed document for each scale.

Accuracies are in percent, MACs are multiply-adds of one image. The document keeps what an earlier one knew of runs that
are not in the working folder any more, so a study can be finished elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import foldgroup
from bench.paper.scales import Scale
from bench.paper.studies import Point, learned, runs
from bench.paper.training import result_path, write
from foldgroup.measure import machine

RESULTS = Path(__file__).parents[1] / "results" / "paper"
DYNAMICS_POINTS = 120
"""Steps at which the dynamics of gates are kept, at most."""


def document_path(scale: Scale) -> Path:
    """Where the results of a scale are committed."""
    return RESULTS / f"{scale.name}.json"


def read_document(scale: Scale) -> dict[str, Any]:
    """The committed results of a scale, or none yet."""
    path = document_path(scale)
    empty: dict[str, Any] = {"runs": {}, "scale": asdict(scale)}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else empty


def collect(scale: Scale, work: Path) -> dict[str, Any]:
    """Read every finished run, describe its network, and write the document."""
    document = read_document(scale)
    document["scale"] = asdict(scale)
    for point, seed in runs(scale):
        result = result_path(work, point, seed)
        if result.is_file() and str(seed) not in document["runs"].get(point.key, {}):
            entry = json.loads(result.read_text(encoding="utf-8"))
            checkpoint = result.with_suffix(".pt")
            entry |= describe(checkpoint)
            if (point, seed) == (learned(scale, 32), 0):
                document["dynamics"] = dynamics(result.with_suffix(".jsonl"))
            document["runs"].setdefault(point.key, {})[str(seed)] = entry
            document["machine"] = {key: machine()[key] for key in ("processor", "usable_cores", "isa", "gpu", "torch")}
    document_path(scale).parent.mkdir(parents=True, exist_ok=True)
    write(document_path(scale), document)
    return document


def describe(checkpoint: Path) -> dict[str, Any]:
    """The network that a checkpoint is: its groups, multiply-adds and weights, and how it was trained."""
    seen = foldgroup.inspect(checkpoint)
    record = torch.load(checkpoint, weights_only=True)["training"]
    return {
        "groups": [layer.groups for layer in seen.layers],
        "channels": [layer.in_channels for layer in seen.layers],
        "gate_bits": [list(layer.gate_bits) for layer in seen.layers],
        "group_conv_macs": seen.learned_macs,
        "macs": seen.macs_nominal,
        "params": seen.params_folded,
        "zeta": seen.zeta,
        "dense_zeta": seen.dense_zeta,
        "epochs": record["epochs"],
        "kept_epoch": record["kept_epoch"],
    }


def dynamics(log: Path) -> dict[str, Any]:
    """Gates and group counts of every layer over a run (the paper's Figure 6)."""
    steps = [entry for line in log.read_text(encoding="utf-8").splitlines() if "layers" in (entry := json.loads(line))]
    kept = steps[:: max(1, len(steps) // DYNAMICS_POINTS)]
    layers = list(kept[0]["layers"])
    return {
        "epochs": [round(entry["epoch"] - 1 + entry["step"] / entry["steps"], 3) for entry in kept],
        "zeta_over_budget": [round(entry["zeta_over_budget"], 3) for entry in kept],
        "layers": {
            name: {
                "groups": [entry["layers"][name]["groups"] for entry in kept],
                "gates": [[float(f"{g:.3g}") for g in entry["layers"][name]["gates"]] for entry in kept],
            }
            for name in layers
        },
    }


def entries_of(document: dict[str, Any], point: Point) -> dict[int, dict[str, Any]]:
    """The runs of a point by seed."""
    return {int(seed): entry for seed, entry in document["runs"].get(point.key, {}).items()}
