"""Groupable ResNeXt: torchvision's ResNet with every 3×3 of a bottleneck replaced by DGConv (Table 1 of the paper).

Importing this module registers the builders, so ``torchvision.models.get_model("g_resnext50")`` works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from torch import nn
from torchvision.models._api import register_model
from torchvision.models.resnet import Bottleneck, ResNet

from foldgroup.errors import ModelError
from foldgroup.nn.dgconv import DGConv2d


@dataclass(frozen=True)
class StageConfig:
    """One stage: how many blocks, how wide their 3×3 is, and how many channels leave them."""

    blocks: int
    width: int
    out_channels: int


@dataclass(frozen=True)
class BottleneckConfig:
    """A network of the bottleneck family, enough to build it.

    ``stem`` "imagenet" is a 7×7 of stride 2 and a max pool, "cifar" a 3×3 of stride 1. The first stage keeps the
    resolution, each later one halves it. There are one to four stages.
    """

    stem: Literal["imagenet", "cifar"]
    stages: tuple[StageConfig, ...]
    stem_channels: int = 64
    in_channels: int = 3
    num_classes: int = 1000


class GroupableResNet(ResNet):  # type: ignore[misc]  # torchvision is untyped
    """A bottleneck ResNet whose 3×3 convolutions learn their groups; maps [N, in_channels, H, W] to logits [N,
    classes].

    Raises:
        ModelError: if there are not one to four stages, or a stage's output channels are not a multiple of four
            (torchvision's expansion).
    """

    def __init__(self, config: BottleneckConfig) -> None:
        if not 1 <= len(config.stages) <= 4:
            raise ModelError(f"{len(config.stages)} stages: a network of this family has one to four")
        nn.Module.__init__(self)  # ResNet.__init__ knows only its own four stages
        self.config = config
        self._norm_layer = nn.BatchNorm2d
        self.inplanes = config.stem_channels
        self.dilation = 1
        self.groups = 1
        kernel, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(config.in_channels, self.inplanes, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if config.stem == "imagenet" else nn.Identity()
        for i in range(4):
            stage = self._stage(config.stages[i], 1 if i == 0 else 2) if i < len(config.stages) else nn.Sequential()
            self.add_module(f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, config: StageConfig, stride: int) -> nn.Module:
        if config.out_channels % Bottleneck.expansion:
            raise ModelError(f"a stage's {config.out_channels} output channels are not a multiple of four")
        planes = config.out_channels // Bottleneck.expansion
        # torchvision rounds planes·base_width/64 down to the width: aim at the middle of what rounds to ours.
        self.base_width = 64 * (config.width + 0.5) / planes
        stage: nn.Module = self._make_layer(Bottleneck, planes, config.blocks, stride)
        for block in stage.children():
            block.conv2 = DGConv2d.from_conv(block.conv2)  # type: ignore[arg-type]  # a Conv2d, by Bottleneck
        return stage


def _build(name: str, weights: None, progress: bool, **kwargs: Any) -> GroupableResNet:
    if weights is not None:
        raise ModelError("there are no pre-trained weights: train with 'foldgroup train' and load the checkpoint")
    return GroupableResNet(replace(CONFIGS[name], **kwargs))


def _resnext(depths: tuple[int, ...], first_width: int, stem: Literal["imagenet", "cifar"]) -> BottleneckConfig:
    """Stages that double in width and in the 256, 512, … output channels of ResNeXt."""
    return BottleneckConfig(
        stem, tuple(StageConfig(depth, first_width << i, 256 << i) for i, depth in enumerate(depths))
    )


Builder = TypeVar("Builder", bound=Callable[..., GroupableResNet])

CONFIGS: dict[str, BottleneckConfig] = {}
"""What each registered builder builds unless it is told otherwise."""


def _builds(config: BottleneckConfig) -> Callable[[Builder], Builder]:
    """Make a builder of ``config`` known to ``torchvision.models.get_model`` under its own name."""

    def register(builder: Builder) -> Builder:
        CONFIGS[builder.__name__] = config
        register_model()(builder)
        return builder

    return register


@_builds(_resnext((3, 4, 6, 3), 128, "imagenet"))
def g_resnext50(*, weights: None = None, progress: bool = True, **kwargs: Any) -> GroupableResNet:
    """G-ResNeXt-50 with the widths of 32×4d (Table 1); ``kwargs`` override fields of :class:`BottleneckConfig`."""
    return _build("g_resnext50", weights, progress, **kwargs)


@_builds(_resnext((3, 4, 23, 3), 128, "imagenet"))
def g_resnext101(*, weights: None = None, progress: bool = True, **kwargs: Any) -> GroupableResNet:
    """G-ResNeXt-101 with the widths of 32×4d; ``kwargs`` override fields of :class:`BottleneckConfig`."""
    return _build("g_resnext101", weights, progress, **kwargs)


@_builds(_resnext((3, 4, 23, 3), 256, "imagenet"))
def g_resnext101_32x8d(*, weights: None = None, progress: bool = True, **kwargs: Any) -> GroupableResNet:
    """G-ResNeXt-101 with the widths of 32×8d; ``kwargs`` override fields of :class:`BottleneckConfig`."""
    return _build("g_resnext101_32x8d", weights, progress, **kwargs)


@_builds(replace(_resnext((3, 3, 3), 128, "cifar"), num_classes=10))
def g_resnext29_cifar(*, weights: None = None, progress: bool = True, **kwargs: Any) -> GroupableResNet:
    """G-ResNeXt-29 for 32×32 images with the widths of 32×4d and ten classes."""
    return _build("g_resnext29_cifar", weights, progress, **kwargs)


_SMALL = (StageConfig(1, 32, 64), StageConfig(2, 64, 128), StageConfig(2, 128, 256))


@_builds(BottleneckConfig("cifar", _SMALL, stem_channels=32, num_classes=10))
def g_resnext17_cifar(*, weights: None = None, progress: bool = True, **kwargs: Any) -> GroupableResNet:
    """A small network for 32×32 images: five blocks of width 32 to 128, ten classes, 0.6 million weights."""
    return _build("g_resnext17_cifar", weights, progress, **kwargs)
