"""Quantize an ONNX file with AIMET (aimet-onnx 2.42), to QDQ: run by `quantize_accuracy.py`.

    python run_aimet.py plain.onnx images.npy model.onnx --method adaround --bits 4/8

In an environment with `aimet-onnx`. Weights per channel, symmetric; ranges by least quantization
noise ("tf_enhanced").

- `ranges`: no more than that
- `layers`: the same, but of the activations only those that convolutions and matrix products with
  weights read are quantized, which is about where slimdown's quantizers stand; AIMET quantizes the
  output of every operation, in a ViT some five times as many tensors
- `cle`: equalizes layers before, which makes ReLU6 a ReLU and leaves transformers as they are
- `adaround`: after `cle`, learns the rounding with --iterations a layer, where AIMET recommends
  10,000 (15,000 below 8 bits)

Where bits are fewer than 8, the weights of the first and the last layer and what they read keep 8,
as slimdown's do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import aimet_onnx
import numpy as np
import onnx
from aimet_onnx.common import quantsim_config
from aimet_onnx.cross_layer_equalization import equalize_model

CONFIG = Path(quantsim_config.__file__).parent / "default_config_per_channel.json"
LAYERS = ("Conv", "Gemm", "MatMul")


def keep_8_bits_(sim: aimet_onnx.QuantizationSimModel, model: onnx.ModelProto) -> None:
    """Of the first and the last layer: their weights, inputs, and the network's outputs."""
    layers = layers_of(model)
    names = {name for node in (layers[0], layers[-1]) for name in node.input[:2]}
    names |= {tensor.name for tensor in model.graph.output}
    for name in names & sim.qc_quantize_op_dict.keys():
        sim.qc_quantize_op_dict[name].set_bitwidth(8)


def layers_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node for node in model.graph.node if node.op_type in LAYERS and node.input[1] in weights
    ]


def leave_out_(sim: aimet_onnx.QuantizationSimModel, names: set[str]) -> None:
    for name in names & set(sim.activation_names) & sim.qc_quantize_op_dict.keys():
        sim.qc_quantize_op_dict[name].enabled = False


def before_clips(model: onnx.ModelProto) -> set[str]:
    """What only a Clip reads: its supergroup of Conv and Clip is not found in files like these."""
    clipped = {node.input[0] for node in model.graph.node if node.op_type == "Clip"}
    others = {name for node in model.graph.node if node.op_type != "Clip" for name in node.input}
    return clipped - others


def bounds_as_constants_(model: onnx.ModelProto) -> None:
    """Make the bounds of Clip constant nodes: AIMET takes no other Clip for a ReLU6 to equalize."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    for name in sorted({name for node in clips for name in node.input[1:]} & tensors.keys()):
        model.graph.initializer.remove(tensors[name])
        constant = onnx.helper.make_node("Constant", [], [name], name=name, value=tensors[name])
        model.graph.node.insert(0, constant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plain", type=Path)
    parser.add_argument("images", type=Path, help="(N, C, H, W)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=["ranges", "layers", "cle", "adaround"], default="cle")
    parser.add_argument("--bits", default="8/8", help="of weights and of activations")
    parser.add_argument("--iterations", type=int, default=1000)
    options = parser.parse_args()
    weight_bits, activation_bits = options.bits.split("/")
    model = onnx.load(options.plain)
    name = model.graph.input[0].name
    images = [{name: image[None]} for image in np.load(options.images)]
    bounds_as_constants_(model)
    if options.method in ("cle", "adaround"):
        equalize_model(model)
    skipped = before_clips(model)
    sim = aimet_onnx.QuantizationSimModel(
        model,
        param_type=f"int{weight_bits}",
        activation_type=f"int{activation_bits}",
        quant_scheme="tf_enhanced",
        config_file=str(CONFIG),
    )
    keep_8_bits_(sim, model)
    if options.method == "layers":
        skipped = set(sim.activation_names) - {node.input[0] for node in layers_of(model)}
    leave_out_(sim, skipped)
    if options.method == "adaround":
        aimet_onnx.apply_adaround(sim, images, num_iterations=options.iterations)
    sim.compute_encodings(images)
    quantized = sim.to_onnx_qdq(export_int32_bias=True, prequantize_constants=True)
    onnx.save(quantized, options.out)


if __name__ == "__main__":
    main()
