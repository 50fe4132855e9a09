"""Quantize a module with Sony's Model Compression Toolkit 2.6, to ONNX: for the benchmark.

    python run_mct.py model.pt images.npy model.onnx --method gptq --bits 4/8

In an environment with `model-compression-toolkit`, torch, onnx and onnxscript; model.pt is a saved
module, whose class must be importable. The capabilities are those of its default platform: weights
symmetric per channel with 8 bits or 4, activations with 8 bits and ranges that are powers of two.
`ptq` is `pytorch_post_training_quantization` with its defaults; `gptq` learns the rounding after it
for --epochs epochs. The file holds the quantized weights as floats, and its activations pass
through QuantizeLinear and DequantizeLinear. With 4 bits the first and the last layer keep 8.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path

import model_compression_toolkit as mct
import numpy as np
import torch
from model_compression_toolkit.core import BitWidthConfig, CoreConfig
from model_compression_toolkit.core.common.network_editors import NodeNameFilter, NodeTypeFilter
from torch import nn

BATCH = 32
LAYERS = (nn.Conv2d, nn.Linear)


def with_bits(model: nn.Module, bits: int) -> CoreConfig:
    """The configuration: `bits` for the weights of all layers but the first and the last."""
    config = BitWidthConfig()
    if bits != 8:
        names = [
            name.replace(".", "_")
            for name, module in model.named_modules()
            if isinstance(module, LAYERS)
        ]
        for kind in {type(module) for module in model.modules() if isinstance(module, LAYERS)}:
            config.set_manual_weights_bit_width(NodeTypeFilter(kind), bits, "weight")
        for name in (names[0], names[-1]):  # folded with a norm, its node has another name
            node = NodeNameFilter(name) | NodeNameFilter(f"{name}_bn")
            config.set_manual_weights_bit_width(node, 8, "weight")
    return CoreConfig(bit_width_config=config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, help="(N, C, H, W)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=["ptq", "gptq"], default="ptq")
    parser.add_argument("--bits", default="8/8", choices=["8/8", "4/8"])
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args()
    model = torch.load(options.model, weights_only=False).eval()
    images = torch.from_numpy(np.load(options.images))

    def batches() -> Iterator[list[torch.Tensor]]:
        for batch in images.split(BATCH):
            yield [batch]

    config = with_bits(model, int(options.bits[0]))
    if options.method == "ptq":
        quantized, _ = mct.ptq.pytorch_post_training_quantization(
            model, batches, core_config=config
        )
    else:
        learning = mct.gptq.get_pytorch_gptq_config(n_epochs=options.epochs)
        quantized, _ = mct.gptq.pytorch_gradient_post_training_quantization(
            model, batches, core_config=config, gptq_config=learning
        )
    # MCT names dynamic axes in the way of torch's older exporter, and wraps what the newer reads
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    mct.exporter.pytorch_export_model(
        quantized,
        str(options.out),
        batches,
        quantization_format=mct.exporter.QuantizationFormat.FAKELY_QUANT,
    )


if __name__ == "__main__":
    main()
