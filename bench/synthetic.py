"""A full-size checkpoint to measure with: random weights, random gates, batch norms that do something.

Speed and memory do not depend on what a network has learned but for its group counts; random gates give every layer
groups of its own and need shuffles almost everywhere, which is the hard case for the compiler.

    python -m bench.synthetic g_resnext50 checkpoint.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torchvision.models import get_model

import foldgroup.nn  # registers the G-ResNeXt builders
from foldgroup.checkpoint import Preprocessing, save_checkpoint


def write_checkpoint(path: Path, arch: str, seed: int = 0) -> None:
    """Write a checkpoint of the registered network ``arch`` in foldgroup's own layout, the same for the same seed.

    Every gate is a fair coin's throw, as in a network before training. The last batch norm of a block is scaled down,
    as trained ones are, or the activations of a hundred layers would overflow.
    """
    torch.manual_seed(seed)
    model = get_model(arch)
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
    size = 224 if model.config.stem == "imagenet" else 32
    save_checkpoint(path, model.eval(), arch, Preprocessing.standard(size), (), training={"synthetic_seed": seed})


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arch")
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(arguments.path, arguments.arch, arguments.seed)


if __name__ == "__main__":
    main()
