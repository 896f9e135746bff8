"""absorb_shuffles: orders move into neighbouring weights, and what cannot stays with its reason."""

from __future__ import annotations

import pytest
import torch
from graphs import (
    CASES,
    Residual,
    apply,
    assert_lawful,
    compiled,
    compiled_case,
    conv,
    conv_weights,
    filled,
    learned,
    shuffles,
    untouched,
)
from torch import nn

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.forms import ChannelShuffle
from foldgroup.nn import DGConv2d, g_resnext17_cifar
from foldgroup.pipeline import Note, Pipeline
from foldgroup.trace import called_module, fork
from passes import AbsorbShuffles, default_pipeline

NAME = "absorb_shuffles"


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_function(name):
    assert_lawful(compiled_case(name), NAME)


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_shuffles_it_must_and_accounts_for_all(name):
    case = compiled_case(name)
    kept = shuffles(case.made_by(NAME))
    assert len(kept) == CASES[name].kept
    assert [entry.node for entry in case.result.ledger] == [node.name for node in shuffles(case.given_to(NAME))]
    entries = [entry for entry in case.result.ledger if entry.fate == "kept"]
    assert [entry.node for entry in entries] == [node.name for node in kept]
    assert case.record(NAME).skips == tuple(Note(entry.node, entry.reason) for entry in entries)
    assert all(entry.reason for entry in case.result.ledger)
    assert all(entry.channels == node.meta["shape"][1] for entry, node in zip(entries, kept, strict=True))


REASONS = {
    "on the input": "channels before it are fixed by network input; "
    "channels after it are fixed by 0 has 2 groups of fixed channels",
    "before the output": "channels before it are fixed by 1 has 2 groups of fixed channels; "
    "channels after it are fixed by network output",
    "cat": "after it are fixed by no rule for call_method neg",
    "chunk": "after it are fixed by no rule for call_method chunk",
    "leaf": "after it are fixed by no rule for Leaf (2)",
    "softmax": "after it are fixed by no rule for Softmax (2)",
    "transpose": "after it are fixed by no rule for call_method transpose",
    "grouped": "after it are fixed by 2 has 4 groups of fixed channels",
    "flatten 5×5": "after it are fixed by _2 flattens channels and positions into one axis",
    "mean over channels": "after it are fixed by mean averages over channels",
    "linear over width": "after it are fixed by 2 is linear over an axis other than the channels",
    "dense layer called twice": "after it are fixed by 2.layer is used more than once",
    "norm called twice": "after it are fixed by 2.layer is used more than once",
    "two in a row": "channels before it already follow _1_out",
}


@pytest.mark.parametrize("name", REASONS)
def test_says_why_it_keeps_a_shuffle(name):
    reasons = [entry.reason for entry in compiled_case(name).result.ledger if entry.fate == "kept"]
    assert any(REASONS[name] in reason for reason in reasons), reasons


def test_says_who_took_a_shuffle_up():
    ledger = compiled_case("batch norm").result.ledger
    assert [(entry.node, entry.fate, entry.reason) for entry in ledger] == [
        ("_1_in", "absorbed", "0 (outputs)"),
        ("_1_out", "absorbed", "2 (channels), 4 (inputs)"),
    ]
    notes = compiled_case("batch norm").record(NAME).rewrites
    assert notes == (Note("0", "outputs reordered"), Note("2", "outputs reordered"), Note("4", "inputs reordered"))


def test_shuffles_that_undo_each_other_cancel():
    ledger = {entry.node: entry for entry in compiled_case("two alike in a row").result.ledger}
    assert [entry.fate for entry in ledger.values()] == ["absorbed", "cancelled", "cancelled", "absorbed"]
    assert ledger["_2_in"].reason == "it meets its own inverse"


def test_of_two_that_conflict_keeps_the_one_that_moves_less():
    model = nn.Sequential(
        *(conv(3, 8), learned(8, 8, (1, 1, 0)), nn.MaxPool2d(2), learned(8, 8, (1, 0, 1)), conv(8, 4))
    )
    assert [node.name for node in shuffles(compiled(filled(model), (2, 3, 6, 6)).folded)] == ["_3_in"]
    model = nn.Sequential(
        conv(3, 8), learned(8, 8, (1, 1, 0)), nn.Upsample(scale_factor=2), learned(8, 8, (1, 0, 1)), conv(8, 4)
    )  # no rule for Upsample: both stay
    assert len(shuffles(compiled(filled(model), (2, 3, 6, 6)).folded)) == 2


def test_a_kept_shuffle_is_lowered_to_reshape_and_transpose():
    for name in ("two in a row", "residual streams", "twelve"):
        graph = compiled_case(name).folded
        for node in shuffles(graph):
            shuffle = called_module(graph, node)
            assert shuffle.digits is not None and shuffle.index is None
            assert shuffle.inserted_for in {str(n.target) for n in graph.graph.nodes}


def test_what_two_orders_leave_is_one_shuffle():
    graph = compiled_case("two in a row").folded
    second_in, second_out = (called_module(graph, node).order for node in shuffles(graph))
    first = learned(8, 8, (1, 1, 0)).grouping.out_order
    second = learned(8, 8, (1, 0, 1)).grouping
    assert second_in == first.inverse().then(second.in_order)
    assert second_out == second.out_order.inverse()


def test_leaves_a_network_without_shuffles():
    for name in ("nothing learned", "dense gates", "depthwise gates", "groups adjacent"):
        record = compiled_case(name).record(NAME)
        assert not record.changed
        assert (record.rewrites, record.skips, record.ledger) == ((), (), ())


def test_leaves_shuffles_that_can_go_nowhere():
    record = compiled_case("alone").record(NAME)
    assert [entry.fate for entry in record.ledger] == ["kept", "kept"]
    assert not record.changed and not record.rewrites


def test_leaves_the_spaces_that_no_shuffle_borders():
    case = compiled_case("bottlenecks")
    stem_before, stem_after = (graph.get_submodule("0") for graph in (case.given_to(NAME), case.made_by(NAME)))
    assert stem_after is stem_before


@pytest.mark.parametrize("name", ["dense layer called twice", "norm called twice", "tied weights"])
def test_leaves_modules_whose_tensors_serve_two_places(name):
    case = compiled_case(name)
    targets = {"tied weights": ["first", "second"]}.get(name, ["2.layer"])
    for target in targets:
        assert case.made_by(NAME).get_submodule(target) is case.given_to(NAME).get_submodule(target)


def test_leaves_a_dense_kernel_that_two_layers_hold():
    model = nn.Sequential(conv(3, 8), learned(8, 8, (1, 1, 0)), conv(8, 8), nn.Softmax(1), conv(8, 8))
    model[4].weight = model[2].weight
    case = apply(AbsorbShuffles(), model)
    assert case.result.ledger[-1].reason.endswith("2 is used more than once")
    assert case.folded.get_submodule("2") is case.training.get_submodule("2")


def test_every_reader_of_a_reordered_value_follows():
    case = compiled_case("fan-out")
    notes = {note.node: note.reason for note in case.record(NAME).rewrites}
    assert notes["left"] == "inputs reordered"
    assert notes["norm"] == "outputs reordered"
    assert notes["head"] == "inputs reordered"


def test_may_run_again():
    steps = default_pipeline().passes
    case = compiled_case("two in a row")
    result = Pipeline((*steps, AbsorbShuffles())).run(case.training)
    assert [entry.fate for entry in result.records[-1].ledger] == ["kept", "kept"]
    assert certify(case.training, result.graph).holds


def test_takes_up_an_order_that_is_no_digit_order():
    """Any permutation will do: here one of no structure stands between two convolutions."""
    case = apply(AbsorbShuffles(), nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4)))
    graph = fork(case.graphs[-2])
    relu = next(node for node in graph.graph.nodes if node.target == "1")
    order = ChannelOrder((5, 1, 2, 0, 4, 3))
    for name, applied in (("there", order), ("back", order.inverse())):
        graph.add_submodule(name, ChannelShuffle(applied, "2"))
    with graph.graph.inserting_after(relu):
        there = graph.graph.call_module("there", (relu,))
    with graph.graph.inserting_after(there):
        back = graph.graph.call_module("back", (there,))
    relu.replace_all_uses_with(back, delete_user_cb=lambda user: user is not there)
    for node in (there, back):
        node.meta = {"shape": relu.meta["shape"], "origin": relu.meta["origin"]}
    graph.recompile()
    assert certify(case.training, graph).holds
    result = AbsorbShuffles().run(graph)
    assert {entry.fate for entry in result.ledger} <= {"cancelled", "absorbed"}
    assert not shuffles(result.graph)
    assert certify(case.training, result.graph).holds


@pytest.mark.parametrize("seed", range(3))
def test_any_g_resnext_keeps_none(seed):
    torch.manual_seed(seed)
    model = g_resnext17_cifar()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DGConv2d):
                module.gate.normal_()
    case = compiled(model.eval(), (1, 3, 8, 8))
    assert len(case.result.ledger) > 4
    assert not shuffles(case.folded)
    assert {entry.fate for entry in case.result.ledger} == {"absorbed"}
    assert conv_weights(case.folded) < conv_weights(case.training)
    assert certify(case.training, case.folded).holds


def test_a_residual_stream_takes_up_one_order_for_all_its_branches():
    blocks = [Residual(conv(8, 8), learned(8, 8, (1, 1, 0))) for _ in range(3)]
    case = apply(AbsorbShuffles(), nn.Sequential(conv(3, 8), *blocks, conv(8, 4)))
    assert len(case.result.ledger) == 6
    assert not shuffles(case.folded)


@pytest.mark.parametrize("name", ["bottleneck", "two in a row", "fan-out"])
def test_touches_nothing_it_is_given(name):
    graph = compiled_case(name).given_to(NAME)
    with untouched(graph):
        AbsorbShuffles().run(graph)
