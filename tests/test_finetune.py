"""A folded network that is trained is the training form that is trained, and finds its way back into it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import own_state, public_state, save
from graphs import CASES, conv, filled, learned
from tiny import tiny_network
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

import foldgroup
from foldgroup.errors import FoldgroupError, TraceError, TrainingError
from foldgroup.finetune import FineTunable, HeldConv1d, HeldConv2d, folded_for_training
from foldgroup.folding import fold
from foldgroup.forms import ChannelShuffle
from foldgroup.nn import DGConv, groupable
from foldgroup.nn.complexity import groupable_layers
from foldgroup.outputs import flat

pytestmark = pytest.mark.usefixtures("one_thread")
Shape = tuple[int, ...]
STEPS, LIMIT = 4, 1e-9


def residual_stream() -> nn.Module:
    """Layers that share channels and want other orders of them: shuffles are kept."""
    torch.manual_seed(0)
    return groupable(resnet18(num_classes=5), "layer[12].*.conv?")


def pruned() -> nn.Module:
    """A plain kernel with groups in its zeros, another with zeros here and there, and one that is all zero."""
    model = nn.Sequential(conv(3, 8), learned(8, 8, (1, 1, 0)), conv(8, 8, 3), nn.ReLU(), conv(8, 8, 3), conv(8, 4))
    filled(model)
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight * torch.block_diag(*[torch.ones(2, 2)] * 4)[:, :, None, None])
        model[4].weight[::2, 1::3, 0] = 0
    return nn.Sequential(model, nn.Identity())


def signal() -> nn.Module:
    """One dimension, with a layer whose groups are not kept apart."""
    return nn.Sequential(nn.Conv1d(2, 8, 3), *(_learned1d(bits) for bits in ((1, 1, 0), (0, 1, 1))), nn.Conv1d(8, 3, 1))


def _learned1d(bits: tuple[int, ...]) -> nn.Module:
    layer = DGConv.from_conv(nn.Conv1d(8, 8, 1))
    with torch.no_grad():
        layer.gate.copy_(torch.tensor(bits) * 2.0 - 1)
    return layer


def random_gates(model: nn.Module) -> nn.Module:
    for layer in groupable_layers(model).values():
        with torch.no_grad():
            layer.gate.normal_()
    return model


# Of the tests' networks all but one whose dropout draws other channels, and one that torch cannot train.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    **{name: (case.build, case.shape) for name, case in CASES.items() if name not in ("no-ops", "in place")},
    "g-resnext": (tiny_network, (1, 3, 16, 16)),
    "residual stream": (lambda: random_gates(residual_stream()), (1, 3, 48, 48)),
    "pruned": (pruned, (1, 3, 7, 7)),
    "signal": (signal, (1, 2, 9)),
}
REFUSED = {"tied weights": "are one tensor under masks of two layers"}
"""What cannot be trained in folded form, and why."""


def built(name: str) -> tuple[nn.Module, Shape]:
    build, shape = NETWORKS[name]
    model = build()
    return (model if name in ("pruned", "residual stream") else filled(model)).double().eval(), shape


def outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    return flat(model(inputs.clone()))


def train(model: nn.Module, inputs: Iterable[Tensor], seed: int = 1) -> None:
    """SGD as the trainer does it, on a loss that every output entry has its own part in."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for name, p in model.named_parameters() if not name.endswith("gate")]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-2)
    model.train()
    for given in inputs:
        optimizer.zero_grad()
        results = outputs(model, given)
        weights = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
        sum((torch.tanh(r) * w).mean() for r, w in zip(results, weights, strict=True)).backward()  # type: ignore[union-attr]
        optimizer.step()
    model.eval()


def effective(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with kernels masked."""
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, DGConv):
            state[f"{name}.weight"] = layer.masked_weight().detach()
    return state


def error(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)) if one.numel() else 0


@pytest.mark.parametrize("name", NETWORKS)
def test_training_the_folded_network_is_training_the_training_form(name: str) -> None:
    model, shape = built(name)
    torch.manual_seed(3)
    batches = [torch.randn(3, *shape[1:], dtype=torch.float64) for _ in range(STEPS)]
    try:
        tunable = folded_for_training(model, example_input=shape)
    except TrainingError as refusal:
        assert name in REFUSED and REFUSED[name] in str(refusal)
        return
    assert name not in REFUSED

    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, before[key]) for key, tensor in tunable.state_dict().items())
    tunable.module.eval()
    for ours, theirs in zip(outputs(tunable.module, batches[0]), outputs(model, batches[0]), strict=True):
        assert error(ours, theirs) <= 1e-12

    trained = copy.deepcopy(model)
    train(trained, batches)
    train(tunable.module, batches)
    ours, theirs = effective(tunable.training_form()), effective(trained)
    for key, tensor in theirs.items():
        if name == "pruned" and key in ("0.2.weight", "0.4.weight"):  # there the training form forgets its zeros
            assert torch.equal(ours[key] == 0, before[key] == 0)
            continue
        if name != "pruned":
            assert error(ours[key], tensor) <= LIMIT, key
    moved = [key for key, tensor in ours.items() if not torch.equal(tensor, before[key])]
    assert moved and all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    layers = {layer: module for layer, module in model.named_modules() if isinstance(module, DGConv)}
    for layer, module in layers.items():
        dropped = module.mask().expand_as(module.weight.flatten(2).movedim(2, 0)).movedim(0, 2) == 0
        kept = tunable.state_dict()[f"{layer}.weight"].flatten(2)
        assert torch.equal(kept[dropped], before[f"{layer}.weight"].flatten(2)[dropped])
        assert torch.equal(tunable.state_dict()[f"{layer}.gate"], before[f"{layer}.gate"])


def shuffles(module: nn.Module) -> int:
    return sum(isinstance(part, ChannelShuffle) for part in module.modules())


def test_networks_with_shuffles_and_with_padding_are_among_them() -> None:
    model, shape = built("residual stream")
    assert shuffles(folded_for_training(model, example_input=shape).module)
    model, shape = built("fan-out")
    held = [m for m in folded_for_training(model, example_input=shape).module.modules() if isinstance(m, HeldConv2d)]
    assert held and not all(m.kept.all() for m in held)
    model, shape = built("signal")
    assert any(isinstance(m, HeldConv1d) for m in folded_for_training(model, example_input=shape).module.modules())


def test_padding_stays_zero_and_is_never_written_back() -> None:
    model, shape = built("fan-out")
    tunable = folded_for_training(model, example_input=shape)
    tunable.module.eval()
    before, inputs = tunable.state_dict(), torch.randn(2, *shape[1:], dtype=torch.float64)
    result = tunable.module(inputs)
    for module in tunable.module.modules():
        if isinstance(module, HeldConv2d):
            with torch.no_grad():
                module.weight += 5 * ~module.kept
    assert torch.equal(tunable.module(inputs), result)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tunable.state_dict().items())


def test_it_is_smaller_than_the_training_form(tiny_checkpoint: Path) -> None:
    tunable = foldgroup.folded_for_training(tiny_checkpoint)
    parameters = [sum(p.numel() for p in m.parameters()) for m in (tunable.module, tunable.checkpoint.model)]
    assert parameters[0] < parameters[1] and tunable.classes == 5 and tunable.module.training
    assert any(isinstance(m, nn.BatchNorm2d) for m in tunable.module.modules())
    assert all(p.requires_grad for p in tunable.module.parameters())


def test_what_is_saved_is_read_folded_and_certified_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tunable = folded_for_training(tiny_checkpoint)
    train(tunable.module.double(), [torch.randn(4, 3, 16, 16, dtype=torch.float64)])
    tunable.save(tmp_path / "fine.pt", training={"steps": 1})
    was, now = foldgroup.load(tiny_checkpoint), foldgroup.load(tmp_path / "fine.pt")
    assert (now.classes, now.preprocessing, now.dialect) == (was.classes, was.preprocessing, "foldgroup")
    assert next(now.model.parameters()).dtype == torch.float32
    record = torch.load(tmp_path / "fine.pt", weights_only=True)["training"]
    assert record == {"finetune": was.sha256, "steps": 1}
    folded = fold(now)
    assert folded.certificate.holds
    inputs = torch.randn(2, 3, 16, 16)
    assert error(now.model(inputs), tunable.module.eval()(inputs.double())) < 1e-5
    assert error(now.model(inputs), was.model(inputs)) > 1e-4


def test_a_bundle_of_what_was_saved_verifies(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tunable = folded_for_training(tiny_checkpoint)
    train(tunable.module.double(), [torch.randn(4, 3, 16, 16, dtype=torch.float64)])
    tunable.save(tmp_path / "fine.pt")
    bundle = foldgroup.compile(tmp_path / "fine.pt", tmp_path / "b", engine=False, packing=False)
    assert bundle.manifest["certificate"]["holds"] and foldgroup.verify(tmp_path / "b", tmp_path / "fine.pt")


def test_a_public_checkpoint_becomes_one_of_ours(tmp_path: Path) -> None:
    path = save(tmp_path / "public.pth.tar", {"state_dict": public_state(own_state())})
    tunable = folded_for_training(path, input_size=16)
    tunable.save(tmp_path / "fine.pt")
    one, other = foldgroup.load(path), foldgroup.load(tmp_path / "fine.pt")
    assert all(torch.equal(tensor, other.model.state_dict()[key]) for key, tensor in one.model.state_dict().items())


def test_layers_that_do_not_learn_stay_so() -> None:
    model, shape = built("g-resnext")
    model.conv1.weight.requires_grad_(False)  # type: ignore[union-attr]
    tunable = folded_for_training(model, example_input=shape)
    assert [name for name, p in tunable.module.named_parameters() if not p.requires_grad] == ["conv1.weight"]


def test_a_parameter_of_the_network_s_own_stays_one() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.last = conv(3, 8), learned(8, 8, (1, 1, 0)), conv(8, 4)
            self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.first(x)) * self.scale)

    model = filled(Scaled()).double()
    tunable = folded_for_training(model, example_input=(1, 3, 5, 5))
    assert len(list(tunable.module.parameters())) == len(list(model.parameters())) - 1  # but for the gate
    train(tunable.module, [torch.randn(2, 3, 5, 5, dtype=torch.float64)])
    assert not torch.equal(tunable.state_dict()["scale"], model.scale)


# What is refused


def test_a_network_that_trains_otherwise_is_refused() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = learned(8, 8, (1, 1, 0))

        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(self.layer(x), training=self.training)

    with pytest.raises(TraceError, match=r"Drops computes dropout otherwise in training .*nn\.Dropout, not"):
        folded_for_training(Drops(), example_input=(1, 8, 5, 5))


def test_a_network_that_keeps_a_norm_from_training_is_refused() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = learned(8, 8, (1, 1, 0)), nn.BatchNorm2d(8)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x))

    with pytest.raises(TraceError, match="Frozen keeps norm in evaluation mode when it trains"):
        folded_for_training(Frozen(), example_input=(1, 8, 5, 5))


class Versioned(nn.Conv2d):
    """A layer that asks for its version when it is loaded, as some of torchvision's networks do."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != self._version:
            raise ValueError(f"version should be {self._version} instead of {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_layer_that_asks_for_its_version_is_told() -> None:
    model = filled(nn.Sequential(Versioned(3, 8, 3), learned(8, 8, (1, 1, 0)), conv(8, 4)))
    tunable = folded_for_training(model, example_input=(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(tunable.training_form()(x), model.eval()(x))


def test_dropout_as_a_module_is_kept() -> None:
    model = filled(nn.Sequential(conv(3, 8), learned(8, 8, (1, 1, 0)), nn.Dropout(0.5), conv(8, 4)))
    tunable = folded_for_training(model, example_input=(1, 3, 5, 5))
    assert any(isinstance(module, nn.Dropout) and module.training for module in tunable.module.modules())


def test_tied_kernels_are_refused_by_name() -> None:
    model, shape = built("tied weights")
    with pytest.raises(TrainingError, match="training would tell them apart; train it in training form"):
        folded_for_training(model, example_input=shape)


def shared_inputs() -> Tensor:
    """Four groups of outputs, of which neighbours share inputs: a gathered form, each weight once."""
    mask = torch.zeros(64, 48)
    for group, outs in enumerate(torch.arange(64).split(16)):
        mask[outs[:, None], torch.arange(group * 8, group * 8 + 24)] = 1
    return mask


def unequal_groups() -> Tensor:
    """Groups that are padded to one size by computing outputs twice: as that cannot be trained, the kernel is whole."""
    return torch.block_diag(*(torch.ones(outs, 16) for outs in (16, 16, 16, 12)))


@pytest.mark.parametrize("mask", [shared_inputs(), unequal_groups()], ids=["shared inputs", "unequal groups"])
def test_zeros_of_a_plain_kernel_stay_zero_in_whatever_form(mask: Tensor) -> None:
    outs, ins = mask.shape
    model = filled(nn.Sequential(conv(3, ins), conv(ins, outs, 3), conv(outs, 4))).double()
    kernel = dict(model.named_parameters())["1.weight"]
    kernel.data *= mask[:, :, None, None]
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tunable = folded_for_training(model, example_input=inputs)
    assert error(tunable.module.eval()(inputs), model(inputs)) <= 1e-12
    train(tunable.module, [inputs])
    trained = tunable.state_dict()["1.weight"]
    assert torch.equal(trained != 0, kernel != 0) and not torch.equal(trained, kernel)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FoldgroupError, match=r"none\.pt"):
        folded_for_training(tmp_path / "none.pt")


def test_the_result_is_one_to_use_often(tiny_checkpoint: Path) -> None:
    """Unfolding between steps, as the trainer does after every epoch, changes nothing."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 16, 16, dtype=torch.float64) for _ in range(2)]
    states = []
    for looked_at in (False, True):
        tunable: FineTunable = folded_for_training(tiny_checkpoint)
        train(tunable.module.double(), batches[:1])
        if looked_at:
            tunable.training_form()
        train(tunable.module, batches[1:])
        states.append(tunable.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert math.isfinite(sum(float(tensor.double().sum()) for tensor in states[0].values()))
