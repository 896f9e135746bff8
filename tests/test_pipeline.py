"""The pipeline: order, stages, records, dumps, bisect; and the default passes on random networks.

What a pass must not do is in ``test_pass_contract.py``.

To write the golden text anew: ``FOLDGROUP_REGENERATE=1 pytest tests/test_pipeline.py``. Then read
the difference.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forging import SHAPE, Named, four_layers
from graphs import (
    PASSES,
    assert_lawful,
    bottleneck_networks,
    compiled,
    compiled_case,
    conv,
    filled,
    learned,
    networks,
    node_of,
    relative_error,
    shuffles,
    untouched,
)
from hypothesis import given
from strategies import quick
from torch import fx, nn

from foldgroup.certificate import certify
from foldgroup.equivalence import FLOAT64_LIMIT, pass_check, seeded_inputs
from foldgroup.errors import EquivalenceError, PassError
from foldgroup.evaluation import evaluate
from foldgroup.forms import MaskedConv2d, with_tensors
from foldgroup.pipeline import Note, PassResult, Pipeline, Stage, dump, fingerprint, first_difference
from foldgroup.trace import called_module, fork, trace
from passes import default_pipeline

GOLDEN = Path(__file__).parent / "golden"


def names(pipeline: Pipeline) -> list[str]:
    return [step.name for step in pipeline.passes]


@pytest.fixture
def training() -> fx.GraphModule:
    return four_layers()


# ---- the order of passes -----------------------------------------------------------------------------------------


def test_default_order():
    assert [
        *("recognise_shuffles", "decode_gates", "find_groups", "fold_groups"),
        *("absorb_shuffles", "fold_batchnorm", "tidy"),
    ] == PASSES


def test_insert_replace_without():
    pipeline, new = default_pipeline(), Named("new")
    assert names(pipeline.insert(new, before="fold_groups")) == [*PASSES[:3], "new", *PASSES[3:]]
    assert names(pipeline.insert(new, after="tidy")) == [*PASSES, "new"]
    assert names(pipeline.replace("tidy", new)) == [*PASSES[:-1], "new"]
    assert names(pipeline.without("fold_batchnorm")) == [*PASSES[:5], "tidy"]
    assert names(pipeline) == PASSES  # a pipeline is a value


@pytest.mark.parametrize("places", [{}, {"before": "tidy", "after": "tidy"}])
def test_insert_needs_one_place(places):
    with pytest.raises(PassError, match="pass new: say either before or after which pass it goes"):
        default_pipeline().insert(Named("new"), **places)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipeline: pipeline.insert(Named("new"), before="nothing"),
        lambda pipeline: pipeline.replace("nothing", Named("new")),
        lambda pipeline: pipeline.without("nothing"),
    ],
    ids=["insert", "replace", "without"],
)
def test_a_pass_that_is_not_there_is_named_with_those_that_are(change):
    with pytest.raises(PassError, match="there is no pass 'nothing'; there are recognise_shuffles, decode_gates"):
        change(default_pipeline())


def test_without_folding_batch_norm_the_rest_works():
    case = compiled_case("bottleneck")
    result = default_pipeline().without("fold_batchnorm").run(case.training)
    assert certify(case.training, result.graph).holds
    assert not shuffles(result.graph)


# ---- passes of other packages ------------------------------------------------------------------------------------


class Offered(Named):
    after = "fold_groups"

    def __init__(self) -> None:
        super().__init__("offered")


class OfferedBefore(Named):
    before = "fold_groups"

    def __init__(self) -> None:
        super().__init__("offered_before")


class Homeless(Named):
    def __init__(self) -> None:
        super().__init__("homeless")


def offer(monkeypatch: pytest.MonkeyPatch, **points: object) -> None:
    """Pretend that packages are installed which offer these passes."""

    def load(value: object) -> object:
        if isinstance(value, Exception):
            raise value
        return value

    found = [SimpleNamespace(name=n, value=f"pkg:{n}", load=lambda v=v: load(v)) for n, v in points.items()]
    monkeypatch.setattr("foldgroup.pipeline.entry_points", lambda group: found if group == "foldgroup.passes" else [])


def test_entry_points_go_where_they_say_in_order_of_name(monkeypatch):
    offer(monkeypatch, b=Offered, a=OfferedBefore)
    pipeline = default_pipeline().with_entry_points()
    assert names(pipeline) == [*PASSES[:3], "offered_before", "fold_groups", "offered", *PASSES[4:]]


def test_no_entry_points_leave_the_pipeline(monkeypatch):
    offer(monkeypatch)
    assert names(default_pipeline().with_entry_points()) == PASSES


@pytest.mark.parametrize("fault", [ImportError("no module pkg"), lambda: 1 / 0], ids=["import", "constructor"])
def test_an_entry_point_that_fails_is_named(monkeypatch, fault):
    offer(monkeypatch, broken=fault)
    with pytest.raises(PassError, match=r"entry point broken \(pkg:broken\) of foldgroup\.passes fails: "):
        default_pipeline().with_entry_points()


def test_an_entry_point_that_says_no_place_is_named(monkeypatch):
    offer(monkeypatch, homeless=Homeless)
    with pytest.raises(PassError, match="pass homeless: say either before or after"):
        default_pipeline().with_entry_points()


def test_a_pass_from_an_entry_point_runs(monkeypatch, training):
    offer(monkeypatch, offered=Offered)
    result = default_pipeline().with_entry_points().run(training, check=pass_check(training, seeded_inputs(SHAPE)))
    assert [record.name for record in result.records] == names(default_pipeline().with_entry_points())


# ---- stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["fold_groups", "absorb_shuffles", "fold_batchnorm"])
def test_a_pass_that_comes_too_early_is_refused(training, first):
    pipeline = default_pipeline()
    for name in PASSES[: PASSES.index(first)]:
        pipeline = pipeline.without(name)
    with pytest.raises(PassError, match=f"pass {first} needs a graph in stage [A-Z]+, this one is TRAINING"):
        pipeline.run(training)


def test_a_stage_that_is_promised_is_checked(training):
    with pytest.raises(PassError, match="pass lazy promises DECODED but leaves 1, a DGConv2d"):
        Pipeline((Named("lazy", gives=Stage.DECODED),)).run(training)
    with pytest.raises(PassError, match="pass lazy promises SHUFFLE but leaves 1, a MaskedConv2d"):
        default_pipeline().replace("fold_groups", Named("lazy", gives=Stage.SHUFFLE)).run(training)


def test_a_stage_once_reached_stays(training):
    def go_back(graph: fx.GraphModule) -> fx.GraphModule:
        result = fork(graph)
        layer = training.get_submodule("1")
        result.add_submodule("1", MaskedConv2d.from_dense(layer, layer.grouping, layer.bits))
        return result

    for step in (Named("back", go_back), Named("back", go_back, gives=Stage.DECODED)):
        with pytest.raises(PassError, match="pass back promises SHUFFLE but leaves 1, a MaskedConv2d"):
            default_pipeline().insert(step, after="fold_groups").run(training)


def test_stages_are_recorded(training):
    result = default_pipeline().run(training)
    stages = [Stage.TRAINING, Stage.DECODED, Stage.DECODED, Stage.SHUFFLE, Stage.FOLDED, Stage.FOLDED, Stage.FOLDED]
    assert [record.stage for record in result.records] == stages


# ---- what is recorded --------------------------------------------------------------------------------------------


def test_changed_is_derived_not_reported(training):
    class Boasts(Named):
        def run(self, graph: fx.GraphModule) -> PassResult:
            return PassResult(fork(graph), rewrites=(Note("1", "made it better"),))

    def silently(graph: fx.GraphModule) -> fx.GraphModule:
        result = fork(graph)
        module = result.get_submodule("3")
        result.add_submodule("3", with_tensors(module, {"weight": module.weight.detach().clone()}))
        return result

    boasts, silent = Pipeline((Boasts("boasts"), Named("silent", silently))).run(training).records
    assert not boasts.changed and boasts.rewrites
    assert silent.changed and not silent.rewrites


def test_a_square_weight_that_is_transposed_is_a_change():
    training = trace(filled(nn.Sequential(nn.Flatten(), nn.Linear(75, 75))), SHAPE)
    graph = fork(training)
    linear = graph.get_submodule("1")
    graph.add_submodule("1", with_tensors(linear, {"weight": linear.weight.detach().T}))
    assert fingerprint(graph) != fingerprint(training)
    assert fingerprint(fork(training)) == fingerprint(training)


def test_new_and_changed_nodes_bear_the_pass_that_made_them(training):
    result = default_pipeline().run(training)
    made_by = {node.name: node.meta.get("made_by") for node in result.graph.graph.nodes}
    assert made_by == {
        "input_1": None,
        "_0": "absorb_shuffles",
        "_1": "fold_groups",
        "_2": None,
        "_3": "absorb_shuffles",
        "output": None,
    }
    assert not any("made_by" in node.meta for node in training.graph.nodes)


def test_new_nodes_are_given_shapes(training):
    def twice(graph: fx.GraphModule) -> fx.GraphModule:
        result = fork(graph)
        relu = node_of(result, "2")
        with result.graph.inserting_after(relu):
            again = result.graph.call_function(torch.relu, (relu,))
        relu.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
        return result

    result = Pipeline((Named("twice", twice),)).run(training)
    (again,) = (node for node in result.graph.graph.nodes if node.target is torch.relu)
    assert again.meta["shape"] == (2, 8, 5, 5)
    assert again.meta["made_by"] == "twice"


def test_records_count_nodes_and_time(training):
    seen = []
    result = default_pipeline().run(training, on_pass=lambda record, graph: seen.append((record, graph)))
    assert [record for record, _ in seen] == list(result.records)
    assert seen[-1][1] is result.graph
    assert [record.nodes for record in result.records] == [len(graph.graph.nodes) for _, graph in seen]
    assert all(record.seconds >= 0 and record.error is None for record in result.records)


def test_the_ledger_is_that_of_all_passes(training):
    result = default_pipeline().run(training)
    (record,) = (record for record in result.records if record.name == "absorb_shuffles")
    assert result.ledger == record.ledger
    assert [entry.fate for entry in result.ledger] == ["absorbed", "absorbed"]


# ---- checks and bisect -------------------------------------------------------------------------------------------


def zero_weight(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    module = result.get_submodule("3")
    result.add_submodule("3", with_tensors(module, {"weight": torch.zeros_like(module.weight)}))
    return result


def test_a_check_stops_at_the_pass_that_differs(training):
    pipeline = default_pipeline().insert(Named("bad", zero_weight), after="decode_gates")
    check = pass_check(training, seeded_inputs(SHAPE))
    with pytest.raises(
        EquivalenceError, match="after pass bad the network is no longer the trained one: certificate: 3"
    ):
        pipeline.run(training, check=check)
    records = pipeline.run(training, check=check, stop_at_difference=False).records
    assert [record.error is None for record in records] == [True] * 2 + [False] * (len(PASSES) - 1)
    found = first_difference(records)
    assert found is not None and found.name == "bad"


def test_without_a_check_nothing_is_compared(training):
    pipeline = default_pipeline().insert(Named("bad", zero_weight), after="decode_gates")
    assert first_difference(pipeline.run(training).records) is None


def test_a_check_finds_nothing_in_what_is_right(training):
    records = default_pipeline().run(training, check=pass_check(training, seeded_inputs(SHAPE))).records
    assert [record.error for record in records] == [None] * len(PASSES)
    assert first_difference(records) is None


# ---- dumps -------------------------------------------------------------------------------------------------------


def golden_network() -> nn.Module:
    """Learned layers that leave a shuffle, one that leaves none, and functions with arguments of every kind."""
    return filled(
        nn.Sequential(
            *(conv(3, 8), learned(8, 8, (1, 1, 0)), nn.MaxPool2d(2), learned(8, 8, (1, 0, 1)), nn.ReLU(inplace=True)),
            *(nn.Dropout(), nn.Softmax(1), learned(8, 12, (1, 0)), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(12, 4),
        )
    )


def test_dumped_text_is_golden():
    case = compiled(golden_network(), (1, 3, 6, 6))
    parts = [f"## {name}\n{dump(graph)}" for name, graph in zip(["trace", *PASSES], case.graphs, strict=True)]
    text = "\n".join(parts)
    file = GOLDEN / "pipeline.txt"
    if os.environ.get("FOLDGROUP_REGENERATE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_dumped_text_does_not_depend_on_weights_or_the_run():
    first, second = (compiled(filled(golden_network(), seed), (1, 3, 6, 6)) for seed in (1, 2))
    assert [dump(graph) for graph in first.graphs] == [dump(graph) for graph in second.graphs]
    assert "0x" not in dump(first.folded)


# ---- random networks ---------------------------------------------------------------------------------------------


@given(networks())
@quick(30)
def test_any_network_stays_itself(network):
    model, shape = network
    with untouched(trace(model, shape)):
        case = compiled(model, shape)
    inputs = seeded_inputs(shape)
    reference = model.double()(inputs.double())  # torch's own eager mode: no code of ours
    model.float()
    assert relative_error(evaluate(case.folded, inputs)["output"], reference.detach()) <= FLOAT64_LIMIT
    for name in PASSES:
        assert_lawful(case, name)
    given, kept = (shuffles(graph) for graph in (case.made_by("fold_groups"), case.folded))
    ledger = {entry.node: entry for entry in case.result.ledger}
    assert len(ledger) == len(case.result.ledger)
    assert {node for node, entry in ledger.items() if entry.put_in_by != "plan"} == {node.name for node in given}
    assert {node for node, entry in ledger.items() if entry.fate == "kept"} == {node.name for node in kept}
    assert not any(called_module(case.folded, node).order.is_identity for node in kept)


@given(bottleneck_networks())
@quick(10)
def test_any_network_of_bottlenecks_keeps_no_shuffle(network):
    case = compiled(*network)
    assert not shuffles(case.folded)
    assert all(entry.fate == "absorbed" for entry in case.result.ledger)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in case.folded.modules())
    for name in PASSES:
        assert_lawful(case, name)
