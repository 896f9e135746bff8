"""Graphs and passes forged by hand, which the tests of the certificate and of the pipeline share."""

from __future__ import annotations

import torch
from graphs import conv, filled, learned
from torch import fx, nn

from foldgroup.certificate import certify
from foldgroup.channel_order import ChannelOrder
from foldgroup.equivalence import seeded_inputs
from foldgroup.evaluation import evaluate
from foldgroup.pipeline import Pass, PassResult, Stage
from foldgroup.trace import fork, trace

SHAPE = (2, 3, 5, 5)
CYCLE = ChannelOrder((1, 2, 3, 0, 5, 6, 7, 4))
"""An order of eight channels that is not its own inverse."""


def traced(*layers: nn.Module, shape: tuple[int, ...] = SHAPE) -> fx.GraphModule:
    return trace(filled(nn.Sequential(*layers)), shape)


def four_layers() -> fx.GraphModule:
    """A learned layer among others, called "0" to "3"."""
    return traced(conv(3, 8), learned(8, 8, (1, 1, 0)), nn.ReLU(), conv(8, 4))


def differs(training: fx.GraphModule, forged: fx.GraphModule, shape: tuple[int, ...] = SHAPE) -> bool:
    inputs = seeded_inputs(shape)
    ours, theirs = evaluate(forged, inputs)["output"], evaluate(training, inputs)["output"]
    return ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-6)


def refuted(training: fx.GraphModule, forged: fx.GraphModule) -> str:
    certificate = certify(training, forged)
    assert not certificate.holds
    assert certificate.as_dict()["failure"] == certificate.failure
    return str(certificate.failure)


class Named(Pass):
    """A pass made of a function on graphs."""

    def __init__(self, name: str, run=fork, *, requires: Stage = Stage.TRAINING, gives: Stage | None = None) -> None:
        self.name, self.requires, self.gives, self.function = name, requires, gives, run

    def run(self, graph: fx.GraphModule) -> PassResult:
        return PassResult(self.function(graph))
