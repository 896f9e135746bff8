"""fold_groups: MaskedConv → shuffle, grouped convolution, shuffle."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from graphs import (
    CASES,
    apply,
    assert_lawful,
    assert_same_function,
    compiled_case,
    conv,
    filled,
    learned,
    node_of,
    shuffles,
    single,
    untouched,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import nn

from foldgroup.channel_order import ChannelOrder
from foldgroup.errors import PassError
from foldgroup.forms import CONVS, MaskedConv, MaskedConv2d
from foldgroup.nn import DGConv1d, DGConv2d, DGConv3d
from foldgroup.pipeline import Note
from foldgroup.trace import called_module, trace
from passes import DecodeGates, FoldGroups

NAME = "fold_groups"


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_function(name):
    assert_lawful(compiled_case(name), NAME)


@pytest.mark.parametrize("name", CASES)
def test_inserts_the_shuffles_that_are_needed(name):
    graph = compiled_case(name).made_by(NAME)
    assert len(shuffles(graph)) == CASES[name].inserted
    assert not any(called_module(graph, node).order.is_identity for node in shuffles(graph))
    assert not any(isinstance(called_module(graph, node), MaskedConv) for node in graph.graph.nodes)


@given(
    st.sampled_from([DGConv1d, DGConv2d, DGConv3d]),
    st.lists(st.sampled_from([1, 4, 6, 8, 12]), min_size=2, max_size=3),
    st.sampled_from([{}, {"stride": 2}, {"padding": "same", "padding_mode": "circular"}, {"bias": False}]),
    st.integers(0, 99),
)
@quick(40)
def test_keeps_the_function_in_any_number_of_dimensions(kind, channels, settings, seed):
    model = filled(nn.Sequential(*(kind(a, b, 2, **settings) for a, b in pairwise(channels))), seed)
    groups = []
    with torch.no_grad():
        for layer in model:
            layer.gate.copy_(torch.randn(layer.gate.shape, generator=torch.Generator().manual_seed(seed)))
            groups.append(layer.grouping.groups)
    shape = (2, channels[0], *[5] * len(model[0].kernel_size))
    training = trace(model, shape)
    folded = FoldGroups().run(DecodeGates().run(training).graph).graph
    assert_same_function(training, folded, shape)
    layers = [m for m in folded.children() if isinstance(m, CONVS)]
    assert [layer.groups for layer in layers] == groups
    assert [layer.weight.numel() * layer.groups for layer in layers] == [m.weight.numel() for m in model]


def test_refuses_a_layer_that_reads_no_batch():
    layer = learned(8, 8, (1, 1, 0))
    with pytest.raises(PassError, match=r"0 reads a tensor without batch dimension: unsqueeze\(0\) it first"):
        apply(FoldGroups(), nn.Sequential(layer), (8, 5, 5))


def test_folds_to_a_grouped_convolution_between_shuffles():
    case = compiled_case("wider")  # 8 → 12 channels: factors 2, 2 and a rectangle 2 × 3; bits 1, 0
    masked, grouped = (graph.get_submodule("1") for graph in (case.given_to(NAME), case.made_by(NAME)))
    assert type(grouped) is nn.Conv2d
    assert (grouped.groups, tuple(grouped.weight.shape)) == (2, (12, 4, 3, 3))
    node = node_of(case.made_by(NAME), "1")
    (before,), (after,) = node.all_input_nodes, node.users
    assert (before.name, after.name) == ("_1_in", "_1_out")
    before, after = (called_module(case.made_by(NAME), shuffle) for shuffle in (before, after))
    assert before.order == ChannelOrder((0, 1, 4, 5, 2, 3, 6, 7))  # the second digit first
    assert after.order == ChannelOrder((0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11)).inverse()
    assert (before.inserted_for, after.inserted_for) == ("1", "1")
    assert node.meta["out_order"] == after.order.inverse()
    outputs = node.meta["out_order"].source
    for row in range(12):
        inputs = before.order.source[row // 6 * 4 :][:4]
        assert torch.equal(grouped.weight[row], masked.weight[outputs[row], list(inputs)])
        assert grouped.bias[row] == masked.bias[outputs[row]]


@pytest.mark.parametrize("name", ["forty-eight", "narrower", "bottlenecks", "depthwise gates"])
def test_leaves_no_weight_behind(name):
    before, after = compiled_case(name).given_to(NAME), compiled_case(name).made_by(NAME)
    for node in before.graph.nodes:
        masked = called_module(before, node)
        if isinstance(masked, MaskedConv2d):
            weight = after.get_submodule(str(node.target)).weight
            assert weight.numel() == weight.count_nonzero() == masked.weight.count_nonzero()
            assert masked.weight.numel() == weight.numel() * masked.grouping.groups


def test_says_what_it_folded():
    assert compiled_case("twelve").record(NAME).rewrites == (
        Note("1", "6 groups of 2→2 channels, 2 shuffles inserted"),
    )


@pytest.mark.parametrize(
    ("name", "groups"),
    [("dense gates", 1), ("depthwise gates", 8), ("groups adjacent", 2)],
    ids=lambda value: str(value),
)
def test_inserts_no_identity(name, groups):
    case = compiled_case(name)
    (note,) = case.record(NAME).rewrites
    assert note.reason.startswith(f"{groups} groups") and note.reason.endswith("0 shuffles inserted")
    assert case.made_by(NAME).get_submodule("1").groups == groups


@pytest.mark.parametrize("layer", [conv(8, 8, 3), conv(8, 8, 3, groups=2)], ids=["dense", "grouped"])
def test_leaves_other_convolutions(layer):
    case = apply(FoldGroups(), nn.Sequential(conv(3, 8), layer))
    assert case.folded.get_submodule("1") is layer
    assert not case.result.records[-1].changed


def test_leaves_a_network_without_learned_layers():
    record = compiled_case("nothing learned").record(NAME)
    assert not record.changed
    assert (record.rewrites, record.skips) == ((), ())


def test_folds_a_layer_called_twice_once_with_shuffles_around_each_call():
    graph = compiled_case("layer called twice").made_by(NAME)
    calls = [node for node in graph.graph.nodes if node.target == "1.layer"]
    assert len(calls) == 2 and graph.get_submodule("1.layer").groups == 2
    for call in calls:
        assert call.all_input_nodes[0] in shuffles(graph)
        assert all(user in shuffles(graph) for user in call.users)


def test_folds_layers_that_hold_one_kernel_apart():
    graph = compiled_case("tied weights").made_by(NAME)
    assert {graph.get_submodule(name).groups for name in ("first", "second")} == {2}
    assert not torch.equal(graph.get_submodule("first").weight, graph.get_submodule("second").weight)


def test_gives_all_readers_the_shuffled_result():
    graph = compiled_case("fan-out").made_by(NAME)
    (after,) = node_of(graph, "learned").users
    assert after.name == "learned_out"
    assert len(after.users) == 3


def test_replaces_no_module_of_the_network_whose_name_it_would_like():
    graph = compiled_case("keywords").made_by(NAME)
    assert isinstance(graph.get_submodule("learned_in"), nn.Conv2d)
    assert [node.target for node in shuffles(graph)] == ["learned_in_", "learned_out"]


def test_reads_an_operand_given_by_keyword():
    graph = compiled_case("keywords").made_by(NAME)
    assert node_of(graph, "learned").kwargs == {"input": node_of(graph, "learned_in_")}


@pytest.mark.parametrize("name", ["bottleneck", "tied weights", "layer called twice", "fan-out"])
def test_touches_nothing_it_is_given(name):
    graph = compiled_case(name).given_to(NAME)
    with untouched(graph):
        FoldGroups().run(graph)


@pytest.mark.parametrize("settings", [{"stride": 2}, {"dilation": 2}, {"padding_mode": "circular"}, {"bias": False}])
def test_keeps_settings(settings):
    layer = single(8, 8, (1, 1, 0), **settings)()[1]
    grouped = apply(FoldGroups(), nn.Sequential(conv(3, 8), layer)).folded.get_submodule("1")
    for name in ("stride", "dilation", "padding", "padding_mode", "kernel_size", "training"):
        assert getattr(grouped, name) == getattr(layer, name)
    assert (grouped.bias is None) == (layer.bias is None)
    assert learned(8, 8, (1, 1, 0)).grouping.groups == grouped.groups
