"""ONNX → TensorRT engine (a *plan*), by TensorRT-RTX: built ahead of time, on any machine, for the GPUs named.

TensorRT-RTX has TensorRT's interface and needs no GPU to build. Networks are strongly typed: precision is what the ONNX
file says. One plan covers every compute capability asked for. What the parser and the builder report reaches the user,
with the layer they speak of; nodes are named after the checkpoint's layers by :mod:`foldgroup.emit.onnx`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foldgroup.emit.onnx import INPUT
from foldgroup.errors import EmitError

PLAN = "model.rtx.plan"
"""File name of the engine in a bundle."""

BATCH_RANGE = (1, 8, 32)
"""Least, typical and greatest batch of the optimisation profile."""


@dataclass(frozen=True)
class Engine:
    """A serialised engine and what it was built with."""

    plan: bytes
    builder: str
    version: str
    compute_capabilities: tuple[str, ...]
    """As named, for example sm89; empty for the builder's own set."""
    batch: tuple[int, int, int] | None
    """Least, typical and greatest batch; None for a fixed batch."""


def available(module: str = "tensorrt_rtx") -> bool:
    """Whether the builder is installed."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def check_capabilities(names: Sequence[str], module: str = "tensorrt_rtx") -> None:
    """Refuse compute capabilities the builder does not know, before any work is done.

    Raises:
        EmitError: naming the ones it does know.
    """
    trt = _load(module)
    for name in names:
        _capability(trt, name)


def build_engine(model: bytes, *, compute_capabilities: Sequence[str] = (), module: str = "tensorrt_rtx") -> Engine:
    """Build an engine from the bytes of an ONNX file, for ``compute_capabilities`` such as ``["sm80", "sm89"]``.

    Raises:
        EmitError: if the builder is missing or refuses the network; the message holds its own words and the layer.
    """
    trt = _load(module)
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise EmitError(f"{module} cannot read the network: {_parser_errors(parser) or _first(log.errors)}")
    config = builder.create_builder_config()
    batch = _set_profile(builder, network, config)
    if compute_capabilities:
        config.num_compute_capabilities = len(compute_capabilities)
        for i, name in enumerate(compute_capabilities):
            config.set_compute_capability(_capability(trt, name), i)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EmitError(
            f"{module} {trt.__version__} cannot build the engine: {_first(log.errors)}. "
            "Name other GPUs with --gpu, or leave the engine out with --no-engine"
        )
    return Engine(bytes(plan), module, trt.__version__, tuple(compute_capabilities), batch)


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        package = module.replace("_", "-")
        raise EmitError(
            f"{module} is not usable ({error}): install it with 'pip install {package}', or pass --no-engine"
        ) from error


def _capability(trt: Any, name: str) -> Any:
    known = {member.lower(): value for member, value in trt.ComputeCapability.__members__.items()}
    if name.lower() not in known or name.lower() == "none":
        choices = ", ".join(n for n in known if n.startswith("sm"))
        raise EmitError(f"--gpu {name}: {trt.__name__} {trt.__version__} builds for {choices}")
    return known[name.lower()]


def _set_profile(builder: Any, network: Any, config: Any) -> tuple[int, int, int] | None:
    """One optimisation profile for a dynamic batch; returns its range, or None if the batch is fixed."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    shape = next(tuple(tensor.shape) for tensor in inputs if tensor.name == INPUT)
    if shape[0] != -1:
        return None
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *((n, *shape[1:]) for n in BATCH_RANGE))
    config.add_optimization_profile(profile)
    return BATCH_RANGE


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"{e.node_name() or 'network'} ({e.node_operator()}): {e.desc()}" for e in errors)


def _first(messages: list[str]) -> str:
    return messages[0] if messages else "it gives no reason"


def _logger(trt: Any) -> Any:
    """A logger that keeps errors for our own message instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[misc]  # a class of a module known only at run time
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log()
