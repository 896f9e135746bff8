"""One update: the loss times the penalty (section 3.3 of the paper), summed over micro-batches and processes.

Convolutions may compute in bfloat16 or float16; weights, gates, masks and updates stay float32, for a gate of ±1e-8
would be 0 in float16, and the penalty's small pushes would round away.

With accumulation, batch norm takes its statistics over one micro-batch (of all processes), not over the whole batch; a
network without batch norm gets the update of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import get_model

from foldgroup.checkpoint import Preprocessing
from foldgroup.errors import TrainingError
from foldgroup.nn.complexity import budget, complexity, complexity_penalty, groupable_layers
from foldgroup.nn.dgconv import DGConv
from foldgroup.training.config import TrainConfig
from foldgroup.training.data import Normalize, mixed
from foldgroup.training.distributed import World
from foldgroup.training.fixed import fix_gates

if TYPE_CHECKING:
    from foldgroup.finetune import FineTunable

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A network and what updates it: ``config.arch`` from new weights, or what ``tunable`` has folded.

    Raises:
        TrainingError: if there is no such architecture.
        ModelError: if it has no layer that learns groups.
    """

    def __init__(self, config: TrainConfig, classes: int, world: World, tunable: FineTunable | None = None) -> None:
        self.config, self.world, self.tunable = config, world, tunable
        torch.manual_seed(config.seed)
        form = _built(config.arch, classes) if tunable is None else tunable.checkpoint.model
        self.layers = groupable_layers(form)
        if config.fixed_gates is not None:
            fix_gates(self.layers, config.fixed_gates)
        model = world.with_synced_batchnorm(form if tunable is None else tunable.module)
        self.model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # a missing overload
        self.form = self.model if tunable is None else form
        """What has the gates: the network itself, or the training form of the folded one."""
        self.o = complexity(self.form).item() if config.complexity is None else budget(self.form, config.complexity)
        self.optimizer = optimizer(model, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.normalize = Normalize(Preprocessing.standard(config.input_size), world.device)
        self._called: nn.Module | None = None

    def start(self) -> None:
        """Wrap the network as it is now for the processes that train together, and for ``torch.compile``."""
        called = torch.compile(self.model) if self.config.compile else self.model
        assert isinstance(called, nn.Module)
        self._called = self.world.parallel(called)

    @property
    def zeta_over_budget(self) -> float:
        """ζ/o as the gates are now."""
        return complexity(self.form).item() / self.o

    @property
    def training_form(self) -> nn.Module:
        """The network as it is now, in the form that checkpoints hold."""
        return self.model if self.tunable is None else self.tunable.training_form()

    @property
    def groups(self) -> tuple[int, ...]:
        """The group count of every layer as the gates are now."""
        return tuple(layer.grouping.groups for layer in self.layers.values())

    def set_rate(self, rate: float, *, freeze: bool) -> None:
        """The learning rate of the next update; with ``freeze``, gates that meet the budget stand still."""
        weights, gates = self.optimizer.param_groups
        weights["lr"] = gates["lr"] = rate
        if freeze and self.zeta_over_budget <= 1:
            gates["lr"] = 0.0

    def update(self, batches: Sequence[tuple[Tensor, Tensor]], number: int) -> Tensor:
        """Learn from this process's micro-batches, uint8 [n, 3, S, S] and labels [n], as update ``number`` of the run.

        Returns the sum of the losses, how many were right, and how many there were, float64 [3].
        """
        assert self._called is not None, "start() comes first"
        torch.manual_seed(mixed(self.config.seed, number, self.world.rank))  # no generator's state is kept
        device = self.world.device
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        self.optimizer.zero_grad()
        for i, (images, labels) in enumerate(batches):
            with self._synchronised(last=i + 1 == len(batches)):
                images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
                labels = labels.to(device, non_blocking=True)
                logits = self._logits(self.normalize(images))
                loss = functional.cross_entropy(logits, labels)
                objective = loss * complexity_penalty(self.form, self.o) / len(batches)
                self.scaler.scale(objective).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            right = (logits.argmax(1) == labels).sum()
            count = totals.new_tensor(len(labels))
            totals += torch.stack([loss.detach().double() * count, right.double(), count])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return totals

    def _logits(self, images: Tensor) -> Tensor:
        """Logits in float32 or wider, computed in the precision that was asked for."""
        assert self._called is not None
        dtype = _DTYPES[self.config.precision]
        with torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32):
            logits: Tensor = self._called(images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _synchronised(self, *, last: bool) -> AbstractContextManager[None]:
        """Average gradients over the processes once, after the last micro-batch."""
        if last or not isinstance(self._called, DistributedDataParallel):
            return nullcontext()
        apart: AbstractContextManager[None] = self._called.no_sync()
        return apart


def _built(arch: str, classes: int) -> nn.Module:
    try:
        model: nn.Module = get_model(arch, num_classes=classes)
    except ValueError as error:
        raise TrainingError(f"unknown architecture {arch!r}: use g_resnext50 or another of foldgroup.nn") from error
    return model


def optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with two groups: weights, and gates, which have no scale to decay; a folded network has none."""
    gates = [layer.gate for layer in model.modules() if isinstance(layer, DGConv)]
    gate_ids = {id(gate) for gate in gates}
    weights = [p for p in model.parameters() if id(p) not in gate_ids]
    return torch.optim.SGD(
        [
            {"params": weights, "weight_decay": config.weight_decay},
            {"params": gates, "weight_decay": config.gate_weight_decay},
        ],
        lr=config.learning_rate,
        momentum=config.momentum,
    )
