"""Error statistics, limits, and finding the layer that is off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from tiny import SIZE, tiny_network
from torch import nn

from foldgroup.certificate import certify
from foldgroup.equivalence import (
    HISTOGRAM_FROM,
    HISTOGRAM_TO,
    LIMITS,
    ErrorStatistics,
    TierResult,
    first_layer_over,
    float64_error,
    float64_outputs,
    layer_errors,
    pass_check,
    rounded_layer_errors,
    runtime_layer_errors,
    seeded_inputs,
)
from foldgroup.errors import EquivalenceError
from foldgroup.evaluation import evaluate
from foldgroup.forms import with_tensors
from foldgroup.trace import fork, trace
from passes import default_pipeline

SHAPE = (2, 3, SIZE, SIZE)


def test_of_several_outputs_the_worst_counts_each_by_its_own_scale() -> None:
    small, large = np.array([[1e-3, 0.0]]), np.full((1, 2, 2), 1e3)
    seen = ErrorStatistics.of_all([small + np.array([[0, 1e-5]]), large + 1], [small, large])
    assert seen.max_error == pytest.approx(1e-2) and seen.median_error == pytest.approx(5e-3)
    assert seen.top1_agreement is None and "agreement" not in seen.summary
    assert not TierResult("t", seen, LIMITS["fp32"]) and TierResult("t", seen, LIMITS["bf16"])
    assert ErrorStatistics.of_all([small], [small]).top1_agreement == 1
    assert ErrorStatistics.of(large, large).top5_agreement is None
    with pytest.raises(EquivalenceError, match="1 outputs for 2 of the reference"):
        ErrorStatistics.of_all([small], [small, large])


@given(st.floats(1e-6, 1e6), st.floats(0, 1e-2))
def test_errors_are_relative_to_the_largest_reference(scale: float, error: float) -> None:
    reference = np.array([[1.0, -4.0, 2.0]]) * scale
    outputs = reference + np.array([[0.0, 0.0, error * 4 * scale]])
    seen = ErrorStatistics.of(outputs, reference)
    assert seen.max_error == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert seen.median_error == pytest.approx(0, abs=1e-12)
    assert seen.top1_agreement == 1.0


def test_agreement_counts_images_with_the_same_largest_logit() -> None:
    reference = np.array([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    outputs = reference.copy()
    outputs[0] = outputs[0, ::-1]
    assert ErrorStatistics.of(outputs, reference).top1_agreement == 0.75


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_a_failure(bad: float) -> None:
    with pytest.raises(EquivalenceError, match="not a number"):
        ErrorStatistics.of(np.array([[bad, 1.0]]), np.ones((1, 2)))


def test_another_shape_is_a_failure() -> None:
    with pytest.raises(EquivalenceError, match="shape"):
        ErrorStatistics.of(np.ones((1, 3)), np.ones((1, 2)))


def test_a_zero_reference_is_compared_absolutely() -> None:
    assert ErrorStatistics.of(np.full((1, 2), 0.5), np.zeros((1, 2))).max_error == 0.5


def test_a_tier_is_truthy_iff_every_limit_is_kept_and_tells_the_tolerance_that_would_pass() -> None:
    reference = np.array([[1.0, 2.0]])
    good = TierResult("t", ErrorStatistics.of(reference + 1e-7, reference), LIMITS["fp32"])
    bad = TierResult("t", ErrorStatistics.of(reference + np.array([[2.5, 0.0]]), reference), LIMITS["fp32"])
    assert good and not bad
    assert len(bad.violations) == 3
    assert bad.as_dict()["smallest_passing_tolerance"] == 1.25


def test_seeded_inputs_repeat() -> None:
    assert torch.equal(seeded_inputs(SHAPE), seeded_inputs(SHAPE))
    assert not torch.equal(seeded_inputs(SHAPE), seeded_inputs(SHAPE, seed=1))


def test_layer_errors_look_through_channel_orders_and_find_the_first_layer_that_is_off() -> None:
    training = trace(tiny_network(), (1, *SHAPE[1:]))
    folded = default_pipeline().run(training).graph
    certificate = certify(training, folded)
    inputs = seeded_inputs(SHAPE)
    errors = layer_errors(training, folded, certificate, inputs)
    assert len(errors) > 20 and max(errors.values()) < 1e-12
    spoiled = fork(folded)
    layer = folded.get_submodule("layer2.0.conv2")
    spoiled.add_submodule("layer2.0.conv2", with_tensors(layer, {"weight": layer.weight * 1.001}))
    assert not certify(training, spoiled).holds
    off = layer_errors(training, spoiled, certificate, inputs)
    assert first_layer_over(off, 1e-9) == "layer2_0_conv2"
    assert float64_error(float64_outputs(training, inputs), spoiled, inputs) > 1e-9
    difference = pass_check(training, inputs)(spoiled)
    assert difference is not None and "certificate: layer2.0.conv2" in difference and "float64 error" in difference
    assert pass_check(training, inputs)(folded) is None


def test_runtime_values_are_compared_by_layer_name() -> None:
    graph = trace(tiny_network(), (1, *SHAPE[1:]))
    inputs = seeded_inputs(SHAPE)
    kept = evaluate(graph, inputs, keep=True)
    values = {"conv1": kept["conv1"].numpy(), "fc": kept["fc"].numpy() + 1}
    errors = runtime_layer_errors(graph, values, inputs)
    assert errors["conv1"] == 0 and errors["fc"] > 1e-3
    assert first_layer_over(errors, 1e-9) == "fc"


@pytest.mark.parametrize("dtype, unit", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_rounding_errors_grow_from_a_unit_and_a_kept_layer_has_none_of_its_own(dtype, unit) -> None:
    graph = trace(tiny_network(), (1, *SHAPE[1:]))
    inputs = seeded_inputs(SHAPE)
    errors = rounded_layer_errors(graph, dtype, (), inputs)
    layers = [name for name, module in graph.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert set(errors) == set(layers)
    assert 0.05 * unit < errors["conv1"] < 4 * unit
    assert all(0 < error < 100 * unit for error in errors.values())
    kept = rounded_layer_errors(graph, dtype, layers, inputs)
    assert kept["conv1"] < errors["conv1"]


def test_a_layer_called_twice_is_two_layers_of_a_runtime() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    graph = trace(nn.Sequential(shared, nn.ReLU(), shared), (1, 3, 8, 8))
    inputs = seeded_inputs((2, 3, 8, 8))
    values = {name: value.numpy() for name, value in evaluate(graph, inputs, keep=True).items()}
    errors = runtime_layer_errors(graph, {"0": values["_0"], "0_2": values["_0_1"]}, inputs)
    assert errors == {"0": 0.0, "0_2": 0.0}


def test_top_five_agreement_counts_the_references_five_in_ours() -> None:
    reference = np.arange(8.0)[None]
    ours = reference.copy()
    ours[0, [3, 2]] = ours[0, [2, 3]]  # the fifth and the sixth change places
    assert ErrorStatistics.of(ours, reference).top5_agreement == 0.8
    assert ErrorStatistics.of(reference[:, :3], reference[:, :3]).top5_agreement == 1


def test_agreement_is_judged_on_enough_images_only() -> None:
    reference = np.array([[1.0, 1.001]])
    swapped = ErrorStatistics.of(reference[:, ::-1], reference)
    assert swapped.top1_agreement == 0
    assert not TierResult("t", swapped, LIMITS["fp32"])
    assert TierResult("t", swapped, LIMITS["bf16"])
    many = ErrorStatistics.of(np.tile(reference[:, ::-1], (60, 1)), np.tile(reference, (60, 1)))
    assert not TierResult("t", many, LIMITS["bf16"])


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50))
@quick(60)
def test_the_histogram_counts_every_error_in_its_decade(errors):
    reference = np.ones((len(errors), 1))
    statistics = ErrorStatistics.of(reference + np.array(errors)[:, None], reference)
    assert sum(statistics.histogram) == len(errors)
    assert len(statistics.histogram) == HISTOGRAM_TO - HISTOGRAM_FROM + 1
    for power in range(HISTOGRAM_FROM, HISTOGRAM_TO):
        above = sum(statistics.histogram[power - HISTOGRAM_FROM + 1 :])
        assert above == sum((1 + error) - 1 >= 10.0**power for error in errors)
