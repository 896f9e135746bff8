"""The exactness certificate: a proof, without tolerance, that a graph computes the training form.

The proof is a simulation. Walking the compiled graph in order, every node n is assigned a claim (t, p): *n holds the
channels p of node t of the training form*, n = t[:, p] along t's channel axis (:mod:`foldgroup.rules`), where p is a
list of channels; most often it has them all, and is an order. A claim is granted only if it follows from the claims of
n's operands:

* both graphs may be read as equations (:mod:`foldgroup.purity`), and n has the shape that p leaves of t's;
* an operation is that of its training node, with the same settings and arguments, on operands that claim the training
  node's operands; no-ops in evaluation mode are their operand, and a reshape–transpose–reshape that reorders channels
  by s (:mod:`foldgroup.reshaping`) is its operand in order s;
* the network's input is the training form's, in order;
* ChannelShuffle or ChannelSelect by s of (t, p) gives (t, p · s); a slice of (t, p) gives (t, p[a:b]); joining (t, p)
  and (t, q) gives (t, p q);
* an operation through which channels pass (:class:`foldgroup.rules.Through`) has operands that all have the channels p,
  and gives (t, p), or (t, p ⊗ id) where every channel makes several; its per-channel tensors are those of t, at p. What
  normalises groups of channels has them all, each group together;
* concatenation joins its operands' lists, each moved to its operand's place; what takes channels a … b − 1 finds just
  these there;
* a convolution or linear layer that reads channels p and writes q has, entry for entry and bit for bit,
  weight[o, i] = W[q[o], p[i]], where W is the training layer's kernel times the mask that its gates define by eq. 7,
  and every entry of W[q] that it leaves out is zero, under that mask or as it is; where a group reads a channel again,
  the weight is 0;
* a layer that took in a batch norm stands for the norm's node, and its weights are those of the training form's layer
  and norm, folded in float64;
* what sums over channels, or asks for shapes, has all channels, in any order;
* a tensor of the network itself is the training form's, at p along its channel axis;
* any other operation (a barrier) has operands in order, and so its result;
* the network's output is the training form's, in order.

No floating-point operation is relied on but the folding of batch norm, which is repeated from the checkpoint's own
numbers. All values are taken to be finite: an infinite activation times a weight of zero is no number in the training
form, and nothing in one that leaves the weight out. Nothing here calls a pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from foldgroup import rules as ops
from foldgroup.claims import (
    Certificate,
    Claim,
    Held,
    attribute,
    index_of,
    normalises,
    noted_channels,
    order_applied,
)
from foldgroup.errors import FoldgroupError
from foldgroup.forms import (
    ChannelSelect,
    ChannelShuffle,
    MaskedConv,
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
)
from foldgroup.purity import impurity
from foldgroup.reshaping import shuffle_at
from foldgroup.rules import rules_of
from foldgroup.trace import attach_shapes, called_module, fork, is_no_op, shape_of
from foldgroup.weights import NORMS, Refuted, check_module, check_weights, equal_bits, require

_MASKED = (MaskedConv1d, MaskedConv2d, MaskedConv3d)


_NOT_PROVEN = (
    *(Refuted, FoldgroupError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError),
    *(TypeError, ValueError),
)
"""What an untrusted graph may come to: a claim that does not follow, or something that cannot be read at all."""


def certify(training: fx.GraphModule, compiled: fx.GraphModule) -> Certificate:
    """Prove that ``compiled`` computes ``training`` exactly, or say where the proof fails.

    ``compiled`` may be the result of any pass; both come from one :func:`foldgroup.trace.trace`.
    """
    certificate = Certificate(failure=impurity(training) or impurity(compiled))
    if not certificate.holds:
        return certificate
    node = None
    try:
        _check_shapes(training, compiled)
        proof = _Proof(training, compiled, certificate)
        for node in compiled.graph.nodes:
            if node.op == "output":
                proof.check_output(node)
                return certificate
            proof.grant(node)
        certificate.failure = "the graph has no output"
    except _NOT_PROVEN as refuted:
        reason = str(refuted) if isinstance(refuted, Refuted | FoldgroupError) else f"it cannot be read: {refuted!r}"
        where = "the graph" if node is None else node.target if node.op == "call_module" else node.name
        certificate.failure = f"{where}: {reason}"
    return certificate


def _check_shapes(training: fx.GraphModule, compiled: fx.GraphModule) -> None:
    """The shapes noted in ``compiled`` are those that its nodes have for the training form's input."""
    noted = {node.name: node.meta.get("shape") for node in compiled.graph.nodes if node.op != "output"}
    again = fork(compiled)
    attach_shapes(again, shape_of(next(iter(training.graph.nodes))))
    for node in again.graph.nodes:
        shape = noted.get(node.name)
        if node.op != "output" and (shape or ()) != shape_of(node):
            raise Refuted(f"{node.name}: its shape is noted as {shape} for {shape_of(node)}")


class _Proof:
    """The claims granted so far."""

    def __init__(self, training: fx.GraphModule, compiled: fx.GraphModule, certificate: Certificate) -> None:
        self.training = training
        self.compiled = compiled
        self.certificate = certificate
        self.sources = {node.name: node for node in training.graph.nodes}
        self.training_rules, self.axes = rules_of(training, to_change=False)
        self.rules, self.our_axes = rules_of(compiled, to_change=False)
        self.held: dict[fx.Node, Held] = {}
        self._bases: dict[fx.Node, tuple[fx.Node, Tensor | None]] = {}

    def grant(self, node: fx.Node) -> None:
        """Grant ``node`` its claim, if it follows from those of its operands."""
        held = self._claim(node)
        axis = self.axes[held.node]
        if held.index is not None:
            ours, size = (
                self.our_axes[node],
                shape_of(held.node)[axis] if axis is not None and shape_of(held.node) else 0,
            )
            free = node.op == "get_attr" and ours is None and torch.equal(held.index, torch.arange(size))
            require(ours == axis or free, f"its channels are dimension {ours}, not {axis}")
            within = not shape_of(held.node) or bool(((held.index >= 0) & (held.index < size)).all())
            require(within, "it holds channels that are not there")
        noted, true = shape_of(node), list(shape_of(held.node))
        if axis is not None and held.index is not None and true:
            true[axis] = len(held.index)
        require(noted == tuple(true), f"its shape is noted as {noted} for {tuple(true)}")
        self.held[node] = held
        claim = Claim(held.node.name, axis, held.index)
        self.certificate.claims[node.name] = claim
        self.certificate.nodes += 1
        self.certificate.orders += int(not claim.in_order)

    def check_output(self, node: fx.Node) -> None:
        """The output returns what the training form's does, in order."""
        output = next(source for source in self.sources.values() if source.op == "output")
        self._check_operands(node, output)
        for ours, theirs in self._operands(node, output):
            in_order = self._in_order(self._seen(ours, theirs), theirs)
            require(in_order, "the network's output is not in its original channel order")

    # ---- what a node holds -----------------------------------------------------------------------------------

    def _base(self, node: fx.Node) -> tuple[fx.Node, Tensor | None]:
        """The training node behind no-ops and reshaped shuffles, and the channels of it that ``node`` is."""
        if node not in self._bases:
            shuffled = shuffle_at(self.training, node)
            if is_no_op(called_module(self.training, node)):
                self._bases[node] = self._base(node.all_input_nodes[0])
            elif shuffled is not None and self.axes[shuffled[0]] == self.axes[node] == 1:
                base, index = self._base(shuffled[0])
                order = shuffled[1].index
                self._bases[node] = base, order if index is None else index[order]
            else:
                self._bases[node] = node, None
        return self._bases[node]

    def _whole(self, node: fx.Node) -> Tensor | None:
        axis = self.axes[node]
        return None if axis is None else torch.arange(shape_of(node)[axis])

    def _canonical(self, source: fx.Node, index: Tensor | None) -> Held:
        """A claim on ``source`` as one on what is behind it."""
        base, moved = self._base(source)
        return Held(base, index if moved is None or index is None else moved[index])

    def _seen(self, ours: fx.Node, theirs: fx.Node) -> Tensor | None:
        """The channels of the training operand ``theirs`` that our operand holds."""
        held = self.held[ours]
        base, moved = self._base(theirs)
        require(held.node is base, f"it reads {held.node.name} in place of {base.name}")
        return held.index if moved is None or held.index is None else torch.argsort(moved)[held.index]

    def _operands(self, node: fx.Node, source: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Our operands beside the training form's, in the order of the arguments."""
        sides: list[list[fx.Node]] = []
        for call in (node, source):
            found: list[fx.Node] = []

            def note(operand: fx.Node, found: list[fx.Node] = found) -> fx.Node:
                found.append(operand)
                return operand

            fx.map_arg((call.args, call.kwargs), note)
            sides.append(found)
        return list(zip(*sides, strict=True))

    def _check_operands(self, node: fx.Node, source: fx.Node) -> None:
        """``node`` does to its operands what ``source`` does to the training form's."""
        same_call = node.op == source.op and (node.op in ("call_module", "get_attr") or node.target == source.target)
        require(same_call, f"{node.op} {node.target} stands for {source.op} {source.target}")
        ours = fx.map_arg((node.args, node.kwargs), lambda operand: self.held[operand].node)
        theirs = fx.map_arg((source.args, source.kwargs), lambda operand: self._base(operand)[0])
        same = ours == theirs and repr(ours) == repr(theirs)  # 1, 1.0 and True are equal but for their text
        require(same, f"it does not compute {source.name} from {source.args}")

    def _claim(self, node: fx.Node) -> Held:
        module = called_module(self.compiled, node)
        rule = self.rules[node]
        if type(module) is ChannelSelect:
            (given,) = (self.held[operand] for operand in node.all_input_nodes)
            require(self.axes[given.node] == 1, "it selects along dimension 1, not the channels")
            index = index_of(given)
            require(module.index.dtype in (torch.int32, torch.int64), "it selects by what are no numbers of channels")
            inside = module.index.ndim == 1 and bool(((module.index >= 0) & (module.index < len(index))).all())
            require(inside, f"it selects channels that are not among {len(index)}")
            return Held(given.node, index[module.index])
        if type(module) is ChannelShuffle:
            (given,) = (self.held[operand] for operand in node.all_input_nodes)
            require(module.dim == self.axes[given.node], f"it reorders dimension {module.dim}, not the channels")
            index, order = index_of(given), order_applied(module).index
            require(len(index) == len(order), f"it reorders {len(order)} channels of {len(index)}")
            return Held(given.node, index[order])
        source = self.sources.get(node.meta.get("origin", ""))
        if source is None:
            raise Refuted("it stands for no node of the training form")
        selected = self._selection(node, rule, source)
        if selected is not None:
            return selected
        if isinstance(module, _ConvNd | nn.Linear) and not isinstance(rule, ops.Barrier):
            return self._layer(node, module, rule, source)
        if isinstance(module, MaskedConv) and type(module) in _MASKED and self._reads_channels(node, module):
            return self._layer(node, module, rule, source)
        self._check_operands(node, source)
        return self._canonical(source, self._result(node, rule, source, module))

    def _selection(self, node: fx.Node, rule: ops.Rule, source: fx.Node) -> Held | None:
        """Slices and concatenations that a pass has put in: they move channels of one training node about."""
        base = self._base(source)[0]
        if isinstance(rule, ops.Takes) and self.held[rule.operand].node is base:
            return Held(base, index_of(self.held[rule.operand])[rule.start : rule.stop])
        if isinstance(rule, ops.Joins) and all(self.held[operand].node is base for operand in rule.operands):
            return Held(base, torch.cat([index_of(self.held[operand]) for operand in rule.operands]))
        return None

    def _result(self, node: fx.Node, rule: ops.Rule, source: fx.Node, module: nn.Module | None) -> Tensor | None:
        """The channels of ``source`` that an operation which is the training form's own gives."""
        original = called_module(self.training, source)
        theirs = self.training_rules[source]
        pairs = [(ours, operand, self._seen(ours, operand)) for ours, operand in self._operands(node, source)]
        seen = {ours: index for ours, _, index in pairs}
        alike = isinstance(rule, ops.Barrier) or type(rule) is type(theirs) or isinstance(theirs, ops.Takes)
        require(alike, f"it is no longer what {source.name} does to channels")
        if isinstance(rule, ops.Through) and isinstance(theirs, ops.Through):
            carried = [(ours, index) for ours, operand, index in pairs if operand in theirs.operands]
            first = carried[0][1]
            same = all(index is not None and first is not None and torch.equal(index, first) for _, index in carried)
            require(same, "its operands are in different channel orders")
            require({ours for ours, _ in carried} == set(rule.operands), "other operands carry its channels")
            assert first is not None
            for _, operand, index in pairs:
                carries = operand in theirs.operands
                require(carries or self._in_order(index, operand), "an operand is not in its original order")
            if rule.repeat > 1:
                first = (first[:, None] * rule.repeat + torch.arange(rule.repeat)).reshape(-1)
            if rule.groups > 1:
                self._check_whole(first, source)
                runs = first.reshape(rule.groups, -1) // (len(first) // rule.groups)
                require(bool((runs == runs[:, :1]).all()), "it normalises over channels of different groups")
            elif normalises(module, node):
                self._check_whole(first, source)
            check_module(original, module, first if rule.carries else None)
            return first
        check_module(original, module, None)
        if isinstance(rule, ops.Joins):
            parts, at = [], 0
            assert isinstance(theirs, ops.Joins)
            for ours, operand in zip(rule.operands, theirs.operands, strict=True):
                index = self._seen(ours, operand)
                assert index is not None
                parts.append(at + index)
                at += shape_of(operand)[theirs.axis]
            return torch.cat(parts)
        if isinstance(rule, ops.Splits):
            return seen[rule.operand]
        if isinstance(theirs, ops.Takes) and isinstance(rule, ops.Takes | ops.Through):
            operand = rule.operand if isinstance(rule, ops.Takes) else rule.operands[0]
            index = seen[operand]
            assert index is not None
            index = (index[rule.start : rule.stop] if isinstance(rule, ops.Takes) else index) - theirs.start
            inside = bool(((index >= 0) & (index < theirs.stop - theirs.start)).all())
            require(inside, "it takes channels that the training form does not")
            return index
        require(not isinstance(rule, ops.Through | ops.Takes), "it takes what the training form does not")
        if isinstance(rule, ops.Constant):
            return self._constant(node, source)
        if isinstance(rule, ops.Reads):
            for _, operand, index in pairs:
                if index is not None:
                    self._check_whole(index, operand)
            return None
        in_order = all(self._in_order(index, operand) for _, operand, index in pairs)
        require(in_order, "its operands are not in their original channel order")
        return self._whole(source)

    def _in_order(self, index: Tensor | None, node: fx.Node) -> bool:
        """Whether an index is all channels of a training node, as they were."""
        whole = self._whole(node) if shape_of(node) else None
        return index is None or (torch.equal(index, whole) if whole is not None else self._is_split(index, node))

    def _is_split(self, index: Tensor, node: fx.Node) -> bool:
        """The same for a tuple of parts, whose index is that of what was split."""
        split = self.training_rules[node]
        return isinstance(split, ops.Splits) and torch.equal(index, torch.arange(sum(split.sizes)))

    def _check_whole(self, index: Tensor | None, node: fx.Node) -> None:
        """The index lists every channel of a training node, or of what it is the parts of, once."""
        rule, axis = self.training_rules[node], self.axes[node]
        assert index is not None
        if isinstance(rule, ops.Splits):
            size = sum(rule.sizes)
        else:
            assert axis is not None
            size = shape_of(node)[axis]
        require(torch.equal(index.sort().values, torch.arange(size)), "it does not have all channels")

    def _constant(self, node: fx.Node, source: fx.Node) -> Tensor | None:
        tensor, original = attribute(self.compiled, node), attribute(self.training, source)
        axis, index = self.axes[source], self._whole(source)
        if axis is not None and "out_order" in node.meta:
            index = noted_channels(node.meta["out_order"].source, original.shape[axis])
            original = original.index_select(axis, index)
        require(equal_bits(tensor, original), "its tensor differs from the training form's")
        return index

    # ---- layers with weights ---------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, module: nn.Module, rule: ops.Rule, source: fx.Node) -> Held:
        """A convolution or linear layer, which may have taken in a batch norm."""
        assert isinstance(module, _ConvNd | nn.Linear)
        norm = called_module(self.training, source)
        conv, moved = source, None
        if type(norm) in NORMS:
            conv, moved = self._base(source.all_input_nodes[0])
        else:
            norm = None
        self._check_operands(node, conv)
        (ours, theirs), *sizes = self._operands(node, conv)
        require(all(isinstance(self.rules[size], ops.Reads) for size, _ in sizes), "it reads more than one tensor")
        before = self._seen(ours, theirs)
        if before is None:
            raise Refuted(f"it reads {theirs.name}, which has no channels")
        after = self._whole(source)
        assert after is not None
        if isinstance(rule, ops.Through) and not {"out_index", "out_order"} & node.meta.keys():
            after = (before[:, None] * rule.repeat + torch.arange(rule.repeat)).reshape(-1)
        elif "out_index" in node.meta:
            after = noted_channels(node.meta["out_index"], shape_of(conv)[self.axes[conv] or 1])
        elif "out_order" in node.meta:
            after = noted_channels(node.meta["out_order"].source, shape_of(conv)[self.axes[conv] or 1])
        original = called_module(self.training, conv)
        of_norm = after if moved is None else torch.argsort(moved)[after]  # a shuffle of the network's own between them
        check_weights(module, original, norm, before, after, of_norm, self.certificate)
        return self._canonical(source, of_norm)

    def _reads_channels(self, node: fx.Node, module: MaskedConv) -> bool:
        """Whether a masked convolution reads [N, C, …] with the channels where it takes them to be."""
        operand = node.all_input_nodes[0]
        return len(shape_of(operand)) == len(module.kernel_size) + 2 and self.axes[self.held[operand].node] == 1
