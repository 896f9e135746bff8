"""The experiment behind ``foldgroup bench``: is the folded network faster than the trained one, and than known ones.

All subjects run interleaved in one process (:func:`foldgroup.measure.interleave` says why):

* the *folded form*, on the first target and precision asked for;
* the *training form* there, the same function with every learned layer a dense kernel full of zeros, which is what the
  network costs as it was trained;
* *baselines* there, torchvision networks of the bundle's input size and classes. Their weights are random, so only
  their cost is compared, never their accuracy. Batch norm is folded and the graph exported as the bundle's was;
* the folded form on every other target and in every other precision asked for.

A speed-up is median(other) / median(subject) of the interleaved rounds, with its interval; one whose interval contains
1 or lies below it is no speed-up, and is called so. With several streams a call is that many calls at a time. On a CPU
every network is loaded several times, as that makes a percent or two (:mod:`foldgroup.measure`), unless a call takes so
many images that memory might not do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from foldgroup import __version__
from foldgroup.bundle import Bundle, read_bundle
from foldgroup.candidates import FOLDED, TRAINING, Candidate, baseline, check_baselines, folded_form, training_form
from foldgroup.equivalence import seeded_inputs
from foldgroup.errors import RunnerError
from foldgroup.measure import LatencyStats, Ratio, interleave, machine, sessions_for
from foldgroup.run import Runner, TensorRtRunner
from foldgroup.targets import Variant, make_runner, parse_variants

DEVICE_REPEATS = 100
"""Runs between CUDA events, where a runner has them."""

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
    runs_on: str
    """Target and precision."""
    runtime: Mapping[str, str | int]
    """The runner's own description: runtime, version, provider, threads and precision."""
    device_ms: float | None = None
    """Median milliseconds on the GPU alone, between CUDA events, copies left out; None where no runner tells."""

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
        entries = {key: value for key, value in asdict(self).items() if key != "latency"}
        return entries | times | derived


@dataclass(frozen=True)
class Comparison:
    """``ratio`` is the median time of the subject ``other`` over that of ``subject``: the speed-up over it."""

    other: str
    ratio: Ratio
    subject: str = FOLDED

    @property
    def folded_is(self) -> Literal["faster", "slower", "no different"]:
        """How the subject does against the other; an interval that contains 1 shows no difference."""
        if self.ratio.low > 1:
            return "faster"
        return "slower" if self.ratio.high < 1 else "no different"

    @property
    def conclusion(self) -> str:
        """The comparison as one sentence."""
        ratio = self.ratio
        other, subject = (f"the {name}" if name in (FOLDED, TRAINING) else name for name in (self.other, self.subject))
        level = f"{ratio.confidence:.0%} interval"
        if self.folded_is == "faster":
            return (
                f"{subject[0].upper()}{subject[1:]} is {ratio.value:.2f} times as fast as {other} "
                f"({level} {ratio.low:.2f} to {ratio.high:.2f})."
            )
        if self.folded_is == "slower":
            return (
                f"No speed-up over {other}: {subject} takes {1 / ratio.value:.2f} times as long "
                f"({level} {1 / ratio.high:.2f} to {1 / ratio.low:.2f})."
            )
        return (
            f"No speed-up over {other}: {subject} is {ratio.value:.2f} times as fast, and the "
            f"{level}, {ratio.low:.2f} to {ratio.high:.2f}, contains 1."
        )

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "subject": self.subject,
            "over": self.other,
            **asdict(self.ratio),
            "folded_is": self.folded_is,
            "conclusion": self.conclusion,
        }


@dataclass(frozen=True)
class BenchmarkReport:
    """What was measured, on what. ``checkpoint`` is the manifest's entry."""

    checkpoint: Mapping[str, str]
    input_shape: tuple[int, ...]
    subjects: tuple[Subject, ...]
    comparisons: tuple[Comparison, ...]
    machine: Mapping[str, Any]
    threads: int | None
    batch: int
    streams: int
    """Calls at a time; a subject's time is that of all of them together."""
    rounds: int
    sessions: int
    """How often each network was loaded."""
    version: str
    notes: tuple[str, ...] = ()
    """What did not run, and why."""

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
            "sessions": self.sessions,
            "subjects": [subject.as_dict() for subject in self.subjects],
            "speed_ups": [comparison.as_dict() for comparison in self.comparisons],
            "conclusion": self.conclusion,
            "baseline_weights": "random, so accuracy is not compared",
            "streams": self.streams,
            "notes": list(self.notes),
            "machine": dict(self.machine),
        }


def benchmark(
    bundle: str | Path,
    against: Sequence[str] = (),
    *,
    target: Sequence[str] = (),
    threads: int | None = 1,
    batch: int = 1,
    streams: int = 1,
    max_seconds: float = 60,
    on_step: Callable[[str], None] = lambda _: None,
    on_round: Callable[[int], None] | None = None,
) -> BenchmarkReport:
    """Time the folded form, the training form and the baselines ``against``, interleaved, for about ``max_seconds``.

    ``target`` are names such as ``openvino`` or ``openvino:int8``; by default every target and precision that the
    bundle was compiled for and that can run here. Without ``against`` the baselines are those of
    :data:`DEFAULT_BASELINES` for the bundle's architecture. ``threads`` None lets the runtime choose; ``streams`` calls
    run at a time, for throughput. ``on_step`` is told the name of each network as it is ready, ``on_round`` the number
    of rounds done.

    Raises:
        BundleError: if there is no bundle at that place, or it lacks what a target needs.
        EquivalenceError: if a file of the bundle is not the one that was compiled.
        ModelError: if a baseline is unknown or cannot be built for this input.
        TargetError: if a target is unknown.
        RunnerError: if a runtime is missing or refuses a network, the threads, the streams or the batch.
    """
    opened = read_bundle(Path(bundle))
    names = tuple(dict.fromkeys(against or DEFAULT_BASELINES.get(opened.manifest["checkpoint"]["arch"], ())))
    check_baselines(names)
    wanted = parse_variants(target, opened.variants) if target else opened.variants
    fixed = opened.manifest["input"]["shape"][0]
    if batch < 1 or (isinstance(fixed, int) and batch != fixed):
        allowed = f"this bundle takes batches of {fixed} only" if isinstance(fixed, int) else "a batch is 1 or more"
        raise RunnerError(f"{opened.path}: cannot run with batch {batch}: {allowed}")
    if streams < 1:
        raise RunnerError(f"cannot run {streams} streams: give 1 or more")
    opened.check_files()
    images = seeded_inputs((batch, *opened.input_shape)).numpy()
    with ExitStack() as stack:
        load = partial(_load, stack, threads=threads, streams=streams)
        folded, notes = _folded_forms(opened, wanted, load, batch=batch, must=bool(target))
        first = next(iter(folded))
        runners = dict(folded)
        for candidate in _others(opened, first.variant, names, on_step):
            runners[candidate] = load(candidate)
        pool = stack.enter_context(ThreadPoolExecutor(streams))
        sessions = min(sessions_for(batch * streams, c.variant.target.device) for c in runners)
        calls = {c.name: [_call(runner, images, streams, pool)] for c, runner in runners.items()}
        for _ in range(sessions - 1):  # one of each in turn: what is loaded late lies elsewhere
            for c in runners:
                calls[c.name].append(_call(load(c), images, streams, pool))
        measured = interleave(calls, max_seconds=max_seconds, on_round=on_round)
        described = {c.name: runner.describe() for c, runner in runners.items()}
        on_device = {
            c.name: median(runner.device_ms(images, DEVICE_REPEATS))
            for c, runner in runners.items()
            if isinstance(runner, TensorRtRunner)
        }
    here = [c for c in runners if c not in folded]
    elsewhere = [c for c in folded if c is not first]
    return BenchmarkReport(
        checkpoint=opened.manifest["checkpoint"],
        input_shape=opened.input_shape,
        subjects=tuple(
            Subject(
                name=c.name,
                kind=c.kind,
                latency=measured.stats(c.name),
                images_per_second=measured.throughput(c.name, batch * streams),
                macs=c.macs,
                grouped_macs=c.grouped_macs,
                params=c.params,
                file_bytes=len(c.content),
                runs_on=str(c.variant),
                runtime=described[c.name],
                device_ms=on_device.get(c.name),
            )
            for c in (first, *here, *elsewhere)
        ),
        comparisons=(
            *(Comparison(c.name, measured.ratio(c.name, FOLDED)) for c in here),
            *(Comparison(FOLDED, measured.ratio(FOLDED, c.name), c.name) for c in elsewhere),
        ),
        machine=machine(),
        threads=threads,
        batch=batch,
        streams=streams,
        rounds=measured.stats(FOLDED).rounds,
        sessions=measured.sessions,
        version=__version__,
        notes=notes,
    )


def _load(stack: ExitStack, candidate: Candidate, *, threads: int | None, streams: int) -> Runner:
    return stack.enter_context(make_runner(candidate.variant, candidate.content, threads=threads, streams=streams))


def _folded_forms(
    bundle: Bundle, wanted: Sequence[Variant], load: Callable[[Candidate], Runner], *, batch: int, must: bool
) -> tuple[dict[Candidate, Runner], tuple[str, ...]]:
    """The folded form on every variant that can run here, the first called :data:`FOLDED`; and what cannot, and why.

    Raises:
        RunnerError: if one cannot run here and ``must``, or if none can.
    """
    runners: dict[Candidate, Runner] = {}
    notes = []
    for variant in wanted:
        candidate = folded_form(bundle, variant, str(variant) if runners else FOLDED)
        try:
            runner = load(candidate)
            least, greatest = runner.batch_range or (batch, batch)
            if not least <= batch <= greatest:
                raise RunnerError(f"{variant} takes batches of {least} to {greatest}: give another --batch")
            runners[candidate] = runner
        except RunnerError as error:
            if must:
                raise
            notes.append(f"{variant}: {error}")
    if not runners:
        raise RunnerError(
            f"{bundle.path}: nothing that it was compiled for can run here; name something that can, such as --target "
            f"onnxruntime. {'; '.join(notes)}"
        )
    return runners, tuple(notes)


def _others(
    bundle: Bundle, variant: Variant, names: Sequence[str], on_step: Callable[[str], None]
) -> Sequence[Candidate]:
    """The training form and the baselines, in one variant."""
    training = training_form(bundle, variant)
    candidates = [] if training is None else [training]
    on_step(TRAINING)
    for name in names:
        candidates.append(baseline(name, bundle, variant))
        on_step(name)
    return candidates


def _call(
    runner: Runner, images: npt.NDArray[np.float32], streams: int, pool: ThreadPoolExecutor
) -> Callable[[], object]:
    """What is timed: one call of the runner, or ``streams`` at a time."""
    if streams == 1:
        return partial(runner.outputs, images)
    return lambda: list(pool.map(runner.outputs, [images] * streams))
