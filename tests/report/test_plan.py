"""The plan in words, and the drawing of the spaces."""

from __future__ import annotations

import io
import re

import pytest
import torch
from graphs import Residual, conv, filled, learned
from rich.console import Console
from torch import nn

import foldgroup
from foldgroup.errors import BundleError
from foldgroup.report.plan import plan_dot, plan_of, plan_report


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A residual stream that two learned layers want in different orders, behind a layer between dense ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(conv(3, 8), learned(8, 8, (1, 0, 0), 1), nn.ReLU(), conv(8, 8)),
        *(Residual(learned(8, 8, (1, 1, 0))), Residual(learned(8, 8, (1, 0, 1))), nn.Conv2d(8, 4, 1)),
    )
    path = tmp_path_factory.mktemp("plan") / "model.foldgroup"
    return foldgroup.compile(filled(model), path, example_input=(1, 3, 8, 8), target=["onnxruntime"], engine=False)


def text_of(renderable) -> str:
    console = Console(width=300, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_the_plan_tells_costs_orders_demands_and_alternatives(bundle):
    plan = plan_of(bundle)
    text = text_of(plan_report(plan))
    assert plan["exact"] and "no plan costs less." in text
    assert re.search(r"To keep every shuffle would cost \d+\.\d+ µs, \d\.\d\d times as much", text)
    assert re.search(r"To coarsen everything would cost \d+\.\d+ µs, \d\.\d\d times as much", text)
    for layer in ("1", "4.body.0", "5.body.0"):
        assert re.search(rf"{re.escape(layer)} +(inputs|outputs) +\d +\d", text)
    assert all(cost is None or cost >= plan["cost"] for cost in plan["alternatives"].values())
    assert {layer["name"]: layer["groups"] for layer in plan["layers"]} == {"1": 4, "4.body.0": 2, "5.body.0": 2}


def test_the_drawing_has_every_space_and_every_layer(bundle):
    dot = plan_dot(bundle)
    plan = plan_of(bundle)
    assert dot.startswith("digraph spaces {") and dot.endswith("}")
    assert len(re.findall(r"^  s\d+ \[", dot, re.M)) == len(plan["spaces"])
    assert len(re.findall(r"penwidth=2", dot)) == len(plan["layers"]) == 3
    assert '"4.body.0\\n' in dot


def test_there_is_nothing_to_draw_without_groups(tmp_path):
    model = filled(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)))
    bundle = foldgroup.compile(
        model, tmp_path / "plain", example_input=(1, 3, 8, 8), target=["onnxruntime"], engine=False
    )
    assert plan_of(bundle) is None
    with pytest.raises(BundleError, match="no layer of it runs groups"):
        plan_dot(bundle)
