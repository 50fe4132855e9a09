"""One walk through a graph with all calibration images, during which its weights may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.capture import has_dynamic_batch
from slimdown.capture.call import arguments_of
from slimdown.prune.compensation.streams import Stream


@torch.no_grad()
def walk(
    graph_module: GraphModule,
    images: Sequence[Tensor],
    visits: Mapping[Node, Callable[[Sequence[Tensor]], None]],
) -> None:
    """Run a graph node by node, and visit layers with their inputs before they run.

    What a visit does to the layer's weight counts for everything after: each layer sees inputs
    from the layers before it as they are by now. Keeps the live activations of all images.
    """
    is_dynamic = has_dynamic_batch(graph_module)
    batches = [part for x in images for part in ([x] if is_dynamic else torch.split(x, 1))]
    stream = Stream(graph_module, batches)
    for node in graph_module.graph.nodes:
        if node in visits:
            source = arguments_of(node)["input"]
            visits[node]([values[source] for values in stream.values])
        stream.step(node)
