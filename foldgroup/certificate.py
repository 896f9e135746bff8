"""The exactness certificate: a proof, without tolerance, that a graph computes the training form.

The proof is a simulation. Walking the compiled graph in order, every node n is assigned a claim (t, p): *n holds the
value of node t of the training form with its channels in order p*, n = t[:, p]. A claim is granted only if it follows
from the claims of n's operands:

* both graphs may be read as equations (:mod:`foldgroup.purity`), and n has the shape of t that tracing found;
* an operation is that of its training node, with the same settings and arguments, on operands that claim the training
  node's operands; identities and dropout in evaluation mode are their operand;
* the network's input is the training form's, in order id;
* ChannelShuffle by s of (t, p) gives (t, p · s);
* an operation through which channels pass (:class:`foldgroup.channels.Through`) has operands that are all in one order
  p, and gives (t, p); its per-channel tensors are those of t, indexed by p;
* a convolution of [N, C, H, W] or linear layer of [N, C] with an operand in order p that writes order q has, entry for
  entry and bit for bit, weight[o, i] = W[q[o], p[i]], where W is the training layer's kernel times the mask that its
  gates define by eq. 7, and every training weight it leaves out is zero under that mask;
* a convolution that took in a batch norm stands for the norm's node, and its weights are those of the training form's
  convolution and norm, folded in float64;
* any other operation (a barrier) has operands in order id, and so its result;
* the network's output is the training form's, in order id.

Orders are permutations by construction, and no floating-point operation is relied on but the folding of batch norm,
which is repeated from the checkpoint's own numbers. Nothing here calls a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from foldgroup.channel_order import ChannelOrder
from foldgroup.channels import Through, rule_of
from foldgroup.errors import ChannelOrderError
from foldgroup.forms import ChannelShuffle, MaskedConv2d, settings
from foldgroup.grouping import kronecker_mask
from foldgroup.nn.dgconv import DGConv2d
from foldgroup.purity import impurity
from foldgroup.trace import called_module, is_no_op, shape_of

_WEIGHTED = (nn.Conv2d, MaskedConv2d, nn.Linear)
_CONV_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice")
_PLAIN = (bool, int, float, str, tuple, list, set, dict)
"""Types whose values are the same setting if they are equal; others must be the same object."""


@dataclass
class Certificate:
    """What was proven, or the first step that could not be.

    Counts: ``nodes`` granted a claim, ``orders`` that are not the identity, ``layers`` whose weights were compared,
    ``weights_kept`` bit-equal to their source, ``weights_pruned`` left out because the mask is zero there.
    """

    nodes: int = 0
    orders: int = 0
    layers: int = 0
    weights_kept: int = 0
    weights_pruned: int = 0
    failure: str | None = None
    """The layer and what is wrong with it; None if the certificate holds."""
    claims: dict[str, tuple[str, ChannelOrder | None]] = field(default_factory=dict, repr=False)
    """For every node granted a claim: its training node's name and its channel order (None without a channel axis)."""

    @property
    def holds(self) -> bool:
        """Whether every claim was granted."""
        return self.failure is None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        names = ("holds", "nodes", "orders", "layers", "weights_kept", "weights_pruned")
        return {name: getattr(self, name) for name in names} | ({} if self.holds else {"failure": self.failure})


class _Refuted(Exception):
    """A claim that does not follow."""


@dataclass(frozen=True)
class _Claim:
    node: fx.Node
    order: ChannelOrder | None


def certify(training: fx.GraphModule, compiled: fx.GraphModule) -> Certificate:
    """Prove that ``compiled`` computes ``training`` exactly, or say where the proof fails.

    ``compiled`` may be the result of any pass; both come from one :func:`foldgroup.trace.trace`.
    """
    certificate = Certificate(failure=impurity(training) or impurity(compiled))
    if not certificate.holds:
        return certificate
    sources = {node.name: node for node in training.graph.nodes}
    claims: dict[fx.Node, _Claim] = {}
    for node in compiled.graph.nodes:
        try:
            if node.op == "output":
                _check_output(node, sources, claims)
                return certificate
            claim = _grant(training, compiled, node, sources, claims, certificate)
            noted, true = shape_of(node), shape_of(claim.node)
            _require(noted == true, f"its shape is noted as {noted} for {true}")
        except (_Refuted, ChannelOrderError) as refuted:
            certificate.failure = f"{node.target if node.op == 'call_module' else node.name}: {refuted}"
            return certificate
        claims[node] = claim
        certificate.claims[node.name] = (claim.node.name, claim.order)
        certificate.nodes += 1
        certificate.orders += int(claim.order is not None and not claim.order.is_identity)
    certificate.failure = "the graph has no output"
    return certificate


def _grant(
    training: fx.GraphModule,
    compiled: fx.GraphModule,
    node: fx.Node,
    sources: dict[str, fx.Node],
    claims: dict[fx.Node, _Claim],
    certificate: Certificate,
) -> _Claim:
    """The claim of ``node``, if it follows from those of its operands."""
    module = called_module(compiled, node)
    if type(module) is ChannelShuffle:
        (given,) = (claims[operand] for operand in node.all_input_nodes)
        return _Claim(given.node, _order_of(given).then(_carried_out(module)))
    source = sources.get(node.meta.get("origin", ""))
    if source is None:
        raise _Refuted("it stands for no node of the training form")
    rule = rule_of(compiled, node)
    if type(module) in _WEIGHTED and len(shape_of(source)) == (2 if type(module) is nn.Linear else 4):
        assert isinstance(module, nn.Conv2d | nn.Linear)
        conv, norm = _conv_and_norm(training, source)
        _check_operands(node, conv, claims)
        (before,) = (_order_of(claims[operand]) for operand in node.all_input_nodes)
        stays = before if isinstance(rule, Through) else ChannelOrder.identity(shape_of(source)[1])
        after = stays if isinstance(rule, Through) else node.meta.get("out_order", stays)
        _check_weights(module, called_module(training, conv), norm, before, after, certificate)
        return _Claim(source, after)
    _check_operands(node, source, claims)
    if isinstance(rule, Through):
        carried = {_order_of(claims[operand]) for operand in rule.operands}
        _require(len(carried) == 1, "its operands are in different channel orders")
        (order,) = carried
        _check_module(called_module(training, source), module, order if rule.carries else None)
        return _Claim(source, order)
    in_order = all(order is None or order.is_identity for order in (claims[o].order for o in node.all_input_nodes))
    _require(in_order, "its operands are not in their original channel order")
    _check_module(called_module(training, source), module, None)
    if node.op == "get_attr":
        same = _equal(_attribute(compiled, node), _attribute(training, source))
        _require(same, "its tensor differs from the training form's")
    has_channels = len(shape_of(source)) >= 2
    return _Claim(source, ChannelOrder.identity(shape_of(source)[1]) if has_channels else None)


def _order_of(claim: _Claim) -> ChannelOrder:
    if claim.order is None:
        raise _Refuted(f"it reads {claim.node.name}, which has no channels")
    return claim.order


def _carried_out(shuffle: ChannelShuffle) -> ChannelOrder:
    """The order that ``shuffle`` applies, from what its forward uses."""
    if shuffle.digits is not None:
        order = ChannelOrder.from_digits(shuffle.digits.radices, shuffle.digits.axes)
    else:
        assert shuffle.index is not None
        order = ChannelOrder(tuple(shuffle.index.tolist()))
    _require(order == shuffle.order, "it applies another order than it says")
    return order


def _conv_and_norm(training: fx.GraphModule, source: fx.Node) -> tuple[fx.Node, nn.BatchNorm2d | None]:
    """The training layer that a layer with weights stands for, and the batch norm that it took in, if any."""
    norm = called_module(training, source)
    if type(norm) is not nn.BatchNorm2d:
        return source, None
    return _through_no_ops(training, source.all_input_nodes[0]), norm


def _check_operands(node: fx.Node, source: fx.Node, claims: dict[fx.Node, _Claim]) -> None:
    """``node`` does to its operands what ``source`` does to the training form's."""
    same_call = node.op == source.op and (node.op == "call_module" or node.target == source.target)
    _require(same_call, f"{node.op} {node.target} stands for {source.op} {source.target}")
    training = source.graph.owning_module

    def expected(operand: fx.Node) -> fx.Node:
        return _through_no_ops(training, operand)

    def claimed(operand: fx.Node) -> fx.Node:
        return _through_no_ops(training, claims[operand].node)

    ours = fx.map_arg((node.args, node.kwargs), claimed)
    theirs = fx.map_arg((source.args, source.kwargs), expected)
    same = ours == theirs and repr(ours) == repr(theirs)  # 1, 1.0 and True are equal but for their text
    _require(same, f"it does not compute {source.name} from {source.args}")


def _check_output(node: fx.Node, sources: dict[str, fx.Node], claims: dict[fx.Node, _Claim]) -> None:
    output = next(source for source in sources.values() if source.op == "output")
    _check_operands(node, output, claims)
    for operand in node.all_input_nodes:
        order = claims[operand].order
        _require(order is None or order.is_identity, "the network's output is not in its original channel order")


def _through_no_ops(training: Any, node: fx.Node) -> fx.Node:
    while is_no_op(called_module(training, node)):
        node = node.all_input_nodes[0]
    return node


def _check_module(original: nn.Module | None, module: nn.Module | None, order: ChannelOrder | None) -> None:
    """``module`` is ``original`` with its per-channel tensors, if any, in ``order``."""
    if module is original:
        _require(order is None or order.is_identity, "its tensors do not follow its channel order")
        return
    _require(type(module) is type(original), f"a {type(module).__name__} for a {type(original).__name__}")
    assert module is not None and original is not None
    ours, theirs = settings(module), settings(original)
    for name in ours.keys() | theirs.keys():
        value, other = ours.get(name), theirs.get(name)
        same = value is other or (type(value) is type(other) and isinstance(value, _PLAIN) and value == other)
        _require(same, f"{name} {value} for {other}")
    sources = dict(_named_tensors(original))
    for name, tensor in _named_tensors(module):
        source = sources.pop(name, None)
        if source is not None and order is not None and source.ndim:
            source = source[order.index]
        _require(source is not None and _equal(tensor, source), f"{name} is not the training form's, reordered")
    _require(not sources, f"{', '.join(sources)} missing")


def _check_weights(
    module: nn.Conv2d | nn.Linear,
    original: nn.Module | None,
    norm: nn.BatchNorm2d | None,
    before: ChannelOrder,
    after: ChannelOrder,
    certificate: Certificate,
) -> None:
    """Entry for entry: weight[o, i] = (U ⊙ W)[after[o], before[i]], zero under U for what is left out."""
    _require(type(original) in (nn.Conv2d, DGConv2d, nn.Linear), f"it stands for a {type(original).__name__}")
    assert isinstance(original, nn.Conv2d | nn.Linear)
    for name in _CONV_SETTINGS:
        value, other = getattr(module, name, None), getattr(original, name, None)
        _require(value == other, f"{name} {value} for {other}")
    weight = original.weight.detach()
    groups = getattr(module, "groups", 1)
    out_channels, width = module.weight.shape[:2]
    fits = len(weight) == out_channels == len(after) and width * groups == len(before)
    _require(fits, f"weights of shape {list(module.weight.shape)} for {list(weight.shape)}")

    ours = module.weight.detach()
    mask = _training_mask(original)
    connected = None
    if groups == 1 and mask is None:
        kept = weight if after.is_identity else weight[after.index]
        kept = kept if before.is_identity else kept[:, before.index]
        ones = kept.shape[0] * kept.shape[1]
    else:
        # Which training inputs each of our outputs reads: a row of C_in/groups channel numbers for each of C_out.
        reads = before.index.reshape(groups, width).repeat_interleave(out_channels // groups, dim=0)
        rows = after.index[:, None].expand_as(reads)
        mask = torch.ones(out_channels, len(before), dtype=torch.bool) if mask is None else mask
        connected = mask[rows, reads]
        ones = int(mask.sum())
        _require(int(connected.sum()) == ones, "a weight that the mask keeps was pruned")
        # A grouped training weight [C_out, C_in/groups] holds each row's own group only: channel numbers within it.
        kept = weight[rows, reads % weight.shape[1]]
    bias = None if original.bias is None else original.bias.detach()[after.index]
    if norm is not None:
        kept, bias = _folded(kept, bias, norm, after)
    if connected is not None:
        _require(not bool(ours[~connected].any()), "a weight that the mask removes is not zero")
        kept[~connected] = ours[~connected].to(kept.dtype)  # a zero of either sign: a batch norm may have turned it
    _require(_equal(ours, kept), "a weight is not the one it came from")
    same = module.bias is bias if module.bias is None or bias is None else _equal(module.bias.detach(), bias)
    _require(same, "a bias is not the one it came from")
    positions = kept[0, 0].numel()
    certificate.layers += 1
    certificate.weights_kept += ones * positions
    certificate.weights_pruned += (out_channels * weight.shape[1] - ones) * positions


def _training_mask(original: nn.Conv2d | nn.Linear) -> Tensor | None:
    """Which weights of the training layer count, [C_out, C_in], from the gates themselves (eq. 5–7); None for all."""
    if isinstance(original, DGConv2d):
        gates = iter(original.gate.detach().tolist())
        bits = [int(next(gates) > 0) if a == b else 1 for a, b in original.factors]
        return torch.from_numpy(kronecker_mask(original.factors, bits).T.copy())
    if isinstance(original, nn.Conv2d) and original.groups > 1:
        of_row = torch.arange(original.out_channels) // (original.out_channels // original.groups)
        of_column = torch.arange(original.in_channels) // (original.in_channels // original.groups)
        return of_row[:, None] == of_column
    return None


def _folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d, after: ChannelOrder) -> tuple[Tensor, Tensor]:
    """A convolution whose rows are in order ``after`` and the norm behind it as one, in float64."""

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double()

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double()[after.index]

    _require(norm.running_mean is not None, "a batch norm without running statistics was folded")
    folded = fuse_conv_bn_weights(
        double(weight),  # type: ignore[arg-type]  # not None
        double(bias),
        rows(norm.running_mean),  # type: ignore[arg-type]  # not None, required above
        rows(norm.running_var),  # type: ignore[arg-type]  # likewise
        norm.eps,
        rows(norm.weight),
        rows(norm.bias),
    )
    return folded[0].detach(), folded[1].detach()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name, tensor.detach()


def _equal(tensor: Tensor, other: Tensor) -> bool:
    """Bit for bit, so that 0 and −0 differ and a NaN is itself."""

    def bits(values: Tensor) -> Tensor:
        return values.contiguous().reshape(-1).view(torch.uint8)

    return tensor.dtype == other.dtype and tensor.shape == other.shape and torch.equal(bits(tensor), bits(other))


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    _require(isinstance(value, Tensor), "an attribute that is no tensor")
    assert isinstance(value, Tensor)
    return value


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Refuted(reason)
