"""A checkpoint file → tensors and plain values, without ever running code from it. Knows files; knows no network.

Pickles are only opened with ``weights_only=True``, which builds tensors and plain containers and nothing else; there is
no fallback. What a file is, is read from its content, because ``.pth.tar`` is rarely a tar and ``.pt`` can be anything.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import Tensor, nn

from foldgroup.errors import CheckpointError

_SAVE_AGAIN = "where it was made, save the tensors alone: torch.save(model.state_dict(), …)"
_COPY_AGAIN = "copy or download it again"
_FOREIGN_CONTENT = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LoadedFile:
    """What a file holds, the SHA-256 of its bytes, and how many they are."""

    document: object
    sha256: str
    size: int


def load_file(path: Path) -> LoadedFile:
    """Read a ``torch.save`` file (zip or legacy) or a safetensors file.

    Hash and content come from one file, so they agree even if another process replaces it meanwhile.

    Raises:
        CheckpointError: if it is neither, cannot be read, or needs code to load; its caller adds the file's name.
    """
    try:
        with path.open("rb") as stream, path.open("rb") as again, ThreadPoolExecutor(1) as beside:
            status = os.fstat(stream.fileno())
            if not os.path.samestat(status, os.fstat(again.fileno())):
                raise CheckpointError("this file was replaced while it was read: try again")
            digest = beside.submit(_sha256, again)
            document = _read(stream, status.st_size, path.suffix.lower())
            sha256 = digest.result()
    except OSError as error:
        raise CheckpointError(f"this file cannot be read ({error.strerror}): check its permissions") from error
    return LoadedFile(document, sha256, status.st_size)


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def check_tensors(state: Mapping[object, object], size: int) -> dict[str, Tensor]:
    """Require that ``state`` maps names to plain, finite, dense CPU tensors that fit in a file of ``size`` bytes.

    The last rule keeps expanded or overlapping tensors, which cost a file nothing, from filling the memory later.

    Raises:
        CheckpointError: naming the first key that is something else.
    """
    tensors = {}
    for key, value in state.items():
        if not isinstance(key, str) or len(key) > 200:
            raise CheckpointError(f"the key {shown([key])} of its state dict is no name: {_SAVE_AGAIN}")
        if type(value) not in (Tensor, nn.Parameter):
            raise CheckpointError(f"key {shown([key])} holds a {type(value).__name__}, not a tensor: {_SAVE_AGAIN}")
        assert isinstance(value, Tensor)
        if value.is_quantized or value.is_nested or value.layout is not torch.strided or value.device.type != "cpu":
            raise CheckpointError(
                f"key {shown([key])} is a quantized, sparse, nested or meta tensor: save the weights as dense tensors"
            )
        if value.is_complex() or (value.is_floating_point() and value.dtype not in _DTYPES):
            raise CheckpointError(
                f"key {shown([key])} is {value.dtype}: save the weights as float32 (or float16, bfloat16, float64)"
            )
        if value.dim() > 1 and value.numel() == 0:
            raise CheckpointError(f"key {shown([key])} has shape {list(value.shape)}, no elements: {_SAVE_AGAIN}")
        tensors[key] = value.detach()
    claimed = sum(tensor.nbytes for tensor in tensors.values())
    if claimed > size:
        raise CheckpointError(
            f"its tensors claim {claimed} bytes in a file of {size}, so some of them overlap: save clones of them"
        )
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):  # a sum is finite only if its terms are
            continue
        if bad := int(tensor.numel() - torch.isfinite(tensor).sum()):
            raise CheckpointError(
                f"key {shown([key])} has {bad} values that are NaN or infinite: "
                "use a checkpoint from before training diverged"
            )
    return tensors


def shown(keys: Iterable[object], limit: int = 3) -> str:
    """The first ``limit`` keys, quoted and shortened, and how many more there are: for messages."""
    names = [repr(key) if len(repr(key)) <= 80 else repr(key)[:77] + "…'" for key in keys]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read(stream: IO[bytes], size: int, suffix: str) -> object:
    head = stream.read(512)
    stream.seek(0)
    if not head:
        raise CheckpointError("this file is empty: " + _COPY_AGAIN)
    if head.startswith(b"PK\x03\x04"):
        _check_zip(stream, size)
        return _load_torch(stream)
    if head.startswith(b"\x80"):  # a pickle of protocol 2 or later, as torch.save wrote before version 1.6
        return _load_torch(stream)
    if suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8):
        return _load_safetensors(stream)
    what = next((what for magic, what in _FOREIGN_CONTENT.items() if head.startswith(magic)), "")
    if head[257:262] == b"ustar":
        what = "a tar archive"
    elif suffix == ".onnx":
        what = "an ONNX model"
    what = f" but {what}" if what else ""
    raise CheckpointError(
        f"this is no checkpoint{what}: give a file that torch.save or safetensors wrote; unpack archives first"
    )


def _check_zip(stream: IO[bytes], size: int) -> None:
    """Refuse zips that torch.save did not write, and those that would unpack to more than the file's size."""
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise CheckpointError(f"this file is truncated or damaged: {_COPY_AGAIN}") from error
    names = [entry.filename.partition("/")[2] for entry in entries]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(f"this is a TorchScript archive, which is code: {_SAVE_AGAIN}")
    if "data.pkl" not in names:
        raise CheckpointError(
            "this is a zip archive but no checkpoint: give a file that torch.save or safetensors wrote"
        )
    if sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(f"this zip unpacks to more than its size, unlike what torch.save writes: {_SAVE_AGAIN}")
    _check_records(stream)
    stream.seek(0)


def _check_records(stream: IO[bytes]) -> None:
    """Compare every record with its checksum, which torch does not do; torch.save can be told to leave them out (0)."""
    try:
        with zipfile.ZipFile(stream) as archive:
            for entry in (entry for entry in archive.infolist() if entry.CRC):
                with archive.open(entry) as record:
                    while record.read(1 << 24):
                        pass
    except Exception as error:
        raise CheckpointError(f"this file is damaged ({error}): {_COPY_AGAIN}") from error


def _load_torch(stream: IO[bytes]) -> object:
    try:
        with warnings.catch_warnings():  # torch warns of what is refused anyway
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = re.search(r"\bGLOBAL ([\w.<>]{1,100})", str(error))
        if foreign:
            raise CheckpointError(
                f"its pickle asks for {foreign[1]}, and foldgroup loads no code from a checkpoint: {_SAVE_AGAIN}"
            ) from error
        raise CheckpointError(
            "this file is truncated or damaged, or holds more than tensors and plain values: "
            f"{_COPY_AGAIN}, or {_SAVE_AGAIN}"
        ) from error


def _load_safetensors(stream: IO[bytes]) -> object:
    try:
        return safetensors.torch.load(stream.read())
    except Exception as error:
        raise CheckpointError(f"this safetensors file is truncated or damaged: {_COPY_AGAIN}") from error
