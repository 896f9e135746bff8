"""Networks of every kind with learned groups in them keep their function, and the certificate says so."""

from __future__ import annotations

import pytest
from graphs import relative_error

from bench import zoo
from foldgroup.certificate import certify
from foldgroup.equivalence import seeded_inputs
from foldgroup.evaluation import evaluate
from foldgroup.trace import trace
from passes import default_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    shape: (1, *shape[1:2], *(64 if len(shape) == 4 else n // 2 for n in shape[2:]))
    for _, shape in zoo.NETWORKS.values()
}
"""Smaller inputs than the benchmark's: channels do not depend on them."""


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_any_network_keeps_its_function(name):
    model = zoo.build(name, "spatial") or zoo.build(name, "every")
    assert model is not None
    shape = SMALL[zoo.NETWORKS[name][1]]
    if name == "densenet121":
        shape = (1, 3, 32, 32)
    training = trace(model, shape)
    result = default_pipeline().run(training)
    certificate = certify(training, result.graph)
    assert certificate.holds, certificate.failure
    inputs = seeded_inputs(shape)
    before, after = (evaluate(graph, inputs)["output"] for graph in (training, result.graph))
    before, after = (list(o.values()) if isinstance(o, dict) else [o] for o in (before, after))
    assert max(relative_error(a, b) for a, b in zip(after, before, strict=True)) < 1e-9
    assert result.ledger
    fates = [entry.fate for entry in result.ledger]
    assert all(entry.reason for entry in result.ledger)
    if name in ("resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "squeezenet1_0"):
        assert "kept" not in fates  # every learned layer is between dense ones
