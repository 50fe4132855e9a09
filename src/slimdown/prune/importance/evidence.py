"""What is known of each group's channels: from the weights, and from running images.

A criterion of `prune.importance` says what it needs; only that is gathered. Images run through
the captured graph a few at a time, so that memory does not grow with their number and the user's
model is never touched. The same seed gives the same evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from slimdown.capture import Analysis
from slimdown.capture.call import arguments_of, operator_name
from slimdown.capture.dims import Dim, Var, is_frozen, leaves, rows_of_leaves
from slimdown.core import Context, Task, batch_device
from slimdown.prune.importance.gates import Derivatives, differentiate, find_gates
from slimdown.prune.importance.lookout import Lookout, task_loss
from slimdown.prune.importance.observe import Moments, observe
from slimdown.prune.importance.projection import project
from slimdown.prune.probe import require_finite_state
from slimdown.prune.sites import Site, find_products, find_sites

Need: TypeAlias = Literal["noise", "weights", "scales", "inputs", "loss_gates", "output_gates"]
"""What a criterion may ask for."""

NEEDS_IMAGES: frozenset[Need] = frozenset({"inputs", "loss_gates", "output_gates"})


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one layer reads of a group over all images and places; q values for each channel.

    q is 1, but for channels that are flattened with other dims before they are read.
    """

    weight: Tensor
    """(C, q, n): all weights that multiply a value; a one where it is no layer that reads it."""
    mean: Tensor
    """(C, q)."""
    mean_abs: Tensor
    """(C, q)."""
    variance: Tensor
    """(C, q)."""

    @property
    def root_mean_square(self) -> Tensor:
        """(C, q)."""
        return (self.variance + self.mean.square()).sqrt()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one group of C channels; empty: not asked for, or not there.

    Where no layer reads the channels (the width of queries and keys, which only a product of
    activations takes), what their makers give stands for what readers get.
    """

    noise: Tensor | None = None
    """Uniform in [0, 1), (C,)."""
    makers: Sequence[Tensor] = ()
    """The weights of each layer that makes the channels, (C, …): views, where it can be."""
    readers: Sequence[Tensor] = ()
    """The weights of each layer that reads them, (C, …)."""
    scales: Sequence[Tensor] = ()
    """The factors of each batch norm that they run through, (C, …)."""
    inputs: Sequence[Inputs] = ()
    """What each layer reads."""
    loss_gates: Derivatives | None = None
    """Of the task's loss, or of random projections of the outputs where there are no labels; by
    gates that close to zero."""
    output_gates: Derivatives | None = None
    """Of random projections of the outputs, by gates that close to the channel's mean: the mean of
    what is removed can be given to the bias of what reads it."""

    @property
    def weights(self) -> Sequence[Tensor]:
        """The weights of all layers that make or read the channels, (C, …) each."""
        return (*self.makers, *self.readers)


def gather(
    analysis: Analysis,
    needs: Iterable[Need],
    task: Task,
    *,
    num_images: int,
    context: Context = Context(),
) -> dict[Var, Evidence]:
    """The evidence of each group of channels that is not frozen, of up to `num_images` images.

    Raises RecipeError where images are needed and there are none, or no derivatives, and BadInput
    where weights or outputs are no numbers.
    """
    require_finite_state(analysis)
    wanted = frozenset(needs)
    sites = [*find_sites(analysis), *find_products(analysis)]
    found: dict[str, Mapping[Var, Any]] = {}
    if "noise" in wanted:
        found["noise"] = draw_noise(analysis, context.seed)
    if "weights" in wanted:
        found["makers"], found["readers"] = gather_weights(analysis, sites)
    if "scales" in wanted:
        found["scales"] = gather_scales(analysis)
    if wanted & NEEDS_IMAGES:
        lookout = Lookout(analysis, task, num_images, context)
        with _own_randomness(analysis, context.seed):
            found |= _gather_from_images(analysis, wanted, sites, lookout)
    return {
        leaf: Evidence(**{name: of[leaf] for name, of in found.items() if leaf in of})
        for leaf in analysis.channels
        if not is_frozen(leaf)
    }


@contextmanager
def _own_randomness(analysis: Analysis, seed: int) -> Iterator[None]:
    """So that a task's augmentation draws no number of the run's, on no device that it uses."""
    device = batch_device(analysis.graph_module)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds all GPUs
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def _gather_from_images(
    analysis: Analysis, wanted: frozenset[Need], sites: Sequence[Site], lookout: Lookout
) -> dict[str, Mapping[Var, Any]]:
    found: dict[str, Mapping[Var, Any]] = {}
    gates = find_gates(analysis, sites)
    if "inputs" in wanted:
        found["inputs"] = gather_inputs(analysis, sites, lookout.images("look at activations"))
    if "loss_gates" in wanted:
        labeled = lookout.has_labels()
        loss = task_loss(lookout.task) if labeled else project(lookout.context.seed)
        batches = lookout.labeled() if labeled else lookout.unlabeled()
        found["loss_gates"] = differentiate(analysis, gates, batches, loss, means={})
    if "output_gates" in wanted:
        images = lookout.images("look at activations", derivatives=True)
        seen = observe(analysis.graph_module, {site.input: site.axis for site in sites}, images)
        found["output_gates"] = differentiate(
            analysis,
            gates,
            lookout.unlabeled(),
            project(lookout.context.seed),
            means={node: moments.mean for node, moments in seen.items()},
        )
    return found


# ------------------------------------------------------------------------------ from the weights

Rows: TypeAlias = dict[Var, list[Tensor]]
"""For each leaf, (leaf.size, …) of each tensor that has its channels."""


def draw_noise(analysis: Analysis, seed: int) -> dict[Var, Tensor]:
    """Uniform in [0, 1), (leaf.size,), for each channel leaf."""
    generator = torch.Generator().manual_seed(seed)
    return {leaf: torch.rand(leaf.size, generator=generator) for leaf in analysis.channels}


def gather_weights(analysis: Analysis, sites: Sequence[Site]) -> tuple[Rows, Rows]:
    """The weights that make each leaf's channels, and those that read them.

    Biases and norms are left out: they say how large an activation is, not how much it matters.
    A weight that several layers use counts once.
    """
    made, read = Rows(), Rows()
    first_site = {site.weight: site for site in reversed(sites)}
    layers = {id(analysis.tensor(layer.weight)): layer for layer in reversed(analysis.layers)}
    for layer in reversed(layers.values()):
        weight = analysis.tensor(layer.weight).detach().float().cpu()
        site = first_site.get(layer.weight)
        if site is not None:
            _deal_(made, site.makes, site.making_rows(weight))
            _deal_(read, site.reads, site.reading_rows(weight), without=site.passed)
            continue
        makes = {*leaves(layer.output)}
        for axis, dim in enumerate(analysis.tensors[layer.weight]):
            rows = weight.movedim(axis, 0)
            _deal_(made, dim, rows, without={*leaves(dim)} - makes)
            _deal_(read, dim, rows, without=makes)
    return made, read


def gather_scales(analysis: Analysis) -> Rows:
    """The factors of the batch norms that each leaf's channels run through."""
    scales = Rows()
    norms = (
        arguments_of(node)["weight"]
        for node in analysis.graph_module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and operator_name(node) == "aten::batch_norm"
    )
    names = dict.fromkeys(str(norm.target) for norm in norms if isinstance(norm, Node))
    for name in names:
        if name in analysis.tensors:
            scale = analysis.tensor(name).detach().float().cpu()
            _deal_(scales, analysis.tensors[name][0], scale)
    return scales


def _deal_(to: Rows, dim: Dim, rows: Tensor, *, without: Iterable[Var] = ()) -> None:
    """Add each leaf's share of (dim.size, …) to what it has."""
    for leaf, share in rows_of_leaves(dim, rows):
        if leaf not in without:
            to.setdefault(leaf, []).append(share)


# --------------------------------------------------------------------------- from running images


def gather_inputs(
    analysis: Analysis, sites: Sequence[Site], images: Iterable[Tensor]
) -> dict[Var, list[Inputs]]:
    """What each layer reads of each leaf, over the images."""
    read = {leaf for site in sites for leaf in site.read_leaves}
    unread = [site for site in sites if not read.issuperset(leaves(site.makes))]
    points = {site.input: site.axis for site in sites} | {site.node: site.axis for site in unread}
    seen = observe(analysis.graph_module, points, images)
    found: dict[Var, list[Inputs]] = {}
    for site in sites:
        weight = analysis.tensor(site.weight).detach().float().cpu()
        for leaf, inputs in _split(site.reads, site.reading_rows(weight), seen[site.input]):
            if leaf not in site.passed:
                found.setdefault(leaf, []).append(inputs)
    for site in unread:
        ones = torch.ones(site.makes.size, 1)
        for leaf, inputs in _split(site.makes, ones, seen[site.node]):
            if leaf not in read:
                found.setdefault(leaf, []).append(inputs)
    return found


def _split(dim: Dim, weight: Tensor, moments: Moments) -> Iterator[tuple[Var, Inputs]]:
    """Each leaf's share of what is read: weight (dim.size, n), moments (dim.size,)."""
    parts = (moments.mean, moments.mean_abs, moments.variance)
    of_leaves = (rows_of_leaves(dim, each) for each in (*parts, weight))
    for (leaf, mean), (_, mean_abs), (_, variance), (_, rows) in zip(*of_leaves, strict=True):
        yield (
            leaf,
            Inputs(
                weight=rows.reshape(leaf.size, mean.numel() // leaf.size, -1),
                mean=mean.reshape(leaf.size, -1),
                mean_abs=mean_abs.reshape(leaf.size, -1),
                variance=variance.reshape(leaf.size, -1),
            ),
        )
