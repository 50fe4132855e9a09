"""The attributes of a user's modules that tell sizes, found from the graph.

In two ways: torch's own layers have known attributes for the sizes of their weights; any other
module that ran an operator whose constants changed (those of a `view`, a `split`, a padding) gets
the new number wherever it holds the old one. What is found wrongly does no harm: the edited module
is compared with the pruned graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from torch import nn

from slimdown.capture import Analysis
from slimdown.capture.call import modules_of
from slimdown.capture.dims import Kept
from slimdown.prune.plan import Attributes, slices_of
from slimdown.prune.surgery import changed_arguments

Size: TypeAlias = int | tuple[int, ...]

Pair: TypeAlias = tuple[Size, Size]
"""A number or several, before and after."""


def guess_attributes(model: nn.Module, analysis: Analysis, kept: Kept) -> Iterator[Attributes]:
    """The sets of attributes to try, the most careful first; no set comes twice.

    Careful: a number is taken only where all that it stood for became the same new number. Bold: a
    number that changed comes before an equal one that did not: 3 heads of queries, keys and
    values. Wide: the modules around may hold the number too, or the product or sum of several. The
    last set leaves all but torch's own layers as they are.
    """
    modules = dict(model.named_modules())
    own = {name for name, module in modules.items() if is_torchs(module)}
    near = _replaced_constants(analysis, kept, wide=False)
    known = _sizes_of_layers(modules, near, analysis, kept)
    guesses = (
        _guess(modules, near, bold=False),
        _guess(modules, near, bold=True),
        _guess(modules, _replaced_constants(analysis, kept, wide=True), bold=True),
        _guess({name: modules[name] for name in own}, near, bold=False),
    )
    tried: list[Attributes] = []
    for guess in guesses:
        names = [*known, *(name for name in guess if name not in known)]
        merged = {name: {**guess.get(name, {}), **known.get(name, {})} for name in names}
        if merged not in tried:
            tried.append(merged)
            yield merged


def is_torchs(module: nn.Module) -> bool:
    """Whether a module is one of torch's own."""
    return type(module).__module__.startswith("torch.nn")


def _guess(
    modules: Mapping[str, nn.Module], replaced: Mapping[str, Sequence[Pair]], *, bold: bool
) -> dict[str, dict[str, Size]]:
    guess: dict[str, dict[str, Size]] = {}
    for name in replaced:  # in the order of the graph: a set's would differ from run to run
        if name not in modules:
            continue
        pairs = [pair for pair in replaced[name] if not bold or pair[0] != pair[1]]
        if found := _attributes_holding(modules[name], pairs):
            guess[name] = found
    return guess


def _replaced_constants(analysis: Analysis, kept: Kept, *, wide: bool) -> dict[str, list[Pair]]:
    """Module name -> the constants that its operators had, each with the one that it gets."""
    replaced: dict[str, list[Pair]] = {}
    for edit, after in changed_arguments(analysis, kept):
        before = edit.arguments(lambda dim: dim.size)
        pairs = [pair for name in after for pair in _constants(before[name], after[name])]
        if wide:
            pairs += [pair for name in after for pair in _combined(before[name], after[name])]
        owners = modules_of(edit.node) or [""]
        for owner in owners if wide else owners[-1:]:
            replaced.setdefault(owner.partition("@")[0], []).extend(pairs)
    if wide:  # a module that is asked for its weights, rather than called, ran no operator itself
        for tensor, axes in slices_of(analysis, kept).items():
            shape = analysis.tensor(tensor).shape
            pairs = [(shape[axis], len(chosen)) for axis, chosen in axes.items()]
            owner = tensor
            while owner:
                owner = owner.rpartition(".")[0]
                replaced.setdefault(owner, []).extend(pairs)
    return replaced


def _constants(before: Any, after: Any) -> Iterator[Pair]:
    """A constant and its new value; of a list, the whole and each number in it."""
    if isinstance(before, int) and isinstance(after, int):
        yield before, after
    elif isinstance(before, list) and isinstance(after, list):
        numbers = [each for pair in zip(before, after, strict=True) for each in _constants(*pair)]
        if len(numbers) == len(before):  # else some depend on the batch
            yield tuple(before), tuple(after)
        yield from numbers


def _combined(before: Any, after: Any) -> Iterator[Pair]:
    """What neighbors in a list make together: heads times their width, the parts of a split."""
    if not isinstance(before, list) or not isinstance(after, list):
        return
    for (a, new_a), (b, new_b) in pairwise(zip(before, after, strict=True)):
        if all(isinstance(each, int) for each in (a, b, new_a, new_b)):
            yield a * b, new_a * new_b
            yield a + b, new_a + new_b


def _attributes_holding(module: nn.Module, replaced: Sequence[Pair]) -> dict[str, Size]:
    news: dict[Size, set[Size]] = {}
    for before, after in replaced:
        news.setdefault(before, set()).add(after)
    found: dict[str, Size] = {}
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or isinstance(value, bool):
            continue
        old = tuple(value) if isinstance(value, list | tuple) else value
        is_size = all(isinstance(n, int) for n in (old if isinstance(old, tuple) else (old,)))
        candidates = news.get(old, set()) if is_size else set()
        if len(candidates) == 1 and (new := next(iter(candidates))) != old:
            found[attribute] = new
    return found


def _sizes_of_layers(
    modules: Mapping[str, nn.Module],
    replaced: Mapping[str, Sequence[Pair]],
    analysis: Analysis,
    kept: Kept,
) -> dict[str, dict[str, Size]]:
    """What torch's own layers say of their weights' new shapes, by module."""
    found: dict[str, dict[str, Size]] = {}
    for tensor, axes in slices_of(analysis, kept).items():
        name, kind = _owner(tensor)
        if name in modules and kind in ("weight", "running_mean"):
            module, whole = modules[name], analysis.tensor(tensor)
            shape = [len(axes.get(axis, range(size))) for axis, size in enumerate(whole.shape)]
            changed = _attributes_holding(module, replaced.get(name, []))
            groups = changed.get("groups", getattr(module, "groups", 1))
            if sizes := _layer_sizes(module, shape, groups=groups):
                found.setdefault(name, {}).update(sizes)
    return found


def _owner(tensor: str) -> tuple[str, str]:
    """The module and the kind of a tensor of the state, through weight norm and its kin."""
    parametrized, _, part = tensor.partition(".parametrizations.")
    if part:  # original1 has the weight's shape, original0 is its norm
        return parametrized, part.split(".")[0] if part.endswith("original1") else ""
    name, _, kind = tensor.rpartition(".")
    return name, "weight" if kind == "weight_v" else kind


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
