"""Structural pruning as a stage of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from torch import Tensor, nn

from slimdown.capture import Analysis, analyze, capture
from slimdown.capture.dims import Kept, Var
from slimdown.core import Context, Json, Progress, StageResult, Target, Task
from slimdown.errors import RecipeError
from slimdown.prune.budget.allocation import BUDGETS, COUNTED, allocate, check_budgets
from slimdown.prune.budget.cost import size_cost
from slimdown.prune.budget.pace import keep_pace
from slimdown.prune.budget.selection import check_globs, find_bundles
from slimdown.prune.budget.sensitivity import Weigh, find_sensitivity
from slimdown.prune.budget.widths import Choice, Price, allowed_widths, steps
from slimdown.prune.compensation.compensate import recover_
from slimdown.prune.delivery.deliver import Delivered, deliver, rebuild
from slimdown.prune.depth.blocks import Shallow, rebuild_shallow, remove_blocks
from slimdown.prune.importance.criteria import IMPORTANCE, REDUCTION, Importance, Reduction, score
from slimdown.prune.importance.evidence import gather
from slimdown.prune.importance.ranking import SCOPE, Scope, rank, unranked
from slimdown.prune.plan import Plan
from slimdown.prune.probe import make_probe
from slimdown.prune.surgery import prune_graph, size_after
from slimdown.prune.verify import check_surgery
from slimdown.suggest import did_you_mean

ROUND_TO = 8
"""What widths are rounded to where no runtime is in question."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Remove the least important channels until a share of what the network costs is left.

    The channels that must go together are found by the algebra of dimensions, so no layer needs
    to be ignored by hand. The result is verified (see `prune.verify`) and comes as the user's own
    module where that can be edited, and as a graph module otherwise.
    """

    macs: float | None = None
    """The fraction of the multiply-accumulates to keep, in (0, 1]; this or another budget."""
    parameters: float | None = None
    """The fraction of the parameters to keep, in (0, 1]."""
    size: float | None = None
    """The fraction of the bytes of all parameters and buffers to keep, in (0, 1]."""
    latency: float | None = None
    """The fraction of the latency on `target` to keep, in (0, 1], measured with a batch of one on
    one thread: widths follow a table of timed operators, and are corrected until the network's own
    latency is within 5 %. Timings differ from run to run, so the widths may."""
    target: str | None = None
    """The runtime whose latency counts, such as "onnxruntime"; a recipe's own where none is given.
    """
    importance: Importance = "hessian"
    """How much a channel matters: see `prune.importance`. "random", "l1", "l2", "lamp",
    "geometric_median" and "batch_norm_scale" look at weights alone, all others at images;
    "taylor" and "fisher" take the task's loss where the images have labels."""
    reduction: Reduction = "sum"
    """How what a channel matters to each layer becomes one number: see `prune.importance`."""
    scope: Scope = "global"
    """Which groups compete for the budget: all, those built alike ("isomorphic"), none ("local").
    """
    num_images: int = 256
    """Images to tell by what matters, and to compensate with; fewer where a task has fewer."""
    compensate: bool = True
    """Whether layers that read removed channels are fitted to the original's outputs, without
    labels: see `prune.compensation`."""
    depth: float = 0.0
    """Whole residual blocks, and branches of blocks, go before channels do, as long as the outputs
    change by no more than this share of their spread over a few images; 0: no block goes."""
    sensitivity: bool = False
    """Also prune each group alone, to three widths, and weigh it by what that does to the output
    on 16 calibration images: see `prune.sensitivity`. Seconds to minutes; no labels."""
    round_to: int | None = None
    """Widths are whole multiples of this; narrow layers go in finer steps. None: what the runtime
    is fast at where a latency is asked for, and 8 elsewhere."""
    min_keep: float = 0.1
    """The fraction of each group of channels that stays in any case, in [0, 1]."""
    include: tuple[str, ...] = ("*",)
    """Globs over layer names: only channels that such a layer makes are removed."""
    exclude: tuple[str, ...] = ()
    """Globs over layer names: no channel that such a layer makes is removed."""

    def __post_init__(self) -> None:
        check_budgets({name: getattr(self, name) for name in BUDGETS}, target=self.target)
        _check_choice("importance", self.importance, IMPORTANCE)
        _check_choice("reduction", self.reduction, REDUCTION)
        _check_choice("scope", self.scope, SCOPE)
        if self.num_images < 1:
            raise RecipeError(f"prune.num_images must be at least 1, got {self.num_images}")
        if not 0 <= self.depth < inf:
            raise RecipeError(
                "prune.depth is the change of the outputs that removing blocks may cause, a share "
                f"such as 0.05, and must be >= 0, got {self.depth:g}"
            )
        if self.round_to is not None and self.round_to < 1:
            raise RecipeError(f"prune.round_to must be at least 1, got {self.round_to}")
        if not 0 <= self.min_keep <= 1:
            raise RecipeError(
                f"prune.min_keep is the fraction of each layer that stays and must be in [0, 1], "
                f"got {self.min_keep:g}"
            )

    @property
    def kind(self) -> str:
        return "prune"

    def for_target(self, target: Target) -> Prune:
        """With `target` filled in where a latency is asked for; each target then has its own."""
        if self.latency is None or self.target is not None:
            return self
        return replace(self, target=target.name)

    def __call__(self, model: nn.Module, task: Task, context: Context = Context()) -> StageResult:
        """Prune a copy of `model`. Raises RecipeError where the budget cannot be reached.

        Also raises CannotCapture, and `verify.Unverified` rather than return a wrong model.
        """
        steps_ = ("capture", "choose", "verify", "deliver")

        def show(step: str) -> None:
            context.show(Progress(f"prune: {step}", steps_.index(step), len(steps_)))

        show("capture")
        shallow = self._remove_blocks(model, task, context) if self.depth > 0 else None
        source = model if shallow is None else shallow.module
        analysis = analyze(capture(source, task.example_input))
        if shallow is None:  # else they were checked before blocks, and their layers, went
            check_globs(analysis, include=self.include, exclude=self.exclude)
        show("choose")
        scores = self.score(analysis, task, context)
        sensitivity = find_sensitivity(analysis, task, context) if self.sensitivity else None
        weigh = list if sensitivity is None else sensitivity.weigh
        if self.latency is None:
            kept, latency = self.choose(analysis, scores, shallow, weigh=weigh), None
        else:
            original = None if shallow is None else model
            kept, latency = self.keep_pace(
                analysis, scores, task, context, original=original, weigh=weigh
            )
        show("verify")
        oracle = prune_graph(analysis, kept)
        probe = make_probe(analysis)
        error = check_surgery(analysis, kept, oracle, probe)
        show("deliver")
        delivered = deliver(source, analysis, kept, oracle=oracle, probe=probe)
        facts = _facts(analysis, kept, delivered, error) | ({"latency": latency} if latency else {})
        if sensitivity is not None:
            facts["sensitivity"] = sensitivity.facts()
        facts["unranked"] = unranked(scores, analysis)
        if self.compensate and delivered.plan.slices:
            facts["compensation"] = recover_(
                delivered.module,
                oracle,
                analysis,
                kept,
                task,
                num_images=self.num_images,
                context=context,
            )
        result = StageResult(
            model=delivered.module,
            structure=delivered.plan.to_json(),
            facts=facts,
        )
        return result if shallow is None else shallow.extend(result)

    def rebuild(self, model: nn.Module, structure: Json, example_input: Tensor) -> nn.Module:
        """Give a copy of `model` the widths of an earlier pruning. Raises BadInput."""
        source = rebuild_shallow(model, structure.get("depth", {}), example_input)
        return rebuild(source, Plan.from_json(structure), example_input)

    def _remove_blocks(self, model: nn.Module, task: Task, context: Context) -> Shallow:
        name, fraction = self._budget
        return remove_blocks(
            model,
            task,
            max_error=self.depth,
            fraction=fraction,
            count=COUNTED.get(name),
            num_images=self.num_images,
            include=self.include,
            exclude=self.exclude,
            context=context,
        )

    def score(
        self, analysis: Analysis, task: Task, context: Context = Context()
    ) -> dict[Var, Tensor]:
        """How much each channel matters, (C,) for each group that is not frozen.

        A group of which the criterion knows nothing is missing, and stays whole. Raises
        RecipeError where that is true of all, or where the task lacks what the criterion needs.
        """
        criterion = IMPORTANCE[self.importance]
        evidence = gather(
            analysis, criterion.needs, task, num_images=self.num_images, context=context
        )
        scores = score(criterion, evidence, reduction=self.reduction)
        if evidence and not scores:
            raise RecipeError(
                f"prune.importance={self.importance!r} tells nothing of this network, which has "
                "none of what it goes by; choose another, such as 'hessian'"
            )
        return rank(scores, analysis, unit=criterion.unit, scope=self.scope)

    def choose(
        self,
        analysis: Analysis,
        scores: Mapping[Var, Tensor],
        shallow: Shallow | None = None,
        *,
        weigh: Weigh = list,
    ) -> Kept:
        """Which channels each group keeps within a budget that is counted. Raises RecipeError.

        The budget is a fraction of the network that came in, before blocks were removed.
        """
        name, fraction = self._budget
        if shallow is not None:
            fraction = shallow.rest_of(fraction, COUNTED[name])
        cost = COUNTED[name](analysis)
        rounds = map(weigh, self._rounds(analysis, scores, self.round_to or ROUND_TO))
        return allocate(name, fraction, rounds, cost, analysis, per=self._price)

    def keep_pace(
        self,
        analysis: Analysis,
        scores: Mapping[Var, Tensor],
        task: Task,
        context: Context = Context(),
        *,
        original: nn.Module | None = None,
        weigh: Weigh = list,
    ) -> tuple[Kept, Json]:
        """Which channels each group keeps within the latency, and how that was found out.

        Raises RecipeError where it cannot be reached, and without a target or a clock for it.
        """
        assert self.latency is not None
        if self.target is None:
            raise RecipeError(
                "prune.latency needs a target, the runtime to measure it on: set prune.target to "
                "'onnxruntime', say, or run the stage as part of a recipe"
            )
        clock = context.find_clock(self.target)
        round_to = self.round_to or clock.round_to
        return keep_pace(
            analysis,
            list(map(weigh, self._rounds(analysis, scores, round_to))),
            clock,
            asked=self.latency,
            example_input=task.example_input,
            round_to=round_to,
            per=self._price,
            original=original,
            stop_requested=context.stop_requested,
        )

    @property
    def _budget(self) -> tuple[str, float]:
        """The budget that was given, and its fraction."""
        given = ((name, getattr(self, name)) for name in BUDGETS)
        return next((name, fraction) for name, fraction in given if fraction is not None)

    @property
    def _price(self) -> Price:
        """Damage is weighed against what it saves; other importance is a rank of channels."""
        weighs_damage = IMPORTANCE[self.importance].unit == "damage" and self.scope == "global"
        return "cost" if weighs_damage or self.sensitivity else "channel"

    def _rounds(
        self, analysis: Analysis, scores: Mapping[Var, Tensor], round_to: int
    ) -> Iterator[list[Choice]]:
        for bundles in find_bundles(analysis, include=self.include, exclude=self.exclude):
            yield self._choices(analysis, bundles, scores, round_to)

    def _choices(
        self,
        analysis: Analysis,
        bundles: Sequence[Sequence[Var]],
        scores: Mapping[Var, Tensor],
        round_to: int,
    ) -> list[Choice]:
        step = steps(analysis, round_to)
        return [
            Choice(
                importance={leaf: scores[leaf] for leaf in together},
                widths=allowed_widths(
                    together[0].size,
                    step=max(step[leaf] for leaf in together),
                    min_keep=self.min_keep,
                ),
            )
            for together in bundles
            if scores.keys() >= {*together}
        ]


def _check_choice(option: str, given: str, known: Iterable[str]) -> None:
    if given not in known:
        raise RecipeError(
            f"prune.{option} must be one of {', '.join(known)}, got {given!r}"
            f"{did_you_mean(given, known)}"
        )


def _facts(analysis: Analysis, kept: Kept, delivered: Delivered, error: float) -> Json:
    size = size_after(kept)
    widths = {leaf: int(chosen.sum()) for leaf, chosen in kept.items()}
    return {
        "delivery": delivered.plan.delivery,
        "reason": delivered.reason,
        "widths": {
            layer.name: [layer.output.size, size(layer.output)] for layer in analysis.layers
        },
        "macs": [analysis.count_macs({}), analysis.count_macs(widths)],
        "parameters": [analysis.count_parameters({}), analysis.count_parameters(widths)],
        "size": [int(size_cost(analysis)(each)) for each in ({}, widths)],
        "relative_error": error,
        "frozen": analysis.frozen_shares(),
    }
