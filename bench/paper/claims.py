"""Which of the paper's claims the runs support: paired by seed, with the spread over seeds said.

A claim is about a difference. Runs of one seed start from the same weights and see the same images in the same order,
so differences are taken seed by seed, d_1 … d_n, and their mean has the 95 % interval mean ± t·s/√n of Student's t
with n − 1 degrees of freedom. A claim is *supported* if the interval lies on its side of zero, *contradicted* if it
lies on the other, and *open* if zero is within: at this scale the data do not tell.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, Literal

from bench.paper.collecting import entries_of
from bench.paper.scales import Scale
from bench.paper.studies import BUDGETS, Point, learned, resnet, resnext, star, studies

STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""The 97.5 % point of Student's t by degrees of freedom."""

Verdict = Literal["supported", "contradicted", "open"]


@dataclass(frozen=True)
class Difference:
    """Differences of n pairs and the 95 % interval of their mean; ±∞ for a single pair."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        n = len(self.values)
        if n < 2:
            return math.inf
        return STUDENT[min(n - 1, max(STUDENT))] * statistics.stdev(self.values) / math.sqrt(n)

    def verdict(self, *, greater_than: float = 0.0) -> Verdict:
        """Whether the mean lies above ``greater_than``."""
        if self.mean - self.half_width > greater_than:
            return "supported"
        return "contradicted" if self.mean + self.half_width < greater_than else "open"

    def __str__(self) -> str:
        spread = "one pair" if len(self.values) < 2 else f"±{self.half_width:.2f}, {len(self.values)} seeds"
        return f"{self.mean:+.2f} ({spread})"


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and what was found."""

    claim: str
    found: str
    verdict: Verdict | None
    """None where there are no runs to judge by."""


def difference(document: dict[str, Any], point: Point, other: Point) -> Difference | None:
    """Top-1 of ``point`` less that of ``other`` on the test images, by seed; None without a pair."""
    mine, theirs = entries_of(document, point), entries_of(document, other)
    seeds = sorted(set(mine) & set(theirs))
    return Difference(tuple(mine[s]["test_accuracy"] - theirs[s]["test_accuracy"] for s in seeds)) if seeds else None


def claims(scale: Scale, document: dict[str, Any]) -> list[Claim]:
    """Every claim that the studies bear on."""
    base, g32, g96 = resnext(scale), learned(scale, 32), learned(scale, 96)
    found = [
        _better(document, "Uniform groups beat none (77.8 against 76.4, Table 2).", base, resnet(scale)),
        _better(
            document,
            "With as many ones as uniform groups would leave, learned groups are more accurate (78.4 against 77.9 and "
            "77.8, Tables 2 and 3).",
            g32,
            base,
        ),
        _no_worse(document, "At 0.27× the grouped convolutions' FLOPs accuracy is kept (78.0, Table 3).", g96, base),
        _budgets(scale, document),
        _low_layers(scale, document),
        _reproducible(document, g32),
        _no_worse(
            document,
            "ResNeXt*, trained anew with the learned group counts, is as accurate (78.3 against 78.4, Table 6).",
            star(g32, "counts"),
            g32,
        ),
        _better(
            document, "… and more accurate than uniform groups (78.3 against 77.9, Table 6).", star(g32, "counts"), base
        ),
        _no_worse(
            document,
            "Not in the paper: the learned connections, frozen and trained from scratch, are as accurate as the counts "
            "alone. (They must be: dense 1×1 convolutions on either side make an order of channels a matter of names.)",
            star(g32, "connections"),
            star(g32, "counts"),
        ),
        *_table4(scale, document),
    ]
    return [claim for claim in found if claim is not None]


MARGIN = 1.0
"""Points of top-1 that "as accurate" allows: the paper's runs of one setting lie 0.3 apart, ours further."""


def _better(document: dict[str, Any], words: str, point: Point, other: Point) -> Claim:
    found = difference(document, point, other)
    if found is None:
        return Claim(words, "no runs yet", None)
    return Claim(words, f"{point.name} less {other.name}: {found} points", found.verdict())


def _no_worse(document: dict[str, Any], words: str, point: Point, other: Point) -> Claim:
    found = difference(document, point, other)
    if found is None:
        return Claim(words, "no runs yet", None)
    return Claim(
        words,
        f"{point.name} less {other.name}: {found} points; kept means no more than {MARGIN:g} lost",
        found.verdict(greater_than=-MARGIN),
    )


def _budgets(scale: Scale, document: dict[str, Any]) -> Claim:
    words = "Training with the penalty meets the budget ζ ≤ o."
    runs = [e for b in BUDGETS for e in entries_of(document, learned(scale, b)).values()]
    if not runs:
        return Claim(words, "no runs yet", None)
    met = sum(run["kept"]["zeta_over_budget"] <= 1 for run in runs)
    return Claim(words, f"{met} of {len(runs)} runs", "supported" if met == len(runs) else "contradicted")


def _low_layers(scale: Scale, document: dict[str, Any]) -> Claim:
    """The slope of log2 G over the layers, from first to last, one value a run.

    Wider layers have more gates, so even fair coins give the last layer more groups: by half of log2 of the ratio of
    their channels. What is to be shown is more than that.
    """
    words = "Lower layers learn fewer groups than higher ones (Figures 5 and 6)."
    slopes, coins = [], 0.0
    for b in BUDGETS:
        for entry in entries_of(document, learned(scale, b)).values():
            logs = [math.log2(g) for g in entry["groups"]]
            slopes.append(statistics.linear_regression(range(len(logs)), logs).slope * (len(logs) - 1))
            coins = math.log2(entry["channels"][-1] / entry["channels"][0]) / 2
    if not slopes:
        return Claim(words, "no runs yet", None)
    found = Difference(tuple(slopes))
    spread = f"±{found.half_width:.2f}, {len(slopes)} runs"
    told = f"log2 G grows by {found.mean:.2f} ({spread}) from the first to the last layer"
    return Claim(words, f"{told}; gates set by fair coins would give {coins:.2f}", found.verdict(greater_than=coins))


def _reproducible(document: dict[str, Any], point: Point) -> Claim:
    words = "Other seeds give other groups and about the same accuracy (79.6 to 79.9, Table 5)."
    runs = entries_of(document, point)
    if len(runs) < 2:
        return Claim(words, "no runs yet", None)
    accuracies = [run["test_accuracy"] for run in runs.values()]
    groupings = {tuple(run["groups"]) for run in runs.values()}
    spread = max(accuracies) - min(accuracies)
    return Claim(
        words,
        f"{min(accuracies):.2f} to {max(accuracies):.2f}, {len(groupings)} different groupings in {len(runs)} runs",
        "supported" if spread <= MARGIN and len(groupings) > 1 else "open",
    )


def _table4(scale: Scale, document: dict[str, Any]) -> list[Claim]:
    rows = {row.paper_name: row.point for study in studies(scale) if study.name == "table4" for row in study.rows}
    grouped, deep = rows["ResNeXt101 64×4d"], rows["ResNet200"]
    return [
        _better(
            document,
            "More cardinality is more accurate than more width, 79.8 against 78.8 (Table 4).",
            grouped,
            rows["ResNet101 1×100d"],
        ),
        _of_trained(
            document,
            _better(document, "… and than more depth, 79.8 against 78.6 (Table 4).", grouped, deep),
            deep,
            rows["ResNet101"],
        ),
        _better(
            document,
            "With two groups' complexity, learned groups are more accurate, 80.1 against 79.6 (Table 4).",
            rows["G-ResNeXt101 b = 2"],
            rows["ResNeXt101 2×64d"],
        ),
    ]


def _of_trained(document: dict[str, Any], claim: Claim, larger: Point, smaller: Point) -> Claim:
    """``claim``, but open where the ``larger`` network is less accurate than the ``smaller``, untrained."""
    found = difference(document, larger, smaller)
    if claim.verdict is None or found is None or found.mean >= 0:
        return claim
    why = f"so few epochs do not train it: {larger.name} less {smaller.name}: {found} points"
    return Claim(claim.claim, f"{claim.found}, but {why}", "open")
