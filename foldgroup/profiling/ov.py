"""Times of every node that OpenVINO executes, from its counters.

On a CPU a counter tells the mean of all runs since the network was compiled, in whole µs. So the network is compiled
anew for every sample; what its first run took, which prepares weights, is read after that run and taken off the sum.
The median of the samples is left, each the mean of its runs. A node of the compiled network lists the nodes of the file
that it is made of.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from foldgroup.errors import RunnerError
from foldgroup.profiling.layers import Executed
from foldgroup.profiling.network import Network
from foldgroup.run.ov import _compile, _core, _words


class OvProfiler:
    """Runs ``network`` on inputs [N, C, …] with OpenVINO's counters on."""

    def __init__(self, network: Network, inputs: npt.NDArray[np.float32], threads: int, precision: str) -> None:
        self._network = network
        self._inputs = np.ascontiguousarray(inputs)
        self._precision = precision
        # As OpenVinoRunner's, and the counters.
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_NUM_THREADS": threads,
            "PERF_COUNT": True,
        }
        self._us: dict[str, list[float]] = {}
        self._kinds: dict[str, str] = {}
        self._nodes: dict[str, frozenset[int]] = {}

    def __enter__(self) -> OvProfiler:
        """Nothing: every sample loads the network."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is held."""

    def sample(self, rounds: int) -> None:
        """Run ``rounds`` times, after one run that does not count.

        Raises:
            RunnerError: if OpenVINO refuses the network.
        """
        compiled = _compile(_core("CPU"), self._network.model, "CPU", self._precision, self._settings)
        try:
            request = compiled.create_infer_request()
            request.infer({0: self._inputs}, share_inputs=True)
            first = self._read(request)
            for _ in range(rounds):
                request.infer({0: self._inputs}, share_inputs=True)
            mean = self._read(request)
        except RuntimeError as error:
            raise RunnerError(f"OpenVINO could not run the model: {_words(error)}") from error
        for name, us in mean.items():
            self._us.setdefault(name, []).append(max(0.0, (us * (rounds + 1) - first.get(name, 0)) / rounds))
        for node in compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            origins = str(info["originalLayersNames"].value) if "originalLayersNames" in info else ""
            self._nodes[node.get_friendly_name()] = self._network.keys_in(origins)

    def _read(self, request: Any) -> dict[str, float]:
        """Mean µs of every node that was executed, in their order."""
        us: dict[str, float] = {}
        for info in request.get_profiling_info():
            if info.status.name == "EXECUTED":
                name = str(info.node_name)
                us[name] = us.get(name, 0.0) + info.real_time.total_seconds() * 1e6
                self._kinds[name] = str(info.node_type)
        return us

    def executed(self) -> list[Executed]:
        """The µs of every node, in the order they run."""
        return [
            Executed(self._kinds[name], float(median(us)), self._nodes.get(name, frozenset()))
            for name, us in self._us.items()
        ]
