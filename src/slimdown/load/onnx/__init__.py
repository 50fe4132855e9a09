"""ONNX files as modules: read safely, rebuilt of torch's own layers and operators."""

from slimdown.load.onnx.importer import load_onnx as load_onnx
