"""Cost tables: the fastest execution is chosen, and chosen again when a table was written down and read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import convs, square
from strategies import quick

from foldgroup.conv_shape import ConvShape, Execution, ShuffleShape
from foldgroup.planning.cost import CostModel
from foldgroup.tuning.race import CLOSE
from foldgroup.tuning.table import MACS_PER_NS, PER_WEIGHT, CostTable, counted, table_of

LAYER = square(16, 8)
FINE, HALF, DENSE, SPLIT = Execution(8), Execution(4), Execution(1), Execution(8, 8)


def table(margin: float = CLOSE, **ns: float) -> CostTable:
    """What is known of :data:`LAYER`, by the names above."""
    named = {"fine": FINE, "half": HALF, "dense": DENSE, "split": SPLIT}
    return table_of({LAYER: {named[name]: value for name, value in ns.items()}}, 0.5, "measured", margin)


@st.composite
def tables(draw: st.DrawFn) -> tuple[CostTable, list[ConvShape]]:
    """A table, and the shapes that it is for; times are few so that there are ties."""
    shapes = draw(st.lists(convs(widest=4), min_size=1, max_size=4))
    times = st.sampled_from([0.2, 1.0, 100.0, 100.6, 104.0, 250.0]) | st.floats(0.1, 1e9)
    known = {shape: {e: draw(times) for e in shape.executions} for shape in shapes}
    margin, ns_per_byte = draw(st.floats(1.0, 1.5)), draw(st.floats(0.0, 10.0))
    return table_of(known, ns_per_byte, draw(st.sampled_from(["model", "measured"])), margin), shapes


class TestChoosing:
    def test_the_fastest_is_chosen(self) -> None:
        assert table(fine=300, half=100, dense=200).best([LAYER], LAYER.executions) == HALF
        assert table(fine=300, half=100, dense=200).choose("layer", [LAYER], LAYER.executions) == HALF
        assert table(fine=300, half=100, split=50).best([LAYER], LAYER.executions) == SPLIT

    def test_of_what_is_open_alone(self) -> None:
        known = table(fine=300, half=100, dense=200)
        assert known.best([LAYER], [FINE, DENSE]) == DENSE
        assert known.best([LAYER], [FINE]) == FINE

    @pytest.mark.parametrize(("fine", "chosen"), [(100, FINE), (109, FINE), (110, FINE), (111, HALF)])
    def test_within_the_margin_the_one_with_most_groups(self, fine: float, chosen: Execution) -> None:
        assert table(1.1, fine=fine, half=100, dense=100).best([LAYER], LAYER.executions) == chosen

    def test_within_the_margin_a_split_is_the_last_resort(self) -> None:
        assert table(1.1, fine=105, split=100).best([LAYER], LAYER.executions) == FINE
        assert table(1.1, dense=105, split=100).best([LAYER], LAYER.executions) == SPLIT

    def test_the_margin_is_of_the_fastest_open_one(self) -> None:
        known = table(1.1, fine=120, half=110, dense=100)
        assert known.best([LAYER], LAYER.executions) == HALF
        assert known.best([LAYER], [FINE, HALF]) == FINE

    def test_a_layer_called_on_several_shapes_is_as_fast_as_all_its_calls(self) -> None:
        small = replace(LAYER, size=(4, 4))
        known = table_of({LAYER: {FINE: 100, DENSE: 200}, small: {FINE: 250, DENSE: 50}}, 0.5, "measured")
        assert known.best([LAYER], [FINE, DENSE]) == FINE
        assert known.best([LAYER, small], [FINE, DENSE]) == DENSE
        assert known.best([LAYER, LAYER, LAYER, small], [FINE, DENSE]) == FINE

    def test_what_is_not_known_for_every_call_is_not_chosen(self) -> None:
        small = replace(LAYER, size=(4, 4))
        known = table_of({LAYER: {FINE: 100, DENSE: 1}, small: {FINE: 100, HALF: 1}}, 0.5, "measured")
        assert known.best([LAYER, small], LAYER.executions) == FINE

    def test_where_nothing_is_known_the_first_is_chosen(self) -> None:
        assert table(fine=100).best([LAYER], [SPLIT, DENSE]) == SPLIT

    @given(tables(), st.data())
    @quick()
    def test_what_is_chosen_is_never_slower_than_the_margin_allows(
        self, drawn: tuple[CostTable, list[ConvShape]], data: st.DataObject
    ) -> None:
        known, shapes = drawn
        shape = data.draw(st.sampled_from(shapes))
        among = data.draw(st.lists(st.sampled_from(shape.executions), min_size=1, unique=True))
        times = known.executions(shape)
        chosen = known.best([shape], among)
        assert chosen in among
        least = min(times[e] for e in among)
        assert times[chosen] <= known.margin * least
        assert all(e.groups <= chosen.groups for e in among if times[e] <= known.margin * least)


class TestCosts:
    def test_layers_that_differ_in_groups_alone_share_what_is_open_to_them(self) -> None:
        known = table(fine=300, half=100, dense=200, split=400)
        assert known.executions(LAYER) == {FINE: 300, HALF: 100, DENSE: 200, SPLIT: 400}
        assert known.executions(LAYER.run_as(4)) == {HALF: 100, DENSE: 200}
        assert known.executions(LAYER.run_as(2)) == {DENSE: 200}

    def test_shapes_of_one_family_are_gathered(self) -> None:
        known = table_of({LAYER: {FINE: 3.0}, LAYER.run_as(4): {HALF: 2.0, DENSE: 9.0}}, 0.5, "model")
        assert known.entries == {LAYER.run_as(1): {FINE: 3, HALF: 2, DENSE: 9}}

    def test_times_are_whole_nanoseconds_and_at_least_one(self) -> None:
        assert table(fine=0.01, half=2.4, dense=2.6).executions(LAYER) == {FINE: 1, HALF: 2, DENSE: 3}

    def test_a_layer_costs_its_fastest_execution_and_a_trace_for_its_weights(self) -> None:
        known = table(fine=300, half=100, dense=200)
        assert known.layer(LAYER) == 100 + PER_WEIGHT * LAYER.weights
        assert known.layer(LAYER.run_as(2)) == 200 + PER_WEIGHT * LAYER.run_as(2).weights

    def test_a_shuffle_costs_what_it_moves(self) -> None:
        assert table(fine=1).move(6.0) == 3.0
        assert table(fine=1).unit == "ns"

    @given(tables(), st.data())
    @quick()
    def test_more_groups_never_cost_more(self, drawn: tuple[CostTable, list[ConvShape]], data: st.DataObject) -> None:
        known, shapes = drawn
        shape = data.draw(st.sampled_from(shapes) | convs(widest=4))
        fewer = shape.run_as(data.draw(st.sampled_from(shape.executions)).groups)
        assert known.layer(shape) <= known.layer(fewer)
        assert known.layer(shape) < known.layer(fewer) or fewer == shape

    def test_what_is_not_known_is_predicted(self) -> None:
        known = replace(table(fine=300), predict=lambda shape: {DENSE: 7.4 * shape.groups})
        other = square(32, 4)
        assert known.executions(other) == {DENSE: 30}
        assert known.executions(LAYER) == {FINE: 300}


class TestCounting:
    @given(convs(widest=4))
    @quick()
    def test_keeps_every_layer_as_it_was_learned(self, shape: ConvShape) -> None:
        known = CostTable()
        assert known.source == "counted"
        assert known.best([shape], shape.executions) == Execution(shape.groups)
        times = counted(shape)
        assert min(times.values()) == times[Execution(shape.groups)]
        assert set(times) == {e for e in shape.executions if e.parts == 1}

    @given(convs(widest=4))
    @quick()
    def test_is_the_count_of_multiply_adds_as_time(self, shape: ConvShape) -> None:
        model, known = CostModel(), CostTable()
        assert counted(shape)[Execution(shape.groups)] * MACS_PER_NS == pytest.approx(model.layer(shape))
        assert known.move(8.0) * MACS_PER_NS == pytest.approx(model.move(8.0))


class TestWritingDown:
    @given(tables())
    @quick()
    def test_a_table_that_is_read_again_is_the_same(self, drawn: tuple[CostTable, list[ConvShape]]) -> None:
        known, _ = drawn
        assert CostTable.from_dict(json.loads(json.dumps(known.as_dict()))) == known

    def test_the_one_that_counts_too(self) -> None:
        assert CostTable.from_dict(json.loads(json.dumps(CostTable().as_dict()))) == CostTable()

    def test_the_order_in_which_it_was_made_does_not_show(self) -> None:
        one = table_of({LAYER: {FINE: 1, DENSE: 2}, square(8, 2): {DENSE: 3}}, 0.5, "model")
        other = table_of({square(8, 2): {DENSE: 3}, LAYER: {DENSE: 2, FINE: 1}}, 0.5, "model")
        assert json.dumps(one.as_dict()) == json.dumps(other.as_dict())

    @pytest.mark.parametrize(
        "change",
        [
            {"layers": None},
            {"layers": [{}]},
            {"layers": [3]},
            {"layers": [{"layer": "[]", "ns": []}]},
            {"layers": [{"layer": ShuffleShape(16, (8, 8)).key(), "ns": [[1, 1, 5]]}]},
            {"layers": [{"layer": LAYER.key(), "ns": [[1, 1]]}]},
            {"layers": [{"layer": LAYER.key(), "ns": [[1, 1, "fast"]]}]},
            {"layers": [{"layer": LAYER.key(), "ns": [[1, 1, None]]}]},
            {"layers": [{"layer": LAYER.key(), "ns": [[1, 1, float("inf")]]}]},
            {"layers": [{"layer": LAYER.key(), "ns": [[1, 1, -5]]}]},
            {"layers": [{"layer": LAYER.key(), "ns": [[0, 1, 5]]}]},
            {"layers": [{"layer": LAYER.key(), "ns": [[3, 2, 5]]}]},
            {"layers": [{"layer": LAYER.key()}]},
            {"margin": float("nan")},
            {"margin": 0.5},
            {"ns_per_byte": -1.0},
            {"margin": None},
            {"margin": "wide"},
            {"ns_per_byte": None},
        ],
        ids=str,
    )
    def test_what_is_no_table_is_refused(self, change: dict[str, object]) -> None:
        document = {**table(fine=1).as_dict(), **change}
        with pytest.raises((ValueError, KeyError, TypeError)):
            CostTable.from_dict(document)

    @pytest.mark.parametrize("key", ["source", "margin", "ns_per_byte", "layers"])
    def test_a_table_with_something_missing_is_refused(self, key: str) -> None:
        document = table(fine=1).as_dict()
        del document[key]
        with pytest.raises(KeyError):
            CostTable.from_dict(document)
