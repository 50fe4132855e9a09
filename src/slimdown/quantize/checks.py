"""What quantization refuses before it works: weights that no grid holds, images of another kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from slimdown.errors import BadInput
from slimdown.images import as_input
from slimdown.quantize.fold import attributes_of, layer_tensors
from slimdown.quantize.placement import Placement


def check_weights(
    graph_module: GraphModule, placement: Placement, labels: Mapping[str, str]
) -> None:
    """Raise BadInput for a weight or a bias that is not float32, or not finite."""
    attributes = attributes_of(graph_module)
    for node in graph_module.graph.nodes:
        if node.name not in placement.weights:
            continue
        for kind, found in zip(("weight", "bias"), layer_tensors(node), strict=True):
            if found is None:
                continue
            tensor = attributes[str(found.target)]
            assert isinstance(tensor, Tensor)
            where = f"the {kind} of {labels[node.name]}"
            if tensor.dtype is not torch.float32:
                raise BadInput(
                    f"quantize reads models in float32, and {where} is in "
                    f"{_name(tensor.dtype)}: call .float() on the model first"
                )
            if not bool(tensor.isfinite().all()):
                raise BadInput(
                    f"{where} holds NaN or infinity, which no INT8 grid does: "
                    "look at where the weights come from"
                )


def as_calibration(images: Tensor, graph_module: GraphModule) -> Tensor:
    """The images (N, C, H, W) on the device and in the precision that the graph reads.

    Raises BadInput where they are integers and the graph reads floats, or the reverse, and where
    their sizes are not those of the task's example input.
    """
    wanted: Tensor = next(
        node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"
    )
    if images.is_floating_point() != wanted.is_floating_point():
        raise BadInput(
            f"calibration images are in {_name(images.dtype)}, and the task's example input in "
            f"{_name(wanted.dtype)}: give both as the model reads them"
        )
    if images.shape[1:] != wanted.shape[1:]:
        raise BadInput(
            f"calibration images are of shape {tuple(images.shape[1:])}, and the task's example "
            f"input of {tuple(wanted.shape[1:])}: bring all to one size"
        )
    return as_input(images, graph_module)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
