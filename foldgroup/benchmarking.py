"""The experiment behind ``foldgroup bench``: is the folded network faster than the trained one, and than known ones.

All subjects run interleaved in one process on one runtime (:func:`foldgroup.measure.interleave` says why):

* the *folded form*, the bundle's ``model.onnx``;
* the *training form*, the same function with every learned layer a dense kernel full of zeros, which is what the
  network costs as it was trained;
* *baselines*, torchvision networks of the bundle's input size and classes. Their weights are random, so only their cost
  is compared, never their accuracy. Batch norm is folded and the graph exported as the bundle's was.

A speed-up is median(other) / median(folded) of the interleaved rounds, with its interval; one whose interval contains 1
or lies below it is no speed-up, and is called so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import fx, nn
from torchvision.models.resnet import Bottleneck, ResNet

from foldgroup.bundle import Bundle, read_bundle
from foldgroup.emit.onnx import MODEL, export_onnx
from foldgroup.emit.precision import typed
from foldgroup.emit.rewrite import densify
from foldgroup.equivalence import seeded_inputs
from foldgroup.errors import FoldgroupError, ModelError, RunnerError
from foldgroup.measure import LatencyStats, Ratio, grouped_macs, interleave, layer_costs, machine, params
from foldgroup.run import OnnxRuntimeRunner, Runner
from foldgroup.trace import trace

FOLDED, TRAINING = "folded form", "training form"

DEFAULT_BASELINES: Mapping[str, tuple[str, ...]] = {
    "g_resnext50": ("resnext50_32x4d", "resnet50"),
    "g_resnext101": ("resnext101_32x4d", "resnet101"),
    "g_resnext101_32x8d": ("resnext101_32x8d", "resnet101"),
}
"""What a network is compared with unless told otherwise: its widths with 32 uniform groups, and no groups at all."""


@dataclass(frozen=True)
class Subject:
    """One network that ran: its times, and what one image costs in it.

    ``grouped_macs`` are multiply-adds in the layers whose groups were learned (in the training form: of their dense
    kernels) or, in a baseline, in convolutions of more than one group. ``params`` of the training form include batch
    norm's, which the other forms have folded away.
    """

    name: str
    kind: Literal["folded form", "training form", "baseline"]
    latency: LatencyStats
    images_per_second: float
    macs: int
    grouped_macs: int
    params: int
    file_bytes: int

    @property
    def flops(self) -> int:
        """2·MACs, for one image."""
        return 2 * self.macs

    @property
    def grouped_share(self) -> float:
        """Share of the multiply-adds in grouped convolutions, 0 to 1."""
        return self.grouped_macs / self.macs if self.macs else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; MACs and FLOPs are for one image."""
        times = {key: value for key, value in asdict(self.latency).items() if key != "rounds"}
        derived = {"flops": self.flops, "grouped_macs_share": self.grouped_share}
        return {key: value for key, value in asdict(self).items() if key != "latency"} | times | derived


@dataclass(frozen=True)
class Comparison:
    """``ratio`` is the median time of the subject ``other`` over that of the folded form: the speed-up over it."""

    other: str
    ratio: Ratio

    @property
    def folded_is(self) -> Literal["faster", "slower", "no different"]:
        """How the folded form does against the other; an interval that contains 1 shows no difference."""
        if self.ratio.low > 1:
            return "faster"
        return "slower" if self.ratio.high < 1 else "no different"

    @property
    def conclusion(self) -> str:
        """The comparison as one sentence."""
        ratio = self.ratio
        other = f"the {TRAINING}" if self.other == TRAINING else self.other
        level = f"{ratio.confidence:.0%} interval"
        if self.folded_is == "faster":
            return (
                f"The folded form is {ratio.value:.2f} times as fast as {other} "
                f"({level} {ratio.low:.2f} to {ratio.high:.2f})."
            )
        if self.folded_is == "slower":
            return (
                f"No speed-up over {other}: the folded form takes {1 / ratio.value:.2f} times as long "
                f"({level} {1 / ratio.high:.2f} to {1 / ratio.low:.2f})."
            )
        return (
            f"No speed-up over {other}: the folded form is {ratio.value:.2f} times as fast, and the "
            f"{level}, {ratio.low:.2f} to {ratio.high:.2f}, contains 1."
        )

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"over": self.other, **asdict(self.ratio), "folded_is": self.folded_is, "conclusion": self.conclusion}


@dataclass(frozen=True)
class BenchmarkReport:
    """What was measured, on what. ``runtime`` is the runner's own description; ``checkpoint`` the manifest's entry."""

    checkpoint: Mapping[str, str]
    input_shape: tuple[int, int, int]
    subjects: tuple[Subject, ...]
    comparisons: tuple[Comparison, ...]
    runtime: Mapping[str, str | int]
    machine: Mapping[str, Any]
    threads: int | None
    batch: int
    rounds: int
    version: str

    @property
    def conclusion(self) -> str:
        """What the run shows, one sentence a comparison."""
        return " ".join(comparison.conclusion for comparison in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: times in ms, MACs and FLOPs of one image, no path and no host name."""
        return {
            "foldgroup": self.version,
            "checkpoint": dict(self.checkpoint),
            "input_shape": [self.batch, *self.input_shape],
            "batch": self.batch,
            "threads": self.threads,
            "rounds": self.rounds,
            "subjects": [subject.as_dict() for subject in self.subjects],
            "speed_ups": [comparison.as_dict() for comparison in self.comparisons],
            "conclusion": self.conclusion,
            "baseline_weights": "random, so accuracy is not compared",
            "runtime": dict(self.runtime),
            "machine": dict(self.machine),
        }


@dataclass(frozen=True)
class _Candidate:
    """A network before it has run."""

    name: str
    kind: Literal["folded form", "training form", "baseline"]
    model: bytes
    macs: int
    grouped_macs: int
    params: int


def benchmark(
    bundle: str | Path,
    against: Sequence[str] = (),
    *,
    threads: int | None = 1,
    batch: int = 1,
    max_seconds: float = 60,
    on_step: Callable[[str], None] = lambda _: None,
    on_round: Callable[[int], None] | None = None,
) -> BenchmarkReport:
    """Time the folded form, the training form and the baselines ``against``, interleaved, for about ``max_seconds``.

    Without ``against`` the baselines are those of :data:`DEFAULT_BASELINES` for the bundle's architecture. ``threads``
    None lets the runtime choose. ``on_step`` is told the name of each network as it is ready, ``on_round`` the number
    of rounds done.

    Raises:
        BundleError: if there is no bundle at that place.
        EquivalenceError: if a file of the bundle is not the one that was compiled.
        ModelError: if a baseline is unknown or cannot be built for this input.
        RunnerError: if the runtime refuses a network, the threads or the batch.
    """
    opened = read_bundle(Path(bundle))
    names = tuple(dict.fromkeys(against or DEFAULT_BASELINES.get(opened.manifest["checkpoint"]["arch"], ())))
    builders = {name: baseline_builder(name) for name in names}
    fixed = opened.manifest["input"]["shape"][0]
    if batch < 1 or (isinstance(fixed, int) and batch != fixed):
        allowed = f"this bundle takes batches of {fixed} only" if isinstance(fixed, int) else "a batch is 1 or more"
        raise RunnerError(f"{opened.path}: cannot run with batch {batch}: {allowed}")
    opened.check_files()
    candidates = list(_forms(opened))
    on_step(TRAINING)
    for name, builder in builders.items():
        candidates.append(_baseline(name, builder, opened))
        on_step(name)
    images = seeded_inputs((batch, *opened.input_shape)).numpy()
    with ExitStack() as stack:
        runners = {c.name: stack.enter_context(_runner(c.model, threads)) for c in candidates}
        runtime = runners[FOLDED].describe()
        calls = {name: partial(runner.run, images) for name, runner in runners.items()}
        measured = interleave(calls, max_seconds=max_seconds, on_round=on_round)
    return BenchmarkReport(
        checkpoint=opened.manifest["checkpoint"],
        input_shape=opened.input_shape,
        subjects=tuple(
            Subject(
                name=c.name,
                kind=c.kind,
                latency=measured.stats(c.name),
                images_per_second=measured.throughput(c.name, batch),
                macs=c.macs,
                grouped_macs=c.grouped_macs,
                params=c.params,
                file_bytes=len(c.model),
            )
            for c in candidates
        ),
        comparisons=tuple(Comparison(c.name, measured.ratio(c.name, FOLDED)) for c in candidates[1:]),
        runtime=runtime,
        machine=machine(),
        threads=threads,
        batch=batch,
        rounds=measured.stats(FOLDED).rounds,
        version=version("foldgroup"),
    )


def baseline_builder(name: str) -> Callable[..., nn.Module]:
    """The function that builds the torchvision classifier ``name``; it takes ``num_classes``.

    ``resnext101_32x4d`` is known too, which torchvision can build but does not name.

    Raises:
        ModelError: if there is no such network; the message says how to name one.
    """
    if name == "resnext101_32x4d":
        return partial(ResNet, Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(
            f"there is no baseline {name!r}: name one of torchvision's classifiers, such as resnet50, resnet101, "
            "resnext50_32x4d or resnext101_32x8d, or resnext101_32x4d; "
            "torchvision.models.list_models(torchvision.models) lists them"
        )
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    return builder


def _runner(model: bytes, threads: int | None) -> Runner:
    """The runtime that all subjects share: ONNX Runtime on the CPU."""
    return OnnxRuntimeRunner(model, threads)


def _forms(bundle: Bundle) -> tuple[_Candidate, _Candidate]:
    """The folded form and the training form, their costs from the manifest."""
    manifest = bundle.manifest
    learned = manifest["layers"]
    model = bundle.read(MODEL)
    folded = _Candidate(
        name=FOLDED,
        kind="folded form",
        model=model,
        macs=manifest["macs"]["executed"],
        grouped_macs=sum(layer["executed_macs"] for layer in learned),
        params=manifest["params"]["folded"],
    )
    training = _Candidate(
        name=TRAINING,
        kind="training form",
        model=densify(model, {layer["name"] for layer in learned}),
        macs=manifest["macs"]["training"],
        grouped_macs=sum(layer["macs"] * layer["groups"] for layer in learned),
        params=manifest["params"]["training"],
    )
    return folded, training


def _baseline(name: str, builder: Callable[..., nn.Module], bundle: Bundle) -> _Candidate:
    """A baseline with random weights for the bundle's input and classes, folded and exported as the bundle was."""
    shape = (1, *bundle.input_shape)
    if shape[1] != 3:
        raise ModelError(f"baseline {name} takes images of 3 channels, this network {shape[1]}: compare it with none")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = builder(num_classes=bundle.manifest["output"]["shape"][1])
        graph = _folded(model.requires_grad_(False), shape)
        exported = export_onnx(typed(graph, torch.float32), shape)
    except FoldgroupError as error:
        raise ModelError(f"baseline {name} cannot be built for images of {shape[2]} pixels: {error}") from error
    costs = layer_costs(graph)
    total = sum(cost.macs for cost in costs)
    return _Candidate(name, "baseline", exported, total, grouped_macs(costs), params(graph))


def _folded(model: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    """A network without learned groups, its batch norm folded and no-ops removed."""
    from passes import FoldBatchNorm, Tidy

    graph = trace(model, shape)
    for step in (FoldBatchNorm(), Tidy()):
        graph = step.run(graph).graph
    return graph
