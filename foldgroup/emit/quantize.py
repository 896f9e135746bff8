"""float32 ONNX → int8 in explicit Q/DQ form, by ONNX Runtime's quantiser: one file for every runtime that takes int8.

A value x is stored as the integer q = round(x/s), clipped to [-127, 127], and read as s·q; QuantizeLinear and
DequantizeLinear nodes stand in the graph where that happens. What is chosen here, and for whom:

* *static*: every scale s is fixed beforehand, from the ranges that real images reach (the calibration);
* *symmetric*: no zero points, which TensorRT demands and which costs other runtimes nothing;
* *per channel* for weights: one s an output channel, so that a loud channel does not round its quiet neighbours away;
* *float biases*: TensorRT refuses int32 biases behind a DequantizeLinear, and a bias costs no time;
* *seven bits* of weights where the processor adds products of bytes in pairs, in 16 bits: x86 without VNNI. Two
  products of 8 bits, 255·127 each, overflow there and are cut off, silently; of 7 bits, 255·64, never;
* outputs of convolutions that only an addition or an activation reads are not rounded there but after it, so that
  the runtimes fuse the two and the residual stream is rounded once a block.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from foldgroup.emit.onnx import INPUT
from foldgroup.errors import EmitError
from foldgroup.measure import machine
from foldgroup.run.base import import_runtime

Calibration = Literal["minmax", "percentile", "entropy"]
"""How a range is chosen: all values seen, all but the outermost 0.001 %, or the range that keeps most information."""

BATCH = 16
"""Calibration images run at a time: the histograms of "percentile" and "entropy" hold every value of a batch."""

_QUANTIZED = ["Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "AveragePool", "MaxPool"]
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul"],
}


class Quantizer:
    """Calibrates once, and then quantises as often as asked with other layers kept in float.

    ``model`` is a float32 ONNX file, ``images`` [N, C, H, W] what its ranges are taken from; ``batch`` is the batch of
    a model that has a fixed one. ``reduce_range`` gives weights seven bits; None where this processor needs it.

    Raises:
        EmitError: if there are no images or the quantiser refuses the network.
    """

    def __init__(
        self,
        model: bytes,
        images: npt.NDArray[np.float32],
        *,
        method: Calibration = "minmax",
        batch: int | None = None,
        reduce_range: bool | None = None,
    ) -> None:
        if method not in get_args(Calibration):
            raise EmitError(f"no calibration {method!r}: choose {', '.join(get_args(Calibration))}")
        if not len(images):
            raise EmitError("int8 needs images to calibrate on: name a folder of them with --calibrate")
        self.model = model
        self.reduce_range = saturates(machine()["isa"]) if reduce_range is None else reduce_range
        self.version = f"onnxruntime {import_runtime('onnxruntime', 'onnxruntime').__version__}"
        with _ours_alone_to_say("int8 calibration"):
            self.ranges = _ranges(model, images, method, batch)

    @property
    def layers(self) -> tuple[str, ...]:
        """The convolutions and linear layers, which quantisation rounds, in the order they run."""
        import onnx

        nodes = onnx.load_from_string(self.model).graph.node
        return tuple(node.name for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul"))

    def quantize(self, keep_float: Collection[str] = ()) -> bytes:
        """The int8 network, but for the layers named, which stay in float32.

        Raises:
            EmitError: if the quantiser refuses the network.
        """
        import onnx

        quantization = import_runtime("onnxruntime.quantization", "onnxruntime")
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        with _ours_alone_to_say("int8 quantisation"):
            proto = onnx.load_from_string(self.model)
            producer = proto.producer_name
            quantizer = QDQQuantizer(
                proto,
                True,  # per channel
                self.reduce_range,
                quantization.QuantType.QInt8,
                quantization.QuantType.QInt8,
                self.ranges,
                [],
                list(keep_float),
                _QUANTIZED,
                dict(_OPTIONS),
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            proto = quantizer.model.model
            proto.producer_name = producer
            onnx.checker.check_model(proto, full_check=True)
            content: bytes = proto.SerializeToString(deterministic=True)
            return content


def saturates(isa: object) -> bool:
    """Whether processors with the vector extensions ``isa`` (:func:`foldgroup.measure.machine`) cut off sums of two
    products of 8 bits: x86 before VNNI (ONNX Runtime's documentation of quantisation, "When and why do I need to try
    U8U8?").
    """
    found = set(isa) if isinstance(isa, list) else set()
    return "avx2" in found and not found & {"avx512_vnni", "avx_vnni", "amx_int8"}


def _ranges(model: bytes, images: npt.NDArray[np.float32], method: Calibration, batch: int | None) -> Any:
    """The range of every activation over ``images``, in the quantiser's own form."""
    quantization = import_runtime("onnxruntime.quantization", "onnxruntime")
    methods = {
        "minmax": quantization.CalibrationMethod.MinMax,
        "percentile": quantization.CalibrationMethod.Percentile,
        "entropy": quantization.CalibrationMethod.Entropy,
    }
    from onnxruntime.quantization.calibrate import create_calibrator

    class Batches(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]  # known only at run time
        def __init__(self, part: npt.NDArray[np.float32]) -> None:
            self.left = iter([part])

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.left, None)
            return None if part is None else {INPUT: part}

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(model)
        calibrator = create_calibrator(
            file,
            _QUANTIZED,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=methods[method],
            providers=["CPUExecutionProvider"],
            extra_options={"symmetric": True},
        )
        if batch is not None:  # a fixed batch takes no remainder: begin again with the first images
            images = images[np.arange(-len(images) // batch * -batch) % len(images)]
        size = batch or BATCH
        for start in range(0, len(images), size):  # each call digests its batch, so memory stays that of one
            calibrator.collect_data(Batches(images[start : start + size]))
        return calibrator.compute_data()


@contextlib.contextmanager
def _ours_alone_to_say(what: str) -> Iterator[None]:
    """Keeps the quantiser from printing, and turns what it raises into one error."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise EmitError(f"{what} failed: {error}") from error
    finally:
        logging.root.setLevel(level)
