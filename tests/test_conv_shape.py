"""conv_shape: extents as torch's, the exact executions of a layer, and keys that can be read again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import SHUFFLES, convs, square
from strategies import quick
from torch import nn

from foldgroup.conv_calls import grouped_convs
from foldgroup.conv_shape import MOST_PARTS, ConvShape, Execution, ShuffleShape, shape_from_key
from foldgroup.counts import layer_costs
from foldgroup.forms import CONVS
from foldgroup.trace import trace


def layer_of(shape: ConvShape) -> nn.Module:
    """Torch's own convolution of that shape."""
    kind: Any = CONVS[len(shape.size) - 1]
    layer: nn.Module = kind(
        shape.in_channels, shape.out_channels, shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups
    )
    return layer


@given(convs(widest=2, most_groups=8))
@quick(60)
def test_the_extent_of_the_result_is_torchs(shape: ConvShape) -> None:
    with torch.device("meta"):
        result = layer_of(shape)(torch.zeros(1, shape.in_channels, *shape.size))
    assert tuple(result.shape) == (1, shape.out_channels, *shape.out_size)


@given(convs(widest=2, most_groups=4))
@quick(15)
def test_a_graphs_convolutions_have_the_shapes_that_they_were_made_with(shape: ConvShape) -> None:
    with torch.device("meta"):
        graph = trace(nn.Sequential(layer_of(shape)), (1, shape.in_channels, *shape.size))
    assert grouped_convs(graph) == ({"0": (shape,)} if shape.groups > 1 else {})
    (cost,) = layer_costs(graph)
    assert cost.macs == shape.macs
    assert shape.weights == graph.get_parameter("0.weight").numel()


def test_a_layer_that_is_called_twice_has_a_shape_for_each_call() -> None:
    shared = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
    graph = trace(nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(4, 4, 1)), (1, 4, 16, 16))
    first = square(4, 2, size=16, stride=2)
    assert grouped_convs(graph) == {"0": (first, replace(first, size=(8, 8)))}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_that_differs_between_the_ends_counts_as_the_wider() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(4, 4, (4, 3), padding="same", groups=2)), (1, 4, 9, 9))
    assert grouped_convs(graph)["0"][0].padding == (2, 1)


@given(convs())
@quick()
def test_executions_are_the_divisors_from_its_own_groups_down_and_then_the_splits(shape: ConvShape) -> None:
    packed = [e for e in shape.executions if e.parts == 1]
    splits = [e for e in shape.executions if e.parts > 1]
    assert [e.groups for e in packed] == sorted(g for g in range(1, shape.groups + 1) if shape.groups % g == 0)[::-1]
    assert [(e.groups, e.parts) for e in splits] == [
        (e.groups, e.groups) for e in packed if 2 <= e.groups <= MOST_PARTS
    ]
    assert list(shape.executions) == packed + splits
    assert shape.executions[0] == Execution(shape.groups)


@given(convs(), st.data())
@quick()
def test_packing_keeps_the_result_and_multiplies_the_work(shape: ConvShape, data: st.DataObject) -> None:
    packed = shape.run_as(data.draw(st.sampled_from(shape.executions)).groups)
    members = shape.groups // packed.groups
    assert (packed.out_size, packed.values) == (shape.out_size, shape.values)
    assert (packed.macs, packed.weights) == (members * shape.macs, members * shape.weights)
    assert set(packed.executions) <= set(shape.executions)


@pytest.mark.parametrize(
    ("ins", "outs", "groups", "depthwise"), [(8, 8, 8, True), (8, 8, 4, False), (8, 16, 8, False), (1, 1, 1, True)]
)
def test_depthwise_is_one_input_and_one_output_a_group(ins: int, outs: int, groups: int, depthwise: bool) -> None:
    assert replace(square(8, 1), in_channels=ins, out_channels=outs, groups=groups).depthwise is depthwise


@given(convs() | SHUFFLES, convs() | SHUFFLES)
@quick(100)
def test_a_key_gives_its_shape_and_no_other(shape: ConvShape | ShuffleShape, other: ConvShape | ShuffleShape) -> None:
    assert shape_from_key(shape.key()) == shape
    assert (shape.key() == other.key()) is (shape == other)


KEY = json.loads(square(8, 4).key())


@pytest.mark.parametrize(
    "key",
    [
        "",
        "conv",
        "null",
        "3",
        '"[4,[3]]"',
        "{}",
        "[]",
        "[[]]",
        "[4]",
        "[4,3]",
        "[0,[3]]",
        "[-4,[3]]",
        "[4.0,[3]]",
        "[NaN,[3]]",
        "[4,[3.5]]",
        "[4,[null]]",
        "[4,[[3]]]",
        "[[3],4]",
        "[4,[3],[3]]",
        json.dumps(KEY[:-1]),
        json.dumps([*KEY, [1, 1]]),
        json.dumps([*KEY, 1]),
        json.dumps([*KEY[3:], *KEY[:3]]),
        json.dumps([str(KEY[0]), *KEY[1:]]),
        json.dumps([0, *KEY[1:]]),
        json.dumps([*KEY[:-1], 8]),
        json.dumps([*KEY[:-1], "8"]),
        json.dumps(KEY)[:-1],
    ],
)
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError):
        shape_from_key(key)


def test_shapes_and_executions_read_well() -> None:
    assert str(square(64, 16, stride=2)) == "64→64 3×3 stride 2×2 at 8×8, 16 groups"
    assert str(square(64, 16)) == "64→64 3×3 at 8×8, 16 groups"
    assert str(ShuffleShape(64, (8, 8))) == "shuffle of 64 channels at 8×8"
    assert [str(Execution(*e)) for e in ((1, 1), (4, 1), (4, 4))] == [
        "dense",
        "4 groups",
        "4 convolutions side by side",
    ]


def test_a_shuffle_reads_and_writes_every_value() -> None:
    assert ShuffleShape(6, (4, 5)).values == 2 * 6 * 4 * 5
