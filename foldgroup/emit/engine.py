"""What an ahead-of-time compiler leaves: a file for one target, and how it was built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BATCH_RANGE = (1, 8, 32)
"""Least, typical and greatest batch of an engine whose batch is dynamic, unless told otherwise."""


@dataclass(frozen=True)
class Engine:
    """A network compiled for one target.

    ``facts`` are JSON values that stand in ``engines.json`` beside the rest: what it was built for, and with what
    settings.
    """

    content: bytes
    builder: str
    """The library that built it, such as tensorrt_rtx."""
    version: str
    """Of the builder."""
    facts: Mapping[str, Any] = field(default_factory=dict)
