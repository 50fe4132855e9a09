"""A fixed number of a task's calibration images, for stages that look at some before they act."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.fx import GraphModule


def take_images(batches: Iterable[Tensor], count: int) -> list[Tensor]:
    """The first `count` images of some batches, batch by batch, each (N, C, H, W).

    Fewer where the batches hold fewer; those that are not needed are never made.
    """
    return list(stream_images(batches, count))


def stream_images(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The same, one batch in memory at a time."""
    missing = count
    for batch in batches:
        if len(batch) == 0:
            continue
        yield batch[:missing]
        missing -= len(batch[:missing])
        if missing <= 0:
            break


def as_input(images: Tensor, graph_module: GraphModule) -> Tensor:
    """The images on the device and in the precision that a captured graph takes."""
    nodes = graph_module.graph.nodes
    wanted: Tensor = next(node.meta["val"] for node in nodes if node.op == "placeholder")
    return images.to(wanted.device, wanted.dtype)
