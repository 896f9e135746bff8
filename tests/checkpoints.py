"""Small networks' tensors in our own and in the public layout, which the tests of checkpoints share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import nn

from foldgroup.nn import BottleneckConfig, DGConv2d, GroupableResNet, StageConfig

SMALL = BottleneckConfig("cifar", (StageConfig(1, 8, 16), StageConfig(2, 16, 32)), stem_channels=8, num_classes=5)
LAYER = "layer1.0.conv2"
EYE, ONES = torch.eye(2), torch.ones(2, 2)


def network(config: BottleneckConfig = SMALL, seed: int = 0) -> GroupableResNet:
    """A network whose every tensor is random, as after training."""
    torch.manual_seed(seed)
    model = GroupableResNet(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
            if isinstance(module, DGConv2d):
                module.gate.normal_()
    return model


@cache
def _state(config: BottleneckConfig, seed: int) -> dict[str, torch.Tensor]:
    return network(config, seed).state_dict()


def own_state(config: BottleneckConfig = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in _state(config, seed).items()}


def public_state(state: dict[str, torch.Tensor], d=EYE, i=ONES) -> dict[str, torch.Tensor]:
    """The same tensors under the keys of d-li14/dgconv.pytorch, gates untouched."""
    layers = {key.removesuffix(".gate") for key in state if key.endswith(".gate")}
    result = {}
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        result[f"{layer}.conv.weight" if layer in layers else key] = tensor.clone()
    for layer in layers:
        result |= {f"{layer}.D": d.clone(), f"{layer}.I": i.clone()}
    return result


def save(path: Path, document) -> Path:
    torch.save(document, path)
    return path
