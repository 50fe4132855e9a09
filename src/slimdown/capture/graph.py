"""A model as one graph of ATen operators, by torch.export."""

from __future__ import annotations

import builtins
import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.capture.detectors import traceable
from slimdown.capture.inline import inline_regions_
from slimdown.capture.trainable import TrainableGraph
from slimdown.core import batch_device
from slimdown.errors import CannotCapture, kind_and_first_line

BATCH_HINT = 103
"""The batch size of the example that a graph with a dynamic batch is traced with.

Sizes are told apart by their values, so it must not be mistaken for another: a prime, so that
none but the batch itself has it as a factor, and not one more than a square, as numbers of tokens
are. It costs nothing: tracing computes shapes only.
"""


def capture(model: nn.Module, example_input: Tensor) -> TrainableGraph:
    """Capture `model` in eval mode as a graph module that shares no tensor with it.

    `example_input` (1, C, H, W), taken to the device and precision of the model's weights. The
    batch size of the graph is dynamic wherever the model allows it, and that of the example
    otherwise. Its state has the names of the model's; its nodes carry `val` (shapes) and
    `nn_module_stack` (the modules they come from) in their `meta`. It follows `train()` and
    `eval()`: see `trainable`. Of a detector, what is before its post-processing: see `detectors`.
    Raises CannotCapture.
    """
    _refuse_wrapped(model)
    source = traceable(model)
    example = _like_weights(example_input, source)
    try:
        program = export_any_batch(source, example)
    except Exception:  # torch.export raises many kinds; the static attempt names the true reason
        own = _own(source)
        try:
            program = _export(own, example, None)
        except Exception as error:
            raise CannotCapture(_explain(own, example, error)) from error
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, GraphModule)
    inline_regions_(graph_module)
    _drop_guards_(graph_module)
    _allow_training_(graph_module)
    return TrainableGraph.adopt(graph_module)


def has_dynamic_batch(graph_module: GraphModule) -> bool:
    """Whether a captured graph takes batches of any size."""
    inputs = (node for node in graph_module.graph.nodes if node.op == "placeholder")
    return any(not isinstance(node.meta["val"].shape[0], int) for node in inputs)


def require_dynamic_batch(graph_module: GraphModule) -> None:
    """Raise CannotCapture where a captured graph, which is to be run, takes one batch size only."""
    if not has_dynamic_batch(graph_module):
        raise CannotCapture(
            "the model's graph is fixed to one batch size: somewhere its forward has a number "
            "where the batch size belongs; write x.flatten(1), say, for x.view(1, -1)"
        )


def _refuse_wrapped(model: nn.Module) -> None:
    wrapped = "the model is wrapped {}: give {} instead, and wrap what comes of it"
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise CannotCapture(wrapped.format(f"in {type(model).__name__}", "its .module"))
    if hasattr(model, "_orig_mod"):
        raise CannotCapture(wrapped.format("by torch.compile", "its ._orig_mod"))
    if isinstance(model, torch.jit.ScriptModule):
        raise CannotCapture("the model is TorchScript: give the module that it was made from")


def _like_weights(example: Tensor, model: nn.Module) -> Tensor:
    weights = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(weights, example.dtype) if example.is_floating_point() else example.dtype
    return example.to(batch_device(model), dtype)


def _own(model: nn.Module) -> nn.Module:
    # One for each attempt: a forward may keep what it is traced with, such as cached anchors.
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:  # a tensor with a history, a lock, a file
        raise CannotCapture(
            f"the model cannot be copied: {kind_and_first_line(error)}. A tensor that was computed "
            "from parameters is usually to blame: for torch.nn.utils.weight_norm, say, take "
            "torch.nn.utils.parametrizations.weight_norm"
        ) from error


def export_any_batch(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Export a copy of `model` in eval mode with a dynamic batch; raises what torch.export does.

    `example` (1, C, H, W), on the device and in the precision of the model.
    """
    from torch._dynamo.exc import UserError  # heavy, and torch.export needs it anyway

    batch = example.new_empty(BATCH_HINT, *example.shape[1:])  # never read, so never filled
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    try:
        return _export(_own(model), batch, dynamic)
    except UserError:  # the batch size was made a number, most often by len(x)
        with _symbolic_len():
            return _export(_own(model), batch, dynamic)


@contextmanager
def _symbolic_len() -> Iterator[None]:
    """Let `len(x)` of a tensor depend on the batch size, which Python's own cannot.

    `builtins.len` gives way for as long as a model is traced: its code may be anywhere. For all
    other callers the two are the same.
    """
    ordinary = builtins.len

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.ndim else ordinary(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = ordinary


def _export(
    model: nn.Module, example: Tensor, dynamic_shapes: object
) -> torch.export.ExportedProgram:
    # A failed attempt prints the graph so far; the error says what the user needs.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (example,), dynamic_shapes=dynamic_shapes, strict=False)


def _drop_guards_(graph_module: GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        is_guard = node.op == "call_module" and "_guards" in str(node.target)
        if is_guard or (node.op == "call_function" and "_assert" in str(node.target)):
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _allow_training_(graph_module: GraphModule) -> None:
    # torch.export shadows both methods by ones that raise, since the operators' modes are fixed
    # in the graph; a trainable graph switches them.
    for name in ("train", "eval"):
        graph_module.__dict__.pop(name, None)
    graph_module.eval()


# ------------------------------------------------------------------------------- explaining


def _explain(model: nn.Module, example: Tensor, error: Exception) -> str:
    """Say which module of `model` cannot be captured, and why."""
    shape = tuple(example.shape)
    try:
        with torch.no_grad():
            model(example)
    except Exception as failure:  # whatever the user's code raises
        where = _find_module(model, failure)
        return (
            f"the model fails on an input of shape {shape}, in {where}: "
            f"{kind_and_first_line(failure)}; check the model and the size of its input"
        )
    return (
        f"torch.export cannot capture the model: it fails in {_find_module(model, error)}: "
        f"{_reason(error)}"
    )


def _reason(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    if "DataDependent" in text or "data-dependent" in text.lower():
        return (
            "its control flow depends on the values of tensors (an `if`, a loop, an `.item()` or "
            "indexing by a mask); compute both ways and choose with torch.where, or keep this "
            f"part outside of the model. torch says: {kind_and_first_line(error)}"
        )
    return f"{kind_and_first_line(error)}; rewrite this part with operators that torch.export knows"


def _find_module(model: nn.Module, error: BaseException) -> str:
    """The innermost module of `model` whose code was running when `error` was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = model
    for frame in _frames(error):
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module) and id(running) in names:
            found = running
    name = names[id(found)]
    kind = type(found).__name__
    return f"{name} ({kind})" if name else f"the model itself ({kind})"


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames that an error and its causes went through, the innermost last."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for each in causes:
        traceback = each.__traceback__
        while traceback is not None:
            yield traceback.tb_frame
            traceback = traceback.tb_next
