"""fold_batchnorm: convolution and batch norm → convolution."""

from __future__ import annotations

import pytest
import torch
from graphs import (
    CASES,
    Call,
    Leaf,
    Residual,
    Twice,
    apply,
    assert_lawful,
    compiled_case,
    conv,
    depthwise,
    filled,
    learned,
    shuffles,
    untouched,
)
from torch import Tensor, nn

from foldgroup.certificate import certify
from foldgroup.errors import PassError
from foldgroup.pipeline import Note, Pipeline
from foldgroup.trace import called_module, fork, trace
from passes import FoldBatchNorm, FoldGroups, default_pipeline

NAME = "fold_batchnorm"


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_function(name):
    assert_lawful(compiled_case(name), NAME)


def norms(graph):
    return [node for node in graph.graph.nodes if isinstance(called_module(graph, node), nn.BatchNorm2d)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "layer",
    [conv(3, 6, 3, stride=2), conv(3, 6, groups=3), depthwise(3), learned(3, 6, (0,), padding_mode="circular")],
    ids=["dense", "grouped", "depthwise", "learned"],
)
def test_folds_into_the_convolution_before_it(layer, affine, bias):
    layer.bias = nn.Parameter(torch.ones(layer.out_channels)) if bias else None
    norm = nn.BatchNorm2d(layer.out_channels, eps=1e-3, affine=affine)
    case = apply(FoldBatchNorm(), nn.Sequential(layer, norm))
    assert not norms(case.folded)
    folded, before = case.folded.get_submodule("0"), case.graphs[-2].get_submodule("0")
    assert "1" not in dict(case.folded.named_children())  # the norm is gone from the module tree as well

    gamma = norm.weight.double() if affine else torch.ones(layer.out_channels).double()
    beta = norm.bias.double() if affine else torch.zeros(layer.out_channels).double()
    scale = gamma / (norm.running_var.double() + 1e-3).sqrt()
    shift = before.bias.double() if bias else 0
    assert folded.weight.dtype == folded.bias.dtype == torch.float64
    torch.testing.assert_close(folded.weight, before.weight.double() * scale[:, None, None, None], rtol=1e-14, atol=0)
    torch.testing.assert_close(folded.bias, (shift - norm.running_mean.double()) * scale + beta, rtol=1e-12, atol=1e-14)
    assert (folded.groups, folded.stride, folded.padding_mode) == (before.groups, before.stride, before.padding_mode)
    assert case.result.records[-1].rewrites == (Note("1", "folded into 0"),)


class SharedParameter(nn.Module):
    """A convolution whose kernel another convolution holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = conv(3, 3), nn.BatchNorm2d(3), conv(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


class KernelReadDirectly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = conv(3, 8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x)) * self.first.weight.sum()


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = conv(3, 8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.norm(x) + x


NEAR_MISSES = {
    "on the input": (nn.Sequential(nn.BatchNorm2d(3)), "0", "it follows input_1, which is no convolution"),
    "behind a ReLU": (
        nn.Sequential(conv(3, 8), nn.ReLU(), nn.BatchNorm2d(8)),
        *("2", "it follows _1, which is no convolution"),
    ),
    "behind an identity": (
        nn.Sequential(conv(3, 8), nn.Identity(), nn.BatchNorm2d(8)),
        *("2", "it follows _1, which is no convolution"),
    ),
    "behind an unknown operation": (
        nn.Sequential(Leaf(), nn.BatchNorm2d(3)),
        *("1", "it follows _0, which is no convolution"),
    ),
    "behind a transposed convolution": (
        nn.Sequential(nn.ConvTranspose2d(3, 8, 1), nn.BatchNorm2d(8)),
        *("1", "it follows _0, which is no convolution"),
    ),
    "second norm": (nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)), "2", "0 took in 1 already"),
    "convolution with another reader": (TwoReaders(), "norm", "first has other users"),
    "norm called twice": (
        nn.Sequential(conv(3, 8), Twice(nn.BatchNorm2d(8))),
        *("1.layer", "it or its convolution is used more than once"),
    ),
    "convolution called twice": (
        nn.Sequential(Twice(nn.Sequential(conv(3, 3), nn.BatchNorm2d(3)))),
        *("0.layer.1", "it or its convolution is used more than once"),
    ),
    "shared kernel": (SharedParameter(), "norm", "it or its convolution is used more than once"),
    "kernel read directly": (KernelReadDirectly(), "norm", "it or its convolution is used more than once"),
    "no statistics": (
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False)),
        *("1", "no running statistics"),
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves_what_it_cannot_fold_and_says_why(name):
    model, target, reason = NEAR_MISSES[name]
    case = apply(FoldBatchNorm(), model)
    assert Note(target, reason) in case.result.records[-1].skips
    kept = [str(node.target) for node in norms(case.folded)]
    assert target in kept
    assert certify(case.training, case.folded).holds


def test_leaves_a_norm_behind_a_shuffle_that_stays():
    record = compiled_case("norm before the output").record(NAME)
    assert record.skips == (Note("2", "it follows _1_out, which is no convolution"),)
    assert not record.changed


def test_leaves_a_network_without_norms():
    record = compiled_case("nothing to fold").record(NAME)
    assert not record.changed
    assert (record.rewrites, record.skips) == ((), ())


def test_leaves_one_norm_of_a_residual_branch_that_the_shortcut_reads():
    case = apply(FoldBatchNorm(), nn.Sequential(conv(3, 8), Residual(nn.BatchNorm2d(8), nn.ReLU()), conv(8, 4)))
    assert case.result.records[-1].skips == (Note("1.body.0", "0 has other users"),)


def test_may_run_again():
    steps = default_pipeline().passes
    pipeline = Pipeline((*steps, FoldBatchNorm()))
    training = trace(filled(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8))), (2, 3, 5, 5))
    result = pipeline.run(training)
    assert not result.records[-1].changed
    assert certify(training, result.graph).holds


def test_needs_masks_folded():
    with pytest.raises(PassError, match="pass fold_batchnorm needs a graph in stage SHUFFLE"):
        Pipeline((FoldBatchNorm(),)).run(trace(nn.Sequential(conv(3, 8)), (2, 3, 5, 5)))


def test_does_not_fold_into_a_subclass_that_may_compute_something_else():
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    training = trace(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)), (2, 3, 5, 5))
    graph = fork(training)
    graph.add_submodule("0", Doubled(3, 8, 1).eval())
    assert not FoldBatchNorm().run(graph).rewrites


def test_folds_in_the_order_the_convolution_writes():
    case = compiled_case("batch norm")
    convolution = next(n for n in case.made_by(NAME).graph.nodes if n.target == "1")
    assert not convolution.meta["out_order"].is_identity
    assert not shuffles(case.made_by(NAME))


@pytest.mark.parametrize("name", ["bottleneck", "batch norm", "norm called twice"])
def test_touches_nothing_it_is_given(name):
    graph = compiled_case(name).given_to(NAME)
    with untouched(graph):
        FoldBatchNorm().run(graph)


def test_runs_before_shuffles_are_absorbed_too():
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), learned(8, 8, (1, 1, 0)), Call(torch.relu), conv(8, 4))
    case = apply(FoldBatchNorm(), model, before="absorb_shuffles")
    assert [note.node for note in case.result.records[-1].rewrites] == ["1"]
    assert certify(case.training, case.folded).holds
    assert FoldGroups.gives == FoldBatchNorm.requires
