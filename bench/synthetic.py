"""A full-size checkpoint to measure with: random weights, random gates, batch norms that do something.

Speed and memory do not depend on what a network has learned but for its group counts. Two kinds of gates, both made up:

* fair coins, as in a network before training: groups of every count, shuffles almost everywhere, and three times the
  multiply-adds of 32 uniform groups in the grouped layers: the hard case for the compiler;
* at a budget: as many ones in all masks as b uniform groups would leave, o = Σ C²/b, with fewer groups in low layers,
  as the paper finds ("lower layers prefer fewer groups", section 5; its counts are in a drawing only). The paper's
  networks end below their budget: at b = 32 their grouped layers have 0.83 times the FLOPs of 32 uniform groups (Table
  3). These meet it exactly, and as low layers have larger images, they have more multiply-adds than 32 uniform groups.

    python -m bench.synthetic g_resnext50 checkpoint.pt --budget 32

A network is a registered builder's name, or "3-4-23-3x128": the blocks of each stage and the width of the first, which
doubles from stage to stage, with twice as many channels between blocks, for images of 32×32.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torchvision.models import get_model

import foldgroup.nn  # registers the G-ResNeXt builders
from foldgroup.checkpoint import Preprocessing, save_checkpoint
from foldgroup.nn.resnext import BottleneckConfig, GroupableResNet, StageConfig

TENDENCY, SPREAD = 0.5, 0.7
"""How far the mean of log2 G lies below that of b in the first layer and above it in the last, and its deviation."""


def budget_groups(
    channels: Sequence[int], b: int, *, tendency: float = TENDENCY, spread: float = SPREAD, seed: int = 0
) -> list[int]:
    """A group count for every layer, powers of two, whose masks have Σ C²/G = Σ C²/b ones in all.

    Each log2 G is drawn from a normal distribution around log2 b + tendency·(2·depth − 1), depth from 0 to 1, cut to
    what divides the layer's channels C, a power of two, and *conditioned* on the sum: W_l(z) is the weight of all ways
    in which layers l, l+1, … have z ones, from the last layer to the first, and layer l's count is drawn with its own
    weight times W_{l+1} of what it leaves. Where no counts meet the budget, as for b = 96, the sum is the largest below
    it that some do.
    """
    goal = sum(c * c for c in channels) // b
    options = []
    for at, c in enumerate(channels):
        mean = math.log2(b) + tendency * (2 * at / max(len(channels) - 1, 1) - 1)
        powers = range(int(math.log2(c)) + 1)
        options.append([(c * c >> j, 1 << j, math.exp(-((j - mean) ** 2) / (2 * spread**2))) for j in powers])
    ways: list[dict[int, float]] = [{0: 1.0}]
    for choices in reversed(options):
        sums: dict[int, float] = {}
        for z, weight in ways[-1].items():
            for ones, _, own in choices:
                if z + ones <= goal:
                    sums[z + ones] = sums.get(z + ones, 0.0) + weight * own
        ways.append(sums)
    ways.reverse()
    left, draw, groups = max(ways[0]), random.Random(seed), []
    for choices, rest in zip(options, ways[1:], strict=True):
        weights = [own * rest.get(left - ones, 0.0) for ones, _, own in choices]
        ones, count, _ = draw.choices(choices, weights)[0]
        groups.append(count)
        left -= ones
    return groups


def set_groups(layer: foldgroup.nn.DGConv2d, groups: int, draw: random.Random) -> None:
    """Give the gates of ``layer`` signs for ``groups`` groups, at random places."""
    zeros = set(draw.sample(range(len(layer.gate)), int(math.log2(groups))))
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([-1e-2 if k in zeros else 1e-2 for k in range(len(layer.gate))]))


def build(arch: str) -> GroupableResNet:
    """The network of that name (see the top of this module)."""
    described = re.fullmatch(r"([0-9]+(?:-[0-9]+){0,3})x([0-9]+)", arch)
    if described is None:
        registered: GroupableResNet = get_model(arch)
        return registered
    blocks, width = [int(n) for n in described[1].split("-")], int(described[2])
    stages = tuple(StageConfig(n, width << i, 2 * width << i) for i, n in enumerate(blocks))
    return GroupableResNet(BottleneckConfig("cifar", stages, stem_channels=min(width, 64), num_classes=10))


def write_checkpoint(path: Path, arch: str, seed: int = 0, budget: int | None = None) -> None:
    """Write a checkpoint of the network ``arch`` in foldgroup's own layout, the same for the same seed.

    Gates are fair coins, or meet the ``budget`` b. The last batch norm of a block is scaled down, as trained ones are,
    or the activations of a hundred layers would overflow.
    """
    torch.manual_seed(seed)
    model = build(arch)
    learned = [module for module in model.modules() if isinstance(module, foldgroup.nn.DGConv2d)]
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, foldgroup.nn.DGConv2d):
                module.reset_gates()
            elif isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                scale = 0.25 if name.endswith("bn3") else 1.0
                module.weight.uniform_(0.5 * scale, 1.5 * scale)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    if budget is not None:
        draw = random.Random(seed)
        counts = budget_groups([layer.in_channels for layer in learned], budget, seed=seed)
        for layer, groups in zip(learned, counts, strict=True):
            set_groups(layer, groups, draw)
    size = 224 if model.config.stem == "imagenet" else 32
    training = {"synthetic_seed": seed, **({} if budget is None else {"synthetic_budget": budget})}
    save_checkpoint(path, model.eval(), arch, Preprocessing.standard(size), (), training=training)


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arch")
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, help="the paper's b, met exactly; without it gates are fair coins")
    arguments = parser.parse_args()
    write_checkpoint(arguments.path, arguments.arch, arguments.seed, arguments.budget)


if __name__ == "__main__":
    main()
