"""A fixed number of a task's calibration images, for stages that look at some before they act."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.fx import GraphModule


def take_images(batches: Iterable[Tensor], count: int) -> list[Tensor]:
    """The first `count` images of some batches, batch by batch, each (N, C, H, W).

    Fewer where the batches hold fewer; those that are not needed are never made.
    """
    taken: list[Tensor] = []
    missing = count
    for batch in batches:
        taken.append(batch[:missing])
        missing -= len(taken[-1])
        if missing <= 0:
            break
    return taken


def as_input(images: Tensor, graph_module: GraphModule) -> Tensor:
    """The images on the device and in the precision that a captured graph takes."""
    nodes = graph_module.graph.nodes
    wanted: Tensor = next(node.meta["val"] for node in nodes if node.op == "placeholder")
    return images.to(wanted.device, wanted.dtype)
