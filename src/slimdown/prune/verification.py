"""`slimdown.verify`: the proof that a pruned model is its original without what was removed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from slimdown.capture import analyze, capture, traceable
from slimdown.core import StageResult
from slimdown.prune.delivery.deliver import output_error
from slimdown.prune.depth.blocks import rebuild_shallow
from slimdown.prune.plan import Plan, kept_from_slices, slices_of
from slimdown.prune.probe import make_probe
from slimdown.prune.surgery import prune_graph
from slimdown.prune.verify import TOLERANCE, Unverified, compare


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found; each error is a norm of a difference over the norm of what is right."""

    relative_error: float
    """The largest of any operator of the pruned network against the masked original."""
    delivered_error: float
    """That of the pruned model's outputs against the pruned network's."""
    control_error: float | None
    """What a wrong index, put in on purpose, made of one operator; None: nothing was removed."""
    num_operators: int
    """How many operators were compared."""


def verify(original: nn.Module, pruned: StageResult, example_input: Tensor) -> Verification:
    """Prove that `pruned`, what `Prune` made of `original`, computes what it should.

    That is what the original computes with the weights of all that was removed at zero; norms
    average over what is kept only. What is proven holds for any weights, so both may have been
    trained since. `example_input` (1, C, H, W). Raises `Unverified` where something is wrong, and
    BadInput where `pruned` was made of another model.
    """
    plan = Plan.from_json(pruned.structure)
    original = rebuild_shallow(original, pruned.structure.get("depth", {}), example_input)
    plan.check(original)
    analysis = analyze(capture(original, example_input))
    kept = kept_from_slices(analysis, plan.slices)
    oracle, probe = prune_graph(analysis, kept), make_probe(analysis)
    found = compare(analysis, kept, oracle, probe)
    sliced = probe.sliced(slices_of(analysis, kept))
    module = copy.deepcopy(traceable(pruned.model)).eval()
    error = output_error(module, oracle, sliced)
    if not error <= TOLERANCE:
        raise Unverified(
            f"the pruned model differs from the pruned graph by {error:.2e} (relative), where "
            f"{TOLERANCE:g} is allowed: its modules do not do what the plan says"
        )
    return Verification(
        relative_error=found.relative_error,
        delivered_error=error,
        control_error=found.control_error,
        num_operators=found.num_operators,
    )
