"""Graphs written without torch's exporter: the same file but for constants, and only where everything is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional

import foldgroup.nn  # noqa: F401  # registers the G-ResNeXt builders
from foldgroup.channel_order import ChannelOrder
from foldgroup.emit import direct
from foldgroup.emit.direct.graph import Unfamiliar
from foldgroup.emit.onnx import export_onnx, stored_weights_match
from foldgroup.emit.precision import typed
from foldgroup.errors import EmitError
from foldgroup.evaluation import evaluate
from foldgroup.forms import ChannelSelect, ChannelShuffle
from foldgroup.run import OnnxRuntimeRunner
from foldgroup.trace import attach_shapes, fork, trace
from passes import default_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, 4, 9, 9)


def is_direct(model: bytes) -> bool:
    return bool(onnx.load_from_string(model).producer_name == "foldgroup")


def by_torch(graph: fx.GraphModule, shape: tuple[int, ...], *, fixed_batch: bool = False) -> bytes:
    """What torch's exporter makes of ``graph``."""

    def refuse(*_: object) -> None:
        raise Unfamiliar("this test wants the other")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "write", refuse)
        model = export_onnx(graph, shape, fixed_batch=fixed_batch)
    assert not is_direct(model)
    return model


def described(model: bytes) -> list[tuple[Any, ...]]:
    """Every node: name, kind, inputs, outputs and attributes. Initializers are their values, axes from the front."""
    proto = onnx.load_from_string(model)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim) for value in (*proto.graph.value_info, *proto.graph.input)
    }

    def operand(node: onnx.NodeProto, value: str) -> object:
        if value not in stored:
            return value
        array = numpy_helper.to_array(stored[value])
        if node.op_type == "ReduceMean":
            return sorted(int(axis) % ranks[node.input[0]] for axis in array)
        return stored[value].data_type, array.shape, array.tobytes()

    return [
        (
            *(node.name, node.op_type, [operand(node, value) for value in node.input], list(node.output)),
            {a.name: helper.get_attribute_value(a) for a in node.attribute},
        )
        for node in proto.graph.node
    ]


def ports(model: bytes) -> dict[str, tuple[int, list[object]]]:
    """Type and shape of every value that is computed or given."""
    graph = onnx.load_from_string(model).graph
    values = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
    stored = {tensor.name for tensor in graph.initializer}
    return {
        name: (kind.elem_type, [axis.dim_param or axis.dim_value for axis in kind.shape.dim])
        for name, kind in values.items()
        if name not in stored
    }


def run(model: bytes, inputs: Tensor) -> tuple[np.ndarray, ...]:
    with OnnxRuntimeRunner(model) as runner:
        return tuple(runner.outputs(inputs.numpy()))


def alive(model: nn.Module) -> nn.Module:
    """With random gates, batch norms that do something, and no zeros for biases, which torch's exporter leaves out."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("gate"):
                tensor.normal_()
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return model


def assert_alike(graph: fx.GraphModule, shape: tuple[int, ...]) -> bytes:
    """Written here and by torch ``graph`` is one file; returns ours."""
    ours, theirs = export_onnx(graph, shape), by_torch(graph, shape)
    assert is_direct(ours)
    assert described(ours) == described(theirs)
    assert ports(ours) == ports(theirs)
    inputs = torch.randn(2, *shape[1:])
    for a, b in zip(run(ours, inputs), run(theirs, inputs), strict=True):
        np.testing.assert_array_equal(a, b)
    return ours


# ---- whole networks ----------------------------------------------------------------------------------------------

NETWORKS = {
    "g_resnext17_cifar": (1, 3, 32, 32),
    **dict.fromkeys(("resnext50_32x4d", "resnet18", "mobilenet_v3_small"), (1, 3, 64, 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_networks_are_written_as_torch_writes_them(name: str) -> None:
    torch.manual_seed(0)
    shape = NETWORKS[name]
    network = alive(torchvision.models.get_model(name))
    folded = default_pipeline().run(trace(network, shape)).graph
    model = assert_alike(typed(folded, torch.float32), shape)
    assert model == export_onnx(typed(folded, torch.float32), shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_written_as_torch_writes_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    folded = default_pipeline().run(trace(alive(torchvision.models.resnet18()), (1, 3, 32, 32))).graph
    graph = typed(folded, dtype, ["layer2.0.conv1", "fc"])
    ours, theirs = export_onnx(graph, (1, 3, 32, 32)), by_torch(graph, (1, 3, 32, 32))
    assert is_direct(ours)
    assert described(ours) == described(theirs) and ports(ours) == ports(theirs)
    if dtype == torch.float16:  # bfloat16 ONNX Runtime does not compute in on a processor
        inputs = torch.randn(3, 3, 32, 32)
        np.testing.assert_array_equal(run(ours, inputs)[0], run(theirs, inputs)[0])


# ---- every operation ---------------------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    """A subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def changed(module: nn.Module, **attributes: Any) -> nn.Module:
    """A module some of whose attributes were changed after it was made, as torch allows."""
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Wrapped(nn.Module):
    """A module between others, or a function of what they give."""

    def __init__(self, inner: nn.Module | Callable[..., Any], dimensions: int = 2) -> None:
        super().__init__()
        self.stem = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](4, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(8, *[1] * dimensions) + 1)
        self.inner = inner

    def forward(self, x: Tensor) -> object:
        x = self.stem(x)
        return self.inner(x) if isinstance(self.inner, nn.Module) else self.inner(x, self.scale)


def graph_of(inner: nn.Module | Callable[..., Any], dimensions: int = 2) -> fx.GraphModule:
    torch.manual_seed(0)
    leaves = (ChannelShuffle, ChannelSelect, Doubled)
    if not isinstance(inner, leaves):  # with what is computed of constants, which tracing would do beforehand
        return trace(alive(Wrapped(inner, dimensions)), (1, 4, *[9] * dimensions), to_train=True)
    graph = trace(Wrapped(nn.Identity(), dimensions), (1, 4, *[9] * dimensions))
    graph.add_submodule("inner", inner.eval())
    attach_shapes(graph, (1, 4, *[9] * dimensions))
    return graph


def windows(x: Tensor, _: Tensor) -> Tensor:
    """What is attended to in windows of 3 × 3."""
    count, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1).view(count, height // 3, 3, width // 3, 3, channels).transpose(2, 3)
    x = x.contiguous().view(-1, 9, channels)
    x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
    images = x.shape[0] // (height * width // 9)
    x = x.view(images, height // 3, width // 3, 3, 3, -1).transpose(2, 3).reshape(images, height, width, channels)
    return x.permute(0, 3, 1, 2)


def attended(x: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def differences_in_place(x: Tensor, scale: Tensor) -> Tensor:
    x -= scale
    x /= scale
    return x.sub_(scale)


def overwritten(x: Tensor, scale: Tensor) -> Tensor:
    x += scale
    x *= scale
    return functional.relu(x, inplace=True)


MODULES: dict[str, tuple[nn.Module | Callable[..., Any], int]] = {
    "strided": (nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=2, bias=False), 2),
    "depthwise": (nn.Conv2d(8, 16, 3, groups=8), 2),
    "grouped": (nn.Conv1d(8, 12, 3, groups=4, padding=2, dilation=2), 1),
    "volume": (nn.Conv3d(8, 4, (1, 2, 3), stride=2), 3),
    "a number for all axes": (changed(nn.Conv2d(8, 8, 3), stride=2), 2),
    "one number for all axes": (nn.Sequential(nn.MaxPool2d(3, 1, (1,)), nn.AvgPool2d(3, 1, (1,))), 2),
    "same": (nn.Conv2d(8, 8, (3, 5), padding="same", dilation=(1, 2)), 2),
    "valid": (nn.Conv2d(8, 8, 3, padding="valid"), 2),
    "max": (nn.MaxPool2d(3, 2, 1), 2),
    "max1": (nn.MaxPool1d(2), 1),
    "max3": (nn.MaxPool3d((1, 2, 3), dilation=2), 3),
    "average": (nn.AvgPool2d(3, 2, 1), 2),
    "average1": (nn.AvgPool1d(3, padding=1), 1),
    "average3": (nn.AvgPool3d(3, 2, 1, count_include_pad=False), 3),
    "global": (nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(8, 5)), 2),
    "global3": (nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5, bias=False)), 3),
    "global function": (lambda x, _: functional.adaptive_avg_pool2d(x, (1, 1)), 2),
    "global function3": (lambda x, _: functional.adaptive_avg_pool3d(x, 1), 3),
    "flatten": (
        lambda x, _: (x.flatten(1), torch.flatten(x.relu(), start_dim=1)),
        2,
    ),
    "mean": (lambda x, _: (x.mean((2, 3)), torch.mean(x, -1, keepdim=True), x.mean([1, 2], True)), 2),
    "normalised": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), 2),
    "normalised by whole numbers": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8, momentum=1, eps=1)), 2),
    "normalised1": (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8)), 1),
    "normalised3": (nn.Sequential(nn.ReLU(), nn.BatchNorm3d(8)), 3),
    "activations": (
        nn.Sequential(nn.ReLU(inplace=True), nn.Tanh(), nn.ReLU6(), nn.Sigmoid(), nn.Hardtanh(-0.5, 2), nn.SiLU()),
        2,
    ),
    "hard": (nn.Sequential(nn.Hardswish(), nn.Hardsigmoid()), 2),
    "soft": (nn.Sequential(nn.GELU(), nn.LeakyReLU(), nn.Mish(), nn.GELU("tanh"), nn.LeakyReLU(0.3)), 2),
    "soft functions": (lambda x, _: functional.gelu(functional.leaky_relu(functional.silu(x), 0.3)), 2),
    "hard functions": (lambda x, _: functional.relu6(functional.hardswish(functional.hardsigmoid(x), True)), 2),
    "functions": (lambda x, _: torch.relu(torch.tanh(functional.relu(torch.sigmoid(x.relu())))).tanh().sigmoid(), 2),
    "left out": (nn.Sequential(nn.Dropout(), nn.ReLU(), nn.Identity(), nn.Dropout2d(), nn.Sigmoid()), 2),
    "left out1": (nn.Sequential(nn.Dropout1d(), nn.Sigmoid()), 1),
    "left out3": (nn.Sequential(nn.Dropout3d(), nn.Sigmoid()), 3),
    "sums": (lambda x, s: torch.add(x + s, x).add(s).mul(x) * torch.mul(s, x), 2),
    "scaled": (lambda x, _: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), 2),
    "overwritten": (overwritten, 2),
    "joined": (lambda x, s: torch.cat([x, x * s, torch.concat((x, x), dim=-3)], 1), 2),
    "joined in space": (lambda x, s: torch.cat((x, x * s), dim=-1), 2),
    "index": (ChannelShuffle(ChannelOrder((3, 0, 1, 2, 7, 6, 5, 4)), "stem"), 2),
    "digits": (ChannelShuffle(ChannelOrder.from_digits((2, 4), (1, 0)), "stem"), 2),
    "digits in 1-D": (ChannelShuffle(ChannelOrder.from_digits((2, 2, 2), (2, 0, 1)), "stem"), 1),
    "selected": (ChannelSelect((0, 0, 7, 3), "stem"), 2),
    "transposed convolution": (nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2), 2),
    "transposed signal": (nn.ConvTranspose1d(8, 6, 3, dilation=2, bias=False), 1),
    "transposed volume": (nn.ConvTranspose3d(8, 4, 2, stride=(1, 2, 1)), 3),
    "uneven": (nn.Conv2d(8, 8, 2, padding="same"), 2),
    "reflect": (nn.Conv2d(8, 8, 3, padding=(1, 2), padding_mode="reflect"), 2),
    "replicate": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate"), 2),
    "circular": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), 2),
    "linear of positions": (nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 7, bias=False)), 2),
    "slopes": (nn.Sequential(nn.PReLU(), nn.PReLU(8)), 2),
    "layer norm": (nn.Sequential(nn.ReLU(), nn.LayerNorm(9, eps=1e-3), nn.LayerNorm((9, 9), bias=False)), 2),
    "instance norm": (nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True)), 2),
    "instance norm1": (nn.InstanceNorm1d(8, affine=True), 1),
    "instance norm3": (nn.InstanceNorm3d(8, affine=True), 3),
    "no stride": (nn.Sequential(changed(nn.MaxPool2d(3), stride=None), changed(nn.AvgPool2d(3), stride=None)), 2),
    "pool functions": (
        lambda x, _: functional.avg_pool2d(functional.max_pool2d(x, 3, 1, 1), 3, stride=2, padding=1),
        2,
    ),
    "pool functions1": (lambda x, _: functional.avg_pool1d(functional.max_pool1d(x, 2), 2), 1),
    "pool functions3": (lambda x, _: functional.avg_pool3d(functional.max_pool3d(x, 2), (1, 2, 2)), 3),
    "fewer positions": (nn.Sequential(nn.AdaptiveAvgPool2d((3, 9)), nn.AdaptiveAvgPool2d((None, 3))), 2),
    "numbers": (lambda x, _: (2 - x * 0.5 + 1) / 3 - (x + 1), 2),
    "differences": (lambda x, s: (x - s).sub(x * x).div(s), 2),
    "powers": (lambda x, _: torch.pow(x, 2) + (x * x + 1).pow(0.5) + x**3, 2),
    "greater and smaller": (lambda x, s: torch.minimum(torch.maximum(x, x * s), -x), 2),
    "vector norm": (lambda x, _: torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True), 2),
    "along axes": (
        lambda x, _: (functional.softmax(x, 1), x.softmax(dim=-1), torch.log_softmax(x, 2)),
        2,
    ),
    "softmax": (nn.Sequential(nn.Softmax(1), nn.LogSoftmax(dim=-1)), 2),
    "products": (lambda x, _: torch.matmul(x, x.transpose(2, 3)) @ x, 2),
    "product of two": (lambda x, _: torch.bmm(x, x.transpose(1, 2)), 1),
    "views by sizes": (lambda x, _: x.view(x.shape[0], -1, x.shape[2] * x.shape[3] // 3, 3), 2),
    "unflatten": (nn.Sequential(nn.Unflatten(1, (2, 4)), nn.ReLU(), nn.Flatten(1, 2)), 2),
    "orders": (
        lambda x, _: (x.permute(0, 2, 3, 1).relu(), torch.permute(x, (0, 3, 1, 2)), x.swapaxes(1, -1).tanh()),
        2,
    ),
    "padded by other": (nn.Sequential(nn.ReflectionPad2d((1, 2, 0, 1)), nn.ReplicationPad2d(1), nn.ZeroPad2d(2)), 2),
    "padded with a number": (nn.Sequential(nn.ConstantPad2d((1, 0, 2, 3), 1.5), nn.CircularPad2d(1)), 2),
    "pixels": (nn.PixelShuffle(2), 2),
    "not dropped": (
        lambda x, _: functional.dropout(x, 0.5, False) + torchvision.ops.stochastic_depth(x, 0.5, "row", False),
        2,
    ),
    "unchanged": (lambda x, _: x.contiguous().detach().clone().float().relu(), 2),
    "differences as functions": (lambda x, s: -torch.sub(x, s).neg() - torch.neg(torch.div(x, s)), 2),
    "activations in place": (lambda x, _: torch.tanh_(torch.sigmoid_(torch.relu_(x))).relu_().tanh_().sigmoid_(), 2),
    "limits in place": (
        lambda x, _: torch.clamp_(functional.leaky_relu_(functional.hardtanh_(functional.elu_(x.clamp_(-3, 4)))), 0, 1),
        2,
    ),
    "in place": (lambda x, s: (x + s).add_(x).sub_(s).mul_(s).div_(s), 2),
    "overwritten twice": (differences_in_place, 2),
    "greater and smaller as methods": (lambda x, s: x.maximum(x * s).minimum(x * x), 2),
    "products as functions": (lambda x, _: x.matmul(x.transpose(2, 3)), 2),
    "products of signals": (lambda x, _: x.bmm(torch.transpose(x, 1, 2)), 1),
    "logarithm along an axis": (lambda x, _: (functional.log_softmax(x, 1), x.log_softmax(-1)), 2),
    "exponential along an axis": (lambda x, _: torch.softmax(x, 1), 2),
    "dropped out nothing": (
        lambda x, _: functional.dropout3d(
            functional.dropout2d(torch.dropout(x, 0.1, False), 0.1, False), 0.1, False
        ).relu(),
        3,
    ),
    "stochastic depth": (nn.Sequential(nn.ReLU(), torchvision.ops.StochasticDepth(0.5, "row"), nn.Sigmoid()), 2),
    "swapped": (lambda x, _: torch.swapaxes(x, 1, 2), 2),
    "joined by another name": (lambda x, _: torch.concatenate((x, x), 1), 2),
    "pixel shuffle": (lambda x, _: functional.pixel_shuffle(x, 2), 2),
    "padded signal": (nn.Sequential(nn.ReflectionPad1d(1), nn.ReplicationPad1d((0, 2)), nn.CircularPad1d(1)), 1),
    "padded signal with numbers": (nn.Sequential(nn.ZeroPad1d(1), nn.ConstantPad1d((2, 0), 0.5)), 1),
    "padded volume": (nn.Sequential(nn.ReflectionPad3d(1), nn.ReplicationPad3d((0, 2, 1, 0, 0, 1))), 3),
    "padded volume with numbers": (nn.Sequential(nn.ZeroPad3d(1), nn.ConstantPad3d(1, 0.5), nn.CircularPad3d(1)), 3),
    "single values": (lambda x, _: torch.log(x.abs() + 1) + torch.exp(x).sqrt(), 2),
    "single values as methods": (lambda x, _: torch.sqrt(torch.abs(x)) + (x.exp() + 1).log(), 2),
    "one over the root": (lambda x, _: torch.rsqrt(x.abs() + 1) + (x * x + 1).rsqrt(), 2),
}
"""What is written as torch writes it, node for node, and of how many dimensions."""

IN_OTHER_NODES: dict[str, tuple[nn.Module | Callable[..., Any], int]] = {
    "group norm": (nn.Sequential(nn.ReLU(), nn.GroupNorm(2, 8), nn.GroupNorm(8, 8, affine=False)), 2),
    "rounded up to the same": (
        nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, ceil_mode=True)),
        2,
    ),
    "rounded up": (
        nn.Sequential(nn.MaxPool2d((3, 2), 2, (1, 0), ceil_mode=True), nn.AvgPool2d(2, ceil_mode=True)),
        2,
    ),
    "rounded up, without padding": (nn.AvgPool2d(4, 3, 1, ceil_mode=True, count_include_pad=False), 2),
    "rounded up by dilation": (nn.MaxPool1d(3, 4, 1, dilation=3, ceil_mode=True), 1),
    "copied in another order": (lambda x, _: x.contiguous(memory_format=torch.channels_last).relu(), 2),
    "unequal windows": (nn.Sequential(nn.AdaptiveAvgPool2d((4, 12)), nn.AdaptiveAvgPool2d((None, 7))), 2),
    "unequal windows of a signal": (lambda x, _: functional.adaptive_avg_pool1d(x, 5), 1),
    "over axes": (lambda x, _: (x.sum((2, 3)), torch.amax(x, -1, keepdim=True), x.amin(1), x.norm(dim=1)), 2),
    "views": (
        lambda x, _: (x.view(x.size(0), 2, 4, 9, 9).sigmoid(), x.reshape(-1, 8, 81).relu(), x.flatten(2).tanh()),
        2,
    ),
    "axes": (
        lambda x, _: (x.unsqueeze(1).squeeze(1).unsqueeze(-1).relu(), x.unflatten(1, (2, 4)).tanh()),
        2,
    ),
    "halves": (lambda x, _: torch.cat([x.chunk(2, 1)[1], torch.chunk(x, chunks=2, dim=1)[0]], 1), 2),
    "parts": (
        lambda x, _: (x.split([3, 5], dim=1)[1].relu(), torch.split(x, 3, -1)[0].tanh(), x.split(4, 1)[0].relu()),
        2,
    ),
    "slices": (lambda x, _: (x[:, 2:5].relu(), x[:, :, ::2, 1::3].tanh(), x[..., -1].relu()), 2),
    "indices": (lambda x, _: (x[:, 3].relu(), x[:, None, :, 2:4].tanh(), x.narrow(1, 2, 4).relu()), 2),
    "stacked": (lambda x, s: torch.stack([x, x * s], dim=1).sum(1), 2),
    "padded": (lambda x, _: functional.pad(functional.pad(x, (1, 2)), (0, 1, 2, 0, 0, 3), value=0.5), 2),
    "nearest": (lambda x, _: functional.interpolate(x, scale_factor=2), 2),
    "nearest to a size": (lambda x, _: functional.interpolate(x, size=(18, 27)), 2),
    "linear": (nn.Upsample(scale_factor=2, mode="bilinear"), 2),
    "linear to a size": (lambda x, _: functional.interpolate(x, (13, 7), mode="bilinear"), 2),
    "linear between corners": (nn.Upsample(size=(17, 20), mode="bilinear", align_corners=True), 2),
    "linear by other than a whole number": (nn.Upsample(scale_factor=1.3, mode="bilinear"), 2),
    "cubic": (nn.Upsample(scale_factor=2, mode="bicubic"), 2),
    "signal": (nn.Upsample(scale_factor=3, mode="linear"), 1),
    "over axes by other names": (
        lambda x, _: (torch.sum(x, 1), x.amax((1, 2)), torch.amin(x, 3), torch.norm(x, dim=1, keepdim=True)),
        2,
    ),
    "reshaped": (
        lambda x, _: (torch.reshape(x, (-1, 2, 324)).relu(), torch.unflatten(x, -1, (3, 3)).tanh()),
        2,
    ),
    "axes as functions": (lambda x, _: torch.squeeze(torch.unsqueeze(x, 2), 2) + torch.narrow(x, -1, 0, 1), 2),
    "exponential": (nn.Sequential(nn.ELU(0.5), nn.Softplus()), 2),
    "exponential functions": (lambda x, _: functional.softplus(functional.elu(x)), 2),
    "clipped": (lambda x, _: functional.hardtanh(torch.clamp(x.tanh().clamp(min=-0.5), -1.0, 0.5), max_val=0.25), 2),
    "rows": (
        lambda x, _: (x.flatten(0, 1).tanh(), x.view(2 * x.size(0), 4, 9, 9).relu(), x.reshape(-1, 9, 9).abs()),
        2,
    ),
    "windows": (windows, 2),
    "attention": (
        lambda x, _: functional.scaled_dot_product_attention(x, x, x * x) - attended(x, x.mean(1, keepdim=True)),
        2,
    ),
    "attention with a bias": (lambda x, s: functional.scaled_dot_product_attention(x, x, x, s), 2),
    "einsum": (lambda x, _: torch.einsum("N C H W, N C V W -> N C H V", x, x.relu()), 2),
    "like another": (
        lambda x, _: (
            x.flatten(2).view_as(x).relu(),
            x.flatten(0, 1).reshape_as(x).abs(),
            x.mean(1, True).expand_as(x),
        ),
        2,
    ),
    "expanded": (
        lambda x, _: (x.mean(1, True).expand(-1, 5, -1, -1), x.unsqueeze(2).expand((x.size(0), 8, 2, 9, 9)).relu()),
        2,
    ),
    "sum of a product": (lambda x, s: torch.addcmul(x, x, s) + torch.addcmul(s, x, x), 2),
    "copied": (lambda x, _: torch.clone(x).relu(), 2),
}
"""What is written in other nodes, which compute the same."""


def assert_computes(graph: fx.GraphModule, ours: bytes, shape: tuple[int, ...]) -> None:
    """The file computes what ``graph`` does for one image and several, and so does one for a fixed number of them."""
    assert is_direct(ours)
    for batch in (1, 3):
        inputs = torch.randn(batch, *shape[1:])
        expected = evaluate(graph, inputs, torch.float32)["output"]
        for a, b in zip(run(ours, inputs), expected if isinstance(expected, tuple) else [expected], strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=2e-5)
    fixed = export_onnx(graph, (3, *shape[1:]), fixed_batch=True)
    assert is_direct(fixed) and ports(fixed)["input"][1] == [3, *shape[1:]]
    for a, b in zip(run(fixed, inputs), run(ours, inputs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # the uneven one
@pytest.mark.parametrize("name", MODULES)
def test_every_operation_is_written_as_torch_writes_it(name: str) -> None:
    inner, dimensions = MODULES[name]
    graph, shape = graph_of(inner, dimensions), (1, 4, *[9] * dimensions)
    assert_computes(graph, assert_alike(graph, shape), shape)


@pytest.mark.parametrize("name", IN_OTHER_NODES)
def test_what_is_written_in_other_nodes_computes_the_same(name: str) -> None:
    inner, dimensions = IN_OTHER_NODES[name]
    graph, shape = graph_of(inner, dimensions), (1, 4, *[9] * dimensions)
    ours, theirs = export_onnx(graph, shape), by_torch(graph, shape)
    assert_computes(graph, ours, shape)
    inputs = torch.randn(2, *shape[1:])
    for a, b in zip(run(ours, inputs), run(theirs, inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


MISTAKEN: dict[str, nn.Module] = {
    "another divisor": nn.AvgPool2d(2, divisor_override=3),
    "another divisor, rounded up": nn.AvgPool2d(4, 3, 1, ceil_mode=True, divisor_override=5),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_what_torch_gets_wrong_is_written_right(name: str) -> None:
    graph = graph_of(MISTAKEN[name])
    assert_computes(graph, export_onnx(graph, SHAPE), SHAPE)


REFUSED: dict[str, tuple[Callable[..., Any], int]] = {
    "clamps": (lambda x, _: x.clamp(-1, 0.5).clamp(min=-0.5), 2),
    "fewer positions in a volume": (lambda x, _: functional.adaptive_avg_pool3d(x, (3, 9, 3)), 3),
    "attention of signals": (lambda x, _: functional.scaled_dot_product_attention(x, x, x, scale=0.5), 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_may_be_written(name: str) -> None:
    inner, dimensions = REFUSED[name]
    graph, shape = graph_of(inner, dimensions), (1, 4, *[9] * dimensions)
    assert_computes(graph, export_onnx(graph, shape), shape)
    with pytest.raises(EmitError):
        by_torch(graph, shape)


@pytest.mark.parametrize("name", ["global", "digits", "index"])
def test_a_fixed_batch_is_written_as_torch_writes_it(name: str) -> None:
    graph = graph_of(*MODULES[name])
    ours, theirs = (write(graph, (3, *SHAPE[1:]), fixed_batch=True) for write in (export_onnx, by_torch))
    assert described(ours) == described(theirs) and ports(ours) == ports(theirs)


@pytest.mark.parametrize("function", [False, True])
def test_a_pool_to_one_position_of_a_signal_takes_one_node_instead_of_three(function: bool) -> None:
    graph = graph_of((lambda x, _: functional.adaptive_avg_pool1d(x, 1)) if function else nn.AdaptiveAvgPool1d(1), 1)
    ours = export_onnx(graph, (1, 4, 9))
    name = "reducemean" if function else "inner"
    assert [node[:2] for node in described(ours)] == [("stem", "Conv"), (name, "ReduceMean")]
    inputs = torch.randn(3, 4, 9)
    np.testing.assert_allclose(run(ours, inputs)[0], run(by_torch(graph, (1, 4, 9)), inputs)[0], rtol=0, atol=1e-6)


def test_every_operation_of_the_table_is_tested() -> None:
    """By a graph above or, the casts, by those in 16 bits."""
    seen: set[object] = {"to", nn.AdaptiveAvgPool1d, functional.adaptive_avg_pool1d}
    for inner, dimensions in (*MODULES.values(), *IN_OTHER_NODES.values()):
        graph = graph_of(inner, dimensions)
        for node in graph.graph.nodes:
            seen.add(type(graph.get_submodule(node.target)) if node.op == "call_module" else node.target)
    assert not set(direct.OPERATIONS) - seen


# ---- layers and weights that occur twice -------------------------------------------------------------------------


class Twice(nn.Module):
    """One module called twice, two modules of one weight, and outputs named after layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.b.weight = self.a.weight
        self.relu_2 = nn.ReLU()
        self.add = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.c(functional.relu(self.c(self.b(self.a(x)))))
        z = self.add(functional.relu(y + x)) + self.relu_2(y)
        return {"c": z, "mean": y.mean((2, 3)), "input": y * z}


def test_what_occurs_twice_is_stored_once_and_named_apart() -> None:
    torch.manual_seed(0)
    graph = trace(Twice(), SHAPE)
    model = export_onnx(graph, SHAPE)
    proto = onnx.load_from_string(model)
    assert is_direct(model)
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names) and {"a", "b", "c", "c_2", "add", "relu_2"} <= set(names)
    assert next(node.op_type for node in proto.graph.node if node.name == "add") == "Conv"
    assert [tensor.name for tensor in proto.graph.initializer if tensor.name.endswith("weight")] == [
        *("a.weight", "c.weight", "add.weight")
    ]
    assert [value.name for value in proto.graph.output] == ["c", "mean", "input_2"]
    assert stored_weights_match(model, graph) == 5
    inputs = torch.randn(2, *SHAPE[1:])
    with torch.no_grad():
        expected = graph(inputs)
    for ours, theirs in zip(run(model, inputs), expected.values(), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


def test_a_batch_norm_after_a_convolution_stays_a_node() -> None:
    """torch's exporter fuses the two, and the file would no longer hold the layer's weights."""
    graph = graph_of(nn.BatchNorm2d(8))
    model = export_onnx(graph, SHAPE)
    assert [node[1] for node in described(model)] == ["Conv", "BatchNormalization"]
    inputs = torch.randn(2, *SHAPE[1:])
    expected = evaluate(graph, inputs)["output"].numpy()
    np.testing.assert_allclose(run(model, inputs)[0], expected, rtol=0, atol=1e-5)


def test_graphs_without_shapes_or_of_another_size_get_them() -> None:
    graph = graph_of(nn.Sequential(nn.ReLU(), nn.Flatten()))
    for size in (9, 6):
        bare = fork(graph)
        for node in bare.graph.nodes if size == 9 else ():
            node.meta = {}
        model = export_onnx(bare, (1, 4, size, size))
        assert is_direct(model)
        assert ports(model)["logits"][1] == ["batch", 8 * size**2]


# ---- near misses -------------------------------------------------------------------------------------------------


def hooked() -> nn.Module:
    layer = nn.ReLU()
    layer.register_forward_hook(lambda *_: None)
    return layer


MISSES: dict[str, tuple[nn.Module | Callable[..., Any], str]] = {
    "rounded up far": (nn.MaxPool2d(2, 4, dilation=3, ceil_mode=True), "rounds up by a kernel or more"),
    "average rounded up, with padding": (nn.AvgPool2d(4, 3, 1, ceil_mode=True), "counts some of its padding"),
    "indices": (lambda x, _: functional.max_pool2d(x, 2, return_indices=True)[0], "max_pool2d_with_indices"),
    "subclass": (Doubled(8, 8, 1), "Doubled"),
    "hooks": (hooked(), "hooks"),
    "unknown": (lambda x, _: torch.cumsum(x, 2), "cumsum"),
    "softsign": (nn.Softsign(), "Softsign"),
    "sharper": (nn.Softplus(beta=2), "is sharper"),
    "other volume": (
        lambda x, _: functional.adaptive_avg_pool3d(x.unsqueeze(1), (8, 4, 4)),
        "pools [8, 9, 9] to (8, 4, 4)",
    ),
    "mean of the batch": (lambda x, _: x.mean((0, 1), keepdim=True) + x, "is the mean over"),
    "mean of all": (lambda x, _: x + x.mean(), "arguments that are not known"),
    "mean in another type": (lambda x, _: x.mean(1, dtype=torch.float64).float(), "arguments that are not known"),
    "sum of all": (lambda x, _: x + x.sum(), "arguments that are not known"),
    "norm of order 1": (lambda x, _: x.norm(p=1, dim=1), "norm of order 1"),
    "along the batch": (lambda x, _: functional.softmax(x, dim=-4), "along axis -4"),
    "softmax in another type": (lambda x, _: functional.softmax(x, 1, dtype=torch.float64).float(), "or casts"),
    "alpha": (lambda x, s: torch.add(x, s, alpha=2), "arguments that are not known"),
    "rounded quotient": (lambda x, s: torch.div(x, s, rounding_mode="floor"), "arguments that are not known"),
    "numbers and whole numbers": (lambda x, _: (x.to(torch.int64) * 2).float(), "computes in whole numbers"),
    "of constants": (lambda x, s: x + torch.relu(s), "reads a constant"),
    "of constants alone": (lambda x, s: x * (s + s), "broadcasts along the batch"),
    "ranks": (lambda x, _: x.mean((1, 2)) * x, "broadcasts along the batch"),
    "product of a constant": (lambda x, s: torch.matmul(s, x[:, :, :1]), "multiplies 3 axes by 4"),
    "product of other ranks": (lambda x, _: torch.matmul(x, x.mean(1)), "multiplies 4 axes by 3"),
    "expanded batch": (lambda x, _: x.mean(0, keepdim=True) + x, "is the mean over"),
    "another batch": (lambda x, _: x.expand(2, -1, -1, -1).sum(1), "expands"),
    "another axis for images": (lambda x, _: x.expand(2, -1, -1, -1, -1).sum(0), "expands"),
    "scaled product": (lambda x, s: torch.addcmul(x, x, s, value=2), "scales a product"),
    "product of constants": (lambda x, s: torch.addcmul(x, s, s), "multiplies constants"),
    "other rows": (lambda x, _: x.flatten(0, 1)[:, None] + x.mean(1, keepdim=True), "several numbers of rows"),
    "causal": (lambda x, _: functional.scaled_dot_product_attention(x, x, x, is_causal=True), "is causal"),
    "sum over images": (lambda x, _: torch.einsum("nchw,nchw->chw", x, x)[None] + x, "computes nchw,nchw->chw"),
    "einsum by dots": (lambda x, _: torch.einsum("n...,n...->n...", x, x), "computes n...,n...->n..."),
    "joined batches": (lambda x, _: torch.cat([x, x]).mean((2, 3)), "along axis 0"),
    "stacked batches": (lambda x, _: torch.stack([x, x]).sum(0), "along axis 0"),
    "overwritten": (lambda x, s: (x.mul(s), x.mul_(s))[0], "overwrites"),
    "no statistics": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8, track_running_stats=False)), "no statistics"),
    "no scale": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8, affine=False)), "no scale"),
    "no shift": (nn.Sequential(nn.ReLU(), changed(nn.BatchNorm2d(8), bias=None)), "no shift"),
    "no scale of positions": (nn.LayerNorm(9, elementwise_affine=False), "no scale"),
    "kept statistics": (nn.InstanceNorm2d(8, track_running_stats=True), "kept statistics"),
    "whole numbers": (lambda x, _: torch.sigmoid(x.to(torch.int64)), "of another type"),
    "another type": (lambda x, _: x.to(torch.float64).float(), "a cast to torch.float64"),
    "clipped by a tensor": (lambda x, s: torch.clamp(x, s, x), "clipped by what is computed"),
    "view of all images as one": (lambda x, _: x.view(1, -1, 9, 9), "is a view as [1, -1, 9, 9]"),
    "view of the batch elsewhere": (lambda x, _: x.view(-1, x.size(0), 81), "is a view as"),
    "view in another type": (lambda x, _: x.view(torch.int32).to(torch.float32), "is a view as"),
    "squeezed": (lambda x, _: x.squeeze(), "along axis None"),
    "squeezed batch": (lambda x, _: x.squeeze(0), "along axis 0"),
    "a new axis before the batch": (lambda x, _: x.unsqueeze(-5), "along axis -5"),
    "unflattened batch": (lambda x, _: x.unflatten(0, (-1, 1)), "along axis 0"),
    "moved batch": (lambda x, _: x.permute(1, 0, 2, 3), "moves the batch"),
    "transposed batch": (lambda x, _: x.transpose(-4, 1), "along axis -4"),
    "split batch": (lambda x, _: x.split(1)[0], "along axis 0"),
    "split by the batch": (lambda x, _: x.split(x.size(0), dim=1)[0], "splits by"),
    "slice of the batch": (lambda x, _: x[:1], "takes"),
    "an image": (lambda x, _: x[0], "takes"),
    "as many channels as images": (lambda x, _: x[:, : x.size(0)], "takes"),
    "index": (lambda x, _: x[:, torch.tensor([0, 3])], "takes"),
    "another axis in front": (lambda x, _: x[None], "takes"),
    "slice of parts": (lambda x, _: torch.cat(x.chunk(2, 1)[::-1], 1), "is read as a tensor"),
    "narrow batch": (lambda x, _: x.narrow(0, 0, 1), "along axis 0"),
    "cropped": (lambda x, _: functional.pad(x, (-1, 0)), "pads with constant by"),
    "padded batch": (lambda x, _: functional.pad(x, (0, 0) * 3 + (1, 1)), "pads with constant by"),
    "nearest by halves": (nn.Upsample(scale_factor=1.5), "by nearest"),
    "nearest to a third": (lambda x, _: functional.interpolate(x, size=3), "by nearest"),
    "mean of areas": (lambda x, _: functional.interpolate(x, size=3, mode="area"), "by area"),
    "smooth": (lambda x, _: functional.interpolate(x, (5, 5), mode="bilinear", antialias=True), "by bilinear"),
    "to one position": (nn.Upsample(size=(1, 3), mode="bilinear"), "by bilinear"),
    "pixels of a volume": (lambda x, _: functional.pixel_shuffle(x.unsqueeze(2), 1), "5 axes"),
    "same output twice": (lambda x, _: (torch.relu(x), x, x), "another output"),
    "output of a view": (nn.Sequential(nn.ReLU(), nn.Identity()), "another output"),
    "output of parts": (lambda x, _: (x.relu(), x.chunk(2, 1)[0]), "another output"),
}


def reason_of(graph: fx.GraphModule) -> str:
    from foldgroup.outputs import outputs_of

    given = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", *SHAPE[1:]])
    with pytest.raises(Unfamiliar) as refused:
        direct.write(graph, outputs_of(graph), given, 20)
    return str(refused.value)


@pytest.mark.parametrize("name", MISSES)
def test_a_near_miss_is_left_to_torch(name: str) -> None:
    inner, reason = MISSES[name]
    assert reason in reason_of(graph_of(inner))


def test_what_is_left_to_torch_is_exported() -> None:
    graph = graph_of(nn.Softsign())
    model = export_onnx(graph, SHAPE)
    assert not is_direct(model)
    inputs = torch.randn(2, *SHAPE[1:])
    np.testing.assert_allclose(run(model, inputs)[0], evaluate(graph, inputs)["output"].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["no shift", "no scale", "whole numbers", "squeezed"])
def test_what_the_writer_takes_for_another_thing_is_exported_right(name: str) -> None:
    graph = graph_of(MISSES[name][0])
    inputs = torch.randn(2, *SHAPE[1:])
    (ours,) = run(export_onnx(graph, SHAPE), inputs)
    np.testing.assert_allclose(ours, evaluate(graph, inputs, torch.float32)["output"].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("broken", [TypeError("unforeseen"), onnx.ModelProto()], ids=["raises", "writes nonsense"])
def test_what_the_writer_does_not_foresee_is_left_to_torch(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> onnx.ModelProto:
        if isinstance(broken, Exception):
            raise broken
        return broken

    monkeypatch.setattr(direct, "write", write)
    graph = graph_of(nn.ReLU())
    inputs = torch.randn(2, *SHAPE[1:])
    (ours,) = run(export_onnx(graph, SHAPE), inputs)
    np.testing.assert_allclose(ours, evaluate(graph, inputs)["output"].numpy(), rtol=0, atol=1e-5)


def test_a_dropout_in_training_mode_is_left_to_torch() -> None:
    graph = graph_of(nn.Dropout())
    graph.get_submodule("inner").train()
    assert "training mode" in reason_of(graph)


def test_types_that_differ_are_left_to_torch() -> None:
    graph = graph_of(nn.ReLU())
    graph.get_submodule("stem").double()
    assert "another type" in reason_of(graph)


def test_a_constant_that_has_the_axis_of_the_batch_is_left_to_torch() -> None:
    graph = graph_of(lambda x, s: x * s)
    graph.scale = nn.Parameter(torch.rand(3, 8, 1, 1))
    attach_shapes(graph, (3, *SHAPE[1:]))
    assert "broadcasts along the batch" in reason_of(graph)
