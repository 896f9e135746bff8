"""Run an AOTInductor package (``.pt2``) on a CPU or an NVIDIA GPU.

A package is native code, which runs as soon as it is loaded: load only one whose SHA-256 the bundle names. Compiled
code checks nothing, so what can be known beforehand is compared before it is loaded: the device, the processor and its
vector extension, and at each call the shape of the input.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from foldgroup.emit.aotinductor import METADATA, quiet, read_metadata
from foldgroup.errors import EmitError, RunnerError, UnavailableError
from foldgroup.outputs import flat
from foldgroup.run.base import Outputs, Runner, check_count
from foldgroup.run.pytorch import torch_threads

_EXTENSIONS = {"avx512": "avx512_f", "asimd": "neon"}
"""Vector extensions as the compiler names them, where PyTorch names them otherwise."""


class AotInductorRunner(Runner):
    """Runs a package that :func:`foldgroup.emit.aotinductor.build_package` made, given as bytes or as a file.

    It is native code and can do anything: the caller has compared its SHA-256 with the one recorded when it was built.
    ``device`` is cpu or cuda, as the package was built for. ``threads`` holds during this runner's calls only, as a
    setting of the whole process; None keeps PyTorch's own. Calls from several Python threads run one after another.

    Raises:
        RunnerError: if ``device`` is neither, or ``threads`` is below 1.
    """

    name = "aotinductor"

    def __init__(self, package: bytes | Path, device: str = "cpu", threads: int | None = None) -> None:
        if device not in ("cpu", "cuda"):
            raise RunnerError(f"AOTInductor packages run on cpu or cuda, not on {device}")
        check_count(threads, "threads")
        self._package = package
        self._device = device
        self._threads = threads
        self._model: Any = None
        self._metadata: dict[str, str] = {}

    def _load(self) -> None:
        if self._device == "cuda" and not torch.cuda.is_available():
            raise UnavailableError("device cuda is an NVIDIA GPU with its driver: PyTorch finds none here")
        metadata = self._checked_metadata()
        try:
            self._model = self._loaded()
        except Exception as error:
            raise RunnerError(f"torch {torch.__version__} cannot load {self._what()}: {error}") from error
        self._metadata = metadata
        least, greatest = self._numbers("batch")
        self.batch_range, self.rank = (least, greatest), 1 + len(self._numbers("shape"))

    def _release(self) -> None:
        self._model = None

    def _run(self, inputs: npt.NDArray[np.float32]) -> Outputs:
        least, greatest = self._numbers("batch")
        shape = self._numbers("shape")
        if not least <= inputs.shape[0] <= greatest or inputs.shape[1:] != shape:
            batch = str(least) if least == greatest else f"{least} to {greatest}"
            raise RunnerError(
                f"{self._what()} takes inputs of shape [{', '.join([batch, *map(str, shape)])}], "
                f"not {list(inputs.shape)}"
            )
        # A copy: the network may begin with an operation that works in place.
        images = torch.tensor(inputs, device=self._device)
        try:
            with torch.inference_mode(), torch_threads(self._threads):
                return tuple(output.cpu().numpy() for output in flat(self._model(images)))
        except Exception as error:
            raise RunnerError(f"{self._what()} did not run: {error}") from error

    def _describe(self) -> dict[str, str | int]:
        return {
            "version": str(torch.__version__),
            "provider": "cpu" if self._device == "cpu" else f"cuda: {torch.cuda.get_device_name()}",
            "threads": self._threads or torch.get_num_threads(),
            "precision": self._metadata[METADATA + "precision"],
        }

    def _loaded(self) -> Any:
        """The package's code, loaded; PyTorch keeps what it unpacks in a folder that goes with it."""
        with quiet(), tempfile.TemporaryDirectory() as folder:
            from torch._inductor import aoti_load_package

            path = self._package
            if isinstance(path, bytes):
                path = Path(folder, "model.pt2")
                path.write_bytes(self._package)  # type: ignore[arg-type]  # the bytes it is
            return aoti_load_package(str(path))

    def _checked_metadata(self) -> dict[str, str]:
        """What the package says of itself, none of which keeps it from running here."""
        try:
            metadata = read_metadata(self._package)
        except EmitError as error:
            raise RunnerError(f"{self._what()}: {error}") from error
        if METADATA + "shape" not in metadata:
            raise RunnerError(f"{self._what()} was not built by foldgroup: it does not say what inputs it takes")
        device = metadata.get("AOTI_DEVICE_KEY", "")
        if device != self._device:
            raise RunnerError(f"{self._what()} was built for {device}, not for {self._device}")
        kind = (metadata.get("AOTI_PLATFORM", ""), metadata.get("AOTI_MACHINE", ""))
        here = (sys.platform, platform.machine())
        if kind != here:
            raise UnavailableError(
                f"{self._what()} was built for {' '.join(kind)}, and this is {' '.join(here)}: build one here"
            )
        lacking = _lacking(metadata.get("AOTI_CPU_ISA", ""))
        if lacking:
            raise UnavailableError(
                f"{self._what()} needs a processor with {', '.join(lacking)}, which this one has not: build one here"
            )
        return metadata

    def _numbers(self, name: str) -> tuple[int, ...]:
        return tuple(map(int, self._metadata[METADATA + name].split()))

    def _what(self) -> str:
        return "the package" if isinstance(self._package, bytes) else str(self._package)


def _lacking(isa: str) -> list[str]:
    """The vector extensions of ``isa``, such as "AVX512 AVX512_VNNI", that this processor does not have."""
    here: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch does not tell
    extensions = isa.lower().split()
    return [name for name in extensions if here.get(_EXTENSIONS.get(name, name), True) is False]
