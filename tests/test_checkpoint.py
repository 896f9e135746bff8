"""Reading checkpoints: every layout gives the layer its authors computed, anything else is refused with a reason."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import tempfile
import zipfile
from functools import cache, reduce
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import nn

from foldgroup.checkpoint import Preprocessing, load_checkpoint, save_checkpoint
from foldgroup.dialects import translate
from foldgroup.errors import CheckpointError
from foldgroup.nn import BottleneckConfig, DGConv2d, GroupableResNet, StageConfig, g_resnext17_cifar

SMALL = BottleneckConfig("cifar", (StageConfig(1, 8, 16), StageConfig(2, 16, 32)), stem_channels=8, num_classes=5)
LAYER = "layer1.0.conv2"
EYE, ONES = torch.eye(2), torch.ones(2, 2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors are fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(config: BottleneckConfig = SMALL, seed: int = 0) -> GroupableResNet:
    """A network whose every tensor is random, as after training."""
    torch.manual_seed(seed)
    model = GroupableResNet(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
            if isinstance(module, DGConv2d):
                module.gate.normal_()
    return model


@cache
def _state(config: BottleneckConfig, seed: int) -> dict[str, torch.Tensor]:
    return network(config, seed).state_dict()


def own_state(config: BottleneckConfig = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in _state(config, seed).items()}


def public_state(state: dict[str, torch.Tensor], d=EYE, i=ONES) -> dict[str, torch.Tensor]:
    """The same tensors under the keys of d-li14/dgconv.pytorch, gates untouched."""
    layers = {key.removesuffix(".gate") for key in state if key.endswith(".gate")}
    result = {}
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        result[f"{layer}.conv.weight" if layer in layers else key] = tensor.clone()
    for layer in layers:
        result |= {f"{layer}.D": d.clone(), f"{layer}.I": i.clone()}
    return result


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


def save(path: Path, document) -> Path:
    torch.save(document, path)
    return path


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


# What is refused: the message names the file, the key or layer, and what to do


def refusal(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "weights_only" not in message and "safe_globals" not in message
    assert len(message) < 800
    return message


def spoil(key, value):
    """Replace one tensor: by a value, or by a function of it."""
    return lambda state: state.update({key: value(state[key]) if callable(value) else value})


def with_nan(tensor):
    tensor.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return tensor


def whole_layer(**parts):
    return lambda state: state.update({f"{LAYER}.{part.replace('__', '.')}": value for part, value in parts.items()})


BAD_STATES = {
    "missing": (lambda s: s.pop("bn1.bias"), ["1 missing ('bn1.bias')", "--arch"]),
    "extra": (lambda s: s.update({"head.weight": torch.ones(1)}), ["1 too many ('head.weight')", "--arch"]),
    "shape": (spoil("layer2.0.conv1.weight", torch.ones(16, 17, 1, 1)), ["'layer2.0.conv1.weight'", "[16, 17, 1, 1]"]),
    "5x5": (spoil(f"{LAYER}.conv.weight", torch.ones(8, 8, 5, 5)), [f"'{LAYER}.weight'", "[8, 8, 5, 5]", "--arch"]),
    "no-downsample": (lambda s: s.pop("layer2.0.downsample.0.weight"), ["'layer2.0.downsample.0.weight'"]),
    "family": (lambda s: s.pop("layer1.0.conv3.weight"), ["no key 'layer1.0.conv3.weight'", "bottleneck"]),
    "stem": (spoil("conv1.weight", torch.ones(8, 3, 5, 5)), ["'conv1.weight'", "5×5", "7×7 or 3×3"]),
    "stages": (lambda s: s.update({"layer4.0.x": torch.ones(1)}), ["1, 2, 4", "without a gap"]),
    "blocks": (lambda s: s.update({"layer1.9.x": torch.ones(1)}), ["layer1", "numbered 9"]),
    "four": (
        lambda s: s.update({"layer2.0.conv3.weight": torch.ones(30, 16, 1, 1)}),
        ["30 output channels", "multiple of four"],
    ),
    "nan": (spoil("fc.weight", with_nan), ["'fc.weight' has 3 values", "before training diverged"]),
    "nan-gate": (spoil(f"{LAYER}.gate", with_nan), [f"'{LAYER}.gate' has 3 values"]),
    "variance": (spoil("bn1.running_var", -torch.ones(8)), ["'bn1.running_var'", "negative", "copy"]),
    "zero-gate": (
        spoil(f"{LAYER}.gate", torch.tensor([1e-8, -1e-8, 1.0]).half()),
        [f"'{LAYER}'", "2 of its 3 gates", "fp16", "--zero-gates identity", "--zero-gates ones"],
    ),
    "gate-count": (spoil(f"{LAYER}.gate", torch.ones(4)), [f"'{LAYER}'", "4 gates", "8 input", "need 3"]),
    "gate-shape": (spoil(f"{LAYER}.gate", torch.ones(3, 1)), [f"'{LAYER}'", "[3, 1]", "save"]),
    "gate-dtype": (spoil(f"{LAYER}.gate", torch.ones(3, dtype=torch.uint8)), [f"'{LAYER}'", "uint8", "save"]),
    "kernel-1d": (spoil(f"{LAYER}.conv.weight", torch.ones(8, 8, 3)), [f"'{LAYER}'", "[8, 8, 3]", "2-D"]),
    "cropped": (
        whole_layer(conv__weight=torch.ones(12, 12, 3, 3), gate=torch.ones(4)),
        [f"'{LAYER}'", "12 input", "unequal groups", "train with"],
    ),
    "no-D": (lambda s: s.pop(f"{LAYER}.D"), [f"'{LAYER}.D'", "save the buffers"]),
    "D-shape": (spoil(f"{LAYER}.D", torch.eye(3)), [f"'{LAYER}'", "[3, 3]"]),
    "D-value": (spoil(f"{LAYER}.D", torch.zeros(2, 2)), [f"'{LAYER}'", "0.0", "buffers are intact"]),
    "_I": (whole_layer(_I=torch.zeros(8, 8)), [f"'{LAYER}'", "'_I'"]),
    "partial": (whole_layer(one=ONES, c_div=torch.tensor(4)), [f"'{LAYER}'", "'one', 'c_div'", "PartialNet", "DGConv"]),
    "no-gates": (
        lambda s: [s.pop(key) for key in list(s) if key.endswith("gate")],
        ["'.gate'", "DGConv", "ResNeXt needs no folding"],
    ),
    "own-too": (whole_layer(weight=torch.ones(8, 8, 3, 3)), [f"'{LAYER}'", "both", "rename"]),
    "neither": (lambda s: s.pop(f"{LAYER}.conv.weight"), [f"'{LAYER}'", "neither", "rename"]),
    "mixed": (
        lambda s: s.update({f"{LAYER}.weight": s.pop(f"{LAYER}.conv.weight")}),
        [f"'{LAYER}' is in foldgroup's", "rename"],
    ),
    "not-float": (spoil("fc.weight", torch.ones(5, 32, dtype=torch.int32)), ["'fc.weight'", "int32", "save"]),
    "complex": (spoil("fc.weight", torch.ones(5, 32, dtype=torch.complex64)), ["'fc.weight'", "complex64", "save"]),
    "float8": (spoil("fc.bias", torch.ones(5).to(torch.float8_e4m3fn)), ["'fc.bias'", "float8", "save"]),
    "sparse": (spoil("fc.weight", torch.eye(32)[:5].to_sparse()), ["'fc.weight'", "sparse", "dense tensors"]),
    "quantized": (
        spoil("fc.bias", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        ["'fc.bias'", "quantized", "dense tensors"],
    ),
    "meta": (spoil("fc.weight", torch.ones(5, 32, device="meta")), ["'fc.weight'", "meta", "dense tensors"]),
    "junk": (lambda s: s.update({"fc.bias": "hello"}), ["'fc.bias' holds a str", "torch.save(model.state_dict()"]),
    "key": (lambda s: s.update({7: torch.ones(1)}), ["key 7", "torch.save(model.state_dict()"]),
    "empty": (spoil("fc.weight", torch.ones(0, 10**15)), ["'fc.weight'", "no elements"]),
    "expanded": (spoil("fc.weight", torch.ones(1, 1).expand(10**7, 10**7)), ["claim", "save clones"]),
    "twice": (lambda s: s.update({"module.fc.bias": s["fc.bias"]}), ["'fc.bias'", "both with and without"]),
    "hostile-name": (lambda s: s.update({"a\n" * 9999: torch.ones(1)}), [r"a\na\n", "no name", "torch.save("]),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", BAD_STATES)
def test_a_bad_tensor_is_refused(tmp_path, name):
    edit, fragments = BAD_STATES[name]
    state: dict = public_state(own_state())
    edit(state)
    message = refusal(save(tmp_path / "c.pt", state))
    for fragment in fragments:
        assert fragment in message


def good(**entries):
    """A document in our own format, without its weights, and with some entries changed."""
    preprocessing = {"resize": 32, "size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    document = {"foldgroup": 1, "preprocessing": preprocessing, "classes": list("abcde"), "state_dict": None}
    return document | entries


BAD_DOCUMENTS = {
    "newer": (good(foldgroup=2), ["format 2", "update foldgroup"]),
    "version": (good(foldgroup="one"), ["'one'", "damaged"]),
    "stateless": (good(state_dict="none"), ["'state_dict'", "again"]),
    "classes": (good(classes=["a"]), ["'classes'", "5 names"]),
    "class-type": (good(classes=[1, 2, 3, 4, 5]), ["'classes'", "5 names"]),
    "no-preprocessing": (good(preprocessing=None), ["'preprocessing'", "again"]),
    "size": (good(preprocessing={"resize": 8, "size": 0, "mean": (0,), "std": (1,)}), ["'preprocessing'", "image"]),
    "std": (good(preprocessing={"resize": 8, "size": 8, "mean": (0,), "std": (0,)}), ["'std'", "again"]),
    "no-weights": ({"epoch": 3, "optimizer": {}}, ["'epoch', 'optimizer'", "save model.state_dict()"]),
    "empty-dict": ({}, ["an empty dict", "save model.state_dict()"]),
    "list": ([torch.ones(2)], ["holds a list", "save model.state_dict()"]),
    "tensor": (torch.ones(2), ["holds a Tensor", "save model.state_dict()"]),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_a_bad_document_is_refused(tmp_path, name):
    document, fragments = BAD_DOCUMENTS[name]
    if isinstance(document, dict) and document.get("state_dict", 0) is None:
        document = document | {"state_dict": own_state()}
    message = refusal(save(tmp_path / "c.pt", document))
    for fragment in fragments:
        assert fragment in message


def written(write) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def zipped(*names: str, compression=zipfile.ZIP_STORED) -> bytes:
    def write(stream):
        with zipfile.ZipFile(stream, "w", compression) as archive:
            for name in names:
                archive.writestr(name, b"\0" * 100_000)

    return written(write)


def tarred(stream):
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("c.pt"))


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


STATE = {"fc.weight": torch.ones(100, 100)}
BAD_FILES = {
    "empty.pt": (b"", ["empty", "again"]),
    "text.pt": (b"hello, this is no checkpoint", ["no checkpoint", "torch.save"]),
    "image.pt": (b"\x89PNG\r\n\x1a\n" + bytes(99), ["PNG image", "torch.save"]),
    "model.onnx": (b"\x08\x08\x12\x07pytorch", ["ONNX", "torch.save"]),
    "script.pt": (zipped("c/data.pkl", "c/constants.pkl", "c/code/x.py"), ["TorchScript", "torch.save("]),
    "other.zip": (zipped("notes.txt"), ["zip archive", "torch.save"]),
    "bomb.pt": (zipped("c/data.pkl", compression=zipfile.ZIP_DEFLATED), ["unpacks to more", "torch.save("]),
    "real.pth.tar": (written(tarred), ["tar archive", "unpack"]),
    "short.pt": (half(written(lambda stream: torch.save(STATE, stream))), ["truncated", "again"]),
    "short.pth": (
        half(written(lambda stream: torch.save(STATE, stream, _use_new_zipfile_serialization=False))),
        ["truncated", "again"],
    ),
    "short.safetensors": (half(safetensors.torch.save(STATE)), ["safetensors", "truncated", "again"]),
    "tiny.safetensors": (b"ab", ["safetensors", "truncated", "again"]),
    "noise.pt": (b"\x80\x02" + bytes(range(256)), ["damaged", "again"]),
    "plain.pkl": (pickle.dumps({"a": 1}), ["damaged", "torch.save("]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name):
    content, fragments = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    for fragment in fragments:
        assert fragment in message


def test_what_is_not_a_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pt")
    assert "folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    assert "not a regular file" in refusal(tmp_path / "pipe.pt")


class Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_a_foreign_global_is_named_and_never_called(tmp_path, zip_format):
    target = tmp_path / "made by the pickle"
    document = {"state_dict": own_state(), "extra": Harmful(target)}
    torch.save(document, tmp_path / "c.pt", _use_new_zipfile_serialization=zip_format)
    message = refusal(tmp_path / "c.pt")
    assert f"{os.name}.mkdir" in message
    assert "torch.save(model.state_dict()" in message
    assert not target.exists()


def test_a_pickled_network_is_refused(tmp_path):
    assert "foldgroup.nn.resnext.GroupableResNet" in refusal(save(tmp_path / "c.pt", network()))


def test_options_that_do_not_fit_are_refused(tmp_path):
    own, public = save(tmp_path / "own.pt", own_state()), save(tmp_path / "public.pt", public_state(own_state()))
    assert "leave --gate-order out" in refusal(own, gate_order="sorted")
    assert "--gate-order takes" in refusal(public, gate_order="sort")
    assert "--zero-gates" in refusal(public, zero_gates="one")
    unknown = refusal(own, arch="resnet50")
    assert "'resnet50'" in unknown
    assert "g_resnext17_cifar, g_resnext29_cifar, g_resnext50" in unknown
    assert "not those of g_resnext17_cifar" in refusal(own, arch="g_resnext17_cifar")
