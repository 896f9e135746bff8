"""Groups that are given instead of learned: what ResNeXt is, and what the paper's ResNeXt* is (section 4, Table 6).

A convolution with G groups of neighbours is DGConv with the bits 0 … 0 1 … 1: digit 1 is the most significant, so equal
leading digits make a run of neighbouring channels. So networks with given and with learned groups differ in their gates
alone: they start from the same weights, see the same images, and are compiled alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from torchvision.models import get_model

from foldgroup.checkpoint import load_checkpoint
from foldgroup.errors import CheckpointError, TrainingError
from foldgroup.nn.complexity import groupable_layers
from foldgroup.nn.dgconv import DGConv
from foldgroup.training.config import TrainConfig

What = Literal["counts", "connections"]


def with_given_groups(
    config: TrainConfig, groups: int | None, counts_from: Path | None, connections_from: Path | None
) -> TrainConfig:
    """The run ``config`` with the groups that the one of these which is not None says.

    Raises:
        TrainingError: as :func:`with_groups` and :func:`with_groups_from`.
    """
    if groups is not None:
        return with_groups(config, groups)
    if counts_from is not None:
        return with_groups_from(config, counts_from, "counts")
    assert connections_from is not None
    return with_groups_from(config, connections_from, "connections")


def with_groups(config: TrainConfig, groups: int) -> TrainConfig:
    """The run ``config`` with ``groups`` neighbouring groups in every layer.

    Raises:
        TrainingError: naming the first layer whose channels do not divide so, or if there is no such architecture.
    """
    bits = {name: bits_for(layer, groups, name) for name, layer in _layers(config.arch).items()}
    return replace(config, complexity=None, fixed_gates=bits, fixed_from=f"{groups} groups in every layer")


def with_groups_from(config: TrainConfig, path: Path, what: What) -> TrainConfig:
    """The run ``config`` with the groups that the checkpoint at ``path`` learned.

    Of "counts" only the number of groups is taken, which become groups of neighbours: the paper's ResNeXt*.
    "connections" also takes which channels go together.

    Raises:
        TrainingError: if the checkpoint cannot be read, or does not have the layers of ``config.arch``.
    """
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        raise TrainingError(str(error)) from error
    learned, own = groupable_layers(checkpoint.model), _layers(config.arch)
    if _shapes(learned) != _shapes(own):
        raise TrainingError(
            f"{path}: its layers are not those of {config.arch}: give a checkpoint of that architecture, or the "
            f"checkpoint's own as --arch ({checkpoint.arch})"
        )
    if what == "connections":
        bits = {name: list(layer.bits) for name, layer in learned.items()}
    else:
        bits = {name: bits_for(own[name], layer.grouping.groups, name) for name, layer in learned.items()}
    return replace(config, complexity=None, fixed_gates=bits, fixed_from=f"the {what} of {checkpoint.sha256}")


def bits_for(layer: DGConv, groups: int, name: str) -> list[int]:
    """Gate bits that give ``layer`` so many groups, of neighbours where the digits allow it.

    Neighbours need a leading run of digits whose product is G. In a mixed radix there may be none, as for 3 groups of
    2·2·3 channels; then the groups interleave, which to a network with a dense convolution on either side is the same
    up to the names of its channels.

    Raises:
        TrainingError: naming the layer, if no digits have this product.
    """
    sizes = [a for a, b in layer.factors if a == b]
    leading = (tuple(range(count)) for count in range(len(sizes) + 1))
    others = (chosen for count in range(len(sizes) + 1) for chosen in combinations(range(len(sizes)), count))
    for zeros in (*leading, *others):
        if math.prod(sizes[k] for k in zeros) == groups:
            return [int(k not in zeros) for k in range(len(sizes))]
    raise TrainingError(
        f"layer {name} cannot have {groups} groups: {layer.in_channels} → {layer.out_channels} channels share the "
        f"digits {'·'.join(map(str, sizes)) or 'none'}; use a product of some of them"
    )


def fix_gates(layers: Mapping[str, DGConv], bits: Mapping[str, Sequence[int]]) -> None:
    """Set the gates of ``layers`` to ±1 by their bits, and let them learn nothing.

    Raises:
        TrainingError: naming a layer that ``bits`` do not fit.
    """
    for name in sorted(set(layers) ^ set(bits)):
        raise TrainingError(f"layer {name} has no given groups, or is no layer of this network: take them from its own")
    for name, layer in layers.items():
        if len(bits[name]) != len(layer.gate):
            raise TrainingError(f"layer {name} has {len(layer.gate)} gates and {len(bits[name])} are given")
        with torch.no_grad():
            layer.gate.copy_(torch.tensor(bits[name]) * 2 - 1)
        layer.gate.requires_grad_(False)


def _layers(arch: str) -> dict[str, DGConv]:
    """The layers of ``arch`` that learn groups, without memory for their weights."""
    try:
        with torch.device("meta"):
            return groupable_layers(get_model(arch))
    except ValueError as error:
        raise TrainingError(f"unknown architecture {arch!r}: use g_resnext50 or another of foldgroup.nn") from error


def _shapes(layers: Mapping[str, DGConv]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.weight.shape) for name, layer in layers.items()}
