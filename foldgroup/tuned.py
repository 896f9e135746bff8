"""Which exact form every layer runs in: expected by the shipped models, or measured, and then checked end to end.

Times of single layers do not add up to that of a network: caches, layouts and threads do what they like. So where
measuring gives another network than the models do, both are timed whole, interleaved, with the one that was learned,
and another than the models' is kept only if it is faster beyond the noise. What is compiled with tuning is therefore
never slower than what is compiled without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foldgroup.bundle import precision_of
from foldgroup.conv_calls import grouped_convs
from foldgroup.conv_shape import ConvShape
from foldgroup.errors import TuningError
from foldgroup.folding import Folded
from foldgroup.lowering import Form, form_for
from foldgroup.measure import Ratio, interleave, sessions_for
from foldgroup.targets import Variant, make_runner
from foldgroup.tuning.database import Database, default_path
from foldgroup.tuning.model import model_for, predictor
from foldgroup.tuning.table import CostTable
from foldgroup.tuning.tuner import Tuner

VECTOR_WIDTHS = (4, 8, 16)
"""Float32 values in the vectors of CPUs: SSE and NEON, AVX2, AVX-512."""
WHOLE_SECONDS = 20.0
"""Time to compare whole networks in, at most; a third of the tuning's if that is less."""
LEAST_ROUNDS = 12
UNTUNED, TUNED, AS_LEARNED = "untuned", "tuned", "as learned"
"""What is timed whole: formed by the shipped model, by measured times, and with the groups that were learned."""


@dataclass(frozen=True)
class TuningOptions:
    """How forms are chosen. ``pack`` False runs every layer with the groups that it learned.

    ``measure`` times them, for ``seconds`` in all, with ``threads`` (None for the runtime's choice) and ``batch``
    images at a time; ``database`` keeps the times, by default :func:`foldgroup.tuning.database.default_path`.
    """

    pack: bool = True
    measure: bool = False
    seconds: float = 60.0
    threads: int | None = 1
    batch: int = 1
    database: Path | None = None
    vector_width: int | None = None
    """Of the CPU that expected times are for, in float32 values; by default this one's."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked for.

        Raises:
            TuningError: if there is no such time or width.
        """
        if not 0 < self.seconds < math.inf:
            raise TuningError(f"{self.seconds} s is no time to tune in: give more than 0")
        if self.vector_width not in (None, *VECTOR_WIDTHS):
            known = ", ".join(map(str, VECTOR_WIDTHS))
            raise TuningError(f"no CPU's vectors hold {self.vector_width} float32 values: give one of {known}")


class Costs:
    """The costs of one network's layers on one variant, as :class:`passes.AbsorbShuffles` asks for them."""

    def __init__(
        self, variant: Variant, options: TuningOptions, on_step: Callable[[str], None] = lambda _: None
    ) -> None:
        self.variant = variant
        self.table = CostTable()
        self.asked = False
        self.tuner: Tuner | None = None
        model = model_for(variant, options.vector_width)
        if options.measure:
            self.tuner = Tuner(
                variant,
                Database(options.database or default_path()),
                predictor(variant),
                CostTable().ns_per_byte if model is None else model.ns_per_byte,
                options.threads,
                options.batch,
                options.seconds,
                lambda share, what: on_step(f"tuning for {variant}, {share:.0%}: {what}…"),
            )
        self._model = model if options.pack else None

    def __call__(self, calls: Iterable[ConvShape]) -> CostTable:
        """Measured, expected or counted, as the options say."""
        self.asked = True
        if self.tuner is not None:
            self.table = self.tuner(calls)
        elif self._model is not None:
            self.table = self._model.table(calls)
        return self.table


@dataclass(frozen=True)
class Plan:
    """A folded network and what its layers cost on one variant."""

    folded: Folded
    table: CostTable
    planned_by: CostTable
    """The costs that its channel orders were planned by: that of the variant it was folded for."""

    def form(self, precision: str) -> Form:
        """Every convolution with groups in its fastest form."""
        return form_for(precision, self.folded, None if self.table.source == "counted" else self.table.choose)


@dataclass(frozen=True)
class Comparison:
    """Whole networks, timed interleaved: the untuned one and what challenges it, and what won.

    ``ratios`` are median times of the untuned network over the challenger's, so above 1 where that is faster.
    """

    median_ms: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    winner: str

    def as_dict(self) -> dict[str, Any]:
        """For ``verification.json``; the ratio is that of the winner, or of the tuned network if none won."""
        shown = self.winner if self.winner in self.ratios else next(iter(self.ratios))
        ratio = self.ratios[shown]
        return {
            "median_ms": dict(self.median_ms),
            "untuned_ms": self.median_ms[UNTUNED],
            "tuned_ms": self.median_ms[shown],
            "ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high},
            "challenger": shown,
            "shipped": self.winner,
        }


@dataclass
class Tuned:
    """What tuning came to for one variant."""

    variant: Variant
    plan: Plan
    """What to ship."""
    tuner: Tuner | None = None
    whole: Comparison | None = None
    reason: str = ""
    """Why it is, or is not, what was measured to be best."""

    def as_dict(self, options: TuningOptions, form: Form) -> dict[str, Any]:
        """For ``verification.json``: for every layer the executions open to it and their times, and the whole.

        ``form`` is the one that the plan has in the variant's precision.
        """
        layers = [
            _layer(name, calls, form, self.tuner, self.plan.table)
            for name, calls in grouped_convs(form.nominal).items()
            if self.tuner is not None or self.plan.table.source != "counted"
        ]
        document: dict[str, Any] = {
            "source": "measured" if self.tuner is not None else self.plan.table.source,
            "threads": options.threads,
            "batch": options.batch,
            "layers": layers,
        }
        if self.tuner is not None:
            document["unmeasured"] = [str(shape) for shape in self.tuner.unmeasured]
            document["remembered"] = self.tuner.remembered
        whole: dict[str, Any] = {"reason": self.reason} if self.reason else {}
        if self.whole is not None:
            whole |= self.whole.as_dict()
        return document | ({"whole": whole} if whole else {})


def _layer(name: str, calls: Sequence[ConvShape], form: Form, tuner: Tuner | None, table: CostTable) -> dict[str, Any]:
    shape = calls[0]
    every = tuner.measured.get(shape.run_as(1), {}) if tuner is not None else {}
    measured = {e: t for e, t in every.items() if shape.groups % e.groups == 0}
    runs = form.executions.get(name)
    candidates = [
        {"runs": e.groups, "parts": e.parts, "ns": ns}
        | ({"ns": t.ns, "low": t.low, "high": t.high} if (t := measured.get(e)) is not None else {})
        for e, ns in sorted({**dict.fromkeys(measured, 0), **table.executions(shape)}.items(), reverse=True)
    ]
    return {
        "name": name,
        "shape": str(shape),
        "groups": shape.groups,
        "runs": shape.groups if runs is None else runs.groups,
        "parts": 1 if runs is None else runs.parts,
        "candidates": candidates,
    }


@dataclass
class NetworkTuner:
    """Tunes a network for several variants; the first one's costs decide its channel orders.

    ``refold`` folds it again, given other costs as ``cost``; ``content`` gives the bytes that a variant runs for a
    form, which takes inputs of ``shape`` [·, C, …].
    """

    options: TuningOptions
    refold: Callable[..., Folded]
    content: Callable[[Form, Variant], bytes]
    shape: tuple[int, ...]
    on_step: Callable[[str], None] = lambda _: None
    notes: dict[str, str] = field(default_factory=dict)
    """Of the variants that could not be tuned, why."""

    def tune(self, untuned: Mapping[Variant, Plan]) -> dict[Variant, Tuned]:
        """Measure for every variant that can be timed here; all get one network, in one channel order.

        Raises:
            TuningError: if none can.
        """
        found: dict[Variant, Tuned] = {}
        first: Plan | None = None
        for variant, plan in untuned.items():
            costs = Costs(variant, self.options, self.on_step)
            try:
                if first is None:
                    plans = {
                        UNTUNED: plan,
                        TUNED: self._folded_by(costs, plan),
                        AS_LEARNED: self._counted(variant, plan),
                    }
                    found[variant] = self._compared(variant, plans, costs.tuner)
                    first = found[variant].plan
                else:
                    tables = {UNTUNED: plan.table, TUNED: costs(_calls(first.folded)), AS_LEARNED: CostTable()}
                    plans = {name: replace(first, table=table) for name, table in tables.items()}
                    found[variant] = self._compared(variant, plans, costs.tuner)
            except TuningError as error:
                self.notes[str(variant)] = str(error)
        if first is None:
            raise TuningError(f"nothing can be tuned: {'; '.join(self.notes.values())}")
        for variant, plan in untuned.items():
            left = Tuned(variant, replace(first, table=plan.table), reason=self.notes.get(str(variant), ""))
            found.setdefault(variant, left)
        return {variant: found[variant] for variant in untuned}

    def _folded_by(self, costs: Costs, like: Plan) -> Plan:
        """The network with the channel orders that ``costs`` ask for."""
        folded = _alike(like.folded, self.refold(cost=costs))
        return Plan(folded, costs.table, costs.table)

    def _counted(self, variant: Variant, like: Plan) -> Plan:
        """The network as it is without packing."""
        if like.planned_by.source == "counted":
            return replace(like, table=CostTable())
        return self._folded_by(Costs(variant, replace(self.options, measure=False, pack=False)), like)

    def _compared(self, variant: Variant, plans: Mapping[str, Plan], tuner: Tuner | None) -> Tuned:
        untuned, tuned = plans[UNTUNED], plans[TUNED]
        forms: dict[str, Form] = {}
        for name, plan in plans.items():
            form = plan.form(variant.precision)
            if not any(form.same_as(other) for other in forms.values()):
                forms[name] = form
        confirmed = "every layer runs as it would untuned" if TUNED not in forms else ""
        if len(forms) == 1:
            return Tuned(variant, tuned, tuner, reason=confirmed)
        self.on_step(f"tuning for {variant}: whole networks…")
        whole = self._time(variant, forms)
        if whole.winner == UNTUNED:
            lost = "the untuned network is kept: nothing is faster as a whole beyond the noise"
            return Tuned(variant, untuned, tuner, whole, confirmed or lost)
        won = "faster as a whole than untuned" if whole.winner == TUNED else "as learned it is faster as a whole"
        return Tuned(variant, plans[whole.winner], tuner, whole, won)

    def _time(self, variant: Variant, forms: Mapping[str, Form]) -> Comparison:
        images = np.random.default_rng(0).standard_normal((self.options.batch, *self.shape[1:])).astype(np.float32)
        seconds = min(WHOLE_SECONDS, self.options.seconds / 3)
        with ExitStack() as stack:
            contents = {name: self.content(form, variant) for name, form in forms.items()}
            calls: dict[str, list[Callable[[], object]]] = {name: [] for name in forms}
            # One of each in turn: what is loaded late lies elsewhere.
            for _ in range(sessions_for(self.options.batch, variant.target.device)):
                for name, content in contents.items():
                    runner = stack.enter_context(make_runner(variant, content, threads=self.options.threads))
                    calls[name].append(partial(runner.outputs, images))
            measured = interleave(calls, min_rounds=LEAST_ROUNDS, max_rounds=10**6, max_seconds=seconds)
        winner = UNTUNED
        for challenger in (name for name in calls if name != UNTUNED):
            if measured.ratio(winner, challenger).low > 1:
                winner = challenger
        return Comparison(
            {name: measured.stats(name).median_ms for name in calls},
            {name: measured.ratio(UNTUNED, name) for name in calls if name != UNTUNED},
            winner,
        )


def _calls(folded: Folded) -> list[ConvShape]:
    return [shape for calls in grouped_convs(folded.folded).values() for shape in calls]


def _alike(before: Folded, after: Folded) -> Folded:
    """``before`` if both are the same network with the same orders, so that its forms are the same."""
    ours, theirs = dict(before.folded.state_dict()), dict(after.folded.state_dict())
    same = before.folded.code == after.folded.code and ours.keys() == theirs.keys()
    return before if same and all(torch.equal(ours[key], theirs[key]) for key in ours) else after


def plans_of(folded: Folded, costs: Mapping[Variant, Costs]) -> dict[Variant, Plan]:
    """The plan of every variant of a network that was folded by the costs of the first; the others are asked now."""
    calls = _calls(folded)
    tables = {variant: source.table if source.asked else source(calls) for variant, source in costs.items()}
    planned_by = next(iter(tables.values()))
    return {variant: Plan(folded, table, planned_by) for variant, table in tables.items()}


def forms_of(precisions: Sequence[str], choices: Mapping[Variant, Tuned]) -> tuple[dict[str, Form], dict[Variant, str]]:
    """The networks to write, by their key in the manifest, and the key of each variant.

    A precision's own is that of its first variant; another variant has its own where it runs another form.
    """
    forms: dict[str, Form] = {}
    key_of: dict[Variant, str] = {}
    for variant, choice in choices.items():
        form = choice.plan.form(variant.precision)
        alike = next((key for key, other in forms.items() if _same(key, other, variant, form)), None)
        key_of[variant] = alike or (str(variant) if variant.precision in forms else variant.precision)
        forms.setdefault(key_of[variant], form)
    return {key: forms[key] for key in sorted(forms, key=lambda key: (key not in precisions, key))}, key_of


def _same(key: str, other: Form, variant: Variant, form: Form) -> bool:
    return precision_of(key) == variant.precision and other.same_as(form)
