"""The exactness certificate: a proof, without tolerance, that a graph computes the training form.

The proof is a simulation. Walking the compiled graph in order, every node n is assigned a claim (t, p): *n holds the value
of node t of the training form with its channels in order p*, n = t[:, p]. A claim is granted only if it follows from the
claims of n's operands:

* the network's input is the training form's, in order id;
* ChannelShuffle by s of (t, p) gives (t, p · s);
* an operation through which channels pass (:class:`foldgroup.channels.Through`) has operands with the claims its training
  node's operands ask for, all in one order p, and gives (t, p); its per-channel tensors are those of t, indexed by p;
* a convolution or linear layer with an operand in order p that writes order q has, entry for entry and bit for bit,
  weight[o, i] = W[q[o], p[i]], where W is the training layer's kernel times the mask that its gates define by eq. 7,
  and every training weight it leaves out is zero under that mask;
* a convolution that took in a batch norm stands for the norm's node, and its weights are those of the training form's
  convolution and norm, folded in float64;
* any other operation (a barrier) has operands in order id, and so its result;
* the network's output is the training form's, in order id.

Weights are compared with ``torch.equal``, orders are permutations by construction, and no floating-point operation is
relied on but the folding of batch norm, which is repeated from the checkpoint's own numbers. Nothing here calls a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from foldgroup.channel_order import ChannelOrder
from foldgroup.channels import Mixes, Shuffles, Through, rule_of
from foldgroup.grouping import kronecker_mask
from foldgroup.nn.dgconv import DGConv2d
from foldgroup.trace import called_module, is_no_op, shape_of


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
    certificate = Certificate()
    sources = {node.name: node for node in training.graph.nodes}
    claims: dict[fx.Node, _Claim] = {}
    for node in compiled.graph.nodes:
        try:
            if node.op == "output":
                _check_output(node, sources, claims)
                break
            claim = _grant(training, compiled, node, sources, claims, certificate)
        except _Refuted as refuted:
            certificate.failure = f"{node.target if node.op == 'call_module' else node.name}: {refuted}"
            break
        claims[node] = claim
        certificate.claims[node.name] = (claim.node.name, claim.order)
        certificate.nodes += 1
        certificate.orders += int(claim.order is not None and not claim.order.is_identity)
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
    rule = rule_of(compiled, node)
    if isinstance(rule, Shuffles):
        given = claims[rule.operand]
        _require(given.order is not None, "it shuffles a value without channels")
        return _Claim(given.node, given.order.then(rule.order))  # type: ignore[union-attr]
    source = sources.get(node.meta.get("origin", ""))
    if source is None:
        raise _Refuted("it stands for no node of the training form")
    layer, norm = _conv_and_norm(training, compiled, node, source)
    _check_operands(node, layer or source, claims)
    orders = [claims[operand].order for operand in node.all_input_nodes]
    module = called_module(compiled, node)
    if isinstance(module, nn.Conv2d | nn.Linear):
        conv_source = layer or source
        original = called_module(training, conv_source)
        before = orders[0] or ChannelOrder.identity(shape_of(conv_source.all_input_nodes[0])[1])
        channels = shape_of(source)[1]
        stays = before if isinstance(rule, Through) else ChannelOrder.identity(channels)
        after = stays if isinstance(rule, Through) else node.meta.get("out_order", stays)
        _require(original is not None and len(after) == channels, f"an order of {len(after)} channels for {channels}")
        if isinstance(rule, Mixes | Through) or isinstance(module, nn.Conv2d):
            _check_weights(module, original, norm, before, after, certificate)  # type: ignore[arg-type]
            return _Claim(source, after)
    if isinstance(rule, Through):
        carried = {order.source for order in (claims[o].order for o in rule.operands) if order is not None}
        _require(len(carried) == 1, "its operands are in different channel orders")
        order = next(claims[o].order for o in rule.operands)
        _check_module(called_module(training, source), module, order if rule.carries else None)
        return _Claim(source, order)
    _require(all(o is None or o.is_identity for o in orders), "its operands are not in their original channel order")
    _check_module(called_module(training, source), module, None)
    if node.op == "get_attr":
        same = torch.equal(_attribute(compiled, node), _attribute(training, source))
        _require(same, "its tensor differs from the training form's")
    channels = shape_of(node)[1] if len(shape_of(node)) >= 2 else None
    return _Claim(source, None if channels is None else ChannelOrder.identity(channels))


def _conv_and_norm(
    training: fx.GraphModule, compiled: fx.GraphModule, node: fx.Node, source: fx.Node
) -> tuple[fx.Node | None, nn.BatchNorm2d | None]:
    """For a convolution that stands for a batch norm: the training convolution's node, and the norm."""
    norm = called_module(training, source)
    if not isinstance(called_module(compiled, node), nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
        return None, None
    conv = _through_no_ops(training, source.all_input_nodes[0])
    _require(isinstance(called_module(training, conv), nn.Conv2d), f"{source.target} does not follow a convolution")
    return conv, norm


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
    _require(ours == theirs, f"it does not compute {source.name} from {source.args}")


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
    _require(module.extra_repr() == original.extra_repr(), f"({module.extra_repr()}) for ({original.extra_repr()})")
    theirs = dict(_named_tensors(original))
    for name, tensor in _named_tensors(module):
        source = theirs.pop(name, None)
        if source is not None and order is not None and source.ndim:
            source = source[order.index]
        _require(source is not None and torch.equal(tensor, source), f"{name} is not the training form's, reordered")
    _require(not theirs, f"{', '.join(theirs)} missing")


def _check_weights(
    module: nn.Conv2d | nn.Linear,
    original: nn.Module,
    norm: nn.BatchNorm2d | None,
    before: ChannelOrder,
    after: ChannelOrder,
    certificate: Certificate,
) -> None:
    """Entry for entry: weight[o, i] = (U ⊙ W)[after[o], before[i]], zero under U for what is left out."""
    _require(isinstance(original, nn.Conv2d | nn.Linear), f"a {type(module).__name__} for a {type(original).__name__}")
    assert isinstance(original, nn.Conv2d | nn.Linear)
    groups = getattr(module, "groups", 1)
    for setting in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        ours, theirs = getattr(module, setting, None), getattr(original, setting, None)
        _require(ours == theirs, f"{setting} {ours} for {theirs}")
    weight = original.weight.detach()
    out_channels, width = module.weight.shape[:2]
    _require(
        (len(after), len(before)) == (out_channels, width * groups), f"weights of shape {list(module.weight.shape)}"
    )

    mask = _training_mask(original)
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
        kept[~connected] = 0
    bias = None if original.bias is None else original.bias.detach()[after.index]
    if norm is not None:
        kept, bias = _folded(kept, bias, norm, after)
    _require(
        module.weight.dtype == kept.dtype and torch.equal(module.weight.detach(), kept),
        "a weight is not the one it came from, or one that the mask removes is not zero",
    )
    ours = None if module.bias is None else module.bias.detach()
    _require(
        (ours is None) == (bias is None) and (ours is None or bias is None or torch.equal(ours, bias)),
        "a bias is not the one it came from",
    )
    positions = kept[0, 0].numel()
    certificate.layers += 1
    certificate.weights_kept += ones * positions
    certificate.weights_pruned += (out_channels * weight.shape[1] - ones) * positions


def _training_mask(original: nn.Conv2d | nn.Linear) -> Tensor | None:
    """Which weights of the training layer count, [C_out, C_in], by eq. 5 to 7 from the gates themselves; None for all."""
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
        double(weight),  # type: ignore[arg-type]
        double(bias),
        rows(norm.running_mean),  # type: ignore[arg-type]
        rows(norm.running_var),  # type: ignore[arg-type]
        norm.eps,
        rows(norm.weight),
        rows(norm.bias),
    )
    return folded[0].detach(), folded[1].detach()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name, tensor.detach()


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
