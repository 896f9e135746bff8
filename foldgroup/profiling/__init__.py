"""The time of every layer of a compiled network in its runtime, beside the physical limit of this machine.

The **limit** of a layer is the time that this machine cannot go below: its multiply-adds at the rate of the fastest
dense convolution here, or its bytes at the speed of memory, whichever takes longer. The limit of the network is the
sum over its layers, its ``fraction`` the share of the measured time that this makes up: at 1 nothing can be gained
without another network or another precision, and what a layer lies above its own limit says where to look.

What the limit leaves out:

- Caches. Activations that are still in a cache move faster than memory, so where bytes decide, a layer can take less
  time than its limit, and most of the activations of one image do stay in caches.
- The shapes of layers. Narrow groups and few positions cannot fill wide vector instructions: no kernel reaches the
  dense rate there, and the limit does not know.
- Conversions between types, changes of layout and calls: the limit of a network has none of these. That is why they are
  entries of their own, with a limit of 0.
- Layers of another precision: one that stays in float32 in an int8 network is held to the rate of int8.
- Fusions that the runtime does not do: an addition that runs by itself has a limit of its own. One that is fused is
  part of the layer it is fused with, and costs what it reads.
- Algorithms that need fewer multiply-adds, such as Winograd's: they can go below the limit.
- The clock, which falls with heat and with what other cores do, also between the measurement of the limits and that of
  the network.

The network's time is measured without the profile, in turns with runs in which every layer is timed; timing a layer
costs something, so their sum may be above it, and what is outside of layers makes it less.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from foldgroup.measure import interleave
from foldgroup.profiling.layers import LayerTime, layer_times
from foldgroup.profiling.limits import Limits, check_profiled, machine_limits
from foldgroup.profiling.network import Network
from foldgroup.profiling.ort import OrtProfiler
from foldgroup.profiling.ov import OvProfiler
from foldgroup.run.base import check_count
from foldgroup.targets import Variant, make_runner

__all__ = ["LayerTime", "Limits", "Profile", "machine_limits", "profile"]

_ROUNDS = (2, 100)
"""Runs in a turn, at least and at most."""


@dataclass(frozen=True)
class Profile:
    """Where the time of one network goes. ``threads`` are those asked for, ``median_ms`` that of one call."""

    target: str
    precision: str
    threads: int
    batch: int
    median_ms: float
    limits: Limits
    layers: tuple[LayerTime, ...]

    @property
    def limit_ms(self) -> float:
        """The sum of the layers' limits."""
        return sum(layer.limit_us for layer in self.layers) / 1000

    @property
    def fraction(self) -> float:
        """The limit over the time measured: 1 is as fast as this machine can be (see the top of this module)."""
        return self.limit_ms / self.median_ms

    @property
    def macs(self) -> int:
        """Multiply-adds of the whole batch."""
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_per_ns(self) -> float:
        """Multiply-adds per nanosecond over the whole network."""
        return self.macs / self.median_ms / 1e6

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: times of layers in µs, MACs and bytes of the whole batch."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]} | {
            "limit_ms": self.limit_ms,
            "fraction": self.fraction,
        }


def profile(
    variant: Variant,
    model: bytes,
    inputs: npt.NDArray[np.float32],
    threads: int = 1,
    *,
    seconds: float = 4,
    turns: int = 2,
) -> Profile:
    """Time ``model``, an ONNX file, layer by layer on ``inputs`` [N, C, …], for about ``seconds``.

    The network's time and its layers' are measured in so many ``turns``.

    To that come loading, and a second for the limits if they were not measured yet in this process.

    Raises:
        RunnerError: if ``variant`` is no runtime on the processor or takes no such precision, if ``threads`` is below
            1, or if the runtime is missing or refuses the model or the inputs.
    """
    check_profiled(variant)
    check_count(threads, "threads")
    times: list[float] = []
    with ExitStack() as stack, ThreadPoolExecutor(1) as beside:
        runner = make_runner(variant, model, threads=threads)
        loading = beside.submit(stack.enter_context, runner)
        network = Network(model, inputs, variant.precision)
        profiler = _profiler(variant, network, inputs, threads)
        stack.enter_context(profiler)
        loading.result()
        limits = machine_limits(variant, threads)
        for _ in range(turns):
            runner.outputs(inputs)  # which checks them, and warms up
            turn = _turn(partial(runner.outputs, inputs), seconds / turns / 2)
            profiler.sample(len(turn))
            times += turn
        layers = layer_times(network, profiler.executed(), limits)
    return Profile(variant.target.name, variant.precision, threads, len(inputs), float(median(times)), limits, layers)


def _turn(call: Callable[[], object], seconds: float) -> tuple[float, ...]:
    """Times of a network in ms."""
    least, most = _ROUNDS
    measured = interleave({"": call}, warmup=0, min_rounds=least, max_rounds=most, max_seconds=seconds)
    return measured.samples[""]


def _profiler(
    variant: Variant, network: Network, inputs: npt.NDArray[np.float32], threads: int
) -> OrtProfiler | OvProfiler:
    makers: dict[str, Callable[[], OrtProfiler | OvProfiler]] = {
        "onnxruntime": lambda: OrtProfiler(network, inputs, threads),
        "openvino": lambda: OvProfiler(network, inputs, threads, variant.precision),
    }
    return makers[variant.target.name]()
