"""Runtimes: each exports a module for itself and loads the artifact back."""

from slimdown.targets.find import TARGETS as TARGETS
from slimdown.targets.find import find_target as find_target
from slimdown.targets.onnxruntime import OnnxRuntime as OnnxRuntime
from slimdown.targets.openvino import OpenVino as OpenVino
