"""Triton model repositories: valid by Triton's own schema, and in agreement with the network they serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2 as pb

from foldgroup.checkpoint import Preprocessing
from foldgroup.emit.preprocess import with_preprocessing
from foldgroup.emit.triton import BACKENDS, WARMUP_SIDE, triton_repository
from foldgroup.errors import EmitError
from foldgroup.targets import TARGETS, Variant

CLASSES = ("ant", "bee", 'a "quoted" cat')
SERVED = [Variant(TARGETS[name], "fp32") for name in BACKENDS]
BATCHED = [v for v in SERVED if BACKENDS[v.target.name].batches]
UNBATCHED = [v for v in SERVED if v not in BATCHED]


def network(batch: int | str = "batch", size: int = 16, kind: int = TensorProto.FLOAT) -> bytes:
    """Pooling and nothing else: three classes, one a channel."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("input", kind, [batch, 3, size, size])
    result = helper.make_tensor_value_info("logits", kind, [batch, 3])
    graph = helper.make_graph(nodes, "g", [given], [result])
    opsets = [helper.make_opsetid("", 20)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return content


def repository(variant: Variant, model: bytes, **options: Any) -> dict[str, bytes]:
    engine = b"engine" if variant.target.takes == "engine" else None
    return triton_repository("net", variant, model, engine, **options)


def parse(files: dict[str, bytes]) -> pb.ModelConfig:
    """The configuration; an unknown field is an error."""
    config = text_format.Parse(files["net/config.pbtxt"].decode(), pb.ModelConfig())
    assert config.name == "net"
    assert f"net/1/{config.default_model_filename}" in files
    return config


def parameters(config: pb.ModelConfig) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


@pytest.mark.parametrize("variant", SERVED, ids=str)
def test_all_outputs_are_served_whatever_their_rank(variant: Variant) -> None:
    proto = onnx.load_from_string(network())
    proto.graph.node.add(op_type="ReduceMean", input=["logits", "axis"], output=["mean"]).attribute.add(
        name="keepdims", type=onnx.AttributeProto.INT, i=0
    )
    proto.graph.initializer.append(helper.make_tensor("axis", TensorProto.INT64, [1], [1]))
    proto.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["batch"]))
    config = parse(repository(variant, proto.SerializeToString()))
    logits, mean = config.output
    if config.max_batch_size:
        assert list(logits.dims) == [3]
        assert list(mean.dims) == [1] and mean.HasField("reshape") and not mean.reshape.shape
    else:
        assert (list(logits.dims), list(mean.dims)) == ([-1, 3], [-1])
    if variant.target.name == "aotinductor":
        assert (logits.name, mean.name) == ("OUTPUT__0", "OUTPUT__1")
    with pytest.raises(EmitError, match="3 class names, but the network has 3 and -1 outputs"):
        repository(variant, proto.SerializeToString(), classes=CLASSES)


def test_a_network_of_signals_is_served() -> None:
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2, 9])
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, 9])
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["logits"])], "g", [given], [result])
    config = parse(repository(Variant(TARGETS["onnxruntime"], "fp32"), helper.make_model(graph).SerializeToString()))
    assert list(config.input[0].dims) == list(config.output[0].dims) == [2, 9]
    assert warmed(config)[0] == (1, [2, 9])


@pytest.mark.parametrize("variant", SERVED, ids=str)
@pytest.mark.parametrize("batch", ["batch", 4])
def test_ports_are_the_networks(variant: Variant, batch: int | str) -> None:
    model = network(batch)
    config = parse(repository(variant, model))
    for value, port in zip(
        (*onnx.load_from_string(model).graph.input, *onnx.load_from_string(model).graph.output),
        (*config.input, *config.output),
        strict=True,
    ):
        dims = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
        assert list(port.dims) == (dims[1:] if config.max_batch_size else dims)
        assert port.data_type == pb.TYPE_FP32
        assert port.name == value.name or BACKENDS[variant.target.name].ports


@pytest.mark.parametrize(
    ("target", "backend", "platform", "file"),
    [
        ("onnxruntime", "onnxruntime", "", "model.onnx"),
        ("onnxruntime-cuda", "onnxruntime", "", "model.onnx"),
        ("openvino", "openvino", "", "model.onnx"),
        ("aotinductor", "pytorch", "torch_aoti", "model.pt2"),
        ("tensorrt", "tensorrt", "tensorrt_plan", "model.plan"),
    ],
)
def test_backend_and_file(target: str, backend: str, platform: str, file: str) -> None:
    variant = Variant(TARGETS[target], "fp32")
    files = repository(variant, network())
    config = parse(files)
    assert (config.backend, config.platform, config.default_model_filename) == (backend, platform, file)
    assert files[f"net/1/{file}"] == (network() if variant.target.takes == "onnx" else b"engine")
    assert set(files) == {"net/config.pbtxt", f"net/1/{file}"}


def test_aotinductor_ports_go_by_their_place() -> None:
    config = parse(repository(Variant(TARGETS["aotinductor"], "fp32"), network()))
    assert (config.input[0].name, config.output[0].name) == ("INPUT__0", "OUTPUT__0")
    assert list(config.model_warmup[0].inputs) == ["INPUT__0"]


@pytest.mark.parametrize("variant", BATCHED, ids=str)
def test_requests_are_batched_in_preferred_sizes(variant: Variant) -> None:
    config = parse(repository(variant, network(), batch=(1, 4, 16), queue_delay_us=250))
    assert config.max_batch_size == 16
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert warmed(config) == [(1, [3, 16, 16]), (4, [3, 16, 16]), (16, [3, 16, 16])]


@pytest.mark.parametrize("variant", UNBATCHED, ids=str)
def test_where_triton_does_not_batch_the_batch_is_an_axis(variant: Variant) -> None:
    config = parse(repository(variant, network(), batch=(1, 4, 16)))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1, 3, 16, 16]
    assert warmed(config) == [(1, [1, 3, 16, 16]), (1, [4, 3, 16, 16]), (1, [16, 3, 16, 16])]


@pytest.mark.parametrize("variant", SERVED, ids=str)
def test_a_fixed_batch_is_not_batched(variant: Variant) -> None:
    config = parse(repository(variant, network(4)))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([4, 3, 16, 16], [4, 3])
    assert warmed(config) == [(1, [4, 3, 16, 16])]


def warmed(config: pb.ModelConfig) -> list[tuple[int, Sequence[int]]]:
    """Requests and shape of every warm-up sample, which must name every input in full."""
    samples = []
    for sample in config.model_warmup:
        ((name, data),) = sample.inputs.items()
        assert (name, data.data_type) == (config.input[0].name, config.input[0].data_type)
        assert data.zero_data
        samples.append((sample.batch_size, list(data.dims)))
    assert len({sample.name for sample in config.model_warmup}) == len(samples)
    return samples


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_images_go_in_as_they_are_decoded(target: str) -> None:
    model = with_preprocessing(network(), Preprocessing(20, 16))
    config = parse(repository(Variant(TARGETS[target], "fp32"), model, batch=(1, 2, 2)))
    (given,) = config.input
    batch = [] if config.max_batch_size else [-1]
    assert (given.name, given.data_type, list(given.dims)) == ("image", pb.TYPE_UINT8, [*batch, -1, -1, 3])
    image = [WARMUP_SIDE, WARMUP_SIDE, 3]
    assert warmed(config) == ([(1, image), (2, image)] if not batch else [(1, [1, *image]), (1, [2, *image])])


@pytest.mark.parametrize("variant", SERVED, ids=str)
def test_class_names_come_with_the_output(variant: Variant) -> None:
    files = repository(variant, network(), classes=CLASSES)
    assert parse(files).output[0].label_filename == "labels.txt"
    assert files["net/labels.txt"].decode().splitlines() == list(CLASSES)
    assert parse(repository(variant, network())).output[0].label_filename == ""


@pytest.mark.parametrize("variant", SERVED, ids=str)
def test_instances_stand_on_the_targets_device(variant: Variant) -> None:
    (group,) = parse(repository(variant, network(), instances=3)).instance_group
    assert group.count == 3
    assert group.kind == (pb.ModelInstanceGroup.KIND_GPU if variant.target.device == "gpu" else group.KIND_CPU)


@pytest.mark.parametrize(
    ("target", "precision", "expected"),
    [
        ("onnxruntime", "fp32", {"intra_op_thread_count": "2"}),
        ("onnxruntime-cuda", "fp16", {"cudnn_conv_algo_search": "1"}),
        ("openvino", "int8", {"NUM_STREAMS": "3", "PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": "6"}),
        ("aotinductor", "fp32", {"INTRA_OP_THREAD_COUNT": "2"}),
        ("tensorrt", "fp32", {}),
    ],
)
def test_backends_are_told_what_matters(target: str, precision: str, expected: dict[str, str]) -> None:
    config = parse(repository(Variant(TARGETS[target], precision), network(), instances=3, threads=2))
    assert parameters(config) == expected


def test_the_runtimes_own_choices_are_left_alone() -> None:
    assert parameters(parse(repository(Variant(TARGETS["onnxruntime"], "fp32"), network()))) == {}
    openvino = parameters(parse(repository(Variant(TARGETS["openvino"], "bf16"), network())))
    assert openvino == {"NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY", "HINT_BF16": "YES"}


@pytest.mark.parametrize(("precision", "mode"), [("fp32", {}), ("fp16", {"precision_mode": "FP16"})])
def test_tensorrt_inside_onnxruntime(precision: str, mode: dict[str, str]) -> None:
    config = parse(repository(Variant(TARGETS["onnxruntime-tensorrt"], precision), network()))
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("tensorrt", mode)


def test_tensorrt_runs_as_a_cuda_graph() -> None:
    assert parse(repository(Variant(TARGETS["tensorrt"], "fp32"), network())).optimization.cuda.graphs


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("tensorrt-rtx", "fp32", "no backend of Triton loads TensorRT-RTX plans: use --target tensorrt"),
        ("openvino-gpu", "fp32", "CPUs only"),
        ("openvino", "fp16", "cannot be told to compute in fp16"),
        ("onnxruntime-tensorrt", "bf16", "cannot be told to compute in bf16"),
    ],
)
def test_what_triton_cannot_serve_is_refused(target: str, precision: str, message: str) -> None:
    with pytest.raises(EmitError, match=message):
        repository(Variant(TARGETS[target], precision), network())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("ant",)}, "1 class names, but the network has 3 outputs"),
        ({"classes": ("ant", "be\ne", "cat")}, "line break"),
        ({"batch": (8, 1, 4)}, "no range of batches"),
        ({"instances": 0}, "give 1 or more"),
        ({"threads": 0}, "give 1 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EmitError, match=message):
        repository(Variant(TARGETS["onnxruntime"], "fp32"), network(), **options)


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a b", 'a"b', ".hidden"])
def test_a_name_is_a_folder_and_part_of_a_url(name: str) -> None:
    with pytest.raises(EmitError, match="no name for a model"):
        triton_repository(name, Variant(TARGETS["onnxruntime"], "fp32"), network())


def test_an_engine_goes_with_the_targets_that_take_one() -> None:
    with pytest.raises(EmitError, match="from an engine: build it"):
        triton_repository("net", Variant(TARGETS["tensorrt"], "fp32"), network())
    with pytest.raises(EmitError, match="the ONNX file alone"):
        triton_repository("net", Variant(TARGETS["onnxruntime"], "fp32"), network(), b"engine")
    with pytest.raises(EmitError, match="1:8:32"):
        repository(Variant(TARGETS["tensorrt"], "fp32"), network(), batch=(4, 8, 32))


def test_every_target_is_served_or_refused_with_what_to_use_instead() -> None:
    for target in TARGETS.values():
        if target.name not in BACKENDS:
            with pytest.raises(EmitError, match="use --target"):
                repository(Variant(target, "fp32"), network())


def test_files_are_the_same_every_time() -> None:
    variant = Variant(TARGETS["onnxruntime"], "fp32")
    assert repository(variant, network(), classes=CLASSES) == repository(variant, network(), classes=CLASSES)


def test_the_configuration_as_text() -> None:
    """What a person who opens the file sees."""
    files = repository(Variant(TARGETS["onnxruntime"], "fp32"), network(), classes=CLASSES, batch=(1, 2, 2))
    assert (
        files["net/config.pbtxt"]
        .decode()
        .startswith(
            'name: "net"\nbackend: "onnxruntime"\ndefault_model_filename: "model.onnx"\nmax_batch_size: 2\n'
            'input {\n  name: "input"\n  data_type: TYPE_FP32\n  dims: [3, 16, 16]\n}\n'
        )
    )
