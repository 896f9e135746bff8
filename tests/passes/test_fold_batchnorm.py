"""fold_batchnorm: convolution or linear layer and batch norm → one layer."""

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
    assert_same_function,
    compiled_case,
    conv,
    depthwise,
    filled,
    learned,
    node_of,
    shuffles,
    untouched,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from foldgroup.certificate import certify
from foldgroup.errors import PassError
from foldgroup.forms import TRANSPOSED_CONVS, settings
from foldgroup.pipeline import Note, Pipeline
from foldgroup.trace import called_module, fork, trace
from passes import FoldBatchNorm, FoldGroups, default_pipeline

NAME = "fold_batchnorm"


@pytest.mark.parametrize("name", CASES)
def test_keeps_the_function(name):
    assert_lawful(compiled_case(name), NAME)


def norms(graph):
    return [node for node in graph.graph.nodes if isinstance(called_module(graph, node), _BatchNorm)]


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


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FOLDED = {
    "1-D": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), 3),
    "1-D, grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), 3),
    "3-D": (lambda: nn.Conv3d(4, 6, (1, 3, 2), dilation=(1, 2, 1)), 5),
    "3-D, depthwise": (lambda: nn.Conv3d(4, 4, 3, padding="same", groups=4), 5),
    "transposed, 1-D": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), 3),
    "transposed, 2-D": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dilation=2), 4),
    "transposed, 2-D, square": (lambda: nn.ConvTranspose2d(4, 4, (1, 2), bias=False), 4),
    "transposed, 3-D": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), 5),
    "linear": (lambda: nn.Linear(4, 6), 2),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), 2),
}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", FOLDED)
def test_folds_in_any_number_of_dimensions_into_transposed_and_linear_layers_too(name, affine):
    build, rank = FOLDED[name]
    layer = build()
    out = layer.out_features if rank == 2 else layer.out_channels
    norm = NORMS[max(rank - 3, 0)](out, eps=1e-3, affine=affine)
    case = apply(FoldBatchNorm(), nn.Sequential(layer, norm), (2, 4, *[5] * (rank - 2)))
    assert case.result.records[-1].rewrites == (Note("1", "folded into 0"),)
    assert not norms(case.folded)
    assert_same_function(case.training, case.folded, case.shape)

    folded, node = case.folded.get_submodule("0"), node_of(case.folded, "0")
    assert (node.meta["origin"], node.meta["took_in"]) == (node_of(case.training, "1").name, "1")
    assert type(folded) is type(layer) and settings(folded) == settings(layer)
    scale = (norm.weight.double() if affine else 1) / (norm.running_var.double() + 1e-3).sqrt()
    axis = 1 if isinstance(layer, TRANSPOSED_CONVS) else 0
    expected = (layer.weight.double().movedim(axis, -1) * scale).movedim(-1, axis)
    torch.testing.assert_close(folded.weight, expected, rtol=1e-14, atol=0, check_dtype=True)


NO_OPS = {
    "identity": (nn.Identity(),),
    "dropout": (nn.Dropout(0.5),),
    "several": (nn.Dropout2d(), nn.Identity(), nn.Dropout(inplace=True)),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_folds_through_what_does_nothing(name):
    case = apply(FoldBatchNorm(), nn.Sequential(conv(3, 8), *NO_OPS[name], nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)))
    norm = 1 + len(NO_OPS[name])
    assert case.result.records[-1].rewrites == (Note(str(norm), "folded into 0"),)
    assert [n for n, _ in case.folded.named_children()] == ["0", str(norm + 1), str(norm + 2)]  # nothing between
    assert_same_function(case.training, case.folded, case.shape)
    certificate = certify(case.training, case.folded)
    assert certificate.holds, certificate.failure


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
        return self.norm(self.first(x)) * (self.first.weight * x.mean()).sum()


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = conv(3, 8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.norm(x) + x


class NoOpWithTwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.no_op, self.norm = conv(3, 8), nn.Identity(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.no_op(self.first(x))
        return self.norm(x) + x


class ReadBeforeTheNoOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.no_op, self.norm = conv(3, 8), nn.Identity(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.norm(self.no_op(x)) + x


class OwnNorm(nn.BatchNorm2d):
    pass


OwnNorm.__module__ = "torch.nn.own"  # the tracer keeps what torch.nn defines as one node


NEAR_MISSES = {
    "on the input": (nn.Sequential(nn.BatchNorm2d(3)), "0", "it follows input_1, which is no convolution"),
    "behind a ReLU": (
        nn.Sequential(conv(3, 8), nn.ReLU(), nn.BatchNorm2d(8)),
        *("2", "it follows _1, which is no convolution"),
    ),
    "behind a no-op on the input": (
        nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)),
        *("1", "it follows input_1, which is no convolution"),
    ),
    "behind an unknown operation": (
        nn.Sequential(Leaf(), nn.BatchNorm2d(3)),
        *("1", "it follows _0, which is no convolution"),
    ),
    "behind a transposed convolution with groups": (
        nn.Sequential(nn.ConvTranspose2d(3, 6, 1, groups=3), nn.BatchNorm2d(6)),
        *("1", "0 is transposed and has 3 groups"),
    ),
    "behind a transposed depthwise convolution": (
        nn.Sequential(nn.ConvTranspose2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)),
        *("1", "0 is transposed and has 3 groups"),
    ),
    "behind a linear layer over a sequence": (
        nn.Sequential(nn.Flatten(2), nn.Linear(25, 3), nn.BatchNorm1d(3)),
        *("2", "its channels are not those that 1 makes"),
    ),
    "behind a convolution of a single example": (
        nn.Sequential(nn.Flatten(0, 1), nn.Flatten(1), nn.Conv1d(6, 25, 1), nn.BatchNorm1d(25)),
        *("3", "its channels are not those that 2 makes"),
    ),
    "no-op with another reader": (NoOpWithTwoReaders(), "norm", "no_op has other users"),
    "another reader before the no-op": (ReadBeforeTheNoOp(), "norm", "first has other users"),
    "second norm behind a no-op": (
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Identity(), nn.BatchNorm2d(8)),
        *("3", "0 took in 1 already"),
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


def test_torch_cannot_fold_into_a_transposed_convolution_with_groups():
    """Why rule 6: torch scales the columns of the kernel [C_in, C_out/G, …], which are not the output channels."""
    layer, norm = (filled(m) for m in (nn.ConvTranspose2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)))
    assert fuse_conv_bn_eval(layer, norm, transpose=True).weight.shape != layer.weight.shape


def test_leaves_a_norm_of_another_class():
    case = apply(FoldBatchNorm(), nn.Sequential(conv(3, 8), OwnNorm(8)))
    assert not case.result.records[-1].changed


def test_leaves_a_norm_behind_a_shuffle_that_stays():
    record = compiled_case("norm called twice").record(NAME)
    assert record.skips[0] == Note("2.layer", "it follows _1_out_order, which is no convolution")
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


@pytest.mark.parametrize("after", [(), (conv(8, 4),)], ids=["nothing in float32", "a layer in float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_folded_layers_meet_constants_in_the_networks_own_type(dtype, after):
    """Folded, they are in float64 until they are written."""
    mixed = Call(lambda x: torch.einsum("oc,nchw->nohw", torch.eye(8, dtype=dtype)[list(range(7, -1, -1))], x))
    model = filled(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), mixed, *after)).to(dtype)
    case = apply(FoldBatchNorm(), model)
    assert norms(case.folded) == []
    assert certify(case.training, case.folded).holds
