"""Golden inputs: what a bundle carries so that whoever receives it can check it without the checkpoint.

Two seeded inputs with the training form's float64 logits; with a calibration, a few of its images too, because int8
says nothing about inputs outside the range it was calibrated for.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from foldgroup.bundle import GOLDEN, Bundle
from foldgroup.equivalence import seeded_inputs
from foldgroup.errors import BundleError, FoldgroupError
from foldgroup.trace import evaluate

SEEDED, IMAGES = 2, 4


@dataclass(frozen=True)
class Golden:
    """Inputs [N, C, H, W] float32 and their logits [N, classes] float64; images None without a calibration."""

    inputs: Tensor
    logits: Tensor
    images: Tensor | None = None
    image_logits: Tensor | None = None

    @classmethod
    def of(cls, training: fx.GraphModule, shape: tuple[int, ...], images: Tensor | None) -> Golden:
        """Run the training form in float64 on seeded inputs of ``shape`` [·, C, H, W] and on the first ``images``."""
        inputs = seeded_inputs((SEEDED, *shape[1:]))
        if images is not None:
            images = images[:IMAGES]
        image_logits = evaluate(training, images)["output"] if images is not None else None
        return cls(inputs, evaluate(training, inputs)["output"], images, image_logits)

    def suited_to(self, precision: str) -> tuple[Tensor, Tensor]:
        """The inputs and logits to judge ``precision`` by: the images for int8, if there are any."""
        if precision == "int8" and self.images is not None and self.image_logits is not None:
            return self.images, self.image_logits
        return self.inputs, self.logits

    def again(self, training: fx.GraphModule) -> Golden:
        """The same inputs with logits computed anew."""
        image_logits = evaluate(training, self.images)["output"] if self.images is not None else None
        return Golden(self.inputs, evaluate(training, self.inputs)["output"], self.images, image_logits)

    def save(self) -> bytes:
        """As the bytes of a safetensors file."""
        from safetensors.torch import save

        tensors = {"input": self.inputs, "logits": self.logits}
        if self.images is not None and self.image_logits is not None:
            tensors |= {"images": self.images, "image_logits": self.image_logits}
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})

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
            return cls(tensors["input"], tensors["logits"], tensors.get("images"), tensors.get("image_logits"))
        except FoldgroupError:
            raise
        except Exception as error:
            raise BundleError(f"{bundle.path / GOLDEN}: not the golden inputs ({error}); compile again") from error
