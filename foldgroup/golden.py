"""Golden inputs: what a bundle carries so that whoever receives it can check it without the checkpoint.

Two seeded inputs with the training form's float64 outputs; with a calibration, a few of its images too, because int8
says nothing about inputs outside the range it was calibrated for.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from foldgroup.bundle import GOLDEN, Bundle
from foldgroup.equivalence import LIMITS, float64_outputs, outputs_error, seeded_inputs
from foldgroup.errors import BundleError, FoldgroupError, TraceError
from foldgroup.evaluation import evaluate
from foldgroup.outputs import flat
from foldgroup.trace import MODULE_CALLS

SEEDED, IMAGES = 2, 4

_OWN_BATCH = "{} inputs at a time: take the batch from x.shape[0] wherever forward() has it as a number"


@dataclass(frozen=True)
class Golden:
    """Inputs [N, C, …] float32 and every output for them in float64; images None without a calibration.

    In the file they are ``input`` and ``logits``, ``images`` and ``image_logits``. Several outputs are numbered there:
    ``logits.0``, ``logits.1`` … in the order of the manifest.
    """

    inputs: Tensor
    outputs: tuple[Tensor, ...]
    images: Tensor | None = None
    image_outputs: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, training: fx.GraphModule, shape: tuple[int, ...], images: Tensor | None) -> Golden:
        """Run the training form in float64 on seeded inputs of ``shape`` [·, C, …] and on the first ``images``.

        Raises:
            TraceError: if it does not take several inputs at a time, or gives no output for each of them.
        """
        return cls._computed(training, seeded_inputs((SEEDED, *shape[1:])), None if images is None else images[:IMAGES])

    @classmethod
    def _computed(cls, training: fx.GraphModule, inputs: Tensor, images: Tensor | None) -> Golden:
        image_outputs = () if images is None else float64_outputs(training, images)
        try:
            outputs = float64_outputs(training, inputs)
        except Exception as error:  # a network raises what it likes
            raise TraceError(f"the network does not run on {_OWN_BATCH.format(len(inputs))} ({error})") from error
        for output in outputs:
            if len(output) != len(inputs):
                raise TraceError(f"the network gives {len(output)} results for {_OWN_BATCH.format(len(inputs))}")
            if not output.isfinite().all():
                raise TraceError(
                    "the trained network itself gives infinite numbers, or none at all, for normal random inputs of "
                    f"shape {list(inputs.shape)}: nothing can be compared with these"
                )
        return cls(inputs, outputs, images, image_outputs)

    def suited_to(self, precision: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The inputs and outputs to judge ``precision`` by: the images for int8, if there are any."""
        if precision == "int8" and self.images is not None:
            return self.images, self.image_outputs
        return self.inputs, self.outputs

    def again(self, training: fx.GraphModule) -> Golden:
        """The same inputs with outputs computed anew."""
        return self._computed(training, self.inputs, self.images)

    def check_seen(self, model: nn.Module, training: fx.GraphModule) -> None:
        """Make sure that ``training``, which all that is proven is about, computes what calling ``model`` does.

        ``model`` is called with the inputs, in its own dtype, or in float32 if that is a shorter one.

        Raises:
            TraceError: if the outputs differ by more than rounding.
        """
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        if dtype.itemsize < 4:
            dtype, model = torch.float32, copy.deepcopy(model).float()
        try:
            # In inference mode what it keeps could not be trained; what it prints is no result of ours.
            with MODULE_CALLS, torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
                outputs = flat(model(self.inputs.to(dtype, copy=True)))
        except (Exception, SystemExit) as error:  # a network raises what it likes
            raise TraceError(f"the network itself does not run on {list(self.inputs.shape)}: {error}") from error
        if not all(bool(output.isfinite().all()) for output in outputs):
            raise TraceError(
                f"the trained network overflows in {dtype} for normal random inputs of shape "
                f"{list(self.inputs.shape)}: nothing can be compared with that; use a checkpoint from before training "
                "diverged"
            )
        limit = LIMITS["fp32"].max_error
        if outputs_error(outputs, self.outputs) <= limit:
            return
        off = outputs_error(outputs, flat(evaluate(training, self.inputs, dtype)["output"]))  # rounded alike
        if not off <= limit:
            raise TraceError(
                f"{type(model).__name__} computes something else than tracing sees of it (an error of {off:.1e}): "
                "forward() may ask for the type or the values of what it is given, or draw random numbers. Make it a "
                "plain function of one tensor"
            )

    def save(self) -> bytes:
        """As the bytes of a safetensors file."""
        from safetensors.torch import save

        tensors = {"input": self.inputs, **_numbered("logits", self.outputs)}
        if self.images is not None:
            tensors |= {"images": self.images, **_numbered("image_logits", self.image_outputs)}
        # Copies: two outputs may be one tensor.
        return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})

    @classmethod
    def load(cls, bundle: Bundle) -> Golden:
        """Read them from a bundle.

        Raises:
            BundleError: if the file is missing or holds something else.
            EquivalenceError: if it is not the one that was written.
        """
        from safetensors.torch import load

        try:
            tensors = load(bundle.checked(GOLDEN, {GOLDEN: bundle.verification["golden"]}))
            images, count = tensors.get("images"), len(bundle.outputs)
            image_outputs = () if images is None else _read(tensors, "image_logits", count)
            return cls(tensors["input"], _read(tensors, "logits", count), images, image_outputs)
        except FoldgroupError:
            raise
        except Exception as error:
            raise BundleError(f"{bundle.path / GOLDEN}: not the golden inputs ({error}); compile again") from error


def _numbered(name: str, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    if len(outputs) == 1:
        return {name: outputs[0]}
    return {f"{name}.{i}": output for i, output in enumerate(outputs)}


def _read(tensors: Mapping[str, Tensor], name: str, count: int) -> tuple[Tensor, ...]:
    return (tensors[name],) if count == 1 else tuple(tensors[f"{name}.{i}"] for i in range(count))
