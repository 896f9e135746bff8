"""One update: precisions, accumulation, decay and torch.compile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import ALONE, CONFIG
from torch import Tensor, nn

from foldgroup.nn import DGConv2d
from foldgroup.training.config import TrainConfig
from foldgroup.training.loop import train
from foldgroup.training.step import Trainer, optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 3, (count,), generator=generator)


def trainer(config: TrainConfig) -> Trainer:
    made = Trainer(config, 3, ALONE)
    made.start()
    made.set_rate(config.learning_rate, freeze=False)
    return made


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gates_stay_float32_and_move_in_lower_precision(precision: Any) -> None:
    made = trainer(replace(CONFIG, precision=precision))
    seen = []
    for module in made.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    gates = {name: layer.gate.clone() for name, layer in made.layers.items()}
    assert all((gate.abs() < 1e-7).all() and (gate != 0).all() for gate in gates.values())
    made.update([batch()], 0)
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    for name, layer in made.layers.items():
        assert layer.gate.dtype == layer.mask().dtype == torch.float32
        assert layer.gate.grad is not None and layer.gate.grad.dtype == torch.float32
        assert (layer.gate.abs() > 1e-7).all() and not torch.equal(layer.gate, gates[name])
    for state in made.optimizer.state.values():
        assert state["momentum_buffer"].dtype == torch.float32


def test_masks_are_exact_under_autocast() -> None:
    layer = DGConv2d(8, 8, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.mask(), torch.from_numpy(layer.grouping.mask.T).float())
        assert layer.masked_weight().dtype == torch.float32


def test_lower_precision_is_close_to_float32(images: Path, tmp_path: Path) -> None:
    runs = [train(images, tmp_path / f"{p}.pt", replace(CONFIG, epochs=1, precision=p)) for p in ("fp32", "bf16")]
    assert runs[1].loss == pytest.approx(runs[0].loss, rel=0.2)


class NoBatchNorm(nn.Module):
    """A network whose images do not see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DGConv2d(3, 8, 3)
        self.groupable = DGConv2d(8, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.head(self.groupable(self.conv(images).relu()).relu().mean((2, 3)))
        return result


def test_accumulation_makes_the_update_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldgroup.training.step.get_model", lambda *_, **__: NoBatchNorm())
    images, labels = batch()
    whole, parts = (trainer(replace(CONFIG, complexity=64, accumulate=n)) for n in (1, 4))
    for number in range(3):
        totals = whole.update([(images, labels)], number)
        micro = [(images[i : i + 2], labels[i : i + 2]) for i in range(0, 8, 2)]
        assert torch.allclose(parts.update(micro, number), totals)
    assert whole.zeta_over_budget > 1  # so the penalty took part
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_gates_decay_only_if_asked_to() -> None:
    made = trainer(CONFIG)
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [1e-4, 0.0]
    asked = optimizer(made.model, replace(CONFIG, gate_weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in asked] == [1e-4, 0.1]


def test_a_compiled_network_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    plain, made = trainer(CONFIG), trainer(replace(CONFIG, compile=True))
    for number in range(2):
        plain.update([batch()], number)
        made.update([batch()], number)
    assert list(made.model.state_dict()) == list(plain.model.state_dict())
    for (name, a), b in zip(plain.model.state_dict().items(), made.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name


def test_an_update_depends_on_its_number_and_not_on_torch_s_generator() -> None:
    one, other = trainer(CONFIG), trainer(CONFIG)
    one.model.fc = nn.Sequential(nn.Dropout(), one.model.fc)
    other.model.fc = nn.Sequential(nn.Dropout(), other.model.fc)
    torch.rand(3)
    first = one.update([batch()], 5)
    torch.rand(11)
    assert torch.equal(other.update([batch()], 5), first)
