"""A traced network folded, in every form and precision that a compile is asked for, beside what it must equal.

::

    training form ─► passes ─► folded ─► a form for each target ─► ONNX in each precision
          └────────► golden inputs and float64 outputs ─► compared with the folded network, and with the network itself

Both lines are computed at once: passes are Python, and torch lets other threads run while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foldgroup.bundle import classes_of, precision_of
from foldgroup.clock import Clock
from foldgroup.compile_options import Job
from foldgroup.engines import build
from foldgroup.errors import CheckpointError, TargetError, TraceError
from foldgroup.folding import Folded, Traced, check_float64
from foldgroup.golden import Golden
from foldgroup.lowering import AUTO, CalibrationData, Form, Lowered, lower
from foldgroup.manifest import manifest_of
from foldgroup.pipeline import PassRecord
from foldgroup.targets import Variant, onnx_first
from foldgroup.tiers import Tiers, layer_errors, rounded_tier
from foldgroup.tuned import Costs, NetworkTuner, Tuned, forms_of, plans_of
from foldgroup.tuning.table import CostTable


@dataclass(frozen=True)
class Folding:
    """How a traced network is folded: ``refold`` does it given ``cost``.

    The first time, its passes are written below ``dumped``. ``foreign`` tells whether there may be passes among them
    that are none of foldgroup's own.
    """

    refold: Callable[..., Folded]
    dumped: Path | None = None
    foreign: bool = False


@dataclass(frozen=True)
class Networks:
    """A folded network in every form and precision, and what is known of it; it holds no graph of the training form."""

    path: Path
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    """[N, C, …] of the inputs that it is timed with and that engines are built for."""
    manifest: dict[str, Any]
    """But for what is written."""
    notes: Sequence[str]
    """Of the reader of the checkpoint."""
    records: tuple[PassRecord, ...]
    planned_by: CostTable
    tunings: dict[str, Any]
    """For ``verification.json``, by variant."""
    lowered: dict[str, Lowered]
    key_of: Mapping[Variant, str]
    """Under which key of ``lowered`` each variant's is, or what its engine is built from."""
    golden: Golden
    float64_error: float
    layer_errors: dict[str, dict[str, float]]
    """By precision and layer."""
    rounded: Tiers
    """What rounding alone costs."""

    @property
    def models(self) -> dict[Variant, bytes]:
        """The ONNX file of every variant."""
        return {variant: self.model(variant) for variant in self.key_of}

    def model(self, variant: Variant) -> bytes:
        """The ONNX file that ``variant`` runs, or that its engine is built from."""
        return self.lowered[self.key_of[variant]].model


def networks_of(traced: Traced, folding: Folding, data: CalibrationData | None, job: Job, clock: Clock) -> Networks:
    """Fold the network, choose the forms it runs in, by measuring if ``job`` says so, and lower it to every precision.

    ``data`` is what int8 is calibrated with.

    Raises:
        FoldgroupError: of the stage that fails.
    """
    checkpoint, fixed = traced.checkpoint, job.fixed_batch
    lower_form = partial(lower, batch=fixed, calibration=data)
    costs = {v: Costs(v, replace(job.tuning, measure=False)) for v in onnx_first(job.chosen)}
    beside = ThreadPoolExecutor(1)
    golden_made = beside.submit(_golden, traced, data)
    if folding.foreign:
        wait([golden_made])  # tracing changes what it is to call a module, and other passes may do that
    folded = folding.refold(cost=next(iter(costs.values())), dump_passes=folding.dumped, on_step=clock)
    if folding.foreign:
        folded.check_certificate()  # packing trusts what it is given
    choices = {variant: Tuned(variant, plan) for variant, plan in plans_of(folded, costs).items()}
    if job.tuning.measure:
        wait([golden_made])  # it would be in the way
        choices = _tuner(folding, lower_form, traced.input_shape, job, clock).tune(
            {variant: choice.plan for variant, choice in choices.items()}
        )
        folded = next(iter(choices.values())).plan.folded
        clock("tuning")
    checked = beside.submit(_float64_error, folded, golden_made)
    forms, key_of = forms_of(job.precisions, choices)
    clock("packing")
    golden = golden_made.result()
    clock("float64")
    first = job.precisions[0]
    manifest = manifest_of(checkpoint, folded, fixed, first, forms[first])
    path, classes = checkpoint.path, checkpoint.classes
    if classes and classes_of(manifest) != len(classes):
        raise CheckpointError(f"{path}: names {len(classes)} classes, but the network is no classifier of so many")
    if AUTO in job.keep_float and len(manifest["outputs"]) > 1:
        raise TargetError(f"{path}: --keep-float {AUTO} measures one output, and there are more: name the layers")
    lower_all = partial(lower_form, keep_float=job.keep_float, on_step=clock)
    lowered, errors, rounded = _lowered(forms, lower_all, golden, fixed, clock)
    error = checked.result()
    beside.shutdown(wait=False)
    return Networks(
        path=path,
        classes=tuple(classes),
        shape=(fixed or 1, *traced.input_shape[1:]),
        manifest=manifest,
        notes=checkpoint.notes,
        records=folded.result.records,
        planned_by=next(iter(choices.values())).plan.planned_by,
        tunings={str(v): choice.as_dict(job.tuning, forms[key_of[v]]) for v, choice in choices.items()},
        lowered=lowered,
        key_of=key_of,
        golden=golden,
        float64_error=error,
        layer_errors=errors,
        rounded=rounded,
    )


def _tuner(
    folding: Folding, lower_form: Callable[..., Lowered], input_shape: tuple[int, ...], job: Job, clock: Clock
) -> NetworkTuner:
    """Measures what ``job`` asks for, on files and engines as they will be written."""
    fixed, kept = job.fixed_batch, tuple(name for name in job.keep_float if name != AUTO)

    def content(form: Form, variant: Variant) -> bytes:
        low = lower_form(form, variant.precision, keep_float=kept)
        if variant.target.takes == "onnx":
            return low.model
        shape = (fixed or 1, *input_shape[1:])
        return build(variant, low, shape, job.settings, fixed_batch=fixed is not None).content

    return NetworkTuner(job.tuning, folding.refold, content, input_shape, clock.on_step)


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
    clock: Clock,
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
