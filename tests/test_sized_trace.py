"""Networks that compute with the sizes of what they are given, or decide by them."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from graphs import Call, conv, filled
from torch import Tensor, nn
from torch.nn import functional

from foldgroup.errors import TraceError
from foldgroup.trace import trace

SHAPE = (1, 3, 9, 9)


def padded(x: Tensor) -> Tensor:
    """To even sizes, as decoders and "same" padding do."""
    height, width = x.shape[-2:]
    return functional.pad(x, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x


def square(x: Tensor) -> Tensor:
    """Tokens back into an image."""
    tokens = x.flatten(2)
    side = int(math.sqrt(tokens.size(2)))
    return tokens.reshape(x.size(0), x.size(1), side, side)


def checked(x: Tensor) -> Tensor:
    """Compares what depends on the batch, which is the same for every batch."""
    assert x.shape[0] == (x * 2).shape[0] and x.ndim == 4 and x.dim() == 4
    return x


def in_parts(x: Tensor) -> Tensor:
    """Runs over the parts, as many as there are channels."""
    return torch.cat([part * i for i, part in enumerate(x.split(2, 1)) if len(part.shape) == 4], 1)


def overwritten(x: Tensor) -> Tensor:
    """In place, under another name."""
    y = x * 1
    z = y
    y *= 2 if x.shape[2] > 4 else 3
    return y + z


@pytest.mark.parametrize("function", [padded, square, checked, in_parts, overwritten])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_sizes_are_numbers_but_for_the_batch(function, batch):
    model = filled(nn.Sequential(conv(3, 8), Call(function), nn.BatchNorm2d(8)))
    x = torch.randn(batch, *SHAPE[1:])
    assert torch.equal(trace(model, SHAPE)(x), model(x))


def test_what_can_be_traced_without_its_sizes_is_as_it_was():
    graph = trace(
        filled(nn.Sequential(conv(3, 8), Call(lambda x: x.reshape(x.shape[0], 4, 2, 9, 9).flatten(1, 2)))), SHAPE
    )
    assert any(node.target is operator.getitem for node in graph.graph.nodes)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x if x.sum() > 0 else -x, "decides by the value of a tensor"),
        (lambda x: x if x.shape[0] % 2 else -x, "decides by the shape of a tensor"),
        (lambda x: x if x.shape[0] > 1 else -x, "decides by the shape of a tensor"),
        (lambda x: x.reshape(len(x), -1), "cannot be traced"),
    ],
)
def test_what_depends_on_values_or_on_the_batch_is_refused_as_before(function, words):
    with pytest.raises(TraceError, match=words):
        trace(filled(nn.Sequential(conv(3, 8), Call(function))), SHAPE)
    assert torch.nn.Module.__call__.__name__ == "_wrapped_call_impl"  # what tracing changes is as it was
