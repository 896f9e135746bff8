from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnext50_32x4d

from foldgroup import counts
from foldgroup.errors import TraceError
from foldgroup.nn import DGConv, DGConv1d, DGConv2d, DGConv3d


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
        costs = counts.layer_costs(graph)
        assert 2 * counts.macs(graph) * 2 == flops.get_total_flops()  # two FLOPs a MAC, two images
        assert counts.macs(graph) == sum(cost.macs for cost in costs)
        assert counts.params(graph) == sum(p.numel() for p in model.parameters())
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
        (cost,) = counts.layer_costs(graph)
        assert 2 * cost.macs * shape[0] == flops.get_total_flops()
        assert cost.params == counts.params(graph) == sum(p.numel() for p in layer.parameters())

    def test_entries_name_the_layers_in_the_order_they_run(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2),
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 2, 1),
            nn.Flatten(),
            nn.Linear(2 * 16, 5),
        )
        costs = counts.layer_costs(graph_of(model, 1, 4, 6, 6))
        assert costs == (
            counts.LayerCost("0", "conv", 4, 8, 2, macs=16 * 8 * 2 * 9, params=8 * 2 * 9 + 8),
            counts.LayerCost("2", "conv_transpose", 8, 2, 1, macs=16 * 8 * 2, params=8 * 2 + 2),
            counts.LayerCost("4", "linear", 32, 5, 1, macs=32 * 5, params=32 * 5 + 5),
        )
        assert counts.grouped_macs(costs) == costs[0].macs

    @pytest.mark.parametrize("dimensions, kind", [(1, DGConv1d), (2, DGConv2d), (3, DGConv3d)])
    def test_dgconv_is_dense_as_trained_and_its_gates_are_no_parameters(
        self, dimensions: int, kind: type[DGConv]
    ) -> None:
        graph = graph_of(nn.Sequential(kind(8, 8, 3, padding=1)), 1, 8, *[4] * dimensions)
        (cost,) = counts.layer_costs(graph)
        assert (cost.groups, cost.macs) == (1, 4**dimensions * 8 * 8 * 3**dimensions)
        assert cost.params == counts.params(graph) == 8 * 8 * 3**dimensions + 8

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
        (cost,) = counts.layer_costs(graph)
        (expected,) = counts.layer_costs(graph_of(nn.Sequential(layer), *shape))
        (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
        assert cost == replace(expected, name=node.name)
        assert counts.params(graph) == cost.params

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

        assert counts.layer_costs(graph_of(Calls(), 2, 4, 7)) == (
            counts.LayerCost("conv1d", "conv", 4, 4, 4, macs=5 * 4 * 3, params=0),
            counts.LayerCost("linear", "linear", 4, 1, 1, macs=3 * 4, params=4),
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
        assert [cost.name for cost in counts.layer_costs(graph)] == ["conv", "conv", "tied"]
        assert counts.macs(graph) == 3 * 4 * 16
        assert counts.params(graph) == 16 + 4 + 1

    def test_one_module_under_two_names_counts_both_calls(self) -> None:
        conv = nn.Conv2d(4, 4, 1)
        graph = graph_of(nn.Sequential(conv), 1, 4, 2, 2)
        graph.add_submodule("again", conv)
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        with graph.graph.inserting_before(output):
            node = graph.graph.call_module("again", (output.args[0],))
        node.meta["shape"] = (1, 4, 2, 2)
        output.args = (node,)
        assert [cost.name for cost in counts.layer_costs(graph)] == ["0", "again"]
        assert counts.params(graph) == 20

    def test_a_layer_that_no_node_calls_is_no_part_of_the_network(self) -> None:
        graph = graph_of(nn.Sequential(nn.Conv2d(4, 4, 1)), 1, 4, 2, 2)
        graph.add_submodule("unused", nn.Conv2d(4, 4, 1))
        assert counts.params(graph) == 20
        assert len(counts.layer_costs(graph)) == 1

    def test_a_missing_shape_is_named(self) -> None:
        graph = graph_of(nn.Sequential(nn.Conv2d(4, 4, 1)), 1, 4, 2, 2)
        for node in graph.graph.nodes:
            del node.meta["shape"]
        with pytest.raises(TraceError, match="_0 has no shape"):
            counts.layer_costs(graph)
