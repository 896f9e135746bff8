"""What the halves of the scenario share: a double of the library in its place, and errors that must come."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from trt_doubles import Library, call_back


@contextlib.contextmanager
def raises(kind: type[Exception], *words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert all(word in str(error) for word in words), f"{error} lacks one of {words}"
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


class Part:
    """Half of the scenario: ``real`` is the library whose interface counts, ``name`` the module it is taken for."""

    def __init__(self, real: ModuleType, name: str) -> None:
        self.real = real
        self.name = name
        self.rtx = name == "tensorrt_rtx"

    def library(self, script: Mapping[str, Callable[..., Any]]) -> Library:
        double = Library(self.real, script)
        sys.modules[self.name] = double  # type: ignore[assignment]
        return double

    def report(self, log: Any, message: str) -> None:
        for severity in ("WARNING", "ERROR"):
            call_back(log, "log", self.real.ILogger.Severity.__members__[severity], f"{severity}: {message}")
