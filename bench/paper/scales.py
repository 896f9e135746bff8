"""How large the studies are: the network that stands in for ResNeXt-50, and how long it is trained.

Every scale keeps what Table 1 says: bottlenecks in stages that double their width, and in the first stage four channels
in each group of ResNeXt's. Budgets keep the paper's ratios: b = 32 leaves as many ones as ResNeXt's 32 groups do, so
with a cardinality of 8 the paper's b ∈ {32, 48, 64, 96, 128} are {8, 12, 16, 24, 32}.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torchvision.models._api import register_model

from foldgroup.nn.resnext import BottleneckConfig, GroupableResNet, StageConfig
from foldgroup.training.config import TrainConfig

PAPER_CARDINALITY = 32


@dataclass(frozen=True)
class Scale:
    """A size for all networks and runs of the studies."""

    name: str
    stem: Literal["imagenet", "cifar"]
    stem_channels: int
    blocks: tuple[int, ...]
    width: int
    """Of the first stage's 3×3 in ResNeXt; the output is twice as wide, and stages double."""
    cardinality: int
    """Groups of ResNeXt."""
    seeds: int
    settings: dict[str, Any]
    """For :class:`TrainConfig`."""

    def b(self, paper: float) -> float:
        """The budget that is to this scale's cardinality what ``paper`` is to 32."""
        return paper * self.cardinality / PAPER_CARDINALITY

    def arch(self, *, width: float = 1.0, depth: int = 1) -> str:
        """The registered name of the network with 3×3 so many times as wide, and stages as deep."""
        blocks = tuple(depth * count for count in self.blocks)
        wide = round(width * self.width)
        stages = tuple(StageConfig(n, wide << i, 2 * self.width << i) for i, n in enumerate(blocks))
        name = f"{self.stem}_{self.stem_channels}_{'-'.join(map(str, blocks))}x{wide}_of_{2 * self.width}"
        if name not in _REGISTERED:
            register_model(name)(partial(_built, BottleneckConfig(self.stem, stages, self.stem_channels)))
            _REGISTERED.add(name)
        return name

    def config(self, arch: str, seed: int) -> TrainConfig:
        """The run of one network, before its groups or its budget are said."""
        return TrainConfig(arch, seed=seed, **self.settings)


_REGISTERED: set[str] = set()


def _built(config: BottleneckConfig, num_classes: int = 10) -> GroupableResNet:
    return GroupableResNet(replace(config, num_classes=num_classes))


_COMMON: dict[str, Any] = {"momentum": 0.9, "holdout": 0.1, "input_size": 32, "classes": 10, "check_images": "none"}

SCALES = {
    "two-cores": Scale(
        name="two-cores",
        stem="imagenet",
        stem_channels=32,
        blocks=(1, 2, 2),
        width=32,
        cardinality=8,
        seeds=3,
        settings={
            **_COMMON,
            "epochs": 4,
            "batch_size": 128,
            "learning_rate": 0.1,
            "weight_decay": 1e-4,
            "freeze_gates": 0.5,
            "workers": 1,
            "device": "cpu",
            "log_every": 10,
        },
    ),
    "gpu": Scale(
        name="gpu",
        stem="cifar",
        stem_channels=64,
        blocks=(3, 3, 3),
        width=128,
        cardinality=32,
        seeds=3,
        settings={
            **_COMMON,
            "epochs": 60,
            "batch_size": 128,
            "learning_rate": 0.1,
            "weight_decay": 5e-4,
            "workers": 2,
            "device": "cuda",
            "precision": "bf16",
            "log_every": 50,
        },
    ),
    "smallest": Scale(
        name="smallest",
        stem="imagenet",
        stem_channels=8,
        blocks=(1, 1),
        width=8,
        cardinality=2,
        seeds=2,
        settings={**_COMMON, "epochs": 1, "batch_size": 8, "classes": None, "workers": 0, "log_every": 1},
    ),
}
"""``smallest`` is for the tests."""
