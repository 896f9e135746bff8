"""What people train: the DGConv layers, networks made of them, and the complexity that training keeps in budget."""

from foldgroup.nn.complexity import budget, complexity, complexity_penalty
from foldgroup.nn.dgconv import DGConv, DGConv1d, DGConv2d, DGConv3d
from foldgroup.nn.groupable import groupable
from foldgroup.nn.resnext import (
    BottleneckConfig,
    GroupableResNet,
    StageConfig,
    g_resnext17_cifar,
    g_resnext29_cifar,
    g_resnext50,
    g_resnext101,
    g_resnext101_32x8d,
)

__all__ = [
    "BottleneckConfig",
    "DGConv",
    "DGConv1d",
    "DGConv2d",
    "DGConv3d",
    "GroupableResNet",
    "StageConfig",
    "budget",
    "complexity",
    "complexity_penalty",
    "g_resnext17_cifar",
    "g_resnext29_cifar",
    "g_resnext50",
    "g_resnext101",
    "g_resnext101_32x8d",
    "groupable",
]
