"""foldgroup: a deployment compiler for convolutional networks whose channel groups were learned.

::

    import foldgroup

    bundle = foldgroup.compile("checkpoint.pt", "model.foldgroup")
    assert foldgroup.verify("model.foldgroup", "checkpoint.pt")

    bundle = foldgroup.compile(module, "model.foldgroup", example_input=torch.zeros(1, 3, 224, 224))

The names are loaded when first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldgroup.benchmarking import benchmark
    from foldgroup.checkpoint import load_checkpoint as load
    from foldgroup.compiler import compile
    from foldgroup.finetune import folded_for_training
    from foldgroup.inspection import inspect
    from foldgroup.verifier import verify

__version__ = "0.1.0"

__all__ = ["benchmark", "compile", "folded_for_training", "inspect", "load", "verify"]

_WHERE = {
    "benchmark": ("foldgroup.benchmarking", "benchmark"),
    "compile": ("foldgroup.compiler", "compile"),
    "folded_for_training": ("foldgroup.finetune", "folded_for_training"),
    "inspect": ("foldgroup.inspection", "inspect"),
    "load": ("foldgroup.checkpoint", "load_checkpoint"),
    "verify": ("foldgroup.verifier", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'foldgroup' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(import_module(module), attribute)
