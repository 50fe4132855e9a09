"""Quantize an ONNX file with AMD Quark (amd-quark 0.13), to QDQ: run by `quantize_accuracy.py`.

    python run_quark.py plain.onnx images.npy model.onnx --method a8w8

In an environment with `amd-quark`. Quark's integers have 8 bits (its 4 bits are of weights alone,
for language models). All methods equalize layers first. That finds nothing to do in transformers,
nor across ReLU6 unless ReLU6 is replaced by ReLU (`ReplaceClip6Relu`), which is not its default and
was worse on held-out images.

- `xint8`: its XINT8, scales that are powers of two
- `a8w8`: its A8W8 (ranges by percentile), with weights per channel
- `adaround`: the same, and AdaRound with --iterations a layer (its default is 1,000)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader
from quark.onnx import ModelQuantizer, QConfig, QLayerConfig
from quark.onnx.quantization.config.algorithm import AdaRoundConfig, CLEConfig
from quark.onnx.quantization.config.spec import Int8Spec, QuantGranularity, XInt8Spec


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """One image at a time, and again from the first after `rewind`."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.rewind()

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.left, None)
        return None if image is None else {"input": image[None]}

    def rewind(self) -> None:
        self.left = iter(self.images)

    reset_iter = rewind


def config_of(method: str, iterations: int) -> QConfig:
    layers = QLayerConfig(
        activation=Int8Spec(), weight=Int8Spec(quant_granularity=QuantGranularity.Channel)
    )
    if method == "xint8":
        layers = QLayerConfig(activation=XInt8Spec(), weight=XInt8Spec())
    algorithms: list[Any] = [CLEConfig()]
    if method == "adaround":
        algorithms.append(AdaRoundConfig(num_iterations=iterations))
    return QConfig(global_config=layers, algo_config=algorithms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plain", type=Path)
    parser.add_argument("images", type=Path, help="(N, C, H, W)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=["xint8", "a8w8", "adaround"], default="a8w8")
    parser.add_argument("--iterations", type=int, default=1000)
    options = parser.parse_args()
    reader = Reader(np.load(options.images))
    quantizer = ModelQuantizer(config_of(options.method, options.iterations))
    quantizer.quantize_model(str(options.plain), str(options.out), reader)


if __name__ == "__main__":
    main()
