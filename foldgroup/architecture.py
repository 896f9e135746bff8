"""The shapes in a state dict → the bottleneck network they belong to. Builds on the meta device, with no memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foldgroup.errors import CheckpointError, ModelError
from foldgroup.nn.resnext import CONFIGS, BottleneckConfig, GroupableResNet, StageConfig
from foldgroup.safe_load import shown

_FAMILY = (
    "give a bottleneck network with torchvision's names (conv1, bn1, layer1 … layer4 with conv1–conv3 each, fc), or "
    "name the function that builds yours with --model"
)
_STEMS: dict[tuple[int, ...], Literal["imagenet", "cifar"]] = {(7, 7): "imagenet", (3, 3): "cifar"}


def known_archs() -> tuple[str, ...]:
    """The names of foldgroup's own builders in torchvision's registry."""
    return tuple(sorted(CONFIGS))


def infer_config(state: Mapping[str, Tensor]) -> BottleneckConfig:
    """The configuration of the bottleneck network whose DGConv2d state dict is ``state``.

    Only the shapes that decide it are read; :func:`build_and_check` compares the rest.

    Raises:
        CheckpointError: if the keys are not those of the bottleneck family.
    """
    stem = _shape(state, "conv1.weight", 4)
    if tuple(stem[2:]) not in _STEMS:
        raise CheckpointError(
            f"key 'conv1.weight' has a {stem[2]}×{stem[3]} kernel: the stem must be 7×7 or 3×3: {_FAMILY}"
        )
    blocks: dict[int, set[int]] = {}
    for key in state:
        if match := re.match(r"layer([0-9]{1,4})\.([0-9]{1,4})\.", key):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    if not blocks or sorted(blocks) != list(range(1, len(blocks) + 1)) or len(blocks) > 4:
        raise CheckpointError(f"its stages are {shown(sorted(blocks), 8)}, not 1 to at most 4 without a gap: {_FAMILY}")
    stages = []
    for stage, indices in sorted(blocks.items()):
        if max(indices) != len(indices) - 1:
            raise CheckpointError(
                f"layer{stage} has {len(indices)} blocks but one is numbered {max(indices)}: {_FAMILY}"
            )
        width = _shape(state, f"layer{stage}.0.conv2.weight", 4)[0]
        stages.append(StageConfig(len(indices), width, _shape(state, f"layer{stage}.0.conv3.weight", 4)[0]))
    classes = _shape(state, "fc.weight", 2)[0]
    return BottleneckConfig(_STEMS[tuple(stem[2:])], tuple(stages), stem[0], stem[1], classes)


def summary(config: BottleneckConfig) -> str:
    """The configuration in one line: "imagenet stem of 64, stages 3 × 128 → 256, 4 × 256 → 512"."""
    stages = ", ".join(f"{stage.blocks} × {stage.width} → {stage.out_channels}" for stage in config.stages)
    return f"{config.stem} stem of {config.stem_channels}, stages {stages}"


def arch_name(config: BottleneckConfig) -> str:
    """The registered builder of this configuration, whatever its classes; else a description: "bottleneck-3-4-6-3"."""
    for name in known_archs():
        if replace(CONFIGS[name], num_classes=config.num_classes) == config:
            return name
    return "bottleneck-" + "-".join(str(stage.blocks) for stage in config.stages)


def named_config(arch: str, state: Mapping[str, Tensor]) -> BottleneckConfig:
    """The configuration of a registered builder, with the input channels and classes of ``state``.

    Raises:
        CheckpointError: if there is no such builder, or ``state`` has no stem or classifier.
    """
    if arch not in known_archs():
        raise CheckpointError(f"unknown architecture {arch!r}: --arch takes one of {', '.join(known_archs())}")
    in_channels, classes = _shape(state, "conv1.weight", 4)[1], _shape(state, "fc.weight", 2)[0]
    return replace(CONFIGS[arch], in_channels=in_channels, num_classes=classes)


def build_and_check(config: BottleneckConfig, state: Mapping[str, Tensor], described_by: str) -> GroupableResNet:
    """The network of ``config`` on the meta device, once ``state`` is known to have exactly its keys and shapes.

    BatchNorm's ``num_batches_tracked`` may be missing: PyTorch before 0.4.1 did not write it. ``described_by`` says in
    messages where the configuration comes from.

    Raises:
        CheckpointError: naming the first missing keys, extra keys or shapes that do not fit.
    """
    try:
        with torch.device("meta"), _Unfilled():
            model = GroupableResNet(config)
    except ModelError as error:
        raise CheckpointError(f"{error}: {_FAMILY}") from error
    problems = key_problems({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, state)
    if problems:
        raise CheckpointError(
            f"its keys are not those of {described_by}: {', '.join(problems)}. Save the whole state dict of such a "
            f"network, or name another with --arch ({', '.join(known_archs())}), or your own with --model"
        )
    return model


def key_problems(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
    """In what ``state`` differs from the keys and shapes ``expected``, in words; nothing if in nothing.

    BatchNorm's ``num_batches_tracked`` may be missing.
    """
    problems = []
    missing = [key for key in expected if key not in state and not key.endswith(".num_batches_tracked")]
    if missing:
        problems.append(f"{len(missing)} missing ({shown(missing)})")
    extra = [key for key in state if key not in expected]
    if extra:
        problems.append(f"{len(extra)} too many ({shown(extra)})")
    wrong = [key for key in expected if key in state and tuple(state[key].shape) != expected[key]]
    if wrong:
        first = f"{list(state[wrong[0]].shape)} instead of {list(expected[wrong[0]])}"
        problems.append(f"{len(wrong)} of another shape ({shown(wrong)}; the first is {first})")
    return problems


class _Unfilled(TorchFunctionMode):
    """Leaves tensors of the meta device as they are: drawing values for them takes longest, and there are none."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func in _FILLING else func(*args, **(kwargs or {}))


_FILLING = {Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_}


def _shape(state: Mapping[str, Tensor], key: str, dims: int) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"there is no key {key!r} (it has {shown(state)}): {_FAMILY}")
    shape = tuple(state[key].shape)
    if len(shape) != dims:
        raise CheckpointError(f"key {key!r} has shape {list(shape)}, not {dims} dimensions: {_FAMILY}")
    return shape
