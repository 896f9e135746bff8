"""How to run each target that a bundle was compiled for, in a few lines that work as they stand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

_ORT = """import numpy as np
import onnxruntime as ort

session = ort.InferenceSession({file!r}, providers=[{provider!r}])
x = np.zeros({shape}, np.float32)
{outputs} = session.run(None, {{{input!r}: x}})"""

_OPENVINO = """import numpy as np
import openvino as ov

model = ov.Core().compile_model({file!r}, {device!r}, {{"INFERENCE_PRECISION_HINT": {hint!r}}})
x = np.zeros({shape}, np.float32)
{outputs} = model(x).values()"""

_AOT = """import torch

model = torch._inductor.aoti_load_package({file!r})
{outputs} = model(torch.zeros{shape})"""

_TENSORRT = """import {module} as trt

runtime = trt.Runtime(trt.Logger())
with open({file!r}, "rb") as plan:
    engine = runtime.deserialize_cuda_engine(plan.read())   # native code: run only what you built
context = engine.create_execution_context()
context.set_input_shape({input!r}, {shape})"""

_PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}


def section(
    name: str, manifest: Mapping[str, Any], engines: Mapping[str, Any], preprocessing: Mapping[str, Any]
) -> str:
    """For every target the code that runs it, what the input is, and the commands that check the bundle."""
    built = {(entry["target"], entry["precision"]): entry["file"] for entry in engines.get("engines", ())}
    parts = [f"<p>{escape(_input(manifest, preprocessing))}</p>"]
    for entry in manifest.get("targets", ()):
        target, precision = entry["target"], entry["precision"]
        file = built.get((target, precision)) or _onnx(manifest, target, precision)
        if file:
            code = _code(target, precision, file, manifest)
            parts.append(f"<h3>{escape(target)} {escape(precision)}</h3><pre><code>{escape(code)}</code></pre>")
    if any(file.startswith("triton/") for file in engines.get("files", {})):
        parts.append("<h3>Triton Inference Server</h3><pre><code>tritonserver --model-repository=triton</code></pre>")
    bundle = shlex.quote(name)
    commands = f"foldgroup verify {bundle}\nfoldgroup bench {bundle}"
    return "".join([*parts, f"<h3>Check it where it will run</h3><pre><code>{escape(commands)}</code></pre>"])


def _onnx(manifest: Mapping[str, Any], target: str, precision: str) -> str | None:
    models = manifest.get("models", {})
    found = models.get(f"{target} {precision}") or models.get(precision) or {}
    file: str | None = found.get("file")
    return file


def _code(target: str, precision: str, file: str, manifest: Mapping[str, Any]) -> str:
    shape = tuple(n if isinstance(n, int) else 1 for n in manifest["input"]["shape"])
    names = [str(output["name"]) for output in manifest.get("outputs", ())] or ["logits"]
    outputs = ", ".join(name if name.isidentifier() else f"output_{i}" for i, name in enumerate(names))
    known: dict[str, Any] = {"file": file, "shape": shape, "input": manifest["input"]["name"]}
    if target in _PROVIDERS:
        return _ORT.format(provider=_PROVIDERS[target], outputs=f"[{outputs}]", **known)
    if target.startswith("openvino"):
        hint = {"fp16": "f16"}.get(precision, "f32")
        device = "GPU" if target.endswith("gpu") else "CPU"
        return _OPENVINO.format(device=device, hint=hint, outputs=f"[{outputs}]", **known)
    if target.startswith("aotinductor"):
        return _AOT.format(outputs=outputs, **known)
    return _TENSORRT.format(module="tensorrt_rtx" if target == "tensorrt-rtx" else "tensorrt", **known)


def _input(manifest: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> str:
    shape = ", ".join(map(str, manifest["input"]["shape"]))
    words = f"The input is called {manifest['input']['name']}: float32 [{shape}]."
    if "mean" in preprocessing:
        mean, std = (" ".join(f"{v:g}" for v in preprocessing[key]) for key in ("mean", "std"))
        words += (
            f" Images are resized so that the shorter side has {preprocessing['resize']} pixels, cropped to the "
            f"central {preprocessing['size']}, scaled to 0 … 1, and normalised: less the mean {mean}, over the "
            f"deviation {std}."
        )
    return words
