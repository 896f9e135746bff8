"""Masks of any origin: components, equal groups, and the cheapest exact form."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import factored_bits, quick

from foldgroup.errors import GroupingError
from foldgroup.grouping import Grouping, kronecker_mask
from foldgroup.mask_forms import LANES, MAX_PARTS, Geometry, cheapest_form, forms
from foldgroup.masks import Block, Components, components, equal_groups, read_sets
from foldgroup.planning.cost import CostModel

LARGE = Geometry(kernel=9, in_positions=196, out_positions=196)
"""A 3×3 at 14×14."""


class Free:
    """Nothing costs anything, so every form is offered."""

    def conv(self, macs, bytes_moved):
        return 0.0

    def move(self, bytes_moved):
        return 0.0


class MacsOnly(Free):
    def conv(self, macs, bytes_moved):
        return macs if bytes_moved else 0.0  # and nothing for an operation as such


@st.composite
def masks(draw, most=12):
    """Any mask, and often one of a few blocks."""
    shape = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    if draw(st.booleans()):
        entries = draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
        return np.array(entries).reshape(shape)
    return by_labels(*(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)) for n in shape))


def by_labels(ins, outs):
    """Channels of the same number are connected; 0 is a number of its own for none."""
    ins, outs = np.array(ins), np.array(outs)
    return (ins[:, None] == outs) & (ins[:, None] > 0)


def blocks(*sizes, unread=0, silent=0):
    """A block-diagonal mask of so many inputs and outputs a block."""
    ins = [k for k, (a, _) in enumerate(sizes, 1) for _ in range(a)]
    outs = [k for k, (_, b) in enumerate(sizes, 1) for _ in range(b)]
    return by_labels(ins + [0] * unread, outs + [0] * silent)


def reference(mask):
    """The components by networkx, one edge an entry."""
    graph = nx.Graph()
    graph.add_nodes_from(("in", i) for i in range(mask.shape[0]))
    graph.add_nodes_from(("out", o) for o in range(mask.shape[1]))
    graph.add_edges_from((("in", i), ("out", o)) for i, o in np.argwhere(mask).tolist())
    found = [
        Block(*(tuple(sorted(n for side, n in nodes if side == which)) for which in ("in", "out")))
        for nodes in nx.connected_components(graph)
    ]
    return Components(
        tuple(sorted((b for b in found if b.ins and b.outs), key=lambda b: b.ins)),
        tuple(sorted(i for b in found if not b.outs for i in b.ins)),
        tuple(sorted(o for b in found if not b.ins for o in b.outs)),
    )


# Components


@given(masks())
@quick(200)
def test_components_are_those_of_the_bipartite_graph(mask):
    found = components(mask)
    assert found == reference(mask)
    assert (found.in_channels, found.out_channels) == mask.shape


@given(masks(), st.randoms(use_true_random=False))
@quick(50)
def test_components_follow_the_channels(mask, random):
    ins, outs = (random.sample(range(n), n) for n in mask.shape)
    permuted = components(mask[np.ix_(ins, outs)])
    back = {(frozenset(ins[i] for i in b.ins), frozenset(outs[o] for o in b.outs)) for b in permuted.blocks}
    assert back == {(frozenset(b.ins), frozenset(b.outs)) for b in components(mask).blocks}


def test_components_of_an_example():
    mask = np.zeros((5, 6))
    mask[0, 4] = mask[3, 4] = mask[3, 1] = 0.5  # any entry but 0 connects
    mask[2, 0] = -1
    found = components(mask)
    assert found == Components((Block((0, 3), (1, 4)), Block((2,), (0,))), unread=(1, 4), silent=(2, 3, 5))


@given(masks())
@quick(100)
def test_read_sets_group_the_outputs_that_read_the_same(mask):
    found = read_sets(mask)
    assert sorted(o for block in found.blocks for o in block.outs) + list(found.silent) == sorted(
        range(mask.shape[1]), key=lambda o: (not mask[:, o].any(), o)
    )
    assert all(mask[:, o].nonzero()[0].tolist() == list(block.ins) for block in found.blocks for o in block.outs)
    assert len({block.ins for block in found.blocks}) == len(found.blocks)
    assert found.unread == components(mask).unread


@pytest.mark.parametrize("use", [components, read_sets])
@pytest.mark.parametrize("mask", [np.zeros((0, 3)), [1, 1], np.ones((2, 2, 2))], ids=["empty", "a vector", "a kernel"])
def test_what_is_no_matrix_is_refused(use, mask):
    with pytest.raises(GroupingError, match="a matrix"):
        use(mask)


# Equal groups


@given(factored_bits(max_channels=60))
@quick(60)
def test_a_kronecker_mask_gives_its_own_grouping(case):
    mask = kronecker_mask(*case)
    grouping = Grouping.from_mask(mask)
    assert equal_groups(components(mask)) == (grouping if grouping.groups > 1 else None)


@given(masks())
@quick(150)
def test_equal_groups_hold_every_component_and_are_as_many_as_can_be(mask):
    found = components(mask)
    grouping = equal_groups(found)
    if grouping is not None:
        assert grouping.groups > 1
        assert not (mask & ~grouping.mask).any()
        firsts = list(grouping.in_order.source[:: grouping.in_width])
        assert firsts == sorted(firsts)
    assert (grouping.groups if grouping else 1) == most_groups(found)


def most_groups(found):
    """By trying every assignment of components to groups that differ in what room they have left."""

    def fit(sizes, rooms):
        if not sizes:
            return True
        (a, b), *others = sizes
        return any(
            fit(others, sorted([*rooms[:k], (rooms[k][0] - a, rooms[k][1] - b), *rooms[k + 1 :]]))
            for k in {room: k for k, room in enumerate(rooms)}.values()
            if rooms[k][0] >= a and rooms[k][1] >= b
        )

    most = math.gcd(found.in_channels, found.out_channels)
    sizes = [block.size for block in found.blocks]
    rooms = {g: [(found.in_channels // g, found.out_channels // g)] * g for g in range(1, most + 1) if most % g == 0}
    return max(groups for groups, room in rooms.items() if fit(sizes, room))


@pytest.mark.parametrize(
    ("sizes", "extra", "groups"),
    [
        pytest.param([(2, 2)] * 4, {}, 4, id="equal"),
        pytest.param([(2, 4)] * 3, {}, 3, id="rectangular"),
        pytest.param([(4, 4), (2, 2), (2, 2)], {}, 2, id="two small ones make a large one"),
        pytest.param([(3, 3), (3, 3), (2, 2), (2, 2), (2, 2)], {}, 2, id="first fit alone would fail: 3+3, 2+2+2"),
        pytest.param([(5, 1), (1, 5), (3, 3)], {}, None, id="both widths must fit"),
        pytest.param([(3, 1), (1, 3), (2, 2)], {}, None, id="neither way fits"),
        pytest.param([(3, 1), (1, 3), (2, 2), (2, 2)], {}, 2, id="complementary"),
        pytest.param([(2, 2)] * 3, {"unread": 2, "silent": 2}, 4, id="empties make a group of their own"),
        pytest.param([(2, 2), (2, 1), (1, 2)], {"unread": 1, "silent": 1}, 3, id="empties fill up"),
        pytest.param([(7, 7), (1, 1)], {}, None, id="a giant and a crumb"),
        pytest.param([(3, 3), (4, 4)], {}, None, id="seven is prime"),
        pytest.param([(8, 8)], {}, None, id="dense"),
    ],
)
def test_equal_groups_of_examples(sizes, extra, groups):
    grouping = equal_groups(components(blocks(*sizes, **extra)))
    assert (grouping.groups if grouping else None) == groups


def test_a_search_that_is_given_up_leaves_out_groups_but_never_a_weight(monkeypatch):
    monkeypatch.setattr("foldgroup.masks.SEARCH_STEPS", 3)
    mask = blocks((3, 3), (3, 3), (2, 2), (2, 2), (2, 2))
    grouping = equal_groups(components(mask))
    assert grouping is None or not (mask & ~grouping.mask).any()


# Forms


def computed(form, mask, weight, x):
    """``x @ (weight · mask)`` by the parts of ``form``, written with loops."""
    if form.kind == "dense":
        return x @ (weight * mask)
    if form.kind == "merged":
        return x @ (weight * mask * form.grouping.mask)
    result = np.full(mask.shape[1], np.nan)
    for part in form.parts:
        for at, o in enumerate(part.writes):
            group = at // part.out_width
            reads = part.reads[group * part.in_width :][: part.in_width]
            result[o] = sum(x[i] * weight[i, o] * mask[i, o] for i in sorted(set(reads)))
    return result


@given(masks(), st.integers(0, 2**16))
@quick(150)
def test_every_form_computes_the_same(mask, seed):
    rng = np.random.default_rng(seed)
    weight, x = rng.integers(-9, 9, mask.shape).astype(float), rng.integers(-9, 9, mask.shape[0]).astype(float)
    offered = forms(mask, LARGE, Free())
    assert offered[0].kind == "dense"
    for form in offered:
        assert np.array_equal(computed(form, mask, weight, x), x @ (weight * mask))
        assert len(form.parts) <= MAX_PARTS
        for part in form.parts:
            assert part.in_width * part.groups == len(part.reads)
            assert part.out_width * part.groups == len(part.writes)
    if components(mask).blocks:
        assert {form.kind for form in offered} >= {"dense", "split", "gathered"}


@given(masks())
@quick(100)
def test_a_split_reads_and_writes_each_channel_once(mask):
    found = components(mask)
    for form in forms(mask, LARGE, Free()):
        if form.kind == "split":
            reads = sorted(channel for part in form.parts for channel in part.reads)
            assert reads == sorted(set(range(mask.shape[0])) - set(found.unread))
            assert sorted(channel for part in form.parts for channel in part.writes) == list(range(mask.shape[1]))


@given(masks())
@quick(100)
def test_the_cheapest_form_is_no_dearer_than_any_and_never_dearer_than_dense(mask):
    offered = forms(mask, LARGE)
    cheapest = cheapest_form(mask, LARGE)
    assert cheapest.cost == min(form.cost for form in offered) <= offered[0].cost


@pytest.mark.parametrize(
    ("mask", "kind", "parts"),
    [
        pytest.param(np.ones((32, 32)), "dense", [], id="dense"),
        pytest.param(np.zeros((32, 32)), "dense", [], id="all zeros"),
        pytest.param(blocks((8, 8), (8, 8), (8, 8), (8, 8)), "merged", [], id="equal"),
        pytest.param(blocks((16, 16), (8, 8), (8, 8)), "merged", [], id="merged in pairs"),
        pytest.param(blocks((60, 60), (1, 1)), "dense", [], id="a giant and a crumb: a copy costs more"),
        pytest.param(blocks((128, 128), (64, 64), (64, 64), (1, 1)), "split", [1, 2, 1], id="unequal"),
        pytest.param(blocks((64, 80), (62, 80), (61, 80)), "gathered", [3], id="padding inputs saves a concatenation"),
        pytest.param(blocks(*[(64, 64)] * 3, unread=5, silent=3), "split", None, id="unread inputs"),
    ],
)
def test_the_cheapest_form_of_examples(mask, kind, parts):
    form = cheapest_form(mask, LARGE)
    assert form.kind == kind
    if parts is not None:
        assert sorted(part.groups for part in form.parts) == sorted(parts)


def test_groups_that_share_inputs_are_gathered():
    mask = np.zeros((64, 64), dtype=bool)
    for group in range(4):  # CondenseNet: each quarter of the outputs reads a quarter of the inputs of its own choice
        mask[np.ix_((np.arange(16) * 3 + 6 * group) % 64, range(group, 64, 4))] = True
    assert len(components(mask).blocks) == 1
    form = cheapest_form(mask, LARGE)
    assert (form.kind, [(part.groups, part.in_width, part.out_width) for part in form.parts]) == (
        "gathered",
        [(4, 16, 16)],
    )


def test_more_sizes_than_parts_are_padded_or_fused():
    mask = blocks(*[(n, 40 - n) for n in range(8, 32)])
    form = cheapest_form(mask, LARGE)
    assert 1 < len(form.parts) <= MAX_PARTS
    assert sum(part.groups for part in form.parts) == 24


def test_the_cost_decides():
    mask = blocks((48, 48), (16, 16))
    assert cheapest_form(mask, LARGE, MacsOnly()).kind == "split"
    assert cheapest_form(mask, LARGE, CostModel(macs_per_byte=1e6)).kind == "dense"
    macs = 9 * 196 * (48 * 48 + 16 * 16)
    assert cheapest_form(mask, LARGE, MacsOnly()).cost == macs


def test_narrow_groups_cost_whole_lanes_but_depthwise_ones_do_not():
    random = np.random.default_rng(0).random((256, 256)) < 0.1  # measured: 3 times as slow when gathered
    assert cheapest_form(random, LARGE).kind == "dense"
    narrow, depthwise = (cheapest_form(blocks(*[(w, w)] * (64 // w)), LARGE, MacsOnly()) for w in (2, 1))
    assert (narrow.kind, narrow.cost) == ("merged", 9 * 196 * 64 * LANES)
    assert (depthwise.kind, depthwise.cost) == ("merged", 9 * 196 * 64)


# Size


@pytest.mark.parametrize("kind", ["dense", "groups", "singletons", "giant and crumbs", "sparse", "path"])
def test_two_thousand_channels(kind):
    rng = np.random.default_rng(0)
    n = 2048
    mask, count = {
        "dense": lambda: (np.ones((n, n), dtype=bool), 1),
        "groups": lambda: (by_labels(rng.integers(1, 33, n), rng.integers(1, 33, n)), 32),
        "singletons": lambda: (np.eye(n, dtype=bool)[rng.permutation(n)], n),
        "giant and crumbs": lambda: (blocks((n - 200, n - 200), *[(1, 1)] * 200), 201),
        "sparse": lambda: (rng.random((n, n)) < 0.01, 1),
        "path": lambda: (np.eye(n, dtype=bool) | np.eye(n, k=1, dtype=bool), 1),
    }[kind]()
    found = components(mask)
    assert (found.in_channels, found.out_channels, len(found.blocks)) == (n, n, count)
    assert cheapest_form(mask, LARGE).cost > 0
