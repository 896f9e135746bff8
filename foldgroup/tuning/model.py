"""Expected times of convolutions with groups, for those who do not measure: learned from committed measurements.

For each target and precision a convolution run as g groups, w inputs and v outputs each, over k kernel entries and n
positions, belongs to a class by its widths and the L values of a vector:

==================  ================================================================================================
blocked             w and v are multiples of L: the runtimes' kernels for blocks of channels take it as it is
narrow              w and v divide L, and L the channels: blocks hold several groups, or another kernel takes over
depthwise           w = v = 1, and L divides the channels
ragged              all others, and ragged forms of narrow and depthwise, where L does not divide the channels
==================  ================================================================================================

In each class the time is a sum of :func:`features` with coefficients that are not negative, fitted to the least squared
relative error by ``python -m bench.fit_costs``, which also writes how often the model picks the measured winner
(``bench/results/packing.md``). What it is for is to compare the forms of one layer, and machines are faster in one
minute than in the next; so every layer that was measured has a factor of its own, fitted as well and then dropped. L
follows the processor: 16 float32 values with AVX-512, 8 with AVX2 and NEON's pairs. Where several processors were
measured, it is the model of the first that is most like this one: first in L, then in whether it has units for products
of matrices (AMX). Targets without measurements keep the groups that were learned.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any

from foldgroup.conv_shape import ConvShape, Execution
from foldgroup.measure import machine
from foldgroup.targets import Variant
from foldgroup.tuning.table import CostTable, Predict, counted, table_of

MODELS = "models.json"
CLASSES = ("blocked", "narrow", "depthwise", "ragged", "ragged narrow", "ragged depthwise")
LANES = {"avx512f": 16}
"""Float32 values of a vector by the processor's flag; the others have :data:`SHORT`."""
SHORT = 8
MATRIX_UNITS = "amx_tile"
"""The flag of processors that have them."""


def class_of(shape: ConvShape, lanes: int) -> str:
    """The class of ``shape`` run as the groups that it has."""
    w, v = shape.in_channels // shape.groups, shape.out_channels // shape.groups
    whole = shape.in_channels % lanes == 0 and shape.out_channels % lanes == 0
    if shape.depthwise:
        return "depthwise" if whole else "ragged depthwise"
    if w % lanes == 0 and v % lanes == 0:
        return "blocked"
    if lanes % w == 0 and lanes % v == 0:
        return "narrow" if whole else "ragged narrow"
    return "ragged"


def features(shape: ConvShape, lanes: int, depth: int = 1) -> tuple[float, ...]:
    """What the time of ``shape`` may be a sum of, for one image.

    One; multiply-adds with the outputs of a group filled up to whole vectors, and its inputs to ``depth``, which is
    how many a matrix unit takes at once; multiply-adds; values read; values written; weights; groups; rows of the
    result in all groups; entries of the unfolded input (im2col).
    """
    w, v = shape.in_channels // shape.groups, shape.out_channels // shape.groups
    taps, positions = prod(shape.kernel), prod(shape.out_size)
    filled = shape.groups * (-(-w // depth) * depth) * (-(-v // lanes) * lanes) * taps * positions
    read, written = shape.in_channels * prod(shape.size), shape.out_channels * positions
    rows = shape.groups * positions / shape.out_size[-1]
    return (
        1,
        filled,
        shape.macs,
        read,
        written,
        shape.weights,
        shape.groups,
        rows,
        shape.in_channels * taps * positions,
    )


@dataclass(frozen=True)
class CostModel:
    """Coefficients by class; ``margin`` is how much slower than the best a form may be expected to be and yet count as
    equally fast, so that nothing is packed for a gain within the model's error.
    """

    coefficients: Mapping[str, Sequence[float]]
    ns_per_byte: float
    margin: float
    lanes: int
    depth: int = 1

    def ns(self, shape: ConvShape) -> float:
        """The expected time of ``shape`` run as the groups that it has."""
        found = features(shape, self.lanes, self.depth)
        coefficients = self.coefficients[class_of(shape, self.lanes)]
        return sum(coefficient * feature for coefficient, feature in zip(coefficients, found, strict=True))

    def predict(self, shape: ConvShape) -> dict[Execution, float]:
        """The expected times of its packings; splits are not modelled, as none was ever faster."""
        return {e: self.ns(shape.run_as(e.groups)) for e in shape.executions if e.parts == 1}

    def table(self, calls: Iterable[ConvShape]) -> CostTable:
        """Expected costs of the convolutions of one network."""
        return table_of({shape: self.predict(shape) for shape in calls}, self.ns_per_byte, "model", self.margin)


def model_for(variant: Variant, lanes: int | None = None) -> CostModel | None:
    """The model of ``variant`` on this processor, or on one of which only its ``lanes`` are known; None without any."""
    models = _models().get(str(variant), ())
    if not models:
        return None
    isa = machine()["isa"]
    wanted = lanes or vector_lanes(), lanes is None and isinstance(isa, list) and MATRIX_UNITS in isa

    def unlike(model: Mapping[str, Any]) -> tuple[bool, bool]:
        flags = model["fitted_to"]["processor"]
        return lanes_of(flags) != wanted[0], (MATRIX_UNITS in flags) != wanted[1]

    found = min(models, key=unlike)
    return CostModel(found["coefficients"], found["ns_per_byte"], found["margin"], wanted[0], found["depth"])


def predictor(variant: Variant) -> Predict:
    """Expected times on this machine; by counting where there is no model."""
    model = model_for(variant)
    return counted if model is None else model.predict


@cache
def vector_lanes() -> int:
    """Float32 values of this processor's vectors."""
    isa = machine()["isa"]
    return lanes_of(isa if isinstance(isa, list) else ())


def lanes_of(flags: Container[str]) -> int:
    """Float32 values of the vectors of a processor with these flags, in a list or in its description."""
    return next((lanes for flag, lanes in LANES.items() if flag in flags), SHORT)


@cache
def _models() -> dict[str, list[dict[str, Any]]]:
    document: dict[str, list[dict[str, Any]]] = json.loads(
        (files("foldgroup.tuning") / MODELS).read_text(encoding="utf-8")
    )
    return document
