"""What can go wrong, one class a stage. Every message names the thing and says what to do about it.

The command line turns any :class:`FoldgroupError` into one message and its ``exit_status``: 2 for bad usage or input, 1
for a check that failed.
"""

from __future__ import annotations


class FoldgroupError(Exception):
    """Base of all errors that foldgroup raises on purpose."""

    exit_status = 2


class ChannelOrderError(FoldgroupError):
    """A sequence that is not a permutation, or two orders that do not fit together."""


class GroupingError(FoldgroupError):
    """Gate bits, factors or a mask that describe no grouping."""


class ModelError(FoldgroupError):
    """A layer or network that cannot be built with the arguments given."""


class CheckpointError(FoldgroupError):
    """A file that is no usable checkpoint."""


class TrainingError(FoldgroupError):
    """Training that cannot start or go on."""


class TraceError(FoldgroupError):
    """A network that cannot be turned into a graph."""


class PassError(FoldgroupError):
    """A pass that broke its contract, or that met a graph it cannot handle."""


class TargetError(FoldgroupError):
    """A target or precision that there is not, or two that do not go together."""


class EmitError(FoldgroupError):
    """A target that refused the network."""


class RunnerError(FoldgroupError):
    """A runtime that is missing or that refused the model."""


class TuningError(FoldgroupError):
    """A tuning database that cannot be used, or a network that cannot be tuned here."""


class ComparisonError(FoldgroupError):
    """Two benchmarks that cannot be compared."""


class UnavailableError(RunnerError):
    """A runtime that is not installed, or that needs a device, a driver or instructions that this machine has not."""


class ImageError(FoldgroupError):
    """An image or a folder of images that cannot be read."""


class BundleError(FoldgroupError):
    """A folder that is not a bundle, or one that cannot be written."""


class EquivalenceError(FoldgroupError):
    """A check that failed: the compiled network is not the trained one."""

    exit_status = 1
