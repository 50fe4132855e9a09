"""The module that a file becomes: its operators, called one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from slimdown.errors import BadInput
from slimdown.load.onnx.call import Call, Unsupported
from slimdown.load.onnx.numbers import Numbers, Value

COLORS = (1, 3, 4)
"""How many channels an image has."""


class Held(NamedTuple):
    """A constant that the module holds as a parameter or a buffer."""

    path: str


Source: TypeAlias = "str | Held | Numbers | None"
"""Where an input comes from: an earlier step by the name of its output, or a constant."""
Values: TypeAlias = dict[str, Value]


@dataclass(frozen=True)
class Step:
    """One call, of a layer of the module or of an operator."""

    label: str
    op: str
    call: str | Callable[[Call], Any]
    """The path of the layer, or the function."""
    inputs: tuple[Source, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    last_reads: tuple[str, ...] = ()
    """Values that no later step reads."""


class OnnxModule(nn.Module):
    """The graph of an ONNX file over torch's layers: images (N, C, H, W) to its outputs.

    Sizes are worked out anew in each call, so that any batch size is taken.
    """

    def __init__(
        self, *, file: str, opset: int, input_name: str, input_shape: tuple[int | None, ...]
    ) -> None:
        super().__init__()
        self.file = file
        self.opset = opset
        self.input_name = input_name
        self.input_shape = input_shape
        self.steps: tuple[Step, ...] = ()
        self.outputs: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int | None:
        """The batch size of the file; None is any."""
        return self.input_shape[0]

    @property
    def is_channels_last(self) -> bool:
        """Whether the file takes (N, H, W, C), as TensorFlow does."""
        _, first, _, last = self.input_shape
        return last in COLORS and first not in COLORS

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """(C, H, W) of its images; None is any size."""
        _, *sizes = self.input_shape
        if self.is_channels_last:
            height, width, channels = sizes
            return channels, height, width
        return tuple(sizes)

    def forward(self, x: Tensor) -> Any:
        self._check(x)
        values = self.start(x)
        for step in self.steps:
            self.run_(step, values)
        outputs = tuple(self.read(name, values) for name in self.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def extra_repr(self) -> str:
        """The steps: a run knows by them whether a file is the one that it began with."""
        return "\n".join(
            f"{', '.join(step.outputs)} = {step.op}{step.inputs} {step.attributes or ''}".rstrip()
            for step in self.steps
        )

    def start(self, x: Tensor) -> Values:
        """The values before the first step."""
        return {self.input_name: x.permute(0, 2, 3, 1) if self.is_channels_last else x}

    def run_(self, step: Step, values: Values) -> None:
        """Add a step's outputs to `values`, and take away what is read for the last time."""
        inputs = tuple(self.read(source, values) for source in step.inputs)
        for name in step.last_reads:
            del values[name]
        results = self._call(step, inputs)
        results = results if type(results) in (tuple, list) else (results,)
        # Numbers are tuples, too; torch's several results are plain ones or named.
        values.update(zip(step.outputs, results, strict=False))

    def _call(self, step: Step, inputs: tuple[Value | None, ...]) -> Any:
        if isinstance(step.call, str):
            return self.get_submodule(step.call)(inputs[0])
        call = Call(step.op, self.opset, inputs, step.attributes, len(step.outputs))
        try:
            return step.call(call)
        except Unsupported as error:
            raise refusal(self.file, step.label, error) from error

    def read(self, source: Source, values: Values) -> Any:
        """An input of a step."""
        if isinstance(source, str):
            return values[source]
        if isinstance(source, Held):
            owner, _, name = source.path.rpartition(".")
            return getattr(self.get_submodule(owner), name)
        return source

    def _check(self, x: Tensor) -> None:
        """Raise BadInput for images of another size than the file was exported for."""
        given = tuple(x.shape[1:])
        fits = len(given) == len(self.image_shape) and all(
            asked is None or own == asked
            for own, asked in zip(given, self.image_shape, strict=True)
        )
        if not fits:
            raise BadInput(
                f"{self.file} takes images of {_spell(self.image_shape)}, got {_spell(given)}: "
                "give that size (preprocess.size in a recipe, --input of inspect), or export it "
                "with a dynamic height and width"
            )


def refusal(file: object, label: str, error: Unsupported) -> BadInput:
    """What to say of a form of an operator that is not covered."""
    return BadInput(
        f"{file}: {label}, {error}, is not supported: replace it in the network and export it again"
    )


def _spell(sizes: tuple[Any, ...]) -> str:
    return "x".join("any" if size is None else str(size) for size in sizes)


def to_tensor(value: Value) -> Tensor:
    return value if isinstance(value, torch.Tensor) else value.to_tensor()
