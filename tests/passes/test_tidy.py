"""tidy: no-ops, dead nodes and modules without calls go."""

from __future__ import annotations

import pytest
import torch
from graphs import CASES, Call, Twice, apply, assert_lawful, compiled_case, conv, node_of, untouched
from torch import Tensor, nn
from torch.nn import functional

from foldgroup.certificate import certify
from foldgroup.pipeline import Note, Pipeline
from foldgroup.trace import fork, is_no_op, trace
from passes import Tidy

NAME = "tidy"
REASON = "computes nothing in evaluation mode"


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_function(name):
    assert_lawful(compiled_case(name), NAME)


@pytest.mark.parametrize("no_op", [nn.Identity(), nn.Dropout(), nn.Dropout2d(), nn.Dropout3d()])
def test_removes_what_returns_its_input(no_op):
    case = apply(Tidy(), nn.Sequential(conv(3, 8), no_op, nn.ReLU()))
    assert [node.target for node in case.folded.graph.nodes if node.op == "call_module"] == ["0", "2"]
    assert case.result.records[-1].rewrites == (Note("1", REASON),)
    assert "1" not in dict(case.folded.named_children())


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout().train(), nn.AlphaDropout().eval(), nn.ReLU(), nn.Sequential(), None],
    ids=["dropout in training mode", "alpha dropout", "relu", "container", "no module"],
)
def test_what_is_not_known_to_be_a_no_op_is_none(layer):
    assert not is_no_op(layer)


@pytest.mark.parametrize(
    "layer",
    [nn.AvgPool2d(1), nn.Upsample(scale_factor=1), Call(lambda x: functional.dropout(x, training=False))],
    ids=["pooling of one", "upsampling by one", "functional dropout"],
)
def test_leaves_what_only_happens_to_do_nothing(layer):
    case = apply(Tidy(), nn.Sequential(conv(3, 8), layer))
    record = case.result.records[-1]
    assert not record.changed
    assert (record.rewrites, record.skips) == ((), ())


@pytest.mark.parametrize(
    "layers",
    [[nn.Identity()], [nn.Identity(), nn.Dropout()], [nn.Identity(), conv(3, 4)], [conv(3, 4), nn.Dropout()]],
    ids=["alone", "chain", "behind the input", "before the output"],
)
def test_removes_no_ops_at_the_ends(layers):
    case = apply(Tidy(), nn.Sequential(*layers))
    assert not any(is_no_op(module) for module in case.folded.modules())
    assert certify(case.training, case.folded).holds


def test_removes_every_call_of_one_no_op():
    case = apply(Tidy(), nn.Sequential(conv(3, 8), Twice(nn.Identity())))
    assert case.result.records[-1].rewrites == (Note("1.layer", REASON), Note("1.layer", REASON))
    assert certify(case.training, case.folded).holds


def test_gives_all_readers_of_a_no_op_its_operand():
    case = apply(Tidy(), nn.Sequential(conv(3, 8), nn.Dropout(), Call(lambda x: x * torch.tanh(x))))
    assert len(node_of(case.folded, "0").users) == 2


class DeadEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = conv(3, 4), conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x).mean()
        return self.used(x)


def test_removes_dead_nodes_and_their_modules():
    case = apply(Tidy(), DeadEnd())
    assert [node.name for node in case.folded.graph.nodes] == ["x", "used", "output"]
    assert list(dict(case.folded.named_children())) == ["used"]
    assert case.result.records[-1].changed


def test_leaves_a_tidy_network():
    record = compiled_case("nothing to fold").record(NAME)
    assert not record.changed
    assert (record.rewrites, record.skips) == ((), ())


def test_may_run_first():
    training = compiled_case("no-ops").training
    result = Pipeline((Tidy(),)).run(training)
    assert certify(training, result.graph).holds
    assert len(result.records[0].rewrites) == 3


def test_keeps_a_parameter_that_the_network_reads():
    training = trace(nn.Sequential(conv(3, 4), nn.PReLU()), (2, 3, 5, 5))
    graph = fork(training)
    assert torch.equal(Tidy().run(graph).graph.get_submodule("1").weight, training.get_submodule("1").weight)


@pytest.mark.parametrize("name", ["no-ops", "bottleneck"])
def test_touches_nothing_it_is_given(name):
    graph = compiled_case(name).given_to(NAME)
    with untouched(graph):
        Tidy().run(graph)
