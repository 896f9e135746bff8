"""A small network that many tests share; ``conftest.py`` makes a checkpoint and a bundle of it."""

from __future__ import annotations

import torch
from torch import nn

from foldgroup.nn import BottleneckConfig, DGConv2d, GroupableResNet, StageConfig

SIZE = 16
CLASSES = ("ant", "bee", "cat", "dog", "elk")
BITS = {
    "layer1.0.conv2": (1, 0, 1),  # the zero is not the first digit: two groups, shuffled
    "layer2.0.conv2": (0, 0, 1, 1),  # the zeros come first: four groups, contiguous as they are
    "layer2.1.conv2": (1, 0, 1, 0),  # four groups, shuffled
}
"""Gate bits of every learned layer, by name."""


def tiny_network(seed: int = 0) -> GroupableResNet:
    """Three blocks, widths 8 and 16, five classes: random weights and batch norms, gates of :data:`BITS`."""
    stages = (StageConfig(1, 8, 16), StageConfig(2, 16, 32))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GroupableResNet(BottleneckConfig("cifar", stages, stem_channels=8, num_classes=len(CLASSES)))
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, DGConv2d):
                    sign = torch.tensor(BITS[name]) * 2.0 - 1
                    module.gate.copy_(sign * torch.empty_like(module.gate).uniform_(0.01, 1))
                elif isinstance(module, nn.BatchNorm2d):
                    for tensor in (module.weight, module.running_var):
                        tensor.uniform_(0.5, 1.5)
                    for tensor in (module.bias, module.running_mean):
                        tensor.normal_(0, 0.2)
    return model.eval()
