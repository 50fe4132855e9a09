"""Structural pruning as a stage of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from slimdown.capture import Analysis, analyze, capture
from slimdown.capture.dims import Kept, Var, is_frozen, leaves
from slimdown.core import Context, Json, Progress, StageResult, Target, Task
from slimdown.errors import RecipeError
from slimdown.prune.budget import (
    Choice,
    Cost,
    allowed_widths,
    bundle,
    choose_widths,
    keep_most_important,
    normalize,
    steps,
    untied,
)
from slimdown.prune.delivery import Delivered, deliver, edit_module
from slimdown.prune.groups import ChannelGroup, group_channels
from slimdown.prune.importance import IMPORTANCE, gather_weights
from slimdown.prune.plan import Plan, kept_from_slices
from slimdown.prune.probe import make_probe
from slimdown.prune.surgery import prune_graph, size_after
from slimdown.prune.verify import check_surgery


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Remove the least important channels until a share of the MACs or parameters is left.

    The channels that must go together are found by the algebra of dimensions, so no layer needs
    to be ignored by hand. The result is verified (see `prune.verify`) and comes as the user's own
    module where that can be edited, and as a graph module otherwise.
    """

    macs: float | None = None
    """The fraction of the multiply-accumulates to keep, in (0, 1]; this or `parameters`."""
    parameters: float | None = None
    """The fraction of the parameters to keep, in (0, 1]."""
    importance: Literal["l1", "l2"] = "l2"
    """How much a channel matters: see `prune.importance`."""
    round_to: int = 8
    """Widths are whole multiples of this; narrow layers go in finer steps."""
    min_keep: float = 0.1
    """The fraction of each group of channels that stays in any case, in [0, 1]."""
    include: tuple[str, ...] = ("*",)
    """Globs over layer names: only channels that such a layer makes are removed."""
    exclude: tuple[str, ...] = ()
    """Globs over layer names: no channel that such a layer makes is removed."""

    def __post_init__(self) -> None:
        if (self.macs is None) == (self.parameters is None):
            raise RecipeError(
                "prune needs exactly one of macs and parameters, the fraction to keep, "
                f"got macs={self.macs} and parameters={self.parameters}"
            )
        for name, fraction in (("macs", self.macs), ("parameters", self.parameters)):
            if fraction is not None and not 0 < fraction <= 1:
                raise RecipeError(
                    f"prune.{name} is the fraction of {'MACs' if name == 'macs' else name} to "
                    f"keep and must be in (0, 1], got {fraction:g}"
                )
        if self.importance not in IMPORTANCE:
            raise RecipeError(
                f"prune.importance must be one of {', '.join(IMPORTANCE)}, got {self.importance!r}"
            )
        if self.round_to < 1:
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
        return self

    def __call__(self, model: nn.Module, task: Task, context: Context = Context()) -> StageResult:
        """Prune a copy of `model`. Raises RecipeError where the budget cannot be reached.

        Also raises CannotCapture, and `verify.Unverified` rather than return a wrong model.
        """
        steps_ = ("capture", "choose", "verify", "deliver")

        def show(step: str) -> None:
            context.show(Progress(f"prune: {step}", steps_.index(step), len(steps_)))

        show("capture")
        analysis = analyze(capture(model, task.example_input))
        show("choose")
        kept = self.choose(analysis)
        show("verify")
        oracle = prune_graph(analysis, kept)
        probe = make_probe(analysis)
        error = check_surgery(analysis, kept, oracle, probe)
        show("deliver")
        delivered = deliver(model, analysis, kept, oracle=oracle, probe=probe)
        return StageResult(
            model=delivered.module,
            structure=delivered.plan.to_json(),
            facts=_facts(analysis, kept, delivered, error),
        )

    def rebuild(self, model: nn.Module, structure: Json, example_input: Tensor) -> nn.Module:
        """Give a copy of `model` the widths of an earlier pruning. Raises BadInput."""
        plan = Plan.from_json(structure)
        if plan.delivery == "in_place":
            return edit_module(model, plan)
        analysis = analyze(capture(model, example_input))
        return prune_graph(analysis, kept_from_slices(analysis, plan.slices))

    def choose(self, analysis: Analysis) -> Kept:
        """Which channels each group keeps within the budget. Raises RecipeError."""
        name, fraction, cost = self._budget(analysis)
        whole = cost({})
        for bundles in self._bundles(analysis):
            choices = self._choices(analysis, bundles)
            widths = choose_widths(choices, cost, limit=int(fraction * whole))
            if widths is not None:
                return keep_most_important(choices, widths)
        narrowest = {leaf: n for choice in choices for leaf, n in choice.narrowest().items()}
        frozen = [f"{why} {share:.0%}" for why, share in analysis.frozen_shares().items()]
        raise RecipeError(
            f"prune.{name}={fraction:g} cannot be reached: the smallest reachable fraction is "
            f"{cost(narrowest) / whole:.3f} with min_keep={self.min_keep:g}, "
            f"round_to={self.round_to} and the layers that may be pruned; ask for more, lower "
            "min_keep or round_to, or exclude fewer layers. What keeps channels from being "
            f"removed, with the share of parameters concerned: {', '.join(frozen[:5]) or 'nothing'}"
        )

    def _bundles(self, analysis: Analysis) -> Iterator[list[list[Var]]]:
        """What may be pruned, each bundle to one width: first what does no harm, then all.

        Left for the second round: channels that a layer or group norm averages over, since
        removing some changes the statistics of all that are left; the width of attention heads,
        where the module computes its scale from it; and channels that a module splits into equal
        parts where the parts cannot be kept equal. The last two only a graph can say.
        """
        selected = self._selected(group_channels(analysis))
        spared = {leaf for dim in analysis.spared for leaf in leaves(dim)}
        harmless = selected.keys() - spared - untied(analysis.ties)
        tied = (leaf for tie in analysis.ties for dim in tie for leaf in leaves(dim))
        everything = bundle([*selected, *tied], analysis.ties)
        yield [together for together in everything if harmless.issuperset(together)]
        yield bundle(selected, analysis.ties)

    def _budget(self, analysis: Analysis) -> tuple[str, float, Cost]:
        if self.macs is not None:
            return "macs", self.macs, analysis.count_macs
        assert self.parameters is not None
        return "parameters", self.parameters, analysis.count_parameters

    def _choices(self, analysis: Analysis, bundles: Sequence[Sequence[Var]]) -> list[Choice]:
        weights = gather_weights(analysis)
        step = steps(analysis, self.round_to)
        criterion = IMPORTANCE[self.importance]
        return [
            Choice(
                importance={leaf: normalize(criterion(weights[leaf])) for leaf in together},
                widths=allowed_widths(
                    together[0].size,
                    step=max(step[leaf] for leaf in together),
                    min_keep=self.min_keep,
                ),
            )
            for together in bundles
        ]

    def _selected(self, groups: Mapping[Var, ChannelGroup]) -> dict[Var, ChannelGroup]:
        """The groups that may be pruned and that the user's globs leave in."""
        names = {layer for group in groups.values() for layer in group.layers}
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not _matches(names, (pattern,)):
                    raise RecipeError(
                        f"prune.{option}: {pattern!r} matches no layer; the layers that make "
                        f"channels are {', '.join(sorted(names))}"
                    )
        return {
            leaf: group
            for leaf, group in groups.items()
            if not is_frozen(leaf)
            and _matches(group.layers, self.include)
            and not _matches(group.layers, self.exclude)
        }


def _matches(names: Iterable[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


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
        "relative_error": error,
        "frozen": analysis.frozen_shares(),
    }
