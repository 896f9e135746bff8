"""Groupable ResNeXt: torchvision's with DGConv in their bottlenecks. Most tests need only shapes (meta device)."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import nn
from torchvision.models import get_model, list_models
from torchvision.models.resnet import Bottleneck, ResNet, resnext50_32x4d, resnext101_32x8d

import foldgroup.nn
from foldgroup.errors import ModelError
from foldgroup.nn import BottleneckConfig, DGConv2d, GroupableResNet, StageConfig
from foldgroup.nn.complexity import groupable_layers

ARCHITECTURES = ["g_resnext101", "g_resnext101_32x8d", "g_resnext17_cifar", "g_resnext29_cifar", "g_resnext50"]


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


@cache
def registered(name):
    """A registered network without data, built once."""
    return on_meta(get_model, name)


def output_shape(model, *shape):
    return tuple(model(torch.empty(shape, device="meta")).shape)


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shapes_with_groups_undone(model):
    """A torchvision network's shapes if each of its grouped convolutions were dense."""
    dense = {f"{n}.weight": m.groups for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {
        name: (shape[0], shape[1] * dense[name], *shape[2:]) if name in dense else shape
        for name, shape in shapes(model).items()
    }


# The registered networks


def test_torchvision_knows_the_networks():
    assert sorted(list_models(include="g_resnext*")) == ARCHITECTURES
    assert set(ARCHITECTURES) <= set(foldgroup.nn.__all__)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_registered_network_builds_without_data(name):
    model = registered(name)
    assert isinstance(model, ResNet)
    assert all(p.is_meta for p in model.parameters())
    assert "learned groups" in repr(model)


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [("g_resnext17_cifar", 32, 10), ("g_resnext29_cifar", 32, 10), ("g_resnext50", 224, 1000)],
)
def test_they_return_logits_only(name, size, classes):
    assert output_shape(registered(name), 2, 3, size, size) == (2, classes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_3x3_of_a_bottleneck_and_nothing_else_is_groupable(name):
    model = registered(name)
    blocks = [n for n, m in model.named_modules() if isinstance(m, Bottleneck)]
    assert list(groupable_layers(model)) == [f"{block}.conv2" for block in blocks]
    assert all(layer.kernel_size == (3, 3) for layer in groupable_layers(model).values())


@pytest.mark.parametrize("name", ["g_resnext17_cifar", "g_resnext29_cifar"])
def test_arguments_override_the_configuration(name):
    model = on_meta(get_model, name, num_classes=7, in_channels=1)
    assert output_shape(model, 1, 1, 64, 64) == (1, 7)


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_pretrained_weights_are_refused(weights):
    with pytest.raises(ModelError, match="no pre-trained weights"):
        get_model("g_resnext50", weights=weights)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("g_resnext50", resnext50_32x4d), ("g_resnext101_32x8d", resnext101_32x8d)]
)
def test_tensors_are_torchvision_s_with_groups_undone_and_gates_added(ours, theirs):
    mine, expected = shapes(registered(ours)), shapes_with_groups_undone(on_meta(theirs, weights=None))
    gates = {name: shape for name, shape in mine.items() if name.endswith("conv2.gate")}
    assert {name: shape for name, shape in mine.items() if name not in gates} == expected
    assert set(gates) == {name.replace("weight", "gate") for name in expected if name.endswith("conv2.weight")}
    assert all(2 ** shape[0] == expected[name.replace("gate", "weight")][0] for name, shape in gates.items())


def test_g_resnext50_is_table_1():
    widths = [layer.out_channels for layer in groupable_layers(registered("g_resnext50")).values()]
    assert widths == [128] * 3 + [256] * 4 + [512] * 6 + [1024] * 3


def test_g_resnext101_has_the_32x4d_widths_in_101_layers():
    widths = [layer.out_channels for layer in groupable_layers(registered("g_resnext101")).values()]
    assert widths == [128] * 3 + [256] * 4 + [512] * 23 + [1024] * 3


@pytest.mark.parametrize("name", ["g_resnext17_cifar", "g_resnext29_cifar", "g_resnext50", "g_resnext101"])
def test_the_number_in_the_name_counts_the_layers(name):
    model = registered(name)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    assert len(convolutions) + 1 == int("".join(c for c in name if c.isdigit()))  # and the classifier


def test_equal_seeds_give_equal_networks():
    first, second = ((torch.manual_seed(5), get_model("g_resnext17_cifar"))[1].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Any network of the family


@given(
    st.lists(
        st.builds(StageConfig, st.integers(1, 2), st.integers(1, 100), st.integers(1, 60).map(lambda n: 4 * n)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["imagenet", "cifar"]),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 20),
)
@quick(10)
def test_a_network_has_exactly_the_configured_channels(stages, stem, stem_channels, in_channels, classes):
    model = on_meta(GroupableResNet, BottleneckConfig(stem, tuple(stages), stem_channels, in_channels, classes))
    layers = groupable_layers(model)
    assert [layer.out_channels for layer in layers.values()] == [s.width for s in stages for _ in range(s.blocks)]
    for i, stage in enumerate(stages, start=1):
        blocks = getattr(model, f"layer{i}")
        assert len(blocks) == stage.blocks
        assert blocks[-1].conv3.out_channels == stage.out_channels
    assert model.conv1.in_channels == in_channels
    assert model.conv1.out_channels == stem_channels
    assert output_shape(model, 2, in_channels, 32, 32) == (2, classes)


@pytest.mark.parametrize("width", [20, 48, 96])
@pytest.mark.parametrize("out_channels", [64, 188, 308, 2048])  # 188 and 308 lose one where a ratio is rounded down
def test_odd_widths_are_not_rounded(width, out_channels):
    config = BottleneckConfig("cifar", (StageConfig(2, width, out_channels),))
    assert [layer.in_channels for layer in groupable_layers(on_meta(GroupableResNet, config)).values()] == [width] * 2


@pytest.mark.parametrize(("stem", "resolution"), [("imagenet", 64), ("cifar", 16)])
def test_only_later_stages_and_the_imagenet_stem_reduce_the_resolution(stem, resolution):
    config = BottleneckConfig(stem, (StageConfig(1, 4, 8), StageConfig(2, 4, 8), StageConfig(1, 4, 8)), 4)
    model = on_meta(GroupableResNet, config)
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[-1]))
    output_shape(model, 1, 3, resolution, resolution)
    assert sizes == [16, 8, 4]


def test_a_small_network_computes_and_every_gate_learns():
    torch.manual_seed(0)
    config = BottleneckConfig("cifar", (StageConfig(1, 12, 16), StageConfig(1, 20, 24)), 8, num_classes=3)
    model = GroupableResNet(config)
    logits = model(torch.randn(4, 3, 8, 8))
    logits.square().sum().backward()
    assert logits.shape == (4, 3)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(torch.any(layer.gate.grad != 0) for layer in groupable_layers(model).values())


def test_with_every_gate_open_it_is_torchvision_s_dense_network():
    torch.manual_seed(0)
    stages = tuple(StageConfig(1, 16 << i, 256 << i) for i in range(4))
    ours = GroupableResNet(BottleneckConfig("imagenet", stages, num_classes=5)).eval()
    theirs = ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=16, num_classes=5).eval()
    with torch.no_grad():
        for layer in groupable_layers(ours).values():
            layer.gate.fill_(1)
    theirs.load_state_dict({n: t for n, t in ours.state_dict().items() if not n.endswith(".gate")})
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("stages", [0, 5])
def test_other_than_one_to_four_stages_are_refused(stages):
    with pytest.raises(ModelError, match=f"{stages} stages: a network of this family has one to four"):
        on_meta(GroupableResNet, BottleneckConfig("cifar", (StageConfig(1, 8, 8),) * stages))


def test_output_channels_that_are_no_multiple_of_four_are_refused():
    with pytest.raises(ModelError, match="30 output channels are not a multiple of four"):
        on_meta(GroupableResNet, BottleneckConfig("cifar", (StageConfig(1, 8, 30),)))


def test_its_3x3_convolutions_are_drop_in_convolutions():
    model = registered("g_resnext17_cifar")
    assert all(isinstance(layer, DGConv2d) and layer.groups == 1 for layer in groupable_layers(model).values())
