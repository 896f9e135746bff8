"""pack_groups: exact, as little as is needed, and depthwise layers are left alone."""

from __future__ import annotations

import random

import pytest
import torch
from graphs import CASES, apply, assert_same_function, compiled_case, conv
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import nn

from foldgroup.certificate import certify
from foldgroup.conv_shape import Execution
from foldgroup.equivalence import float64_outputs
from foldgroup.forms import CONVS
from foldgroup.pipeline import Note
from foldgroup.trace import shape_of, trace
from passes import PackGroups, default_pipeline
from passes.pack_groups import pack


@given(
    st.sampled_from(CONVS),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 99),
)
@quick(60)
def test_packing_changes_no_output_and_no_weight(kind, width_in, width_out, members, groups, seed):
    torch.manual_seed(seed)
    total = members * groups
    layer = kind(total * width_in, total * width_out, 3, padding=1, groups=total).double()
    packed = pack(layer, members)
    assert type(packed) is kind
    assert packed.groups == groups
    inputs = torch.randn(2, total * width_in, *[4] * len(layer.kernel_size), dtype=torch.float64)
    assert torch.equal(packed.weight[packed.weight != 0].sort().values, layer.weight.flatten().sort().values)
    torch.testing.assert_close(packed(inputs), layer(inputs), rtol=0, atol=1e-12)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(2, 24), st.integers(1, 8))
@quick(60)
def test_without_a_choice_it_packs_as_little_as_fits(width_in, width_out, groups, multiple):
    layer = nn.Conv2d(groups * width_in, groups * width_out, 1, groups=groups)
    graph = trace(nn.Sequential(layer), (1, groups * width_in, 2, 2))
    fits = [
        m
        for m in range(1, groups + 1)
        if not groups % m and not m * width_in % multiple and not m * width_out % multiple
    ]
    packed = PackGroups(multiple)
    depthwise = width_in == width_out == 1
    packed.run(graph)
    wanted = {} if depthwise or not fits or min(fits) == 1 else {"0": Execution(groups // min(fits))}
    assert packed.chosen == wanted


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_every_choice_is_exact_on_every_case(name, seed):
    case = compiled_case(name)
    draw = random.Random(seed).choice
    packing = PackGroups(choose=lambda name, calls, among: draw(list(among)) if seed else among[-1])
    packed = packing.run(case.folded).graph
    certificate = certify(case.training, packed)
    assert certificate.holds, certificate.failure
    inputs = torch.randn(2, *shape_of(next(iter(case.training.graph.nodes)))[1:], dtype=torch.float64)
    found = float64_outputs(packed, inputs)
    for ours, theirs in zip(found, float64_outputs(case.training, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", CASES)
def test_the_certificate_grants_it_on_every_case(name):
    case = compiled_case(name)
    packed = PackGroups(4).run(case.folded).graph
    certificate = certify(case.training, packed)
    assert certificate.holds, certificate.failure


def test_it_notes_what_it_packed_and_why_it_left_the_rest():
    network = nn.Sequential(
        conv(3, 8),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 3, padding=1, groups=2),
        nn.Conv2d(6, 8, 1, groups=1),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.ConvTranspose2d(8, 8, 1, groups=4),
    )
    record = apply(PackGroups(4), network, before="tidy").result.records[-1]
    assert record.rewrites == (Note("1", "4 groups packed into 2"),)
    assert record.skips == (
        Note("2", "depthwise"),
        Note("3", "no packing makes its widths multiples of 4"),
        Note("6", "a ConvTranspose2d is not packed"),
    )


@pytest.mark.parametrize(("dimensions", "kind"), enumerate(CONVS, start=1))
def test_it_packs_in_any_number_of_dimensions(dimensions, kind):
    case = apply(PackGroups(4), nn.Sequential(kind(8, 16, 3, groups=4)), (2, 8, *[4] * dimensions), before="tidy")
    assert case.result.records[-1].rewrites == (Note("0", "4 groups packed into 2"),)
    assert type(case.folded.get_submodule("0")) is kind
    assert_same_function(case.training, case.folded, case.shape)


def test_a_layer_called_twice_is_packed_once():
    shared = nn.Conv2d(8, 8, 3, padding=1, groups=4)
    case = apply(PackGroups(4), nn.Sequential(conv(3, 8), shared, nn.ReLU(), shared), before="tidy")
    assert len(case.result.records[-1].rewrites) == 1
    assert case.folded.get_submodule("1").groups == 2


def test_it_can_stand_in_the_pipeline():
    pipeline = default_pipeline().insert(PackGroups(4), before="tidy")
    assert [p.name for p in pipeline.passes][-2:] == ["pack_groups", "tidy"]
