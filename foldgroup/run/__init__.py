"""Every runtime that can execute a network, behind one face: :class:`Runner`."""

from foldgroup.run.base import Runner
from foldgroup.run.ort import OnnxRuntimeRunner
from foldgroup.run.pytorch import TorchRunner

__all__ = ["OnnxRuntimeRunner", "Runner", "TorchRunner"]
