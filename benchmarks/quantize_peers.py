"""What the quantization benchmarks compare with: ONNX Runtime's tools, NNCF, and peers elsewhere.

AIMET, AMD Quark and Sony's MCT want other versions of packages than slimdown, so each has an
environment of its own, FOLDER/aimet, FOLDER/quark, FOLDER/mct, and is run by a script in `peers/`:

    python -m venv FOLDER/aimet && FOLDER/aimet/bin/pip install aimet-onnx==2.42.0
    python -m venv FOLDER/quark && FOLDER/quark/bin/pip install amd-quark==0.13 torch
    python -m venv FOLDER/mct && FOLDER/mct/bin/pip install model-compression-toolkit==2.6.1 \\
        torch torchvision onnx onnxscript
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
MODULES = (HERE, HERE.parent / "recipes" / "models")
"""Where the classes of the networks are, for the peer that reads modules."""


def quantize_elsewhere(
    peer: str,
    plain: Path | nn.Module,
    path: Path,
    images: Tensor,
    *,
    environments: Path,
    options: list[str],
) -> None:
    """Run `peers/run_PEER.py` in the environment of that name; images (N, C, H, W).

    Raises FileNotFoundError where there is no such environment, RuntimeError with the last line
    of what the peer said where it failed.
    """
    python = environments.resolve() / peer / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"{peer} is not installed: {python} is missing, see {Path(__file__).name}"
        )
    folder = path.parent.resolve()
    if isinstance(plain, nn.Module):
        torch.save(plain, folder / "plain.pt")
        plain = folder / "plain.pt"
    np.save(folder / "images.npy", images.numpy())
    files = [str(plain.resolve()), str(folder / "images.npy"), str(path.resolve())]
    script = HERE / "peers" / f"run_{peer}.py"
    done = subprocess.run(  # in its folder, as some leave files where they run
        [str(python), str(script), *files, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, MODULES)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(said[-1])


def quantize_with_ort(
    plain: Path,
    path: Path,
    images: Tensor,
    *,
    signed: bool = False,
    method: str = "MinMax",
    weight_bits: int = 8,
) -> None:
    """`quantize_static` after its preprocessing: QDQ, weights per channel, images (N, C, H, W).

    With 4 `weight_bits` the first and the last layer keep 8.
    """
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
        weight_type=QuantType.QInt4 if weight_bits == 4 else QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={}
        if weight_bits == 8
        else {"TensorQuantOverrides": edges_in_8_bits(prepared)},
    )


def edges_in_8_bits(path: Path) -> dict[str, list[dict[str, Any]]]:
    """ONNX Runtime's overrides for the weights of the first and the last layer."""
    import onnx
    from onnxruntime.quantization import QuantType

    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    layers = [
        node
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights
    ]
    return {
        node.input[1]: [{"quant_type": QuantType.QInt8, "axis": int(node.op_type == "MatMul")}]
        for node in (layers[0], layers[-1])
    }


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


def open_in_ort(path: Path, threads: int, *, optimize: bool = True) -> Any:
    """(N, C, H, W) -> the outputs as arrays."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})
