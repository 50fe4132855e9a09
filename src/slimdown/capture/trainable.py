"""A graph that follows `train()` and `eval()` as the modules that it was taken from did.

torch.export writes the mode into the operators: captured in eval mode, a batch norm normalizes by
its running statistics and a dropout passes everything, whatever the module's flag says. Trained
like that, a pruned ResNet-20 ended 4 points lower than with the statistics of its batches.

What a forward computes from its flag in Python is lost: the `dropout_p` of an attention is 0, and
so is the momentum of a batch norm that was made with `momentum=None`. That one normalizes by its
batches in training mode, but its running statistics stay.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.fx import GraphModule, Node

from slimdown.capture.call import arguments_of

if TYPE_CHECKING:
    from typing_extensions import Self

_MODES = frozenset({"train", "training", "use_input_stats"})
"""What ATen calls the mode: of dropouts and recurrent layers, of batch norms, of instance norms."""


class TrainableGraph(GraphModule):
    """A graph module whose norms, dropouts, … switch with its mode; copies do so, too."""

    @classmethod
    def adopt(cls, graph_module: GraphModule) -> TrainableGraph:
        """Make a trainable graph of another one's graph and state, which belong to it from now."""
        adopted = cls.__new__(cls)
        adopted.__dict__.update(graph_module.__dict__)
        adopted.graph.owning_module = adopted
        adopted.recompile()
        return adopted

    def train(self, mode: bool = True) -> Self:
        for module in self.modules():  # bodies of higher-order operators are graphs of their own
            if isinstance(module, GraphModule) and switch_operators_(module, training=mode):
                module.recompile()
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # GraphModule's own forgets what it does not know and which buffers are not saved.
        twin = cast("Self", super().__deepcopy__(memo))
        for name, value in self.__dict__.items():
            if name not in twin.__dict__:
                twin.__dict__[name] = copy.deepcopy(value, memo)
        twin._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        twin.training = self.training
        return twin


def switch_operators_(graph_module: GraphModule, *, training: bool) -> bool:
    """Put the operators of a graph into a mode; say whether any changed."""
    changed = False
    for node in graph_module.graph.nodes:
        mode = _mode_argument(node)
        if mode is not None and arguments_of(node)[mode] != training:
            _set_argument_(node, mode, training)
            changed = True
    return changed


def _mode_argument(node: Node) -> str | None:
    """The name of an operator's argument that should follow the module's mode, if there is one."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    arguments = arguments_of(node)
    if arguments.get("running_mean", ...) is None:
        return None  # a norm without running statistics has no other mode
    return next((name for name in arguments if name in _MODES), None)


def _set_argument_(node: Node, name: str, value: bool) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    position = [argument.name for argument in node.target._schema.arguments].index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:  # it was left at its default
        node.update_kwarg(name, value)
