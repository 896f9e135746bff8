"""Dynamic group convolution (Su et al., ECCV 2020; zhuogege1943/dgc): refused, with the reason.

A ``DynamicMultiHeadConv`` computes, for every image, a gate for each input channel of each head, from the channels'
means, and removes those with the smallest. Which channels are connected depends on the image, so there is no one
network to fold; and the gates left are any positive numbers, which scale the channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from foldgroup.errors import CheckpointError
from foldgroup.readers.base import Reader

_HEAD = re.compile(r"(?:(.*)\.)?headconv_\d+\.(?:fc[12]|conv)\.")


def _matches(state: Mapping[str, Tensor]) -> list[str]:
    heads = (_HEAD.match(key) for key in state)
    return list(dict.fromkeys(head[1] or "" for head in heads if head))


def _translate(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    raise CheckpointError(
        f"layer {layer!r} is a dynamic group convolution: it computes from each image which channels its heads read, "
        "and how strongly, so there is no one network to fold: give one whose groups are fixed after training (DGConv, "
        "CondenseNet, FLGC, a pruned one), or deploy this one as it is"
    )


PER_SAMPLE = Reader("dynamic group convolution", _matches, (), _translate, "")
