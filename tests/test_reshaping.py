"""Channel shuffles written as reshapes and transposes: found by what the shapes do, and only if they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import Call, filled, interleave
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.channel_order import ChannelOrder
from foldgroup.equivalence import seeded_inputs
from foldgroup.evaluation import evaluate
from foldgroup.reshaping import shuffle_at
from foldgroup.trace import trace

Layer = nn.Module | Callable[[Tensor], Tensor]
IMAGE, SIGNAL, VECTOR = (2, 12, 3, 4), (2, 12, 5), (2, 12)


def traced(layer: Layer, shape: tuple[int, ...]) -> fx.GraphModule:
    return trace(filled(nn.Sequential(layer if isinstance(layer, nn.Module) else Call(layer))), shape)


def found(layer: Layer, shape: tuple[int, ...] = IMAGE) -> list[tuple[str, str, ChannelOrder]]:
    """Every node that is a shuffle, what it shuffles, and how."""
    graph = traced(layer, shape)
    pairs = ((node, shuffle_at(graph, node)) for node in graph.graph.nodes)
    return [(node.name, pair[0].name, pair[1]) for node, pair in pairs if pair is not None]


def by_attributes(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 3, channels // 3, height, width).transpose(1, 2).reshape(batch, channels, height, width)


SHUFFLES: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "ShuffleNet's": (interleave, IMAGE),
    "by shape": (by_attributes, IMAGE),
    "torch's layer": (nn.ChannelShuffle(3), IMAGE),
    "torch's function": (lambda x: functional.channel_shuffle(x, 4), IMAGE),
    "torch's function by keyword": (lambda x: functional.channel_shuffle(x, groups=4), SIGNAL),
    "1-D": (lambda x: x.view(2, 2, 6, -1).transpose(1, 2).flatten(1, 2), SIGNAL),
    "vectors": (lambda x: x.reshape(2, 4, 3).transpose(-1, -2).reshape(2, 12), VECTOR),
    "permute": (lambda x: x.view(2, 4, 3, 3, 4).permute(0, 2, 1, 3, 4).contiguous().view(2, 12, 3, 4), IMAGE),
    "functions": (
        lambda x: torch.reshape(torch.transpose(torch.reshape(x, (2, 4, 3, 12)), 1, 2), (2, 12, 3, 4)),
        IMAGE,
    ),
    "swapaxes": (lambda x: torch.swapaxes(x.unflatten(1, (2, 6)), 1, 2).flatten(1, 2), IMAGE),
    "torch.unflatten": (lambda x: torch.unflatten(x, 1, (2, 6)).swapaxes(1, 2).flatten(1, 2), IMAGE),
    "three digits": (lambda x: x.view(2, 2, 3, 2, 12).permute(0, 3, 1, 2, 4).reshape(2, 12, 3, 4), IMAGE),
    "positions in one": (lambda x: x.view(2, 3, 4, 12).transpose(1, 2).reshape(2, 12, 3, 4), IMAGE),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_finds_the_order_that_the_operations_amount_to(name):
    layer, shape = SHUFFLES[name]
    ((_, source, order),) = found(layer, shape)
    assert source == "input_1" and not order.is_identity
    inputs = seeded_inputs(shape)
    torch.testing.assert_close(evaluate(traced(layer, shape), inputs)["output"], inputs[:, order.index].double())


def test_a_shuffle_after_a_shuffle_is_one_by_itself():
    shuffle = lambda x: x.view(2, 2, 6, 12).transpose(1, 2).reshape(2, 12, 3, 4)  # noqa: E731
    pairs = found(lambda x: shuffle(shuffle(x)))
    assert [source for _, source, _ in pairs] == ["input_1", pairs[0][0]]
    assert pairs[0][2] == pairs[1][2] == ChannelOrder.from_digits([2, 6], [1, 0])


NOT: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "nothing": (lambda x: torch.relu(x), IMAGE),
    "reshapes alone": (lambda x: x.view(2, 2, 6, 3, 4).flatten(1, 2), IMAGE),
    "there and back": (lambda x: x.view(2, 2, 6, 12).transpose(1, 2).transpose(1, 2).reshape(2, 12, 3, 4), IMAGE),
    "one group": (nn.ChannelShuffle(1), IMAGE),
    "as many groups as channels": (nn.ChannelShuffle(12), IMAGE),
    "positions": (lambda x: x.transpose(2, 3).reshape(2, 12, 3, 4), IMAGE),
    "channels and positions": (lambda x: x.view(2, 12, 12).transpose(1, 2).reshape(2, 12, 3, 4), IMAGE),
    "images": (lambda x: x.view(2, 2, 6, 12).transpose(0, 1).reshape(2, 12, 3, 4), IMAGE),
    "something between": (lambda x: torch.relu(x.view(2, 2, 6, 12)).transpose(1, 2).reshape(2, 12, 3, 4), IMAGE),
    "another shape": (lambda x: x.view(2, 2, 6, 12).transpose(1, 2).reshape(2, 12, 12), IMAGE),
    "a number of the moment": (
        lambda x: x.view(2, 2, 6, 12).transpose(1, x.dim() - 2).reshape(2, 12, 3, 4),
        IMAGE,
    ),
    "one dimension": (lambda x: x.mean((1, 2, 3)).reshape(2), IMAGE),
}


@pytest.mark.parametrize("name", NOT)
def test_what_does_more_or_nothing_is_none(name):
    assert found(*NOT[name]) == []


def test_leaves_alone_what_goes_through_too_many_operations():
    def wandering(x: Tensor) -> Tensor:
        x = x.view(2, 2, 6, 12).transpose(1, 2)
        for _ in range(6):
            x = x.contiguous()
        return x.reshape(2, 12, 3, 4)

    assert found(wandering) == []
