"""Get TensorRT's real Python bindings without TensorRT: their wheel, and an empty library for each that they link."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STUB = "\n".join(
    f"void *{name}(void) {{ return 0; }}"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getPluginRegistry",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "initLibNvInferPlugins",
    )
)
"""Every symbol that the bindings link. All objects they would make are null, so doubles stand in for them."""

LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")

NO_NETWORK = re.compile(r"dns|resolve host|connect|network|timed? ?out|unreachable|offline", re.IGNORECASE)


def installed_bindings(requirement: str, cache: Path) -> Path:
    """A folder from which ``tensorrt_bindings`` of ``requirement`` can be imported; made on the first call.

    Skips the test that asks where the bindings cannot be had: no wheel for the platform, no compiler, or no network.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("TensorRT's bindings are tried on Linux x86-64 only")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler 'cc' to stand in for TensorRT's libraries")
    folder = cache / re.sub(r"\W+", "-", requirement)
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    _install(requirement, folder)
    package = folder / "tensorrt_bindings"
    version = re.search(r'__version__ = "(\d+)', (package / "__init__.py").read_text(encoding="utf-8"))
    assert version is not None
    source = folder / "stub.c"
    source.write_text(STUB, encoding="utf-8")
    for library in LIBRARIES:
        name = f"{library}.so.{version[1]}"
        # Beside the bindings: their run path is $ORIGIN.
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(package / name), str(source)]
        subprocess.run(command, check=True)
    (folder / "complete").touch()
    return folder


def _install(requirement: str, folder: Path) -> None:
    """Put the wheel of ``requirement`` into ``folder`` with the first installer that works."""
    uv, on_path = os.environ.get("UV"), shutil.which("uv")
    target = ["--no-deps", "--target", str(folder), requirement]
    with_uv = ["pip", "install", "--python", sys.executable, *target]
    commands = [[found, *with_uv] for found in (uv, on_path) if found]
    commands += [[sys.executable, "-m", "uv", *with_uv], [sys.executable, "-m", "pip", "install", *target]]
    output = []
    for command in commands:
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            output.append(str(error))
            continue
        if result.returncode == 0:
            return
        output.append(result.stderr.strip())
    if NO_NETWORK.search("\n".join(output)):
        pytest.skip(f"cannot fetch {requirement}: no network")
    pytest.fail(f"cannot install {requirement}:\n" + "\n".join(output))
