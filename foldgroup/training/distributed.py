"""The processes that train together: none but this one, or those that ``torchrun`` started.

One process has the whole batch; of W, each has 1/W of it, and gradients are averaged (DistributedDataParallel over NCCL
on GPUs, gloo elsewhere). With equal shares the mean over processes of ∇(loss_r · penalty) is ∇(loss · penalty) of the
whole batch, since the penalty depends on the gates alone, which all have. Batch norm takes its statistics over all
processes. So W changes rounding and speed, nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from foldgroup.errors import FoldgroupError, TrainingError
from foldgroup.training.batchnorm import SyncedBatchNorm

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The place of this process among those that train together, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leader(self) -> bool:
        """Whether this is the one process that writes and reports."""
        return self.rank == 0

    def agree(self, work: Callable[[], T]) -> T:
        """Do ``work`` in every process; if it fails in one, it fails in all.

        Raises:
            FoldgroupError: with what went wrong in the first process that failed; all but the leader say only which.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except FoldgroupError as caught:
            error = str(caught)
        for rank, text in enumerate(self.gather(error)):
            if text is not None:
                raise TrainingError(text if self.leader else f"process {self.rank} stopped: process {rank} failed")
        return result  # type: ignore[return-value]  # work's own, as there was no error

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        """The leader's ``value``, in every process."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes; left alone are those given."""
        result = values.clone()
        if self.size > 1:
            distributed.all_reduce(result)
        return result

    def parallel(self, model: nn.Module) -> nn.Module:
        """What to call instead of ``model`` so that gradients are averaged; it starts from the leader's tensors."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def with_synced_batchnorm(self, model: nn.Module) -> nn.Module:
        """``model`` with batch norms that take their statistics over all processes; names and tensors stay."""
        if self.size == 1:
            return model
        if self.device.type == "cuda":
            synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            return synced
        return SyncedBatchNorm.convert(model)


def is_leader() -> bool:
    """Whether this process is the first of those that ``torchrun`` started, or alone. Starts nothing."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join(device: str) -> Iterator[World]:
    """Take part in the run that ``torchrun`` describes in the environment, or be alone.

    ``device`` "auto" is CUDA where there is a GPU, else the CPU.

    Raises:
        TrainingError: if there is no such device, or another process ended while this one needed it.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local)
    if size == 1:
        yield World(chosen)
        return
    started = not distributed.is_initialized()
    if started:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        yield World(chosen, rank, size)
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise TrainingError(
                f"process {rank} of {size} lost the others: see what the first to end says, then go on with --resume"
            ) from error
        raise
    if started:  # only at a good end: after an error it would wait for processes that are gone
        distributed.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    """The device called ``name``; of several GPUs the one that is this process's."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"--device {name}: there is no such device; use auto, cpu or cuda") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise TrainingError(f"--device {name}: training runs on the CPU and on CUDA; use auto, cpu or cuda")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise TrainingError(
            f"--device {name}: process {local_rank} of this machine needs GPU {index}, and it has "
            f"{torch.cuda.device_count()}; start fewer with --nproc-per-node, or use --device cpu"
        )
    torch.cuda.set_device(index)
    torch.backends.cudnn.benchmark = True  # batches have one shape
    return torch.device("cuda", index)
