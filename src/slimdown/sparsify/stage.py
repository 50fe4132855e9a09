"""Sparsify: the stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimdown.capture import capture, find_tensor
from slimdown.core import Context, Json, Progress, StageResult, Target, Task
from slimdown.errors import BadInput, Interrupted, RecipeError
from slimdown.images import as_input, take_images
from slimdown.prune.budget.selection import matches
from slimdown.sparsify.gains import describe_gains
from slimdown.sparsify.layers import Weight, find_weights
from slimdown.sparsify.pattern import Pattern, keep_largest
from slimdown.sparsify.reconstruct import reconstruct
from slimdown.sparsify.scores import magnitude, wanda
from slimdown.sparsify.walk import walk
from slimdown.zeros import SPARSE_FROM, is_sparse, share_of_zeros

METHODS = ("sparsegpt", "wanda", "magnitude")
SCOPES = ("layer", "global")

IMAGES_AT_ONCE = 4
MIN_POSITIONS = 2**13
POSITIONS_PER_INPUT = 16
"""So many positions, over all images, for each input of a layer are enough."""


@dataclass(frozen=True, kw_only=True)
class Sparsify:
    """Set the least important weights of convolutions and linear layers to zero.

    Shapes stay as they are, and `Distill` and `Quantize` keep the zeros. Most runtimes are no
    faster for them: the facts of the result tell what each is known to gain. They also tell the
    layers whose zeros training will not keep, `not_kept`: too few, see `slimdown.zeros`.
    """

    sparsity: float | None = None
    """The share of the weights that become zero, in [0.01, 1); this or `pattern`."""
    pattern: str | None = None
    """N:M, such as "2:4": of every M neighbors along the input channels, N stay."""
    method: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt"
    """sparsegpt mends the other weights of each layer; wanda weighs weights by their inputs;
    magnitude needs no images."""
    scope: Literal["layer", "global"] = "layer"
    """Whether each layer has the same share of zeros, or the least weights of all layers go
    (magnitude with `sparsity` only)."""
    num_images: int = 64
    """Calibration images; not for magnitude."""
    include: tuple[str, ...] = ("*",)
    """Globs over layer names: only the weights of such layers are touched."""
    exclude: tuple[str, ...] = ()
    """Globs over layer names: the weights of such layers stay as they are."""

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise RecipeError(
                "sparsify needs exactly one of sparsity, such as 0.5, and pattern, such as 2:4, "
                f"got sparsity={self.sparsity} and pattern={self.pattern}"
            )
        if self.sparsity is not None and not SPARSE_FROM <= self.sparsity < 1:
            raise RecipeError(
                "sparsify.sparsity is the share of the weights that become zero and must be in "
                f"[{SPARSE_FROM}, 1), got {self.sparsity:g}: later stages do not keep fewer zeros"
            )
        if self.pattern is not None:
            Pattern.parse(self.pattern)
        for name, choices in (("method", METHODS), ("scope", SCOPES)):
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"sparsify.{name} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.scope == "global" and (self.method != "magnitude" or self.pattern is not None):
            raise RecipeError(
                "sparsify.scope=global compares weights of different layers, which only "
                "method=magnitude with a sparsity can: choose these, or scope=layer"
            )
        if self.num_images < 1:
            raise RecipeError(f"sparsify.num_images must be at least 1, got {self.num_images}")

    @property
    def kind(self) -> str:
        return "sparsify"

    @property
    def amount(self) -> float | Pattern:
        """The share of zeros, or the pattern."""
        if self.pattern is not None:
            return Pattern.parse(self.pattern)
        assert self.sparsity is not None
        return self.sparsity

    def for_target(self, target: Target) -> Sparsify:
        return self

    def __call__(self, model: nn.Module, task: Task, context: Context = Context()) -> StageResult:
        """Return a copy of `model` with zeros among its weights.

        Raises RecipeError for globs that match no layer, CannotCapture, and BadInput for a model
        without a layer that can be made sparse, or calibration images that are missing.
        """
        graph_module = capture(model, task.example_input)
        weights, dense = self._select(graph_module)
        if self.method == "magnitude":
            self._cut_by_magnitude_(graph_module, weights)
        else:
            self._cut_by_inputs_(graph_module, weights, task, context)
        result = copy.deepcopy(model).eval()
        state = result.state_dict()
        for weight in weights:
            state[weight.name].copy_(find_tensor(graph_module, weight.name).detach())
        return StageResult(model=result, facts=_facts(self.pattern, weights, dense, model, result))

    def rebuild(self, model: nn.Module, structure: Json, example_input: Tensor) -> nn.Module:
        """A copy of `model`: zeros are a matter of its weights, which come with the state."""
        return copy.deepcopy(model)

    def _select(self, graph_module: GraphModule) -> tuple[list[Weight], dict[str, str]]:
        """The weights to make sparse, and why others stay dense. Raises RecipeError, BadInput."""
        found, dense = find_weights(graph_module)
        _check_any(found, dense)
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(matches((weight.layer,), (pattern,)) for weight in found):
                    raise RecipeError(
                        f"sparsify.{option}: {pattern!r} matches no layer; the layers are "
                        f"{', '.join(weight.layer for weight in found) or 'none'}"
                    )
        chosen = []
        for weight in found:
            if not matches((weight.layer,), self.include) or matches((weight.layer,), self.exclude):
                dense[weight.layer] = "excluded"
            elif (why := self._refuse(weight)) is not None:
                dense[weight.layer] = why
            else:
                chosen.append(weight)
        _check_any(chosen, dense)
        return chosen, dense

    def _refuse(self, weight: Weight) -> str | None:
        if isinstance(self.amount, Pattern) and weight.num_inputs % self.amount.group:
            return f"its {weight.num_inputs} inputs are no multiple of {self.amount.group}"
        return None

    def _cut_by_magnitude_(self, graph_module: GraphModule, weights: Sequence[Weight]) -> None:
        tensors = {weight.name: find_tensor(graph_module, weight.name) for weight in weights}
        scores = {name: magnitude(tensor.detach().float()) for name, tensor in tensors.items()}
        if self.scope == "global":
            assert self.sparsity is not None
            everything = torch.cat([score.flatten() for score in scores.values()])
            sizes = [score.numel() for score in scores.values()]
            masks = torch.split(keep_largest(everything, self.sparsity), sizes)
            for tensor, mask in zip(tensors.values(), masks, strict=True):
                tensor.data.mul_(mask.view(tensor.shape))
            return
        for weight in weights:
            mask = self._mask(weight.to_matrix(scores[weight.name]))
            tensors[weight.name].data.mul_(weight.from_matrix(mask))

    def _mask(self, scores: Tensor) -> Tensor:
        """What stays of a layer's matrix, (G, R, K) bool."""
        amount = self.amount
        if isinstance(amount, Pattern):
            return amount.mask(scores)
        # Wanda compares the inputs of one output with each other: section 3 of the paper.
        return keep_largest(scores, amount, dim=-1 if self.method == "wanda" else None)

    def _cut_by_inputs_(
        self, graph_module: GraphModule, weights: Sequence[Weight], task: Task, context: Context
    ) -> None:
        images = take_images(task.calibration_batches(), self.num_images)
        if not images:
            raise BadInput(
                f"sparsify.method={self.method} needs a few dozen calibration images and the task "
                "has none: give the data a training or a calibration split, or choose magnitude"
            )

        def visit(index: int, weight: Weight, inputs: Sequence[Tensor]) -> None:
            if context.stop_requested():
                raise Interrupted("stopped while sparsifying; the next run begins this step anew")
            self._cut_one_(weight, find_tensor(graph_module, weight.name), inputs)
            context.show(Progress("sparsify", index + 1, len(weights)))

        visits: dict[Node, Callable[[Sequence[Tensor]], None]] = {
            weight.node: partial(visit, index, weight) for index, weight in enumerate(weights)
        }
        walk(graph_module, [as_input(each, graph_module) for each in images], visits)

    def _cut_one_(self, weight: Weight, tensor: Tensor, inputs: Sequence[Tensor]) -> None:
        matrix = weight.to_matrix(tensor.detach())
        if self.method == "wanda":
            norms = input_norms(weight, inputs)
            cut = matrix * self._mask(wanda(matrix.double(), norms))
        else:
            cut = reconstruct(matrix, input_moments(weight, inputs), self.amount)
        tensor.data.copy_(weight.from_matrix(cut))


def _check_any(weights: Sequence[Weight], dense: dict[str, str]) -> None:
    """Raise BadInput where there is no weight to make sparse."""
    if not weights:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in dense.items())
        raise BadInput(
            "no layer of this model can be made sparse: "
            f"{reasons or 'it has neither convolutions nor linear layers'}"
        )


def input_norms(weight: Weight, inputs: Sequence[Tensor]) -> Tensor:
    """‖x‖₂ of every column of a layer's inputs, (G, K) float64."""
    return torch.stack([x.square().sum(-1) for x in _columns(weight, inputs)]).sum(0).sqrt()


def input_moments(weight: Weight, inputs: Sequence[Tensor]) -> Tensor:
    """The sum of x xᵀ over a layer's inputs, (G, K, K) float64."""
    first, *others = _columns(weight, inputs)
    moments = first @ first.mT
    for x in others:
        moments += x @ x.mT
    return moments


def _columns(weight: Weight, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """A layer's inputs as columns, (G, K, samples) float64 each.

    Few images at a time, and of these no more positions than are needed: neighbors say almost the
    same, and the patches of a convolution are many times as large as its input.
    """
    parts = [part for x in inputs for part in torch.split(x, IMAGES_AT_ONCE)]
    size = weight.num_inputs * prod(weight.reader.kernel)
    count = ceil(max(MIN_POSITIONS, POSITIONS_PER_INPUT * size) / len(parts))
    for part in parts:
        yield weight.columns(part, count).double()


def _facts(
    pattern: str | None,
    weights: Sequence[Weight],
    dense: dict[str, str],
    before: nn.Module,
    after: nn.Module,
) -> Json:
    state = after.state_dict()
    parameters = list(after.parameters())
    num_zeros = sum(int((parameter == 0).sum()) for parameter in parameters)
    return {
        "pattern": pattern,
        "sparsity": {weight.layer: share_of_zeros(state[weight.name]) for weight in weights},
        "not_kept": [weight.layer for weight in weights if not is_sparse(state[weight.name])],
        "dense": dense,
        "zeros": num_zeros / sum(parameter.numel() for parameter in parameters),
        **describe_gains(before.state_dict().values(), state.values()),
    }
