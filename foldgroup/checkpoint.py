"""Checkpoints: dialects → (model, gates, provenance); safe loading only.

A file travels :mod:`~foldgroup.safe_load` (file → tensors) → :mod:`~foldgroup.dialects` (any known key layout → ours) →
:mod:`~foldgroup.architecture` (shapes → network) or :mod:`~foldgroup.own_model` (the user's function → network) →
:class:`Checkpoint`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from foldgroup import own_model
from foldgroup.architecture import arch_name, build_and_check, infer_config, named_config, summary
from foldgroup.checkpoint_file import check_file
from foldgroup.dialects import GateOrder, ZeroGates, translate
from foldgroup.errors import CheckpointError
from foldgroup.own_model import ModelSource
from foldgroup.safe_load import check_tensors, load_file, shown

FORMAT = 1
"""Version of foldgroup's own checkpoint layout."""
LARGEST_IMAGE = 1 << 15
"""Pixels of a side, at most, that a checkpoint may say its images have."""
LARGEST_MEAN = 1e30
"""Of a colour, at most, so that what is made of it is still a float32."""

_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input: resize the short side, crop the centre, scale to [0, 1], normalise."""

    resize: int
    size: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @classmethod
    def standard(cls, size: int) -> Preprocessing:
        """ImageNet's: resize to 8/7 of ``size`` and crop; images of 64 pixels or less are resized only."""
        return cls(resize=size if size <= 64 else round(size * 8 / 7), size=size)

    def transform(self) -> v2.Transform:
        """The same as torchvision transforms, from a PIL image to a float32 tensor [C, H, W]."""
        return v2.Compose(
            [
                v2.Resize(self.resize, antialias=True),
                v2.CenterCrop(self.size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.mean, self.std),
            ]
        )


def save_checkpoint(
    path: Path,
    model: nn.Module,
    arch: str,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    *,
    training: dict[str, Any],
) -> None:
    """Write ``model`` in foldgroup's own layout, atomically: tensors and plain values, which load without code."""
    document = {
        "foldgroup": FORMAT,
        "arch": arch,
        "preprocessing": asdict(preprocessing),
        "classes": list(classes),
        "training": training,
        "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
    }
    write_whole(path, document)


def write_whole(path: Path, document: object) -> None:
    """Save ``document`` to ``path``, which at any moment holds all of it or what it held before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(document, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Checkpoint:
    """A trained network in training form, and where it came from."""

    path: Path
    """Of the file; of a module the name of its class."""
    sha256: str
    """Of the file's bytes; of a module of its state dict (:func:`foldgroup.own_model.sha256_of`)."""
    dialect: str
    """The key layout: "foldgroup", "d-li14", "state_dict" (no gates), or "module" where there was no file."""
    arch: str
    """A registered builder's name, a description such as "bottleneck-2-2-2", or the name of the module's class."""
    model: nn.Module
    """In eval mode; from a file, float32 or float64 as its widest tensor."""
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    """Class names in the order of the logits; empty when unknown."""
    notes: tuple[str, ...]
    """What a user should know about how the file was read."""
    built_by: str | None = None
    """The function that built the network, as ``package.module:function``, if the user named one."""


def load_network(
    source: str | os.PathLike[str] | nn.Module,
    *,
    arch: str | None = None,
    gate_order: GateOrder = "stored",
    zero_gates: ZeroGates | None = None,
    model: ModelSource | None = None,
) -> Checkpoint:
    """A checkpoint as :func:`load_checkpoint` reads it, or a module as it is.

    Raises:
        CheckpointError: as :func:`load_checkpoint`, or if a module comes with options for files or is not on the CPU.
    """
    if not isinstance(source, nn.Module):
        return load_checkpoint(source, arch=arch, gate_order=gate_order, zero_gates=zero_gates, model=model)
    name = type(source).__name__
    if (arch, gate_order, zero_gates, model) != (None, "stored", None, None):
        raise CheckpointError(f"{name}: arch, gate_order, zero_gates and model are for checkpoints: leave them out")
    own_model.check_on_cpu(source, f"{name}: it")
    sha256 = own_model.sha256_of(source)
    return Checkpoint(Path(name), sha256, "module", name, source.eval(), Preprocessing.standard(224), (), ())


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    gate_order: GateOrder = "stored",
    zero_gates: ZeroGates | None = None,
    model: ModelSource | None = None,
) -> Checkpoint:
    """Read a checkpoint of foldgroup or of the d-li14 family without running code from it.

    ``arch`` names a registered builder instead of inferring the network from the tensors; ``model`` is a function, or
    its name as ``package.module:function``, that builds any other network. ``gate_order`` "sorted" is for d-li14
    networks built with ``sort=True``, which nothing in the file reveals. ``zero_gates`` says what gates of exactly 0
    mean; in foldgroup's own layout they are the identity unless it says otherwise.

    Raises:
        CheckpointError: if the file is unsafe, damaged, or no such network; the message names the file, the key or
            layer, and what to do.
    """
    path = Path(path)
    check_file(path)
    try:
        if model is None:
            return _load(path, arch, gate_order, zero_gates)
        if arch is not None:
            raise CheckpointError("--arch and --model both say what the network is: give one of them")
        return _load_own(path, model, gate_order, zero_gates)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def _load_own(path: Path, source: ModelSource, gate_order: GateOrder, zero_gates: ZeroGates | None) -> Checkpoint:
    """A checkpoint of the network that the user's function builds."""
    _check_gate_options(gate_order, zero_gates)
    file = load_file(path)
    wrapped, ignored = _find_state_dict(file.document)
    spec = own_model.spec_of(source)
    model = own_model.build(source)
    named = any(key in wrapped for key in model.state_dict())  # a network may have a layer called module
    tensors = check_tensors(wrapped if named else _without_prefixes(wrapped), file.size)
    translation = own_model.translated(model, tensors, gate_order, zero_gates)
    state = translation.state
    own_model.check_keys(model, state, spec)
    for key, tensor in model.state_dict().items():
        if key.endswith(_COUNTER):
            state.setdefault(key, tensor)
    dtype, notes = _common_dtype({key: tensor for key, tensor in state.items() if tensor.is_floating_point()})
    own_model.load_into(model, state, dtype, spec)
    notes = [*translation.notes, *notes]
    if ignored:
        notes.append(f"ignored beside the weights: {shown(ignored, limit=8)}")
    preprocessing, classes = _own_record(file.document)
    arch = type(model).__name__
    prepared = preprocessing or Preprocessing.standard(224)
    return Checkpoint(
        path, file.sha256, translation.dialect, arch, model.eval(), prepared, classes, tuple(notes), built_by=spec
    )


def _check_gate_options(gate_order: GateOrder, zero_gates: ZeroGates | None) -> None:
    if gate_order not in get_args(GateOrder) or zero_gates not in (None, *get_args(ZeroGates)):
        raise CheckpointError("--gate-order takes stored or sorted, --zero-gates identity or ones")


def _load(path: Path, arch: str | None, gate_order: GateOrder, zero_gates: ZeroGates | None) -> Checkpoint:
    _check_gate_options(gate_order, zero_gates)
    file = load_file(path)
    wrapped, ignored = _find_state_dict(file.document)
    tensors = check_tensors(_without_prefixes(wrapped), file.size)
    translation = translate(tensors, gate_order, zero_gates)
    state = translation.state

    if arch is None:
        config = infer_config(state)
        arch, described_by = arch_name(config), f"the bottleneck network that its shapes describe ({summary(config)})"
    else:
        config, described_by = named_config(arch, state), arch
    model = build_and_check(config, state, described_by)
    for key in model.state_dict():
        if key.endswith(_COUNTER):
            state.setdefault(key, torch.tensor(0))
    dtype, dtype_notes = _common_dtype(state)
    _assign(model, _plain(state, dtype))

    notes = [*translation.notes, *dtype_notes]
    if ignored:
        notes.append(f"ignored beside the weights: {shown(ignored, limit=8)}")
    preprocessing, classes = _own_record(file.document, config.num_classes)
    if preprocessing is None:
        preprocessing = Preprocessing.standard(224 if config.stem == "imagenet" else 32)
        notes.append(
            f"the file does not say how to prepare images: assumed {preprocessing.size} pixels, ImageNet's mean and std"
        )
    if translation.dialect != "foldgroup" and config.stem == "cifar":
        notes.append("a 3×3 stem is taken to have stride 1 and no max pool, which tensors do not show")
    return Checkpoint(path, file.sha256, translation.dialect, arch, model.eval(), preprocessing, classes, tuple(notes))


def _find_state_dict(document: object) -> tuple[Mapping[object, object], list[object]]:
    """The state dict in what a file held, and the keys left aside."""
    if not isinstance(document, dict):
        raise CheckpointError(f"this file holds a {type(document).__name__}, no state dict: save model.state_dict()")
    if "foldgroup" in document:
        version = document["foldgroup"]
        if type(version) is not int or version < 1:
            raise CheckpointError(
                f"its format number is {shown([version])}: the file is damaged; copy or train it again"
            )
        if version > FORMAT:
            raise CheckpointError(
                f"it is written in format {version} and this foldgroup reads formats up to {FORMAT}: update foldgroup"
            )
        if not isinstance(document.get("state_dict"), dict):
            raise CheckpointError("key 'state_dict' is missing from this foldgroup checkpoint: copy or train it again")
        return document["state_dict"], []
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(document.get(name), dict):
            return document[name], [key for key in document if key != name]
    if not any(isinstance(value, Tensor) for value in document.values()):
        raise CheckpointError(
            f"there are no weights in it, only {shown(document) or 'an empty dict'}: "
            "save model.state_dict(), bare or under the key 'state_dict'"
        )
    return document, []


def _without_prefixes(state: Mapping[object, object]) -> dict[object, object]:
    """Names without the "module." of DataParallel and the "_orig_mod." of torch.compile."""
    result: dict[object, object] = {}
    for key, value in state.items():
        name = key
        while isinstance(name, str) and name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        if name in result:
            raise CheckpointError(
                f"key {shown([name])} is there both with and without a wrapper's prefix: keep one of them"
            )
        result[name] = value
    return result


def _common_dtype(state: Mapping[str, Tensor]) -> tuple[torch.dtype, list[str]]:
    """The widest of the tensors' dtypes, at least float32, and a note where that widens any of them."""
    for key, tensor in state.items():
        if not key.endswith(_COUNTER) and not tensor.is_floating_point():
            raise CheckpointError(
                f"key {shown([key])} is {tensor.dtype}, not floating point: save the trained weights as they are"
            )
        if key.endswith(".running_var") and bool((tensor < 0).any()):
            raise CheckpointError(
                f"key {shown([key])} has negative values, which are no variances: the file is damaged; copy it again"
            )
    stored = {tensor.dtype for key, tensor in state.items() if not key.endswith(_COUNTER)}
    widest = torch.float64 if torch.float64 in stored else torch.float32
    narrower = sorted(str(dtype).removeprefix("torch.") for dtype in stored - {widest})
    name = str(widest).removeprefix("torch.")
    return widest, [f"{' and '.join(narrower)} tensors read as {name}, which is exact"] if narrower else []


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors``, which have the model's keys and shapes, into a model of the meta device.

    ``load_state_dict(assign=True)`` looks through all keys of a module for each of its children.
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(tensors[prefix + name], parameter.requires_grad))
        for name, _ in module.named_buffers(recurse=False):
            module.register_buffer(name, tensors[prefix + name])


def _plain(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in ``dtype``, each contiguous and alone in its storage; copied only where they are not yet."""
    plain = {}
    storages = set()
    for key, stored in state.items():
        tensor = stored.to(torch.int64 if key.endswith(_COUNTER) else dtype)
        strides = torch.empty(tensor.shape, device="meta").stride()
        storage = tensor.untyped_storage()
        if tensor.stride() != strides or storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(tensor.untyped_storage().data_ptr())
        plain[key] = tensor
    return plain


def is_text(name: str) -> bool:
    """Whether a name can be written down, which parts of file names that are no UTF-8 cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _own_record(document: object, num_classes: int | None = None) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """Preprocessing and class names as :func:`save_checkpoint` wrote them; nothing for any other file.

    ``num_classes`` None is for a network whose outputs are not known yet.
    """
    if not isinstance(document, dict) or "foldgroup" not in document:
        return None, ()
    try:
        entry = dict(document["preprocessing"])
        mean, std = (tuple(float(value) for value in entry[key]) for key in ("mean", "std"))
        preprocessing = Preprocessing(int(entry["resize"]), int(entry["size"]), mean, std)
        classes = tuple(document["classes"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError("its 'preprocessing' or 'classes' is damaged: copy or train it again") from error
    sizes = 1 <= preprocessing.size <= preprocessing.resize <= LARGEST_IMAGE
    if not sizes or not all(abs(value) <= LARGEST_MEAN for value in mean):
        raise CheckpointError("its 'preprocessing' describes no image: copy or train it again")
    if not all(value > 0 and math.isfinite(value) for value in std):
        raise CheckpointError("its 'preprocessing' divides by a 'std' that is not positive: copy or train it again")
    if len(mean) != 3 or len(std) != 3:
        raise CheckpointError("its 'preprocessing' has no 'mean' and 'std' of three colours: copy or train it again")
    expected = len(classes) if num_classes is None else num_classes
    if not all(isinstance(name, str) and is_text(name) for name in classes) or len(classes) not in (0, expected):
        raise CheckpointError(f"its 'classes' are not {expected} names, one a logit: copy or train it again")
    return preprocessing, classes
