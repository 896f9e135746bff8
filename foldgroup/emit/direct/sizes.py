"""What a graph computes of sizes: ``x.shape[0]``, ``c // groups``. Numbers, but for what depends on the batch.

The size of every axis is known but for that of the first, the batch or a multiple of it, where that is dynamic. So all
that is computed of sizes is computed for two batches: what is the same for both is a number.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

OTHER = "what depends on the batch"
"""Stands for what is neither a number nor a multiple of the batch."""


@dataclass(frozen=True)
class Images:
    """So many times the number of images, where that is dynamic."""

    times: int


_BATCHES = (1009, 2003)
"""Primes, so that nothing but a multiple of the batch looks like one."""

_FUNCTIONS = {
    *(function for module in (math, operator) for function in vars(module).values() if callable(function)),
    *(int, float, max, min, round, abs, sum, len),
}


class Sizes:
    """Those of one graph, for a batch of ``batch`` images or, if it is 0, any number."""

    def __init__(self, batch: int) -> None:
        self._batches = (batch,) if batch else _BATCHES
        self._known: dict[fx.Node, tuple[Any, ...]] = {}

    def ask(self, node: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Learn what ``node`` asks of a tensor that has this shape for one image."""
        tensors = [torch.empty((batch * shape[0], *shape[1:]), dtype=dtype, device="meta") for batch in self._batches]
        self._known[node] = tuple(_called(node, {node.all_input_nodes[0]: tensor}) for tensor in tensors)

    def compute(self, node: fx.Node) -> bool:
        """Learn the value of ``node`` if it is a function of what is known; whether it is."""
        operands = node.all_input_nodes
        computable = node.op == "call_function" and node.target in _FUNCTIONS and bool(operands)
        if computable and self._known.keys() >= set(operands):
            each = zip(*(self._known[operand] for operand in operands), strict=True)
            self._known[node] = tuple(_called(node, dict(zip(operands, values, strict=True))) for values in each)
        return node in self._known

    def resolved(self, given: Any) -> Any:
        """``given`` with numbers, :class:`Images` or :data:`OTHER` for what is known; tensors stay nodes."""

        def value_of(node: fx.Node) -> Any:
            values = self._known.get(node)
            if values is None:
                return node
            if isinstance(values[0], tuple):
                return tuple(map(self._named, zip(*values, strict=True)))
            return self._named(values)

        return fx.map_arg(given, value_of)

    def _named(self, values: tuple[Any, ...]) -> Any:
        if all(value == values[0] for value in values):
            return values[0]
        times = values[0] // self._batches[0] if isinstance(values[0], int) else 0
        return Images(times) if values == tuple(times * batch for batch in self._batches) else OTHER


def _called(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
