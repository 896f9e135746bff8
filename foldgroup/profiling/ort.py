"""Times of every node that ONNX Runtime executes, from its own profile.

It writes one event a node and run, in whole µs, into a file that is read and removed here. The names are those of the
optimised graph: a fused node bears one of the names that were fused, or a new one and only its output the old name.
So the optimised graph is saved too, and both are asked. Whatever runs inside the branch or the body of a node is part
of that node's time.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from foldgroup.profiling.layers import Executed
from foldgroup.profiling.network import CONVERSIONS, VIEWS, Network
from foldgroup.run.base import Outputs
from foldgroup.run.ort import OnnxRuntimeRunner

_MOVES = (*CONVERSIONS, *VIEWS, "Transpose", "ReorderInput", "ReorderOutput", "MemcpyToHost", "MemcpyFromHost")
"""Kinds that may be ONNX Runtime's own: they give a value of the file in another form, and may have its name."""

_KERNEL = "_kernel_time"


class OrtProfiler:
    """Runs ``network`` on inputs [N, C, …] with ONNX Runtime's profile on. Enter it to load."""

    def __init__(self, network: Network, inputs: npt.NDArray[np.float32], threads: int) -> None:
        self._network = network
        self._inputs = inputs
        self._threads = threads
        self._runs = 0
        self._cold: set[int] = set()

    def __enter__(self) -> OrtProfiler:
        """Load the network; raises RunnerError if ONNX Runtime refuses it."""
        self._folder = Path(tempfile.mkdtemp(prefix="foldgroup-"))
        self._runner = _Profiled(self._network, self._threads, self._folder)
        try:
            self._runner.__enter__()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the network and remove all files."""
        self._runner.__exit__(*exception)
        shutil.rmtree(self._folder, ignore_errors=True)

    def outputs(self) -> Outputs:
        """Run once; it does not count."""
        self._cold.add(self._runs)
        self._runs += 1
        return self._runner.outputs(self._inputs)

    def sample(self, rounds: int) -> None:
        """Run ``rounds`` times, after one run that does not count."""
        self.outputs()
        for _ in range(rounds):
            self._runner.outputs(self._inputs)
            self._runs += 1

    def executed(self) -> list[Executed]:
        """The median µs of every node over the runs so far, in the order they run. Can be asked once."""
        import onnx

        path = Path(self._runner.end_profiling())
        events = json.loads(path.read_text())
        graph = onnx.load(self._folder / "optimised.onnx", load_external_data=False).graph
        outputs = {node.name: tuple(node.output) for node in graph.node}
        found: dict[str, list[int]] = {}
        kinds: dict[str, str] = {}
        for event in sorted((e for e in events if e.get("cat") == "Node"), key=lambda e: int(e["ts"])):
            name, kind = str(event["name"]), str(event["args"].get("op_name", ""))
            if name.endswith(_KERNEL):
                name = name.removesuffix(_KERNEL)
                if name in outputs or name == f"{kind}_{event['args'].get('node_index')}":  # not in a subgraph
                    found.setdefault(name, []).append(int(event["dur"]))
                    kinds[name] = kind
        return [
            Executed(kinds[name], self._median(us), self._nodes(name, kinds[name], outputs.get(name, ())))
            for name, us in found.items()
        ]

    def _median(self, us: list[int]) -> float:
        """Of the runs that count."""
        counted = [n for i, n in enumerate(us) if i not in self._cold] if len(us) == self._runs else us
        return float(median(counted))

    def _nodes(self, name: str, kind: str, outputs: tuple[str, ...]) -> frozenset[int]:
        """The nodes of the file that the names speak of."""
        named = self._network.keys_in(name)
        if kind in _MOVES:
            return frozenset(i for i in named if self._network.nodes[i].kind == kind)
        return named.union(*(self._network.keys_in(output) for output in outputs))


class _Profiled(OnnxRuntimeRunner):
    """The runner, with the profile and the optimised graph written into ``folder``.

    Weights are kept out of both graphs, the one that is given and the one that is written: what matters is the nodes.
    """

    def __init__(self, network: Network, threads: int, folder: Path) -> None:
        model, self._weights = network.without_weights()
        super().__init__(model, threads)
        self._folder = folder

    def _session_options(self, ort: Any) -> Any:
        options = super()._session_options(ort)
        options.enable_profiling = True
        options.profile_file_prefix = str(self._folder / "profile")
        options.optimized_model_filepath = str(self._folder / "optimised.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in self._weights.values()]
        options.add_external_initializers(list(self._weights), values)
        return options

    def end_profiling(self) -> str:
        """Stop, and return the path of what was written."""
        return str(self._session.end_profiling())
