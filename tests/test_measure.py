from __future__ import annotations

import gc
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnext50_32x4d

from foldgroup import measure
from foldgroup.errors import TraceError
from foldgroup.measure import Measurement, interleave
from foldgroup.nn import DGConv, DGConv1d, DGConv2d, DGConv3d
from tests.strategies import quick


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DGConv) or super().is_leaf_module(m, module_qualified_name)


def graph_of(model: nn.Module, *shape: int) -> fx.GraphModule:
    """A graph with ``meta["shape"]`` on every node, made without foldgroup.trace."""
    graph = fx.GraphModule(model.eval(), _Tracer().trace(model))
    device = next((p.device for p in model.parameters()), None)
    ShapeProp(graph).propagate(torch.zeros(shape, device=device))
    for node in graph.graph.nodes:
        node.meta["shape"] = tuple(node.meta["tensor_meta"].shape)
    return graph


class Functional(nn.Module):
    """A layer's function, called with the layer's tensors."""

    def __init__(self, layer: nn.Module, by_name: bool) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        name = "linear" if isinstance(layer, nn.Linear) else type(layer).__name__.replace("T", "_t").lower()
        self.function = getattr(functional, name)
        self.more: dict[str, int] = {}
        if not isinstance(layer, nn.Linear):
            before_groups = "output_padding" if layer.transposed else "dilation"
            self.more = {"stride": 1, "padding": 0, before_groups: int(not layer.transposed), "groups": layer.groups}
        self.by_name = by_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_name:
            result = self.function(input=x, weight=self.weight, bias=self.bias, **self.more)
        else:
            result = self.function(x, self.weight, self.bias, *self.more.values())
        assert isinstance(result, fx.Proxy)
        return result


class TestCosts:
    def test_resnext50_agrees_with_torch(self) -> None:
        with torch.device("meta"):
            model = resnext50_32x4d().eval()
        with FlopCounterMode(display=False) as flops:
            model(torch.zeros(2, 3, 64, 64, device="meta"))
        graph = graph_of(model, 2, 3, 64, 64)
        costs = measure.layer_costs(graph)
        assert 2 * measure.macs(graph) * 2 == flops.get_total_flops()  # two FLOPs a MAC, two images
        assert measure.macs(graph) == sum(cost.macs for cost in costs)
        assert measure.params(graph) == sum(p.numel() for p in model.parameters())
        assert len(costs) == 54
        assert {cost.groups for cost in costs} == {1, 32}

    @pytest.mark.parametrize(
        "layer, shape",
        [
            (nn.Conv2d(6, 8, (3, 5), stride=2, padding=1, groups=2), (3, 6, 9, 11)),
            (nn.Conv2d(6, 6, 3, dilation=2, groups=6, bias=False), (1, 6, 9, 9)),
            (nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2), (3, 6, 5, 7)),
            (nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2), (3, 6, 9)),
            (nn.Conv3d(6, 8, (1, 3, 2), groups=2), (3, 6, 2, 5, 4)),
            (nn.ConvTranspose1d(6, 8, 3, stride=2, output_padding=1), (3, 6, 5)),
            (nn.ConvTranspose3d(6, 8, 2, groups=2, bias=False), (3, 6, 2, 3, 4)),
            (nn.Linear(6, 10), (3, 6)),
            (nn.Linear(6, 10, bias=False), (2, 4, 6)),
        ],
        ids=str,
    )
    def test_one_layer_agrees_with_torch(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        graph = graph_of(nn.Sequential(layer), *shape)
        with FlopCounterMode(display=False) as flops:
            layer(torch.zeros(shape))
        (cost,) = measure.layer_costs(graph)
        assert 2 * cost.macs * shape[0] == flops.get_total_flops()
        assert cost.params == measure.params(graph) == sum(p.numel() for p in layer.parameters())

    def test_entries_name_the_layers_in_the_order_they_run(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2),
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 2, 1),
            nn.Flatten(),
            nn.Linear(2 * 16, 5),
        )
        costs = measure.layer_costs(graph_of(model, 1, 4, 6, 6))
        assert costs == (
            measure.LayerCost("0", "conv", 4, 8, 2, macs=16 * 8 * 2 * 9, params=8 * 2 * 9 + 8),
            measure.LayerCost("2", "conv_transpose", 8, 2, 1, macs=16 * 8 * 2, params=8 * 2 + 2),
            measure.LayerCost("4", "linear", 32, 5, 1, macs=32 * 5, params=32 * 5 + 5),
        )
        assert measure.grouped_macs(costs) == costs[0].macs

    @pytest.mark.parametrize("dimensions, kind", [(1, DGConv1d), (2, DGConv2d), (3, DGConv3d)])
    def test_dgconv_is_dense_as_trained_and_its_gates_are_no_parameters(
        self, dimensions: int, kind: type[DGConv]
    ) -> None:
        graph = graph_of(nn.Sequential(kind(8, 8, 3, padding=1)), 1, 8, *[4] * dimensions)
        (cost,) = measure.layer_costs(graph)
        assert (cost.groups, cost.macs) == (1, 4**dimensions * 8 * 8 * 3**dimensions)
        assert cost.params == measure.params(graph) == 8 * 8 * 3**dimensions + 8

    @pytest.mark.parametrize(
        "layer, shape",
        [
            (nn.Conv1d(6, 8, 3, groups=2), (3, 6, 9)),
            (nn.Conv2d(6, 8, (3, 5), groups=2), (3, 6, 9, 11)),
            (nn.Conv3d(6, 8, 2, bias=False), (3, 6, 2, 3, 4)),
            (nn.ConvTranspose1d(6, 8, 3), (3, 6, 5)),
            (nn.ConvTranspose2d(6, 8, 3, groups=2), (3, 6, 5, 7)),
            (nn.ConvTranspose3d(6, 8, 2, groups=2, bias=False), (3, 6, 2, 3, 4)),
            (nn.Linear(6, 10), (3, 6)),
            (nn.Linear(6, 10, bias=False), (2, 4, 6)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("by_name", [False, True])
    def test_a_functional_call_costs_what_the_layer_does(
        self, layer: nn.Module, shape: tuple[int, ...], by_name: bool
    ) -> None:
        graph = graph_of(Functional(layer, by_name), *shape)
        (cost,) = measure.layer_costs(graph)
        (expected,) = measure.layer_costs(graph_of(nn.Sequential(layer), *shape))
        (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
        assert cost == replace(expected, name=node.name)
        assert measure.params(graph) == cost.params

    def test_a_functional_call_s_weight_may_be_a_buffer_or_a_single_row_but_not_computed(self) -> None:
        class Calls(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.row, self.learned = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 1, 3))
                self.register_buffer("fixed", torch.ones(4, 1, 3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = functional.conv1d(x, self.fixed, groups=4)  # type: ignore[arg-type]
                x = functional.conv1d(x, self.learned.abs(), groups=4)
                return functional.linear(x.mT, self.row)

        assert measure.layer_costs(graph_of(Calls(), 2, 4, 7)) == (
            measure.LayerCost("conv1d", "conv", 4, 4, 4, macs=5 * 4 * 3, params=0),
            measure.LayerCost("linear", "linear", 4, 1, 1, macs=3 * 4, params=4),
        )

    def test_shared_layers_cost_time_twice_and_memory_once(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(4, 4, 1)
                self.tied = nn.Conv2d(4, 4, 1, bias=False)
                self.tied.weight = self.conv.weight
                self.scale = nn.Parameter(torch.ones(1))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = self.tied(self.conv(self.conv(x))) * self.scale
                return y

        graph = graph_of(Twice(), 1, 4, 2, 2)
        assert [cost.name for cost in measure.layer_costs(graph)] == ["conv", "conv", "tied"]
        assert measure.macs(graph) == 3 * 4 * 16
        assert measure.params(graph) == 16 + 4 + 1

    def test_one_module_under_two_names_counts_both_calls(self) -> None:
        conv = nn.Conv2d(4, 4, 1)
        graph = graph_of(nn.Sequential(conv), 1, 4, 2, 2)
        graph.add_submodule("again", conv)
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        with graph.graph.inserting_before(output):
            node = graph.graph.call_module("again", (output.args[0],))
        node.meta["shape"] = (1, 4, 2, 2)
        output.args = (node,)
        assert [cost.name for cost in measure.layer_costs(graph)] == ["0", "again"]
        assert measure.params(graph) == 20

    def test_a_layer_that_no_node_calls_is_no_part_of_the_network(self) -> None:
        graph = graph_of(nn.Sequential(nn.Conv2d(4, 4, 1)), 1, 4, 2, 2)
        graph.add_submodule("unused", nn.Conv2d(4, 4, 1))
        assert measure.params(graph) == 20
        assert len(measure.layer_costs(graph)) == 1

    def test_a_missing_shape_is_named(self) -> None:
        graph = graph_of(nn.Sequential(nn.Conv2d(4, 4, 1)), 1, 4, 2, 2)
        for node in graph.graph.nodes:
            del node.meta["shape"]
        with pytest.raises(TraceError, match="_0 has no shape"):
            measure.layer_costs(graph)


class Clock:
    """A clock that only subjects move, so that tests of timing do not depend on time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        monkeypatch.setattr(measure, "perf_counter_ns", lambda: self.now)

    def subject(self, ns: int) -> Callable[[], None]:
        def run() -> None:
            self.now += ns

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class TestInterleave:
    def test_times_are_those_of_the_calls_alone(self, clock: Clock) -> None:
        result = interleave(
            {"a": clock.subject(2_000_000), "b": clock.subject(500_000), "instant": clock.subject(0)},
            max_rounds=20,
            on_round=lambda done: clock.subject(7_000_000)(),
        )
        assert result.samples == {"a": (2.0,) * 20, "b": (0.5,) * 20, "instant": (1e-6,) * 20}

    def test_every_round_runs_every_subject_once_in_a_shuffled_order(self) -> None:
        def orders(seed: int) -> list[str]:
            calls: list[str] = []
            subjects = {name: (lambda name=name: calls.append(name)) for name in "abc"}
            rounds: list[int] = []
            interleave(subjects, warmup=2, min_rounds=1, max_rounds=30, seed=seed, on_round=rounds.append)
            assert calls[:6] == list("aabbcc")
            assert rounds == list(range(1, 31))
            return ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]

        seen = orders(seed=0)
        assert len(seen) == 30
        assert set(seen) == {"abc", "acb", "bac", "bca", "cab", "cba"}
        assert any(one != other for one, other in pairwise(seen))
        assert orders(seed=0) == seen
        assert orders(seed=1) != seen

    @pytest.mark.parametrize(
        "limits, rounds",
        [
            ({"max_seconds": 5}, 5),
            ({"max_seconds": 4.5}, 5),
            ({"max_seconds": 1, "min_rounds": 7}, 7),
            ({"max_seconds": 60, "max_rounds": 9}, 9),
            ({"max_seconds": 0, "min_rounds": 1}, 1),
        ],
    )
    def test_ends_in_time_but_not_before_enough_rounds(
        self, clock: Clock, limits: dict[str, float], rounds: int
    ) -> None:
        settings = {"min_rounds": 2, **limits}
        result = interleave({"second": clock.subject(10**9)}, **settings)  # type: ignore[arg-type]
        assert result.stats("second").rounds == rounds

    @pytest.mark.parametrize("enabled", [True, False])
    def test_garbage_collection_is_off_in_rounds_and_as_before_after_them(self, enabled: bool) -> None:
        seen = []
        before = gc.isenabled()
        (gc.enable if enabled else gc.disable)()
        try:
            interleave({"a": lambda: seen.append(gc.isenabled())}, warmup=0, min_rounds=2, max_rounds=2)
            after = gc.isenabled()
        finally:
            (gc.enable if before else gc.disable)()
        assert seen == [False, False]
        assert after is enabled

    def test_an_error_of_a_subject_propagates_and_collection_is_on_again(self) -> None:
        calls = []

        def breaks() -> None:
            calls.append(gc.isenabled())
            if len(calls) > 4:
                raise ZeroDivisionError("mine")

        assert gc.isenabled()
        with pytest.raises(ZeroDivisionError, match="mine"):
            interleave({"good": lambda: None, "bad": breaks})
        assert calls == [True] * 3 + [False] * 2
        assert gc.isenabled()

    def test_impossible_requests_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one subject"):
            interleave({})
        with pytest.raises(ValueError, match="at least 5 and at most 4"):
            interleave({"a": lambda: None}, min_rounds=5, max_rounds=4)
        with pytest.raises(ValueError, match="at least 0"):
            interleave({"a": lambda: None}, min_rounds=0)


TIMES = st.floats(0.01, 1000)
PAIRED = st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=25)


def paired(rounds: list[tuple[float, float]], scale: float = 1) -> Measurement:
    return Measurement({"a": tuple(scale * a for a, _ in rounds), "b": tuple(b for _, b in rounds)})


class TestRatio:
    @quick(30)
    @given(PAIRED, st.floats(0.001, 1000))
    def test_scaling_one_subject_scales_the_ratio_and_its_interval(
        self, rounds: list[tuple[float, float]], c: float
    ) -> None:
        ratio, scaled = paired(rounds).ratio("a", "b"), paired(rounds, c).ratio("a", "b")
        expected = [c * ratio.value, c * ratio.low, c * ratio.high]
        assert [scaled.value, scaled.low, scaled.high] == pytest.approx(expected, rel=1e-9)

    @quick(30)
    @given(PAIRED, st.integers(0, 2**32))
    def test_the_interval_contains_the_value_and_a_wider_confidence_contains_it(
        self, rounds: list[tuple[float, float]], seed: int
    ) -> None:
        narrow = paired(rounds).ratio("a", "b", confidence=0.5, seed=seed)
        wide = paired(rounds).ratio("a", "b", confidence=0.99, seed=seed)
        assert wide.low <= narrow.low <= narrow.value <= narrow.high <= wide.high

    @quick(30)
    @given(PAIRED)
    def test_swapping_the_subjects_inverts_the_ratio_and_its_interval(self, rounds: list[tuple[float, float]]) -> None:
        ratio, swapped = paired(rounds).ratio("a", "b"), paired(rounds).ratio("b", "a")
        assert [1 / swapped.value, 1 / swapped.high, 1 / swapped.low] == pytest.approx(
            [ratio.value, ratio.low, ratio.high], rel=1e-9
        )

    @quick(30)
    @given(st.lists(TIMES, min_size=1, max_size=25))
    def test_identical_samples_give_exactly_one(self, times: list[float]) -> None:
        ratio = Measurement({"a": tuple(times), "b": tuple(times)}).ratio("a", "b")
        assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
        assert ratio.verdict == "no difference beyond the noise"

    def test_the_seed_decides(self) -> None:
        noise = np.random.default_rng(0).lognormal(sigma=0.3, size=(30, 2))
        measurement = paired([(float(a), float(b)) for a, b in noise])
        assert measurement.ratio("a", "b", seed=1) == measurement.ratio("a", "b", seed=1)
        assert measurement.ratio("a", "b", seed=1) != measurement.ratio("a", "b", seed=2)

    def test_shared_drift_cancels_because_rounds_are_paired(self) -> None:
        """The machine's speed wanders over a factor of several; the subjects differ by 5 %."""
        rng = np.random.default_rng(0)
        drift = np.exp(np.cumsum(rng.normal(0, 0.2, 60)))
        a, b = (1.05 * drift * rng.lognormal(sigma=0.01, size=60) for _ in range(2))
        b /= 1.05
        together = Measurement({"a": tuple(a), "b": tuple(b)}).ratio("a", "b")
        apart = Measurement({"a": tuple(a), "b": tuple(rng.permutation(b))}).ratio("a", "b")
        assert together.verdict == "slower"
        assert together.value == pytest.approx(1.05, rel=0.02)
        assert apart.verdict == "no difference beyond the noise"
        assert np.log(apart.high / apart.low) > 5 * np.log(together.high / together.low)

    def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(100):
            shared = rng.lognormal(sigma=0.2, size=40)
            a, b = (shared * rng.lognormal(sigma=0.1, size=40) for _ in range(2))
            ratio = Measurement({"a": tuple(1.3 * a), "b": tuple(b)}).ratio("a", "b")
            hits += ratio.low <= 1.3 <= ratio.high
        assert 88 <= hits <= 100

    @pytest.mark.parametrize("a, verdict", [(0.5, "faster"), (2.0, "slower"), (1.0, "no difference beyond the noise")])
    def test_the_verdict_is_about_the_numerator(self, a: float, verdict: str) -> None:
        noise = np.random.default_rng(0).lognormal(sigma=0.05, size=(30, 2))
        assert paired([(a * float(x), float(y)) for x, y in noise]).ratio("a", "b").verdict == verdict

    @pytest.mark.parametrize("confidence", [0, 1, 95])
    def test_a_confidence_is_between_0_and_1(self, confidence: float) -> None:
        with pytest.raises(ValueError, match="between 0 and 1"):
            paired([(1, 1)]).ratio("a", "b", confidence=confidence)


class TestMeasurement:
    def test_stats(self) -> None:
        stats = Measurement({"a": tuple(float(t) for t in range(1, 102))}).stats("a")
        assert (stats.median_ms, stats.p90_ms, stats.p99_ms, stats.mean_ms, stats.rounds) == (51, 91, 100, 51, 101)
        assert stats.cv == pytest.approx(np.std(range(1, 102)) / 51)

    def test_constant_times_have_no_variation(self) -> None:
        assert Measurement({"a": (2.0, 2.0)}).stats("a") == measure.LatencyStats(2, 2, 2, 2, 0, 2)

    def test_throughput_is_images_per_second_at_the_median(self) -> None:
        assert Measurement({"a": (4.0, 5.0, 100.0)}).throughput("a", batch=8) == 1600

    @pytest.mark.parametrize(
        "samples", [{}, {"a": ()}, {"a": (1.0,), "b": (1.0, 2.0)}, {"a": (0.0,)}, {"a": (float("nan"),)}]
    )
    def test_unpaired_or_impossible_times_are_refused(self, samples: dict[str, tuple[float, ...]]) -> None:
        with pytest.raises(ValueError, match="time"):
            Measurement(samples)


class TestMachine:
    def test_says_what_matters_and_not_whose_it_is(self) -> None:
        machine = measure.machine()
        assert json.loads(json.dumps(machine)) == machine
        assert machine["torch"] == torch.__version__
        assert machine["logical_cores"]
        assert machine["processor"]
        assert platform.node() not in machine.values()
        assert not any(str(folder) in json.dumps(machine) for folder in (Path.home(), Path.cwd()))

    def test_cpuinfo_of_x86(self) -> None:
        text = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu amx_tile avx2 avx512f sse2\n\nmodel name\t: Other\n"
        assert measure._parse_cpuinfo(text) == ("A CPU", ["amx_tile", "avx2", "avx512f"])

    def test_cpuinfo_of_arm(self) -> None:
        assert measure._parse_cpuinfo("processor\t: 0\nFeatures\t: fp asimd sve i8mm\n") == (
            "",
            ["asimd", "i8mm", "sve"],
        )

    def test_no_cpuinfo(self) -> None:
        assert measure._parse_cpuinfo("") == ("", [])
