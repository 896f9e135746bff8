"""The compiler's passes, one a file, in the order :func:`default_pipeline` lists and justifies."""

from foldgroup.pipeline import Pipeline
from passes.absorb_shuffles import AbsorbShuffles
from passes.decode_gates import DecodeGates
from passes.fold_batchnorm import FoldBatchNorm
from passes.fold_groups import FoldGroups
from passes.pack_groups import PackGroups
from passes.tidy import Tidy

__all__ = ["AbsorbShuffles", "DecodeGates", "FoldBatchNorm", "FoldGroups", "PackGroups", "Tidy", "default_pipeline"]


def default_pipeline() -> Pipeline:
    """The passes of a compile, in order."""
    return Pipeline(
        (
            DecodeGates(),  # first: everything else works on masks that are constants
            FoldGroups(),  # needs only a layer's own mask; prunes, so what follows handles small tensors
            # Before batch norm is folded: until here every tensor is the checkpoint's own, moved but not computed with,
            # so the certificate can compare bits. Batch norm follows an order like any per-channel tensor.
            AbsorbShuffles(),
            FoldBatchNorm(),  # the one pass that does arithmetic; in float64, rounded once when the network is emitted
            Tidy(),  # last: removes what the others left without use
        )
    )
