"""Readers: the plain network computes what the masked one does, and masks that are none are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from foldgroup import dialects
from foldgroup.errors import CheckpointError
from foldgroup.evaluation import evaluate
from foldgroup.nn.condense import CondensedConv2d, CondensedLinear
from foldgroup.readers import readers, translate
from foldgroup.trace import trace
from passes.find_groups import FindGroups

EYE, ONES = torch.eye(2), torch.ones(2, 2)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(state: dict[str, Tensor], prefix: str = "x.") -> dict[str, Tensor]:
    return {prefix + key: value.clone() for key, value in state.items()}


def plain(state: dict[str, Tensor], channels: tuple[int, int], kernel: int = 3, **options) -> nn.Conv2d:
    """A Conv2d in the layer's place, loaded strictly from what the readers make of ``state``."""
    translated, _ = translate(state, **options)
    conv = nn.Conv2d(*channels, kernel, padding=kernel // 2, bias="x.bias" in translated).double()
    conv.load_state_dict({key.removeprefix("x."): value for key, value in translated.items()}, strict=True)
    return conv


def refusal(state: dict[str, Tensor], **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        translate(state, **options)
    message = str(caught.value)
    assert "'x'" in message and len(message) < 700
    return message


# prune


def test_pruned_layers_are_what_they_computed_with():
    conv, linear = nn.Conv2d(8, 12, 3, padding=1).double(), nn.Linear(6, 5).double()
    model = nn.ModuleDict({"x": conv, "fc": linear, "norm": nn.BatchNorm2d(3)})
    prune.ln_structured(conv, "weight", amount=0.5, n=1, dim=1)
    prune.random_unstructured(conv, "bias", amount=0.5)
    prune.random_unstructured(linear, "weight", amount=0.3)
    given_state = {key: value.clone() for key, value in model.state_dict().items()}
    state, notes = translate(model.state_dict())
    expected = {"x.weight": conv.weight, "x.bias": conv.bias, "fc.weight": linear.weight, "fc.bias": linear.bias}
    assert {key for key in state if not key.startswith("norm")} == set(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value)
    assert not (state["x.weight"] == 0).all() and (state["x.weight"].flatten(2).abs().sum((0, 2)) == 0).sum() == 4
    assert all(
        torch.equal(given_state[key], value) for key, value in model.state_dict().items()
    )  # nothing written into
    assert notes == ("torch.nn.utils.prune: masks multiplied into 'x', 'fc'",)


def test_a_mask_that_scales_is_refused():
    state = {"x.weight_orig": seeded(4, 4, 1, 1), "x.weight_mask": torch.full((4, 4, 1, 1), 0.5)}
    message = refusal(state)
    assert "weight_mask" in message and "0.5" in message and "neither 0 nor 1" in message


def test_a_mask_of_another_layer_is_refused():
    message = refusal({"x.weight_orig": seeded(4, 4, 1, 1), "x.weight_mask": torch.ones(5, 4, 1, 1)})
    assert "[5, 4, 1, 1]" in message and "[4, 4, 1, 1]" in message


def test_a_kernel_that_is_there_twice_is_refused():
    message = refusal({"x.weight_orig": seeded(4, 4), "x.weight_mask": torch.ones(4, 4), "x.weight": seeded(4, 4)})
    assert "'x.weight'" in message and "keep the one" in message


def test_spectral_norm_is_no_mask():
    state = {"x.weight_orig": seeded(4, 4), "x.weight_u": seeded(4), "x.weight_v": seeded(4)}
    assert translate(state) == (state, ())


# FLGC


def flgc(c_in: int, c_out: int, groups: int, seed: int = 0, kernel: tuple[int, ...] = (3, 3)) -> dict[str, Tensor]:
    return layer_of(
        {
            "in_channels_in_group_assignment_map": seeded(c_in, groups, seed=seed),
            "out_channels_in_group_assignment_map": seeded(c_out, groups, seed=seed + 1),
            "conv.weight": seeded(c_out, c_in, *kernel, seed=seed + 2),
            "conv.bias": seeded(c_out, seed=seed + 3),
        }
    )


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 999))
@quick(40)
def test_flgc_connects_channels_of_one_group(c_in, c_out, groups, seed):
    state = flgc(c_in, c_out, groups, seed)
    conv = plain(state, (c_in, c_out))
    ins, outs = (state[f"x.{side}_channels_in_group_assignment_map"].argmax(1) for side in ("in", "out"))
    assert torch.equal(conv.weight != 0, (outs[:, None] == ins)[:, :, None, None].expand_as(conv.weight))
    kept = conv.weight != 0
    assert torch.equal(conv.weight[kept], state["x.conv.weight"][kept])
    assert torch.equal(conv.bias, state["x.conv.bias"])


def test_flgc_in_three_dimensions():
    state, _ = translate(flgc(4, 6, 2, kernel=(3, 3, 3)))
    assert set(state) == {"x.weight", "x.bias"} and state["x.weight"].shape == (6, 4, 3, 3, 3)


def test_flgc_ties_that_stay_a_mask_are_read_and_others_refused():
    state = flgc(4, 4, 3)
    state["x.in_channels_in_group_assignment_map"][1] = 0.0  # channel 1 is in all three groups
    conv = plain(state, (4, 4))
    assert bool((conv.weight[:, 1] != 0).all())
    state["x.out_channels_in_group_assignment_map"][2] = 0.0
    assert "such as 3" in refusal(state)


def test_flgc_maps_of_another_layer_are_refused():
    state = flgc(4, 6, 3)
    state["x.in_channels_in_group_assignment_map"] = seeded(5, 3)
    assert "[5, 3]" in refusal(state)


# CondenseNet


class Learned(nn.Module):
    """A learned group convolution as its plain form computes it, the mask multiplied in at every call."""

    def __init__(self, c_in: int, c_out: int, masked: bool, kernel: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c_in)
        self.conv = nn.Conv2d(c_in, c_out, kernel, bias=False)
        if masked:
            self.register_buffer("_mask", torch.ones_like(self.conv.weight))
            self.register_buffer("_count", torch.zeros(1))
            self.register_buffer("_stage", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight * self._mask if hasattr(self, "_mask") else self.conv.weight
        return functional.conv2d(torch.relu(self.norm(x)), weight)


def learned(c_in: int, c_out: int, groups: int, outputs: bool = False) -> Learned:
    """With random statistics; each group of outputs (or inputs) keeps a 1/groups of the inputs (or outputs)."""
    torch.manual_seed(0)
    model = Learned(c_in, c_out, masked=True).double().eval()
    for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    model._mask.zero_()
    for group in range(groups):
        if outputs:
            model._mask[torch.randperm(c_out)[: c_out // groups], group::groups] = 1
        else:
            model._mask[group::groups, torch.randperm(c_in)[: c_in // groups]] = 1
    return model


@pytest.mark.parametrize("outputs", [False, True], ids=["inputs", "outputs (SFR)"])
def test_a_learned_group_convolution_is_a_plain_one_with_zeros(outputs):
    model = learned(16, 24, 4, outputs)
    with torch.no_grad():
        state, notes = translate(layer_of(model.state_dict()))
    network = Learned(16, 24, masked=False).double().eval()
    network.load_state_dict({key.removeprefix("x."): value for key, value in state.items()}, strict=True)
    x = seeded(2, 16, 5, 5)
    assert torch.equal(network(x), model(x))
    assert notes == ("CondenseNet: learned group masks multiplied into 'x'",)


def converted(model: Learned, groups: int) -> CondensedConv2d:
    """What the public converter makes of ``model``, from its description."""
    c_out, c_in = model.conv.weight.shape[:2]
    result = CondensedConv2d(c_in, c_out, 1, groups=groups).double().eval()
    kept = [model._mask[group, :, 0, 0].nonzero().flatten() for group in range(groups)]
    result.index.copy_(torch.cat(kept))
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(result.norm, name).copy_(getattr(model.norm, name)[result.index])
        result.conv.weight.copy_(torch.cat([model.conv.weight[g::groups, kept[g]] for g in range(groups)]))
    return result


def test_a_converted_learned_group_convolution_is_built_from_its_own_class():
    model = learned(16, 24, 4)
    condensed = converted(model, 4)
    x = seeded(2, 16, 5, 5)
    torch.testing.assert_close(condensed(x), model(x), rtol=0, atol=1e-12)
    state, notes = translate(layer_of(condensed.state_dict()))
    assert state.keys() == layer_of(condensed.state_dict()).keys()
    CondensedConv2d(16, 24, 1, groups=4).load_state_dict({k.removeprefix("x."): v for k, v in state.items()})
    assert "foldgroup.nn.condense" in notes[0] and "'x'" in notes[0]
    traced = trace(condensed.float(), (2, 16, 5, 5))
    torch.testing.assert_close(traced(x.float()), condensed(x.float()))


def test_a_converted_classifier():
    linear = CondensedLinear(3, 5)
    linear.index.copy_(torch.tensor([4, 0, 4]))
    x = torch.randn(2, 6)
    expected = functional.linear(x[:, [4, 0, 4]], linear.linear.weight, linear.linear.bias)
    assert torch.equal(linear(x), expected)
    assert torch.equal(trace(linear, (2, 6))(x), expected)
    assert set(translate(layer_of(linear.state_dict()))[0]) == {"x.index", "x.linear.weight", "x.linear.bias"}


def sfr(c_in: int, c_out: int, groups: int) -> tuple[Learned, dict[str, Tensor]]:
    """A layer that selects outputs, and the state dict of its converted form, from the converter's description."""
    model = learned(c_in, c_out, groups, outputs=True)
    width, rows = c_in // groups, c_out // groups
    weight, index = torch.zeros(c_out, width, 1, 1).double(), torch.zeros(c_out, c_out)
    for group in range(groups):
        outs = model._mask[:, group, 0, 0].nonzero().flatten()[:rows]
        place = group * rows + torch.arange(len(outs))
        weight[place] = model.conv.weight.detach()[outs][:, group::groups]
        index[place, outs] = 1
    norm = {f"norm.{key}": value for key, value in model.norm.state_dict().items()}
    return model, layer_of({**norm, "conv.weight": weight, "index": index})


def public_sfr(state: dict[str, Tensor], x: Tensor, groups: int) -> Tensor:
    """Norm, activation, inputs dealt out to the groups, grouped convolution, index matrix over the channels."""
    norm = {key.removeprefix("x.norm."): value for key, value in state.items() if "norm" in key}
    x = functional.batch_norm(x, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"])
    x = torch.relu(x).unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
    x = functional.conv2d(x, state["x.conv.weight"], groups=groups)
    return torch.einsum("nrhw,ro->nohw", x, state["x.index"].double())


def test_converted_output_selection_is_a_plain_kernel_again():
    model, state = sfr(16, 24, 4)
    x = seeded(2, 16, 5, 5)
    torch.testing.assert_close(public_sfr(state, x, 4), model(x), rtol=0, atol=1e-12)
    translated, notes = translate(state)
    network = Learned(16, 24, masked=False).double().eval()
    network.load_state_dict({key.removeprefix("x."): value for key, value in translated.items()}, strict=True)
    assert torch.equal(network.conv.weight, (model.conv.weight * model._mask).detach())
    torch.testing.assert_close(network(x), model(x), rtol=0, atol=1e-12)
    assert "'x'" in notes[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["x.index"].fill_(0.5), "neither 0 nor 1"),
        (lambda s: s["x.index"][:2, 0].fill_(1), "adds rows of one group"),
        (lambda s: s.pop("x.norm.weight"), "batch norm is missing"),
        (lambda s: s.update({"x.index": torch.ones(3, 3)}), "[3, 3]"),
    ],
)
def test_what_no_converter_made_is_refused(spoil, message):
    _, state = sfr(16, 24, 4)
    spoil(state)
    assert message in refusal(state)


def test_masks_of_condensenet_are_checked():
    state = layer_of(learned(8, 8, 2).state_dict())
    state["x._mask"][0] = -1
    assert "_mask" in refusal(state)
    assert "negative" in refusal(layer_of({"index": torch.tensor([0, -1]), "conv.weight": seeded(2, 2, 1, 1)}))


# DGConv


def public_dgconv(c_in: int, c_out: int, seed: int = 0, group_mask: int = 1) -> dict[str, Tensor]:
    digits = math.ceil(math.log2(min(c_in, c_out) if max(c_in, c_out) // min(c_in, c_out) >= 2 else max(c_in, c_out)))
    state = {
        "gate": seeded(digits, seed=seed).float(),
        "D": EYE.clone(),
        "I": ONES.clone(),
        "conv.weight": seeded(c_out, c_in, 3, 3, seed=seed),
    }
    if group_mask > 1:
        state["group_mask"] = torch.kron(torch.ones(c_out // group_mask, c_in // group_mask), torch.eye(group_mask))
    if c_out // c_in >= 2:
        state["_I"] = torch.kron(torch.eye(c_in), torch.ones(math.ceil(c_out / c_in), 1))
    elif c_in // c_out >= 2:
        state["_I"] = torch.kron(torch.eye(c_out), torch.ones(1, math.ceil(c_in / c_out)))
    return layer_of(state)


def public_mask(state: dict[str, Tensor], sort: bool) -> Tensor:
    """U by matrix products and cropping, as the public layers make it."""
    bits = (state["x.gate"] > 0).long()
    if sort:
        bits = bits.sort().values
    u = torch.ones(1, 1)
    for bit in bits:
        u = torch.kron(u, ONES if bit else EYE)
    c_out, c_in = state["x.conv.weight"].shape[:2]
    if c_out // c_in >= 2:
        u = state["x._I"] @ u[:c_in]
    elif c_in // c_out >= 2:
        u = u[:c_out, :c_out] @ state["x._I"]
    return u[:c_out, :c_in] * state.get("x.group_mask", torch.ones(c_out, c_in))


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 999), st.booleans())
@quick(60)
def test_dgconv_of_any_channel_counts_is_cropped_as_the_layer_crops(c_in, c_out, seed, sort):
    state = public_dgconv(c_in, c_out, seed)
    conv = plain(state, (c_in, c_out), gate_order="sorted" if sort else "stored")
    expected = state["x.conv.weight"] * public_mask(state, sort)[:, :, None, None]
    assert torch.equal(conv.weight, expected)


def test_a_network_of_gates_that_crops_is_sent_to_a_network_of_the_users():
    with pytest.raises(CheckpointError, match=r"'x'.*--model"):
        dialects.translate(public_dgconv(12, 12))


def test_dgconv_with_a_group_mask():
    state = public_dgconv(12, 12, group_mask=3)
    expected = state["x.conv.weight"] * public_mask(state, False)[:, :, None, None]
    assert torch.equal(plain(state, (12, 12)).weight, expected)
    state["x.group_mask"][0, 0] = 0.5
    assert "group_mask" in refusal(state)
    state["x.group_mask"] = torch.ones(4, 4)
    assert "[4, 4]" in refusal(state)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update({"x.gate": torch.ones(3)}), "3 gates"),
        (lambda s: s["x.gate"].zero_(), "exactly 0"),
        (lambda s: s["x.D"].zero_(), "buffers are intact"),
        (lambda s: s.update({"x.gate": torch.ones(4, dtype=torch.int64)}), "int64"),
        (lambda s: s.update({"x._I": torch.ones(2, 2)}), "'_I'"),
        (lambda s: s.update({"x.conv.weight": seeded(12, 12)}), "[12, 12]"),
    ],
)
def test_a_dgconv_that_says_no_mask_is_refused(spoil, message):
    state = public_dgconv(12, 12)
    spoil(state)
    assert message in refusal(state)


def test_zero_gates_mean_what_the_user_says():
    state = public_dgconv(12, 12)
    state["x.gate"].zero_()
    assert torch.equal(plain(state, (12, 12), zero_gates="ones").weight, state["x.conv.weight"])
    diagonal = torch.eye(12)[:, :, None, None]
    assert torch.equal(plain(state, (12, 12), zero_gates="identity").weight, state["x.conv.weight"] * diagonal)


# Dynamic


def test_gates_computed_from_the_input_are_refused():
    state = {"a.x.headconv_0.fc1.weight": seeded(2, 2), "a.x._inactive_channels": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"'a.x' is a dynamic group convolution.*from each image"):
        translate(state)


# All


def test_other_keys_stay_as_they_are():
    state = {"a.weight": seeded(2, 2), "b.index": torch.tensor(3), "gate": seeded(3), "c.gate": seeded(2)}
    assert translate(state) == (state, ())


def test_layers_of_several_formats_in_one_file():
    prefixed = {"a.": flgc(4, 4, 2), "b.": layer_of(learned(8, 8, 2).state_dict()), "c.": public_dgconv(6, 6)}
    state = {prefix + key: value for prefix, part in prefixed.items() for key, value in part.items()}
    translated, notes = translate(state)
    assert {"a.x.weight", "a.x.bias", "b.x.conv.weight", "c.x.weight"} == {k for k in translated if "norm" not in k}
    assert [note.split(":")[0] for note in notes] == ["CondenseNet", "FLGC", "DGConv"]


def test_a_pruned_layer_may_be_of_another_format_too():
    state = flgc(6, 6, 2)
    weight = state.pop("x.conv.weight")
    mask = (seeded(6, 6, 3, 3, seed=9) > 0).double()
    both, notes = translate(state | {"x.conv.weight_orig": weight, "x.conv.weight_mask": mask})
    once, _ = translate(state | {"x.conv.weight": weight * mask})
    assert torch.equal(both["x.weight"], once["x.weight"]) and len(notes) == 2


@pytest.mark.parametrize("kind", ["flgc", "dgconv", "pruned"])
def test_from_a_checkpoint_to_the_groups_of_its_network(kind):
    """Keys → plain kernel → groups, which the plain network then runs."""
    c_in, c_out = (96, 96)
    if kind == "pruned":
        mask = torch.kron(torch.eye(4), torch.ones(24, 24))[torch.randperm(96)][:, torch.randperm(96)]
        state = {"x.weight_orig": seeded(96, 96, 3, 3), "x.weight_mask": mask[:, :, None, None].expand(96, 96, 3, 3)}
    else:
        state = flgc(c_in, c_out, 4) if kind == "flgc" else public_dgconv(c_in, c_out)
    network = nn.Sequential(plain(state, (c_in, c_out)).float()).eval()
    graph = trace(network, (1, c_in, 14, 14))
    found = FindGroups().run(graph)
    assert len(found.rewrites) == 1
    x = seeded(1, c_in, 14, 14)
    after, before = (evaluate(g, x)["output"] for g in (found.graph, graph))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


def test_readers_have_names_of_their_own():
    assert len({reader.name for reader in readers()}) == len(readers())
