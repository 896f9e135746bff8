"""What is refused as a checkpoint: the message names the file, the key or layer, and what to do."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints import LAYER, ONES, network, own_state, public_state, save

from foldgroup.checkpoint import load_checkpoint
from foldgroup.errors import CheckpointError


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
    "colours": (good(preprocessing={"resize": 8, "size": 8, "mean": (0,), "std": (1,)}), ["three colours", "again"]),
    "classes": (good(classes=["a"]), ["'classes'", "5 names"]),
    "unwritable-class": (good(classes=["a", "b", "c", "d", "\ud800"]), ["'classes'", "5 names"]),
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


def test_a_record_that_is_not_what_was_saved_is_refused(tmp_path):
    """torch.load would take it, and everything after that would be proven about another network."""
    path = save(tmp_path / "c.pt", own_state())
    content, place = bytearray(path.read_bytes()), zipfile.ZipFile(path)
    record = max(place.infolist(), key=lambda entry: entry.file_size)
    at = content.index(place.read(record))
    content[at + 5] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(path) and "copy or download it again" in refusal(path)


def test_a_file_that_was_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "c.pt", public_state(own_state()))
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(path)


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
