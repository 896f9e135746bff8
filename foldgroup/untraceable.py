"""Why a network cannot be traced: the line of its code that stops torch.fx, and the way around it.

torch.fx calls ``forward`` with a *proxy* in place of the input, which writes down what is done with it. It has no
value, so whatever asks for one fails, deep inside torch.fx; the line that asked is further up.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import fx

_TORCH, _OURS = Path(torch.__file__).parent, Path(__file__).parent
_WRAP = "wrap the function that does it with torch.fx.wrap"
_OF_SHAPE = ("shape", "ndim", "size", "dim", "numel")


def why(model: str, error: BaseException) -> str:
    """``error``, raised when the network called ``model`` was traced, as a message: where, what, and what to do."""
    what, instead = _cause(error)
    return f"{model} cannot be traced{_where(error)}: {what}. {instead[0].upper()}{instead[1:]}"


def _cause(error: BaseException) -> tuple[str, str]:
    """What forward() does that cannot be traced, and what to do instead."""
    text = str(error)
    if isinstance(error, fx.proxy.TraceError) and "iterated" in text:
        return (
            "it loops over a tensor, or over what a function returned",
            f"loop over a number that is known beforehand and take the parts by index, or {_WRAP}",
        )
    if isinstance(error, fx.proxy.TraceError) and "control flow" in text:
        if _asks_for_shape(error):
            return (
                "it decides by the shape of a tensor",
                f"the shape is fixed when the network is compiled: decide by a setting of the module, or {_WRAP}",
            )
        return (
            "it decides by the value of a tensor",
            f"choose between values with torch.where, move the decision out of forward(), or {_WRAP}",
        )
    if "'len' is not supported" in text:
        return "it asks for the len() of a tensor", f"use x.shape[0], or {_WRAP}"
    if isinstance(error, TypeError) and "Proxy" in text:
        return (
            "it wants a tensor's value or size as a Python number",
            f"make the number a setting of the module, compute with tensors alone, or {_WRAP}",
        )
    if "__array" in text or "array_interface" in text:
        return "it hands a tensor to numpy, or to Python", f"use operations of torch, or {_WRAP}"
    return (
        f"it raises {type(error).__name__}: {text}",
        f"tracing calls forward() without values; if it runs on a tensor, {_WRAP}",
    )


def _where(error: BaseException) -> str:
    """The innermost line that is neither torch's nor ours, as " at file:line, 'text'"; else of torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not Path(frame.filename).is_relative_to(_OURS)]
    for not_of in (_TORCH, _TORCH / "fx"):
        for frame in reversed(outside):
            path = Path(frame.filename)
            if not path.is_relative_to(not_of):
                text = f", '{frame.line}'" if frame.line else ""
                return f" at {'/'.join(path.parts[-2:])}:{frame.lineno}{text}"
    return ""


def _asks_for_shape(error: BaseException) -> bool:
    """Whether the proxy that was asked for its truth stands for sizes alone."""
    for frame in reversed(list(_frames(error))):
        if frame.f_code.co_name == "__bool__" and isinstance(frame.f_locals.get("self"), fx.Proxy):
            return _is_of_shape(frame.f_locals["self"].node)
    return False


def _is_of_shape(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return len(node.args) > 1 and node.args[1] in _OF_SHAPE
    if node.op == "call_method" and node.target in _OF_SHAPE:
        return True
    return bool(node.all_input_nodes) and all(map(_is_of_shape, node.all_input_nodes))


def _frames(error: BaseException) -> Iterator[FrameType]:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield frame
