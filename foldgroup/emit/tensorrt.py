"""ONNX → TensorRT engine (a *plan*), by TensorRT 10.12 to 11 or by TensorRT-RTX: one interface, two Python modules.

Networks are strongly typed: precision is what the ONNX file says. What differs between the two:

=================  ==================================  =================================================
..                 ``tensorrt_rtx``                    ``tensorrt``
=================  ==================================  =================================================
builds             anywhere, for the GPUs named        on the GPU that will run it, or a compatible one
tactics            chosen when the plan is loaded      timed at build time, remembered in a timing cache
CUDA graphs        only if the plan was built for it   any plan
=================  ==================================  =================================================

What the parser and the builder report reaches the user, with the layer they speak of; nodes are named after the
checkpoint's layers by :mod:`foldgroup.emit.onnx`, and the plan keeps those names. A convolution that the builder has no
kernel for goes down the ladder of :mod:`foldgroup.emit.ladder`.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldgroup.emit.engine import BATCH_RANGE, Engine
from foldgroup.emit.ladder import next_rung
from foldgroup.emit.onnx import INPUT
from foldgroup.errors import EmitError

RTX = "tensorrt_rtx"
"""The module that builds ahead of time; every other one is taken for TensorRT proper."""


def available(module: str = RTX) -> bool:
    """Whether the builder is installed."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def check_capabilities(names: Sequence[str], module: str = RTX) -> None:
    """Refuse compute capabilities the builder does not know, before any work is done.

    Raises:
        EmitError: naming the ones it does know.
    """
    trt = _load(module)
    for name in names:
        _capability(trt, module, name)


def build_engine(
    model: bytes,
    *,
    module: str = RTX,
    compute_capabilities: Sequence[str] = (),
    batch: tuple[int, int, int] = BATCH_RANGE,
    timing_cache: Path | None = None,
    optimization_level: int | None = None,
    workspace_mib: int | None = None,
    tf32: bool = True,
    compatibility: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Build an engine from the bytes of an ONNX file; ``facts`` of the result are its settings and fallbacks.

    ``compute_capabilities`` such as ``["sm80", "sm89"]`` are TensorRT-RTX's; none means its own set. ``compatibility``
    is a level such as ``"ampere_plus"`` of TensorRT proper. ``batch`` is the least, typical and greatest batch, if the
    model's batch is dynamic. ``timing_cache`` is a file to start from and to keep; TensorRT-RTX times nothing (its
    cache operations do nothing since 1.2), so there it is left alone. ``optimization_level`` is 0 to 5 and
    ``workspace_mib`` the scratch memory allowed, in MiB; None leaves each to the builder. Without ``tf32``, float32
    products are not rounded to TensorFloat-32's ten bits, as builders and PyTorch's convolutions do by themselves.

    ``on_progress`` is told (phase, steps done, steps in all) by the builder, from any thread but never from two at
    once; phases nest. What it raises stops the build and is raised here. ``on_step`` is told of every fallback.

    Raises:
        EmitError: if the builder is missing or refuses the network or a setting; the message holds its own words and
            the layer.
    """
    trt = _load(module)
    settings = _Settings(
        module=module,
        compute_capabilities=tuple(_capability(trt, module, name) for name in compute_capabilities),
        batch=_checked_batch(batch),
        timing_cache=_writable(timing_cache) if timing_cache and module != RTX else None,
        optimization_level=_checked("optimisation level", optimization_level, 0, 5),
        workspace_mib=_checked("workspace in MiB", workspace_mib, 1),
        tf32=tf32,
        compatibility=None if compatibility is None else _compatibility(trt, module, compatibility),
    )
    fallbacks: list[str] = []
    while True:
        try:
            plan, dynamic = _build(trt, model, settings, on_progress)
            break
        except _Refused as refused:
            rung = next_rung(model, "\n".join(refused.errors))
            if rung is None:
                tried = f" (after {'; '.join(fallbacks)})" if fallbacks else ""
                raise EmitError(
                    f"{module} {trt.__version__} cannot build the engine{tried}: {_first(refused.errors)}. "
                    f"{'Name other GPUs with --gpu, or leave' if module == RTX else 'Leave'} it out with --no-engine"
                ) from None
            model, step = rung
            fallbacks.append(step)
            on_step(step)
    facts = {
        "compute_capabilities": list(compute_capabilities)
        or ("the builder's own set" if module == RTX else "that of the GPU it was built on"),
        "batch": list(batch) if dynamic else None,
        "optimization_level": optimization_level,
        "workspace_mib": workspace_mib,
        "tf32": tf32,
        "compatibility": compatibility,
        "timing_cache": settings.timing_cache is not None,
        "fallbacks": fallbacks,
    }
    return Engine(plan, module, trt.__version__, facts)


@dataclass(frozen=True)
class _Settings:
    """What :func:`build_engine` was asked for, checked; enum members are the builder's."""

    module: str
    compute_capabilities: tuple[Any, ...]
    batch: tuple[int, int, int]
    timing_cache: Path | None
    optimization_level: int | None
    workspace_mib: int | None
    tf32: bool
    compatibility: Any


class _Refused(Exception):
    """The builder gave no plan. ``errors`` are its words."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(*errors)
        self.errors = errors


def _build(
    trt: Any, model: bytes, settings: _Settings, on_progress: Callable[[str, int, int], None] | None
) -> tuple[bytes, bool]:
    """One attempt: the plan, and whether its batch is dynamic."""
    log = error_log(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # its factory returned nothing
        raise EmitError(
            f"{settings.module} needs an NVIDIA GPU with its driver to build: {_first(log.errors)}. "
            f"Build for named GPUs with {RTX}, which needs none"
        ) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise EmitError(f"{settings.module} cannot read the network: {_parser_errors(parser) or _first(log.errors)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # keeps the layers' names in the plan
    _apply(trt, config, settings)
    dynamic = _set_profile(builder, network, config, settings.batch)
    cache = _open_timing_cache(config, settings.timing_cache) if settings.timing_cache else None
    # Always there: between its calls an interrupt by the user takes effect.
    monitor = _monitor(trt, on_progress or (lambda phase, done, steps: None))
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if settings.timing_cache and cache is not None:  # of a failed attempt too: the next one starts from it
        _write(settings.timing_cache, bytes(cache.serialize()))
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if plan is None:
        raise _Refused(log.errors)
    return bytes(plan), dynamic


def _apply(trt: Any, config: Any, settings: _Settings) -> None:
    if settings.module == RTX:
        # Without it, running may allocate memory, which a CUDA graph cannot hold.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for i, capability in enumerate(settings.compute_capabilities):
            config.set_compute_capability(capability, i)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.compatibility is not None:
        config.hardware_compatibility_level = settings.compatibility


def _set_profile(builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> bool:
    """Add one optimisation profile if the batch is dynamic; returns whether it is."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    shape = next(tuple(tensor.shape) for tensor in inputs if tensor.name == INPUT)
    if shape[0] != -1:
        return False
    profile = builder.create_optimization_profile()
    least, typical, greatest = ((n, *shape[1:]) for n in batch)
    profile.set_shape(INPUT, min=least, opt=typical, max=greatest)
    config.add_optimization_profile(profile)
    return True


def _open_timing_cache(config: Any, path: Path) -> Any:
    """The timing cache stored at ``path``, or an empty one if it is another GPU's or version's."""
    for content in (path.read_bytes() if path.exists() else b"", b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _writable(path: Path) -> Path:
    """Make sure that the timing cache can be kept, before minutes of building."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:  # nothing is left behind by a build that fails
            path.unlink()
    except OSError as error:
        raise EmitError(f"the timing cache {path} cannot be written: {error}") from error
    return path


def _write(path: Path, content: bytes) -> None:
    """Write a file so that another build sees the old one or the new one, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        package = module.replace("_", "-")
        raise EmitError(
            f"{module} is not usable ({error}): install it with 'pip install {package}', or pass --no-engine"
        ) from error


def _capability(trt: Any, module: str, name: str) -> Any:
    if module != RTX:
        raise EmitError(f"--gpu {name}: {module} builds for the GPU at hand; {RTX} builds for named ones")
    known = {member.lower(): value for member, value in trt.ComputeCapability.__members__.items()}
    if name.lower() not in known or name.lower() == "none":
        choices = ", ".join(n for n in known if n.startswith("sm"))
        raise EmitError(f"--gpu {name}: {module} {trt.__version__} builds for {choices}")
    return known[name.lower()]


def _compatibility(trt: Any, module: str, name: str) -> Any:
    if module == RTX:
        raise EmitError(f"hardware compatibility {name}: {module} has no levels; it builds for the GPUs named by --gpu")
    known = {member.lower(): value for member, value in trt.HardwareCompatibilityLevel.__members__.items()}
    if name.lower() not in known:
        raise EmitError(f"hardware compatibility {name}: {module} {trt.__version__} knows {', '.join(known)}")
    return known[name.lower()]


def _checked_batch(batch: tuple[int, int, int]) -> tuple[int, int, int]:
    least, typical, greatest = batch
    if not 1 <= least <= typical <= greatest:
        raise EmitError(f"batch {batch}: give the least, typical and greatest in that order, from 1 up")
    return batch


def _checked(what: str, value: int | None, least: int, greatest: int | None = None) -> int | None:
    if value is not None and (value < least or (greatest is not None and value > greatest)):
        raise EmitError(
            f"{what} {value}: give {least} to {greatest}" if greatest else f"{what} {value}: give 1 or more"
        )
    return value


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"{e.node_name() or 'network'} ({e.node_operator()}): {e.desc()}" for e in errors)


def _first(messages: list[str]) -> str:
    return messages[0] if messages else "it gives no reason"


def error_log(trt: Any) -> Any:
    """A logger of the module ``trt`` that keeps error messages in ``errors`` instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[misc]  # a class of a module known only at run time
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log()


def _monitor(trt: Any, on_progress: Callable[[str, int, int], None]) -> Any:
    """A progress monitor that tells ``on_progress``, and keeps in ``stopped_by`` what that raised."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of a module known only at run time
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.lock = threading.Lock()  # the builder's threads call
            self.stopped_by: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                try:
                    on_progress(phase_name, step + 1, self.steps.get(phase_name, step + 1))
                except BaseException as error:  # an exception would be lost in the builder; False stops it
                    self.stopped_by = error
            return self.stopped_by is None

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()
