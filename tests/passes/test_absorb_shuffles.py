"""absorb_shuffles: orders move into neighbouring weights, and what cannot stays with its reason."""

from __future__ import annotations

import math

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
    node_of,
    shuffles,
    untouched,
)
from torch import Tensor, nn

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.forms import ChannelShuffle
from foldgroup.nn import DGConv2d, g_resnext17_cifar
from foldgroup.pipeline import Note, Pipeline
from foldgroup.planning.cost import CostModel
from foldgroup.trace import called_module, fork, shape_of
from passes import AbsorbShuffles, default_pipeline

NAME = "absorb_shuffles"


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_function(name):
    assert_lawful(compiled_case(name), NAME)


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_shuffles_it_must_and_accounts_for_all(name):
    case = compiled_case(name)
    expected, kept = CASES[name], shuffles(case.made_by(NAME))
    given = {node.name for node in shuffles(case.given_to(NAME))}
    ledger = {entry.node: entry for entry in case.result.ledger}
    assert len(ledger) == len(case.result.ledger)
    assert given <= ledger.keys()
    placed = ledger.keys() - given
    assert (len(given), len(kept), len(placed)) == (expected.inserted, expected.kept, expected.placed)
    assert {entry.node for entry in ledger.values() if entry.fate == "kept"} == {node.name for node in kept}
    assert all(ledger[node].fate == "kept" and "placed here, before " in ledger[node].reason for node in placed)
    assert sum(entry.fate == "coarsened" for entry in ledger.values()) == expected.coarsened
    entries = [entry for entry in case.result.ledger if entry.fate == "kept"]
    assert case.record(NAME).skips == tuple(Note(entry.node, entry.reason) for entry in entries)
    assert all(entry.reason for entry in ledger.values())
    assert all(ledger[node.name].channels == len(called_module(case.made_by(NAME), node).order) for node in kept)


REASONS = {
    "on the input": "the order here is wanted by 0 (inputs) and fixed by network input",
    "before the output": "the order here is wanted by 1 (outputs) and fixed by network output",
    "chunk": "the order here is wanted by 1 (outputs)",
    "leaf": "the order here is wanted by 1 (outputs) and fixed by no rule for Leaf (2)",
    "transpose": "and fixed by transpose makes channels of something else",
    "grouped": "the order here is wanted by 1 (outputs), 2 (inputs)",
    "linear over width": "and fixed by 2 is linear over an axis other than the channels",
    "broadcast channel": "the order here is wanted by 1 (outputs)",
    "dense layer called twice": "and fixed by 2.layer is used more than once",
    "norm called twice": "and fixed by 2.layer is used more than once",
    "norm before the output": "and fixed by network output; placed here, before output",
    "two in a row": "the order here is wanted by 1 (outputs), 2 (inputs)",
    "residual streams": "placed here, before _2_body_0_in, _2_shortcut",
    "dense net": "the order here is wanted by 1.body.0 (inputs), 1.body.0 (outputs), 2.body.0 (inputs)",
    "u-net": "the order here is wanted by down (outputs), bottom (inputs)",
    "group norm": "placed here, before _2",
    "tuple": "and fixed by head is used more than once",
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
    assert notes == (Note("0", "outputs reordered"), Note("2", "channels reordered"), Note("4", "inputs reordered"))


def test_says_which_layer_runs_fewer_groups_instead():
    case = compiled_case("fan-out")
    entries = {entry.node: entry for entry in case.result.ledger}
    for node in ("right_in", "right_out"):
        assert entries[node].fate == "coarsened"
        assert entries[node].reason == "right runs 1 of its 2 groups, which costs less"
    assert Note("right", "2 groups run as 1") in case.record(NAME).rewrites
    assert case.folded.get_submodule("right").groups == 1


def test_shuffles_that_undo_each_other_cancel():
    ledger = {entry.node: entry for entry in compiled_case("two alike in a row").result.ledger}
    assert [entry.fate for entry in ledger.values()] == ["absorbed", "cancelled", "cancelled", "absorbed"]
    assert ledger["_2_in"].reason == "it meets its own inverse"


def in_conflict(*between: nn.Module) -> nn.Module:
    """Two learned layers of other digits, and what lies between them."""
    return nn.Sequential(
        conv(3, 16), learned(16, 16, (1, 1, 0, 1)), *between, learned(16, 16, (1, 0, 1, 1)), conv(16, 4)
    )


@pytest.mark.parametrize("between", [nn.MaxPool2d(2), nn.Upsample(scale_factor=2)], ids=["behind", "before"])
def test_of_two_places_it_keeps_the_shuffle_where_it_moves_less(between):
    graph = apply(AbsorbShuffles(KEEPS_GROUPS), in_conflict(between), (2, 3, 12, 12)).folded
    (node,) = shuffles(graph)
    assert math.prod(shape_of(node)) == min(math.prod(shape_of(node_of(graph, target))) for target in ("1", "2"))


KEEPS_GROUPS = CostModel(macs_per_byte=1e-6)
"""Moving is free, so that groups are never merged."""


def test_a_shuffle_that_costs_more_than_groups_save_is_not_kept():
    kept = apply(AbsorbShuffles(KEEPS_GROUPS), in_conflict(), (2, 3, 12, 12))
    assert len(shuffles(kept.folded)) == 1
    merged = apply(AbsorbShuffles(CostModel(macs_per_byte=1e6)), in_conflict(), (2, 3, 12, 12))
    assert not shuffles(merged.folded)
    assert "coarsened" in {entry.fate for entry in merged.result.ledger}
    assert_lawful(merged, NAME)
    groups = [[graph.get_submodule(layer).groups for layer in "12"] for graph in (kept.folded, merged.folded)]
    assert groups[0] == [2, 2] and sorted(groups[1]) == [1, 2]


def test_a_merged_layer_has_zeros_between_its_groups():
    case = compiled_case("fan-out")
    (before, after) = (graph.get_submodule("right") for graph in (case.given_to(NAME), case.made_by(NAME)))
    assert (before.groups, after.groups) == (2, 1)
    assert int(after.weight.count_nonzero()) == before.weight.numel()
    assert torch.equal(after.weight[after.weight != 0].sort().values, before.weight.flatten().sort().values)


def test_a_kept_shuffle_is_lowered_to_reshape_and_transpose():
    for name in ("two in a row", "residual streams", "twelve"):
        graph = compiled_case(name).folded
        for node in shuffles(graph):
            shuffle = called_module(graph, node)
            assert shuffle.digits is not None and shuffle.index is None
            assert shuffle.inserted_for


def test_what_two_orders_leave_is_one_shuffle():
    graph = compiled_case("two in a row").folded
    second_in, second_out = (called_module(graph, node).order for node in shuffles(graph))
    first = learned(8, 8, (1, 1, 0)).grouping.out_order
    second = learned(8, 8, (1, 0, 1)).grouping
    groups = (first.then(second_in).index // 2 % 2).tolist()  # of the second layer's digit
    assert groups == sorted(groups)
    assert sorted(second.in_order.index // 2 % 2) == groups
    assert [channel // 4 for channel in second_out] == [channel // 2 % 2 for channel in range(8)]


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


@pytest.mark.parametrize("name", ["dense layer called twice", "norm called twice"])
def test_leaves_modules_whose_tensors_serve_two_places(name):
    case = compiled_case(name)
    assert case.made_by(NAME).get_submodule("2.layer") is case.given_to(NAME).get_submodule("2.layer")


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
    assert notes["norm"] == "channels reordered"
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


@pytest.mark.parametrize("name", ["convnext", "constants"])
def test_a_constant_follows_under_a_name_of_its_own(name):
    case = compiled_case(name)
    before, after = (
        {str(node.target): node for node in graph.graph.nodes if node.op == "get_attr"}
        for graph in (case.given_to(NAME), case.made_by(NAME))
    )
    moved = {target: node for target, node in after.items() if target not in before}
    assert moved and all(target.endswith("_ordered") for target in moved)
    for target, node in moved.items():
        order, scale = node.meta["out_order"], case.training.get_parameter(target[: -len("_ordered")].replace("_", "."))
        assert torch.equal(
            getattr(case.made_by(NAME), target), scale[order.index] if scale.shape[0] > 1 else scale[:, order.index]
        )
    assert "4.scale" in after or name != "constants"  # of positions: it stays


def test_an_own_shuffle_is_absorbed_as_well():
    ledger = {entry.node: entry for entry in compiled_case("torch's channel shuffle").result.ledger}
    assert [entry.fate for entry in ledger.values()] == ["absorbed"] * 3
    assert "_2_shuffle" in ledger
    assert not shuffles(compiled_case("torch's channel shuffle").folded)


def test_the_parts_of_a_join_follow_each_by_itself():
    case = compiled_case("cat")
    (cat,) = (node for node in case.made_by(NAME).graph.nodes if node.target is torch.cat)
    claims = certify(case.training, case.made_by(NAME)).claims
    parts = [claims[operand.name].index for operand in cat.all_input_nodes]
    assert torch.equal(claims["cat"].index, torch.cat([parts[0], 8 + parts[1]]))
    assert not claims["cat"].in_order


def test_flattened_channels_follow_in_runs():
    case = compiled_case("flatten 5×5")
    index = certify(case.training, case.made_by(NAME)).claims["_2"].index
    assert torch.equal(index.reshape(4, 25) % 25, torch.arange(25).expand(4, 25))
    assert [int(channel) for channel in index[::25] // 25] == [0, 2, 1, 3]


@pytest.mark.parametrize("name", ["bottleneck", "two in a row", "fan-out"])
def test_touches_nothing_it_is_given(name):
    graph = compiled_case(name).given_to(NAME)
    with untouched(graph):
        AbsorbShuffles().run(graph)


def test_an_order_that_is_fixed_twice_in_one_space_that_is_flattened():
    """A layer that is called twice fixes two orders; the flattened channels of their space cannot have either."""
    layer = learned(8, 8, (1, 0, 0))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.shuffle, self.layer = conv(4, 8), nn.ChannelShuffle(2), layer
            self.head = nn.Linear(128, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.shuffle(self.stem(x))
            y = torch.cat(x.chunk(2, 1)[::-1], 1)
            return self.head((self.layer(self.layer(y)) + x).flatten(1))

    case = compiled(filled(Net()), (2, 4, 4, 4))
    certificate = certify(case.training, case.folded)
    assert certificate.holds, certificate.failure
