"""The face that all runtimes share: enter to load, run images, exit to release.

::

    with OnnxRuntimeRunner(Path("model.onnx"), threads=1) as runner:
        logits = runner.run(images)         # [N, C, H, W] float32 → [N, classes]
        every = runner.outputs(images)      # of a network with several outputs, in its order
        print(runner.describe())            # what really ran

A new runtime is a subclass with four short methods; what every runtime must refuse is refused here.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from foldgroup.errors import RunnerError, UnavailableError

if TYPE_CHECKING:
    from typing_extensions import Self


Outputs = tuple[npt.NDArray[Any], ...]
"""What a network gives for one input: an array for every output, in its order, the batch first in each."""

_AXES = ("N", "C", "D", "H", "W")


class Runner(ABC):
    """A network loaded into one runtime. Building a runner is cheap; entering it loads or compiles the network.

    A runner can be entered again after it was left, but not while it is open.
    """

    name: ClassVar[str]
    """The runtime's short name."""

    batch_range: tuple[int, int] | None = None
    """Least and greatest batch that the network takes; None for any. Known once the runner is open."""

    rank = 4
    """Axes of the input, the batch among them. Known once the runner is open."""

    _open = False

    def __enter__(self) -> Self:
        """Load the network.

        Raises:
            RunnerError: if the runtime is missing or refuses the network, or if the runner is open already.
        """
        if self._open:
            raise RunnerError(f"this {self.name} runner is open already: make a second one")
        self._load()
        self._open = True
        return self

    def __exit__(self, *exception: object) -> None:
        """Release what :meth:`__enter__` loaded."""
        self._open = False
        self._release()

    def run(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """The only output, such as logits [N, classes] of images [N, C, H, W].

        It is float64 from a runner in float64, else float32.

        Raises:
            RunnerError: as :meth:`outputs`, or if the network has several outputs.
        """
        return _only(self.outputs(inputs))

    def outputs(self, inputs: npt.NDArray[np.float32]) -> Outputs:
        """Every output, in the network's order.

        Raises:
            RunnerError: if the inputs are no float32 array of as many axes as the network takes (:attr:`rank`), or if
                it does not take their shape.
        """
        self._check_open()
        if inputs.ndim != self.rank or inputs.dtype != np.float32:
            raise RunnerError(
                f"{self.name} runner got inputs of type {inputs.dtype} and shape {list(inputs.shape)}: "
                f"give it float32 {'images' if self.rank == 4 else 'arrays'} of shape {_shape_in_words(self.rank)}"
            )
        return self._run(np.ascontiguousarray(inputs))

    def describe(self) -> dict[str, str | int]:
        """What really runs: ``runtime``, ``version``, ``provider``, ``threads`` and ``precision``.

        Raises:
            RunnerError: if the runner is not open.
        """
        self._check_open()
        return {"runtime": self.name, **self._describe()}

    def _check_open(self) -> None:
        if not self._open:
            raise RunnerError(f"this {self.name} runner is not open: use it inside 'with runner:'")

    @abstractmethod
    def _load(self) -> None:
        """Load or compile the network."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of what was loaded."""

    @abstractmethod
    def _run(self, inputs: npt.NDArray[np.float32]) -> Outputs:
        """Run contiguous float32 inputs [N, C, …]."""

    @abstractmethod
    def _describe(self) -> dict[str, str | int]:
        """All entries of :meth:`describe` but the runtime's name."""


def check_count(count: int | None, what: str) -> None:
    """Refuse to run on fewer than one of ``what``, such as threads; None is the runtime's own choice.

    Raises:
        RunnerError: if ``count`` is below 1.
    """
    if count is not None and count < 1:
        raise RunnerError(f"cannot run on {count} {what}: give 1 or more")


def fits(shape: Sequence[int], declared: Sequence[int | str | None]) -> bool:
    """Whether a shape agrees with a declared one, whose free axes have a name or None."""
    if len(shape) != len(declared):
        return False
    return all(not isinstance(want, int) or have == want for have, want in zip(shape, declared, strict=True))


def run_all(runner: Runner, inputs: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """The only output, such as logits [N, classes], for inputs [N, C, …] of any N.

    Raises:
        RunnerError: as :meth:`Runner.run`.
    """
    return _only(all_outputs(runner, inputs))


def all_outputs(runner: Runner, inputs: npt.NDArray[np.float32]) -> Outputs:
    """Every output for inputs [N, C, …] of any N: in parts that the network takes, a short one filled up.

    Raises:
        RunnerError: as :meth:`Runner.outputs`.
    """
    least, greatest = runner.batch_range or (1, len(inputs))
    results = []
    for start in range(0, len(inputs), greatest):
        part = inputs[start : start + greatest]
        filled = part[np.arange(max(least, len(part))) % len(part)]
        results.append([output[: len(part)] for output in runner.outputs(filled)])
    return tuple(np.concatenate(parts) for parts in zip(*results, strict=True))


def _only(outputs: Outputs) -> npt.NDArray[Any]:
    if len(outputs) != 1:
        raise RunnerError(f"the network has {len(outputs)} outputs, and one is wanted here: ask for all of them")
    return outputs[0]


def _shape_in_words(rank: int) -> str:
    """``[N, C, H, W]`` for 4 axes."""
    names = {3: ("N", "C", "L"), 4: ("N", "C", "H", "W")}.get(rank, _AXES[:rank])
    return f"[{', '.join(names)}{', …' * (rank > len(names))}]"


def fixed_batch(declared: Sequence[int | str | None]) -> tuple[int, int] | None:
    """The batch range of an input declared with a fixed batch; None if its first axis is free."""
    return (declared[0], declared[0]) if isinstance(declared[0], int) else None


def import_runtime(module: str, package: str) -> Any:
    """Import a runtime at the moment it is needed.

    Raises:
        UnavailableError: if it cannot be imported; the message has the command that installs ``package``.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise UnavailableError(f"cannot import {module} ({error}): run 'pip install {package}'") from error
