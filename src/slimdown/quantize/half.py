"""Half precision: a copy that computes in float16 between float32 inputs and outputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from slimdown.errors import BadInput


class HalfPrecision(nn.Module):
    """A graph in float16; takes and gives float32, so that every score judges it like any other.

    What is exported computes in float16. On a CPU it computes in float32 from the same float16
    weights, as the runtimes do there: few CPUs have float16 arithmetic, and torch takes fifty times
    as long without.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self.model = copy.deepcopy(graph_module).half()

    def forward(self, x: Tensor) -> Any:
        if x.device.type == "cpu" and not torch.compiler.is_exporting():
            return self.compute_in_float32(x)
        return self.compute_in_float16(x)

    def compute_in_float16(self, x: Tensor) -> Any:
        return tree_map(_as_float32, self.model(x.half()))

    def compute_in_float32(self, x: Tensor) -> Any:
        state = {name: _as_float32(tensor) for name, tensor in _tensors(self.model).items()}
        return functional_call(self.model, state, (x,))


def check_half(model: HalfPrecision, example_input: Tensor) -> None:
    """Raise BadInput where the network cannot run in float16 on `example_input`, or overflows."""
    try:
        with torch.no_grad():
            outputs = model.compute_in_float16(example_input)
    except RuntimeError as error:
        raise BadInput(
            f"the network does not run in float16 ({error}): it makes float32 tensors while it "
            "runs; register them as buffers, or leave the precision at int8"
        ) from error
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor) and not output.isfinite().all():
            raise BadInput(
                "the network overflows in float16: its output on one image is not finite; "
                "leave the precision at int8"
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _as_float32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype == torch.float16
    return value.float() if is_half else value
