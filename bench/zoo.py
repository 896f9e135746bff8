"""Networks of every kind with learned groups in them: torchvision's, a U-Net, a feature pyramid, 1-D and 3-D ones.

``spatial`` turns the convolutions with a kernel larger than 1 into DGConv, as the paper does, ``every`` all that read
16 channels or more. Weights, gates and batch norms are random.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from foldgroup.errors import ModelError
from foldgroup.nn import groupable

IMAGE = (1, 3, 224, 224)


class UNet(nn.Module):
    """An encoder and a decoder of five levels with skip connections and transposed convolutions, 21 classes."""

    def __init__(self, width: int = 32, levels: int = 5) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.join = nn.ModuleList(_double(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, 21, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 21, H, W] of images [N, 3, H, W]."""
        skips: list[Tensor] = []
        for level in self.down:
            if skips:
                x = nn.functional.max_pool2d(x, 2)
            x = level(x)
            skips.append(x)
        skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """Two convolutions of one size in a residual stream, in one, two or three dimensions."""

    def __init__(self, dimensions: int, channels: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.body = nn.Sequential(
            *(conv(channels, channels, 3, padding=1, bias=False), norm(channels), nn.ReLU()),
            *(conv(channels, channels, 3, padding=1, bias=False), norm(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, …] to the same."""
        return torch.relu(x + self.body(x))


def residual(dimensions: int) -> nn.Module:
    """Eight blocks between a stem for one channel and a classifier, for signals (1) or volumes (3)."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1]
    stages: list[nn.Module] = []
    for a, b in ((1, 32), (32, 64), (64, 128), (128, 256)):
        stages += [conv(a, b, 3, stride=2, padding=1), nn.ReLU(), Block(dimensions, b), Block(dimensions, b)]
    return nn.Sequential(*stages, pool(1), nn.Flatten(), nn.Linear(256, 10))


def _of_torchvision(name: str) -> Callable[[], nn.Module]:
    options = {"init_weights": False} if name == "googlenet" else {}
    return lambda: get_model(name, weights=None, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        name: (_of_torchvision(name), IMAGE)
        for name in (
            *("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn", "densenet121"),
            *("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf"),
            *("shufflenet_v2_x1_0", "squeezenet1_0", "googlenet", "convnext_tiny"),
        )
    },
    "unet": (UNet, IMAGE),
    "resnet18_fpn": (lambda: resnet_fpn_backbone(backbone_name="resnet18", weights=None), IMAGE),
    "residual_1d": (lambda: residual(1), (1, 1, 4096)),
    "residual_3d": (lambda: residual(3), (1, 1, 32, 32, 32)),
}
"""Builders and input shapes."""

WHERE: dict[str, Callable[[str, nn.Module], bool] | None] = {
    "spatial": None,
    "every": lambda _, conv: int(conv.in_channels) >= 16,  # type: ignore[arg-type]
}


def build(name: str, where: str, seed: int = 0) -> nn.Module | None:
    """The network with random gates, ready to compile; None if it has no such convolutions."""
    torch.manual_seed(seed)
    model = NETWORKS[name][0]()
    try:
        groupable(model, where=WHERE[where])
    except ModelError:
        return None
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None and module.running_var is not None
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()
