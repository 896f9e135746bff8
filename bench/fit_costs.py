"""Fit the shipped cost models to the committed packing curves, and say how good they are.

    python -m bench.fit_costs

Reads ``results/packing_*.json`` and writes ``foldgroup/tuning/models.json`` and ``results/packing.md``; a test checks
that both are up to date. A model is judged on shapes that it was not fitted to: the families of shapes are dealt into
:data:`FOLDS` parts, and each part is predicted from the others. For every layer and number of learned groups G, the
*winner* is the execution measured fastest of those open to G.

* *picks the winner*: how often the model names it, or one within 2 % of it;
* *regret*: how much longer than the winner the model's pick takes, on average; and the same for never packing.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from foldgroup.conv_shape import ConvShape, Execution, ShuffleShape
from foldgroup.planning.cost import BYTES
from foldgroup.tuning import model as models
from foldgroup.tuning.database import Setting, read_export
from foldgroup.tuning.model import CLASSES, CostModel, class_of, features
from foldgroup.tuning.table import CostTable

RESULTS = Path(__file__).parent / "results"
MODELS = Path(models.__file__).with_name(models.MODELS)
REPORT = RESULTS / "packing.md"
FOLDS = 8
MARGINS = (1.01, 1.05, 1.1, 1.2)
FAR = 20.0
"""Executions that take so many times as long as the winner are left out of the fit: nobody would run them."""
AS_GOOD = 1.02
NOTHING = 1e-9
"""Shares of a time that are rounding errors of the fit."""
ROUNDS = 3
"""Of fitting coefficients and the families' factors in turn."""
DEPTHS = {"openvino bf16": 32, "openvino int8": 64}
"""Inputs that a row of AMX's tiles holds, where the runtime's convolutions with groups are products of tiles."""

Curves = Mapping[ConvShape, Mapping[Execution, float]]


def fit(curves: Curves, lanes: int, depth: int = 1) -> dict[str, list[float]]:
    """Coefficients by class: least squares of predicted over measured time less one, none negative.

    The measured times of a family all have a factor, the median of predicted over measured; that of all families is 1.
    """
    kept: dict[ConvShape, dict[ConvShape, float]] = {}
    for dense, times in curves.items():
        far = FAR * min(times.values())
        kept[dense] = {dense.run_as(e.groups): ns for e, ns in times.items() if e.parts == 1 and ns < far}
    factors = dict.fromkeys(curves, 1.0)
    for _ in range(ROUNDS):
        rows: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in CLASSES}
        for dense, times in kept.items():
            for shape, ns in times.items():
                rows[class_of(shape, lanes)].append(np.array(features(shape, lanes, depth)) / (factors[dense] * ns))
        coefficients = {
            name: [float(f"{c:.4g}") for c in _non_negative(np.array(found))] for name, found in rows.items()
        }
        model = CostModel(coefficients, 0.0, 1.0, lanes, depth)
        ratios = {dense: median(model.ns(s) / ns for s, ns in times.items()) for dense, times in kept.items()}
        factors = {dense: ratio / median(ratios.values()) for dense, ratio in ratios.items()}
    return coefficients


def _non_negative(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The x ≥ 0 that minimises |rows·x − 1|², by coordinate descent; 1 ns each if there is nothing to fit."""
    if not len(rows):
        return np.ones(len(features(ConvShape(1, 1, 1, (1,), (1,), (0,), (1,), (1,)), 1)))
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    gram, target = ((rows / scale).T @ (rows / scale)).tolist(), (rows / scale).sum(axis=0).tolist()
    x = [0.0] * len(scale)
    for _ in range(5000):
        before = list(x)
        for j, products in enumerate(gram):
            short = target[j] - sum(map(operator.mul, products, x))
            x[j] = max(0.0, x[j] + short / max(products[j], 1e-300))
        if max(abs(a - b) for a, b in zip(x, before, strict=True)) < 1e-10:
            break
    found = np.array(x)
    return np.where(found < NOTHING, 0.0, found) / scale


def decisions(curves: Curves, table: CostTable) -> Iterator[tuple[float, float, float]]:
    """For every layer and G: the measured times of the winner, of what ``table`` picks, and of G groups."""
    for dense, times in curves.items():
        for groups in sorted({e.groups for e in times if e.parts == 1} - {1}):
            shape = dense.run_as(groups)
            open_to = [e for e in shape.executions if e in times]
            if len(open_to) > 1:
                pick = table.best([shape], [e for e in open_to if e.parts == 1])
                yield min(times[e] for e in open_to), times[pick], times[Execution(groups)]


def judge(curves: Curves, margin: float, models: Sequence[CostModel]) -> dict[str, float]:
    """The quality of ``models``, one a fold."""
    found = []
    for fold, model in enumerate(models):
        held = {shape: curves[shape] for shape in list(curves)[fold :: len(models)]}
        table = replace(model, margin=margin).table(s.run_as(max(e.groups for e in held[s])) for s in held)
        found += list(decisions(held, table))
    winner, picked, nominal = np.array(found).T
    return {
        "decisions": len(found),
        "picks_the_winner": round(float((picked <= AS_GOOD * winner).mean()), 4),
        "regret": round(float((picked / winner).mean() - 1), 4),
        "regret_of_never_packing": round(float((nominal / winner).mean() - 1), 4),
    }


def held_out(curves: Curves, lanes: int, depth: int = 1) -> list[CostModel]:
    """For every fold a model that is fitted to the families of the others."""
    families = list(curves)
    folds = (set(families[fold::FOLDS]) for fold in range(FOLDS))
    fits = (fit({s: times for s, times in curves.items() if s not in held}, lanes, depth) for held in folds)
    return [CostModel(coefficients, 0.0, 1.0, lanes, depth) for coefficients in fits]


@dataclass(frozen=True)
class Measured:
    """The curves of a target and precision on a processor."""

    setting: Setting
    curves: Curves
    ns_per_byte: float
    rounds: int
    """In which an execution was timed, in the median."""

    @classmethod
    def read(cls, path: Path) -> Measured:
        """From a file of ``python -m bench.packing``."""
        found = read_export(path)
        curves = {
            shape: {e: t.ns for e, t in ts.items()} for (_, shape), ts in found.items() if isinstance(shape, ConvShape)
        }
        (shuffled,) = (
            next(iter(ts.values())).ns / (BYTES * shape.values)
            for (_, shape), ts in found.items()
            if isinstance(shape, ShuffleShape)
        )
        rounds = median(t.rounds for ts in found.values() for t in ts.values())
        return cls(next(iter(found))[0], curves, shuffled, round(rounds))

    @property
    def lanes(self) -> int:
        """Float32 values of the processor's vectors."""
        return models.lanes_of(self.setting.processor)

    @property
    def depth(self) -> int:
        """Inputs that the runtime takes at once."""
        return DEPTHS.get(self.name, 1) if models.MATRIX_UNITS in self.setting.processor else 1

    @property
    def name(self) -> str:
        """The key of its models."""
        return f"{self.setting.target} {self.setting.precision}"


def build() -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The models, and the report in Markdown."""
    documents: dict[str, list[dict[str, Any]]] = {}
    lines, foreign = [], []
    measured = [Measured.read(path) for path in sorted(RESULTS.glob("packing_*_*.json"))]
    for mine in measured:
        folds = held_out(mine.curves, mine.lanes, mine.depth)
        judged = {margin: judge(mine.curves, margin, folds) for margin in MARGINS}
        margin = min(MARGINS, key=lambda margin: judged[margin]["regret"])
        coefficients = fit(mine.curves, mine.lanes, mine.depth)
        documents.setdefault(mine.name, []).append(
            {
                "coefficients": coefficients,
                "depth": mine.depth,
                "margin": margin,
                "ns_per_byte": float(f"{mine.ns_per_byte:.4g}"),
                "fitted_to": {
                    "processor": mine.setting.processor,
                    "version": mine.setting.version,
                    "families": len(mine.curves),
                },
                "held_out": judged[margin],
            }
        )
        splits = sum(min(times, key=lambda e: times[e]).parts > 1 for times in mine.curves.values())
        of = (mine.name, processor_name(mine.setting), mine.setting.version, len(mine.curves), mine.rounds)
        row = (*of, *_shown(judged[margin]))
        lines.append(f"| {' | '.join(map(str, row))} | {margin - 1:.0%} | {splits} |")
        for other in measured:
            if other.name == mine.name and other is not mine:
                model = CostModel(coefficients, 0.0, margin, other.lanes, mine.depth)
                quality = judge(other.curves, margin, [model])
                row = (mine.name, processor_name(mine.setting), processor_name(other.setting), *_shown(quality))
                foreign.append(f"| {' | '.join(map(str, row))} |")
    return documents, "\n".join([*_head(), *lines, *(_foreign_head() if foreign else ()), *foreign]) + "\n"


def processor_name(setting: Setting) -> str:
    """The processor's name, and what decides the model: vectors and matrix units."""
    name, _, flags = setting.processor.partition(" (")
    units = {"avx512f": "AVX-512", models.MATRIX_UNITS: "AMX"}
    told = [word for flag, word in units.items() if flag in flags] or ["AVX2"] * ("avx2" in flags)
    return ", ".join([name.replace("(R)", "").strip(), *told])


def _shown(quality: Mapping[str, float]) -> tuple[str, ...]:
    count, *shares = quality.values()
    return str(count), *(f"{share:.1%}" for share in shares)


def _head() -> list[str]:
    return [
        "# How good the shipped cost models are",
        "",
        "By `python -m bench.fit_costs`, from the curves of `python -m bench.packing` (one thread, batch 1). On",
        "families of shapes that a model was not fitted to: how often it picks the execution measured fastest, or one",
        "within 2 % of it; how much longer its picks take than the fastest, on average; the same for never packing.",
        "Where executions were timed in few rounds, part of the regret is noise of the measurement.",
        "",
        "| target | processor | version | families | rounds | decisions | picks the winner | regret "
        "| regret of never packing | margin | families where a split was fastest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]


def _foreign_head() -> list[str]:
    return [
        "",
        "The same on a processor that a model was not fitted to, which is what those get that were never measured:",
        "",
        "| target | fitted to | judged on | decisions | picks the winner | regret | regret of never packing |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]


def main() -> None:
    """Write the models and the report."""
    documents, report = build()
    MODELS.write_text(json.dumps(documents, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    REPORT.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
