"""Tiny networks with learned groups for the tests of passes, and what must be true of every pass on each of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from foldgroup.certificate import certify
from foldgroup.equivalence import seeded_inputs
from foldgroup.evaluation import evaluate
from foldgroup.forms import ChannelShuffle
from foldgroup.nn import DGConv1d, DGConv2d, DGConv3d
from foldgroup.nn.dgconv import DGConv
from foldgroup.outputs import flat
from foldgroup.pipeline import Pass, PassRecord, Pipeline, PipelineResult, dump
from foldgroup.trace import called_module, trace
from passes import default_pipeline

PASSES = [step.name for step in default_pipeline().passes]
EXACT = 1e-12
"""Greatest float64 difference between a graph and the same after one pass, relative to the largest output."""


# ---- building blocks ---------------------------------------------------------------------------------------------


def learned(
    in_channels: int,
    out_channels: int,
    bits: tuple[int, ...],
    kernel: int = 3,
    cls: type[DGConv] = DGConv2d,
    **settings: object,
) -> DGConv:
    """A learned layer, a DGConv2d unless told otherwise, whose gates have the given bits."""
    settings = {"padding": kernel // 2, **settings}
    layer = cls(in_channels, out_channels, kernel, **settings)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor(bits) * 2.0 - 1)
    return layer


def conv(in_channels: int, out_channels: int, kernel: int = 1, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, **{"padding": kernel // 2, "bias": False, **settings})


def depthwise(channels: int) -> nn.Conv2d:
    return conv(channels, channels, 3, groups=channels)


def relu_() -> nn.ReLU:
    return nn.ReLU(inplace=True)


class Call(nn.Module):
    """Any function as a module that tracing looks into."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """``body(x) + shortcut(x)``."""

    def __init__(self, *body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class SqueezeExcite(nn.Module):
    """``x · gate(mean(x))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, 2, 1)
        self.widen = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.widen(functional.relu(self.narrow(x.mean((2, 3), keepdim=True)))))


class Twice(nn.Module):
    """Calls one layer two times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


class Leaf(nn.Module):
    """An operation that no rule describes: it weighs channels by their position."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)


Leaf.__module__ = "torch.nn.leaf"  # the tracer keeps what torch.nn defines as one node


class TiedWeights(nn.Module):
    """Two layers of different gates that hold one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), conv(8, 4)
        self.first, self.second = learned(8, 8, (1, 1, 0)), learned(8, 8, (1, 0, 1))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.first(x) + self.second(x))


class FanOut(nn.Module):
    """One learned layer whose result three others read, one of them learned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.learned = conv(3, 8), learned(8, 8, (1, 1, 0))
        self.left, self.right, self.norm = conv(8, 4), learned(8, 4, (1, 0)), nn.BatchNorm2d(8)
        self.head = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.learned(self.stem(x))
        return self.left(x) + self.right(x) * self.head(self.norm(x))


class SameKeywords(nn.Module):
    """Layers that are given their operand by keyword, one of them called as an inserted shuffle would be."""

    def __init__(self) -> None:
        super().__init__()
        self.learned, self.learned_in, self.head = learned(8, 8, (1, 1, 0)), conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.learned(input=self.learned_in(input=x))
        return self.head(input=functional.relu(input=x))


class Joined(nn.Module):
    """``x`` and ``body(x)`` side by side, as in a DenseNet."""

    def __init__(self, *body: nn.Module, first: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)] if self.first else [self.body(x), x], dim=1)


class Split(nn.Module):
    """One half of the channels as it is, the other through ``body``, as in a ShuffleNet."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return torch.cat((left, self.body(right)), dim=1)


class ChannelsLast(nn.Module):
    """``body`` on [N, H, W, C]."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scale(nn.Module):
    """A parameter that the network reads itself, as ConvNeXt's layer scale."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def interleave(x: Tensor) -> Tensor:
    """A channel shuffle as ShuffleNet writes it."""
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


class UNet(nn.Module):
    """Down, up again by a transposed convolution, and what was there before beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.bottom = conv(3, 8), learned(8, 8, (1, 1, 0)), learned(8, 12, (1, 0), stride=2)
        self.up, self.merge, self.head = nn.ConvTranspose2d(12, 8, 2, 2), learned(16, 8, (1, 1, 0)), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        high = torch.relu(self.down(self.stem(x)))
        low = torch.relu(self.up(torch.relu(self.bottom(high))))
        return self.head(torch.relu(self.merge(torch.cat([low, high], 1))))


class Pyramid(nn.Module):
    """A feature pyramid: lateral layers, the coarser map interpolated and added; as many outputs as maps."""

    def __init__(self, pack: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.stem, self.first = conv(3, 8), learned(8, 8, (1, 1, 0))
        self.second, self.fine, self.coarse = learned(8, 12, (1, 0), stride=2), conv(8, 8), conv(12, 8)
        self.smooth, self.head = learned(8, 8, (1, 0, 1)), conv(8, 4)
        self.pack = pack

    def forward(self, x: Tensor) -> object:
        fine = torch.relu(self.first(self.stem(x)))
        coarse = self.coarse(torch.relu(self.second(fine)))
        up = functional.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return self.pack(self.head(self.smooth(self.fine(fine) + up)), self.head(coarse))


def convnext(channels: int, width: int) -> Residual:
    """A ConvNeXt block, with a learned layer in the place of the depthwise one."""
    return Residual(
        learned(channels, channels, (1, 1, 0)),
        ChannelsLast(nn.LayerNorm(channels), nn.Linear(channels, width), nn.GELU(), nn.Linear(width, channels)),
        Scale(channels, 1, 1),
    )


# ---- the networks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network for inputs [2, channels, size, …], and how many shuffles it has before and after absorption.

    Of those kept, ``placed`` are where the plan put them; ``coarsened`` are gone because a layer runs fewer groups.
    """

    build: Callable[[], nn.Module]
    inserted: int
    kept: int = 0
    channels: int = 3
    size: int = 5
    dimensions: int = 2
    placed: int = 0
    coarsened: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (2, self.channels, *(self.size,) * self.dimensions)


def bottleneck(channels: int, width: int, bits: tuple[int, ...]) -> Residual:
    return Residual(
        *(conv(channels, width), nn.BatchNorm2d(width), relu_()),
        *(learned(width, width, bits, bias=False), nn.BatchNorm2d(width), relu_()),
        *(conv(width, channels), nn.BatchNorm2d(channels)),
    )


def classifier(channels: int, *features: nn.Module) -> nn.Module:
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def between(*operations: nn.Module, bits: tuple[int, ...] = (1, 1, 0)) -> Callable[[], nn.Module]:
    """A learned layer of 8 channels between two dense ones, and ``operations`` behind it."""
    return lambda: nn.Sequential(conv(3, 8), learned(8, 8, bits), *copy.deepcopy(operations), conv(8, 4))


def single(in_channels: int, out_channels: int, bits: tuple[int, ...], **settings: object) -> Callable[[], nn.Module]:
    """A learned layer between two dense ones."""
    layer = lambda: learned(in_channels, out_channels, bits, **settings)  # noqa: E731
    return lambda: nn.Sequential(conv(3, in_channels), layer(), conv(out_channels, 4))


CASES: dict[str, Case] = {
    "bottleneck": Case(
        lambda: classifier(12, conv(3, 12, 3), nn.BatchNorm2d(12), relu_(), bottleneck(12, 8, (1, 1, 0)), relu_()), 2
    ),
    "bottlenecks": Case(
        lambda: classifier(
            12,
            *(conv(3, 12), nn.BatchNorm2d(12), relu_(), nn.MaxPool2d(3, 2, 1)),
            *(bottleneck(12, 8, (1, 1, 0)), relu_(), bottleneck(12, 12, (1, 0, 1)), relu_()),
        ),
        4,
    ),
    "two in a row": Case(lambda: nn.Sequential(conv(3, 8), learned(8, 8, (1, 1, 0)), learned(8, 8, (1, 0, 1))), 4, 2),
    "two alike in a row": Case(
        lambda: nn.Sequential(conv(3, 8), learned(8, 8, (1, 1, 0)), learned(8, 8, (1, 1, 0)), conv(8, 4)), 4
    ),
    "residual stream": Case(
        lambda: nn.Sequential(conv(3, 8), Residual(nn.ReLU(), learned(8, 8, (1, 1, 0))), conv(8, 4)), 2
    ),
    "residual streams": Case(
        lambda: nn.Sequential(
            conv(3, 8), Residual(learned(8, 8, (1, 1, 0))), Residual(learned(8, 8, (1, 0, 1))), conv(8, 4)
        ),
        *(4, 1),
        placed=1,
    ),
    "on the input": Case(lambda: nn.Sequential(learned(8, 8, (1, 1, 0)), conv(8, 4)), 2, 1, channels=8),
    "before the output": Case(lambda: nn.Sequential(conv(3, 8), learned(8, 8, (1, 1, 0))), 2, 1),
    "alone": Case(lambda: nn.Sequential(learned(8, 8, (1, 1, 0))), 2, 2, channels=8),
    "norm before the output": Case(
        lambda: nn.Sequential(conv(3, 8), learned(8, 8, (1, 1, 0)), nn.BatchNorm2d(8)), 2, 1, placed=1
    ),
    "dense gates": Case(single(8, 8, (1, 1, 1)), 0),
    "depthwise gates": Case(single(8, 8, (0, 0, 0)), 0),
    "groups adjacent": Case(single(8, 8, (0, 1, 1)), 0),
    "batch norm": Case(between(nn.BatchNorm2d(8), relu_()), 2),
    "batch norm alone": Case(between(nn.ReLU(), nn.BatchNorm2d(8)), 2),
    "batch norm without affine": Case(between(nn.BatchNorm2d(8, affine=False)), 2),
    "batch norm without statistics": Case(between(nn.BatchNorm2d(8, track_running_stats=False)), 2),
    "pools": Case(between(nn.MaxPool2d(2), nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(2)), 2),
    "functional": Case(between(Call(lambda x: functional.max_pool2d(functional.relu(x), 2).contiguous())), 2),
    "prelu": Case(between(nn.PReLU(8), nn.PReLU(), nn.Hardswish()), 2),
    "depthwise between": Case(between(depthwise(8), nn.BatchNorm2d(8)), 2),
    "squeeze and excite": Case(between(SqueezeExcite(8)), 2),
    "no-ops": Case(between(nn.Identity(), nn.BatchNorm2d(8), nn.Dropout(0.5, inplace=True), nn.Dropout2d()), 2),
    "arithmetic": Case(between(Call(lambda x: (2 * x - torch.relu(x)) * x + 1)), 2),
    "in place": Case(between(Call(lambda x: torch.relu(x).mul_(2).add_(x)), relu_()), 2),
    "grouped": Case(between(conv(8, 8, 3, groups=4)), 2, 1),
    "depth multiplier": Case(between(conv(8, 16, 3, groups=8), conv(16, 8)), 2),
    "cat": Case(between(Call(lambda x: torch.cat([x, x.neg()], 1)), conv(16, 8)), 2),
    "chunk": Case(between(Call(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1))), 2, 1),
    "leaf": Case(between(Leaf()), 2, 1),
    "softmax": Case(between(nn.Softmax(1)), 2),
    "transpose": Case(between(Call(lambda x: x.transpose(1, 2)), nn.ReLU(), conv(5, 8)), 2, 1),
    "flatten 1×1": Case(
        lambda: nn.Sequential(
            between()(), learned(4, 4, (1, 0)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        4,
    ),
    "flatten 5×5": Case(lambda: nn.Sequential(conv(3, 4), learned(4, 4, (1, 0)), nn.Flatten(), nn.Linear(100, 3)), 2),
    "mean": Case(
        lambda: nn.Sequential(conv(3, 4), learned(4, 4, (1, 0)), Call(lambda x: x.mean([2, 3])), nn.Linear(4, 3)), 2
    ),
    "mean over channels": Case(between(Call(lambda x: x - x.mean(1, keepdim=True))), 2),
    "linear over width": Case(between(nn.Linear(5, 5)), 2, 1),
    "broadcast channel": Case(between(Call(lambda x: x * torch.sigmoid(x[:, :1]))), 2, 1),
    "wider": Case(single(8, 12, (1, 0)), 2),
    "narrower": Case(single(12, 8, (1, 0)), 2),
    "twelve": Case(single(12, 12, (1, 0, 0)), 2),
    "twenty": Case(single(20, 20, (0, 1, 0)), 2),
    "forty-eight": Case(single(48, 48, (1, 0, 1, 1, 0)), 2),
    "one by one": Case(single(8, 8, (1, 1, 0), kernel=1), 2),
    "no bias, strided": Case(single(8, 8, (1, 1, 0), bias=False, stride=2), 2),
    "dilated": Case(single(8, 8, (1, 0, 1), dilation=2, padding=2), 2),
    "circular": Case(single(8, 8, (1, 0, 1), padding_mode="circular"), 2),
    "same padding": Case(single(8, 8, (1, 0, 1), padding="same", padding_mode="reflect"), 2),
    "layer called twice": Case(lambda: nn.Sequential(conv(3, 8), Twice(learned(8, 8, (1, 1, 0))), conv(8, 4)), 4),
    "norm called twice": Case(
        lambda: nn.Sequential(conv(3, 8), learned(8, 8, (1, 1, 0)), Twice(nn.BatchNorm2d(8, affine=False)), conv(8, 4)),
        *(2, 1),
        placed=1,
    ),
    "dense layer called twice": Case(between(Twice(conv(8, 8))), 2, 1),
    "tied weights": Case(TiedWeights, 4, 2),
    "fan-out": Case(FanOut, 4, coarsened=2),
    "keywords": Case(SameKeywords, 2),
    "dense net": Case(
        lambda: nn.Sequential(
            conv(3, 8), Joined(learned(8, 8, (1, 1, 0)), nn.ReLU()), Joined(learned(16, 8, (1, 1, 0))), conv(24, 4)
        ),
        *(4, 1),  # 16 channels in two parts cannot be sorted by their least digit
    ),
    "joined and cut elsewhere": Case(
        lambda: nn.Sequential(conv(3, 8), Joined(learned(8, 8, (1, 1, 0))), Call(lambda x: x[:, 4:12]), conv(8, 4)),
        *(2, 2),
    ),
    "u-net": Case(UNet, 6, 2, size=6),
    "shuffle unit": Case(
        lambda: nn.Sequential(
            conv(3, 16),
            *(Split(learned(8, 8, (1, 1, 0), 1), depthwise(8), learned(8, 8, (1, 1, 0), 1)), Call(interleave)),
            conv(16, 4),
        ),
        5,
    ),
    "shuffle units": Case(
        lambda: nn.Sequential(
            *(conv(3, 16), Split(learned(8, 8, (1, 1, 0), 1), depthwise(8), conv(8, 8)), Call(interleave)),
            *(Split(learned(8, 8, (1, 1, 0), 1), depthwise(8), conv(8, 8)), nn.ChannelShuffle(2), conv(16, 4)),
        ),
        *(6, 1),  # what is joined there is split otherwise
    ),
    "torch's channel shuffle": Case(between(nn.ChannelShuffle(2), nn.ReLU()), 3),
    "channel shuffle of 12": Case(
        lambda: nn.Sequential(conv(3, 12), learned(12, 12, (1, 0, 0)), Call(interleave), learned(12, 12, (0, 1, 0))),
        *(5, 2),
    ),
    "convnext": Case(lambda: nn.Sequential(conv(3, 8), convnext(8, 12), convnext(8, 12), conv(8, 4)), 4),
    "1-D": Case(
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 8, 1), learned(8, 8, (1, 1, 0), cls=DGConv1d), nn.BatchNorm1d(8), nn.ReLU()),
            *(nn.MaxPool1d(2), nn.ConvTranspose1d(8, 8, 3), nn.GroupNorm(1, 8), nn.Conv1d(8, 4, 1)),
        ),
        2,
        dimensions=1,
    ),
    "3-D": Case(
        lambda: nn.Sequential(
            *(nn.Conv3d(3, 8, 1), learned(8, 8, (1, 1, 0), cls=DGConv3d), nn.BatchNorm3d(8), nn.ReLU()),
            *(nn.AvgPool3d(2), nn.Conv3d(8, 8, 1, groups=8), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 4)),
        ),
        2,
        size=4,
        dimensions=3,
    ),
    "group norm of one": Case(between(nn.GroupNorm(1, 8), relu_()), 2),
    "group norm": Case(between(nn.GroupNorm(2, 8), relu_()), 2, 1, placed=1),
    "instance norm": Case(between(nn.InstanceNorm2d(8, affine=True)), 2),
    "transposed": Case(between(nn.ConvTranspose2d(8, 8, 3, 2), nn.BatchNorm2d(8)), 2),
    "tuple": Case(lambda: Pyramid(lambda *maps: maps), 6, 3, placed=1),
    "dict": Case(lambda: Pyramid(lambda fine, coarse: {"fine": fine, "more": [coarse]}), 6, 3, placed=1),
    "constants": Case(between(Scale(8, 1, 1), Scale(1, 8, 1, 1), Scale(5)), 2),
    "nothing learned": Case(lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)), 0),
    "nothing to fold": Case(lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), 0),
}


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` with weights and batch norm statistics that leave no two channels alike; its gates are left alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("gate") or not tensor.is_floating_point():
                continue
            tensor.normal_(generator=generator)
            if "running_var" in name:
                tensor.abs_().add_(0.3)
    return model.eval()


# ---- what must be true -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A network's graph before, between and after the passes: ``graphs[i]`` is what pass i was given."""

    shape: tuple[int, ...]
    graphs: list[fx.GraphModule]
    result: PipelineResult

    @property
    def training(self) -> fx.GraphModule:
        return self.graphs[0]

    @property
    def folded(self) -> fx.GraphModule:
        return self.graphs[-1]

    def given_to(self, name: str) -> fx.GraphModule:
        return self.graphs[PASSES.index(name)]

    def made_by(self, name: str) -> fx.GraphModule:
        return self.graphs[PASSES.index(name) + 1]

    def record(self, name: str) -> PassRecord:
        return self.result.records[PASSES.index(name)]


def compiled(model: nn.Module, shape: tuple[int, ...], pipeline: Pipeline | None = None) -> Compiled:
    """Run the default pipeline on ``model`` and keep every graph."""
    graphs = [trace(model, shape)]
    result = (pipeline or default_pipeline()).run(graphs[0], on_pass=lambda _, graph: graphs.append(graph))
    return Compiled(shape, graphs, result)


@cache
def compiled_case(name: str) -> Compiled:
    """One of :data:`CASES`, compiled; shared by all tests, which is safe because passes are functional."""
    torch.manual_seed(0)
    case = CASES[name]
    return compiled(filled(case.build()), case.shape)


def apply(step: Pass, model: nn.Module, shape: tuple[int, ...] = (2, 3, 5, 5), before: str | None = None) -> Compiled:
    """Trace ``model``, run the default passes that come before ``step`` (or before the one named), then ``step``."""
    steps = default_pipeline().passes[: PASSES.index(before or step.name)]
    return compiled(filled(model), shape, Pipeline((*steps, step)))


def shuffles(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if isinstance(called_module(graph, node), ChannelShuffle)]


def node_of(graph: fx.GraphModule, target: str) -> fx.Node:
    """The one node that calls ``target``."""
    (node,) = (n for n in graph.graph.nodes if n.target == target)
    return node


def relative_error(value: Tensor, reference: Tensor) -> float:
    assert value.shape == reference.shape
    return float((value - reference).abs().max() / reference.abs().max())


def assert_same_function(before: fx.GraphModule, after: fx.GraphModule, shape: tuple[int, ...]) -> None:
    inputs = seeded_inputs(shape)
    ours, theirs = (flat(evaluate(graph, inputs)["output"]) for graph in (after, before))
    assert all(relative_error(one, other) <= EXACT for one, other in zip(ours, theirs, strict=True))


def assert_lawful(case: Compiled, name: str) -> None:
    """What every pass owes: the same outputs as the graph it was given, and a certificate against the training form."""
    assert_same_function(case.given_to(name), case.made_by(name), case.shape)
    certificate = certify(case.training, case.made_by(name))
    assert certificate.holds, certificate.failure


@contextmanager
def untouched(graph: fx.GraphModule) -> Iterator[None]:
    """Fails if the graph or the bytes of one of its tensors are not the same afterwards."""
    text, tensors = dump(graph), {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    yield
    assert dump(graph) == text
    left = graph.state_dict()
    assert left.keys() == tensors.keys()
    assert all(torch.equal(left[name], tensor) for name, tensor in tensors.items())


# ---- random networks ---------------------------------------------------------------------------------------------


@dataclass
class _Builder:
    """Draws operations that fit; ``fresh`` while nothing else reads the last value, so that it may be overwritten."""

    draw: st.DrawFn
    learned: list[DGConv2d] = field(default_factory=list)

    def chain(self, channels: int, length: int, *, fresh: bool, depth: int = 0) -> tuple[list[nn.Module], int]:
        layers: list[nn.Module] = []
        for _ in range(length):
            kind = self.draw(st.sampled_from(_KINDS if depth == 0 else _KINDS[: -len(_NESTED)]))
            layer, channels = self.layer(kind, channels, fresh, depth)
            fresh = kind in _MAKE_NEW
            layers.append(layer)
        return layers, channels

    def layer(self, kind: str, channels: int, fresh: bool, depth: int) -> tuple[nn.Module, int]:
        if kind == "learned":
            return self.with_gates(channels)
        if (
            kind in ("dense", "transposed")
            or (kind == "join" and channels > 20)
            or (kind == "split" and (channels % 4 or channels < 8))
        ):
            out = self.draw(st.sampled_from([8, 12, 20]))
            bias = self.draw(st.booleans())
            if kind == "transposed":
                return nn.ConvTranspose2d(channels, out, 3, padding=1, bias=bias), out
            return conv(channels, out, bias=bias), out
        if kind == "slice":
            start = 2 * self.draw(st.integers(0, channels // 2 - 2))
            stop = start + 2 * self.draw(st.integers(2, (channels - start) // 2))
            return self.draw(st.sampled_from([_sliced, _narrowed]))(start, stop), stop - start
        if kind in ("residual", "join", "split"):
            width = channels // 2 if kind == "split" else channels
            body, out = self.chain(width, self.draw(st.integers(1, 4)), fresh=False, depth=depth + 1)
            if kind == "join":
                return Joined(*body, first=self.draw(st.booleans())), channels + out
            if kind == "split":
                return Split(*body), width + out
            return Residual(*body, shortcut=None if out == channels else conv(channels, out)), out
        return self.same(kind, channels, fresh), channels

    def with_gates(self, channels: int) -> tuple[nn.Module, int]:
        again = [layer for layer in self.learned if layer.in_channels == layer.out_channels == channels]
        if again and self.draw(st.integers(0, 4)) == 0:
            return again[0], channels
        out = self.draw(st.sampled_from([channels, channels, 8, 12, 20]))
        gates = len(DGConv2d(channels, out, 1).gate)
        bits = self.draw(st.lists(st.integers(0, 1), min_size=gates, max_size=gates))
        if self.draw(st.booleans()):
            bits.sort(reverse=True)  # ones first: most often an order that is not the identity
        settings = {"bias": self.draw(st.booleans()), "padding_mode": self.draw(st.sampled_from(_PADDING))}
        self.learned.append(learned(channels, out, tuple(bits), self.draw(st.sampled_from([1, 3])), **settings))
        return self.learned[-1], out

    def same(self, kind: str, channels: int, fresh: bool) -> nn.Module:
        if kind == "activation":
            return self.draw(
                st.sampled_from([nn.ReLU(fresh), nn.PReLU(channels), nn.SiLU(), nn.ReLU6(), nn.ReLU(fresh)])
            )
        if kind == "pool":
            return self.draw(st.sampled_from([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)]))
        if kind == "shuffle":
            return self.draw(st.sampled_from([nn.ChannelShuffle(2), Call(interleave), Call(_by_function)]))
        if kind == "norm":
            groups = self.draw(st.sampled_from([1, 2]))
            norms = [nn.BatchNorm2d(channels), nn.GroupNorm(groups, channels), nn.InstanceNorm2d(channels, affine=True)]
            return self.draw(st.sampled_from([norms[0], *norms]))
        if kind == "channels last":
            return ChannelsLast(
                *self.draw(st.sampled_from([[nn.LayerNorm(channels)], [nn.Linear(channels, channels)]]))
            )
        return {
            "depthwise": lambda: depthwise(channels),
            "grouped": lambda: conv(channels, channels, groups=2),
            "depthwise transposed": lambda: nn.ConvTranspose2d(channels, channels, 3, padding=1, groups=channels),
            "grouped transposed": lambda: nn.ConvTranspose2d(channels, channels, 1, groups=2),
            "excite": lambda: SqueezeExcite(channels),
            "no-op": lambda: nn.Dropout(),
            "flip": lambda: Call(lambda x: x.flip(1)),
            "square": lambda: Call(lambda x: x * torch.tanh(x) - x),
            "softmax": lambda: nn.Softmax(1),
            "centre": lambda: Call(lambda x: x - x.mean(1, keepdim=True)),
            "scale": lambda: Scale(channels, 1, 1),
            "halves": lambda: Call(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
            "roll": lambda: Call(lambda x: torch.cat([x[:, 2:], x[:, :2]], 1)),
        }[kind]()


def _sliced(start: int, stop: int) -> nn.Module:
    return Call(lambda x: x[:, start:stop])


def _narrowed(start: int, stop: int) -> nn.Module:
    return Call(lambda x: x.narrow(1, start, stop - start))


def _by_function(x: Tensor) -> Tensor:
    return functional.channel_shuffle(x, 2)


_MAKE_NEW = {
    *("learned", "dense", "norm", "activation", "pool", "depthwise", "grouped", "square", "transposed", "residual"),
}
_NESTED = ("residual", "residual", "join", "split")
_KINDS = [
    *("learned", "learned", "learned", "learned", "dense", "dense", "norm", "norm", "activation", "pool", "depthwise"),
    *("grouped", "excite", "no-op", "flip", "square", "transposed", "depthwise transposed", "grouped transposed"),
    *("slice", "shuffle", "shuffle", "channels last", "softmax", "centre", "scale", "halves", "roll"),
    *_NESTED,
]
_PADDING = ["zeros", "zeros", "circular", "reflect"]


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Any chain of operations, with branches that are added or joined, and an input shape for it."""
    channels = draw(st.sampled_from([4, 8, 12]))
    layers, out = _Builder(draw).chain(channels, draw(st.integers(1, 8)), fresh=True)
    head = draw(st.sampled_from(["none", "pool", "flatten", "mean"]))
    if head == "pool":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 3)]
    elif head == "flatten":
        layers += [nn.Flatten(), nn.Linear(out * 16, 3)]
    elif head == "mean":
        layers += [Call(lambda x: x.mean((2, 3))), nn.Linear(out, 3)]
    return filled(nn.Sequential(*layers), draw(st.integers(0, 99))), (2, channels, 4, 4)


@st.composite
def bottleneck_networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """What a G-ResNeXt is made of: a stem, bottlenecks with any gate bits, a classifier."""
    layers: list[nn.Module] = [conv(3, 12, 3), nn.BatchNorm2d(12), relu_()]
    for width in draw(st.lists(st.sampled_from([4, 8, 12, 20, 30]), min_size=1, max_size=3)):
        gates = len(DGConv2d(width, width, 1).gate)
        bits = draw(st.lists(st.integers(0, 1), min_size=gates, max_size=gates))
        layers += [bottleneck(12, width, tuple(bits)), relu_()]
    return filled(classifier(12, *layers), draw(st.integers(0, 99))), (2, 3, 4, 4)


def conv_weights(graph: fx.GraphModule) -> int:
    """How many weights all convolutions have: what folding makes fewer of."""
    modules = (called_module(graph, node) for node in graph.graph.nodes)
    return sum(math.prod(m.weight.shape) for m in modules if isinstance(m, nn.Conv2d))
