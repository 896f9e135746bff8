"""From a module to a graph, and running it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from graphs import CASES, Call, Residual, compiled_case, conv, filled, learned, node_of, relu_, untouched
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from foldgroup.errors import TraceError
from foldgroup.evaluation import evaluate
from foldgroup.nn import DGConv2d, g_resnext17_cifar
from foldgroup.outputs import flat
from foldgroup.trace import attach_shapes, called_module, fork, is_no_op, shape_of, trace
from foldgroup.untraceable import why

SHAPE = (2, 3, 5, 5)


@pytest.mark.parametrize("name", CASES)
def test_a_graph_computes_what_the_module_does(name):
    torch.manual_seed(0)
    model, shape = filled(CASES[name].build()), CASES[name].shape
    x = torch.randn(shape)
    ours, theirs = flat(trace(model, shape)(x.clone())), flat(model(x.clone()))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("symbol", ["+=", "-=", "*=", "/=", "//=", "%=", "**="])
def test_what_is_overwritten_in_place_is_seen_under_its_other_names(symbol):
    scope: dict[str, object] = {}
    exec(f"def forward(x):\n    y = x * 1\n    z = y\n    y {symbol} 2\n    return y + z", scope)
    x = torch.randn(SHAPE)
    assert torch.equal(trace(Call(scope["forward"]), SHAPE)(x), scope["forward"](x))


def test_what_forward_prints_is_not_on_standard_output(capsys):
    trace(Call(lambda x: print("noise") or x * 2), SHAPE)
    assert capsys.readouterr() == ("", "noise\n")


def test_a_forward_that_ends_the_process_is_an_error():
    with pytest.raises(TraceError, match="SystemExit"):
        trace(Call(lambda x: exit(0)), SHAPE)


class Doubled(nn.Sequential):
    """Does more than its ``forward()`` when it is called."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


def test_a_network_that_does_more_than_its_forward_is_refused():
    hooked, told = nn.Sequential(conv(3, 8)), nn.Sequential(conv(3, 8))
    hooked.register_forward_hook(lambda *_: None)
    told.register_forward_pre_hook(lambda *_: None)
    for model in (hooked, told, Doubled(conv(3, 8))):
        with pytest.raises(TraceError, match=r"hooks or a __call__\(\) of its own"):
            trace(model, SHAPE)


def test_learned_layers_and_torchs_own_are_single_nodes():
    graph = trace(g_resnext17_cifar(), (1, 3, 8, 8))
    called = [called_module(graph, node) for node in graph.graph.nodes if node.op == "call_module"]
    assert sum(isinstance(module, DGConv2d) for module in called) == 5
    assert sum(type(module) is nn.BatchNorm2d for module in called) == 19
    assert not any(isinstance(module, nn.Sequential) for module in called)


def test_every_node_has_its_origin_and_every_tensor_its_shape():
    graph = trace(nn.Sequential(conv(3, 8, 3, stride=2), Call(lambda x: x.chunk(2, 1)[0])), SHAPE)
    assert {node.name: node.meta for node in graph.graph.nodes} == {
        "input_1": {"origin": "input_1", "shape": (2, 3, 5, 5)},
        "_0": {"origin": "_0", "shape": (2, 8, 3, 3)},
        "chunk": {"origin": "chunk"},
        "getitem": {"origin": "getitem", "shape": (2, 4, 3, 3)},
        "output": {"origin": "output", "shape": (2, 4, 3, 3)},
    }
    assert shape_of(node_of(graph, "0")) == (2, 8, 3, 3)
    assert shape_of(next(node for node in graph.graph.nodes if node.name == "chunk")) == ()


def test_parameters_are_shared_and_the_module_is_left_in_evaluation_mode():
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8))
    assert model.training
    before = model[1].running_mean.clone()
    graph = trace(model, SHAPE)
    assert not model.training
    assert graph.get_submodule("0").weight is model[0].weight
    assert torch.equal(model[1].running_mean, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Branches(),
            r"Branches cannot be traced at tests/test_trace\.py:\d+, 'return x if x\.sum\(\) > 0 else -x': "
            r"it decides by the value of a tensor\. Choose between values with torch\.where",
        ),
        (Call(lambda x: x if 3 in x else -x), r"test_trace\.py:.*it loops over a tensor.*take the parts by index"),
        (Call(lambda x: x * len(x)), r"it asks for the len\(\) of a tensor\. Use x\.shape\[0\]"),
        (
            Call(lambda x: x * float(x.mean())),
            r"it wants a tensor's value or size as a Python number\. Make the",
        ),
        (Call(lambda x: torch.from_numpy(np.sqrt(x))), r"it hands a tensor to numpy, or to Python\. Use operations of"),
        (Call(lambda x: x + int("seven")), r"it raises ValueError: invalid literal .* wrap the function that does"),
        (Call(lambda x: x + _pair(x)[0]), r"at tests/test_trace\.py:\d+, .*_pair.*it loops over a tensor"),
        (TwoInputs(), r"TwoInputs takes 2 inputs \(x, y\): wrap it in a module that takes one tensor"),
        (conv(4, 8), r"cannot be traced|does not accept an input of shape \[2, 3, 5, 5\]"),
        (
            nn.Sequential(conv(3, 8), nn.Sequential(conv(4, 8))),
            r"the network does not accept an input of shape \[2, 3, 5, 5\]: 1\.0: .*expected.*4 channels.*got 8",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), r"the network does not accept .*: 1: "),
    ],
    ids=[
        "control flow",
        "iteration",
        "length",
        "number",
        "numpy",
        "an error of its own",
        "inside torch",
        "two inputs",
        "channels",
        "channels inside",
        "features",
    ],
)
def test_a_network_that_cannot_be_traced_says_why(model, message, capfd):
    with pytest.raises(TraceError, match=message) as error:
        trace(model, SHAPE)
    assert "Original traceback" not in str(error.value) and "Proxy" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_decision_by_the_shape_is_told_from_one_by_the_value():
    """By plain torch.fx, whatever our tracer knows of shapes."""

    def decides(x: Tensor) -> Tensor:
        n, _, height, _ = x.size()
        return x if height % 2 or n > x.shape[2] else -x

    with pytest.raises(fx.proxy.TraceError) as error:
        fx.symbolic_trace(decides)
    message = why("Net", error.value)
    assert "'return x if height % 2 or n > x.shape[2] else -x': it decides by the shape of a tensor" in message


def test_shapes_are_found_without_computing_values():
    graph = trace(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)), (1, 3, 8, 8))
    attach_shapes(graph, (64, 3, 4096, 4096))  # 34 GB, were it computed
    assert shape_of(node_of(graph, "1")) == (64, 8, 4096, 4096)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(7), nn.BatchNorm2d(7, affine=False), nn.BatchNorm1d(8), nn.BatchNorm3d(8)]
)
def test_a_batch_norm_that_does_not_fit_is_refused(norm):
    with pytest.raises(TraceError, match=r"does not accept an input of shape \[1, 3, 8, 8\]: 1: "):
        trace(nn.Sequential(conv(3, 8), norm), (1, 3, 8, 8))


def test_shapes_of_a_network_that_writes_into_its_own_tensors():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.mul_(2)

    model = Counts()
    trace(model, SHAPE)
    assert torch.equal(model.scale, torch.ones(3, 1, 1))


@pytest.mark.parametrize("operation", ["iadd", "isub", "imul", "itruediv"])
def test_what_a_network_overwrites_the_graph_overwrites(operation):
    """Recorded as x = x + 1, y would keep its old value and the graph compute something else."""

    class Aliases(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            y = x
            if operation == "iadd":
                x += 2
            elif operation == "isub":
                x -= 2
            elif operation == "imul":
                x *= 2
            else:
                x /= 2
            return x * y

    x = torch.randn(SHAPE)
    graph = trace(Aliases(), SHAPE)
    assert torch.equal(graph(x), Aliases()(x))
    assert operation in {getattr(node.target, "__name__", "") for node in graph.graph.nodes}


# ---- fork, no-ops ------------------------------------------------------------------------------------------------


def test_a_fork_has_its_own_nodes_and_the_same_modules():
    graph = compiled_case("bottleneck").training
    with untouched(graph):
        other = fork(graph)
        assert [node.name for node in other.graph.nodes] == [node.name for node in graph.graph.nodes]
        assert not set(other.graph.nodes) & set(graph.graph.nodes)
        assert all(other.get_submodule(name) is module for name, module in graph.named_modules() if name == "0")
        next(iter(other.graph.nodes)).meta["shape"] = ()
        other.add_submodule("0", nn.Identity())
        other.graph.erase_node(next(iter(reversed(other.graph.nodes))))
    assert type(other).__name__ == type(graph).__name__


def test_no_ops():
    assert all(is_no_op(layer.eval()) for layer in (nn.Identity(), nn.Dropout(), nn.Dropout1d(), nn.Dropout2d()))
    assert not any(is_no_op(layer) for layer in (nn.Dropout(), nn.ReLU(), nn.Flatten(), None))


# ---- evaluate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bottleneck", "squeeze and excite", "prelu", "circular"])
def test_float64_is_torchs_own(name):
    torch.manual_seed(0)
    model, shape = filled(CASES[name].build()), CASES[name].shape
    x = torch.randn(shape)
    graph = trace(model, shape)
    ours = evaluate(graph, x)
    assert list(ours) == ["output"]
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    theirs = model.double()(x.double())
    torch.testing.assert_close(ours["output"], theirs, rtol=1e-12, atol=1e-14)


def test_constants_are_cast_too():
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.full((3, 1, 1), 0.1))
            self.register_buffer("index", torch.tensor([2, 1, 0]))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.shift)[:, self.index]

    x = torch.randn(SHAPE)
    assert torch.equal(
        evaluate(trace(Shifts(), SHAPE), x)["output"], (x.double() + torch.tensor(0.1).double())[:, [2, 1, 0]]
    )


def test_values_are_kept_as_they_were_before_they_were_overwritten():
    graph = trace(filled(nn.Sequential(conv(3, 8), relu_(), Residual(conv(8, 8)))), SHAPE)
    x = torch.randn(SHAPE)
    values = evaluate(graph, x, keep=True)
    assert (values["_0"] < 0).any()
    assert torch.equal(values["_1"], functional.relu(values["_0"]))
    assert torch.equal(values["input_1"], x.double())
    assert values.keys() == {node.name for node in graph.graph.nodes}


def test_the_caller_keeps_its_input():
    x = torch.randn(SHAPE)
    before = x.clone()
    evaluate(trace(nn.Sequential(relu_()), SHAPE), x, torch.float32)
    assert torch.equal(x, before)


def test_another_precision():
    graph = trace(filled(nn.Sequential(learned(3, 6, (0,)), nn.BatchNorm2d(6))), SHAPE)
    x = torch.randn(SHAPE)
    assert evaluate(graph, x, torch.float32)["output"].dtype == torch.float32
    torch.testing.assert_close(evaluate(graph, x, torch.float32)["output"], graph(x))
    assert not evaluate(graph, x)["output"].requires_grad


def calling(module: nn.Module) -> fx.GraphModule:
    """A graph that calls nothing else."""
    graph = fx.Graph()
    graph.output(graph.call_module("module", (graph.placeholder("x"),)))
    return fx.GraphModule({"module": module}, graph)


class Slow(nn.Module):
    """Takes until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.began.set()
        assert self.go_on.wait(10)
        return x + 1


def test_tracing_waits_for_another_threads_values() -> None:
    slow = Slow()
    graph = calling(slow)
    with ThreadPoolExecutor(2) as beside:
        values = beside.submit(evaluate, graph, torch.zeros(1, 3))
        assert slow.began.wait(10)
        traced = beside.submit(trace, nn.Sequential(nn.ReLU()), (1, 3))
        assert not wait([traced], timeout=0.2).done
        slow.go_on.set()
        assert torch.equal(values.result()["output"], torch.ones(1, 3, dtype=torch.float64))
        assert traced.result().graph.find_nodes(op="call_module", target="0")


@given(data=st.data())
def test_the_shape_of_a_convolution_is_what_torch_makes_of_it(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    sizes = st.tuples(*(st.integers(1, 9),) * axes)
    small = st.tuples(*(st.integers(1, 3),) * axes)
    groups = data.draw(st.integers(1, 3))
    channels = groups * data.draw(st.integers(1, 2))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    layer = kind(
        channels,
        groups * data.draw(st.integers(1, 2)),
        data.draw(small),
        data.draw(small),
        data.draw(st.tuples(*(st.integers(0, 2),) * axes)),
        data.draw(small),
        groups,
        bias=data.draw(st.booleans()),
    )
    given_channels = data.draw(st.sampled_from([channels, channels, channels + 1]))
    shape = (data.draw(st.integers(1, 2)), given_channels, *data.draw(sizes))
    graph = calling(layer)
    try:
        expected = tuple(layer(torch.zeros(shape)).shape)
    except RuntimeError:
        with pytest.raises(TraceError, match="does not accept an input of shape"):
            attach_shapes(graph, shape)
    else:
        attach_shapes(graph, shape)
        assert shape_of(graph.graph.find_nodes(op="call_module", target="module")[0]) == expected
