"""The shipped cost models: classes and features as described, positive times, and files that are up to date."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import convs, square
from strategies import quick

from bench import fit_costs
from foldgroup.conv_shape import ConvShape, Execution
from foldgroup.targets import TARGETS, Variant
from foldgroup.tuned import Costs, TuningOptions
from foldgroup.tuning import model
from foldgroup.tuning.model import CLASSES, MATRIX_UNITS, CostModel, class_of, features, model_for, predictor
from foldgroup.tuning.table import counted

SHIPPED: dict[str, list[dict[str, Any]]] = json.loads(fit_costs.MODELS.read_text(encoding="utf-8"))
VARIANTS = {str(variant): variant for t in TARGETS.values() for variant in (Variant(t, p) for p in t.precisions)}
LANES = st.sampled_from([4, 8, 16, 32])


def widths(ins: int, outs: int, groups: int) -> ConvShape:
    """Of so many groups, each with so many inputs and outputs."""
    return replace(square(1, 1), in_channels=ins * groups, out_channels=outs * groups, groups=groups)


class TestClasses:
    @pytest.mark.parametrize(
        ("shape", "of_8", "of_16"),
        [
            (widths(16, 32, 4), "blocked", "blocked"),
            (widths(64, 64, 1), "blocked", "blocked"),
            (widths(8, 16, 4), "blocked", "narrow"),
            (widths(16, 8, 4), "blocked", "narrow"),
            (widths(24, 24, 2), "blocked", "ragged"),
            (widths(4, 4, 8), "narrow", "narrow"),
            (widths(1, 2, 16), "narrow", "narrow"),
            (widths(4, 4, 2), "narrow", "ragged narrow"),
            (widths(4, 4, 3), "ragged narrow", "ragged narrow"),
            (widths(2, 1, 8), "narrow", "ragged narrow"),
            (widths(1, 1, 16), "depthwise", "depthwise"),
            (widths(1, 1, 24), "depthwise", "ragged depthwise"),
            (widths(1, 1, 12), "ragged depthwise", "ragged depthwise"),
            (widths(3, 3, 16), "ragged", "ragged"),
            (widths(16, 12, 4), "ragged", "ragged"),
            (widths(3, 64, 1), "ragged", "ragged"),
        ],
        ids=str,
    )
    def test_follow_the_widths_and_the_vector(self, shape: ConvShape, of_8: str, of_16: str) -> None:
        assert (class_of(shape, 8), class_of(shape, 16)) == (of_8, of_16)

    @given(convs(), LANES)
    @quick()
    def test_are_of_those_that_a_model_has(self, shape: ConvShape, lanes: int) -> None:
        found = class_of(shape, lanes)
        assert found in CLASSES
        assert found.endswith("depthwise") is shape.depthwise
        if found in ("narrow", "depthwise", "blocked"):
            assert shape.in_channels % lanes == shape.out_channels % lanes == 0

    def test_features_are_what_their_names_say(self) -> None:
        shape = square(16, 4, size=8, stride=2)  # 4 groups of 4 inputs and outputs, 9 taps, 4×4 positions
        assert features(shape, 8) == (
            1,
            4 * 4 * 8 * 9 * 16,
            16 * 4 * 9 * 16,
            16 * 8 * 8,
            16 * 4 * 4,
            16 * 4 * 9,
            4,
            4 * 4,
            16 * 9 * 16,
        )

    @given(convs(), LANES, st.sampled_from([1, 32, 64]))
    @quick()
    def test_a_vector_filled_up_is_never_less_work(self, shape: ConvShape, lanes: int, depth: int) -> None:
        _, filled, macs, *rest = features(shape, lanes, depth)
        assert macs <= filled <= macs * lanes * depth
        assert all(feature > 0 for feature in rest)

    @pytest.mark.parametrize("depth", [32, 64])
    def test_groups_that_fill_a_matrix_units_row_together_are_less_work(self, depth: int) -> None:
        narrow, full, wide = (features(square(256, 256 // w), 16, depth)[1] for w in (depth // 2, depth, 2 * depth))
        assert narrow == full < wide == 2 * full


@pytest.mark.parametrize("name", SHIPPED)
class TestShipped:
    def test_is_of_a_variant_that_there_is_and_has_every_class(self, name: str) -> None:
        found = model_for(VARIANTS[name])
        assert found is not None
        assert set(found.coefficients) == set(CLASSES)
        count = len(features(square(8, 1), 8))
        for coefficients in found.coefficients.values():
            assert len(coefficients) == count
            assert all(0 <= c < math.inf for c in coefficients)
            assert any(c > 0 for c in coefficients)
        assert found.ns_per_byte > 0
        assert found.margin in fit_costs.MARGINS

    @given(shape=convs(), lanes=LANES)
    @quick(30)
    def test_expects_positive_times_of_every_packing(self, name: str, shape: ConvShape, lanes: int) -> None:
        found = model_for(VARIANTS[name], lanes)
        assert found is not None
        times = found.predict(shape)
        assert set(times) == {e for e in shape.executions if e.parts == 1}
        assert all(0 < ns < math.inf for ns in times.values())
        assert times[Execution(shape.groups)] == found.ns(shape)

    def test_picks_better_than_what_never_packs(self, name: str) -> None:
        for shipped in SHIPPED[name]:
            quality = shipped["held_out"]
            assert quality["regret"] < quality["regret_of_never_packing"]


class TestAsked:
    @pytest.mark.parametrize("name", sorted(set(VARIANTS) - set(SHIPPED)))
    def test_where_there_is_no_model_every_layer_stays_as_it_was_learned(self, name: str) -> None:
        assert model_for(VARIANTS[name]) is None
        assert predictor(VARIANTS[name]) is counted
        table = Costs(VARIANTS[name], TuningOptions())([square(64, 32)])
        assert table.source == "counted"
        assert table.best([square(64, 32)], square(64, 32).executions) == Execution(32)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_a_table_holds_what_the_model_expects(self, name: str) -> None:
        found = model_for(VARIANTS[name], 16)
        assert found is not None
        shape, other = square(64, 32), square(128, 4, size=6)
        table = found.table([shape, shape.run_as(8), other])
        assert (table.source, table.margin, table.ns_per_byte) == ("model", found.margin, found.ns_per_byte)
        for known in (shape, other):
            assert table.executions(known) == {e: max(1, round(ns)) for e, ns in found.predict(known).items()}

    def test_predicted_times_are_the_models(self) -> None:
        variant = VARIANTS["onnxruntime fp32"]
        found = model_for(variant)
        assert found is not None
        assert predictor(variant)(square(64, 32)) == found.predict(square(64, 32))

    def test_the_vector_width_is_this_processors_unless_one_is_given(self) -> None:
        variant = VARIANTS["onnxruntime fp32"]
        own, narrow = model_for(variant), model_for(variant, 8)
        assert own is not None
        assert narrow is not None
        assert (own.lanes, narrow.lanes) == (model.vector_lanes(), 8)

    def test_the_option_reaches_the_costs(self) -> None:
        variant, shape = VARIANTS["onnxruntime fp32"], square(64, 8)  # widths of 8: blocked or narrow
        tables = {lanes: Costs(variant, TuningOptions(vector_width=lanes))([shape]) for lanes in (8, 16)}
        for lanes, table in tables.items():
            found = model_for(variant, lanes)
            assert found is not None
            assert table == found.table([shape])
        assert tables[8] != tables[16]

    @pytest.mark.parametrize("isa", [["avx512f"], ["avx512f", MATRIX_UNITS], [], None], ids=str)
    def test_the_model_is_of_a_processor_with_matrix_units_if_this_one_has_them(
        self, monkeypatch: pytest.MonkeyPatch, isa: list[str] | None
    ) -> None:
        plain, matrices = ({**SHIPPED["onnxruntime fp32"][0], "margin": margin} for margin in (1.25, 1.5))
        plain["fitted_to"], matrices["fitted_to"] = {"processor": "A"}, {"processor": f"B ({MATRIX_UNITS})"}
        monkeypatch.setattr(model, "machine", lambda: {"isa": isa})
        monkeypatch.setattr(model, "_models", lambda: {"onnxruntime fp32": [plain, matrices]})
        variant = VARIANTS["onnxruntime fp32"]
        found, told = model_for(variant), model_for(variant, 16)
        assert found is not None and found.margin == (1.5 if isa and MATRIX_UNITS in isa else 1.25)
        assert told is not None and told.margin == 1.25

    @pytest.mark.parametrize(
        ("isa", "lanes", "margin"),
        [
            (["avx2"], None, 1.5),
            (["asimd"], None, 1.5),
            (["avx512f"], None, 1.25),
            (["avx512f", MATRIX_UNITS], None, 1.75),
            (["avx512f", MATRIX_UNITS], 16, 1.25),
            (["avx512f"], 8, 1.5),
            (["avx2"], 16, 1.25),
        ],
    )
    def test_the_model_is_of_the_processor_that_is_most_alike(
        self, monkeypatch: pytest.MonkeyPatch, isa: list[str], lanes: int | None, margin: float
    ) -> None:
        processors = {"A (avx2, avx512f)": 1.25, "B (avx2)": 1.5, f"C (avx512f, {MATRIX_UNITS})": 1.75}
        shipped = [
            {**SHIPPED["onnxruntime fp32"][0], "margin": each, "fitted_to": {"processor": processor}}
            for processor, each in processors.items()
        ]
        monkeypatch.setattr(model, "machine", lambda: {"isa": isa})
        monkeypatch.setattr(model, "vector_lanes", model.vector_lanes.__wrapped__)
        monkeypatch.setattr(model, "_models", lambda: {"onnxruntime fp32": shipped})
        found = model_for(VARIANTS["onnxruntime fp32"], lanes)
        assert found is not None and found.margin == margin

    def test_without_packing_costs_are_counted(self) -> None:
        assert Costs(VARIANTS["onnxruntime fp32"], TuningOptions(pack=False))([square(64, 8)]).source == "counted"

    @pytest.mark.parametrize(
        ("isa", "lanes"), [(["avx2", "avx512f"], 16), (["avx2", "fma"], 8), (["asimd"], 8), ([], 8), (None, 8)]
    )
    def test_the_processors_flags_tell_its_width(
        self, monkeypatch: pytest.MonkeyPatch, isa: list[str] | None, lanes: int
    ) -> None:
        monkeypatch.setattr(model, "machine", lambda: {"isa": isa})
        assert model.vector_lanes.__wrapped__() == lanes


def test_a_time_is_the_sum_of_its_features() -> None:
    shape = square(16, 4)
    only = {name: [0.0] * 9 for name in CLASSES}
    only["narrow"] = [100.0, 0, 0.5, 0, 0, 0, 2.0, 0, 0]
    assert CostModel(only, 0.0, 1.0, 16).ns(shape) == 100 + 0.5 * shape.macs + 2 * 4


class TestFiles:
    """``python -m bench.fit_costs`` makes the files that are there."""

    def test_every_curve_has_its_model(self) -> None:
        curves = sorted(path.stem for path in fit_costs.RESULTS.glob("packing_*_*.json"))
        models = sorted(f"packing_{name.replace(' ', '_')}" for name, shipped in SHIPPED.items() for _ in shipped)
        assert all(curve.startswith(name) for curve, name in zip(curves, models, strict=True))

    def test_the_models_are_what_the_curves_give(self) -> None:
        fitted, _ = built()
        ours, theirs = dict(leaves(SHIPPED)), dict(leaves(fitted))
        assert ours.keys() == theirs.keys()
        wrong = {path: (ours[path], theirs[path]) for path in ours if not as_good_as_equal(ours[path], theirs[path])}
        assert not wrong, "run python -m bench.fit_costs"

    def test_the_report_is_what_the_curves_give(self) -> None:
        _, report = built()
        assert fit_costs.REPORT.read_text(encoding="utf-8") == report


@cache
def built() -> tuple[dict[str, Any], str]:
    """What the committed curves give. Fits are remembered: they are the same for every margin that is tried."""
    fit = fit_costs.fit
    known: dict[object, dict[str, list[float]]] = {}

    def remembered(curves: fit_costs.Curves, lanes: int, depth: int) -> dict[str, list[float]]:
        key = lanes, depth, tuple((shape, tuple(times.items())) for shape, times in curves.items())
        if key not in known:
            known[key] = fit(curves, lanes, depth)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_costs, "fit", remembered)
        return fit_costs.build()


def leaves(document: object, path: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], object]]:
    """Every leaf of a JSON document, with the keys that lead to it."""
    if isinstance(document, Mapping | list):
        for key, value in document.items() if isinstance(document, Mapping) else enumerate(document):
            yield from leaves(value, (*path, key))
    else:
        yield path, document


def as_good_as_equal(one: object, other: object) -> bool:
    """Up to the last of the four digits kept: another processor's sums round otherwise."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=2e-3, abs_tol=1e-12)
    return one == other
