"""From a checkpoint to a folded, certified graph: trace, passes, proof; and the search for a pass that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup.certificate import certify
from foldgroup.checkpoint import Checkpoint, load_network
from foldgroup.claims import Certificate
from foldgroup.equivalence import (
    FLOAT64_LIMIT,
    first_layer_over,
    float64_error,
    layer_errors,
    pass_check,
    seeded_inputs,
)
from foldgroup.errors import EquivalenceError, PassError, TraceError
from foldgroup.outputs import check_outputs
from foldgroup.own_model import ModelSource
from foldgroup.pipeline import PassRecord, Pipeline, PipelineResult, dump, first_difference
from foldgroup.planning.cost import Cost, CostSource
from foldgroup.trace import trace


@dataclass(frozen=True)
class Traced:
    """A checkpoint's network as a graph, in training form. ``input_shape`` is [1, C, …]."""

    checkpoint: Checkpoint
    training: fx.GraphModule
    input_shape: tuple[int, ...]


@dataclass(frozen=True)
class Folded:
    """A checkpoint's network before and after the passes; the certificate is made when it is asked for."""

    traced: Traced
    result: PipelineResult

    @property
    def training(self) -> fx.GraphModule:
        """The training form."""
        return self.traced.training

    @property
    def folded(self) -> fx.GraphModule:
        """What the passes made of it."""
        return self.result.graph

    @property
    def input_shape(self) -> tuple[int, ...]:
        """[1, C, …]."""
        return self.traced.input_shape

    @cached_property
    def certificate(self) -> Certificate:
        """The proof that both are one network, or where it fails."""
        return certify(self.training, self.folded)

    def check_certificate(self) -> None:
        """Make sure of it.

        Raises:
            EquivalenceError: if the certificate does not hold, with how to find the pass.
        """
        if not self.certificate.holds:
            checkpoint = self.traced.checkpoint
            raise EquivalenceError(
                f"{checkpoint.path}: the folded network is not the trained one. {self.certificate.failure}. "
                f"{_how_to_bisect(checkpoint)} to find the pass"
            )


def trace_network(
    checkpoint: Checkpoint,
    *,
    input_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    to_train: bool = False,
) -> Traced:
    """The graph of the checkpoint's model, ``to_train`` or not, for an input as :func:`input_shape_of` says.

    Raises:
        TraceError: if the network has none, or does not take that.
    """
    shape = input_shape_of(checkpoint, input_size, input_shape)
    try:
        training = trace(checkpoint.model, shape, to_train=to_train)
        check_outputs(training, shape[0])
    except TraceError as error:
        raise TraceError(f"{checkpoint.path}: {error}") from error.__cause__
    return Traced(checkpoint, training, shape)


def fold(
    checkpoint: Checkpoint,
    *,
    pipeline: Pipeline | None = None,
    cost: Cost | CostSource | None = None,
    input_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    to_train: bool = False,
) -> Folded:
    """Trace the network, run the passes and make sure of the certificate; ``to_train`` as for the trace.

    Raises:
        FoldgroupError: as :func:`trace_network`, :func:`fold_traced` and :meth:`Folded.check_certificate` do.
    """
    traced = trace_network(checkpoint, input_size=input_size, input_shape=input_shape, to_train=to_train)
    folded = fold_traced(traced, pipeline=pipeline, cost=cost)
    folded.check_certificate()
    return folded


def fold_traced(
    traced: Traced,
    *,
    pipeline: Pipeline | None = None,
    cost: Cost | CostSource | None = None,
    check_passes: bool = False,
    dump_passes: Path | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Folded:
    """Run the passes on a network, which is left as it is.

    ``pipeline`` is the default one with the passes of installed packages, which plans by ``cost``.

    Raises:
        TraceError, PassError: if the network or a pass is not up to it.
        EquivalenceError: if ``check_passes`` finds a pass whose result differs.
    """
    training = traced.training

    def on_pass(record: PassRecord, graph: fx.GraphModule) -> None:
        on_step(record.name)
        if dump_passes is not None:
            with _dumping(dump_passes):
                number = len(list(dump_passes.iterdir()))
                (dump_passes / f"{number:02d}_{record.name}.txt").write_text(dump(graph), encoding="utf-8")

    if dump_passes is not None:
        with _dumping(dump_passes):
            dump_passes.mkdir(parents=True, exist_ok=True)
            for old in dump_passes.glob("[0-9][0-9]_*.txt"):
                old.unlink()
            (dump_passes / "00_trace.txt").write_text(dump(training), encoding="utf-8")
    check = pass_check(training, seeded_inputs(traced.input_shape)) if check_passes else None
    return Folded(traced, (pipeline or pipeline_here(cost)).run(training, check=check, on_pass=on_pass))


@contextmanager
def _dumping(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PassError(f"{folder}: cannot be written ({error.strerror}); give another to --dump-passes") from error


def check_float64(folded: Folded, inputs: Tensor, reference: Sequence[Tensor]) -> float:
    """The folded form's float64 error on ``inputs`` [N, C, …] against the training form's outputs ``reference``.

    Raises:
        EquivalenceError: if the error is over the limit; it names the first layer that is.
    """
    error = float64_error(reference, folded.folded, inputs)
    if not error <= FLOAT64_LIMIT:
        layers = layer_errors(folded.training, folded.folded, folded.certificate, inputs)
        raise EquivalenceError(
            f"{folded.traced.checkpoint.path}: in float64 the folded network differs from the trained one by "
            f"{error:.1e}, more than {FLOAT64_LIMIT:.0e}; the first layer to do so is "
            f"{first_layer_over(layers, FLOAT64_LIMIT)}"
        )
    return error


def bisect(
    source: str | Path | nn.Module,
    *,
    arch: str | None = None,
    gate_order: Literal["stored", "sorted"] = "stored",
    zero_gates: Literal["identity", "ones"] | None = None,
    model: ModelSource | None = None,
    input_size: int | None = None,
    example_input: Tensor | Sequence[int] | None = None,
    pipeline: Pipeline | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> PassRecord | None:
    """The first pass after which the network is no longer the trained one, or None.

    Every pass is checked by the certificate and in float64. The arguments are those of :func:`foldgroup.compile`.
    """
    checkpoint = load_network(source, arch=arch, gate_order=gate_order, zero_gates=zero_gates, model=model)
    traced = trace_network(checkpoint, input_size=input_size, input_shape=shape_like(example_input))
    result = (pipeline or pipeline_here()).run(
        traced.training,
        check=pass_check(traced.training, seeded_inputs(traced.input_shape)),
        stop_at_difference=False,
        on_pass=lambda record, _: on_step(record.name),
    )
    return first_difference(result.records)


def pipeline_here(cost: Cost | CostSource | None = None) -> Pipeline:
    """The default passes and those of installed packages."""
    from passes import default_pipeline

    return default_pipeline(cost).with_entry_points()


def shape_like(example: Tensor | Sequence[int] | None) -> tuple[int, ...] | None:
    """The shape of one input, without the batch, of an example [N, C, …] or its shape; None if there is no example.

    Raises:
        TraceError: if the example is no such thing.
    """
    if example is None:
        return None
    if isinstance(example, Tensor) and not example.is_floating_point():
        raise TraceError(f"example_input is {example.dtype}: networks are compiled for one floating-point tensor")
    shape = tuple(example.shape) if isinstance(example, Tensor) else tuple(example)
    if len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise TraceError(f"example_input has shape {list(shape)}: give a batch and channels at least, [N, C, …]")
    return shape[1:]


def input_shape_of(
    checkpoint: Checkpoint, input_size: int | None, input_shape: Sequence[int] | None
) -> tuple[int, ...]:
    """The shape [1, C, …] that the network is traced with: ``input_shape`` [C, …], or a square image.

    The image has ``input_size`` pixels a side, by default the checkpoint's own, and the channels of the first layer.

    Raises:
        TraceError: if nothing says what the network takes, or two things do.
    """
    if input_shape is not None:
        if input_size is not None:
            raise TraceError(f"{checkpoint.path}: --input-size and --input-shape both say what it takes: give one")
        return (1, *input_shape)
    first = next((module for module in checkpoint.model.modules() if isinstance(module, _ConvNd)), None)
    guess = checkpoint.built_by is not None and input_size is None
    if checkpoint.dialect == "module" or not isinstance(first, nn.Conv2d) or (guess and first.in_channels != 3):
        raise TraceError(
            f"{checkpoint.path}: nothing says what the network takes: give the shape of one input with --input-shape "
            "C,H,W (in Python example_input, a tensor or its shape [N, C, …])"
        )
    size = input_size or checkpoint.preprocessing.size
    return (1, first.in_channels, size, size)


def _how_to_bisect(checkpoint: Checkpoint) -> str:
    if checkpoint.dialect == "module":
        return "Call foldgroup.folding.bisect on it"
    model = f" --model {checkpoint.built_by}" if checkpoint.built_by else ""
    return f"Run 'foldgroup bisect {checkpoint.path}{model}'"
