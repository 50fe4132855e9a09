"""Running a captured graph over images, a few at a time, with an eye on its layers."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from torch.fx import Interpreter

from slimdown.capture import Analysis, has_dynamic_batch

MAX_VALUES = 2**27
"""Values of all activations of one run: 512 MB in float32."""


class Run(Interpreter):
    """Runs a graph on detached tensors, so that no gradient ever reaches the model's parameters.

    And on copies of the images, which a graph may write into.
    """

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        return value.clone() if isinstance(value, Tensor) else value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value


def images_at_once(analysis: Analysis) -> int:
    """How many images to run together: as many as keep within `MAX_VALUES`.

    One where the graph's batch is static.
    """
    if not has_dynamic_batch(analysis.graph_module):
        return 1
    values = sum(
        prod(dim.size for dim in shape)
        for node, shape in analysis.shapes.items()
        if node.op != "get_attr"
    )
    return max(1, MAX_VALUES * analysis.batch_size // max(values, 1))
