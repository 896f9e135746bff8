"""What a compile is asked for, refused before any work where it cannot be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foldgroup.emit import tensorrt
from foldgroup.engines import EngineSettings
from foldgroup.errors import TargetError, TuningError
from foldgroup.handover import TRITON, check_served
from foldgroup.lowering import AUTO
from foldgroup.targets import Variant, choose, missing
from foldgroup.tuned import TuningOptions

INT8_ONLY = ("--calibrate", "--calibration", "--reduce-range")
"""Options that nothing comes of without int8; how many images and where times are kept may be said in any case."""

TENSORRT_ONLY = ("--optimization-level", "--workspace", "--timing-cache")
"""Those that only TensorRT's builder reads, or TensorRT-RTX's."""


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


@dataclass(frozen=True)
class Job:
    """What a compile is asked for, but for how its network is read."""

    chosen: tuple[Variant, ...]
    precisions: tuple[str, ...]
    """The first is that of ``model.onnx``."""
    keep_float: tuple[str, ...]
    batch: int | tuple[int, int, int] | None
    engine: bool
    settings: EngineSettings
    tuning: TuningOptions
    emit: tuple[str, ...]
    bake_preprocessing: bool

    @property
    def fixed_batch(self) -> int | None:
        """None where it is dynamic."""
        return self.batch if isinstance(self.batch, int) else None

    def check(self, given: Mapping[str, bool]) -> None:
        """Refuse, before any work, options that do not go together, or that nothing would come of.

        ``given`` says which were given of those in :data:`INT8_ONLY` and :data:`TENSORRT_ONLY`.

        Raises:
            TargetError, TuningError, EmitError: naming what to give instead.
        """
        tuning, precisions = self.tuning, self.precisions
        if tuning.measure and not tuning.pack:
            raise TuningError(
                "--tune looks for the fastest packing, --no-packing keeps what was learned: give one of them"
            )
        if tuning.vector_width is not None and not tuning.pack:
            raise TargetError(
                "--vector-width says how groups are packed, --no-packing that they are not: give one of them"
            )
        for option in INT8_ONLY:
            if given[option] and "int8" not in precisions:
                raise TargetError(f"{option} has no effect without --precision int8: add that, or leave it out")
        for option in TENSORRT_ONLY:
            if given[option] and not any(v.target.name.startswith("tensorrt") for v in self.chosen):
                raise TargetError(
                    f"{option} is about TensorRT engines, and none is asked for: add a --target that is one"
                )
        if "int8" in precisions and not given["--calibrate"]:
            raise TargetError("int8 needs real images to read ranges off: name a folder of them with --calibrate")
        if self.keep_float and set(precisions) == {"fp32"}:
            raise TargetError(
                "--keep-float says what stays in float32 beside another --precision; fp32 keeps everything"
            )
        if AUTO in self.keep_float and "int8" not in precisions:
            raise TargetError(f"--keep-float {AUTO} measures what int8 costs: add int8, or name the layers to keep")
        if self.settings.compatibility is not None and not any(v.target.name == "tensorrt" for v in self.chosen):
            raise TargetError(
                "--compatibility is TensorRT's: add --target tensorrt (TensorRT-RTX takes --gpu sm80,sm89)"
            )
        for kind in self.emit:
            if kind != TRITON:
                raise TargetError(f"cannot emit {kind!r}: only {TRITON}")
        if self.emit:
            check_served(self.chosen)


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
