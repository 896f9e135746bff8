"""groupable: any network with its convolutions turned into ones that learn their groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup.errors import ModelError
from foldgroup.nn.dgconv import KINDS, DGConv

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""Which layers: patterns of their names (:mod:`fnmatch`), or a predicate of name and layer."""


def groupable(model: nn.Module, where: Where | None = None) -> nn.Module:
    """Turn convolutions of ``model`` into :class:`~foldgroup.nn.DGConv` layers, in place, and return it.

    A convolution can be turned if it is torch's own Conv1d, Conv2d or Conv3d (a subclass, or one with hooks, pruned or
    parametrised, may compute anything), not depthwise, and gcd(C_in, C_out) > 1, or there would be no gate. ``where``
    chooses among those; without it, all with a kernel of more than one position are turned, the spatial ones that the
    paper groups::

        groupable(resnet50())
        groupable(resnet50(), "layer[34].*.conv2")
        groupable(resnet50(), lambda name, conv: conv.in_channels >= 64)

    Weights are kept, and dense ones shared; one with groups becomes a block-diagonal dense kernel (see
    :meth:`DGConv.from_conv`). Gates are fresh, and so, but for all gates on, the function is another: train it. A layer
    under several names is turned once and stays one, if any of its names is chosen; tied kernels stay tied. Make the
    optimizer afterwards. If ``model`` is itself a convolution, the layer it becomes is returned.

    Raises:
        ModelError: if nothing can be turned, or ``where`` chooses none of what can; the model is then as it was.
    """
    named = model.named_modules(remove_duplicate=False)
    able = [(name, conv) for name, conv in named if isinstance(conv, _ConvNd) and _can_learn(conv)]
    chosen = [conv for name, conv in able if _chooses(where, name, conv)]
    if not chosen:
        raise ModelError(_nothing_chosen(model, [name for name, _ in able]))
    turned: dict[nn.Module, DGConv] = {}
    kernels: dict[tuple[int, int], Tensor] = {}
    for conv in dict.fromkeys(chosen):
        layer = turned[conv] = DGConv.from_conv(conv)
        layer.weight = kernels.setdefault((id(conv.weight), conv.groups), layer.weight)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():  # named_children() leaves out a child's second name
            if child in turned:
                parent.add_module(key, turned[child])
    return turned.get(model, model)


def _can_learn(conv: _ConvNd) -> bool:
    changed = conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks
    if type(conv) not in KINDS or changed or "forward" in vars(conv):
        return False
    return conv.groups < conv.in_channels and math.gcd(conv.in_channels, conv.out_channels) > 1


def _chooses(where: Where | None, name: str, conv: _ConvNd) -> bool:
    if where is None:
        return any(size > 1 for size in conv.kernel_size)
    if callable(where):
        return bool(where(name, conv))
    return any(fnmatchcase(name, pattern) for pattern in ([where] if isinstance(where, str) else where))


def _nothing_chosen(model: nn.Module, able: list[str]) -> str:
    kind = type(model).__name__
    if able:
        names = ", ".join(able[:4]) + (", …" if len(able) > 4 else "")
        return (
            f"none of the {len(able)} convolutions of {kind} that can learn groups is chosen ({names}): "
            "give 'where' a pattern of their names, or a function of name and layer that returns True"
        )
    learned = sum(isinstance(module, DGConv) for module in model.modules())
    if learned:
        return f"{kind} has no more convolutions that can learn groups: {learned} do already"
    return (
        f"{kind} has no convolution that can learn groups: it takes a Conv1d, Conv2d or Conv3d of torch's own, without "
        "hooks and not depthwise, whose channel counts have a common divisor"
    )
