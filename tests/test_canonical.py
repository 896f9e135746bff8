"""Networks that call layers as functions, as libraries of models do, are the ones that call them as modules."""

from __future__ import annotations

import pytest
import torch
from graphs import Call, conv, filled, learned
from rich.console import Console, Group
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from foldgroup.compiler import compile
from foldgroup.counts import layer_costs
from foldgroup.errors import TraceError
from foldgroup.finetune import folded_for_training
from foldgroup.inspection import inspect
from foldgroup.purity import impurity
from foldgroup.report.layout import groups_in_words
from foldgroup.report.tables import compile_summary, inspection_table
from foldgroup.trace import called_module, shape_of, trace

pytestmark = pytest.mark.usefixtures("one_thread")


class BatchNormRelu(nn.BatchNorm2d):
    """Batch norm and activation in one, the norm as a function."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return self.act(functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps))


class SameConv(nn.Conv2d):
    """Pads by itself and convolves by a function."""

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, (1, 1, 1, 1))
        return functional.conv2d(padded, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Functional(nn.Module):
    """A learned layer between layers that are written as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 8, 3)
        self.bn1 = BatchNormRelu(8)
        self.learned = learned(8, 8, (1, 0, 1))
        self.bn2 = BatchNormRelu(8)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.head = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x.to(self.learned.weight.dtype)))
        return self.head(x + self.bn2(self.learned(x)) * self.gamma.reshape(1, -1, 1, 1))


def functional_network() -> nn.Module:
    torch.manual_seed(0)
    return filled(Functional())


def test_what_is_written_in_functions_folds_like_what_is_written_in_modules(tmp_path):
    bundle = compile(functional_network(), tmp_path / "f", example_input=(1, 3, 8, 8), engine=False)
    shuffles = bundle.manifest["shuffles"]
    assert (shuffles["inserted"], shuffles["kept"]) == (2, [])
    assert [layer["name"] for layer in bundle.manifest["layers"]] == ["learned"]


def test_tracing_leaves_the_network_itself_alone():
    network = functional_network()
    before, x = {name: value.clone() for name, value in network.state_dict().items()}, torch.randn(1, 3, 8, 8)
    modules = dict(network.named_modules())
    graph = trace(network, (1, 3, 8, 8))
    assert torch.equal(graph(x), network(x))
    assert dict(network.named_modules()) == modules
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert graph.get_submodule("bn1.batch_norm").weight is network.bn1.weight


def test_what_was_written_in_functions_trains_as_it_did():
    network, x = functional_network(), torch.randn(4, 3, 8, 8)
    tunable = folded_for_training(network, example_input=(1, 3, 8, 8))
    for training in (True, False):
        assert torch.allclose(tunable.module.train(training)(x), network.train(training)(x), atol=1e-5)


class Weights(nn.Module):
    """Weights and what to do with them."""

    def __init__(self, call, **weights):
        super().__init__()
        self.call = call
        for name, value in weights.items():
            (self.register_buffer if name.startswith("running") else self.register_parameter)(name, value)

    def forward(self, x):
        return self.call(self, x)


def weights(call, *parameters: tuple[int, ...], statistics: int = 0) -> Weights:
    torch.manual_seed(0)
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in zip("wbc", parameters, strict=False)}
    kept = {name: torch.rand(statistics) + 0.5 for name in ("running_mean", "running_var") if statistics}
    return Weights(call, **named, **kept)


def text(shown) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


class _Sign(torch.autograd.Function):
    """1 where a gate is positive; its gradient goes straight through."""

    @staticmethod
    def forward(ctx, gate):
        return (gate > 0).to(gate.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def by_expression(gate):
    mask = torch.ones(1, 1)
    for g in (gate > 0).float().split(1):
        mask = torch.kron(mask, g * torch.ones(2, 2) + (1 - g) * torch.eye(2))
    return mask


def straight_through(gate):
    mask, on = torch.ones(1, 1), _Sign.apply(gate)
    for i in range(len(gate)):
        mask = torch.kron(mask, on[i] * torch.ones(2, 2) + (1 - on[i]) * torch.eye(2))
    return mask


def decided(gate):
    mask = torch.ones(1, 1)
    for g in gate:
        mask = torch.kron(mask, torch.ones(2, 2) if g > 0 else torch.eye(2))
    return mask


def chosen(gate):
    """A group for every channel, as FLGC chooses it."""
    scores = (torch.arange(8)[:, None] + gate.argsort()) % 4
    groups = functional.one_hot(scores.argmax(1), 4).float()
    return groups @ groups.T


class OwnLayer(nn.Module):
    """Somebody's own layer with learned groups."""

    def __init__(self, mask, gates):
        super().__init__()
        self.mask, self.gate = mask, nn.Parameter(torch.tensor(gates))
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        return functional.conv2d(x, self.weight * self.mask(self.gate)[:, :, None, None], padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "mask, gates",
    [
        (by_expression, (0.3, -0.2, 0.1)),
        (straight_through, (-0.3, 0.2, 0.1)),
        (decided, (0.3, 0.2, -0.1)),
        (chosen, (0.4, -1.0, 2.0, 0.1)),
    ],
)
def test_a_layer_of_ones_own_that_masks_its_kernel_is_folded(mask, gates, dtype, tmp_path):
    torch.manual_seed(0)
    own = OwnLayer(mask, gates)
    model = filled(nn.Sequential(conv(3, 8), own, nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))).to(dtype)
    with torch.no_grad():
        own.gate.copy_(torch.tensor(gates))
    bundle = compile(model, tmp_path / "own", example_input=(1, 3, 8, 8), engine=False)
    kept = torch.count_nonzero(own.mask(own.gate.float())) * 9
    assert bundle.manifest["macs"]["nominal"] == 64 * (3 * 8 + int(kept) + 8 * 4)
    assert bundle.manifest["shuffles"]["kept"] == []
    (found,) = [record for record in bundle.passes["passes"] if record["name"] == "find_groups"]
    assert [rewrite["node"] for rewrite in found["rewrites"]] == ["1"]
    inspection = inspect(tmp_path / "own")
    ((layer, groups),) = [(layer["name"], layer["groups"]) for layer in inspection.found]
    assert layer == "1" and inspection.as_dict()["found"] == bundle.manifest["found"]
    assert sum(group["count"] * group["in_width"] * group["out_width"] for group in groups) * 9 == int(kept)
    shown = text(Group(inspection_table(inspection), compile_summary(bundle)))
    assert f"1      {groups_in_words(groups)}" in shown and "1 with groups in their zeros" in shown
    assert "learned its groups" not in shown
    page = (tmp_path / "own" / "report.html").read_text(encoding="utf-8")
    assert f">{groups_in_words(groups)}</td>" in page and "learned its groups" not in page


def test_zeros_of_either_sign_are_what_a_mask_leaves(tmp_path):
    masked = conv(8, 8, 3)
    model = filled(nn.Sequential(conv(3, 8), masked, conv(8, 4)))
    with torch.no_grad():
        masked.weight.mul_(by_expression(torch.tensor((-0.3, 0.2, 0.1)))[:, :, None, None])
    assert (torch.signbit(masked.weight) & (masked.weight == 0)).any()
    bundle = compile(model, tmp_path / "zeros", example_input=(1, 3, 8, 8), engine=False, vector_width=8)
    assert bundle.manifest["certificate"]["holds"]  # of kernels that packing fills with zeros of its own


BECOME = {
    "conv1d": (nn.Conv1d, (2, 4, 9), lambda m, x: functional.conv1d(x, m.w, m.b), (6, 4, 3), (6,)),
    "grouped": (nn.Conv2d, (2, 4, 9, 9), lambda m, x: functional.conv2d(x, m.w, stride=2, groups=2), (6, 2, 3, 3)),
    "same": (nn.Conv2d, (2, 4, 9, 9), lambda m, x: functional.conv2d(x, m.w, None, 1, "same", 2), (6, 4, 3, 3)),
    "conv3d": (nn.Conv3d, (1, 2, 5, 5, 5), lambda m, x: functional.conv3d(x, m.w, padding=[1, 0, 1]), (4, 2, 3, 3, 3)),
    "linear": (nn.Linear, (2, 3, 4), lambda m, x: functional.linear(x, m.w, m.b), (5, 4), (5,)),
    "layer norm": (nn.LayerNorm, (2, 3, 4), lambda m, x: functional.layer_norm(x, (4,), m.w, None, 1e-3), (4,)),
    "group norm": (nn.GroupNorm, (2, 6, 4), lambda m, x: functional.group_norm(x, 3, m.w, m.b, 1e-3), (6,), (6,)),
    "group norm without shift": (nn.GroupNorm, (2, 6, 4), lambda m, x: functional.group_norm(x, 3, m.w), (6,)),
    "prelu": (nn.PReLU, (2, 6, 4), lambda m, x: functional.prelu(x, m.w), (6,)),
    "moved": (nn.Linear, (2, 3), lambda m, x: functional.linear(x, m.w.transpose(0, 1)), (3, 4)),
}


@pytest.mark.parametrize("name", BECOME)
def test_a_function_becomes_the_module_that_computes_the_same(name):
    kind, shape, call, *shapes = BECOME[name]
    network, x = weights(call, *shapes), torch.randn(shape)
    graph = trace(network, shape)
    assert [type(called_module(graph, node)) for node in graph.graph.nodes if node.op == "call_module"] == [kind]
    assert not graph.graph.find_nodes(op="get_attr")
    # What was moved lies otherwise in memory, and some processors' BLAS sums that in another order.
    rounding = 1e-6 if name == "moved" else 0
    torch.testing.assert_close(graph(x), network(x), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("axes", [2, 3, 4, 5])
def test_a_batch_norm_is_that_of_its_axes(axes):
    def call(m, x):
        return functional.batch_norm(x, m.running_mean, m.running_var, m.w, m.b, eps=1e-3)

    shape = (2, 4, 3, 3, 3)[:axes]
    network, x = weights(call, (4,), (4,), statistics=4), torch.randn(shape)
    graph = trace(network, shape)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[axes]
    assert {type(module) for module in graph.modules()} >= {kind}
    assert torch.equal(graph(x), network(x))


REMAIN = {
    "statistics of the batch": (
        lambda m, x: functional.batch_norm(x, m.running_mean, m.running_var, m.w, m.b, True),
        (4,),
        (4,),
    ),
    "no weights": (lambda m, x: functional.batch_norm(x, m.running_mean, m.running_var) * m.w, (1,)),
    "weights of the moment": (lambda m, x: functional.conv2d(x, m.w * x.mean()), (6, 4, 3, 3)),
    "weights that are overwritten": (lambda m, x: functional.linear(x, m.w.data.clamp_(-1, 1)), (6, 9)),
    "one stride for both axes, in a list": (lambda m, x: functional.conv2d(x, m.w, stride=[2]), (6, 4, 3, 3)),
    "no batch": (lambda m, x: functional.conv2d(x[0], m.w).unsqueeze(0), (6, 4, 3, 3)),
}


@pytest.mark.parametrize("name", REMAIN)
def test_what_no_module_computes_stays_as_it_is(name):
    call, *shapes = REMAIN[name]
    network, x = weights(call, *shapes, statistics=4), torch.randn(1, 4, 9, 9)
    graph = trace(network, (1, 4, 9, 9))
    assert all(node.op != "call_module" for node in graph.graph.nodes)
    assert torch.equal(graph(x), network(x))


class CalledAndRead(nn.Module):
    """Uses the weights of a layer twice: the layer's way, and its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return functional.conv2d(self.layer(x), self.layer.weight)


def test_a_layer_that_is_called_and_read_keeps_its_weights_and_gets_no_part():
    network, x = CalledAndRead(), torch.randn(1, 3, 4, 4)
    graph = trace(network, (1, 3, 4, 4))
    assert [name for name, _ in network.named_modules()] == ["", "layer"]
    assert len(graph.graph.find_nodes(op="call_module", target="layer")) == 1
    assert graph.conv2d.weight is network.layer.weight
    assert torch.equal(graph(x), network(x))


@pytest.mark.parametrize("to_train", [False, True])
def test_a_layer_has_the_name_of_the_module_that_calls_it_unless_more_is_read_there(to_train):
    alone = weights(lambda m, x: functional.linear(x, m.w), (9, 9))
    again = weights(lambda m, x: functional.linear(x, m.w) * m.w, (9, 9))
    twice = weights(lambda m, x: functional.linear(functional.linear(x, m.w), m.b), (9, 9), (9, 9))
    network, x = nn.Sequential(alone, again, twice), torch.randn(1, 9, 9)
    graph = trace(network, (1, 9, 9), to_train=to_train)
    assert torch.equal(graph(x), network(x))
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1.linear", "2.linear", "2.linear_"]


@pytest.mark.parametrize(
    "groups",
    [lambda x: x.shape[1], lambda x: x.size(1), lambda x: x.size()[1], lambda x: x.size(-3), lambda x: x.shape[-3]],
)
def test_as_many_groups_as_channels_are_a_number(groups):
    network = weights(lambda m, x: functional.conv2d(x, m.w, groups=groups(x)), (4, 1, 3, 3))
    graph, x = trace(network, (1, 4, 9, 9)), torch.randn(2, 4, 9, 9)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(graph(x), network(x))
    assert [cost.groups for cost in layer_costs(graph)] == [4]


@pytest.mark.parametrize("groups", [lambda x: x.shape[1] // 2, lambda x: x.shape[0] + 1, lambda x: x.size(0) * 2])
def test_other_numbers_of_groups_stay_and_their_layers_are_counted(groups):
    network = weights(lambda m, x: functional.conv2d(x, m.w, groups=groups(x)), (4, 2, 3, 3))
    graph, x = trace(network, (1, 4, 9, 9)), torch.randn(1, 4, 9, 9)
    assert "call_module" not in {node.op for node in graph.graph.nodes}
    assert torch.equal(graph(x), network(x))
    assert [(cost.groups, cost.macs) for cost in layer_costs(graph)] == [(2, 7 * 7 * 4 * 2 * 9)]


def test_groups_of_a_transposed_convolution_and_a_norm_by_a_size_are_numbers():
    network = weights(
        lambda m, x: functional.group_norm(
            functional.conv_transpose2d(x, m.w, groups=x.shape[1]), x.size(1), torch.ones(4), torch.ones(4)
        ),
        (4, 1, 2, 2),
    )
    graph, x = trace(network, (1, 4, 9, 9)), torch.randn(2, 4, 9, 9)
    assert not graph.graph.find_nodes(op="call_function", target=getattr)
    assert torch.equal(graph(x), network(x))
    assert [cost.groups for cost in layer_costs(graph)] == [4]


def test_calls_with_the_same_weights_are_calls_of_one_module():
    network = weights(lambda m, x: functional.conv2d(functional.conv2d(x, m.w), m.w), (4, 4, 1, 1))
    graph = trace(network, (1, 4, 3, 3))
    assert len({node.target for node in graph.graph.nodes if node.op == "call_module"}) == 1


def _overwritten_copy(m: nn.Module, x: Tensor) -> Tensor:
    copy = m.w.clone()
    same = copy
    copy.mul_(2)
    same += m.w
    return x * copy[:, None, None]


COMPUTED = {
    "moved": lambda m, x: x * m.w.view(1, -1, 1).unsqueeze(-1),
    "moved twice": lambda m, x: x * m.w.reshape(1, -1, 1, 1) + m.w.reshape(4, 1, 1),
    "in another type": lambda m, x: x * m.w.double().exp().float()[:, None, None],
    "a slice": lambda m, x: x * m.w[2:3] + m.w.unsqueeze(-1)[:, None][1:2],
    "on the device of the input": lambda m, x: x * torch.kron(m.w, torch.ones(1, device=x.device))[0],
    "in the type of the input": lambda m, x: x * m.w.sign().to(dtype=x.dtype, device=x.device)[:, None, None],
    "like something inside": lambda m, x: (y := x.exp()) * m.w.sign().type_as(y)[:, None, None],
    "to something inside": lambda m, x: (y := x.exp()) * m.w.sign().to(y)[:, None, None],
    "like something inside, by its name": lambda m, x: (y := x.exp()) * m.w.sign().type_as(other=y)[:, None, None],
    "made like something inside": lambda m, x: (y := x.exp()) * (m.w[:, None, None] * y.new_ones(4, 1, 1)),
    "in a longer type": lambda m, x: (y := x.double()) * m.w.to(y.dtype)[:, None, None],
    "by its type": lambda m, x: (y := x.exp()) * (m.w * (2 if y.dtype == torch.float32 else 3))[:, None, None],
    "an overwritten copy": _overwritten_copy,
    "overwritten ones": lambda m, x: (y := x.exp()) * y.new_zeros(4).add_(m.w)[:, None, None],
    "its size": lambda m, x: x * m.w.shape[0] + m.w.dim() + len(m.w.view(1, -1)),
    "all of it": lambda m, x: x + torch.kron(m.w.sign(), torch.ones(9))[:9].cumsum(0),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_depends_on_no_input_is_computed_once(name):
    network, x = weights(COMPUTED[name], (4,)), torch.randn(2, 4, 9, 9)
    attributes = set(vars(network))
    graph = trace(network, (1, 4, 9, 9))
    assert torch.equal(graph(x), network(x))
    for node in graph.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "output") or any(r.op != "get_attr" for r in node.all_input_nodes)
        assert node.op != "get_attr" or shape_of(node) == tuple(getattr(graph, node.target).shape)
    assert set(vars(network)) == attributes


def _read_before(m: nn.Module, x: Tensor) -> Tensor:
    copy = m.w.clone()
    y = x * copy
    copy.mul_(2)
    return y + copy


def _view_read_later(m: nn.Module, x: Tensor) -> Tensor:
    copy = m.w.clone()
    view = copy.view(2, 2)
    copy.mul_(2)
    return x + view.flatten()


@pytest.mark.parametrize("call", [_read_before, _view_read_later, lambda m, x: x * m.w.mul_(2)])
def test_what_is_read_otherwise_before_it_is_overwritten_is_not_computed(call):
    network = weights(call, (4,))
    before = network.w.clone()
    assert "do not work in place" in str(impurity(trace(network, (1, 4))))
    assert torch.equal(network.w, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_masks_in_the_type_of_what_they_meet_are_groups(tmp_path, dtype):
    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = functional.conv2d(x.relu(), m.w * m.w.gt(0).type_as(x.relu()))
        return functional.conv2d(y, m.b * torch.eye(4, dtype=y.dtype, device=y.device)[:, :, None, None])

    network = weights(call, (4, 4, 1, 1), (4, 4, 1, 1)).to(dtype)
    with torch.no_grad():
        network.w[:2, 2:] = network.w[2:, :2] = -1
    bundle = compile(network, tmp_path / "m", example_input=(1, 4, 5, 5), engine=False)
    groups = {layer["name"]: [part["count"] for part in layer["groups"]] for layer in bundle.manifest["found"]}
    assert groups["conv2d_"] == [4] and sum(groups["conv2d"]) > 1


class Masked(nn.Module):
    """A parametrization: every other entry is zero; ``broken``, it is none."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken

    def forward(self, weight: Tensor) -> Tensor:
        if self.broken:
            raise ArithmeticError("broken")
        return weight * (torch.arange(weight.numel()) % 2).reshape(weight.shape)


class OwnConv(nn.Conv2d):
    """A convolution of the network's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def masked(layer: nn.Module, *names: str, **options: bool) -> nn.Module:
    for name in names:
        parametrize.register_parametrization(layer, name, Masked(**options))
    return layer


PARAMETRIZED = {
    "kernel": lambda: masked(nn.Conv2d(4, 6, 3), "weight"),
    "kernel and bias": lambda: masked(nn.Conv2d(4, 6, 3), "weight", "bias"),
    "several": lambda: masked(masked(nn.Conv2d(4, 6, 3), "weight"), "weight"),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(9, 5)),
    "scale of a norm": lambda: masked(nn.BatchNorm2d(4), "weight"),
    "pruned": lambda: prune.random_unstructured(nn.Conv2d(4, 6, 3), "weight", 0.5),
    "pruned twice": lambda: prune.ln_structured(
        prune.l1_unstructured(nn.Conv2d(4, 6, 3), "weight", 3), "weight", 2, 2, 0
    ),
    "kernel and bias pruned": lambda: prune.identity(prune.l1_unstructured(nn.Linear(9, 5), "weight", 3), "bias"),
    "weight norm by hooks": lambda: weight_norm(nn.Conv2d(4, 6, 3)),
    "spectral norm by hooks": lambda: spectral_norm(nn.Conv2d(4, 6, 3)),
}


def plain_like(layer: nn.Module) -> nn.Module:
    return {nn.Conv2d: nn.Conv2d(4, 6, 3), nn.Linear: nn.Linear(9, 5), nn.BatchNorm2d: nn.BatchNorm2d(4)}[
        parametrize.type_before_parametrizations(layer)
    ]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_parametrizations_make_is_made_once(name, dtype):
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.ReLU(), PARAMETRIZED[name]()).eval().to(dtype), torch.randn(2, 4, 9, 9, dtype=dtype)
    kind = parametrize.type_before_parametrizations(network[1])
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    graph = trace(network, (1, 4, 9, 9))
    assert type(graph.get_submodule("1")) is kind and impurity(graph) is None
    assert graph.get_submodule("1").state_dict().keys() == plain_like(network[1]).state_dict().keys()
    assert torch.equal(graph(x), network(x))
    assert network[1]._forward_pre_hooks or parametrize.is_parametrized(network[1])
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


def test_parametrizations_stay_of_layers_that_are_the_networks_own_or_will_be_trained():
    own, x = nn.Sequential(nn.ReLU(), masked(OwnConv(4, 6, 3), "weight")).eval(), torch.randn(2, 4, 9, 9)
    graph = trace(own, (1, 4, 9, 9))
    assert parametrize.is_parametrized(graph.get_submodule("1"))
    assert torch.equal(graph(x), own(x))
    to_train = trace(nn.Sequential(masked(nn.Conv2d(4, 6, 3), "weight")), (1, 4, 9, 9), to_train=True)
    assert parametrize.is_parametrized(to_train.get_submodule("0"))


def test_a_parametrization_that_fails_is_an_error_of_the_network():
    network = nn.Sequential(masked(nn.Conv2d(4, 6, 3), "weight", broken=False))
    network[0].parametrizations.weight[0].broken = True
    with pytest.raises(TraceError, match="0: broken"):
        trace(network, (1, 4, 9, 9))


class Bias(nn.Module):
    """Adds what a small network of its own makes of constants."""

    def __init__(self, *layers):
        super().__init__()
        self.places = nn.Parameter(torch.randn(9, 2))
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(self.places).T


def test_what_layers_make_of_constants_is_computed_once():
    network, x = Bias(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), torch.randn(1, 3, 9)
    graph = trace(network, (1, 3, 9))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "get_attr", "call_function", "output"]
    assert torch.equal(graph(x), network(x))


class Padded(nn.Module):
    """Decides by sizes, asserts them, and computes some for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3, 8, 3, padding=0), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        missing = -(x.shape[-1] % -4)
        y = self.conv(functional.pad(x, (0, missing, 0, missing)) if missing else x)
        torch._assert(y.dim() == 4, "an image")
        _ = y.shape[0] * y.size(1)
        return self.norm(y)


def test_what_only_asks_for_sizes_is_no_reader(tmp_path):
    torch.manual_seed(0)
    network = filled(Padded())
    assert [node.op for node in trace(network, (1, 3, 7, 7)).graph.nodes] == [
        "placeholder",
        "call_function",
        "call_module",
        "call_module",
        "output",
    ]
    bundle = compile(network, tmp_path / "p", example_input=(1, 3, 7, 7), engine=False)
    (folded,) = [record for record in bundle.passes["passes"] if record["name"] == "fold_batchnorm"]
    assert [rewrite["node"] for rewrite in folded["rewrites"]] == ["norm"]


def test_what_is_overwritten_and_not_returned_is_not_dropped():
    def call(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        return y

    x = torch.randn(1, 3)
    assert torch.equal(trace(Call(call), (1, 3))(x), call(x))
