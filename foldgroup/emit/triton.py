"""A Triton Inference Server model repository: the folder that a server serves, as file names and contents.

::

    <name>/config.pbtxt     how to load it and how to batch requests
    <name>/labels.txt       class names, in the order of the logits
    <name>/1/model.onnx     the network; model.plan or model.pt2 for an engine

Names, types and shapes are read off the ONNX file, so the configuration cannot contradict it. What each backend can do
(read in its documentation and source, :data:`BACKENDS`) decides the rest:

* ONNX Runtime and TensorRT batch: requests wait a moment for others and run together, in the sizes preferred.
* OpenVINO would fix the batch at ``max_batch_size`` (triton-inference-server/openvino_backend#71), and AOTInductor
  packages are not batched (its README): there, as for a network whose batch is fixed, the batch is an axis of the
  input like any other.

Nothing here was run under a server: the tests parse the configuration by Triton's own schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foldgroup.emit.engine import BATCH_RANGE
from foldgroup.errors import EmitError
from foldgroup.targets import Variant

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

VERSION = "1"
LABELS = "labels.txt"

QUEUE_DELAY_US = 100
"""How long a request waits for others to run with, in microseconds, unless told otherwise."""

WARMUP_SIDE = 256
"""Height and width of the warm-up image where the network takes any."""


class _Word(str):
    """A value that is written without quotes."""


@dataclass(frozen=True)
class Backend:
    """How Triton names what runs a target's file, and what it can do."""

    name: str
    file: str
    platform: str = ""
    batches: bool = True
    """Whether it runs requests together."""
    ports: tuple[str, str] | None = None
    """What the names of inputs and outputs begin with, before a number, where they are not those of the ONNX file."""


BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend("onnxruntime", "model.onnx"),
    "onnxruntime-cuda": Backend("onnxruntime", "model.onnx"),
    "onnxruntime-tensorrt": Backend("onnxruntime", "model.onnx"),
    "openvino": Backend("openvino", "model.onnx", batches=False),
    "aotinductor": Backend("pytorch", "model.pt2", "torch_aoti", batches=False, ports=("INPUT__", "OUTPUT__")),
    "aotinductor-cuda": Backend("pytorch", "model.pt2", "torch_aoti", batches=False, ports=("INPUT__", "OUTPUT__")),
    "tensorrt": Backend("tensorrt", "model.plan", "tensorrt_plan"),
}
"""By target. ``torch_aoti`` is there from Triton 26.03 on, the names of its ports from 26.05 on."""

_INSTEAD = {
    "tensorrt-rtx": "no backend of Triton loads TensorRT-RTX plans: use --target tensorrt or onnxruntime-cuda",
    "openvino-gpu": "Triton's OpenVINO backend runs on CPUs only: use --target openvino or onnxruntime-cuda",
}

_UNTOLD = {("openvino", "fp16"), ("onnxruntime-tensorrt", "bf16")}
"""Targets that would compute in another precision: Triton has no setting for it."""


def triton_repository(
    name: str,
    variant: Variant,
    model: bytes,
    engine: bytes | None = None,
    *,
    classes: Sequence[str] = (),
    batch: tuple[int, int, int] = BATCH_RANGE,
    instances: int = 1,
    threads: int | None = None,
    queue_delay_us: int = QUEUE_DELAY_US,
) -> dict[str, bytes]:
    """The files of a model repository with one model, ``name``, by their path in it.

    ``model`` is an ONNX file with one input, [N, C, …] float32 or [N, H, W, 3] uint8, and any outputs; ``classes`` are
    for an only one, [N, classes]. ``engine`` is what was built from it, for targets that take one. ``batch`` is the
    least, typical and greatest where N is free: the greatest is the most that run at once, and the others are
    preferred; each is warmed up. ``instances`` is how many run at a time, on every GPU; ``threads`` are those inside
    one operation, None for the runtime's choice.

    OpenVINO under Triton cannot be told to stay in float32: it computes a float32 file in bfloat16 where the processor
    can.

    Raises:
        EmitError: if Triton cannot serve the target or precision, or the arguments do not fit the network.
    """
    import onnx

    backend = backend_of(variant)
    if (engine is None) != (variant.target.takes == "onnx"):
        raise EmitError(f"Triton serves {variant} from {'the ONNX file alone' if engine else 'an engine: build it'}")
    _check(name, classes, batch, instances, threads)
    if variant.target.name == "tensorrt" and batch[0] > 1:
        raise EmitError(f"Triton may run one request alone: build the engine for 1:{batch[1]}:{batch[2]} images")
    given, results = _ports(onnx.load_model_from_string(model), backend)
    if classes and (len(results) != 1 or len(classes) != results[0].dims[-1]):
        sizes = " and ".join(str(port.dims[-1]) for port in results)
        raise EmitError(f"there are {len(classes)} class names, but the network has {sizes} outputs")
    labels = {"label_filename": LABELS} if classes else {}
    batched = backend.batches and given.dims[0] == -1
    config: dict[str, Any] = {"name": name, "backend": backend.name}
    if backend.platform:
        config["platform"] = backend.platform
    config["default_model_filename"] = backend.file
    config["max_batch_size"] = batch[2] if batched else 0
    config["input"] = [given.config(batched)]
    config["output"] = [port.config(batched) | labels for port in results]
    kind = _Word("KIND_GPU" if variant.target.device == "gpu" else "KIND_CPU")
    config["instance_group"] = [{"count": instances, "kind": kind}]
    if batched:
        config["dynamic_batching"] = {
            "preferred_batch_size": [size for size in sorted(set(batch)) if size > 1],
            "max_queue_delay_microseconds": queue_delay_us,
        }
    config |= _settings(variant, instances, threads)
    config["model_warmup"] = _warmup(given, batch, batched)
    files = {"config.pbtxt": _pbtxt(config).encode(), f"{VERSION}/{backend.file}": engine or model}
    if classes:
        files[LABELS] = "".join(f"{label}\n" for label in classes).encode()
    return {f"{name}/{path}": content for path, content in sorted(files.items())}


def backend_of(variant: Variant) -> Backend:
    """The backend that serves a variant.

    Raises:
        EmitError: if there is none, or it cannot be told to compute so; with what to use instead.
    """
    target = variant.target.name
    if target not in BACKENDS:
        raise EmitError(_INSTEAD.get(target, f"no backend of Triton is known for {target}"))
    if (target, variant.precision) in _UNTOLD:
        raise EmitError(
            f"{target} under Triton cannot be told to compute in {variant.precision}: use another --precision"
        )
    return BACKENDS[target]


def _check(name: str, classes: Sequence[str], batch: Sequence[int], instances: int, threads: int | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise EmitError(
            f"{name!r} is no name for a model: use letters, digits, '.', '_' and '-', as clients write URLs"
        )
    if any("\n" in label or "\r" in label for label in classes):
        raise EmitError("a class name has a line break in it: Triton reads one name a line")
    if len(batch) != 3 or batch[0] < 1 or list(batch) != sorted(batch):
        raise EmitError(f"{batch} is no range of batches: give least, typical and greatest, such as (1, 8, 32)")
    if instances < 1 or (threads is not None and threads < 1):
        raise EmitError(f"{instances} instances of {threads} threads cannot run: give 1 or more of each")


@dataclass(frozen=True)
class _Port:
    """An input or output; a free axis of ``dims`` is -1, and the first is the batch."""

    name: str
    type: str
    dims: tuple[int, ...]

    def config(self, batched: bool) -> dict[str, Any]:
        dims = list(self.dims[1:] if batched else self.dims)
        shape: dict[str, Any] = {"dims": dims} if dims else {"dims": [1], "reshape": {"shape": []}}  # one number each
        return {"name": self.name, "data_type": _Word(self.type), **shape}


def _ports(model: ModelProto, backend: Backend) -> tuple[_Port, list[_Port]]:
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1 or not model.graph.output:
        raise EmitError(
            f"the network has {len(inputs)} inputs and {len(model.graph.output)} outputs: give one with one input"
        )

    def named(value: ValueInfoProto, kind: int, number: int) -> _Port:
        return _port(value, f"{backend.ports[kind]}{number}" if backend.ports else value.name)

    return named(inputs[0], 0, 0), [named(value, 1, i) for i, value in enumerate(model.graph.output)]


def _port(value: ValueInfoProto, name: str) -> _Port:
    from onnx import TensorProto

    types: dict[int, str] = {
        TensorProto.FLOAT: "TYPE_FP32",
        TensorProto.FLOAT16: "TYPE_FP16",
        TensorProto.BFLOAT16: "TYPE_BF16",
        TensorProto.UINT8: "TYPE_UINT8",
    }
    kind = value.type.tensor_type
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    if kind.elem_type not in types or not dims:
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise EmitError(f"{value.name} of the network is {name} {list(dims)}: give float tensors with a batch")
    return _Port(name, types[kind.elem_type], dims)


def _settings(variant: Variant, instances: int, threads: int | None) -> dict[str, Any]:
    """What the backend is told beyond the common part; a ``parameters`` value is always text."""
    parameters: dict[str, str] = {}
    optimization: dict[str, Any] = {}
    match variant.target.name:
        case "onnxruntime":
            if threads is not None:
                parameters["intra_op_thread_count"] = str(threads)
        case "onnxruntime-cuda":
            # 1 is HEURISTIC. The default, EXHAUSTIVE, tries every algorithm for every new batch size.
            parameters["cudnn_conv_algo_search"] = "1"
        case "onnxruntime-tensorrt":
            accelerator: dict[str, Any] = {"name": "tensorrt"}
            if variant.precision in ("fp16", "int8"):
                accelerator["parameters"] = _entries({"precision_mode": variant.precision.upper()})
            optimization = {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}
        case "openvino":
            # All instances share one compiled network, which runs as many requests at a time as it has streams.
            parameters["NUM_STREAMS"] = str(instances)
            parameters["PERFORMANCE_HINT"] = "LATENCY" if instances == 1 else "THROUGHPUT"
            if threads is not None:
                parameters["INFERENCE_NUM_THREADS"] = str(threads * instances)
            if variant.precision == "bf16":
                parameters["HINT_BF16"] = "YES"
        case "aotinductor":
            if threads is not None:
                parameters["INTRA_OP_THREAD_COUNT"] = str(threads)
        case "tensorrt":
            optimization = {"cuda": {"graphs": True}}
    texts = {key: {"string_value": value} for key, value in parameters.items()}
    settings: dict[str, Any] = {"optimization": optimization} if optimization else {}
    return settings | ({"parameters": _entries(texts)} if texts else {})


def _entries(mapping: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A map field, which is written as a list of keys and values."""
    return [{"key": key, "value": value} for key, value in sorted(mapping.items())]


def _warmup(given: _Port, batch: Sequence[int], batched: bool) -> list[dict[str, Any]]:
    """One request for every batch size that is expected, so that no client waits for what only the first run does.

    Where Triton batches, ``batch_size`` requests of one image; elsewhere one request with the batch in its shape.
    """
    fixed = given.dims[0] != -1
    samples: list[dict[str, Any]] = []
    for size in [given.dims[0]] if fixed else sorted(set(batch)):
        one = [WARMUP_SIDE if dim == -1 else dim for dim in given.dims[1:]]
        dims = one if batched else [size, *one]
        data = {"data_type": _Word(given.type), "dims": dims, "zero_data": True}
        requests = size if batched else 1
        samples.append({"name": f"batch of {size}", "batch_size": requests, "inputs": _entries({given.name: data})})
    return samples


def _pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format: one field a line, numbers of one field on one."""
    lines = []
    for field, value in message.items():
        for one in value if isinstance(value, list) and not _is_numbers(value) else [value]:
            if isinstance(one, Mapping):
                lines.append(f"{indent}{field} {{\n{_pbtxt(one, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{field}: {_literal(one)}\n")
    return "".join(lines)


def _is_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) for value in values)


def _literal(value: Any) -> str:
    if isinstance(value, _Word):
        return value
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else json.dumps(value)
