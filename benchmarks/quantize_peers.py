"""What the quantization benchmarks compare with: ONNX Runtime's tools and NNCF, of an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor


def quantize_with_ort(
    plain: Path, path: Path, images: Tensor, *, signed: bool = False, method: str = "MinMax"
) -> None:
    """`quantize_static` after its preprocessing: QDQ, weights per channel, images (N, C, H, W)."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {"input": image.numpy()}

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(plain, prepared)
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
    )


def quantize_dynamically(plain: Path, path: Path, *, signed: bool = True) -> None:
    """`quantize_dynamic` with its defaults, or with unsigned weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(plain, path, weight_type=QuantType.QInt8 if signed else QuantType.QUInt8)


def quantize_with_nncf(plain: Path, path: Path, images: Tensor) -> None:
    """NNCF's `quantize` with its preset "mixed" and all of the images."""
    import nncf
    import onnx

    dataset = nncf.Dataset(list(images.split(1)), lambda image: {"input": image.numpy()})
    preset = nncf.QuantizationPreset.MIXED
    quantized = nncf.quantize(onnx.load(plain), dataset, preset=preset, subset_size=len(images))
    onnx.save(quantized, path)


def open_in_ort(path: Path, threads: int) -> Any:
    """(N, C, H, W) -> the outputs as arrays."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})
