"""Graph → AOTInductor package (``.pt2``): the network as a shared library of native code, its weights inside.

PyTorch's ahead-of-time compiler writes C++ (for GPUs also Triton kernels) and has the machine's compiler build it. What
is chosen here:

* *freezing* on CPUs: weights are laid out as oneDNN wants them when the package is made, not at every call. Folded
  G-ResNeXt-50 takes 61 ms instead of 86;
* the number of threads is asked for at each call; else it would be that of the machine that built the package;
* no instructions but those of the vector extension that the package names (``isa``), which its runner compares with
  the processor's: ``-march=native`` would stop a near relative of this processor with an illegal instruction;
* the input's shape and precision stand in the package, because compiled code checks neither: it would read beyond an
  input that is too small;
* no paths of this machine: C++ sources, whose comments hold the compiler's command line, are left out, and paths in
  the library, where they name the source of an error, are blanked.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import operator
import os
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from foldgroup.emit.engine import Engine
from foldgroup.errors import EmitError
from foldgroup.trace import fork

METADATA = "foldgroup."
"""What the names of our entries in a package's metadata begin with: ``foldgroup.shape``, ``.batch``, ``.precision``."""

_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}

_SETTINGS = {
    "cpp.dynamic_threads": True,
    "cpp.march": "",
    "aot_inductor.precompile_headers": False,  # would stay behind in a folder shared by all of the user's compiles
    "aot_inductor.enable_line_tables": False,  # debug information, twice as large as the code
}


def build_package(
    graph: fx.GraphModule, input_shape: tuple[int, ...], *, batch: tuple[int, int, int] | None, device: str = "cpu"
) -> Engine:
    """Compile ``graph``, which takes and gives float32 whatever its own types, into a package for ``device``.

    ``input_shape`` is [N, C, H, W]; ``batch`` is the least, typical and greatest N, or None, which fixes it. ``device``
    is cpu or cuda; the package runs on this kind of processor, or this GPU, and its relatives (``facts``).

    Raises:
        EmitError: if there is no C++ compiler, no GPU for a CUDA package, or the compiler refuses the network.
    """
    if device not in ("cpu", "cuda"):
        raise EmitError(f"AOTInductor packages are for cpu or cuda, not for {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise EmitError("a CUDA package is built on an NVIDIA GPU with its driver: PyTorch finds none here")
    least, typical, greatest = batch or (input_shape[0],) * 3
    if not 1 <= least <= typical <= greatest:
        raise EmitError(f"batch sizes {least}, {typical}, {greatest} are not in order: give least, typical, greatest")
    metadata = {
        METADATA + "shape": " ".join(map(str, input_shape[1:])),
        METADATA + "batch": f"{least} {greatest}",
        METADATA + "precision": _precision(graph),
    }

    model = fork(graph)
    for node in model.graph.nodes:
        node.meta = {}
    if device == "cuda":
        model = copy.deepcopy(model).cuda()  # submodules are the caller's
    dynamic = least < greatest
    # A batch of one would be taken for a constant.
    example = torch.zeros(max(typical, 2) if dynamic else least, *input_shape[1:], device=device)
    axes = ({0: torch.export.Dim("batch", min=least, max=greatest)},) if dynamic else None
    settings = {**_SETTINGS, "freezing": device == "cpu", "aot_inductor.metadata": metadata}
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            _check_compiler()
            package = _compile(model, example, axes, settings, Path(folder))
        except EmitError:
            raise
        except Exception as error:
            raise EmitError(f"AOTInductor cannot compile the network: {error}") from error
        content = _without_paths(package, (folder, str(Path(torch.__file__).parents[1])))
    built = read_metadata(content)
    facts = {
        "device": device,
        "batch": list(batch) if dynamic and batch else None,
        "machine": built.get("AOTI_MACHINE", ""),
        "isa": built.get("AOTI_CPU_ISA", "").lower(),
    }
    if device == "cuda":
        facts["compute_capability"] = built.get("AOTI_COMPUTE_CAPABILITY", "")
    return Engine(content, "aotinductor", str(torch.__version__), facts)


def read_metadata(package: bytes | Path) -> dict[str, str]:
    """What a package says of itself, read without loading its code; our own entries begin with :data:`METADATA`.

    Raises:
        EmitError: if it is no AOTInductor package.
    """
    result: dict[str, str] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(package) if isinstance(package, bytes) else package) as archive:
            for name in archive.namelist():
                if "/aotinductor/" in name and name.endswith("_metadata.json"):
                    result.update(json.loads(archive.read(name)))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise EmitError(f"not an AOTInductor package: {error}") from error
    if not result:
        raise EmitError("not an AOTInductor package: it has no metadata")
    return result


def _compile(model: fx.GraphModule, example: torch.Tensor, axes: Any, settings: dict[str, Any], folder: Path) -> bytes:
    """The package as the compiler writes it; all its other files go to ``folder``."""
    from torch._inductor import aoti_compile_and_package, config
    from torch._inductor.utils import fresh_cache

    path = folder / "model.pt2"
    with torch.no_grad(), fresh_cache(dir=str(folder)):
        program = torch.export.export(model, (example,), dynamic_shapes=axes, strict=False)
        # Other versions of PyTorch may lack a setting; none of them changes what is computed.
        known = {name: value for name, value in settings.items() if _has(config, name)}
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=known)
    return path.read_bytes()


def _has(config: Any, name: str) -> bool:
    try:
        operator.attrgetter(name)(config)
    except AttributeError:
        return False
    return True


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise EmitError(
            f"AOTInductor needs a C++ compiler ({error}): install g++ or clang++, or name one in the environment "
            "variable CXX"
        ) from error


def _without_paths(package: bytes, folders: tuple[str, ...]) -> bytes:
    """The package with ``folders`` blanked wherever its library names them, and its C++ sources empty.

    Their names stay: PyTorch 2.10 finds the metadata by them.
    """
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(package)) as given, zipfile.ZipFile(result, "w") as written:
        for entry in given.infolist():
            content = b"" if entry.filename.endswith(".cpp") else given.read(entry)
            for folder in (os.fsencode(folder) for folder in folders):
                content = content.replace(folder, b"/" * len(folder))  # as long as before: nothing moves
            written.writestr(entry, content)
    return result.getvalue()


def _precision(graph: fx.GraphModule) -> str:
    """The type that holds most of the weights."""
    elements: Counter[torch.dtype] = Counter()
    for parameter in graph.parameters():
        elements[parameter.dtype] += parameter.numel()
    if not elements:
        return "no weights"
    kind = elements.most_common(1)[0][0]
    return _PRECISIONS.get(kind, str(kind))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps PyTorch from warning of GPUs it does not find; what stops it is raised."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch.utils.cpp_extension", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
