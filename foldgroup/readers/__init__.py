"""Readers: the keys of layers that mask their kernel → the keys of plain torch layers, the mask multiplied in.

For networks that are not foldgroup's own: the user's function builds the network with a plain convolution in place of
every masked layer, a reader gives that convolution the kernel that the layer really uses, with exact zeros where the
mask is, and the pass find_groups reads the groups out of the zeros. Tensors only; knows no file, no network.

Each reader is one file and one row of :func:`readers`:

- ``prune``: masks of ``torch.nn.utils.prune``.
- ``condensenet``: learned group convolutions of CondenseNet and CondenseNetV2, in training form or converted.
- ``flgc``: the channel-to-group maps of Fully Learnable Group Convolution.
- ``dgconv``: DGConv of d-li14/dgconv.pytorch and its copies, cropped masks included.
- ``per_sample``: nothing but a refusal, of gates that are computed from the input.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from foldgroup.dialects import GateOrder, ZeroGates
from foldgroup.errors import CheckpointError
from foldgroup.readers.base import Reader
from foldgroup.readers.condensenet import CONVERTED, CONVERTED_OUTPUTS, LEARNED
from foldgroup.readers.dgconv import dgconv
from foldgroup.readers.flgc import FLGC
from foldgroup.readers.per_sample import PER_SAMPLE
from foldgroup.readers.prune import PRUNE
from foldgroup.safe_load import shown


def readers(gate_order: GateOrder = "stored", zero_gates: ZeroGates | None = None) -> tuple[Reader, ...]:
    """All readers; the options are for the gates of DGConv, as in :func:`foldgroup.dialects.translate`."""
    return (PER_SAMPLE, PRUNE, LEARNED, CONVERTED, CONVERTED_OUTPUTS, FLGC, dgconv(gate_order, zero_gates))


def translate(
    state: Mapping[str, Tensor], gate_order: GateOrder = "stored", zero_gates: ZeroGates | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """``state`` with the keys of plain layers for those that a reader knows, and what a user should know of each kind.

    All other keys stay as they are. The tensors given are not written into.

    Raises:
        CheckpointError: if a layer's mask is not binary or depends on the input, or its tensors do not fit together;
            the message names the layer.
    """
    result = dict(state)
    notes = []
    for reader in readers(gate_order, zero_gates):
        layers = reader.matches(result)  # not of state: what is pruned may be any of the others besides
        for layer in layers:
            parts = {part: result.pop(f"{layer}.{part}") for part in reader.parts if f"{layer}.{part}" in result}
            for name, tensor in reader.translate(layer, parts).items():
                key = f"{layer}.{name}"
                if key in result:
                    raise CheckpointError(
                        f"layer {layer!r} has both {key!r} and the parts that {reader.name} makes it of: "
                        "keep the one that the network uses"
                    )
                result[key] = tensor
        if layers:
            notes.append(f"{reader.name}: {reader.note} {shown(layers)}")
    return result, tuple(notes)
