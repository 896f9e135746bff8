"""The main job: a checkpoint in, a verified bundle out."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from torch import Tensor, nn

from foldgroup.bundle import Bundle, check_target, default_bundle_name, write_bundle
from foldgroup.checkpoint import Checkpoint, Preprocessing, load_network
from foldgroup.clock import Clock
from foldgroup.compile_options import Job, check_images, chosen_variants
from foldgroup.documents import Outcome, bundle_files
from foldgroup.emit.engine import Engine
from foldgroup.emit.preprocess import with_preprocessing
from foldgroup.emit.quantize import Calibration
from foldgroup.engines import EngineSettings, build
from foldgroup.equivalence import TierResult, first_layer_over, seeded_inputs
from foldgroup.errors import BundleError, EquivalenceError
from foldgroup.folding import fold_traced, input_shape_of, shape_like, trace_network
from foldgroup.handover import TRITON, Repository, served_name, triton
from foldgroup.images import unlabelled
from foldgroup.lowering import CalibrationData
from foldgroup.networks import Folding, Networks, networks_of
from foldgroup.own_model import ModelSource
from foldgroup.pipeline import ENTRY_POINTS, Pipeline
from foldgroup.profiling import profile
from foldgroup.profiling.limits import RUNTIMES
from foldgroup.targets import Variant
from foldgroup.tiers import Tiers, run_tiers, stand_in
from foldgroup.tuned import TuningOptions

CALIBRATION_IMAGES = 256
"""Images that int8 is calibrated on, unless told otherwise."""

PROFILE_SECONDS = 0.5
"""Time to look where the time goes in; to that come loading, a few runs at least and, once a process, the limits."""


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
    database = None if tuning_db is None else Path(tuning_db)
    place = output.absolute()
    job = Job(
        chosen=chosen,
        precisions=tuple(dict.fromkeys((*asked, *(variant.precision for variant in chosen)))),
        keep_float=tuple(keep_float),
        batch=batch,
        engine=engine,
        settings=replace(
            engine_settings,
            gpu=gpu,
            batch=batch if isinstance(batch, tuple) else engine_settings.batch,
            timing_cache=engine_settings.timing_cache or place.with_name(place.name + ".timing"),
        ),
        tuning=TuningOptions(packing, tune, tune_budget, threads, _typical(batch), database, vector_width),
        emit=tuple(emit),
        bake_preprocessing=bake_preprocessing,
    )
    job.check(
        {
            "--calibrate": calibrate is not None,
            "--calibration": calibration != "minmax",
            "--reduce-range": reduce_range is not None,
            "--optimization-level": engine_settings.optimization_level is not None,
            "--workspace": engine_settings.workspace_mib is not None,
            "--timing-cache": engine_settings.timing_cache is not None,
        }
    )
    clock = Clock(on_step)
    checkpoint = load_network(source, arch=arch, gate_order=gate_order, zero_gates=zero_gates, model=model)
    clock("read checkpoint")
    shape = input_shape_of(checkpoint, input_size, shape_like(example_input))
    if calibrate is not None or bake_preprocessing:
        check_images(checkpoint.path, shape[1:])
    square = len(shape) == 4 and shape[2] == shape[3]
    preprocessing = _preprocessing(checkpoint, shape[2]) if square else None
    data = None
    if calibrate is not None:
        assert preprocessing is not None
        images = unlabelled(Path(calibrate), preprocessing, limit=calibration_images)
        data = CalibrationData(images, calibration, reduce_range)
        clock("read calibration images")
    options = {
        "arch": arch,
        "gate_order": gate_order,
        "zero_gates": zero_gates,
        "batch": batch,
        "model": checkpoint.built_by,
        "input_shape": shape[1:],
        "input_size": shape[2] if square else None,
        "precision": job.precisions,
        "keep_float": keep_float,
    }
    traced = trace_network(checkpoint, input_shape=shape[1:])
    clock("trace")
    folding = Folding(
        partial(fold_traced, traced, pipeline=pipeline, check_passes=check_passes),
        dumped=None if dump_passes is None else Path(dump_passes),
        foreign=pipeline is not None or bool(entry_points(group=ENTRY_POINTS)),
    )
    networks = networks_of(traced, folding, data, job, clock)
    # Graphs, most of the memory, are no longer needed; they refer to themselves, so someone has to look.
    del source, checkpoint, traced, folding
    collecting = Thread(target=gc.collect)
    collecting.start()
    clock("float64")
    engines = _engines(networks, job, clock)
    tiers = _judged(networks, engines, job, clock)
    repository = Repository()
    if TRITON in job.emit:
        prepared = preprocessing if bake_preprocessing else None
        repository = _repository(output.name, networks, engines, prepared, job.settings.batch)
        clock("Triton repository")
    collecting.join()
    profiled = _profiled(networks.models, tiers, networks.shape, threads)
    clock("profile")
    outcome = Outcome(engines, tiers, repository, profiled, clock.seconds)
    result = write_bundle(
        output, bundle_files(output.name, networks, outcome, preprocessing, options, job), force=force
    )
    clock("bundle")
    return result


def _engines(networks: Networks, job: Job, clock: Clock) -> dict[Variant, Engine]:
    """What the targets run that take no ONNX file."""
    built = {}
    for variant in job.chosen:
        if variant.target.takes == "engine":
            low, fixed = networks.lowered[networks.key_of[variant]], job.fixed_batch is not None
            built[variant] = build(variant, low, networks.shape, job.settings, fixed_batch=fixed, on_step=clock.on_step)
            clock(f"{variant} engine")
    return built


def _judged(networks: Networks, engines: Mapping[Variant, Engine], job: Job, clock: Clock) -> Tiers:
    """Everything that runs here, run; what cannot is judged by its ONNX file where some runtime takes that.

    Raises:
        EquivalenceError: if something computes another network.
    """
    ran = run_tiers(networks.models | {variant: engine.content for variant, engine in engines.items()}, networks.golden)
    unjudged = set(job.precisions) - {variant.precision for variant in job.chosen if str(variant) in ran.results}
    stand_ins = {v: networks.lowered[v.precision].model for v in map(stand_in, sorted(unjudged)) if v is not None}
    tiers = Tiers()
    for part in (networks.rounded, ran, run_tiers(stand_ins, networks.golden)):
        tiers.add(part)
    clock("runtimes")
    for tier in tiers.results.values():
        _judge(networks.path, tier, networks.layer_errors.get(tier.precision, {}))
    return tiers


def _repository(
    name: str,
    networks: Networks,
    engines: Mapping[Variant, Engine],
    preprocessing: Preprocessing | None,
    batch: tuple[int, int, int],
) -> Repository:
    """For a Triton Inference Server; with ``preprocessing`` its ONNX files take images as they are decoded."""
    served = networks.models
    if preprocessing is not None:
        served |= {v: with_preprocessing(model, preprocessing) for v, model in served.items() if v not in engines}
    plans = {variant: engine.content for variant, engine in engines.items()}
    return triton(served_name(name), served, plans, classes=networks.classes, batch=batch)


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


def _preprocessing(checkpoint: Checkpoint, size: int) -> Preprocessing:
    """The checkpoint's preprocessing, or the standard one with its mean and deviation for another size."""
    stored = checkpoint.preprocessing
    return stored if stored.size == size else replace(Preprocessing.standard(size), mean=stored.mean, std=stored.std)
