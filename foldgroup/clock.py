"""How long the steps of a compile take."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Tells ``on_step`` of every step as it ends, and keeps in ``seconds`` how many each took."""

    def __init__(self, on_step: Callable[[str], None]) -> None:
        self.on_step = on_step
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str) -> None:
        """The step ``step`` has ended: it took the time since the one before."""
        now = time.perf_counter()
        self.seconds[step] = round(self.seconds.get(step, 0.0) + now - self.last, 3)
        self.last = now
        self.on_step(step)
