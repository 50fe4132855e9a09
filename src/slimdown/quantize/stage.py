"""Quantize: the stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.capture import capture, require_dynamic_batch
from slimdown.core import Context, Json, Progress, StageResult, Target, Task, batch_device
from slimdown.errors import BadInput, Interrupted, RecipeError
from slimdown.images import take_images
from slimdown.quantize.calibrate import CALIBRATIONS
from slimdown.quantize.fake_quantize import is_fake_quantized
from slimdown.quantize.fold import fold_batch_norms
from slimdown.quantize.grids import (
    describe_ranges,
    round_biases_,
    set_activation_grids_,
    set_weight_grids_,
)
from slimdown.quantize.half import HalfPrecision, check_half
from slimdown.quantize.observe import RangeStatistics, observe
from slimdown.quantize.placement import (
    Placement,
    insert_quantizers,
    label_of,
    plan_placement,
)
from slimdown.quantize.profiles import find_profile
from slimdown.suggest import advise

PRECISIONS = ("int8", "float16")

DEFAULT_PROFILE = "onnxruntime-x86"
"""The placement where neither the recipe nor a target names one."""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Post-training quantization; train its result with `Distill`, and that is QAT.

    `precision`: int8 or float16. For int8, `calibration` chooses the ranges of activations from
    `num_images` of the task's calibration images, `profile` says where quantizers stand (None: the
    target's own, or "onnxruntime-x86" without a target), and layers whose name matches a glob of
    `exclude` stay in float.
    """

    precision: Literal["int8", "float16"] = "int8"
    calibration: Literal["mse", "minmax"] = "mse"
    profile: str | None = None
    num_images: int = 256
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise RecipeError(
                f"quantize.precision must be {' or '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.calibration not in CALIBRATIONS:
            raise RecipeError(
                f"quantize.calibration must be {' or '.join(CALIBRATIONS)}, "
                f"got {self.calibration!r}"
            )
        if self.profile is not None:
            find_profile(self.profile)
        if self.num_images < 1:
            raise RecipeError(f"quantize.num_images must be at least 1, got {self.num_images}")

    @property
    def kind(self) -> str:
        return "quantize"

    def for_target(self, target: Target) -> Quantize:
        """With the target's own profile, unless the recipe names one or needs none."""
        if self.profile is not None or self.precision != "int8":
            return self
        return replace(self, profile=target.profile)

    def __call__(self, model: nn.Module, task: Task, context: Context = Context()) -> StageResult:
        """Return the quantized graph of `model`.

        Raises RecipeError for a model that is quantized already, and BadInput for one that has no
        layer to quantize, or for calibration images that are missing or not finite.
        """
        _refuse_quantized(model)
        captured = capture(model, task.example_input)
        require_dynamic_batch(captured)
        graph_module = fold_batch_norms(captured)
        if self.precision == "float16":
            return _to_half(graph_module, task)
        labels = {node.name: label_of(node) for node in graph_module.graph.nodes}
        _check_exclude(self.exclude, labels.values())
        profile = find_profile(self.profile or DEFAULT_PROFILE)
        placement = plan_placement(graph_module, profile, self.exclude)
        if not placement.weights:
            raise BadInput(f"this model has no layer to quantize: {_explain(placement, labels)}")
        seen, num_images = self._observe(graph_module, placement, labels, task, context)
        quantized = insert_quantizers(graph_module, placement).eval()
        set_activation_grids_(quantized, placement, seen, self.calibration)
        set_weight_grids_(quantized, placement)
        round_biases_(quantized, placement)
        facts = {
            "precision": "int8",
            "profile": profile.name,
            "calibration": self.calibration,
            "num_calibration_images": num_images,
            "quantized": [labels[name] for name in placement.weights],
            "kept_float": {labels[name]: why for name, why in placement.kept_float.items()},
            "ranges": describe_ranges(quantized, placement, seen, labels),
        }
        structure = {"precision": "int8", "profile": profile.name, **placement.to_json()}
        return StageResult(model=quantized, structure=structure, facts=facts)

    def rebuild(self, model: nn.Module, structure: Json, example_input: Tensor) -> nn.Module:
        """Put the saved placement in again; weights and grids come with the state."""
        graph_module = fold_batch_norms(capture(model, example_input))
        if structure["precision"] == "float16":
            return HalfPrecision(graph_module).eval()
        return insert_quantizers(graph_module, Placement.from_json(structure)).eval()

    def _observe(
        self,
        graph_module: GraphModule,
        placement: Placement,
        labels: Mapping[str, str],
        task: Task,
        context: Context,
    ) -> tuple[dict[str, RangeStatistics], int]:
        """The statistics of each activation that gets a quantizer, and of how many images."""
        num_seen = 0

        def count(num_images: int) -> None:
            nonlocal num_seen
            num_seen = num_images
            context.show(Progress("calibrate", num_images, self.num_images))
            if context.stop_requested():
                raise Interrupted("stopped while calibrating; the next run begins this step anew")

        device = batch_device(graph_module)
        taken = take_images(task.calibration_batches(), self.num_images)
        batches = (batch.to(device) for batch in taken)
        nodes = {producer: labels[producer] for producer in placement.activations}
        seen = observe(graph_module, nodes, batches, after_batch=count)
        if num_seen == 0:
            raise BadInput(
                "the task has no calibration images: the ranges of activations need a few dozen; "
                "give the data a training or a calibration split"
            )
        return seen, num_seen


def _to_half(graph_module: GraphModule, task: Task) -> StageResult:
    half = HalfPrecision(graph_module).eval()
    check_half(half, task.example_input.to(batch_device(graph_module)))
    facts: Json = {
        "precision": "float16",
        "profile": None,
        "calibration": None,
        "num_calibration_images": None,
        "quantized": [],
        "kept_float": {},
        "ranges": [],
    }
    return StageResult(model=half, structure={"precision": "float16"}, facts=facts)


def _check_exclude(patterns: Sequence[str], labels: Collection[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(label, pattern) for label in labels):
            advice = advise(pattern, labels, otherwise="`slimdown inspect` lists the layers")
            raise RecipeError(f"quantize.exclude matches no layer: {pattern!r}; {advice}")


def _explain(placement: Placement, labels: Mapping[str, str]) -> str:
    reasons = (f"{labels[name]}: {why}" for name, why in placement.kept_float.items())
    return "; ".join(reasons) or "it has neither convolutions nor linear layers"


def _refuse_quantized(model: nn.Module) -> None:
    """Raise RecipeError for what a Quantize made, or a stage made of that."""
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.dtype is torch.float16 for tensor in tensors):
        precision = "float16"
    elif is_fake_quantized(model):
        precision = "INT8"
    else:
        return
    raise RecipeError(
        f"quantize was given a model that is in {precision} already: "
        "keep one quantize stage in the recipe"
    )
