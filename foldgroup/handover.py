"""What a bundle holds for a server beside the networks themselves: a Triton model repository of its variants."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from foldgroup.emit.triton import backend_of, triton_repository
from foldgroup.errors import EmitError
from foldgroup.targets import Variant

TRITON = "triton"
"""Folder of the repository in the bundle."""


def served_name(bundle: str) -> str:
    """A name for clients' URLs, from a bundle's: what else is in it becomes an underscore."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", bundle.removesuffix(".foldgroup")).lstrip("._-")
    return name or "model"


@dataclass(frozen=True)
class Repository:
    """The files of a model repository by their path in the bundle, and why a variant is not in it."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def check_served(variants: Sequence[Variant]) -> None:
    """Make sure that Triton can serve one of these.

    Raises:
        EmitError: if not, with what it says of each.
    """
    refused = []
    for variant in variants:
        try:
            backend_of(variant)
        except EmitError as error:
            refused.append(str(error))
    if len(refused) == len(variants):
        raise EmitError(f"Triton can serve none of these: {'; '.join(refused)}")


def triton(
    name: str,
    models: Mapping[Variant, bytes],
    engines: Mapping[Variant, bytes],
    *,
    classes: Sequence[str],
    batch: tuple[int, int, int],
) -> Repository:
    """A repository with a model for every variant that Triton can serve.

    ``models`` are the ONNX files, ``engines`` what was built of them. One model is called ``name``; of several, each
    bears its target and precision too.

    Raises:
        EmitError: if Triton can serve none of them.
    """
    left_out: dict[str, str] = {}
    served: dict[Variant, dict[str, bytes]] = {}

    def serve(variant: Variant, own: str) -> dict[str, bytes]:
        return triton_repository(own, variant, models[variant], engines.get(variant), classes=classes, batch=batch)

    for variant in models:
        try:
            served[variant] = serve(variant, f"{name}_{variant.target.name}_{variant.precision}")
        except EmitError as error:
            left_out[str(variant)] = str(error)
    if not served:
        raise EmitError(f"Triton can serve none of these: {'; '.join(left_out.values())}")
    if len(served) == 1:
        served = {variant: serve(variant, name) for variant in served}
    return Repository({f"{TRITON}/{path}": data for own in served.values() for path, data in own.items()}, left_out)
