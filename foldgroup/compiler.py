"""The main job: a checkpoint in, a verified bundle out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from foldgroup import bundle as files
from foldgroup.bundle import Bundle, check_target, file_entry, to_json, write_bundle
from foldgroup.certificate import Certificate, certify
from foldgroup.checkpoint import Checkpoint, Preprocessing, load_checkpoint
from foldgroup.emit import tensorrt
from foldgroup.emit.onnx import BATCH, INPUT, MODEL, OUTPUT, export_onnx
from foldgroup.emit.precision import typed
from foldgroup.equivalence import (
    FLOAT64_LIMIT,
    LIMITS,
    ErrorStatistics,
    TierResult,
    first_layer_over,
    float64_error,
    layer_errors,
    pass_check,
    seeded_inputs,
)
from foldgroup.errors import EquivalenceError
from foldgroup.measure import layer_costs, machine, macs, params
from foldgroup.nn.dgconv import DGConv2d
from foldgroup.pipeline import PassRecord, Pipeline, PipelineResult, dump, first_difference
from foldgroup.run import OnnxRuntimeRunner
from foldgroup.trace import called_module, evaluate, shape_of, trace

GOLDEN_INPUTS = 2
"""Seeded inputs in a bundle, with the training form's float64 logits."""


@dataclass(frozen=True)
class Folded:
    """A checkpoint's network before and after the passes."""

    training: fx.GraphModule
    folded: fx.GraphModule
    result: PipelineResult
    certificate: Certificate
    input_shape: tuple[int, int, int, int]


def fold(
    checkpoint: Checkpoint,
    *,
    pipeline: Pipeline | None = None,
    input_size: int | None = None,
    check_passes: bool = False,
    dump_passes: Path | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Folded:
    """Trace the checkpoint's model, run the passes and certify the result.

    ``pipeline`` is the default one with the passes of installed packages; ``input_size`` the checkpoint's own.

    Raises:
        TraceError, PassError: if the network or a pass is not up to it.
        EquivalenceError: if ``check_passes`` finds a pass whose result differs, or if the certificate does not hold.
    """
    training, shape = _trace(checkpoint, input_size)
    on_step("trace")

    def on_pass(record: PassRecord, graph: fx.GraphModule) -> None:
        on_step(record.name)
        if dump_passes is not None:
            number = len(list(dump_passes.iterdir()))
            (dump_passes / f"{number:02d}_{record.name}.txt").write_text(dump(graph), encoding="utf-8")

    if dump_passes is not None:
        dump_passes.mkdir(parents=True, exist_ok=True)
        for old in dump_passes.glob("[0-9][0-9]_*.txt"):
            old.unlink()
        (dump_passes / "00_trace.txt").write_text(dump(training), encoding="utf-8")
    check = pass_check(training, seeded_inputs(shape)) if check_passes else None
    result = (pipeline or _default_pipeline()).run(training, check=check, on_pass=on_pass)
    certificate = certify(training, result.graph)
    on_step("certificate")
    if not certificate.holds:
        raise EquivalenceError(
            f"{checkpoint.path}: the folded network is not the trained one. {certificate.failure}. "
            f"Run 'foldgroup bisect {checkpoint.path}' to find the pass"
        )
    return Folded(training, result.graph, result, certificate, shape)


def compile(
    source: str | Path,
    output: str | Path | None = None,
    *,
    arch: str | None = None,
    gate_order: Literal["stored", "sorted"] = "stored",
    zero_gates: Literal["identity", "ones"] | None = None,
    input_size: int | None = None,
    batch: int | None = None,
    gpu: Sequence[str] = (),
    engine: bool = True,
    pipeline: Pipeline | None = None,
    check_passes: bool = False,
    dump_passes: str | Path | None = None,
    force: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Compile the checkpoint ``source`` into the bundle ``output`` (by default ``<stem>.foldgroup`` here).

    The batch is dynamic unless ``batch`` fixes it. ``gpu`` names the compute capabilities of the TensorRT-RTX engine;
    where TensorRT-RTX is not installed and none is named, the bundle has no engine and says so in ``engines.json``.
    ``on_step`` is told the name of each step as it ends.

    Raises:
        FoldgroupError: of the stage that fails; nothing is written then.
    """
    source = Path(source)
    output = Path(output) if output is not None else Path(default_bundle_name(source))
    check_target(output, force=force)
    if engine and gpu:
        tensorrt.check_capabilities(gpu)
    clock = _Clock(on_step)
    checkpoint = load_checkpoint(source, arch=arch, gate_order=gate_order, zero_gates=zero_gates)
    clock("read checkpoint")
    folded = fold(
        checkpoint,
        pipeline=pipeline,
        input_size=input_size,
        check_passes=check_passes,
        dump_passes=Path(dump_passes) if dump_passes is not None else None,
        on_step=clock,
    )
    inputs = seeded_inputs((batch or GOLDEN_INPUTS, *folded.input_shape[1:]))
    reference, error = _float64_tier(source, folded, inputs)
    clock("float64")

    size = folded.input_shape[2]
    options = {"arch": arch, "gate_order": gate_order, "zero_gates": zero_gates, "input_size": size, "batch": batch}
    content = {
        files.PASSES: to_json(
            {"options": options, "notes": checkpoint.notes, "passes": [_record(r) for r in folded.result.records]}
        ),
        files.PREPROCESSING: to_json({**asdict(_preprocessing(checkpoint, size)), "classes": list(checkpoint.classes)}),
    }
    manifest = manifest_of(checkpoint, folded, batch)
    shape = (batch or 1, *folded.input_shape[1:])
    graph = typed(folded.folded, torch.float32)
    del checkpoint, folded  # the dense kernels: most of the memory, and no longer needed

    model = export_onnx(graph, shape, fixed_batch=batch is not None)
    clock("ONNX")
    with OnnxRuntimeRunner(model) as runner:
        tier = TierResult(
            "onnxruntime fp32", ErrorStatistics.of(runner.run(inputs.numpy()), reference.numpy()), LIMITS["fp32"]
        )
    clock("ONNX Runtime")
    if not tier:
        raise EquivalenceError(f"{source}: under ONNX Runtime, {'; '.join(tier.violations)}")
    engines, plans = _build_engines(model, gpu) if engine else ({"engines": [], "note": "left out by --no-engine"}, {})
    clock("TensorRT-RTX engine" if plans else f"no engine, {engines['note']}")

    from safetensors.torch import save

    content[MODEL] = model
    golden = save({"input": inputs, "logits": reference})
    manifest["files"] = {name: file_entry(data) for name, data in content.items()}
    verification = {
        "float64_max_error": error,
        "tiers": {tier.name: tier.as_dict()},
        "machine": machine(),
        "golden": {"file": files.GOLDEN, **file_entry(golden)},
        "seconds": clock.seconds,
    }
    documents = {
        files.MANIFEST: manifest,
        files.ENGINES: {"schema": files.SCHEMA, **engines},
        files.VERIFICATION: verification,
    }
    written = {**content, **plans, files.GOLDEN: golden, **{name: to_json(doc) for name, doc in documents.items()}}
    result = write_bundle(output, written, force=force)
    clock("bundle")
    return result


class _Clock:
    """Tells ``on_step`` of every step as it ends, and keeps how many seconds each took."""

    def __init__(self, on_step: Callable[[str], None]) -> None:
        self.on_step = on_step
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = round(now - self.last, 3)
        self.last = now
        self.on_step(step)


def _float64_tier(source: Path, folded: Folded, inputs: Tensor) -> tuple[Tensor, float]:
    """The training form's float64 logits for ``inputs`` [N, C, H, W], and the folded form's error against them.

    Raises:
        EquivalenceError: if the error is over the limit; it names the first layer that is.
    """
    reference = evaluate(folded.training, inputs)["output"]
    error = float64_error(reference, folded.folded, inputs)
    if not error <= FLOAT64_LIMIT:
        layers = layer_errors(folded.training, folded.folded, folded.certificate, inputs)
        raise EquivalenceError(
            f"{source}: in float64 the folded network differs from the trained one by {error:.1e}, more than "
            f"{FLOAT64_LIMIT:.0e}; the first layer to do so is {first_layer_over(layers, FLOAT64_LIMIT)}"
        )
    return reference, error


def _preprocessing(checkpoint: Checkpoint, size: int) -> Preprocessing:
    """The checkpoint's preprocessing, or the standard one with its mean and deviation for another size."""
    stored = checkpoint.preprocessing
    return stored if stored.size == size else replace(Preprocessing.standard(size), mean=stored.mean, std=stored.std)


def default_bundle_name(source: Path) -> str:
    """``<stem>.foldgroup``, where the stem of ``x.pth.tar`` is ``x``."""
    name = source.name
    for suffix in (".pth.tar", ".pt", ".pth", ".safetensors"):
        if name.endswith(suffix):
            return name[: -len(suffix)] + ".foldgroup"
    return source.stem + ".foldgroup"


def _build_engines(model: bytes, gpu: Sequence[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of ``engines.json``, and the plans by file name; none where no builder is installed or asked for."""
    if not gpu and not tensorrt.available():
        return {"engines": [], "note": "tensorrt-rtx is not installed here"}, {}
    built = tensorrt.build_engine(model, compute_capabilities=gpu)
    entry = {
        "file": tensorrt.PLAN,
        **file_entry(built.content),
        "builder": built.builder,
        "version": built.version,
        **built.facts,
        "onnx_sha256": file_entry(model)["sha256"],
    }
    return {"engines": [entry]}, {tensorrt.PLAN: built.content}


def _record(record: PassRecord) -> dict[str, Any]:
    """What ``foldgroup explain`` shows of a pass; no times."""
    return {
        "name": record.name,
        "changed": record.changed,
        "rewrites": [asdict(note) for note in record.rewrites],
        "skips": [asdict(note) for note in record.skips],
        "shuffles": [asdict(entry) for entry in record.ledger],
    }


def _learned_layers(folded: Folded) -> list[dict[str, Any]]:
    """What became of every DGConv layer, for the manifest; MACs are for one image."""
    executed = {cost.name: cost for cost in layer_costs(folded.folded)}
    layers = []
    for node in folded.training.graph.nodes:
        layer = called_module(folded.training, node)
        if not isinstance(layer, DGConv2d):
            continue
        name = str(node.target)
        groups = layer.grouping.groups
        _, out_channels, *positions = shape_of(node)
        dense = out_channels * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
        for n in positions:
            dense *= n
        layers.append(
            {
                "name": name,
                "in_channels": layer.in_channels,
                "out_channels": layer.out_channels,
                "gate_bits": list(layer.bits),
                "groups": groups,
                "executed_groups": executed[name].groups,
                "macs": dense // groups,
                "executed_macs": executed[name].macs,
            }
        )
    return layers


def manifest_of(checkpoint: Checkpoint, folded: Folded, batch: int | None = None) -> dict[str, Any]:
    """The manifest of a compile with a dynamic batch or ``batch``, but for its files."""
    layers = _learned_layers(folded)
    executed = macs(folded.folded)
    packed = sum(layer["executed_macs"] - layer["macs"] for layer in layers)
    ledger = folded.result.ledger
    output_shape = shape_of(folded.folded.graph.output_node().all_input_nodes[0])
    free = batch or BATCH
    return {
        "schema": files.SCHEMA,
        "checkpoint": {"sha256": checkpoint.sha256, "dialect": checkpoint.dialect, "arch": checkpoint.arch},
        "input": {"name": INPUT, "shape": [free, *folded.input_shape[1:]]},
        "output": {"name": OUTPUT, "shape": [free, *output_shape[1:]]},
        "precision": "fp32",
        "versions": {name: version(name) for name in ("foldgroup", "onnx", "onnxscript", "torch")},
        "layers": layers,
        "shuffles": {
            "inserted": len(ledger),
            "absorbed": sum(entry.fate == "absorbed" for entry in ledger),
            "cancelled": sum(entry.fate == "cancelled" for entry in ledger),
            "kept": [{"node": entry.node, "reason": entry.reason} for entry in ledger if entry.fate == "kept"],
        },
        "macs": {"training": macs(folded.training), "nominal": executed - packed, "executed": executed},
        "params": {"training": params(folded.training), "folded": params(folded.folded)},
        "certificate": folded.certificate.as_dict(),
    }


def bisect(
    source: str | Path,
    *,
    arch: str | None = None,
    gate_order: Literal["stored", "sorted"] = "stored",
    zero_gates: Literal["identity", "ones"] | None = None,
    input_size: int | None = None,
    pipeline: Pipeline | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> PassRecord | None:
    """The first pass after which the network is no longer the trained one, or None.

    Every pass is checked by the certificate and in float64.
    """
    checkpoint = load_checkpoint(Path(source), arch=arch, gate_order=gate_order, zero_gates=zero_gates)
    training, shape = _trace(checkpoint, input_size)
    result = (pipeline or _default_pipeline()).run(
        training,
        check=pass_check(training, seeded_inputs(shape)),
        stop_at_difference=False,
        on_pass=lambda record, _: on_step(record.name),
    )
    return first_difference(result.records)


def _default_pipeline() -> Pipeline:
    """The default passes and those of installed packages."""
    from passes import default_pipeline

    return default_pipeline().with_entry_points()


def _trace(checkpoint: Checkpoint, input_size: int | None) -> tuple[fx.GraphModule, tuple[int, int, int, int]]:
    """The training form's graph, and the shape of one input."""
    size = input_size or checkpoint.preprocessing.size
    shape = (1, next(checkpoint.model.parameters()).shape[1], size, size)
    return trace(checkpoint.model, shape), shape
