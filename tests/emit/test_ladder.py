"""What is tried next for a convolution that a builder has no kernel for."""

from __future__ import annotations

import numpy as np
import pytest
from convs import LAYER, conv_model

from foldgroup.emit.ladder import named_in, next_rung
from foldgroup.emit.rewrite import groups_of

ERROR = "Could not find any implementation for node grouped + relu. In computeCosts"


def descend(model: bytes) -> list[str]:
    steps = []
    while (rung := next_rung(model, ERROR)) is not None:
        model, step = rung
        steps.append(step)
    return steps


def test_groups_are_merged_one_prime_at_a_time_down_to_dense() -> None:
    assert descend(conv_model(12, channels=12)) == [
        "grouped: 12 groups written as 6 wider ones",
        "grouped: 6 groups written as 3 wider ones",
        "grouped: 3 groups written as a dense convolution",
    ]


def test_what_is_not_in_fp32_ends_there() -> None:
    for model in (conv_model(2, dtype=np.float16), conv_model(2, quantised="symmetric")):
        assert descend(model) == ["grouped: 2 groups written as a dense convolution", "grouped: computed in fp32"]


def test_a_model_is_the_one_that_was_described() -> None:
    rung = next_rung(conv_model(8), ERROR)
    assert rung is not None and groups_of(rung[0]) == {LAYER: 4}


def test_an_error_about_something_else_changes_nothing() -> None:
    for error in ("", "out of memory", "node relu", "node regrouped", "node grouped_2", "node grouped.conv"):
        assert next_rung(conv_model(4), error) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Could not find any implementation for node layer1.0.conv2.", "layer1.0.conv2"),
        ("for node layer1.0.conv2 + PWN(layer1.0.relu). In computeCosts", "layer1.0.conv2"),
        ("No low-precision conv kernel available. Failing node: layer1.0.conv2", "layer1.0.conv2"),
        ("'layer1.0.conv2' for Turing", "layer1.0.conv2"),
        ("{ForeignNode[stem...layer1.0.conv2]}", "layer1.0.conv2"),
        ("No conv kernel for this network", "conv"),
        ("node layer1.0.conv21 of 1.0.conv2", None),
        ("node block.layer1.0.conv2", None),
        ("node layer1.0.conv2.weight", None),
    ],
)
def test_a_layer_is_found_by_its_whole_name(text: str, found: str | None) -> None:
    assert named_in(text, ["", "conv", "layer1.0.conv2"]) == found
