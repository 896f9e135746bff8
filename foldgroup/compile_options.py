"""What a compile is asked for, refused before any work where it cannot be done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foldgroup.emit import tensorrt
from foldgroup.engines import EngineSettings
from foldgroup.errors import TargetError
from foldgroup.handover import TRITON
from foldgroup.lowering import AUTO
from foldgroup.targets import Variant, choose, missing


def chosen_variants(
    names: Sequence[str], precisions: Sequence[str], *, engine: bool, gpu: Sequence[str]
) -> tuple[Variant, ...]:
    """What to compile for; refused here, before any work, where it cannot be done.

    Raises:
        TargetError, EmitError: if a target is unknown, not installed, or does not take what is asked of it.
    """
    variants = choose(names, precisions, engines=engine, rtx=bool(gpu))
    for target in {variant.target for variant in variants}:
        reason = missing(target)
        if reason is not None:
            raise TargetError(reason)
    if gpu:
        if not any(variant.target.name == "tensorrt-rtx" for variant in variants):
            raise TargetError("--gpu names the GPUs of a TensorRT-RTX engine: add --target tensorrt-rtx")
        tensorrt.check_capabilities(gpu)
    return variants


def check_options(
    chosen: Sequence[Variant],
    precisions: Sequence[str],
    keep_float: Sequence[str],
    emit: Sequence[str],
    settings: EngineSettings,
    *,
    calibrated: bool,
) -> None:
    """Refuse, before any work, options that do not go together.

    Raises:
        TargetError: naming what to give instead.
    """
    if "int8" in precisions and not calibrated:
        raise TargetError("int8 needs real images to read ranges off: name a folder of them with --calibrate")
    if keep_float and set(precisions) == {"fp32"}:
        raise TargetError("--keep-float says what stays in float32 beside another --precision; fp32 keeps everything")
    if AUTO in keep_float and "int8" not in precisions:
        raise TargetError(f"--keep-float {AUTO} measures what int8 costs: add int8, or name the layers to keep")
    if settings.compatibility is not None and not any(v.target.name == "tensorrt" for v in chosen):
        raise TargetError("--compatibility is TensorRT's: add --target tensorrt (TensorRT-RTX takes --gpu sm80,sm89)")
    for kind in emit:
        if kind != TRITON:
            raise TargetError(f"cannot emit {kind!r}: only {TRITON}")


def check_images(source: Path, shape: Sequence[int]) -> None:
    """Refuse options about images for a network whose input [C, …] is none.

    Raises:
        TargetError: saying what it takes.
    """
    if shape[0] != 3:
        raise TargetError(f"{source}: images have 3 channels, this network takes {shape[0]}: it goes without them")
    if len(shape) != 3 or shape[1] != shape[2]:
        raise TargetError(
            f"{source}: images are prepared as [3, S, S], this network takes {list(shape)}: leave out --calibrate and "
            "--bake-preprocessing"
        )
