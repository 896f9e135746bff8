"""Attacks on the certificate: compiled graphs that compute something else, made with every means a pass has.

``test_forgeries.py`` changes operations and orders of a copy; here whole graphs are forged, node by node, with selections
of channels, lying metadata and layers that only look like the training form's.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forging import CYCLE, SHAPE, traced
from graphs import Call, Leaf, Scale, conv, depthwise, filled, learned
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.equivalence import seeded_inputs
from foldgroup.forms import ChannelSelect, ChannelShuffle, MaskedConv2d, conv_like, with_tensors
from foldgroup.nn import DGConv2d
from foldgroup.trace import attach_shapes, evaluate, fork, trace
from passes.absorb_shuffles import reordered
from passes.fold_batchnorm import fold


class Forger:
    """Builds a compiled graph of ``training`` node by node; modules are the training form's unless added."""

    def __init__(self, training: fx.GraphModule) -> None:
        self.training, self.graph, self.result = training, fx.Graph(), fork(training)
        self.of = {node.name: node for node in training.graph.nodes}
        self.lies: dict[fx.Node, object] = {}
        first = next(iter(training.graph.nodes))
        self.input = self.graph.node_copy(first)
        self.shape: tuple[int, ...] = first.meta["shape"]

    def again(self, name: str, *operands: fx.Node, **meta: Any) -> fx.Node:
        """The training form's node, on other operands."""
        source = self.of[name]
        given = dict(zip(source.all_input_nodes, operands, strict=True))
        node = self.graph.node_copy(source, given.__getitem__)
        node.meta = {"origin": name, **meta}
        return node

    def upto(self, name: str) -> fx.Node:
        """The training form's nodes behind the input, up to one."""
        made: dict[fx.Node, fx.Node] = {}
        for source in self.training.graph.nodes:
            made[source] = self.input if source.op == "placeholder" else self.graph.node_copy(source, made.get)
            made[source].meta = {"origin": source.name}
            if source.name == name:
                return made[source]
        raise KeyError(name)

    def module(self, module: nn.Module, *operands: fx.Node, origin: object = None, **meta: Any) -> fx.Node:
        target = f"forged_{len(self.graph.nodes)}"
        self.result.add_submodule(target, module.eval())
        node = self.graph.call_module(target, operands)
        node.meta = {"origin": origin, **meta} if origin is not None else meta
        return node

    def call(self, function: Callable[..., Any], *args: Any, origin: str, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(function, args, kwargs)
        node.meta = {"origin": origin}
        return node

    def slice(self, node: fx.Node, start: int, stop: int, origin: str) -> fx.Node:
        return self.call(operator.getitem, node, (slice(None), slice(start, stop)), origin=origin)

    def cat(self, *nodes: fx.Node, origin: str) -> fx.Node:
        return self.call(torch.cat, list(nodes), 1, origin=origin)

    def constant(self, name: str, value: Tensor, origin: str, **meta: Any) -> fx.Node:
        self.result.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta = {"origin": origin, **meta}
        return node

    def done(self, value: Any, *, runs: bool = True) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.graph.output(value)
        self.result.graph = self.graph
        if runs:
            attach_shapes(self.result, self.shape)
        else:
            for node in self.graph.nodes:
                node.meta.setdefault("shape", ())
        for node, shape in self.lies.items():
            node.meta["shape"] = shape
        return self.training, self.result


def same_function(training: fx.GraphModule, forged: fx.GraphModule) -> bool:
    inputs = seeded_inputs(next(iter(training.graph.nodes)).meta["shape"])
    ours, theirs = (evaluate(graph, inputs)["output"] for graph in (forged, training))
    ours, theirs = ([x] if isinstance(x, Tensor) else list(x) for x in (ours, theirs))
    return len(ours) == len(theirs) and all(
        one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-6, equal_nan=True)
        for one, other in zip(ours, theirs, strict=True)
    )


Attack = Callable[[], tuple[fx.GraphModule, fx.GraphModule]]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refuted(name):
    torch.manual_seed(0)
    training, forged = ATTACKS[name]()
    forged.graph.lint()
    try:
        assert not same_function(training, forged), "it is no attack"
    except AssertionError:
        raise
    except Exception as error:  # it does not even run
        print(error)
    certificate = certify(training, forged)
    assert not certificate.holds


