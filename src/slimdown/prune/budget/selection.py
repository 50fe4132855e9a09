"""Which groups of channels may be narrowed: what the user's globs leave, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from slimdown.capture import Analysis
from slimdown.capture.dims import Var, is_frozen, leaves
from slimdown.errors import RecipeError
from slimdown.prune.budget.widths import bundle, untied
from slimdown.prune.groups import ChannelGroup, group_channels


def find_bundles(
    analysis: Analysis, *, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[list[list[Var]]]:
    """What may be pruned, each bundle to one width: first what does no harm, then all.

    Left for the second round: channels that a layer or group norm averages over, since removing
    some changes the statistics of all that are left; the width of attention heads, where the
    module computes its scale from it; and channels that a module splits into equal parts where the
    parts cannot be kept equal. The last two only a graph can say.
    """
    selected = select(group_channels(analysis), include=include, exclude=exclude)
    spared = {leaf for dim in analysis.spared for leaf in leaves(dim)}
    harmless = selected.keys() - spared - untied(analysis.ties)
    tied = (leaf for tie in analysis.ties for dim in tie for leaf in leaves(dim))
    everything = bundle([*selected, *tied], analysis.ties)
    yield [together for together in everything if harmless.issuperset(together)]
    yield bundle(selected, analysis.ties)


def check_globs(analysis: Analysis, *, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise RecipeError for a glob that matches nothing in the network as the user knows it."""
    groups = group_channels(analysis)
    names = {layer for group in groups.values() for layer in group.layers}
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not matches(names, (pattern,)):
                raise RecipeError(
                    f"prune.{option}: {pattern!r} matches no layer; the layers that make "
                    f"channels are {', '.join(sorted(names))}"
                )


def select(
    groups: Mapping[Var, ChannelGroup], *, include: Sequence[str], exclude: Sequence[str]
) -> dict[Var, ChannelGroup]:
    """The groups that may be pruned and that the user's globs leave in."""
    return {
        leaf: group
        for leaf, group in groups.items()
        if not is_frozen(leaf)
        and matches(group.layers, include)
        and not matches(group.layers, exclude)
    }


def matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether any of the names fits any of the globs."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
