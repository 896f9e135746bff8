"""Reading checkpoints: every layout gives the layer its authors computed.

What is refused, and how, is in ``test_checkpoint_refusals.py``.
"""

from __future__ import annotations

import hashlib
import tempfile
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import EYE, LAYER, ONES, SMALL, network, own_state, public_state, save
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import nn

from foldgroup.checkpoint import Preprocessing, load_checkpoint, save_checkpoint
from foldgroup.dialects import translate
from foldgroup.errors import CheckpointError
from foldgroup.nn import BottleneckConfig, DGConv2d, StageConfig, g_resnext17_cifar

pytestmark = pytest.mark.usefixtures("one_thread")


def public_kernel(weight, gate, d=EYE, i=ONES, sort=False, group_mask=None):
    """What d-li14's layer convolves with, restated in numpy from its definition; C_out = r·C_in repeats rows of U."""
    bits = (np.sign(gate.numpy()) + 1) / 2
    if sort:
        bits = np.concatenate([bits[bits == 0], bits[bits == 1]])
    u = reduce(np.kron, [(1 - bit) * d.numpy() + bit * i.numpy() for bit in bits], np.ones((1, 1)))
    c_out, c_in = weight.shape[:2]
    u = u.repeat(max(1, c_out // c_in), axis=0).repeat(max(1, c_in // c_out), axis=1)
    if group_mask is not None:
        u = u * group_mask.numpy()
    return weight.numpy() * u.reshape(c_out, c_in, 1, 1).astype(weight.numpy().dtype)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    x = torch.randn(2, SMALL.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(x.to(next(model.parameters()).dtype))


# What is read


def test_our_own_format_round_trips(tmp_path):
    model = network()
    preprocessing = Preprocessing(40, 36, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    path = tmp_path / "c.pt"
    save_checkpoint(path, model, "x", preprocessing, list("abcde"), training={"epochs": 3})
    checkpoint = load_checkpoint(path)
    assert checkpoint.path == path
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (checkpoint.dialect, checkpoint.arch) == ("foldgroup", "bottleneck-1-2")
    assert checkpoint.preprocessing == preprocessing
    assert checkpoint.classes == tuple("abcde")
    assert checkpoint.notes == ()
    assert checkpoint.model.config == SMALL
    assert torch.equal(logits(checkpoint.model), logits(model))


def test_the_model_is_ready_to_use(tmp_path):
    state = own_state()
    state["conv1.weight"] = state["conv1.weight"].to(memory_format=torch.channels_last)
    joint = torch.randn(2, 8)
    state["bn1.weight"], state["bn1.bias"] = joint[0], joint[1]  # two views of one storage
    before = torch.get_rng_state()
    model = load_checkpoint(save(tmp_path / "c.pt", state)).model
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    tensors = [*model.parameters(), *model.buffers()]
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert all(t.device.type == "cpu" for t in tensors)
    assert all(t.stride() == torch.empty(t.shape).stride() for t in tensors)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    assert torch.equal(model.bn1.bias, joint[1])


WRAPPERS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "model": "g_resnext50", "state_dict": s, "best_prec1": torch.tensor(7.0)},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "loss": 0.5},
    "model": lambda s: {"model": s, "epoch": 1},
    "module.": lambda s: {"state_dict": {f"module.{key}": tensor for key, tensor in s.items()}},
    "_orig_mod.": lambda s: {f"module._orig_mod.{key}": tensor for key, tensor in s.items()},
    "parameters": lambda s: {key: nn.Parameter(t) if t.is_floating_point() else t for key, t in s.items()},
    "old": lambda s: {key: tensor for key, tensor in s.items() if not key.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("public", [False, True], ids=["foldgroup", "d-li14"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_gives_the_same_network(tmp_path, wrapper, public):
    state = public_state(own_state()) if public else own_state()
    checkpoint = load_checkpoint(save(tmp_path / "c.pth.tar", WRAPPERS[wrapper](state)))
    assert checkpoint.dialect == ("d-li14" if public else "foldgroup")
    assert torch.equal(logits(checkpoint.model), logits(network()))
    assert checkpoint.classes == ()
    assert checkpoint.preprocessing == Preprocessing.standard(32)
    ignored = [note for note in checkpoint.notes if "ignored" in note]
    assert len(ignored) == (wrapper in ("state_dict", "model_state_dict", "model"))


@pytest.mark.parametrize("public", [False, True], ids=["foldgroup", "d-li14"])
@pytest.mark.parametrize("name", ["c.safetensors", "c.bin", "legacy.pt"])
def test_every_file_format(tmp_path, name, public):
    state = public_state(own_state()) if public else own_state()
    path = tmp_path / name
    if name == "legacy.pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        safetensors.torch.save_file(state, path)
    assert torch.equal(logits(load_checkpoint(path).model), logits(network()))


def test_the_architecture_is_inferred(tmp_path):
    imagenet = BottleneckConfig("imagenet", (StageConfig(2, 4, 8),), stem_channels=8, in_channels=1, num_classes=3)
    checkpoint = load_checkpoint(save(tmp_path / "c.pt", own_state(imagenet)))
    assert checkpoint.model.config == imagenet
    assert checkpoint.arch == "bottleneck-2"
    assert checkpoint.preprocessing == Preprocessing.standard(224)
    named = g_resnext17_cifar(num_classes=7)
    assert load_checkpoint(save(tmp_path / "n.pt", named.state_dict())).arch == "g_resnext17_cifar"


def test_arch_overrides(tmp_path):
    model = g_resnext17_cifar(num_classes=7, in_channels=2)
    path = save(tmp_path / "c.pt", model.state_dict())
    assert load_checkpoint(path).arch == "bottleneck-1-2-2"
    named = load_checkpoint(path, arch="g_resnext17_cifar")
    assert named.arch == "g_resnext17_cifar"
    assert named.model.config == model.config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_widen_exactly(tmp_path, dtype):
    state = own_state()
    for key, tensor in state.items():
        if tensor.is_floating_point() and not key.endswith("fc.bias"):
            state[key] = tensor.to(dtype)
    checkpoint = load_checkpoint(save(tmp_path / "c.pt", state))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for key, tensor in checkpoint.model.state_dict().items():
        assert tensor.dtype == (torch.int64 if key.endswith("tracked") else expected)
        assert torch.equal(tensor, state[key].to(tensor.dtype))
    narrower = "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")
    assert any(narrower in note for note in checkpoint.notes)


# What gates mean


@quick(15)
@given(
    width=st.sampled_from([8, 16, 32, 64]),
    seed=st.integers(0, 99),
    inverted=st.booleans(),
    order=st.sampled_from(["stored", "sorted"]),
)
def test_a_public_layer_keeps_its_kernel_bit_for_bit(width, seed, inverted, order):
    d, i = (ONES, EYE) if inverted else (EYE, ONES)
    state = public_state(own_state(BottleneckConfig("cifar", (StageConfig(1, width, 16),), 4), seed), d, i)
    with tempfile.TemporaryDirectory() as folder:
        layer = load_checkpoint(save(Path(folder) / "c.pt", state), gate_order=order).model.get_submodule(LAYER)
    expected = public_kernel(state[f"{LAYER}.conv.weight"], state[f"{LAYER}.gate"], d, i, order == "sorted")
    assert np.array_equal(layer.masked_weight().detach().numpy(), expected)


@quick(60)
@given(data=st.data(), digits=st.integers(1, 5), ratio=st.integers(1, 3), down=st.booleans(), inverted=st.booleans())
def test_rectangles_and_constant_group_masks(data, digits, ratio, down, inverted):
    narrow, wide = 2**digits, ratio * 2**digits
    c_in, c_out = (wide, narrow) if down else (narrow, wide)
    d, i = (ONES, EYE) if inverted else (EYE, ONES)
    sort = data.draw(st.booleans())
    gate = torch.tensor(data.draw(st.lists(st.sampled_from([-1e-8, 0.5]), min_size=digits, max_size=digits)))
    weight = torch.randn(c_out, c_in, 1, 1)
    state = {"a.gate": gate, "a.conv.weight": weight, "a.conv.bias": torch.ones(c_out), "a.D": d, "a.I": i}
    if ratio > 1:
        eye = torch.eye(narrow)
        state["a._I"] = eye.repeat_interleave(ratio, dim=1 if down else 0)
    elif data.draw(st.booleans()):  # a fixed group count: channels congruent modulo it
        groups = 2 ** data.draw(st.integers(0, digits))
        state["a.group_mask"] = torch.eye(groups).repeat(c_out // groups, c_in // groups)
    translated = translate(state, "sorted" if sort else "stored").state
    assert translated.keys() == {"a.gate", "a.weight", "a.bias"}
    layer = DGConv2d(c_in, c_out, 1)
    layer.load_state_dict({key.removeprefix("a."): tensor for key, tensor in translated.items()})
    expected = public_kernel(weight, gate, d, i, sort, state.get("a.group_mask"))
    assert np.array_equal(layer.masked_weight().detach().numpy(), expected)


def test_a_group_mask_that_repeats_the_gates_changes_nothing_and_another_is_refused():
    gate = torch.tensor([1.0, -1.0, 1.0])
    state = {"a.gate": gate, "a.conv.weight": torch.ones(8, 8, 3, 3), "a.D": EYE, "a.I": ONES}
    mask = torch.tensor(public_kernel(torch.ones(8, 8, 1, 1), gate, sort=True))
    translation = translate(state | {"a.group_mask": mask}, "sorted")
    assert translation.state["a.gate"].tolist() == [-1, 1, 1]
    assert any("group_mask" in note for note in translation.notes)
    with pytest.raises(CheckpointError, match=r"'a'.*--gate-order sorted"):
        translate(state | {"a.group_mask": mask}, "stored")
    with pytest.raises(CheckpointError, match=r"'a'.*group_mask has shape \[4, 8, 1, 1\]"):
        translate(state | {"a.group_mask": mask[:4]})


@pytest.mark.parametrize("order", ["stored", "sorted"])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("meaning", ["identity", "ones"])
def test_zero_gates_of_a_public_layer_mean_what_the_user_says(tmp_path, meaning, inverted, order):
    d, i = (ONES, EYE) if inverted else (EYE, ONES)
    state = public_state(own_state(), d, i)
    gate = state[f"{LAYER}.gate"] = torch.tensor([0.0, 1.0, -0.0], dtype=torch.float16)
    checkpoint = load_checkpoint(save(tmp_path / "c.pt", state), zero_gates=meaning, gate_order=order)
    meant = 1.0 if (meaning == "ones") != inverted else -1.0
    expected = public_kernel(
        state[f"{LAYER}.conv.weight"], torch.where(gate == 0, meant, gate.float()), d, i, order == "sorted"
    )
    layer = checkpoint.model.get_submodule(LAYER)
    assert np.array_equal(layer.masked_weight().detach().numpy(), expected)
    assert bool((layer.gate != 0).all())
    assert f"2 gates of exactly 0 read as {meaning} (--zero-gates {meaning})" in checkpoint.notes


@pytest.mark.parametrize(("zero_gates", "bits"), [(None, (0, 1, 0)), ("identity", (0, 1, 0)), ("ones", (1, 1, 1))])
def test_zero_gates_of_our_own_layer_are_the_identity_unless_told(tmp_path, zero_gates, bits):
    state = own_state()
    state[f"{LAYER}.gate"] = torch.tensor([0.0, 1.0, -0.0], dtype=torch.float16)
    checkpoint = load_checkpoint(save(tmp_path / "c.pt", state), zero_gates=zero_gates)
    assert checkpoint.model.get_submodule(LAYER).bits == bits
    assert any(note.startswith("2 gates of exactly 0 read as") for note in checkpoint.notes)


@pytest.mark.parametrize(("d", "i", "meaning"), [(EYE, ONES, "identity"), (ONES, EYE, "ones")])
def test_binarised_gates_are_recognised(tmp_path, d, i, meaning):
    state = public_state(own_state(), d, i)
    state |= {key: (tensor > 0).float() for key, tensor in state.items() if key.endswith(".gate")}
    state[f"{LAYER}.gate"] = torch.tensor([0.0, 1.0, 0.0])
    with pytest.raises(CheckpointError, match=f"already binarised, and here bit 0 means {meaning}"):
        load_checkpoint(save(tmp_path / "c.pt", state))
