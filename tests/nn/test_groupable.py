"""groupable: any network's convolutions turned into layers that learn their groups."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import mobilenet_v2, resnet18, resnext50_32x4d

from foldgroup.errors import ModelError
from foldgroup.nn import DGConv, DGConv1d, DGConv2d, DGConv3d, budget, complexity, complexity_penalty, groupable
from foldgroup.nn.complexity import groupable_layers

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LEARNED = (DGConv1d, DGConv2d, DGConv3d)


def connected(model):
    """``model`` with every gate on."""
    with torch.no_grad():
        for layer in groupable_layers(model).values():
            layer.gate.fill_(1)
    return model


def learned(model):
    return [name for name, module in model.named_modules() if isinstance(module, DGConv)]


# The function is kept while gates connect what the network connects


@st.composite
def networks(draw):
    """Convolutions of one number of dimensions in a row, dense and grouped, in float64, and an input for them."""
    torch.manual_seed(draw(st.integers(0, 99)))
    dimensions = draw(st.integers(1, 3))
    channels = draw(st.lists(st.sampled_from([4, 6, 8, 12]), min_size=2, max_size=4))
    layers = []
    for ins, outs in pairwise(channels):
        groups = draw(st.sampled_from([1, 2]))
        layers += [PLAIN[dimensions - 1](ins, outs, 3, padding=1, groups=groups, bias=draw(st.booleans())), nn.ReLU()]
    return nn.Sequential(*layers).double(), torch.randn(2, channels[0], *[4] * dimensions, dtype=torch.float64)


@given(networks())
@quick(30)
def test_with_all_gates_on_the_function_is_the_network_s(case):
    model, x = case
    expected = model(x)
    assert groupable(model) is model
    assert {type(layer) for layer in groupable_layers(model).values()} == {LEARNED[x.ndim - 3]}
    assert len(learned(model)) == len(model) // 2
    torch.testing.assert_close(connected(model)(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("build", "count"), [(resnet18, 16), (resnext50_32x4d, 16)])
def test_torchvision_s_networks_are_kept(build, count):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(1, 3, 32, 32)
    expected = model(x)
    assert len(learned(groupable(model))) == count
    assert model.conv1.weight.shape == (64, 3, 7, 7) and type(model.conv1) is nn.Conv2d  # no common divisor, no gate
    torch.testing.assert_close(connected(model)(x), expected)


def test_zeta_of_a_turned_network_is_the_ones_in_its_masks():
    torch.manual_seed(0)
    model = groupable(resnet18())
    layers = groupable_layers(model).values()
    assert {bit for layer in layers for bit in layer.bits} == {0, 1}  # gates are fresh
    ones = sum(int(layer.grouping.mask.sum()) for layer in layers)
    assert complexity(model).item() == ones == sum(int(layer.mask().sum()) for layer in layers)
    assert budget(model, 4) == sum(layer.weight[:, :, 0, 0].numel() for layer in layers) / 4
    complexity_penalty(model, ones / 2).backward()
    assert all(torch.all(layer.gate.grad > 0) for layer in layers)


# Which layers


def small():
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "body": nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)),
            "wide": nn.ModuleList([nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(16, 16, (1, 3))]),
            "up": nn.ConvTranspose2d(16, 16, 3),
        }
    )


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (None, ["body.1", "wide.0", "wide.1"]),
        ("*", ["body.0", "body.1", "wide.0", "wide.1"]),
        ("body.*", ["body.0", "body.1"]),
        ("body.[12]", ["body.1"]),
        (["wide.0", "body.0"], ["body.0", "wide.0"]),
        (("stem", "wide.?"), ["wide.0", "wide.1"]),
        (lambda name, conv: conv.in_channels >= 16, ["wide.1"]),
        (lambda name, conv: name.startswith("b"), ["body.0", "body.1"]),
    ],
    ids=["default", "all", "pattern", "set", "patterns", "one cannot", "size", "name"],
)
def test_turns_what_is_asked_for_and_can_learn(where, names):
    model = small()
    before = dict(model.named_modules())
    assert learned(groupable(model, where)) == names
    for name, module in model.named_modules():
        assert name in names or module is before[name]


def test_a_predicate_sees_only_what_can_learn():
    seen = []
    with pytest.raises(ModelError):
        groupable(small(), lambda name, conv: seen.append((name, type(conv))))
    assert seen == [(name, nn.Conv2d) for name in ("body.0", "body.1", "wide.0", "wide.1")]


def test_turns_a_convolution_that_is_the_whole_model():
    conv = nn.Conv1d(4, 4, 3).eval()
    layer = groupable(conv)
    assert type(layer) is DGConv1d and layer.weight is conv.weight and not layer.training
    assert type(groupable(nn.Conv3d(4, 4, 1), "*")) is DGConv3d


class Doubled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


def hooked():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda module, args, result: 2 * result)
    return conv


def replaced():
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = lambda x: x
    return conv


CANNOT = {
    "subclass": lambda: Doubled(4, 4, 3),
    "hook": hooked,
    "a forward of its own": replaced,
    "pruned": lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "depth multiplier": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "no common divisor": lambda: nn.Conv2d(3, 8, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
    "lazy": lambda: nn.LazyConv2d(4, 3),
    "no convolution": lambda: nn.Linear(4, 4),
}


@pytest.mark.parametrize("where", [None, "*", lambda name, conv: True], ids=["default", "pattern", "predicate"])
@pytest.mark.parametrize("name", CANNOT)
def test_leaves_what_cannot_learn_even_if_asked(name, where):
    model = nn.Sequential(CANNOT[name](), nn.Conv2d(4, 4, 3))
    other = model[0]
    assert learned(groupable(model, where)) == ["1"]
    assert model[0] is other
    with pytest.raises(ModelError, match="Sequential has no convolution that can learn groups: it takes a Conv1d"):
        groupable(nn.Sequential(CANNOT[name]()), where)


def test_what_chooses_nothing_is_refused_and_changes_nothing():
    model = small()
    text = repr(model)
    with pytest.raises(ModelError, match=r"none of the 4 convolutions of ModuleDict .* \(body\.0, body\.1, wide\.0, "):
        groupable(model, "layer*.conv2")
    with pytest.raises(ModelError, match="or a function of name and layer that returns True"):
        groupable(model, [])
    assert repr(model) == text
    with pytest.raises(ModelError, match=r"none of the 1 convolutions of Sequential .* \(0\)"):
        groupable(nn.Sequential(nn.Conv2d(4, 4, 1)))  # no spatial one


def test_turning_twice_says_what_has_been_turned():
    with pytest.raises(ModelError, match="Sequential has no more convolutions that can learn groups: 1 do already"):
        groupable(groupable(nn.Sequential(nn.Conv2d(4, 4, 3))))


def test_turning_again_adds_layers():
    model = groupable(groupable(small(), "body.1"), "wide.*")
    assert learned(model) == ["body.1", "wide.0", "wide.1"]


def test_mobilenet_s_depthwise_layers_are_left():
    model = mobilenet_v2()
    with pytest.raises(ModelError, match=r"none of the .* convolutions of MobileNetV2"):
        groupable(model)  # its spatial layers are depthwise, but for the stem
    assert learned(groupable(model, "*"))
    assert any(type(m) is nn.Conv2d and m.groups == m.in_channels for m in model.modules())


# Sharing


class Shared(nn.Module):
    """One layer under three names, two of them in one parent, and a layer that holds its kernel."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.first
        self.deep = nn.Sequential(nn.ReLU(), self.first)
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.tied(self.deep(self.again(self.first(x))))


@pytest.mark.parametrize("where", [None, "deep.*", "again"])
def test_a_layer_under_several_names_is_turned_once_and_stays_one(where):
    model, x = Shared().double(), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    expected = model(x)
    groupable(model, where)
    assert type(model.first) is DGConv2d
    assert model.first is model.again is model.deep[1]
    assert model.tied.weight is model.first.weight
    assert type(model.tied) is (DGConv2d if where is None else nn.Conv2d)
    torch.testing.assert_close(connected(model)(x), expected)


def test_tied_kernels_with_groups_stay_tied():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, groups=2) for _ in range(3)))
    model[1].weight = model[0].weight
    groupable(model)
    assert model[1].weight is model[0].weight
    assert model[2].weight is not model[0].weight
    assert len({id(layer.gate) for layer in model}) == 3


def test_the_optimizer_of_a_turned_network_moves_weights_and_gates():
    torch.manual_seed(0)
    model = groupable(nn.Sequential(nn.Conv1d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv1d(8, 8, 3)))
    before = copy.deepcopy(model.state_dict())
    assert set(before) == {f"{i}.{name}" for i in (0, 2) for name in ("weight", "bias", "gate")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 8, 9)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
