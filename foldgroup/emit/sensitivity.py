"""Which layers rounding hurts most: measured one layer at a time.

Let e_L² be the mean squared error of the outputs when layer L alone is rounded, less that with no layer rounded (the
additions between them are rounded all the same). Rounding errors of different layers are nearly
independent, so their squares add up: Σ e_L² is about the square of what rounding all of them costs, and keeping a set S
in float saves Σ_{L∈S} e_L². The few largest are kept: the fewest layers that hold half of that sum, and at most a tenth
of all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from foldgroup.run.base import run_all
from foldgroup.run.ort import OnnxRuntimeRunner

SHARE = 0.5
"""Of the sum of squared errors that the kept layers hold."""
MOST = 0.1
"""The largest share of the layers that is kept."""
IMAGES = 16
"""Images that an error is measured on."""


def most_sensitive(
    layers: Sequence[str],
    round_all_but: Callable[[Collection[str]], bytes],
    exact: bytes,
    images: npt.NDArray[np.float32],
    on_step: Callable[[str], None] = lambda _: None,
) -> tuple[str, ...]:
    """The layers to keep in float, most sensitive first.

    ``round_all_but(kept)`` is the ONNX file in which every layer but those ``kept`` is rounded, ``exact`` the file with
    none. ``images`` [N, C, H, W].
    """
    inputs = images[:IMAGES]
    reference = _outputs(exact, inputs)

    def error(kept: Collection[str]) -> float:
        return float(((_outputs(round_all_but(kept), inputs) - reference) ** 2).mean())

    squares, floor = {}, error(layers)
    for number, layer in enumerate(layers, start=1):
        squares[layer] = max(0.0, error([other for other in layers if other != layer]) - floor)
        on_step(f"error of {layer}, {number} of {len(layers)}")
    return choose(squares)


def choose(squares: dict[str, float]) -> tuple[str, ...]:
    """The fewest layers that hold :data:`SHARE` of the sum of squares, and no more than :data:`MOST` of the layers."""
    ranked = sorted(squares, key=lambda layer: squares[layer], reverse=True)
    total = sum(squares.values())
    chosen: list[str] = []
    for layer in ranked[: max(1, int(MOST * len(ranked)))]:
        if sum(squares[c] for c in chosen) >= SHARE * total:
            break
        chosen.append(layer)
    return tuple(chosen)


def _outputs(model: bytes, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    with OnnxRuntimeRunner(model) as runner:
        return run_all(runner, inputs).astype(np.float64)
