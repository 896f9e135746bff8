"""Networks that are not foldgroup's own: built by a function that the user names, or given as a module.

A checkpoint holds tensors and nothing else, so somebody has to say what network they belong to. ``package.module:name``
names a function, or a class, that returns it when called without arguments. It is code of the user's, imported from the
current folder or from installed packages; nothing in the checkpoint is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from foldgroup import readers
from foldgroup.architecture import key_problems
from foldgroup.dialects import GateOrder, Translation, ZeroGates, translate
from foldgroup.errors import CheckpointError
from foldgroup.nn.dgconv import DGConv
from foldgroup.safe_load import shown

ModelSource: TypeAlias = str | Callable[[], nn.Module]
"""``package.module:function``, or the function itself."""


def spec_of(source: ModelSource) -> str:
    """How a bundle records who built the network: ``package.module:function``."""
    if isinstance(source, str):
        return source
    named = source if hasattr(source, "__qualname__") else type(source)
    return f"{named.__module__}:{named.__qualname__}"


def build(source: ModelSource) -> nn.Module:
    """The network that ``source`` returns, on the CPU; a string is imported from the current folder or a package.

    Raises:
        CheckpointError: if there is no such module or function, it fails, or it returns something else.
    """
    spec = spec_of(source)
    # What the user's code prints is no result of ours: standard output may be one JSON document.
    with _current_folder_first(), contextlib.redirect_stdout(sys.stderr):
        function = _imported(source) if isinstance(source, str) else source
        try:
            model: object = function()
        except (Exception, SystemExit) as error:
            raise CheckpointError(
                f"--model {spec} raises {type(error).__name__}: {error}. Name a function that returns the network when "
                "called without arguments"
            ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"--model {spec} returns a {type(model).__name__}, not a torch.nn.Module: name a function that returns the "
            "network itself"
        )
    check_on_cpu(model, f"--model {spec} returns a network that")
    return model


def check_on_cpu(model: nn.Module, which: str) -> None:
    """Refuse a network whose tensors are elsewhere.

    Raises:
        CheckpointError: beginning with ``which``, naming the first tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise CheckpointError(f"{which} has {name} on {tensor.device}: build it on the CPU, or call cpu() on it")


def translated(
    model: nn.Module, tensors: Mapping[str, Tensor], gate_order: GateOrder, zero_gates: ZeroGates | None
) -> Translation:
    """``tensors`` with ``model``'s groupable layers in foldgroup's layout, and masked layers as plain kernels.

    Raises:
        CheckpointError: if a groupable layer's keys are of no known layout, or the gate options have nothing to read.
    """
    layers = tuple(f"{name}." for name, module in model.named_modules() if name and isinstance(module, DGConv))
    own = {key: tensor for key, tensor in tensors.items() if layers and key.startswith(layers)}
    rest = {key: tensor for key, tensor in tensors.items() if key not in own}
    if rest.keys() - model.state_dict().keys():
        plain, notes = readers.translate(rest, gate_order, zero_gates)
    else:
        plain, notes = rest, ()
    if any(key.endswith(".gate") for key in own):
        translation = translate(own, gate_order, zero_gates)
        return Translation(translation.dialect, plain | translation.state, (*translation.notes, *notes))
    if not any(key.endswith(".gate") for key in tensors) and (gate_order != "stored" or zero_gates is not None):
        raise CheckpointError("the network has no gates to read: leave --gate-order and --zero-gates out")
    return Translation("state_dict", own | plain, tuple(notes))


def check_keys(model: nn.Module, state: Mapping[str, Tensor], spec: str) -> None:
    """Require that ``state`` has the keys, shapes and kinds of number of ``model``.

    Raises:
        CheckpointError: naming the first that do not fit.
    """
    expected = model.state_dict()
    problems = key_problems({key: tuple(tensor.shape) for key, tensor in expected.items()}, state)
    if problems:
        raise CheckpointError(
            f"its keys are not those of the network that --model {spec} returns: {', '.join(problems)}. Name the "
            "function that built the trained network, or save the whole state dict of this one"
        )
    for key, tensor in expected.items():
        if key in state and state[key].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"key {shown([key])} is {state[key].dtype}, but {tensor.dtype} in the network that --model {spec} "
                "returns: save the state dict of this network"
            )


def load_into(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, spec: str) -> None:
    """Put ``state`` into ``model``, in ``dtype``.

    Raises:
        CheckpointError: if the network does not hold what was put in.
    """
    try:
        model.to(dtype).load_state_dict(with_versions(state, model))
    except Exception as error:  # a network may load as it likes
        raise CheckpointError(f"the network that --model {spec} returns refuses the weights: {error}") from error
    for key, tensor in model.state_dict().items():
        if not torch.equal(tensor, state[key].to(tensor.dtype)):
            raise CheckpointError(
                f"key {shown([key])} is not what the network that --model {spec} returns holds after loading: does it "
                "share this tensor with another key? Save the state dict of this network"
            )


def with_versions(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """``state`` with the versions that the modules of ``model`` have, which some ask for when they are loaded."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]  # torch's own way
    return versioned


def sha256_of(model: nn.Module) -> str:
    """SHA-256 of a state dict: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _imported(spec: str) -> Callable[[], object]:
    module_name, colon, name = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise CheckpointError(f"--model takes package.module:function, such as nets.mine:build, not {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise CheckpointError(
                f"--model {spec}: there is no module {error.name}, neither in the current folder nor installed: run "
                "foldgroup where it can be imported"
            ) from error
        raise CheckpointError(
            f"--model {spec}: importing {module_name} raises {type(error).__name__}: {error}. Make it import"
        ) from error
    try:
        function: Callable[[], object] = operator.attrgetter(name)(module)
    except AttributeError as error:
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise CheckpointError(
            f"--model {spec}: there is no {name} in {module_name}, only {shown(there) or 'nothing to call'}"
        ) from error
    if not callable(function):
        raise CheckpointError(f"--model {spec}: {name} is a {type(function).__name__}, no function: name one")
    return function


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    """The current folder on the path that modules are looked for on, as ``python -m`` has it."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
