"""Removing whole residual blocks, or the branches of blocks, that hardly change the output.

Which: by the change of the model's own output on calibration images, one branch after the other,
judged anew after each, as long as the change of all together is allowed. How: the branch and its
weights leave the graph, which is the oracle, and then the user's own module where that is provably
the same (see `prune.removal`). Nothing is skipped at run time.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.capture import (
    Analysis,
    analyze,
    capture,
    has_dynamic_batch,
    require_dynamic_batch,
    traceable,
)
from slimdown.core import Context, Json, Progress, StageResult, Task
from slimdown.errors import BadInput, Interrupted
from slimdown.images import as_input, take_images
from slimdown.prune.budget.cost import Cost, size_cost
from slimdown.prune.budget.selection import check_globs, matches
from slimdown.prune.depth.branches import Branch, Bypassed, alive_nodes, bypass, find_branches
from slimdown.prune.depth.removal import find_replacements, replace_modules
from slimdown.prune.probe import (
    Probe,
    batched_outputs,
    in_rows,
    make_probe,
    relative_error,
    require_finite,
    require_finite_state,
)
from slimdown.prune.verify import TOLERANCE, Unverified

Count: TypeAlias = Callable[[Analysis], Cost]
"""What a network costs as a function of its widths, such as `cost.mac_cost`."""

NUM_IMAGES = 16
"""Calibration images that the change of the output is measured on: one run over them for each
branch, and some more for each that goes."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The branches to remove, in the order of their choice, and what that changes."""

    branches: tuple[Branch, ...]
    error: float
    """Of the output without all of them: see `OutputChange`."""
    errors: Mapping[str, float]
    """By name, of the output without this one alone."""


@dataclass(frozen=True, kw_only=True)
class Shallow:
    """A model without some of its blocks, and what makes it again."""

    module: nn.Module
    before: Analysis
    after: Analysis
    structure: Json
    """{} where nothing went."""
    facts: Json

    def rest_of(self, fraction: float, count: Count) -> float:
        """The share of what is left that is a `fraction` of what was there, at most 1."""
        before, after = (float(count(analysis)({})) for analysis in (self.before, self.after))
        return min(1.0, fraction * before / after)

    def extend(self, pruned: StageResult) -> StageResult:
        """The result of a pruning of `module`, as one of the model that it came from."""
        counted = {
            "macs": self.before.count_macs({}),
            "parameters": self.before.count_parameters({}),
            "size": int(size_cost(self.before)({})),
        }
        facts = {name: [whole, pruned.facts[name][1]] for name, whole in counted.items()}
        return replace(
            pruned,
            structure={**pruned.structure, "depth": self.structure},
            facts={**pruned.facts, **facts, "depth": self.facts},
        )


def remove_blocks(
    model: nn.Module,
    task: Task,
    *,
    max_error: float,
    fraction: float = 0.0,
    count: Count | None = None,
    num_images: int = NUM_IMAGES,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    context: Context = Context(),
) -> Shallow:
    """Remove the blocks of a copy of `model` that change its output least.

    Stops before the output on the task's first calibration images changes by more than `max_error`
    (a share of its spread), or once no more than `fraction`, if below 1, is left of what `count`
    counts. Only branches all of whose layers the globs leave in may go. Raises CannotCapture,
    BadInput without images, RecipeError for a glob that matches nothing, and Unverified rather than
    return a wrong model.
    """
    graph_module = capture(model, task.example_input)
    before = analyze(graph_module)
    require_finite_state(before)
    check_globs(before, include=include, exclude=exclude)
    branches = find_branches(graph_module)
    candidates = [
        branch
        for branch in branches
        if all(matches((layer,), include) for layer in branch.layers)
        and not matches(branch.layers, exclude)
    ]
    images = take_images(task.calibration_batches(), min(num_images, NUM_IMAGES))
    change = OutputChange(graph_module, images, context)
    limit = fraction * float(count(before)({})) if count is not None and fraction < 1 else 0.0

    def is_enough(chosen: Sequence[Branch]) -> bool:
        if count is None or limit <= 0:
            return False
        return float(count(analyze(bypass(graph_module, chosen)))({})) <= limit

    chosen = choose_branches(candidates, change, max_error=max_error, is_enough=is_enough)
    facts = {
        "num_branches": len(branches),
        "num_images": change.num_images,
        "output_error": chosen.error,
        "errors": dict(chosen.errors),
        "removed": [],
    }
    if not chosen.branches:
        kept = copy.deepcopy(model).eval()
        return Shallow(module=kept, before=before, after=before, structure={}, facts=facts)
    probe = make_probe(before)
    oracle = bypass(graph_module, chosen.branches)
    _check(graph_module, chosen.branches, oracle, probe)
    replaced = find_replacements(traceable(model), graph_module, chosen.branches, probe)
    names = {branch.name: branch.module for branch in chosen.branches}
    if replaced is None:
        require_dynamic_batch(oracle)
        module: nn.Module = oracle
        structure: Json = {"branches": list(names)}
        facts |= {"removed": list(names), "delivery": "graph"}
    else:
        module = replace_modules(model, replaced)
        structure = {"replaced": replaced}
        whole = {name for name, kind in replaced.items() if kind in ("identity", "pass")}
        removed = (owner if owner in whole else name for name, owner in names.items())
        facts |= {"removed": list(dict.fromkeys(removed)), "delivery": "in_place"}
    return Shallow(
        module=module, before=before, after=analyze(oracle), structure=structure, facts=facts
    )


def rebuild_shallow(model: nn.Module, structure: Json, example_input: Tensor) -> nn.Module:
    """Remove from a copy of `model` what was removed before. Raises BadInput for another model."""
    if not structure:
        return model
    try:
        if "replaced" in structure:
            return replace_modules(model, structure["replaced"])
        graph_module = capture(model, example_input)
        named = {branch.name: branch for branch in find_branches(graph_module)}
        return bypass(graph_module, [named[name] for name in structure["branches"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"the plan removes blocks that this model lacks: {error}; "
            "rebuild it from the model that was pruned"
        ) from error


# ----------------------------------------------------------------------------------- choosing


class OutputChange:
    """How much a network's output changes on some images when branches are bypassed.

    The norm of the change over that of the output's spread over the images (the output less its
    mean), all floating-point outputs that list samples: no labels, and no task, are needed.
    """

    def __init__(
        self, graph_module: GraphModule, images: Sequence[Tensor], context: Context = Context()
    ) -> None:
        self.graph_module = graph_module
        self.context = context
        self.num_images = sum(len(batch) for batch in images)
        if self.num_images < 2:
            raise BadInput(
                "prune.depth needs calibration images, 2 or better a few dozen, and the task has "
                f"{self.num_images}: give the data a training or a calibration split, or set "
                "prune.depth to 0"
            )
        is_dynamic = has_dynamic_batch(graph_module)
        self.images = [
            as_input(part, graph_module)
            for batch in images
            for part in ([batch] if is_dynamic else torch.split(batch, 1))
        ]
        network = Bypassed(graph_module, ())
        outputs = [network.run(x) for x in self.images]
        for output in outputs:
            require_finite(output)
        self.which = batched_outputs(outputs, [len(x) for x in self.images])
        self.whole = [self._rows(*pair) for pair in zip(outputs, self.images, strict=True)]
        mean = torch.stack([rows.sum(0) for rows in self.whole]).sum(0) / self.num_images
        self.spread = _norm(rows - mean for rows in self.whole)
        if not self.spread > 0:
            raise BadInput(
                "the model gives the same output for all calibration images, so that no block "
                "matters: give it trained weights and images that differ, or set prune.depth to 0"
            )

    def __call__(self, branches: Iterable[Branch]) -> float:
        if self.context.stop_requested():
            raise Interrupted("stopped while judging blocks; the next run begins this step anew")
        pairs = zip(self._outputs(branches), self.whole, strict=True)
        error = _norm(ours - theirs for ours, theirs in pairs) / self.spread
        return math.inf if math.isnan(error) else error  # NaN is the worst of changes

    def _outputs(self, branches: Iterable[Branch]) -> Iterator[Tensor]:
        """(images, values) float32 for each batch of images."""
        network = Bypassed(self.graph_module, branches)
        for x in self.images:
            yield self._rows(network.run(x), x)

    def _rows(self, output: Any, x: Tensor) -> Tensor:
        return in_rows(output, len(x), self.which).float()


def _norm(parts: Iterable[Tensor]) -> float:
    """The norm of a tensor that comes in parts."""
    return math.sqrt(sum(float(part.norm(dtype=torch.float64)) ** 2 for part in parts))


def choose_branches(
    candidates: Sequence[Branch],
    change: OutputChange,
    *,
    max_error: float,
    is_enough: Callable[[Sequence[Branch]], bool],
) -> Chosen:
    """Take the branch whose loss changes the output least, judge the others anew, and so on.

    Taking one rarely makes another matter less, so those that mattered more than the best so far
    are not looked at again: Minoux 1978's lazy greedy choice.
    """
    graph_module = change.graph_module
    chosen: list[Branch] = []
    error = 0.0
    errors: dict[str, float] = {}
    for index, branch in enumerate(candidates):
        change.context.show(Progress("prune: blocks", index, len(candidates)))
        errors[branch.name] = change([branch])
    heap = [(errors[branch.name], index, 0) for index, branch in enumerate(candidates)]
    heapq.heapify(heap)
    enough = is_enough(chosen)
    while heap and not enough:
        estimate, index, num_chosen = heapq.heappop(heap)
        branch = candidates[index]
        if num_chosen < len(chosen):
            shortcuts = {each.addition: each.shortcut for each in chosen}
            if branch.addition in alive_nodes(graph_module, shortcuts):
                heapq.heappush(heap, (change([*chosen, branch]), index, len(chosen)))
        elif estimate <= max_error:
            chosen.append(branch)
            error = estimate
            enough = is_enough(chosen)
        else:
            break
    return Chosen(branches=tuple(chosen), error=error, errors=errors)


def _check(
    graph_module: GraphModule, branches: Sequence[Branch], oracle: GraphModule, probe: Probe
) -> None:
    """Raise Unverified where the shallow graph is not the original with its branches bypassed."""
    reference = Bypassed(graph_module, branches, probe.state)
    result = Bypassed(oracle, (), probe.state)
    error = relative_error(
        [result.run(x) for x in probe.inputs], [reference.run(x) for x in probe.inputs]
    )
    if not error <= TOLERANCE:
        raise Unverified(
            f"the graph without {', '.join(branch.name for branch in branches)} differs from the "
            f"original with them bypassed by {error:.2e} (relative); please report this model"
        )
