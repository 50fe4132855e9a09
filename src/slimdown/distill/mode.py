"""Training and eval mode, also of captured graphs, where the mode is written into the nodes."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule

from slimdown.capture.trainable import switch_operators_


def set_mode_(model: nn.Module, *, training: bool) -> None:
    """Put a module and all graphs in it in training or in eval mode.

    What `Prune` delivers follows `train()` by itself; quantized graphs do not.
    """
    model.train(training)
    for module in model.modules():
        if isinstance(module, GraphModule) and switch_operators_(module, training=training):
            module.recompile()
