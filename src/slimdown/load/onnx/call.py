"""One call of an operator, as the functions of the table see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimdown.load.onnx.numbers import Numbers, Value


class Unsupported(Exception):
    """A form of an operator that is not covered; the message says which."""


@dataclass(frozen=True)
class Call:
    """The inputs and attributes of one operator call."""

    op: str
    opset: int
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, Any]
    num_outputs: int

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        value = self.inputs[index]
        assert value is not None
        return value

    def tensor(self, index: int) -> Tensor:
        """An input as a tensor."""
        value = self.value(index)
        if isinstance(value, Tensor):
            return value
        devices = [each.device for each in self.inputs if isinstance(each, Tensor)]
        return value.to_tensor(devices[0] if devices else None)

    def optional_tensor(self, index: int) -> Tensor | None:
        return self.tensor(index) if self.has(index) else None

    def operand(self, index: int) -> Any:
        """An input of an operator that works element by element: a tensor, or a number."""
        value = self.value(index)
        if isinstance(value, Numbers) and len(value.values) == 1:
            return value.values[0]
        return self.tensor(index)

    def are_numbers(self) -> bool:
        """Whether all inputs are numbers."""
        return all(isinstance(each, Numbers) for each in self.inputs if each is not None)

    def numbers(self, index: int) -> list[Any]:
        """An input that tells sizes, axes or scales."""
        value = self.value(index)
        if isinstance(value, Numbers):
            return list(value.values)
        return value.reshape(-1).tolist()

    def axes(self, index: int, name: str = "axes") -> list[int] | None:
        """Axes, which newer opsets take as an input and older ones as an attribute."""
        if self.has(index):
            return self.numbers(index)
        axes = self.attributes.get(name)
        return None if axes is None else list(axes)

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def require(self, name: str, *allowed: Any) -> None:
        """Raise Unsupported unless an attribute is absent or one of `allowed`."""
        value = self.attributes.get(name, allowed[0])
        if value not in allowed:
            raise Unsupported(f"with {name}={value!r}")


def normal_axis(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


def torch_type(onnx_type: int) -> torch.dtype:
    """The type that a Cast goes to: all floating numbers are float32 here."""
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.DOUBLE)
    integers: dict[int, torch.dtype] = {
        TensorProto.BOOL: torch.bool,
        TensorProto.INT64: torch.int64,
        TensorProto.INT32: torch.int32,
        TensorProto.INT16: torch.int16,
        TensorProto.INT8: torch.int8,
        TensorProto.UINT8: torch.uint8,
    }
    if onnx_type in floats:
        return torch.float32
    if onnx_type not in integers:
        raise Unsupported(f"to {TensorProto.DataType.Name(onnx_type)}")
    return integers[onnx_type]
