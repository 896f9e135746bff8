"""The physical limit of this machine: how fast its runtime multiplies at best, and how fast its memory is.

Both are peaks: the best of many short runs, since whatever disturbs one only makes it slower. ``macs_per_ns`` is what
large dense convolutions and products reach, in the runtime and precision asked for; the fastest kind counts.
``bytes_per_ns`` is what copies and additions of large arrays read and write: larger than the caches, up to
:data:`MOST_CACHE`, since a cache that many processors share is hardly one's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from foldgroup.emit.onnx import INPUT, OPSET
from foldgroup.errors import RunnerError
from foldgroup.run.base import check_count
from foldgroup.targets import TARGETS, Variant, make_runner

RUNTIMES = ("onnxruntime", "openvino")
"""The targets that can be profiled."""

PROBES = (
    # Kernel, channels, extent and layers: each a few ms, weights and activations small enough for the caches.
    (1, 512, 14, 8),
    (1, 256, 28, 8),
    (3, 256, 14, 5),
    (0, 512, 512, 6),
)
"""Dense layers that are tried: convolutions, and where the kernel is 0 products with matrices."""

_FIRST = 16
"""Channels of a probe's input: few, for it counts as no work of the layers and has to be laid out for them."""

MOST_CACHE = 64 << 20
"""Bytes of cache to outgrow, at most."""

_SECONDS = 0.05
"""For every probe, and for each kind of access to memory."""

_STEP = 0.05
"""Of every quantised tensor: how large the values are costs no time."""


@dataclass(frozen=True)
class Limits:
    """Dense multiply-adds per nanosecond, bytes read and written per nanosecond, and what these were measured with."""

    macs_per_ns: float
    bytes_per_ns: float
    how: str

    def least_us(self, macs: int, traffic: int) -> float:
        """The least µs for ``macs`` multiply-adds and ``traffic`` bytes: each overlaps with the other."""
        return max(macs / self.macs_per_ns, traffic / self.bytes_per_ns) / 1000


@functools.cache
def machine_limits(variant: Variant, threads: int) -> Limits:
    """The limits of ``threads`` threads in a runtime on the processor, measured once a process, in about a second.

    Raises:
        RunnerError: if ``variant`` is no runtime on the processor or takes no such precision, if ``threads`` is below
            1, or if the runtime is missing or cannot compute in that precision here.
    """
    check_profiled(variant)
    check_count(threads, "threads")
    rate, probe = max(_rates(variant, threads))
    speed, access = _bandwidth(threads)
    runs = f"{variant}, {threads} thread{'s' * (threads > 1)}"
    return Limits(rate, speed, f"the best of short runs: {probe} in {runs}; {access}")


def check_profiled(variant: Variant) -> None:
    """Refuse what cannot be profiled.

    Raises:
        RunnerError: if ``variant`` is no runtime on the processor or takes no such precision.
    """
    name = variant.target.name
    if name not in RUNTIMES:
        raise RunnerError(f"{name} cannot be profiled layer by layer: choose {' or '.join(RUNTIMES)}")
    if variant.precision not in variant.target.precisions:
        raise RunnerError(f"{name} does not run {variant.precision}: give {', '.join(variant.target.precisions)}")


def _rates(variant: Variant, threads: int) -> Iterator[tuple[float, str]]:
    """Multiply-adds per ns of every probe, and what it is in words."""
    if variant.target is TARGETS["onnxruntime"] and variant.precision == "fp16":
        variant = Variant(variant.target, "fp32")  # which is what it makes of float16
    for kernel, channels, extent, layers in PROBES:
        if kernel == 0 and variant.precision == "int8":
            continue
        model, shape, macs = _probe(kernel, channels, extent, layers, quantised=variant.precision == "int8")
        inputs = np.ones(shape, np.float32)
        with make_runner(variant, model, threads=threads) as runner:
            least = _least_ns(functools.partial(runner.outputs, inputs))
        what = f"convolutions {kernel}×{kernel} of" if kernel else f"products of {extent} rows with"
        yield macs / least, f"{what} {channels} channels{f' at {extent}×{extent}' if kernel else ''}"


def _least_ns(call: Callable[[], object]) -> int:
    call()
    began, least, runs = perf_counter_ns(), 0, 0
    while runs < 3 or perf_counter_ns() - began < _SECONDS * 1e9:
        start = perf_counter_ns()
        call()
        elapsed = max(perf_counter_ns() - start, 1)
        least, runs = min(least or elapsed, elapsed), runs + 1
    return least


def _probe(
    kernel: int, channels: int, extent: int, layers: int, *, quantised: bool
) -> tuple[bytes, tuple[int, ...], int]:
    """An ONNX file of dense layers one after another, the shape of its input, and its multiply-adds."""
    from onnx import TensorProto, helper

    graph = _Probe(quantised)
    value, macs = INPUT, 0
    shape = (1, _FIRST, extent, extent) if kernel else (extent, channels)
    for i in range(layers):
        given = _FIRST if kernel and i == 0 else channels
        if kernel:
            value = graph.conv(value, (channels, given, kernel, kernel))
        else:
            value = graph.node("MatMul", value, graph.weight((given, channels)))
        macs += given * channels * max(kernel, 1) ** 2 * (extent**2 if kernel else extent)
    # Little is given back: the whole result would be copied, and from the layout of the layers.
    value = graph.node("GlobalAveragePool", graph.rounded(value)) if kernel else value
    ports = [(INPUT, shape), (value, (1, channels, 1, 1) if kernel else shape)]
    read, written = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, size)] for name, size in ports)
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "probe", read, written, graph.stored),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    return proto.SerializeToString(), shape, macs


class _Probe:
    """An ONNX graph under construction; ``quantised`` puts int8 before every convolution."""

    def __init__(self, quantised: bool) -> None:
        self.quantised = quantised
        self.nodes: list[Any] = []
        self.stored: list[Any] = []
        self.values = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def conv(self, value: str, shape: tuple[int, ...]) -> str:
        value, weight = self.rounded(value), self.weight(shape)
        if self.quantised:
            weight = self.node("DequantizeLinear", weight, *self._scale(shape[0]), axis=0)
        return self.node("Conv", value, weight, pads=[shape[-1] // 2] * 4)

    def rounded(self, value: str) -> str:
        if not self.quantised:
            return value
        scale = self._scale()
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, *scale), *scale)

    def weight(self, shape: tuple[int, ...]) -> str:
        values = np.resize(self.values, shape) / np.float32(np.sqrt(prod(shape) / shape[0]))
        if self.quantised:
            return self._store(np.clip(np.round(values / _STEP), -127, 127).astype(np.int8))
        return self._store(values)

    def _scale(self, *shape: int) -> tuple[str, str]:
        return self._store(np.full(shape, _STEP, np.float32)), self._store(np.zeros(shape, np.int8))

    def _store(self, values: npt.NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = f"stored{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(values), name))
        return name


@functools.cache
def _bandwidth(threads: int) -> tuple[float, str]:
    """Bytes read and written per ns by ``threads`` threads that share large arrays, and how."""
    size = max(64 << 20, 2 * _cache_bytes())
    arrays = [np.ones(size // 4, np.float32) for _ in range(3)]
    parts = [tuple(np.array_split(array, threads)) for array in arrays]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda a, b, _: np.copyto(b, a), *parts))

        def add() -> None:
            list(pool.map(lambda a, b, c: np.add(a, b, out=c), *parts))

        found = [(2 * size / _least_ns(copy), "copies"), (3 * size / _least_ns(add), "sums")]
    rate, what = max(found)
    return rate, f"{what} of arrays of {size >> 20} MiB, {threads} thread{'s' * (threads > 1)}"


def _cache_bytes() -> int:
    """Of the largest cache that Linux tells of, at most :data:`MOST_CACHE`; 0 elsewhere."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [path.read_text().strip() for path in sizes]
    kib = [int(text[:-1]) * {"K": 1, "M": 1024}[text[-1]] for text in texts if text[:-1].isdigit() and text[-1] in "KM"]
    return min(max(kib, default=0) << 10, MOST_CACHE)
