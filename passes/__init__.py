"""The compiler's passes, one a file, in the order :func:`default_pipeline` lists and justifies."""

from foldgroup.pipeline import Pipeline
from foldgroup.planning.cost import Cost, CostModel, CostSource
from passes.absorb_shuffles import AbsorbShuffles
from passes.decode_gates import DecodeGates
from passes.find_groups import FindGroups
from passes.fold_batchnorm import FoldBatchNorm
from passes.fold_groups import FoldGroups
from passes.pack_groups import PackGroups
from passes.recognise_shuffles import RecogniseShuffles
from passes.tidy import Tidy

__all__ = [
    "AbsorbShuffles",
    "DecodeGates",
    "FindGroups",
    "FoldBatchNorm",
    "FoldGroups",
    "PackGroups",
    "RecogniseShuffles",
    "Tidy",
    "default_pipeline",
]


def default_pipeline(cost: Cost | CostSource | None = None) -> Pipeline:
    """The passes of a compile, in order; ``cost`` is what channel orders are planned by, counted unless given."""
    return Pipeline(
        (
            RecogniseShuffles(),  # before others look: a reshape that takes channels apart stops every order
            DecodeGates(),  # first of ours: everything else works on masks that are constants
            FindGroups(),  # before groups are folded, so that those that a kernel's zeros show are folded too
            FoldGroups(),  # needs only a layer's own mask; prunes, so what follows handles small tensors
            # Before batch norm is folded: until here every tensor is the checkpoint's own, moved but not computed with,
            # so the certificate can compare bits. Batch norm follows an order like any per-channel tensor.
            AbsorbShuffles(CostModel() if cost is None else cost),
            FoldBatchNorm(),  # the one pass that does arithmetic; in float64, rounded once when the network is emitted
            Tidy(),  # last: removes what the others left without use
        )
    )
