"""Convolutions with groups, and times of their executions, as several test files draw them."""

from __future__ import annotations

from hypothesis import strategies as st

from foldgroup.conv_shape import ConvShape, Execution, ShuffleShape
from foldgroup.tuning.race import Timing


def square(channels: int, groups: int, *, size: int = 8, kernel: int = 3, stride: int = 1) -> ConvShape:
    """Of as many inputs as outputs, in two dimensions, padded so that only the stride makes it smaller."""
    return ConvShape(
        channels,
        channels,
        groups,
        kernel=(kernel,) * 2,
        stride=(stride,) * 2,
        padding=(kernel // 2,) * 2,
        dilation=(1, 1),
        size=(size,) * 2,
    )


@st.composite
def convs(draw: st.DrawFn, *, widest: int = 64, most_groups: int = 48) -> ConvShape:
    """Any convolution in one, two or three dimensions that has a result."""
    groups, dimensions = draw(st.integers(1, most_groups)), draw(st.integers(1, 3))

    def extents(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dimensions))

    kernel, padding, dilation, size = extents(1, 5), extents(0, 3), extents(1, 2), extents(1, 12)
    spans = (d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True))
    return ConvShape(
        in_channels=groups * draw(st.integers(1, widest)),
        out_channels=groups * draw(st.integers(1, widest)),
        groups=groups,
        kernel=kernel,
        stride=extents(1, 3),
        padding=padding,
        dilation=dilation,
        size=tuple(map(max, size, spans)),
    )


SHUFFLES = st.builds(
    ShuffleShape, st.integers(1, 2048), st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple)
)


@st.composite
def timing(draw: st.DrawFn) -> Timing:
    """A time with its interval around it."""
    low, ns, high = sorted(draw(st.tuples(*[st.floats(1e-3, 1e12)] * 3)))
    return Timing(ns, low, high, draw(st.integers(1, 10**6)))


def timings(shape: ConvShape | ShuffleShape) -> st.SearchStrategy[dict[Execution, Timing]]:
    """Times of some executions of ``shape``."""
    open_to = shape.executions if isinstance(shape, ConvShape) else (Execution(1),)
    return st.dictionaries(st.sampled_from(open_to), timing(), min_size=1)
