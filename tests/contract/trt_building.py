"""Half of the scenario: every line of ``emit/tensorrt.py``, run against doubles, results checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from convs import conv_model
from trt_doubles import call_back
from trt_part import Part, raises

from foldgroup.errors import EmitError

REFUSAL = "Could not find any implementation for node grouped + relu. In computeCosts"


class Building(Part):
    """``build_engine`` with every option, and every way in which it is refused."""

    def __init__(self, real: ModuleType, name: str, emit: ModuleType, folder: Path) -> None:
        super().__init__(real, name)
        self.emit = emit
        self.folder = folder
        self.shape = (-1, 4, 6, 6)
        self.refusals = 0
        self.profiles: list[Any] = []
        self.caches: list[bytes] = []
        self.capabilities: list[Any] = []
        self.pools: list[Any] = []
        self.flags: list[Any] = []
        self.cleared: list[Any] = []
        self.progress: list[tuple[str, int, int]] = []

    def check_all(self) -> None:
        self.every_option()
        self.fixed_batch()
        self.ladder()
        self.settings_of_the_other_kind()
        self.no_gpu()
        self.parser_refuses()
        self.callback_stops()
        if not self.rtx:
            self.stale_cache()

    def script(self) -> dict[str, Callable[..., Any]]:
        def network(builder: Any, flags: int) -> Any:
            assert flags == 1 << int(self.real.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            return builder.library.make("INetworkDefinition")

        return {
            "Builder.create_network": network,
            "OnnxParser.parse": lambda parser, model: onnx.load_from_string(model) is not None,
            "INetworkDefinition.num_inputs": lambda network: 1,
            "ITensor.name": lambda tensor: "input",
            "ITensor.shape": lambda tensor: self.shape,
            "IOptimizationProfile.set_shape": lambda profile, *values: self.profiles.append(values),
            "IBuilderConfig.create_timing_cache": lambda config, content: (
                self.caches.append(content) or config.library.make("ITimingCache")
            ),
            "IBuilderConfig.set_memory_pool_limit": lambda config, *values: self.pools.append(values),
            "IBuilderConfig.set_flag": lambda config, flag: self.flags.append(flag),
            "IBuilderConfig.clear_flag": lambda config, flag: self.cleared.append(flag),
            **({"IBuilderConfig.set_compute_capability": self.capability} if self.rtx else {}),
            "Builder.build_serialized_network": self.build,
        }

    def capability(self, config: Any, capability: Any, index: int) -> bool:
        assert index < config.num_compute_capabilities
        self.capabilities.append((index, capability))
        return True

    def build(self, builder: Any, network: Any, config: Any) -> Any:
        monitor = config.progress_monitor
        assert config.profiling_verbosity == self.real.ProfilingVerbosity.DETAILED
        call_back(monitor, "phase_start", "Building", None, 2)
        going = call_back(monitor, "step_complete", "Building", 0) and call_back(
            monitor, "step_complete", "Building", 1
        )
        call_back(monitor, "phase_finish", "Building")
        if not going:
            return None
        if self.refusals:
            self.refusals -= 1
            self.report(builder.given[0], REFUSAL)
            return None
        return builder.library.make("IHostMemory")

    def call(self, **options: Any) -> Any:
        return self.emit.build_engine(conv_model(groups=4, channels=4, size=6), module=self.name, **options)

    def every_option(self) -> None:
        library = self.library(self.script())
        cache = self.folder / "new" / "cache"
        own: dict[str, Any] = (
            {"compute_capabilities": ["sm80", "SM89"]} if self.rtx else {"compatibility": "ampere_plus"}
        )
        engine = self.call(
            batch=(2, 3, 5),
            timing_cache=cache,
            optimization_level=4,
            workspace_mib=512,
            tf32=False,
            on_progress=lambda *step: self.progress.append(step),
            **own,
        )
        assert engine.content == b"content of host memory"
        assert (engine.builder, engine.version) == (self.name, self.real.__version__)
        json.dumps(engine.facts)
        assert engine.facts["batch"] == [2, 3, 5] and engine.facts["fallbacks"] == []
        assert engine.facts["timing_cache"] is not self.rtx
        assert self.profiles == [("input", (2, 4, 6, 6), (3, 4, 6, 6), (5, 4, 6, 6))]
        assert self.progress == [("Building", 1, 2), ("Building", 2, 2)]
        assert self.pools == [(self.real.MemoryPoolType.WORKSPACE, 512 << 20)]
        assert self.cleared == [self.real.BuilderFlag.TF32]
        assert library.writes.count("builder_optimization_level") == 1
        if self.rtx:
            members = self.real.ComputeCapability
            assert self.capabilities == [(0, members.SM80), (1, members.SM89)]
            assert self.flags == [self.real.BuilderFlag.REQUIRE_USER_ALLOCATION]
            assert not cache.exists() and not self.caches
        else:
            assert self.flags == [] and "hardware_compatibility_level" in library.writes
            assert self.caches == [b""]
            assert cache.read_bytes() == b"content of host memory"
            self.call(timing_cache=cache)
            assert self.caches == [b"", b"content of host memory"]
            assert [path.name for path in cache.parent.iterdir()] == ["cache"]

    def fixed_batch(self) -> None:
        self.shape, self.profiles = (1, 4, 6, 6), []
        self.library(self.script())
        assert self.call().facts["batch"] is None and self.profiles == []
        self.shape = (-1, 4, 6, 6)

    def ladder(self) -> None:
        """Four groups: refused, two: refused, dense: built. Then refused for good."""
        self.library(self.script())
        self.refusals, steps = 2, []
        engine = self.call(on_step=steps.append)
        assert steps == engine.facts["fallbacks"]
        assert len(steps) == 2 and "dense" in steps[1]
        self.refusals = 9
        with raises(EmitError, REFUSAL, "dense", self.real.__version__):
            self.call()
        self.refusals = 0

    def settings_of_the_other_kind(self) -> None:
        self.library(self.script())
        with raises(EmitError, "sm89" if self.rtx else "GPU at hand"):
            self.emit.check_capabilities(["sm42"], self.name)
        with raises(EmitError, "no levels" if self.rtx else "ampere_plus"):
            self.call(compatibility="unheard")
        assert self.emit.available(self.name)

    def no_gpu(self) -> None:
        def refuse(builder: Any, log: Any) -> None:
            self.report(log, "no driver")
            raise TypeError("factory function returned nullptr")

        self.library({**self.script(), "Builder.__init__": refuse})
        with raises(EmitError, "ERROR: no driver"):
            self.call()

    def parser_refuses(self) -> None:
        script = {
            **self.script(),
            "OnnxParser.parse": lambda parser, model: False,
            "OnnxParser.num_errors": lambda parser: 1,
            "ParserError.node_name": lambda error: "layer",
            "ParserError.node_operator": lambda error: "Unheard",
            "ParserError.desc": lambda error: "no such operator",
        }
        self.library(script)
        with raises(EmitError, "layer (Unheard): no such operator"):
            self.call()

    def callback_stops(self) -> None:
        class Stop(Exception):
            pass

        def stop(phase: str, done: int, steps: int) -> None:
            raise Stop(phase)

        self.library(self.script())
        with raises(Stop, "Building"):
            self.call(on_progress=stop)

    def stale_cache(self) -> None:
        self.library({**self.script(), "IBuilderConfig.set_timing_cache": lambda config, cache, ignore_mismatch: False})
        path, self.caches = self.folder / "stale", []
        path.write_bytes(b"of another GPU")
        self.call(timing_cache=path)
        assert self.caches == [b"of another GPU", b""]
        assert path.read_bytes() == b"of another GPU"
