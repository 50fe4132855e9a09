"""Making good for what was removed, without labels and before any training.

Layer after layer, whatever reads pruned channels is fitted by ridge regression to what the
original gives on its own stream, from what it reads on the pruned and already corrected one
(Luo 2017, arXiv:1707.06342; He 2017, arXiv:1707.06168; Zhang 2026, arXiv:2602.05243). The best
constant is part of the solution: it puts the mean of what was removed into the bias (Berisha 2025,
arXiv:2507.12988), or into the mean that the next batch norm subtracts. Batch norms get the
statistics of the pruned stream, and weights that make up for the change.

Both graphs are walked side by side, node by node, each over all images, so that the whole costs
two forward passes. Some images are held out: no weight is learned from them; they tell how
strongly each layer is corrected, and whether at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimdown.capture import Analysis, has_dynamic_batch
from slimdown.capture.analysis import find_tensor
from slimdown.capture.call import arguments_of
from slimdown.capture.dims import Kept, mask
from slimdown.core import Context, Json, Progress, Task
from slimdown.errors import Interrupted, RecipeError
from slimdown.images import take_images
from slimdown.prune.compensation.fitting import Samples, fit_layer
from slimdown.prune.compensation.following import (
    Following,
    count_uses,
    find_constant,
    find_following,
    is_batch_norm,
)
from slimdown.prune.compensation.norms import (
    Statistics,
    drift,
    renew,
    restore_statistics,
    statistics_of,
)
from slimdown.prune.compensation.readers import Reader, reader_of
from slimdown.prune.compensation.streams import Images, Stream, arrange
from slimdown.prune.plan import slices_of
from slimdown.prune.probe import batched_outputs, in_rows, require_finite
from slimdown.prune.running import Run
from slimdown.prune.sites import Site, find_sites
from slimdown.prune.surgery import changed_arguments
from slimdown.zeros import is_sparse

MIN_POSITIONS = 2**13
POSITIONS_PER_INPUT = 16
"""So many positions for each input of a layer are enough: neighbors tell almost the same."""
MAX_VALUES = 2**25
"""Of all patches of one layer: 128 MB."""


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """What compensation did."""

    tensors: tuple[str, ...]
    """The names of the state's tensors that it changed."""
    facts: Json


def compensate_(
    pruned: GraphModule,
    analysis: Analysis,
    kept: Kept,
    images: Images,
    *,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Compensation:
    """Correct the weights of a pruned graph, which `prune_graph` made of the analyzed one.

    Nothing is changed where the outputs for held-out images would be no better. The same images,
    of which `arrange` makes batches, give the same weights.
    """
    start = time.monotonic()
    saved = {name: tensor.detach().clone() for name, tensor in _tensors(pruned).items()}
    walk = _Walk(pruned, analysis, kept, images)
    with torch.no_grad():
        before = walk.run_held_out()
        originals, after = walk.run(show)
    for output in originals:
        require_finite(output)
    sizes = [len(batch) for batch in (*images.held_out, *images.train)]
    errors = [_output_error(results, originals, sizes) for results in (before, after)]
    helps = errors[1] < errors[0]
    if not helps:
        _copy_(pruned, {name: saved[name] for name in walk.changed})
    return Compensation(
        tensors=tuple(sorted(walk.changed)) if helps else (),
        facts={
            "num_images": sum(map(len, images.train)),
            "num_held_out": sum(map(len, images.held_out)),
            "mirrored": images.mirrored,
            "output_error": errors,
            "layers": walk.outcomes if helps else {},
            "skipped": walk.skipped,
            "seconds": time.monotonic() - start,
        },
    )


def recover_(
    module: nn.Module,
    pruned: GraphModule,
    analysis: Analysis,
    kept: Kept,
    task: Task,
    *,
    num_images: int,
    context: Context = Context(),
) -> Json:
    """Compensate the pruned graph with a task's calibration images, and `module` alike.

    `module` is the graph itself, or another form of it with the same names. Returns facts. Raises
    RecipeError where there are fewer than two images.
    """
    taken = take_images(task.calibration_batches(), num_images)
    count = sum(map(len, taken))
    images = arrange(analysis, taken, mirror=getattr(task, "flip", True)) if count > 1 else None
    if images is None or not images.held_out:
        least = 2 * (1 if has_dynamic_batch(analysis.graph_module) else analysis.batch_size)
        raise RecipeError(
            f"prune.compensate needs at least {least} calibration images, got {count}; give the "
            "data a training or a calibration split, raise prune.num_images, or set "
            "prune.compensate to false"
        )

    def show(done: int, total: int) -> None:
        context.show(Progress("prune: compensate", done, total))
        if context.stop_requested():
            raise Interrupted("stopped while compensating; the next run begins this step anew")

    done = compensate_(pruned, analysis, kept, images, show=show)
    if module is not pruned:
        _copy_(module, {name: find_tensor(pruned, name) for name in done.tensors})
    return done.facts


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, tied ones under all their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _copy_(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    own = _tensors(module)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


class _Walk:
    """Both graphs side by side; the pruned one's layers are corrected before they run."""

    def __init__(self, pruned: GraphModule, analysis: Analysis, kept: Kept, images: Images) -> None:
        self.pruned = pruned
        self.analysis = analysis
        self.kept = kept
        batches = (*images.held_out, *images.train)
        self.num_held_out = len(images.held_out)
        self.old = Stream(analysis.graph_module, batches)
        self.new = Stream(pruned, batches)
        self.twins = dict(zip(analysis.graph_module.graph.nodes, pruned.graph.nodes, strict=True))
        self.originals = {new: old for old, new in self.twins.items()}
        self.uses = count_uses(pruned)
        self.generator = torch.Generator().manual_seed(0)
        self.outcomes: dict[str, Json] = {}
        self.skipped: dict[str, str] = {}
        self.changed: set[str] = set()
        self.corrected: set[Node] = set()

    def run_held_out(self) -> list[Any]:
        """The outputs of the pruned graph as it is, for the held-out batches."""
        run = Run(self.pruned)
        return [run.run(batch) for batch in self.new.batches[: self.num_held_out]]

    def run(self, show: Callable[[int, int], None]) -> tuple[list[Any], list[Any]]:
        """Correct layer after layer; all outputs of the original, the pruned one's for held-out."""
        sites = {site.node: site for site in find_sites(self.analysis)}
        touched = self._touched()
        for index, (old, new) in enumerate(self.twins.items()):
            if new in touched and is_batch_norm(new):
                self._restore_norm(old, new)
            self.old.step(old)
            if old in sites and self.twins[sites[old].input] in touched:
                self._correct(sites[old], new)
            if new in touched and is_batch_norm(new):
                self._renew_norm(new)
            self.new.step(new)
            show(index, len(self.twins))
        after = [values[new] for values in self.new.values[: self.num_held_out]]
        return [values[old] for values in self.old.values], after

    def _touched(self) -> set[Node]:
        """The nodes of the pruned graph whose values may differ from the original's."""
        slices = slices_of(self.analysis, self.kept)
        edited = {self.twins[edit.node] for edit, _ in changed_arguments(self.analysis, self.kept)}
        touched: set[Node] = set()
        for node in self.pruned.graph.nodes:
            is_sliced = node.op == "get_attr" and node.target in slices
            if is_sliced or node in edited or touched.intersection(node.all_input_nodes):
                touched.add(node)
        return touched

    def _restore_norm(self, old: Node, new: Node) -> None:
        """Give a batch norm that reads no corrected layer the statistics of its input."""
        arguments = arguments_of(new)
        source, statistics = arguments["input"], ("running_mean", "running_var")
        names = [str(arguments[key].target) for key in statistics if arguments[key] is not None]
        if source in self.corrected or [self.uses.get(name) for name in names] != [1, 1]:
            return
        mean, variance = (find_tensor(self.pruned, name) for name in names)
        channels = mask(self.analysis.shapes[old][1], self.kept).nonzero().flatten()
        channels = channels.to(mean.device)
        ours = [values[source] for values in self.new.values]
        theirs = [values[self.originals[source]][:, channels] for values in self.old.values]
        eps = float(arguments["eps"])
        first = self.num_held_out
        running = Statistics(mean=mean.double().cpu(), variance=variance.double().cpu() + eps)
        restored = restore_statistics(
            statistics_of(theirs[first:]), statistics_of(ours[first:]), running
        )
        # Noise adds to the variance; to divide by that is not always closer to the original.
        shifted = replace(restored, variance=running.variance)
        best = min(
            (running, shifted, restored),
            key=lambda each: drift(theirs[:first], ours[:first], running, each),
        )
        if best is not running:
            mean.copy_(best.mean)
            variance.copy_((best.variance - eps).clamp_min(0))
            self.changed.update(names)

    def _renew_norm(self, node: Node) -> None:
        """Tell a batch norm the statistics of what it reads now; what it gives stays the same.

        In training it takes those of each batch: only so does training begin with what is here.
        """
        arguments = arguments_of(node)
        names = [arguments[key] for key in ("running_mean", "running_var", "weight", "bias")]
        names = [str(each.target) for each in names if each is not None]
        if [self.uses.get(name) for name in names] != [1] * 4:
            return
        mean, variance, weight, bias = (find_tensor(self.pruned, name) for name in names)
        seen = [values[arguments["input"]] for values in self.new.values[self.num_held_out :]]
        running = Statistics(mean=mean.double().cpu(), variance=variance.double().cpu())
        scale, shift = renew(running, found := statistics_of(seen), eps=float(arguments["eps"]))
        bias += weight * shift.to(weight)
        weight *= scale.to(weight)
        mean.copy_(found.mean)
        variance.copy_(found.variance)
        self.changed.update(names)

    def _correct(self, site: Site, node: Node) -> None:
        name = site.weight.removesuffix(".weight")
        weight_node = arguments_of(node)["weight"]
        if weight_node.op != "get_attr":
            self.skipped[name] = "its weight is computed, by a quantizer or a parametrization"
        elif self.uses.get(str(weight_node.target)) != 1:
            self.skipped[name] = "its weight is used more than once"
        elif is_sparse(weight := find_tensor(self.pruned, weight_node.target)):
            self.skipped[name] = "it is sparse, which a regression would undo"
        else:
            self._correct_weight(name, site, node, weight)

    def _correct_weight(self, name: str, site: Site, node: Node, weight: Tensor) -> None:
        reader = reader_of(node, weight)
        channels = mask(site.makes, self.kept).nonzero().flatten()
        following = find_following(
            self.pruned,
            node,
            len(channels),
            is_known=lambda other: self._is_like(site.node, other),
        )
        constant = find_constant(node, self.uses)
        samples = [
            self._sample(index, site, node, reader=reader, channels=channels, following=following)
            for index in range(len(self.new.batches))
        ]
        fitted = fit_layer(
            samples[self.num_held_out :],
            samples[: self.num_held_out],
            reader=reader,
            following=following,
            intercept=constant is not None,
        )
        correction = fitted.correction
        self.outcomes[name] = {
            "error": [fitted.error_before, fitted.error_after],
            "corrected": "nothing" if correction is None else correction.scope,
            "intercept": constant is not None,
        }
        self.corrected.add(node)
        if correction is None:
            return
        weight += reader.weight(correction.weight).to(weight)
        self.changed.add(str(arguments_of(node)["weight"].target))
        if constant is not None:
            tensor = find_tensor(self.pruned, constant.name)
            tensor += constant.sign * correction.bias.flatten().to(tensor)
            self.changed.add(constant.name)

    def _is_like(self, layer: Node, other: Node) -> bool:
        """Whether a node of the pruned graph is at hand in both streams, shaped as the layer."""
        twin = self.originals[other]
        if not (self.old.has(twin) and self.new.has(other)):
            return False
        theirs, ours = (self.old.values[0][node] for node in (twin, layer))
        return isinstance(theirs, Tensor) and theirs.shape == ours.shape

    def _sample(
        self,
        index: int,
        site: Site,
        node: Node,
        *,
        reader: Reader,
        channels: Tensor,
        following: Following,
    ) -> Samples:
        """What the layer reads and gives at some positions of one batch, and what it should."""
        old, new = self.old.values[index], self.new.values[index]
        arguments = arguments_of(node)
        given = old[site.node]
        weight = find_tensor(self.pruned, arguments["weight"].target).detach()
        matrix = reader.matrix(weight.cpu()).float()
        count = self._num_positions(matrix)
        positions = torch.randperm(given.numel() // site.makes.size, generator=self.generator)
        positions = positions[:count].to(given.device)

        def rows(value: Tensor) -> Tensor:
            return reader.outputs(value, positions).float().cpu()

        x = reader.patches(new[arguments["input"]], positions).float().cpu()
        y = reader.ungrouped(x @ matrix)
        if arguments["bias"] is not None:
            y = y + new[arguments["bias"]].float().cpu()
        skip = following.skip
        return Samples(
            x=x,
            y=y,
            skip=None if skip is None else rows(new[skip]),
            total=following.add_up(
                rows(given)[:, channels],
                None if skip is None else rows(old[self.originals[skip]])[:, channels],
            ),
        )

    def _num_positions(self, matrix: Tensor) -> int:
        """How many positions of each batch are enough for a layer of (G, D, K) weights."""
        groups, size, _ = matrix.shape
        enough = max(MIN_POSITIONS, POSITIONS_PER_INPUT * size)
        return math.ceil(min(enough, MAX_VALUES // (groups * size)) / len(self.new.batches))


def _output_error(results: Sequence[Any], originals: Sequence[Any], sizes: Sequence[int]) -> float:
    """The mean squared error of the first outputs over the variance of all original ones."""
    which = batched_outputs(originals, sizes)

    def rows(outputs: Sequence[Any]) -> Iterator[Tensor]:
        for output, size in zip(outputs, sizes, strict=False):
            yield in_rows(output, size, which).double().cpu()

    pairs = zip(rows(results), rows(originals), strict=False)
    errors = torch.cat([(a - b).square().sum(1) for a, b in pairs])
    spread = statistics_of(rows(originals)).variance.sum()
    return float(errors.mean()) / max(float(spread), 1e-30)
