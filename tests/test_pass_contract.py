"""The contract of a pass: it changes nothing that it was given, and what it makes is well-formed, pure and runs."""

from __future__ import annotations

import copy

import pytest
import torch
from forging import Named, four_layers
from graphs import node_of
from torch import fx, nn

from foldgroup.errors import PassError
from foldgroup.pipeline import Pipeline
from foldgroup.trace import fork


@pytest.fixture
def training() -> fx.GraphModule:
    return four_layers()


# ---- it only reads what it was given -----------------------------------------------------------------------------


def rename_node(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    next(iter(reversed(graph.graph.nodes))).name = "renamed"
    return result


def erase_node(graph: fx.GraphModule) -> fx.GraphModule:
    node = node_of(graph, "2")
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph.graph.erase_node(node)
    return fork(graph)


def rewire(graph: fx.GraphModule) -> fx.GraphModule:
    node_of(graph, "3").args = (node_of(graph, "1"),)
    return fork(graph)


def annotate(graph: fx.GraphModule) -> fx.GraphModule:
    node_of(graph, "1").meta["origin"] = "_0"
    return fork(graph)


def replace_module(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    graph.add_submodule("2", nn.ReLU6().eval())
    return result


def delete_module(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    graph.delete_submodule("2")
    return result


def set_module(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    result.get_submodule("3").padding = (1, 1)  # shared with its argument
    return result


def set_parameter(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    result.get_submodule("3").weight = nn.Parameter(torch.ones(4, 8, 1, 1))
    return result


def write_tensor(graph: fx.GraphModule) -> fx.GraphModule:
    with torch.no_grad():
        graph.get_submodule("3").weight.mul_(2)
    return fork(graph)


def write_data(graph: fx.GraphModule) -> fx.GraphModule:
    weight = graph.get_submodule("3").weight
    weight.data.copy_(weight.data.flip(1))  # neither the version counter nor the sum of the values tells
    return fork(graph)


def train_mode(graph: fx.GraphModule) -> fx.GraphModule:
    return fork(graph).train()


MUTATIONS = {
    rename_node: "node renamed|node output",
    erase_node: "node _2|node _3",
    rewire: "node _3",
    annotate: "node _1",
    replace_module: "2",
    delete_module: "2",
    set_module: "3",
    set_parameter: r"3\.weight",
    write_tensor: r"3\.weight",
    write_data: r"3\.weight",
    train_mode: "[0-3]",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_pass_that_changes_what_it_was_given_is_refused(training, mutation):
    message = f"pass bad changed ({MUTATIONS[mutation]}), which it was only given to read"
    with pytest.raises(PassError, match=message):
        Pipeline((Named("bad", mutation),)).run(training)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_what_an_earlier_pass_handed_on_may_not_be_changed_either(training, mutation):
    message = f"pass bad changed ({MUTATIONS[mutation]}), which it was only given to read"
    with pytest.raises(PassError, match=message):
        Pipeline((Named("first", fork), Named("second", fork), Named("bad", mutation))).run(training)


def test_tensors_that_a_pass_makes_are_watched_in_the_next(training):
    def renew(graph: fx.GraphModule) -> fx.GraphModule:
        result = fork(graph)
        layer = copy.deepcopy(graph.get_submodule("3"))
        result.add_submodule("3", layer)
        return result

    with pytest.raises(PassError, match=r"pass bad changed 3\.weight"):
        Pipeline((Named("first", renew), Named("second", renew), Named("bad", write_data))).run(training)


def test_a_pass_that_returns_its_argument_is_refused(training):
    with pytest.raises(PassError, match="pass bad returned the graph it was given"):
        Pipeline((Named("bad", lambda graph: graph),)).run(training)


# ---- what it makes -----------------------------------------------------------------------------------------------


def missing_module(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    result.delete_submodule("2")
    return result


def wrong_order(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    node_of(result, "0").append(node_of(result, "3"))
    return result


def node_of_another_graph(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    node_of(result, "3").args = (node_of(graph, "2"),)
    return result


@pytest.mark.parametrize("malform", [missing_module, wrong_order, node_of_another_graph], ids=lambda f: f.__name__)
def test_a_malformed_graph_is_refused(training, malform):
    with pytest.raises(PassError, match="pass bad made a malformed graph: "):
        Pipeline((Named("bad", malform),)).run(training)


def hooked(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    relu = nn.ReLU().eval()
    relu.register_forward_hook(lambda *_: None)
    result.add_submodule("2", relu)
    return result


def in_place(graph: fx.GraphModule) -> fx.GraphModule:
    result = fork(graph)
    result.add_submodule("2", nn.ReLU(inplace=True).eval())
    node_of(result, "3").args = (node_of(result, "1"),)
    node = node_of(result, "3")
    node.replace_all_uses_with(node_of(result, "2"), delete_user_cb=lambda user: user.op == "output")
    return result


@pytest.mark.parametrize("make", [hooked, in_place], ids=lambda f: f.__name__)
def test_an_impure_graph_is_refused(training, make):
    with pytest.raises(PassError, match="pass bad made a graph that is not pure: "):
        Pipeline((Named("bad", make),)).run(training)


def test_a_graph_that_does_not_run_is_refused(training):
    def shrink(graph: fx.GraphModule) -> fx.GraphModule:
        result = fork(graph)
        result.add_submodule("2", nn.Conv2d(8, 5, 1).eval())
        del node_of(result, "2").meta["shape"]
        return result

    with pytest.raises(PassError, match=r"pass bad made a graph that does not run: .* 3: "):
        Pipeline((Named("bad", shrink),)).run(training)
