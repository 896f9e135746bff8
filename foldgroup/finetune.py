"""Fine-tuning a network in its folded form, and writing what was learned back into its training form.

With its gates frozen, a DGConv of dense kernel ω convolves with W = U ⊙ ω (eq. 3), U a constant. The folded network
has tensors v = S(ω): every entry is one of W's that U keeps, v_j = ω_π(j), or a zero that merely pads, where the plan
runs fewer groups; other layers' tensors are permuted in the same way. For all ω it computes the same function,

    g(x; S(ω)) = f(x; ω),    so    ∂L/∂v_j = ∂L/∂ω_π(j)

as every kept entry is one v_j (π is one-to-one onto them, which is checked). SGD with momentum and weight decay acts on
each entry alone and alike, so it commutes with the renaming π: k updates of v are the k updates of ω. An entry that U
drops has no gradient and no effect; weight decay would shrink it in the training form, here it stays as it was.
A padding zero would get a gradient, which the training form has no entry for: it is held at zero in the forward pass
(:class:`HeldConv2d`). Batch norm is kept as a layer: its statistics, each of one channel, are renamed like its weights.
What is drawn at random for channels, as by dropout, falls on other channels than in the training form: the same in
distribution only.

The exact zeros of a plain convolution are a mask too, as everywhere in foldgroup, and stay zero: those of a pruned
network, that is, where at least a hundredth of a kernel is zero (:data:`MASKED`), but not all of it.

**Where entries came from** is not asked of the passes. The pipeline runs on a twin of the network whose entries are
their own numbers 1, 2, 3, … (in float64, which holds them exactly), and 0 where W is zero by a mask. No pass of it
computes with weights, since batch norm is not folded, and the certificate proves of the twin what it proves of any
network: so the entries that the folded twin holds name their origins, and the folded network is read off them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup.checkpoint import Checkpoint, load_network, save_checkpoint
from foldgroup.dialects import GateOrder, ZeroGates
from foldgroup.errors import TrainingError
from foldgroup.folding import fold, shape_like
from foldgroup.forms import CONVS, ChannelSelect, ChannelShuffle, conv_like
from foldgroup.nn.dgconv import DGConv
from foldgroup.outputs import outputs_of
from foldgroup.own_model import ModelSource, with_versions
from foldgroup.trace import check_trains_alike, shape_of

_COUNTER = "num_batches_tracked"
MASKED = 0.01
"""Share of zeros from which on they are a mask. Of ten million random float32 weights one may be 0 by chance."""
LEFT_OUT = ("fold_batchnorm", "tidy")
"""Passes of a compile that have no place here: one computes with weights, one drops dropout."""


def folded_for_training(
    source: str | os.PathLike[str] | nn.Module | Checkpoint,
    *,
    arch: str | None = None,
    gate_order: GateOrder = "stored",
    zero_gates: ZeroGates | None = None,
    model: ModelSource | None = None,
    input_size: int | None = None,
    example_input: Tensor | Sequence[int] | None = None,
) -> FineTunable:
    """The checkpoint or module ``source``, folded and ready to train with its groups as they are.

    The arguments are those of :func:`foldgroup.compile`. Nothing that is done to the result touches ``source``; a
    module is left in evaluation mode::

        tunable = foldgroup.folded_for_training("checkpoint.pt")
        ...  # train tunable.module: its parameters, in grouped convolutions, with batch norm
        tunable.save("fine.pt")
        foldgroup.compile("fine.pt", "fine.foldgroup")

    Raises:
        TrainingError: naming the layer, if folding makes two of one entry, which training would then tell apart.
        TraceError: if the network trains by other operations than it is evaluated by, or cannot be traced.
        CheckpointError, PassError, EquivalenceError: if it cannot be read or folded.
    """
    checkpoint = source
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_network(checkpoint, arch=arch, gate_order=gate_order, zero_gates=zero_gates, model=model)
    check_trains_alike(checkpoint.model)
    how = {"input_size": input_size, "input_shape": shape_like(example_input)}
    try:
        return _folded(checkpoint, LEFT_OUT, **how)
    except _Twice:  # groups of a plain kernel that share channels: it stays whole, and its zeros are held
        return _folded(checkpoint, (*LEFT_OUT, "find_groups"), **how)


def _folded(checkpoint: Checkpoint, left_out: Sequence[str], **how: Any) -> FineTunable:
    """The checkpoint folded by the default passes but those ``left_out``; ``how`` says for what input."""
    from passes import default_pipeline

    twin, origins = _labelled(checkpoint.model, checkpoint.path)
    pipeline = default_pipeline()
    for name in left_out:
        pipeline = pipeline.without(name)
    folded = fold(replace(checkpoint, model=twin), pipeline=pipeline, to_train=True, **how)
    graph = folded.folded
    sources = _filled(graph, origins, checkpoint.path)
    _check_complete(folded.training, sources, origins, checkpoint.path)
    _hold_zeros(graph, sources)
    shapes = [shape_of(node) for node in outputs_of(folded.training).values()]
    classes = shapes[0][1] if len(shapes) == 1 and len(shapes[0]) == 2 else None
    return FineTunable(checkpoint, graph.train(), classes, sources)


class _Twice(TrainingError):
    """An entry that folding has made two of."""


@dataclass(frozen=True)
class _Origin:
    """A tensor of the training form, whose entries have the numbers from ``start`` on; 0 for those a mask drops."""

    names: tuple[str, ...]
    """In the state dict: several where modules share it."""
    start: int
    tensor: Tensor
    numbers: Tensor
    """int64, of the tensor's shape."""


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the folded network comes from: entry ``index`` of the flattened origin, −1 for padding."""

    origin: _Origin
    index: Tensor


@dataclass(frozen=True)
class FineTunable:
    """A folded network to train, and the way back. ``module`` is in training mode, in the checkpoint's precision.

    It may be moved, cast, compiled, wrapped and trained like any other, as long as its tensors keep their names.
    """

    checkpoint: Checkpoint
    """What it was made from; ``checkpoint.model`` is the training form as it was."""
    module: nn.Module
    classes: int | None
    """How many logits it gives; None if it is no classifier."""
    _sources: Mapping[str, _Source]

    def state_dict(self) -> dict[str, Tensor]:
        """The training form's state dict with the entries that the folded network has now, on the CPU.

        Gates, and what masks drop, are the checkpoint's; so are types.
        """
        state = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.checkpoint.model.state_dict().items()
        }
        now = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for name, source in self._sources.items():
            kept = source.index >= 0
            values = now[name].detach().cpu()[kept]
            for target in source.origin.names:
                if target in state:  # not a buffer that is never saved
                    state[target].view(-1)[source.index[kept]] = values.to(state[target].dtype)
        return state

    def training_form(self) -> nn.Module:
        """The network that was trained, in training form and evaluation mode: a new one."""
        model = copy.deepcopy(self.checkpoint.model)
        model.load_state_dict(with_versions(self.state_dict(), model))
        return model.eval()

    def save(self, path: str | os.PathLike[str], *, training: dict[str, Any] | None = None) -> None:
        """Write a checkpoint in foldgroup's layout, which ``compile``, ``verify`` and ``inspect`` take.

        ``training`` are plain values to record beside what it was fine-tuned from.
        """
        was = self.checkpoint
        record = {"finetune": was.sha256, **(training or {})}
        save_checkpoint(Path(path), self.training_form(), was.arch, was.preprocessing, was.classes, training=record)


# ---- the twin ----------------------------------------------------------------------------------------------------


def _labelled(model: nn.Module, path: Path) -> tuple[nn.Module, list[_Origin]]:
    """A twin of ``model`` that holds the numbers of its entries, gates apart, and where these belong."""
    twin = copy.deepcopy(model).double()
    origins: dict[int, _Origin] = {}
    kernels: dict[int, str] = {}
    count = 1
    for prefix, name, module, tensor in _tensors(model):
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(module, DGConv):
            if name == "gate":
                continue
            other = kernels.setdefault(id(tensor), full)
            if other != full:
                raise TrainingError(f"{path}: {other} and {full} are one tensor under masks of two layers: {_APART}")
        if id(tensor) in origins:
            known = origins[id(tensor)]
            origins[id(tensor)] = replace(known, names=(*known.names, full))
            continue
        numbers = torch.arange(count, count + tensor.numel()).reshape(tensor.shape)
        numbers = torch.where(_effective(module, name, tensor), numbers, 0)
        origins[id(tensor)] = _Origin((full,), count, tensor, numbers)
        getattr(twin.get_submodule(prefix), name).data.copy_(numbers)
        count += tensor.numel()
    return twin, list(origins.values())


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    """What training changes in a network, with its module: floating-point tensors, and the counters of batch norm."""
    for prefix, module in model.named_modules():
        if isinstance(module, ChannelShuffle | ChannelSelect):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (tensor.is_floating_point() or name == _COUNTER):
                yield prefix, name, module, tensor


def _effective(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Which entries the network uses: all, but for those of a kernel that a mask drops."""
    whole = torch.ones(tensor.shape, dtype=torch.bool)
    if isinstance(module, DGConv) and name == "weight":
        mask = torch.from_numpy(module.grouping.mask.T.copy())
        return whole & mask.reshape(*mask.shape, *(1,) * (tensor.ndim - 2))
    if type(module) in CONVS and name == "weight" and module.groups == 1:
        kept = tensor.detach() != 0
        return kept if MASKED <= 1 - float(kept.double().mean()) < 1 else whole
    return whole


# ---- the folded network ------------------------------------------------------------------------------------------


def _filled(graph: fx.GraphModule, origins: list[_Origin], path: Path) -> dict[str, _Source]:
    """Put the checkpoint's values in the place of the numbers that ``graph`` holds; says where each tensor came from.

    A parameter stays one, that learns if it did, wherever a pass keeps it. What the graph no longer uses is removed.
    """
    used = _used_by(graph)
    starts = torch.tensor([origin.start for origin in origins])
    made: dict[int, Tensor] = {}
    sources: dict[str, _Source] = {}
    for prefix, name, module, held in list(_tensors(graph)):
        full = f"{prefix}.{name}" if prefix else name
        if not used(full):
            delattr(module, name)
            continue
        if id(held) not in made:
            numbers = held.detach().to(torch.int64)
            known = numbers[numbers > 0]
            ends = torch.stack([known.min(), known.max()]) if len(known) else known
            at = set((torch.searchsorted(starts, ends, right=True) - 1).tolist())
            if len(at) != 1 or not torch.equal(numbers.to(held.dtype), held.detach()):
                raise TrainingError(f"{path}: {full} of the folded network is no tensor of the training form, moved")
            origin = origins[at.pop()]
            index = torch.where(numbers > 0, numbers - origin.start, -1)
            made[id(held)] = _values(origin.tensor, index)
            sources[full] = _Source(origin, index)
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        tensor = made[id(held)]
        if isinstance(tensor, nn.Parameter):
            module._parameters[name] = tensor
        else:
            module._buffers[name] = tensor
    return sources


def _values(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries of the flattened ``tensor``, 0 for those of index −1; a parameter if it is one."""
    flat = tensor.detach().reshape(-1)
    values = torch.where(index >= 0, flat[index.clamp(min=0)], 0).to(tensor.dtype)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _check_complete(
    training: fx.GraphModule, sources: Mapping[str, _Source], origins: list[_Origin], path: Path
) -> None:
    """Every entry that the training form uses stands in the folded network, once.

    Raises:
        TrainingError: naming the tensor that is there twice (:class:`_Twice`) or in part.
    """
    used = _used_by(training)
    times = {origin.start: torch.zeros(origin.tensor.numel(), dtype=torch.int64) for origin in origins}
    for source in sources.values():
        times[source.origin.start] += torch.bincount(
            source.index[source.index >= 0], minlength=source.origin.tensor.numel()
        )
    for origin in origins:
        found, wanted = times[origin.start], origin.numbers.reshape(-1) > 0
        name = origin.names[0]
        if bool((found > 1).any()):
            raise _Twice(f"{path}: folding makes two of entries of {name}: {_APART}")
        if any(map(used, origin.names)) and bool((wanted & (found == 0)).any()):
            raise TrainingError(
                f"{path}: folding leaves out entries of {name}, which training would change: {_INSTEAD}"
            )


def _used_by(graph: fx.GraphModule) -> Callable[[str], bool]:
    """Whether a tensor of that name is read, or one of a module that is called."""
    calls = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    reads = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}

    def used(name: str) -> bool:
        parts = name.split(".")
        return name in reads or any(".".join(parts[:i]) in calls for i in range(1, len(parts)))

    return used


_INSTEAD = "train it in training form, with its gates frozen"
_APART = f"training would tell them apart; {_INSTEAD}"


# ---- padding -----------------------------------------------------------------------------------------------------


class _Held(_ConvNd):
    """A convolution whose kernel is zero wherever ``kept`` [C_out, C_in/G, …] is false, whatever stands there."""

    kept: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [N, C_in, …]; what is not kept has gradient 0."""
        result: Tensor = self._conv_forward(input, torch.where(self.kept, self.weight, 0), self.bias)
        return result


class HeldConv1d(_Held, nn.Conv1d):
    """Of [N, C_in, L]; its padding is held at zero."""


class HeldConv2d(_Held, nn.Conv2d):
    """Of [N, C_in, H, W]; its padding is held at zero."""


class HeldConv3d(_Held, nn.Conv3d):
    """Of [N, C_in, D, H, W]; its padding is held at zero."""


_HELD = dict(zip(CONVS, (HeldConv1d, HeldConv2d, HeldConv3d), strict=True))


def _hold_zeros(graph: fx.GraphModule, sources: Mapping[str, _Source]) -> None:
    """Replace every convolution that has padding in its kernel by one that holds it."""
    made: dict[nn.Module, nn.Module] = {}
    for path, module in list(graph.named_modules(remove_duplicate=False)):
        source = sources.get(f"{path}.weight")
        if source is None or bool((source.index >= 0).all()):
            continue
        if module not in made:
            assert isinstance(module, _ConvNd) and type(module) in _HELD
            held = conv_like(module, module.weight, module.bias, module.groups, _HELD[type(module)])
            held.weight, held.bias = module.weight, module.bias
            held.register_buffer("kept", source.index >= 0, persistent=False)
            made[module] = held
        graph.add_submodule(path, made[module])
