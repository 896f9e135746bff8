"""Where a network can run: every target, the precisions it takes, and how its runner is made.

A *target* is a runtime on a kind of device; a *variant* is a target with a precision. Some runtimes read the ONNX file
as it is; the others run an *engine* that was compiled for them ahead of time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foldgroup.errors import RunnerError, TargetError

if TYPE_CHECKING:
    from foldgroup.run import Runner

PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Target:
    """A runtime on a kind of device. ``takes`` says whether it reads the ONNX file or an engine of its own."""

    name: str
    module: str
    """The Python module that must be there to run it, or to build its engines."""
    package: str
    """What to install for it."""
    takes: Literal["onnx", "engine"]
    precisions: tuple[str, ...]
    suffix: str = ".onnx"
    """Of the file it runs: ``model<suffix>``, or ``model.<precision><suffix>``."""
    device: Literal["cpu", "gpu"] = "cpu"


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        # Its CPU kernels know no bfloat16; float16 networks run there, but as float32 between casts.
        Target("onnxruntime", "onnxruntime", "onnxruntime", "onnx", ("fp32", "fp16", "int8")),
        Target("onnxruntime-cuda", "onnxruntime", "onnxruntime-gpu", "onnx", PRECISIONS, device="gpu"),
        Target("onnxruntime-tensorrt", "onnxruntime", "onnxruntime-gpu", "onnx", PRECISIONS, device="gpu"),
        Target("openvino", "openvino", "openvino", "onnx", PRECISIONS),
        Target("openvino-gpu", "openvino", "openvino", "onnx", PRECISIONS, device="gpu"),
        # float16 there runs, but where the processor has no instructions for it some twenty times as slow as float32.
        Target("aotinductor", "torch", "torch", "engine", ("fp32", "bf16"), ".pt2"),
        Target("aotinductor-cuda", "torch", "torch", "engine", ("fp32", "fp16", "bf16"), ".cuda.pt2", "gpu"),
        Target("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx", "engine", PRECISIONS, ".rtx.plan", "gpu"),
        Target("tensorrt", "tensorrt", "tensorrt", "engine", PRECISIONS, ".plan", "gpu"),
    )
}


@dataclass(frozen=True)
class Variant:
    """A target with a precision."""

    target: Target
    precision: str

    def __str__(self) -> str:
        """As it is printed and recorded: ``openvino int8``."""
        return f"{self.target.name} {self.precision}"


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        TargetError: if there is none; the message lists those there are.
    """
    if name not in TARGETS:
        raise TargetError(f"there is no target {name!r}: choose from {', '.join(TARGETS)}")
    return TARGETS[name]


def parse_precisions(names: Iterable[str]) -> tuple[str, ...]:
    """The precisions named, each once, in that order.

    Raises:
        TargetError: if one is unknown or none is named.
    """
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in PRECISIONS:
            raise TargetError(f"there is no precision {name!r}: choose from {', '.join(PRECISIONS)}")
    if not chosen:
        raise TargetError(f"no precision was named: choose from {', '.join(PRECISIONS)}")
    return chosen


def choose(
    names: Sequence[str], precisions: Sequence[str], *, engines: bool = True, rtx: bool = False
) -> tuple[Variant, ...]:
    """What a network is to be compiled for: every target named, in every precision that it takes, in that order.

    A name is a target's, or TARGET:PRECISION for that one alone. No precision means fp32. Without names it is ONNX
    Runtime, and TensorRT-RTX where it is installed or with ``rtx``, as far as they take the precisions. ``engines``
    False leaves out targets that take one.

    Raises:
        TargetError: if a name is unknown, or if a target or a precision is left without a partner.
    """
    asked = parse_precisions(precisions) if precisions else ()
    if not names:
        usual = [TARGETS["onnxruntime"]]
        if engines and (rtx or missing(TARGETS["tensorrt-rtx"]) is None):
            usual.append(TARGETS["tensorrt-rtx"])
        names = [t.name for t in usual if set(t.precisions) & set(asked or ("fp32",))] or ["onnxruntime"]
    chosen: list[Variant] = []
    for name in names:
        target_name, _, own = name.partition(":")
        target = find_target(target_name)
        if engines or target.takes == "onnx":
            chosen += _variants_of(target, parse_precisions([own]) if own else asked or ("fp32",))
    if not chosen:
        raise TargetError(f"--no-engine leaves nothing of {', '.join(names)}: add a target that reads ONNX files")
    for precision in asked:
        if not any(variant.precision == precision for variant in chosen):
            able = ", ".join(t.name for t in TARGETS.values() if precision in t.precisions)
            raise TargetError(f"{', '.join(names)} cannot run {precision}: add a target that can, such as {able}")
    return tuple(dict.fromkeys(chosen))


def onnx_first(chosen: Sequence[Variant]) -> tuple[Variant, ...]:
    """Targets that read ONNX files before those that take an engine: theirs is the form of ``model.onnx``."""
    return tuple(sorted(chosen, key=lambda variant: variant.target.takes != "onnx"))


def _variants_of(target: Target, precisions: Sequence[str]) -> list[Variant]:
    found = [Variant(target, precision) for precision in precisions if precision in target.precisions]
    if not found:
        raise TargetError(
            f"{target.name} does not run {' or '.join(precisions)}: give it {' or '.join(target.precisions)}"
        )
    return found


def parse_variants(names: Sequence[str], known: Sequence[Variant]) -> tuple[Variant, ...]:
    """The variants that ``names`` ask for: a target, in every precision that it has in ``known``, or TARGET:PRECISION.

    A target that is not in ``known`` but reads ONNX files is taken in every precision of ``known`` that it runs.

    Raises:
        TargetError: if a target or precision is unknown, or does not run what there is.
    """
    chosen: list[Variant] = []
    precisions = tuple(dict.fromkeys(variant.precision for variant in known))
    for name in names:
        target_name, _, precision = name.partition(":")
        target = find_target(target_name)
        if precision:
            chosen += _variants_of(target, parse_precisions([precision]))
            continue
        own = [variant for variant in known if variant.target is target]
        chosen += own or _variants_of(target, precisions)
    return tuple(dict.fromkeys(chosen))


def missing(target: Target) -> str | None:
    """What keeps this Python from using ``target``, with the command that would help; None if nothing does."""
    try:
        importlib.import_module(target.module)
    except (ImportError, OSError) as error:
        return f"{target.name} needs {target.module}, which cannot be imported ({error}): pip install {target.package}"
    return None


def make_runner(variant: Variant, content: bytes, *, threads: int | None = None, streams: int = 1) -> Runner:
    """The runner of ``variant`` for the bytes of its ONNX file or engine; entering it loads them.

    An engine is native code: the caller has compared its SHA-256 with the one recorded when it was built. ``threads``
    are those inside one operation, None for the runtime's own choice; ``streams`` is how many calls may run at a time.

    Raises:
        RunnerError: if the threads or streams make no sense.
    """
    return _RUNNERS[variant.target.name](content, variant.precision, threads, streams)


def _onnxruntime(provider: str) -> Callable[[bytes, str, int | None, int], Runner]:
    def make(content: bytes, precision: str, threads: int | None, streams: int) -> Runner:
        from foldgroup.run.ort import OnnxRuntimeRunner

        return OnnxRuntimeRunner(content, threads, (provider,))

    return make


def _openvino(device: str) -> Callable[[bytes, str, int | None, int], Runner]:
    def make(content: bytes, precision: str, threads: int | None, streams: int) -> Runner:
        from foldgroup.run.ov import OpenVinoRunner

        return OpenVinoRunner(content, threads, device=device, precision=precision, streams=streams)

    return make


def _aotinductor(device: str) -> Callable[[bytes, str, int | None, int], Runner]:
    def make(content: bytes, precision: str, threads: int | None, streams: int) -> Runner:
        from foldgroup.run.aot import AotInductorRunner

        if streams > 1:
            raise RunnerError("an AOTInductor package runs one call at a time: use more threads or a larger batch")
        return AotInductorRunner(content, device=device, threads=threads)

    return make


def _tensorrt(module: str) -> Callable[[bytes, str, int | None, int], Runner]:
    def make(content: bytes, precision: str, threads: int | None, streams: int) -> Runner:
        from foldgroup.run.trt import TensorRtRunner

        if streams > 1:
            raise RunnerError(f"an engine of {module} runs one call at a time here: fill the GPU with a larger batch")
        return TensorRtRunner(content, module=module, precision=precision)

    return make


_RUNNERS: Mapping[str, Callable[[bytes, str, int | None, int], Runner]] = {
    "onnxruntime": _onnxruntime("CPUExecutionProvider"),
    "onnxruntime-cuda": _onnxruntime("CUDAExecutionProvider"),
    "onnxruntime-tensorrt": _onnxruntime("TensorrtExecutionProvider"),
    "openvino": _openvino("CPU"),
    "openvino-gpu": _openvino("GPU"),
    "aotinductor": _aotinductor("cpu"),
    "aotinductor-cuda": _aotinductor("cuda"),
    "tensorrt-rtx": _tensorrt("tensorrt_rtx"),
    "tensorrt": _tensorrt("tensorrt"),
}
