"""Handing a pruned network back: in the user's own module where that is provably the same.

The pruned graph is the oracle. The plan is written into a copy of the user's module too: slices of
its state, and those attributes of its modules that told sizes. Only when that copy computes what
the oracle computes, and can be trained, is it delivered; otherwise the graph is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimdown.capture import Analysis, require_dynamic_batch
from slimdown.capture.dims import Kept
from slimdown.prune.plan import Attributes, Plan, slices_of
from slimdown.prune.probe import Probe, floating_outputs, relative_error
from slimdown.prune.surgery import changed_arguments, slice_tensors_
from slimdown.prune.verify import TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """The pruned module, the plan that makes it again, and why it comes the way it does."""

    module: nn.Module
    plan: Plan
    reason: str


def deliver(
    model: nn.Module, analysis: Analysis, kept: Kept, *, oracle: GraphModule, probe: Probe
) -> Delivered:
    """Give back the pruned network in `model`'s own form if that is right, as a graph if not."""
    slices = slices_of(analysis, kept)
    pruned_probe = probe.sliced(slices)
    reason = "the model is itself a captured graph"
    for attributes in _candidates(model, analysis, kept):
        plan = Plan(delivery="in_place", slices=slices, attributes=attributes)
        try:
            module = edit_module(model, plan)
            reason = refusal(module, oracle, pruned_probe)
        except Exception as failure:  # the user's own code, at sizes it was not written for
            reason = f"the edited module fails: {_in_one_line(failure)}"
        if not reason:
            reason = "the edited module equals the pruned graph and can be trained"
            return Delivered(module=module, plan=plan, reason=reason)
    require_dynamic_batch(analysis.graph_module)
    try:
        untrainable = train_once(oracle, probe.inputs[0])
    except Exception as failure:  # an operator without a gradient
        untrainable = _in_one_line(failure)
    return Delivered(
        module=oracle,
        plan=Plan(delivery="graph", slices=slices, attributes={}),
        reason=f"{reason}; the graph cannot be trained: {untrainable}" if untrainable else reason,
    )


def refusal(module: nn.Module, oracle: GraphModule, probe: Probe) -> str:
    """Why an edited module cannot be delivered, "" if it can."""
    error = relative_error(probe.outputs(module), probe.outputs(oracle))
    if not error <= TOLERANCE:
        return f"the edited module differs from the pruned graph by {error:.1e} (relative)"
    return train_once(module, probe.inputs[0])


def edit_module(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` in eval mode with the plan's slices and attributes."""
    module = copy.deepcopy(model).eval()
    slice_tensors_(module, plan.slices)
    for name, values in plan.attributes.items():
        owner = module.get_submodule(name)
        for attribute, value in values.items():
            was_list = isinstance(getattr(owner, attribute), list)
            new = list(value) if was_list and isinstance(value, tuple) else value
            setattr(owner, attribute, new)
    return module


def train_once(module: nn.Module, inputs: Tensor) -> str:
    """Why a copy of `module` cannot be trained, "" if it can: one backward pass is tried.

    In training mode where the batch allows it (batch norm needs two samples), else in eval mode.
    """
    trainee = copy.deepcopy(module).train(len(inputs) > 1)
    with torch.random.fork_rng(), torch.enable_grad():  # dropout draws no number of the run's
        outputs = floating_outputs(trainee(inputs))
        loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        if not loss.requires_grad:
            return "no gradient reaches the parameters"
        torch.autograd.backward(loss)
    gradients = [p.grad for p in trainee.parameters() if p.grad is not None]
    if not gradients or not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return "a gradient is missing or not finite"
    return ""


# ------------------------------------------------------------------------------- attributes


def _candidates(model: nn.Module, analysis: Analysis, kept: Kept) -> Iterator[Attributes]:
    """The attributes to try: the careful guess, then the bold one where it differs."""
    if not isinstance(model, GraphModule):
        careful = changed_attributes(model, analysis, kept, bold=False)
        bold = changed_attributes(model, analysis, kept, bold=True)
        yield careful
        if bold != careful:
            yield bold


def changed_attributes(
    model: nn.Module, analysis: Analysis, kept: Kept, *, bold: bool
) -> Attributes:
    """The attributes of `model`'s modules that tell sizes which pruning changes.

    Found in two ways: torch's own layers have known attributes for the sizes of their weights;
    any other module that ran an operator whose constants changed (those of a `view`, a `split`, a
    padding) gets the new number wherever it holds the old one, unless two are in question. A bold
    guess takes a number that changed before an equal one that did not: 3 heads of queries, keys
    and values. What is found wrongly does no harm: the module is compared with the pruned graph.
    """
    modules = dict(model.named_modules())
    found: dict[str, dict[str, Size]] = {}
    for name, replaced in _replaced_constants(analysis, kept).items():
        if name in modules:
            pairs = [pair for pair in replaced if pair[0] != pair[1]] if bold else replaced
            found.setdefault(name, {}).update(_attributes_holding(modules[name], pairs))
    for tensor, axes in slices_of(analysis, kept).items():
        name, _, kind = tensor.rpartition(".")
        if name in modules and kind in ("weight", "running_mean"):
            whole = getattr(modules[name], kind)
            shape = [len(axes.get(axis, range(size))) for axis, size in enumerate(whole.shape)]
            known = found.setdefault(name, {})
            groups = known.get("groups", getattr(modules[name], "groups", 1))
            known.update(_layer_sizes(modules[name], shape, groups=groups))
    return {name: values for name, values in found.items() if values}


Size: TypeAlias = int | tuple[int, ...]


def _replaced_constants(analysis: Analysis, kept: Kept) -> dict[str, list[tuple[Size, Size]]]:
    """Module name -> the constants that its operators had, each with the one that it gets."""
    replaced: dict[str, list[tuple[Size, Size]]] = {}
    for edit, after in changed_arguments(analysis, kept):
        before = edit.arguments(lambda dim: dim.size)
        pairs = replaced.setdefault(_module_of(edit.node), [])
        for name, value in after.items():
            pairs += _constants(before[name], value)
    return replaced


def _constants(before: Any, after: Any) -> Iterator[tuple[Size, Size]]:
    """A constant and its new value; of a list, the whole and each number in it."""
    if isinstance(before, int) and isinstance(after, int):
        yield before, after
    elif isinstance(before, list) and isinstance(after, list):
        numbers = [each for pair in zip(before, after, strict=True) for each in _constants(*pair)]
        if len(numbers) == len(before):  # else some depend on the batch
            yield tuple(before), tuple(after)
        yield from numbers


def _module_of(node: Node) -> str:
    """The name of the module whose forward ran an operator; "" for the root, or unknown."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""  # "@1": its second call


def _attributes_holding(
    module: nn.Module, replaced: Sequence[tuple[Size, Size]]
) -> dict[str, Size]:
    news: dict[Size, set[Size]] = {}
    for before, after in replaced:
        news.setdefault(before, set()).add(after)
    found: dict[str, Size] = {}
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or isinstance(value, bool):
            continue
        old = tuple(value) if isinstance(value, list | tuple) else value
        candidates = news.get(old, set()) if isinstance(old, int | tuple) else set()
        if len(candidates) == 1 and (new := next(iter(candidates))) != old:
            found[attribute] = new
    return found


def _layer_sizes(module: nn.Module, shape: Sequence[int], *, groups: Any) -> dict[str, Size]:
    """What one of torch's own layers says of its weight's `shape`; {} for other modules."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": shape[0], "out_channels": shape[1] * groups}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in_channels": shape[1] * groups, "out_channels": shape[0]}
    if isinstance(module, nn.Linear):
        return {"in_features": shape[1], "out_features": shape[0]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": shape[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(shape)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": shape[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    return {}


def _in_one_line(failure: Exception) -> str:
    first_line = (str(failure).strip().splitlines() or [""])[0]
    return f"{type(failure).__name__}: {first_line}"
