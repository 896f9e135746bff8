"""Run a module with PyTorch on the CPU: the training form, or any graph between two passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from foldgroup.errors import RunnerError
from foldgroup.nn.dgconv import DGConv
from foldgroup.outputs import flat
from foldgroup.run.base import Outputs, Runner, check_count

_PRECISIONS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class TorchRunner(Runner):
    """Runs a copy of ``module``, which takes ``rank`` axes, in evaluation mode; the module itself is left as it was.

    ``threads`` holds during this runner's calls only, so that runners with different counts can be interleaved; None
    keeps PyTorch's own setting.

    Raises:
        RunnerError: if ``dtype`` is not a floating-point type of 16 to 64 bits, or ``threads`` is below 1.
    """

    name = "torch"

    def __init__(
        self, module: nn.Module, dtype: torch.dtype = torch.float32, threads: int | None = None, rank: int = 4
    ) -> None:
        if dtype not in _PRECISIONS:
            raise RunnerError(f"cannot run in {dtype}: choose one of {', '.join(map(str, _PRECISIONS))}")
        check_count(threads, "threads")
        self._source = module
        self._dtype = dtype
        self._threads = threads
        self.rank = rank
        self._module: nn.Module | None = None

    def _load(self) -> None:
        self._module = _cast(self._source, self._dtype)

    def _release(self) -> None:
        self._module = None

    def _run(self, inputs: npt.NDArray[np.float32]) -> Outputs:
        assert self._module is not None
        # A copy even in float32: the network may begin with an operation that works in place.
        images = torch.tensor(inputs, dtype=self._dtype)
        try:
            with torch.inference_mode(), torch_threads(self._threads):
                wide = torch.promote_types(self._dtype, torch.float32)
                return tuple(output.to(wide).numpy() for output in flat(self._module(images)))
        except Exception as error:  # a network raises what it likes
            raise RunnerError(f"torch cannot run inputs of shape {list(inputs.shape)}: {error}") from error

    def _describe(self) -> dict[str, str | int]:
        return {
            "version": str(torch.__version__),
            "provider": "cpu",
            "threads": self._threads or torch.get_num_threads(),
            "precision": _PRECISIONS[self._dtype],
        }


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU, in evaluation mode and in ``dtype``, all but the gates of DGConv layers.

    A gate counts by its sign alone and starts at ±1e-8, which float16 rounds to 0: casting it would change the groups.
    """
    copied = copy.deepcopy(module).eval()
    gates = {layer: layer.gate.detach().cpu().clone() for layer in copied.modules() if isinstance(layer, DGConv)}
    copied.to("cpu", dtype)
    for layer, gate in gates.items():
        layer.gate = nn.Parameter(gate)
    return copied


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use ``count`` threads, a setting of the whole process, for a while."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
