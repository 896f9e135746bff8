"""Every runtime that can execute a network, behind one face: :class:`Runner`."""

from foldgroup.run.aot import AotInductorRunner
from foldgroup.run.base import Runner
from foldgroup.run.ort import OnnxRuntimeRunner
from foldgroup.run.ov import OpenVinoRunner
from foldgroup.run.pytorch import TorchRunner
from foldgroup.run.trt import TensorRtRunner

__all__ = ["AotInductorRunner", "OnnxRuntimeRunner", "OpenVinoRunner", "Runner", "TensorRtRunner", "TorchRunner"]
