"""The manifest: what was built, from what. No times and no machine, so equal inputs give equal bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from math import prod
from typing import Any

from torch import Tensor, fx

from foldgroup import __version__
from foldgroup.bundle import SCHEMA
from foldgroup.checkpoint import Checkpoint
from foldgroup.counts import layer_costs, learned_costs, macs, params
from foldgroup.emit.onnx import BATCH, INPUT
from foldgroup.folding import Folded
from foldgroup.lowering import Form
from foldgroup.nn.dgconv import DGConv
from foldgroup.outputs import outputs_of
from foldgroup.trace import called_module, shape_of


def manifest_of(
    checkpoint: Checkpoint,
    folded: Folded,
    batch: int | None = None,
    precision: str = "fp32",
    form: Form | None = None,
) -> dict[str, Any]:
    """The manifest of a compile with a dynamic batch or ``batch``, but for its files, models and targets.

    ``form`` is that in which the folded network runs in ``precision``, by default the one that was learned.
    """
    runs, certificate = (form.graph, form.certificate) if form else (folded.folded, folded.certificate)
    layers = learned_layers(folded, runs)
    executed = macs(runs)
    records = (record for record in folded.result.records if record.name == "find_groups")
    found = [_counted(layer) for record in records for layer in record.details.get("layers", ())]
    packed = sum(layer["executed_macs"] - layer["macs"] for layer in layers) + _packed(found, folded.training, runs)
    ledger = folded.result.ledger
    free = batch or BATCH
    outputs = [{"name": name, "shape": [free, *shape_of(node)[1:]]} for name, node in outputs_of(folded.folded).items()]
    return {
        "schema": SCHEMA,
        "checkpoint": {"sha256": checkpoint.sha256, "dialect": checkpoint.dialect, "arch": checkpoint.arch},
        "input": {"name": INPUT, "shape": [free, *folded.input_shape[1:]]},
        **({"output": outputs[0]} if len(outputs) == 1 else {}),
        "outputs": outputs,
        "precision": precision,
        "versions": {"foldgroup": __version__, **{name: version(name) for name in ("onnx", "onnxscript", "torch")}},
        "layers": layers,
        **({"found": found} if found else {}),
        "shuffles": {
            "inserted": sum(entry.put_in_by == "folding" for entry in ledger),
            "own": sum(entry.put_in_by == "network" for entry in ledger),
            "placed": sum(entry.put_in_by == "plan" for entry in ledger),
            "absorbed": sum(entry.fate == "absorbed" for entry in ledger),
            "cancelled": sum(entry.fate == "cancelled" for entry in ledger),
            "coarsened": sum(entry.fate == "coarsened" for entry in ledger),
            "kept": [{"node": entry.node, "reason": entry.reason} for entry in ledger if entry.fate == "kept"],
        },
        "macs": {"training": macs(folded.training), "nominal": executed - packed, "executed": executed},
        "params": {"training": params(folded.training), "folded": params(folded.folded), "executed": params(runs)},
        "certificate": certificate.as_dict(),
    }


def _counted(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer with groups in its zeros, but for which channels they have."""
    kept = ("count", "in_width", "out_width")
    return {"name": layer["name"], "groups": [{key: part[key] for key in kept} for part in layer["groups"]]}


def _packed(found: Sequence[Mapping[str, Any]], training: fx.GraphModule, runs: fx.GraphModule) -> int:
    """The MACs of one image that layers with groups in their zeros have more, as they run, than those groups need."""
    more = 0
    before, after = layer_costs(training), layer_costs(runs)
    for layer in found:
        name = layer["name"]
        weight = training.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        kept = sum(part["count"] * part["in_width"] * part["out_width"] for part in layer["groups"])
        dense = sum(cost.macs for cost in before if cost.name == name)
        parts = re.compile(rf"{re.escape(name)}(_part\d+)*")
        more += sum(cost.macs for cost in after if parts.fullmatch(cost.name))
        more -= dense * kept // (weight.shape[0] * weight.shape[1])
    return more


def learned_layers(folded: Folded, runs: fx.GraphModule) -> list[dict[str, Any]]:
    """What became of every DGConv layer in the network that ``runs``, for the manifest; MACs are for one image."""
    executed = learned_costs(folded.training, runs)
    calls = Counter(str(node.target) for node in folded.training.graph.nodes)
    layers = []
    for node in folded.training.graph.nodes:
        layer = called_module(folded.training, node)
        if not isinstance(layer, DGConv):
            continue
        name = str(node.target)
        groups = layer.grouping.groups
        _, out_channels, *positions = shape_of(node)
        dense = out_channels * layer.in_channels * prod(layer.kernel_size) * prod(positions)
        layers.append(
            {
                "name": name,
                "in_channels": layer.in_channels,
                "out_channels": layer.out_channels,
                "gate_bits": list(layer.bits),
                "groups": groups,
                "executed_groups": sum(cost.groups for cost in executed[name]) // calls[name],
                "macs": dense // groups,
                "executed_macs": sum(cost.macs for cost in executed[name]) // calls[name],
            }
        )
    return layers
