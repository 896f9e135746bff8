"""``torch`` with a double of ``torch.cuda``, for code that runs on a GPU to be tried where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch


class FakeStream:
    cuda_stream = 7

    def synchronize(self) -> None:
        pass


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        self.recorded = False

    def record(self, stream: FakeStream) -> None:
        self.recorded = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.recorded and end.recorded
        return 1.5


class FakeCuda:
    """The part of ``torch.cuda`` that a runner needs. Work runs when queued, or when the graph it is in is replayed."""

    Stream, Event = FakeStream, FakeEvent

    def __init__(self) -> None:
        self.available = True
        self.fails = False
        self.replays = 0
        self.capturing: Any = None

    def is_available(self) -> bool:
        return self.available

    def get_device_name(self) -> str:
        return "Fake GPU"

    def stream(self, stream: FakeStream) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def queue(self, work: Callable[[], None]) -> None:
        if self.capturing is None:
            work()
        else:
            self.capturing.work.append(work)

    def CUDAGraph(self) -> SimpleNamespace:
        graph = SimpleNamespace(work=[])

        def replay() -> None:
            self.replays += 1
            for work in graph.work:
                work()

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def graph(self, graph: SimpleNamespace, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


class FakeTorch:
    """``torch`` with a double of ``torch.cuda``; tensors of the GPU are in main memory."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.dtypes: set[torch.dtype] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", pin_memory: bool = False) -> Any:
        assert (device == "cuda") != pin_memory
        self.dtypes.add(dtype)
        return torch.zeros(shape, dtype=dtype)

    empty = zeros
