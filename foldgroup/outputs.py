"""What a network returns: one tensor, or several in tuples, lists and dicts; flattened in their order and named.

One tensor is called ``logits``, whatever it is wrapped in. Of several, each bears its path: the dict keys and positions
that lead to it, with ``output_`` in front where that would be no identifier::

    {"0": a, "pool": b}       output_0, pool
    (a, {"aux": b})           output_0, output_1_aux
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from foldgroup.errors import TraceError
from foldgroup.trace import shape_of

ONLY = "logits"
"""The name of an only output."""

_TAKEN = ("input", "image")
"""Names of inputs, which no output may bear."""


def outputs_of(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes whose values ``graph`` returns, by the names of its outputs, in order."""
    found = list(_leaves(graph.graph.output_node().args[0]))
    return dict(zip(_names([path for path, _ in found]), (leaf for _, leaf in found), strict=True))


def flat(value: Any) -> tuple[Tensor, ...]:
    """The tensors in what a network returned, in the order of :func:`outputs_of`."""
    return tuple(leaf for _, leaf in _leaves(value))


def check_outputs(graph: fx.GraphModule, batch: int) -> None:
    """Refuse what no file and no runtime could return.

    Raises:
        TraceError: if there is no output, or one is no tensor with the batch as its first axis; the message names it.
    """
    returned = graph.graph.output_node().args[0]
    found = list(_leaves(returned))
    if not found:
        raise TraceError("the network returns nothing: return a tensor, or tensors in a tuple, list or dict")
    for path, leaf in found:
        where = f"output {'.'.join(path)} of the network" if path else "the network's output"
        if not isinstance(leaf, fx.Node):
            raise TraceError(f"{where} is {leaf!r}, not a tensor: leave it out, or wrap the network in one that does")
        shape = shape_of(leaf)
        if "shape" not in leaf.meta:
            raise TraceError(
                f"{where} is what {leaf.name} returns, not a tensor: return the tensors in it, in a tuple or dict"
            )
        if not shape or shape[0] != batch:
            raise TraceError(
                f"{where} has shape {list(shape)} for a batch of {batch}: its first axis must be the batch"
            )


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is no container in ``value``, in order, with the path to it."""
    if isinstance(value, Mapping):
        items = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, tuple | list):
        items = [(str(i), part) for i, part in enumerate(value)]
    else:
        yield path, value
        return
    for key, part in items:
        yield from _leaves(part, (*path, key))


def _names(paths: list[tuple[str, ...]]) -> list[str]:
    if len(paths) == 1:
        return [ONLY]
    names: list[str] = []
    for path in paths:
        name = re.sub(r"\W", "_", "_".join(path), flags=re.ASCII)
        name = name if name.isidentifier() else f"output_{name}"
        number = 1
        unique = name
        while unique in names or unique in _TAKEN:
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names
