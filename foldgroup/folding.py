"""From a checkpoint to a folded, certified graph: trace, passes, proof; and the search for a pass that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, fx

from foldgroup.certificate import Certificate, certify
from foldgroup.checkpoint import Checkpoint, load_checkpoint
from foldgroup.equivalence import (
    FLOAT64_LIMIT,
    first_layer_over,
    float64_error,
    layer_errors,
    pass_check,
    seeded_inputs,
)
from foldgroup.errors import EquivalenceError
from foldgroup.pipeline import PassRecord, Pipeline, PipelineResult, dump, first_difference
from foldgroup.trace import trace


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


def check_float64(source: Path, folded: Folded, inputs: Tensor, reference: Tensor) -> float:
    """The folded form's float64 error on ``inputs`` [N, C, H, W] against the training form's logits ``reference``.

    Raises:
        EquivalenceError: if the error is over the limit; it names the first layer that is.
    """
    error = float64_error(reference, folded.folded, inputs)
    if not error <= FLOAT64_LIMIT:
        layers = layer_errors(folded.training, folded.folded, folded.certificate, inputs)
        raise EquivalenceError(
            f"{source}: in float64 the folded network differs from the trained one by {error:.1e}, more than "
            f"{FLOAT64_LIMIT:.0e}; the first layer to do so is {first_layer_over(layers, FLOAT64_LIMIT)}"
        )
    return error


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
