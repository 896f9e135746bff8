"""Outputs: flattened in order, named after their place, and refused where no file could hold them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Call
from torch import Tensor

from foldgroup.errors import TraceError
from foldgroup.evaluation import evaluate
from foldgroup.outputs import check_outputs, flat, outputs_of
from foldgroup.trace import trace

Pair = namedtuple("Pair", "main aux")
SHAPE = (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (lambda a, b, c: a, ["logits"]),
        (lambda a, b, c: [{"out": a}], ["logits"]),
        (lambda a, b, c: (a, b), ["output_0", "output_1"]),
        (lambda a, b, c: OrderedDict([("1", a), ("0", b), ("pool", c)]), ["output_1", "output_0", "pool"]),
        (lambda a, b, c: (a, {"aux": [b, c]}), ["output_0", "output_1_aux_0", "output_1_aux_1"]),
        (lambda a, b, c: {"input": a, "a b": b, "a.b": c}, ["input_2", "a_b", "a_b_2"]),
        (lambda a, b, c: {"höhe": a, "image": b}, ["h_he", "image_2"]),
        (lambda a, b, c: (a, a), ["output_0", "output_1"]),
    ],
)
def test_names_and_order(returned: Callable[..., Any], names: list[str]) -> None:
    graph = trace(Call(lambda x: returned(x + 1, x * 2, x.mean((2, 3)))), SHAPE)
    check_outputs(graph, 1)
    assert list(outputs_of(graph)) == names
    x = torch.randn(SHAPE)
    values = flat(evaluate(graph, x)["output"])
    expected = flat(returned(x + 1, x * 2, x.mean((2, 3))))
    assert len(values) == len(names)
    assert all(torch.allclose(ours, theirs.double()) for ours, theirs in zip(values, expected, strict=True))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (), "the network returns nothing: return a tensor"),
        (lambda x: (x, None), "output 1 of the network is None, not a tensor"),
        (lambda x: {"a": x, "b": x.chunk(2, 1)}, "output b of the network is what chunk returns, not a tensor"),
        (lambda x: Pair(x, x + 1), "the network's output is what pair returns, not a tensor: return the tensors in it"),
        (lambda x: x.mean(), r"the network's output has shape \[\] for a batch of 1: its first axis must be the batch"),
        (lambda x: {"a": [x, x.flatten()]}, r"output a\.1 of the network has shape \[48\] for a batch of 1"),
    ],
)
def test_what_cannot_be_returned(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        check_outputs(trace(Call(function), SHAPE), 1)
