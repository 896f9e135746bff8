"""Engines: what the targets that take no ONNX file run, each built by its own library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldgroup.bundle import file_entry
from foldgroup.emit.engine import BATCH_RANGE, Engine
from foldgroup.errors import EmitError
from foldgroup.lowering import Lowered
from foldgroup.targets import Variant


@dataclass(frozen=True)
class EngineSettings:
    """How engines are built; None leaves a setting to the builder.

    ``gpu`` are the compute capabilities of TensorRT-RTX's plan, such as sm89; ``compatibility`` is the level of
    hardware compatibility of TensorRT's; ``batch`` is the least, typical and greatest batch where it is dynamic.
    """

    gpu: Sequence[str] = ()
    optimization_level: int | None = None
    workspace_mib: int | None = None
    compatibility: str | None = None
    timing_cache: Path | None = None
    batch: tuple[int, int, int] = BATCH_RANGE


def build(
    variant: Variant,
    lowered: Lowered,
    input_shape: tuple[int, ...],
    settings: EngineSettings,
    *,
    fixed_batch: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Engine:
    """The engine of ``variant`` for one network; ``input_shape`` is [N, C, H, W].

    Raises:
        EmitError: if the builder is missing or refuses the network; the message names the variant and the layer.
    """
    try:
        if variant.target.name.startswith("tensorrt"):
            return _tensorrt(variant, lowered, settings, on_step)
        from foldgroup.emit.aotinductor import build_package

        device = "cuda" if variant.target.device == "gpu" else "cpu"
        batch = None if fixed_batch else settings.batch
        return build_package(lowered.graph, input_shape, batch=batch, device=device)
    except EmitError as error:
        raise EmitError(f"{variant}: {error}") from error


def _tensorrt(variant: Variant, lowered: Lowered, settings: EngineSettings, on_step: Callable[[str], None]) -> Engine:
    from foldgroup.emit.tensorrt import build_engine

    rtx = variant.target.module == "tensorrt_rtx"
    return build_engine(
        lowered.model,
        module=variant.target.module,
        compute_capabilities=settings.gpu if rtx else (),
        batch=settings.batch,
        timing_cache=settings.timing_cache,
        optimization_level=settings.optimization_level,
        workspace_mib=settings.workspace_mib,
        compatibility=None if rtx else settings.compatibility,
        on_progress=lambda phase, step, steps: on_step(f"{variant}, {phase} {step} of {steps}"),
        on_step=on_step,
    )


def entry(file: str, variant: Variant, engine: Engine, model: bytes) -> dict[str, Any]:
    """How ``engines.json`` names an engine that was built from the ONNX file ``model``."""
    return {
        "file": file,
        **file_entry(engine.content),
        "target": variant.target.name,
        "precision": variant.precision,
        "builder": engine.builder,
        "version": engine.version,
        "onnx_sha256": file_entry(model)["sha256"],
        **engine.facts,
    }
