"""Is the compiled network the trained one? Three tiers, from proof to measurement.

1. **Certificate** (:mod:`foldgroup.certificate`): exact, no tolerance.
2. **float64**: both graphs run in float64 on the same inputs; max |error| ≤ 1e-9 of max |output|.
3. **Per runtime and precision**: a runtime's outputs against the float64 reference of the training form, by
   :class:`ErrorStatistics` and the limits in :data:`LIMITS`.

Errors are relative to the largest |reference| over the batch, so that one number bounds every logit and does not
depend on how the network scales its outputs. Of several outputs each is judged by its own largest |reference|, and the
worst counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup.certificate import certify
from foldgroup.claims import Certificate
from foldgroup.errors import EquivalenceError
from foldgroup.evaluation import evaluate, evaluate_rounded
from foldgroup.outputs import flat
from foldgroup.pipeline import Check
from foldgroup.trace import called_module

Array = npt.NDArray[Any]

FLOAT64_LIMIT = 1e-9
"""Tier 2: greatest error in float64, relative to the largest output."""


@dataclass(frozen=True)
class Limits:
    """What a tier allows: errors relative to the largest |reference|, agreement as a share of the images.

    Agreement is judged on ``enough_images`` or more: of two noisy inputs, one near tie would be half.
    """

    max_error: float
    median_error: float
    top1_agreement: float
    enough_images: int = 50


LIMITS: Mapping[str, Limits] = {
    # float32 rounds to 6e-8; some hundred layers of sums of some thousand products leave about 1e-6 in practice.
    "fp32": Limits(max_error=1e-4, median_error=1e-5, top1_agreement=0.999, enough_images=1),
    # float16 keeps 11 bits and bfloat16 8: 5e-4 and 4e-3 a rounding, of which a network makes some hundred.
    "fp16": Limits(max_error=1e-2, median_error=2e-3, top1_agreement=0.98),
    "bf16": Limits(max_error=8e-2, median_error=2e-2, top1_agreement=0.95),
    # 8 bits of the range that calibration saw, which a value may leave; accuracy on labelled images is what counts.
    "int8": Limits(max_error=0.25, median_error=4e-2, top1_agreement=0.9),
}
"""Tier 3, by precision."""


HISTOGRAM_FROM, HISTOGRAM_TO = -9, 1
"""Powers of ten at which the first bin of an error histogram ends and its last begins, the latter not included."""


@dataclass(frozen=True)
class ErrorStatistics:
    """How far outputs are from a float64 reference, relative to the largest |reference|.

    ``max_error`` is also the smallest tolerance that would have passed. ``top1_agreement`` is the share of the N images
    whose largest logit is the same, ``top5_agreement`` the share of the reference's five largest that are among ours;
    both are None unless there is one output, [N, classes]. ``histogram`` counts errors by decade: entry i those from
    10^(i + HISTOGRAM_FROM − 1) to below 10^(i + HISTOGRAM_FROM), the first also all that are smaller, the last all that
    are larger.
    """

    images: int
    max_error: float
    p99_error: float
    median_error: float
    top1_agreement: float | None
    top5_agreement: float | None
    histogram: tuple[int, ...] = ()

    @classmethod
    def of_all(cls, outputs: Sequence[Array], reference: Sequence[Array]) -> ErrorStatistics:
        """Compare every output with its reference: the largest of each statistic.

        Raises:
            EquivalenceError: as :meth:`of`, or if there are more or fewer outputs than references.
        """
        if len(outputs) != len(reference):
            raise EquivalenceError(f"{len(outputs)} outputs for {len(reference)} of the reference")
        if len(outputs) == 1:
            return cls.of(outputs[0], reference[0])
        each = [cls.of(*pair) for pair in zip(outputs, reference, strict=True)]
        return cls(
            images=each[0].images,
            max_error=max(one.max_error for one in each),
            p99_error=max(one.p99_error for one in each),
            median_error=max(one.median_error for one in each),
            top1_agreement=None,
            top5_agreement=None,
            histogram=tuple(map(sum, zip(*(one.histogram for one in each), strict=True))),
        )

    @classmethod
    def of(cls, outputs: Array, reference: Array) -> ErrorStatistics:
        """Compare two arrays of one shape [N, …].

        Raises:
            EquivalenceError: if the shapes differ or the outputs are not finite.
        """
        if outputs.shape != reference.shape:
            raise EquivalenceError(f"outputs of shape {outputs.shape} for a reference of shape {reference.shape}")
        if not np.isfinite(outputs).all():
            raise EquivalenceError(f"{np.count_nonzero(~np.isfinite(outputs))} outputs are infinite or not a number")
        scale = float(np.abs(reference).max()) or 1.0
        errors = np.abs(outputs.astype(np.float64) - reference) / scale
        return cls(
            images=len(reference),
            max_error=float(errors.max()),
            p99_error=float(np.percentile(errors, 99)),
            median_error=float(np.median(errors)),
            top1_agreement=_common_top(outputs, reference, 1) if reference.ndim == 2 else None,
            top5_agreement=_common_top(outputs, reference, 5) if reference.ndim == 2 else None,
            histogram=_by_decade(errors),
        )

    @property
    def summary(self) -> str:
        """The largest error and the agreement in words."""
        error = f"max error {self.max_error:.1e}"
        if self.top1_agreement is None or self.top5_agreement is None:
            return f"{error} on {self.images}"
        agreement = f"top-1 agreement {self.top1_agreement:.2%}, top-5 {self.top5_agreement:.2%}"
        return f"{error}, {agreement} of {self.images}"

    def as_dict(self) -> dict[str, Any]:
        """For ``verification.json``."""
        return {**asdict(self), "smallest_passing_tolerance": self.max_error}


@dataclass(frozen=True)
class TierResult:
    """One check of tier 3; truthy if it passed. ``name`` says what ran, ``precision`` whose limits these are."""

    name: str
    statistics: ErrorStatistics
    limits: Limits
    precision: str = "fp32"

    @property
    def violations(self) -> tuple[str, ...]:
        """Each limit that was exceeded, in words."""
        seen, allowed = self.statistics, self.limits
        checks = (
            (seen.max_error > allowed.max_error, f"max error {seen.max_error:.2e} > {allowed.max_error:.0e}"),
            (
                seen.median_error > allowed.median_error,
                f"median error {seen.median_error:.2e} > {allowed.median_error:.0e}",
            ),
        )
        found = [text for exceeded, text in checks if exceeded]
        top1 = seen.top1_agreement
        if top1 is not None and seen.images >= allowed.enough_images and top1 < allowed.top1_agreement:
            found.append(f"top-1 agreement {top1:.2%} < {allowed.top1_agreement:.2%}")
        return tuple(found)

    def __bool__(self) -> bool:
        return not self.violations

    def as_dict(self) -> dict[str, Any]:
        """For ``verification.json``."""
        return {**self.statistics.as_dict(), "limits": asdict(self.limits), "passed": bool(self)}


def _by_decade(errors: Array) -> tuple[int, ...]:
    edges = 10.0 ** np.arange(HISTOGRAM_FROM, HISTOGRAM_TO)
    return tuple(np.bincount(np.digitize(errors.ravel(), edges), minlength=len(edges) + 1).tolist())


def _common_top(outputs: Array, reference: Array, k: int) -> float:
    """Share of the reference's k largest logits that are among the k largest of ``outputs``."""
    k = min(k, reference.shape[1])
    ours, theirs = (np.argsort(-logits, axis=1, kind="stable")[:, :k] for logits in (outputs, reference))
    return float((theirs[:, :, None] == ours[:, None, :]).any(2).mean())


def seeded_inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Normal float32 inputs [N, C, …], the same on every machine."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values)


def float64_outputs(graph: fx.GraphModule, inputs: Tensor) -> tuple[Tensor, ...]:
    """Every output of ``graph`` for ``inputs`` [N, C, …], computed in float64."""
    return flat(evaluate(graph, inputs)["output"])


def float64_error(reference: Sequence[Tensor], compiled: fx.GraphModule, inputs: Tensor) -> float:
    """Tier 2: max |error| of ``compiled`` in float64 relative to max |reference|, each of the training form's outputs.

    Of several outputs, the worst.
    """
    return outputs_error(float64_outputs(compiled, inputs), reference)


def outputs_error(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Max |error| relative to max |reference|, of several outputs the worst; infinite where they cannot be compared."""
    if len(outputs) != len(reference):
        return float("inf")
    return max(_relative_error(*pair) for pair in zip(outputs, reference, strict=True))


def pass_check(training: fx.GraphModule, inputs: Tensor) -> Check:
    """A check for the pipeline: the certificate, then float64 outputs against those of ``training`` on ``inputs``."""
    reference = float64_outputs(training, inputs)

    def check(graph: fx.GraphModule) -> str | None:
        certificate = certify(training, graph)
        findings = [] if certificate.holds else [f"certificate: {certificate.failure}"]
        try:
            error = float64_error(reference, graph, inputs)
        except Exception as failure:  # a pass may break a graph in any way
            findings.append(f"it does not run: {failure}")
        else:
            if not error <= FLOAT64_LIMIT:
                findings.append(f"float64 error {error:.1e} > {FLOAT64_LIMIT:.0e}")
        return "; ".join(findings) or None

    return check


def layer_errors(
    training: fx.GraphModule, compiled: fx.GraphModule, certificate: Certificate, inputs: Tensor
) -> dict[str, float]:
    """For every node of ``compiled`` with a claim: its float64 error against the training node it stands for.

    The training value's channels are put as the claim says first; errors are relative to that node's largest value.
    """
    ours = evaluate(compiled, inputs, keep=True)
    theirs = evaluate(training, inputs, keep=True)
    errors = {}
    for name, claim in certificate.claims.items():
        if name in ours and claim.source in theirs:
            errors[name] = _relative_error(ours[name], claim.of(theirs[claim.source]))
    return errors


def first_layer_over(errors: Mapping[str, float], limit: float) -> str | None:
    """The first layer, in the order of the network, whose error exceeds ``limit``."""
    return next((name for name, error in errors.items() if not error <= limit), None)


def runtime_layer_errors(graph: fx.GraphModule, values: Mapping[str, Array], inputs: Tensor) -> dict[str, float]:
    """Errors of a runtime's ``values``, named after layers, against ``graph`` in float64, in the order of the network.

    Relative to each layer's largest value; layers that the runtime did not return are left out. A layer's second call
    is named ``<layer>_2``, as the ONNX emitter names it.
    """
    reference = evaluate(graph, inputs, keep=True)
    return {
        name: _relative_error(torch.from_numpy(np.asarray(values[name])), reference[node.name])
        for name, node in layer_calls(graph)
        if name in values
    }


def rounded_layer_errors(
    graph: fx.GraphModule, dtype: torch.dtype, keep_float: Collection[str], inputs: Tensor
) -> dict[str, float]:
    """The same when weights and values are rounded to ``dtype``, as a 16-bit device does it."""
    rounded = evaluate_rounded(graph, inputs, dtype, keep_float)
    reference = evaluate(graph, inputs, keep=True)
    return {name: _relative_error(rounded[node.name], reference[node.name]) for name, node in layer_calls(graph)}


def layer_calls(graph: fx.GraphModule) -> Iterator[tuple[str, fx.Node]]:
    """Every call of a layer with weights, which is one node in any runtime, and its name there."""
    calls: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if isinstance(called_module(graph, node), _ConvNd | nn.Linear):
            name = str(node.target)
            calls[name] += 1
            yield (name if calls[name] == 1 else f"{name}_{calls[name]}"), node


def worst_layer(errors: Mapping[str, float]) -> tuple[str, float] | None:
    """The layer with the largest error, and that error; None if there is none."""
    return max(errors.items(), key=lambda item: item[1], default=None)


def _relative_error(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        return float("inf")
    scale = float(reference.abs().max()) or 1.0
    error = float((value.double() - reference).abs().max()) / scale
    return error if error == error else float("inf")  # a NaN is no agreement
