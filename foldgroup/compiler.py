"""The main job: a checkpoint in, a verified bundle out."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foldgroup import bundle as files
from foldgroup.bundle import Bundle, check_target, classes_of, file_entry, precision_of, to_json, write_bundle
from foldgroup.checkpoint import Checkpoint, Preprocessing, load_network
from foldgroup.compile_options import check_images, check_options, chosen_variants
from foldgroup.emit.engine import Engine
from foldgroup.emit.preprocess import with_preprocessing
from foldgroup.emit.quantize import Calibration
from foldgroup.engines import EngineSettings, build, entry
from foldgroup.equivalence import TierResult, first_layer_over, seeded_inputs
from foldgroup.errors import BundleError, CheckpointError, EquivalenceError, TargetError, TraceError
from foldgroup.folding import Folded, Traced, check_float64, fold_traced, input_shape_of, shape_like, trace_network
from foldgroup.golden import Golden
from foldgroup.handover import TRITON, Repository, served_name, triton
from foldgroup.images import unlabelled
from foldgroup.lowering import AUTO, CalibrationData, Form, Lowered, lower
from foldgroup.manifest import manifest_of
from foldgroup.measure import machine
from foldgroup.own_model import ModelSource
from foldgroup.pipeline import ENTRY_POINTS, PassRecord, Pipeline
from foldgroup.profiling import profile
from foldgroup.profiling.limits import RUNTIMES
from foldgroup.report.page import report_page
from foldgroup.targets import Variant, onnx_first
from foldgroup.tiers import Tiers, layer_errors, rounded_tier, run_tiers, stand_in
from foldgroup.tuned import Costs, NetworkTuner, Tuned, TuningOptions, forms_of, plans_of

CALIBRATION_IMAGES = 256
"""Images that int8 is calibrated on, unless told otherwise."""

PROFILE_SECONDS = 0.5
"""Time to look where the time goes in; to that come loading, a few runs at least and, once a process, the limits."""

WORST_LAYERS = 5
"""How many layers ``verification.json`` names for each precision."""


def compile(
    source: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    example_input: Tensor | Sequence[int] | None = None,
    model: ModelSource | None = None,
    arch: str | None = None,
    gate_order: Literal["stored", "sorted"] = "stored",
    zero_gates: Literal["identity", "ones"] | None = None,
    input_size: int | None = None,
    batch: int | tuple[int, int, int] | None = None,
    target: Sequence[str] = (),
    precision: str | Sequence[str] = (),
    keep_float: Sequence[str] = (),
    calibrate: str | Path | None = None,
    calibration: Calibration = "minmax",
    calibration_images: int = CALIBRATION_IMAGES,
    reduce_range: bool | None = None,
    gpu: Sequence[str] = (),
    engine: bool = True,
    engine_settings: EngineSettings = EngineSettings(),  # noqa: B008  # frozen
    emit: Sequence[str] = (),
    bake_preprocessing: bool = False,
    packing: bool = True,
    vector_width: int | None = None,
    tune: bool = False,
    tune_budget: float = 60.0,
    threads: int | None = 1,
    tuning_db: str | Path | None = None,
    pipeline: Pipeline | None = None,
    check_passes: bool = False,
    dump_passes: str | Path | None = None,
    force: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Compile the checkpoint or module ``source`` into the bundle ``output``.

    By default a checkpoint's is ``<stem>.foldgroup`` here. ``example_input`` is a tensor [N, C, …] such as the network
    takes, or its shape; it must be given with a module, which is put in evaluation mode and otherwise left as it is.
    ``model`` is a function, or its name as ``package.module:function``, that builds the checkpoint's network where it
    is none of foldgroup's own; without ``example_input`` that is taken for one of square images of ``input_size``
    pixels.

    ``target`` are names of :data:`foldgroup.targets.TARGETS`, or TARGET:PRECISION; by default ONNX Runtime, and
    TensorRT-RTX where it is installed; ``engine`` False leaves out what takes one. ``precision`` is one or several of
    fp32 (the default), fp16, bf16 and int8, in which every target runs that takes them; the first is that of
    ``model.onnx``. int8 is calibrated on at most ``calibration_images`` images found below the folder ``calibrate``;
    ``reduce_range`` gives its weights seven bits, by default where this CPU needs it.
    ``keep_float`` are layers that stay in float32: names, wildcards, or ``auto`` to measure which.

    ``batch`` is None for a dynamic one, a number for a fixed one, or the least, typical and greatest that engines are
    built for. ``gpu`` names the compute capabilities of TensorRT-RTX's, such as sm89; ``engine_settings`` holds the
    rest, but for the batch. TensorRT's timing cache is by default ``<output>.timing``, beside the bundle.

    Convolutions with groups run in the exact form that is expected to be fastest on each target, for a CPU whose
    vectors hold ``vector_width`` float32 values, by default this one's. ``tune`` measures that here, for about
    ``tune_budget`` seconds, with ``threads`` (None for the runtime's choice) and the typical batch, and keeps the times
    in ``tuning_db``; the result is compared whole, so it is never slower than without. ``packing`` False keeps the
    groups that were learned.

    ``emit`` may name ``triton``, for a Triton Inference Server model repository in the bundle. ``bake_preprocessing``
    adds ``model.image.onnx``, which takes images as they are decoded. ``on_step`` is told the name of each step as it
    ends.

    Raises:
        FoldgroupError: of the stage that fails; nothing is written then.
    """
    if output is None and isinstance(source, nn.Module):
        raise BundleError(f"{type(source).__name__}: a module has no file to name the bundle after: give output")
    output = Path(default_bundle_name(Path(str(source)))) if output is None else Path(output)
    check_target(output, force=force)
    asked = [precision] if isinstance(precision, str) else precision
    chosen = chosen_variants(target, asked, engine=engine, gpu=gpu)
    precisions = tuple(dict.fromkeys((*asked, *(variant.precision for variant in chosen))))
    given = {
        "--tune": tune,
        "--no-packing": not packing,
        "--vector-width": vector_width is not None,
        "--calibrate": calibrate is not None,
        "--calibration": calibration != "minmax",
        "--reduce-range": reduce_range is not None,
    }
    check_options(chosen, precisions, keep_float, emit, engine_settings, given)
    database = None if tuning_db is None else Path(tuning_db)
    tuning = TuningOptions(packing, tune, tune_budget, threads, _typical(batch), database, vector_width)
    fixed, place = batch if isinstance(batch, int) else None, output.absolute()
    settings = replace(
        engine_settings,
        gpu=gpu,
        batch=batch if isinstance(batch, tuple) else engine_settings.batch,
        timing_cache=engine_settings.timing_cache or place.with_name(place.name + ".timing"),
    )
    clock = _Clock(on_step)
    checkpoint = load_network(source, arch=arch, gate_order=gate_order, zero_gates=zero_gates, model=model)
    clock("read checkpoint")
    own_shape = input_shape_of(checkpoint, input_size, shape_like(example_input))
    square = len(own_shape) == 4 and own_shape[2] == own_shape[3]
    if calibrate is not None or bake_preprocessing:
        check_images(checkpoint.path, own_shape[1:])
    preprocessing = _preprocessing(checkpoint, own_shape[2]) if square else None
    data = None
    if calibrate is not None:
        assert preprocessing is not None
        images = unlabelled(Path(calibrate), preprocessing, limit=calibration_images)
        data = CalibrationData(images, calibration, reduce_range)
        clock("read calibration images")
    shape, first = (fixed or 1, *own_shape[1:]), precisions[0]
    traced = trace_network(checkpoint, input_shape=own_shape[1:])
    clock("trace")
    refold = partial(fold_traced, traced, pipeline=pipeline, check_passes=check_passes)
    costs = {variant: Costs(variant, replace(tuning, measure=False)) for variant in onnx_first(chosen)}
    dumped = None if dump_passes is None else Path(dump_passes)
    foreign = pipeline is not None or bool(entry_points(group=ENTRY_POINTS))
    beside = ThreadPoolExecutor(1)  # all here is Python, torch lets other threads run while it computes
    golden_made = beside.submit(_golden, traced, data)
    if foreign:
        wait([golden_made])  # tracing changes what it is to call a module, and other passes may do that
    folded = refold(cost=next(iter(costs.values())), dump_passes=dumped, on_step=clock)
    if foreign:
        folded.check_certificate()  # packing trusts what it is given
    lower_form = partial(lower, batch=fixed, calibration=data)
    choices = {variant: Tuned(variant, plan) for variant, plan in plans_of(folded, costs).items()}
    if tune:
        wait([golden_made])  # it would be in the way
        kept = tuple(name for name in keep_float if name != AUTO)

        def whole(form: Form, variant: Variant) -> bytes:
            low = lower_form(form, variant.precision, keep_float=kept)
            engine = variant.target.takes == "engine"
            return build(variant, low, shape, settings, fixed_batch=fixed is not None).content if engine else low.model

        tuner = NetworkTuner(tuning, refold, whole, own_shape, on_step)
        choices = tuner.tune({variant: choice.plan for variant, choice in choices.items()})
        folded = next(iter(choices.values())).plan.folded
        clock("tuning")
    checked = beside.submit(_float64_error, folded, golden_made)
    forms, key_of = forms_of(precisions, choices)
    clock("packing")
    golden = golden_made.result()
    clock("float64")
    manifest = manifest_of(checkpoint, folded, fixed, first, forms[first])
    path, classes = checkpoint.path, checkpoint.classes
    if classes and classes_of(manifest) != len(classes):
        raise CheckpointError(f"{path}: names {len(classes)} classes, but the network is no classifier of so many")
    if AUTO in keep_float and len(manifest["outputs"]) > 1:
        raise TargetError(f"{path}: --keep-float {AUTO} measures one output, and there are more: name the layers")
    tunings = {str(variant): choice.as_dict(tuning, forms[key_of[variant]]) for variant, choice in choices.items()}
    options: dict[str, Any] = {"arch": arch, "gate_order": gate_order, "zero_gates": zero_gates, "batch": batch}
    options |= {"model": checkpoint.built_by, "input_shape": own_shape[1:]}
    options |= {"input_size": own_shape[2] if square else None, "precision": precisions, "keep_float": keep_float}
    records = [_record(record) for record in folded.result.records]
    content = {
        files.PASSES: to_json(
            {
                "options": options,
                "notes": checkpoint.notes,
                "passes": records,
                "costs": next(iter(choices.values())).plan.planned_by.as_dict(),
            }
        ),
        files.PREPROCESSING: to_json({**(asdict(preprocessing) if preprocessing else {}), "classes": list(classes)}),
    }

    lower_all = partial(lower_form, keep_float=keep_float, on_step=clock)
    lowered, errors, tiers = _lowered(forms, lower_all, golden, fixed, clock)
    error = checked.result()
    # Graphs, most of the memory, are no longer needed; they refer to themselves, so someone has to look.
    del source, checkpoint, traced, golden_made, folded, checked, refold, choices, costs, forms
    collected = beside.submit(gc.collect)
    beside.shutdown(wait=False)
    clock("float64")
    read = {key_of[variant] for variant in chosen if variant.target.takes == "onnx"}
    onnx_files = {key: _file(key, first, ".onnx") for key in lowered if key in read.union(precisions)}
    content |= {name: lowered[key].model for key, name in onnx_files.items()}
    if bake_preprocessing:
        assert preprocessing is not None
        content[files.IMAGE_MODEL] = with_preprocessing(lowered[first].model, preprocessing)
        clock("preprocessing")
    manifest |= {
        "models": {
            key: {**({"file": onnx_files[key]} if key in onnx_files else {}), **low.facts}
            for key, low in lowered.items()
        },
        "targets": [{"target": variant.target.name, "precision": variant.precision} for variant in chosen],
        "files": {name: file_entry(data) for name, data in content.items()},
    }

    models = {variant: lowered[key_of[variant]].model for variant in chosen}
    built: dict[Variant, Engine] = {}
    for variant in chosen:
        if variant.target.takes == "engine":
            low = lowered[key_of[variant]]
            built[variant] = build(variant, low, shape, settings, fixed_batch=fixed is not None, on_step=on_step)
            clock(f"{variant} engine")
    engines = {variant: made.content for variant, made in built.items()}
    ran = run_tiers(models | engines, golden)
    unjudged = set(precisions) - {variant.precision for variant in chosen if str(variant) in ran.results}
    stand_ins = {v: lowered[v.precision].model for v in map(stand_in, sorted(unjudged)) if v is not None}
    for part in (ran, run_tiers(stand_ins, golden)):
        tiers.add(part)
    clock("runtimes")
    for tier in tiers.results.values():
        _judge(path, tier, errors.get(tier.precision, {}))
    repository = Repository()
    if TRITON in emit:
        served = dict(models)
        if preprocessing is not None and bake_preprocessing:
            served |= {v: with_preprocessing(model, preprocessing) for v, model in models.items() if v not in engines}
        repository = triton(served_name(output.name), served, engines, classes=classes, batch=settings.batch)
        clock("Triton repository")

    names = {variant: _file(variant.precision, first, variant.target.suffix) for variant in built}
    golden_file = golden.save()
    wait([collected])
    profiled = _profiled(models, ran, shape, threads)
    clock("profile")
    documents = {
        files.MANIFEST: manifest,
        files.ENGINES: {
            "schema": files.SCHEMA,
            "engines": [entry(names[v], v, made, models[v]) for v, made in built.items()],
            "files": {name: file_entry(data) for name, data in repository.files.items()},
            "not_served": repository.left_out,
            **({} if built else {"note": "no target asked for takes one" if engine else "left out by --no-engine"}),
        },
        files.VERIFICATION: {
            "float64_max_error": error,
            "tiers": {name: tier.as_dict() for name, tier in tiers.results.items()},
            "runtimes": tiers.runtimes,
            "not_run": tiers.not_run,
            "tuning": tunings,
            **({} if profiled is None else {"profile": profiled}),
            "worst_layers": {name: _worst(own) for name, own in errors.items()},
            "machine": machine(),
            "golden": {"file": files.GOLDEN, **file_entry(golden_file)},
            "seconds": clock.seconds,
        },
    }
    written = {
        **content,
        **{names[variant]: plan for variant, plan in engines.items()},
        **repository.files,
        files.GOLDEN: golden_file,
        **{name: to_json(document) for name, document in documents.items()},
        files.REPORT: _report(output.name, content, documents),
    }
    result = write_bundle(output, written, force=force)
    clock("bundle")
    return result


def _golden(traced: Traced, data: CalibrationData | None) -> Golden:
    """The training form's outputs on seeded inputs and on some of the images that it is calibrated on.

    They are those of the network itself, or it is refused.
    """
    try:
        golden = Golden.of(traced.training, traced.input_shape, torch.from_numpy(data.images) if data else None)
        golden.check_seen(traced.checkpoint.model, traced.training)
        return golden
    except TraceError as failed:
        raise TraceError(f"{traced.checkpoint.path}: {failed}") from failed.__cause__


def _float64_error(folded: Folded, golden_made: Future[Golden]) -> float:
    golden = golden_made.result()
    return check_float64(folded, golden.inputs, golden.outputs)


def _lowered(
    forms: Mapping[str, Form],
    lower_form: Callable[[Form, str], Lowered],
    golden: Golden,
    batch: int | None,
    clock: _Clock,
) -> tuple[dict[str, Lowered], dict[str, dict[str, float]], Tiers]:
    """Every form in its precision; by precision the error of each layer; and what rounding alone costs."""
    lowered: dict[str, Lowered] = {}
    errors: dict[str, dict[str, float]] = {}
    tiers = Tiers()
    for key, form in forms.items():
        name = precision_of(key)
        low = lower_form(form, name)
        if name != "fp32" and key == name:  # packing changes no value: once a precision
            errors[key] = layer_errors(name, form.graph, low.model, low.keep_float, golden, batch=batch)
            if name in ("fp16", "bf16"):
                tiers.results[f"rounded {name}"] = rounded_tier(name, form.graph, low.keep_float, golden, errors[key])
        clock(f"errors in {key}")
        lowered[key] = low
    return lowered, errors, tiers


def _file(key: str, first: str, suffix: str) -> str:
    """``model<suffix>`` in the first precision asked for, ``model.<precision><suffix>`` in another.

    The key of a target with a form of its own gives ``model.<target>.<precision><suffix>``.
    """
    return f"model{suffix}" if key == first else f"model.{key.replace(' ', '.')}{suffix}"


def _typical(batch: int | tuple[int, int, int] | None) -> int:
    """The batch that is tuned for."""
    return batch if isinstance(batch, int) else 1 if batch is None else batch[1]


def _profiled(
    models: Mapping[Variant, bytes], ran: Tiers, shape: tuple[int, ...], threads: int | None
) -> dict[str, Any] | None:
    """Where the time of the first network goes that ran here on the processor; None if none did."""
    for variant, model in models.items():
        if variant.target.name in RUNTIMES and str(variant) in ran.results:
            inputs = seeded_inputs(shape).numpy()
            cores = threads or os.cpu_count() or 1
            return profile(variant, model, inputs, cores, seconds=PROFILE_SECONDS, turns=1).as_dict()
    return None


def _report(name: str, content: Mapping[str, bytes], documents: Mapping[str, Any]) -> bytes:
    """The page for people, from what the other files hold."""
    read = {key: json.loads(content[key]) for key in (files.PASSES, files.PREPROCESSING)}
    page = report_page(
        name,
        documents[files.MANIFEST],
        read[files.PASSES],
        documents[files.VERIFICATION],
        documents[files.ENGINES],
        read[files.PREPROCESSING],
    )
    return page.encode()


def _worst(errors: Mapping[str, float]) -> list[dict[str, Any]]:
    """The layers with the largest errors, the worst first."""
    ranked = sorted(errors.items(), key=lambda item: item[1], reverse=True)
    return [{"layer": name, "error": error} for name, error in ranked[:WORST_LAYERS]]


def _judge(source: Path, tier: TierResult, errors: Mapping[str, float]) -> None:
    """Stop at a tier that failed, with the first layer that is off.

    Raises:
        EquivalenceError: naming the limits that were exceeded.
    """
    if not tier:
        first = first_layer_over(errors, tier.limits.max_error)
        where = f"; the first layer over is {first}" if first else ""
        where += f": keep it in float with --keep-float {first}" if first and tier.precision != "fp32" else ""
        raise EquivalenceError(f"{source}: {tier.name}: {'; '.join(tier.violations)}{where}")


class _Clock:
    """Tells ``on_step`` of every step as it ends, and keeps how many seconds each took."""

    def __init__(self, on_step: Callable[[str], None]) -> None:
        self.on_step = on_step
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = round(self.seconds.get(step, 0.0) + now - self.last, 3)
        self.last = now
        self.on_step(step)


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


def _record(record: PassRecord) -> dict[str, Any]:
    """What ``foldgroup explain`` shows of a pass; no times."""
    return {
        "name": record.name,
        "changed": record.changed,
        "rewrites": [asdict(note) for note in record.rewrites],
        "skips": [asdict(note) for note in record.skips],
        "shuffles": [asdict(entry) for entry in record.ledger],
        **({"details": record.details} if record.details else {}),
    }
