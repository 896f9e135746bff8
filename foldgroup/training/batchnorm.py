"""Batch norm over the batches of all processes, for devices that torch's SyncBatchNorm refuses, such as the CPU.

W processes hold n values a channel each, with mean μ_r and biased variance v_r. Over all of them

    μ = (1/W) Σ μ_r        v = (1/W) Σ (v_r + (μ_r − μ)²)

and the running variance takes v·Wn/(Wn − 1), as batch norm does for one batch of all W·n values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        result = values.clone()
        distributed.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        result = gradients[0].contiguous().clone()
        distributed.all_reduce(result)
        return result


class SyncedBatchNorm(_BatchNorm):
    """A batch norm on [N, C, …] whose statistics in training are those of all processes, which have equal shares."""

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """``module`` with every batch norm in it replaced by one of these, which has its tensors."""
        if isinstance(module, _BatchNorm):
            made = cls(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                setattr(made, name, tensor)
            return made.train(module.training)
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child))
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [N, C, …]; statistics are float32 or wider whatever the input is."""
        if not self.training and self.running_mean is not None:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        size = distributed.get_world_size()
        dims = [0, *range(2, x.ndim)]
        shape = (1, -1, *(1,) * (x.ndim - 2))
        own_variance, own_mean = torch.var_mean(x, dims, correction=0)
        mean = self._sum(own_mean) / size
        variance = self._sum(own_variance + (own_mean - mean) ** 2) / size
        self._keep(mean.detach(), variance.detach(), size * x.numel() // x.shape[1])
        scale = torch.rsqrt(variance + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return (x * scale.reshape(shape) + shift.reshape(shape)).to(input.dtype)

    @staticmethod
    def _sum(values: Tensor) -> Tensor:
        result: Tensor = _Sum.apply(values)
        return result

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics towards those of a batch of ``count`` values a channel."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from two on."""
