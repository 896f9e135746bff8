"""Channel axes: how they are cut into segments, tied into spaces, named by digits, and put to the planner."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np
import pytest
import torch
from graphs import (
    CASES,
    PASSES,
    Call,
    ChannelsLast,
    Joined,
    Leaf,
    Residual,
    Scale,
    Split,
    SqueezeExcite,
    compiled,
    compiled_case,
    conv,
    depthwise,
    filled,
    interleave,
    learned,
)
from torch import Tensor, fx, nn

from foldgroup.channel_order import ChannelOrder
from foldgroup.channels import ChannelGraph, Space, as_order
from foldgroup.pipeline import Pipeline
from foldgroup.planning.cost import BYTES, CostModel
from foldgroup.planning.solver import solve
from foldgroup.segments import Segment
from passes import default_pipeline

Layer = nn.Module | Callable[[Tensor], Tensor]
ALONG = 8 * 6 * 6
"""Values of one image of 8 channels and 6×6."""


def channels_of(*layers: Layer, shape: tuple[int, ...] = (2, 8, 6, 6)) -> ChannelGraph:
    """The channels of a network whose learned layers were folded, as absorb_shuffles is given it."""
    modules = [layer if isinstance(layer, nn.Module) else Call(layer) for layer in layers]
    steps = default_pipeline().passes[: PASSES.index("absorb_shuffles")]
    return ChannelGraph(compiled(filled(nn.Sequential(*modules)), shape, Pipeline(steps)).folded)


def node(channels: ChannelGraph, name: str) -> fx.Node:
    """A node by its name, or by the module that it calls."""
    return next(n for n in channels.graph.graph.nodes if name in (n.name, n.target))


def runs(segments: list[Segment]) -> list[tuple[int, int]]:
    return [(segment.start, segment.stop) for segment in segments]


def spaces_of(channels: ChannelGraph, name: str) -> list[Space]:
    return [channels.space_of(segment) for segment in channels.own[node(channels, name)]]


def space_of(channels: ChannelGraph, name: str) -> Space:
    (space,) = spaces_of(channels, name)
    return space


# ---- spaces ------------------------------------------------------------------------------------------------------


def test_a_space_reaches_through_everything_that_shares_channels():
    channels = channels_of(
        conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), Residual(depthwise(8), SqueezeExcite(8)), Scale(8, 1, 1), conv(8, 4)
    )
    space = space_of(channels, "0")
    assert (space.width, space.pins) == (8, [])
    inside = {segment.node.name for segment in space.segments}
    assert {"_0", "_1", "_2", "_3_body_0", "mean", "_3_body_1_widen", "sigmoid", "mul", "add", "mul_1"} <= inside
    assert "4_scale" in {name.lstrip("_") for name in inside}
    assert space is not space_of(channels, "3.body.1.narrow")


def test_a_dense_layer_parts_spaces():
    channels = channels_of(conv(8, 8), conv(8, 8), nn.ConvTranspose2d(8, 8, 1), conv(8, 8))
    assert len({space_of(channels, target).index for target in "0123"}) == 4


def test_every_segment_is_in_one_space():
    for name in CASES:
        channels = ChannelGraph(compiled_case(name).given_to("absorb_shuffles"))
        assert [space.index for space in channels.spaces] == list(range(len(channels.spaces)))
        sites = sorted(segment.site for space in channels.spaces for segment in space.segments)
        assert sites == list(range(channels.problem.sites))
        assert all(channels.space_of(s) is space for space in channels.spaces for s in space.segments)


def test_a_space_is_pinned_by_what_has_no_rule_with_the_reason():
    channels = channels_of(conv(8, 8), nn.ReLU(), Leaf(), nn.ReLU6())
    assert space_of(channels, "0").pins == ["no rule for Leaf (2)"]
    assert space_of(channels, "3").pins == ["no rule for Leaf (2)", "network output"]
    assert space_of(channels, "input_1").pins == ["network input"]
    assert {channels.problem.pins[site] for site in channels.pinned} == {()}


def test_values_without_channels_have_no_segments():
    channels = channels_of(conv(8, 8), lambda x: x * x.shape[0] + x.mean(1, keepdim=True), conv(8, 4))
    assert {n.name for n in channels.own} == {"input_1", "_0", "mul", "add", "_2", "output"}


def test_a_parts_reader_without_a_rule_pins_what_was_split():
    channels = channels_of(conv(8, 8), lambda x: torch.cat(x.chunk(4, 1)[1:3], 1), conv(4, 4))
    assert [space.pins for space in spaces_of(channels, "0")] == [["getitem takes parts in a way that has no rule"]]


# ---- cuts --------------------------------------------------------------------------------------------------------


def test_joined_channels_are_cut_where_they_meet():
    channels = channels_of(conv(8, 8), Joined(conv(8, 4)), nn.ReLU(), conv(12, 4))
    assert runs(channels.own[node(channels, "cat")]) == [(0, 8), (8, 12)]
    assert runs(channels.own[node(channels, "2")]) == [(0, 8), (8, 12)]
    assert runs(channels.own[node(channels, "0")]) == [(0, 8)]
    first, second = spaces_of(channels, "2")
    assert (first, second) == (space_of(channels, "0"), space_of(channels, "1.body.0"))
    assert [str(segment) for segment in channels.own[node(channels, "cat")]] == ["cat[0:8]", "cat[8:12]"]


def test_a_dense_net_cuts_every_layer_where_the_last_one_is_cut():
    channels = channels_of(conv(8, 8), Joined(conv(8, 4)), Joined(conv(12, 4), first=False), conv(16, 4))
    assert runs(channels.own[node(channels, "cat_1")]) == [(0, 4), (4, 12), (12, 16)]
    assert [space.index for space in spaces_of(channels, "cat_1")] == [
        space_of(channels, name).index for name in ("2.body.0", "0", "1.body.0")
    ]


def test_split_channels_are_cut_backwards():
    channels = channels_of(conv(8, 8), nn.ReLU(), Split(conv(4, 4)), conv(8, 4))
    assert runs(channels.own[node(channels, "0")]) == [(0, 4), (4, 8)]
    (left,) = spaces_of(channels, "getitem")
    assert left is spaces_of(channels, "0")[0]
    assert spaces_of(channels, "cat") == [left, space_of(channels, "2.body.0")]


def test_cuts_within_cuts():
    channels = channels_of(
        conv(8, 16), lambda x: x[:, 2:], lambda x: x.narrow(1, 1, 9), lambda x: x.split([4, 5], 1)[1], conv(5, 4)
    )
    assert runs(channels.own[node(channels, "0")]) == [(0, 2), (2, 3), (3, 7), (7, 12), (12, 16)]
    assert runs(channels.own[node(channels, "getitem")]) == [(0, 1), (1, 5), (5, 10), (10, 14)]
    assert runs(channels.own[node(channels, "getitem_1")]) == [(0, 5)]


def test_cuts_reach_across_additions():
    channels = channels_of(conv(8, 8), Residual(conv(8, 8)), lambda x: x[:, :3], conv(3, 4))
    for name in ("0", "1.body.0", "add"):
        assert runs(channels.own[node(channels, name)]) == [(0, 3), (3, 8)]


def test_segments_go_through_flatten_in_runs():
    channels = channels_of(conv(8, 4), Joined(conv(4, 4)), nn.Flatten(), nn.Linear(8 * 36, 4))
    assert runs(channels.own[node(channels, "2")]) == [(0, 144), (144, 288)]
    first, second = spaces_of(channels, "2")
    assert (first.width, second.width) == (144, 144)
    assert first is space_of(channels, "0")


def test_runs_that_are_cut_apart_keep_their_order():
    channels = channels_of(conv(8, 4), nn.Flatten(), lambda x: x[:, :100], nn.Linear(100, 4))
    pins = {pin for name in ("0", "1") for space in spaces_of(channels, name) for pin in space.pins}
    assert pins == {"_1 has runs of 36 channels that are cut apart"}


# ---- readers and ties --------------------------------------------------------------------------------------------


def test_several_readers_find_one_order_in_the_trunk():
    channels = channels_of(conv(8, 8), lambda x: torch.relu(x) + torch.tanh(x), conv(8, 4))
    first = node(channels, "0")
    (own,), (trunk,) = channels.own[first], channels.trunk[first]
    assert own is not trunk and str(trunk) == "_0 (trunk)"
    cost = CostModel().move(2 * BYTES * ALONG)
    assert any({tie.a, tie.b} == {own.site, trunk.site} and tie.cost == cost for tie in channels.problem.ties)


def test_weights_and_sums_are_no_readers_that_need_an_order():
    channels = channels_of(conv(8, 8), lambda x: torch.relu(x) * x.mean(1, keepdim=True), Joined(conv(8, 8)))
    first = node(channels, "0")
    assert channels.trunk[first] is channels.own[first]


def test_what_stands_between_a_layer_and_what_is_fused_costs_twice():
    channels = channels_of(conv(8, 8), nn.ReLU(), nn.MaxPool2d(3, 1, 1), conv(8, 4))
    costs = {
        frozenset(str(s.node.name) for s in (channels._sites[tie.a], channels._sites[tie.b])): tie.cost
        for tie in channels.problem.ties
    }
    assert costs[frozenset({"_0", "_1"})] == 2 * costs[frozenset({"_1", "_2"})]


def test_a_constant_and_its_reader_have_one_order():
    channels = channels_of(conv(8, 8), Scale(8, 1, 1), conv(8, 4))
    (scale,) = channels.own[next(n for n in channels.graph.graph.nodes if n.op == "get_attr")]
    assert [tie.cost for tie in channels.problem.ties if scale.site in (tie.a, tie.b)] == [inf]


def test_a_segment_is_named_by_its_tensor_wherever_its_channels_are():
    channels = channels_of(conv(8, 8), ChannelsLast(nn.ReLU(), Scale(8)), conv(8, 4))
    constant = next(n for n in channels.graph.graph.nodes if n.op == "get_attr")
    assert [str(segment) for segment in channels.own[constant]] == [constant.name]
    relu = node(channels, "1.body.0")
    assert [str(segment) for segment in channels.own[relu]] == [relu.name]


def test_shuffles_tie_what_they_reorder():
    channels = ChannelGraph(compiled_case("bottleneck").given_to("absorb_shuffles"))
    assert [n.name for n, _ in channels.shuffles] == ["_3_body_3_in", "_3_body_3_out"]
    for shuffle, cost in channels.shuffles:
        assert cost == CostModel().move(2 * BYTES * 8 * 25)
        (before,) = channels.trunk[shuffle.all_input_nodes[0]]
        (after,) = channels.own[shuffle]
        assert channels.space_of(before) is channels.space_of(after)
        order = channels.graph.get_submodule(shuffle.target).order
        assert np.array_equal(channels._numbers[before.site][order.index], channels._numbers[after.site])
        assert channels.wanted_by(shuffle) == "3.body.3"


def test_an_own_shuffle_belongs_to_no_layer():
    channels = channels_of(conv(8, 8), interleave, conv(8, 4))
    ((shuffle, _),) = channels.shuffles
    assert channels.wanted_by(shuffle) == ""


def test_a_shuffle_between_channels_joined_and_split_stays_whatever_is_planned():
    layers = conv(8, 8), Joined(conv(8, 8)), interleave
    assert channels_of(*layers, conv(16, 4)).fixed == 0
    assert channels_of(*layers, Split(conv(8, 8)), conv(16, 4)).fixed == CostModel().move(2 * BYTES * 2 * ALONG)


# ---- digits ------------------------------------------------------------------------------------------------------


def digits_of(channels: ChannelGraph) -> dict[str, tuple[int, ...]]:
    return {str(layer.node.target): layer.digits for layer in channels.grouped}


def test_the_groups_of_a_layer_are_digits_by_prime_factors():
    channels = channels_of(conv(8, 12), learned(12, 12, (0, 1, 0)), conv(12, 4))
    (layer,) = channels.grouped
    sizes = [channels.sizes[digit] for digit in layer.digits]
    assert layer.groups == np.prod(sizes) and sorted(sizes) == [2, 3]
    assert sorted(channels.sizes.values()) == sorted(sizes)
    space = channels.space_of(layer.reads)
    texts = {channels.sizes[digit]: channels.digit_text(space, digit) for digit in layer.digits}
    assert learned(12, 12, (0, 1, 0)).factors == ((2, 2), (2, 2), (3, 3))
    assert texts == {2: "6s", 3: "1s"}


def test_equal_digits_of_one_space_have_one_name():
    alike = channels_of(conv(8, 8), learned(8, 8, (1, 1, 0)), nn.ReLU(), learned(8, 8, (1, 1, 0)), conv(8, 4))
    assert digits_of(alike)["1"] == digits_of(alike)["3"]
    other = channels_of(conv(8, 8), learned(8, 8, (1, 1, 0)), nn.ReLU(), learned(8, 8, (1, 0, 1)), conv(8, 4))
    assert digits_of(other)["1"] != digits_of(other)["3"]
    apart = channels_of(conv(8, 8), learned(8, 8, (1, 1, 0)), conv(8, 8), learned(8, 8, (1, 1, 0)), conv(8, 4))
    assert digits_of(apart)["1"] != digits_of(apart)["3"]


def test_a_layer_relates_the_digits_of_its_sides():
    channels = channels_of(conv(8, 8), learned(8, 12, (1, 0)), conv(12, 4), shape=(2, 8, 6, 6))
    (layer,) = channels.grouped
    before, after = channels.space_of(layer.reads), channels.space_of(layer.writes)
    assert before is not after
    (digit,) = layer.digits
    assert channels.digit_text(before, digit) != "–" and channels.digit_text(after, digit) != "–"


def test_a_residual_layer_relates_digits_of_one_space():
    channels = ChannelGraph(compiled_case("residual stream").given_to("absorb_shuffles"))
    assert not channels.entangled
    (layer,) = channels.grouped
    assert channels.space_of(layer.reads) is channels.space_of(layer.writes)


def test_a_layer_that_would_make_two_digits_of_one_space_the_same_is_planned_by_itself():
    channels = channels_of(
        conv(8, 8), Residual(nn.ReLU(), learned(8, 8, (1, 1, 0), 1), Call(interleave)), conv(8, 4)
    )  # what it writes as groups by ones, the stream finds as groups by others
    assert channels.entangled
    (layer,) = channels.grouped
    assert any(mount.b == layer.reads.site for mount in channels.problem.mounts)


def test_names_reach_through_flatten():
    channels = ChannelGraph(compiled_case("flatten 5×5").given_to("absorb_shuffles"))
    space = space_of(channels, "2")
    assert space.width == 100 and space is space_of(channels, "_1_out")
    (layer,) = channels.grouped
    assert channels.digit_text(space, layer.digits[0]) == "25s"
    (own,) = channels.own[node(channels, "2")]
    assert channels.order(own, (layer.digits[0],)).reshape(4, 25).tolist() == [
        list(range(25 * c, 25 * c + 25)) for c in (0, 2, 1, 3)
    ]


# ---- orders ------------------------------------------------------------------------------------------------------


def test_a_flag_sorts_by_its_digits_first_the_first_and_leaves_the_rest():
    channels = channels_of(Residual(learned(8, 8, (1, 0, 1)), shortcut=learned(8, 8, (1, 1, 0))))
    (own,) = channels.own[node(channels, "input_1")]
    (twos,), (ones,) = (digits_of(channels)[name] for name in ("0.body.0", "0.shortcut"))
    assert [channels.digit_text(channels.space_of(own), digit) for digit in (twos, ones)] == ["2s", "1s"]
    assert channels.order(own, ()).tolist() == list(range(8))
    assert channels.order(own, (ones,)).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert channels.order(own, (twos, ones)).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert as_order(channels.order(own, (ones, twos))) == ChannelOrder((0, 4, 2, 6, 1, 5, 3, 7))


def test_equal_flags_leave_no_shuffle_at_a_tie():
    for name in ("two in a row", "residual streams", "dense net", "u-net", "flatten 5×5", "channel shuffle of 12"):
        channels = ChannelGraph(compiled_case(name).given_to("absorb_shuffles"))
        flags = [(), *((digit,) for digit in channels.sizes), tuple(channels.sizes)]
        for bond in channels._bonds:
            for flag in flags:
                lacking = channels.problem.lacks.get(bond.a.site, set()) | channels.problem.lacks.get(
                    bond.b.site, set()
                )
                if lacking & set(flag):
                    continue
                a, b = (channels._numbers[s.site][channels.order(s, flag)] for s in (bond.a, bond.b))
                assert np.array_equal(a, b if bond.repeat == 1 else b[:: bond.repeat] // bond.repeat), (name, flag)


def test_a_pin_that_is_not_in_the_order_of_its_space_has_a_flag_of_its_own():
    channels = channels_of(interleave)
    pins = {
        str(segment): channels.problem.pins[segment.site]
        for segment in channels._sites
        if segment.site in channels.pinned
    }
    natural, other = set(pins.values())
    named = max(natural, other, key=len)
    assert min(natural, other, key=len) == () and named[-1] < 0
    for segment in channels._sites:
        if segment.site in channels.pinned:
            assert channels.order(segment, channels.problem.pins[segment.site]).tolist() == list(range(8))


@pytest.mark.parametrize("name", CASES)
def test_the_old_order_is_what_every_pin_says(name):
    channels = ChannelGraph(compiled_case(name).given_to("absorb_shuffles"))
    for segment in channels._sites:
        if segment.site in channels.pinned:
            order = channels.order(segment, channels.problem.pins[segment.site])
            assert order.tolist() == list(range(segment.width))


# ---- the question ------------------------------------------------------------------------------------------------


def test_a_layer_costs_its_multiply_adds_and_its_bytes_by_its_groups():
    channels = channels_of(conv(8, 8), learned(8, 8, (1, 0, 0)), conv(8, 4))
    (link,) = channels.problem.links
    assert set(link.costs) == {1, 2, 4} and len(link.digits) == 2
    model = CostModel()
    for groups, cost in link.costs.items():
        weights = 8 * 8 * 9 // groups
        assert cost == pytest.approx(model.conv(weights * 36, BYTES * (2 * ALONG + weights)))


def test_group_norm_wants_its_groups_in_front():
    channels = channels_of(conv(8, 8), nn.GroupNorm(4, 8), conv(8, 4))
    (digits,) = channels.problem.wanted.values()
    assert [channels.sizes[digit] for digit in digits] == [2, 2]
    assert not channels_of(conv(8, 8), nn.GroupNorm(1, 8), conv(8, 4)).problem.wanted
    joined = channels_of(conv(8, 8), Joined(conv(8, 8)), nn.GroupNorm(2, 16), conv(16, 4))
    assert spaces_of(joined, "2")[0].pins == ["2 normalises groups of channels that were joined"]


def test_a_side_on_segments_is_mounted():
    channels = channels_of(conv(8, 8), Joined(conv(8, 8)), conv(16, 16, groups=2), conv(16, 4))
    (layer,) = channels.grouped
    mounts = channels.problem.mounts
    assert [(mount.a, mount.b) for mount in mounts] == [
        (segment.site, layer.reads.site) for segment in channels.own[node(channels, "cat")]
    ]
    assert {mount.above for mount in mounts} == {layer.digits}  # the segments are its groups
    solution = solve(channels.problem)
    assert solution.cost == pytest.approx(layer.costs[2])
    assert channels.follows(layer.reads, solution.flags)


def test_the_segments_of_a_shuffle_unit():
    channels = ChannelGraph(compiled_case("shuffle unit").given_to("absorb_shuffles"))
    assert runs(channels.own[node(channels, "0")]) == [(0, 8), (8, 16)]
    left, right = spaces_of(channels, "0")
    assert left is not right
    assert spaces_of(channels, "cat")[0] is left
    (own,) = (n for n, _ in channels.shuffles if not channels.wanted_by(n))
    assert runs(channels.own[own]) == [(0, 16)]
