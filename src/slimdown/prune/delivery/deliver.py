"""Handing a pruned network back: in the user's own module where that is provably the same.

The pruned graph is the oracle. The plan is written into a copy of the user's module too: slices of
its state, and those attributes of its modules that told sizes. Where a submodule's code cannot say
its new sizes, it runs as its piece of the pruned graph (see `prune.traced`). Only when the edited
copy computes what the oracle computes, and can be trained, is it delivered; otherwise the graph is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isnan

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.capture import (
    Analysis,
    analyze,
    capture,
    require_dynamic_batch,
    traceable,
    whole,
)
from slimdown.capture.dims import Kept
from slimdown.errors import kind_and_first_line
from slimdown.prune.delivery.attributes import guess_attributes
from slimdown.prune.delivery.blame import find_culprit, lost_modules, widen
from slimdown.prune.delivery.traced import trace_submodules_
from slimdown.prune.plan import Plan, kept_from_slices, plan_of, slices_of
from slimdown.prune.probe import (
    Probe,
    floating_outputs,
    make_probe,
    relative_error,
    with_other_inputs,
)
from slimdown.prune.surgery import prune_graph, slice_tensors_
from slimdown.prune.verify import TOLERANCE

MAX_ROUNDS = 6
"""How often more submodules are traced, each time those at which the last attempt failed."""


ROUNDING = 1e-2
"""What differs by less than this may differ by rounding alone, so float64 decides."""


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """The pruned module, the plan that makes it again, and why it comes the way it does."""

    module: nn.Module
    plan: Plan
    reason: str


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An edited module, and why it cannot be delivered: "" if it can."""

    plan: Plan
    module: nn.Module | None
    refusal: str
    culprit: str | None = None
    """The innermost submodule that goes wrong, where one was found."""


def deliver(
    model: nn.Module, analysis: Analysis, kept: Kept, *, oracle: GraphModule, probe: Probe
) -> Delivered:
    """Give back the pruned network in `model`'s own form if that is right, as a graph if not."""
    plan = plan_of(analysis, kept, model)
    reason = "the model is itself a captured graph"
    if not isinstance(model, GraphModule):
        surgery = Surgery(
            model=traceable(model), analysis=analysis, kept=kept, oracle=oracle, probe=probe
        )
        attempts = surgery.try_attributes(plan)
        reason = attempts[0].refusal
        best = attempts[-1] if not attempts[-1].refusal else surgery.try_tracing(attempts[0])
        if not best.refusal:
            assert best.module is not None
            praise = _praise(surgery, best.plan, best.module, reason)
            return Delivered(module=whole(best.module), plan=best.plan, reason=praise)
    require_dynamic_batch(analysis.graph_module)
    try:
        untrainable = train_once(oracle, probe.inputs[0])
    except Exception as failure:  # an operator without a gradient
        untrainable = kind_and_first_line(failure)
    remarks = [reason, _tell_lost(model, analysis, [""]), _tell_size(model, oracle, probe)]
    remarks += [f"the graph cannot be trained: {untrainable}"] if untrainable else []
    return Delivered(
        module=oracle,
        plan=replace(plan, delivery="graph"),
        reason="; ".join(filter(None, remarks)),
    )


def rebuild(model: nn.Module, plan: Plan, example_input: Tensor) -> nn.Module:
    """Do to a copy of `model` what `plan` says, whatever its weights are.

    Raises BadInput where the plan is of another model.
    """
    plan.check(model)
    if plan.delivery == "in_place" and not plan.traced:
        return edit_module(model, plan)
    analysis = analyze(capture(model, example_input))
    kept = kept_from_slices(analysis, plan.slices)
    oracle = prune_graph(analysis, kept)
    if plan.delivery == "graph":
        return oracle
    surgery = Surgery(
        model=traceable(model),
        analysis=analysis,
        kept=kept,
        oracle=oracle,
        probe=make_probe(analysis),
    )
    return whole(surgery.edit(plan))


def edit_module(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` in eval mode with the plan's slices and attributes; nothing is traced."""
    module = copy.deepcopy(model).eval()
    slice_tensors_(module, plan.slices)
    for name, values in plan.attributes.items():
        owner = module.get_submodule(name)
        for attribute, value in values.items():
            was_list = isinstance(getattr(owner, attribute), list)
            new = list(value) if was_list and isinstance(value, tuple) else value
            setattr(owner, attribute, new)
    return module


@dataclass(frozen=True, kw_only=True)
class Surgery:
    """A pruning that was done on the graph of `model`, to be done on the model itself."""

    model: nn.Module
    analysis: Analysis
    kept: Kept
    oracle: GraphModule
    probe: Probe
    """For the unpruned network."""

    @cached_property
    def pruned_probe(self) -> Probe:
        return self.probe.sliced(slices_of(self.analysis, self.kept))

    def edit(self, plan: Plan) -> nn.Module:
        """`edit_module`, with the plan's traced submodules. Raises CannotTrace."""
        module = edit_module(self.model, plan)
        if plan.traced:
            trace_submodules_(
                module,
                plan.traced,
                model=self.model,
                analysis=self.analysis,
                oracle=self.oracle,
                probe=self.probe,
            )
        return module

    def attempt(self, plan: Plan) -> Attempt:
        """Edit the model as `plan` says, and judge what comes out."""
        module = None
        try:
            module = self.edit(plan)
            refusal = self.refuse(module)
        except Exception as failure:  # the user's own code, at sizes it was not written for
            refusal = f"the edited module fails: {kind_and_first_line(failure)}"
        if not refusal or module is None:
            return Attempt(plan=plan, module=module, refusal=refusal)
        culprit = find_culprit(module, self.oracle, self.analysis, self.pruned_probe)
        return Attempt(plan=plan, module=module, refusal=refusal, culprit=culprit)

    def refuse(self, module: nn.Module) -> str:
        """Why an edited module cannot be delivered, "" if it can."""
        error = output_error(module, self.oracle, self.pruned_probe)
        if not error <= TOLERANCE:
            return f"the edited module differs from the pruned graph by {error:.1e} (relative)"
        return train_once(module, self.pruned_probe.inputs[0])

    def try_attributes(self, plan: Plan) -> list[Attempt]:
        """One attempt for each guess at the attributes, up to the first that succeeds."""
        attempts = []
        for attributes in guess_attributes(self.model, self.analysis, self.kept):
            attempts.append(self.attempt(replace(plan, attributes=attributes)))
            if not attempts[-1].refusal:
                break
        return attempts

    def try_tracing(self, failed: Attempt) -> Attempt:
        """Let the submodules at fault run as graphs, and more of them as long as that helps."""
        for _ in range(MAX_ROUNDS):
            traced = widen(self.model, self.analysis, failed.plan.traced, failed.culprit)
            if traced is None:
                break
            failed = self.attempt(replace(failed.plan, traced=traced))
            if not failed.refusal:
                break
        return failed


def output_error(module: nn.Module, oracle: GraphModule, probe: Probe) -> float:
    """The relative error of a module's outputs against the oracle's.

    In float64 where rounding may be to blame: the outputs of an untrained network hardly depend on
    its input, and are compared by how they do. On other inputs where they do not depend on these.
    """
    error = float("nan")
    for each in with_other_inputs(probe):
        error = relative_error(each.outputs(module), each.outputs(oracle))
        if TOLERANCE < error < ROUNDING:
            exact = each.double()  # whose state takes the place of the modules' own
            error = relative_error(exact.outputs(module), exact.outputs(oracle))
        if not isnan(error):
            break
    return error


def train_once(module: nn.Module, inputs: Tensor) -> str:
    """Why a copy of `module` cannot be trained, "" if it can: one backward pass is tried.

    In training mode where the batch allows it (batch norm needs two samples), else in eval mode.
    Of a model whose parameters are all frozen, the copy's are not.
    """
    trainee = copy.deepcopy(module).train(len(inputs) > 1)
    if not any(parameter.requires_grad for parameter in trainee.parameters()):
        for parameter in trainee.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    with torch.random.fork_rng(), torch.enable_grad():  # dropout draws no number of the run's
        outputs = floating_outputs(trainee(inputs.clone()))  # some write into them
        loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        if not loss.requires_grad:
            return "no gradient reaches the parameters"
        torch.autograd.backward(loss)
    gradients = [p.grad for p in trainee.parameters() if p.grad is not None]
    if not gradients or not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return "a gradient is missing or not finite"
    return ""


def _praise(surgery: Surgery, plan: Plan, module: nn.Module, first_refusal: str) -> str:
    reason = "the edited module equals the pruned graph and can be trained"
    if plan.traced:
        traced = f"as graphs run {_list(plan.traced)}, since {first_refusal}"
        lost = _tell_lost(surgery.model, surgery.analysis, plan.traced)
        size = _tell_size(surgery.model, module, surgery.probe)
        reason = "; ".join(filter(None, [reason, traced, lost, size]))
    return reason


def _tell_lost(model: nn.Module, analysis: Analysis, within: Sequence[str]) -> str:
    lost = lost_modules(model, analysis, within)
    return f"what acts in training only is gone: {_list(lost)}" if lost else ""


def _tell_size(model: nn.Module, pruned: nn.Module, probe: Probe) -> str:
    """Say so where `pruned` takes images of one size only, and `model` takes others, too."""
    example = probe.inputs[0][:1]
    if example.ndim != 4:
        return ""
    height, width = example.shape[2:]
    larger = example.new_zeros(*example.shape[:2], height + 32, width + 64)  # strides divide 32
    if _runs(model, larger) and not _runs(pruned, larger):
        return f"it takes images of {height} x {width} pixels only, unlike the original"
    return ""


def _runs(model: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            traceable(copy.deepcopy(model)).eval()(images)
    except Exception:  # whatever a model raises at a size that it does not take
        return False
    return True


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
