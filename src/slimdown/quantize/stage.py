"""Quantize: the stage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.capture import capture, require_dynamic_batch
from slimdown.core import Context, Json, Progress, StageResult, Target, Task, batch_device
from slimdown.errors import BadInput, Interrupted, RecipeError
from slimdown.images import stream_images
from slimdown.quantize.assembly import Assembly, Network
from slimdown.quantize.calibrate import CALIBRATIONS, Calibration
from slimdown.quantize.checks import as_calibration, check_weights
from slimdown.quantize.fake_quantize import is_fake_quantized
from slimdown.quantize.fallback import Fallback
from slimdown.quantize.fold import fold_batch_norms
from slimdown.quantize.grids import describe_ranges, find_crushed
from slimdown.quantize.half import HalfPrecision, check_half
from slimdown.quantize.judge import Judge
from slimdown.quantize.ladder import EFFORTS, REFINEMENTS, Effort, climb
from slimdown.quantize.mixing import FLOAT, Mixer, Plan
from slimdown.quantize.placement import (
    Placement,
    insert_quantizers,
    integer_nodes,
    label_of,
    plan_placement,
)
from slimdown.quantize.profiles import Profile, find_profile
from slimdown.quantize.sensitivity import measure_alone
from slimdown.quantize.steps import count_operations
from slimdown.suggest import advise

PRECISIONS = ("int8", "float16")

DEFAULT_PROFILE = "onnxruntime-x86"
"""The placement where neither the recipe nor a target names one."""

MOST_FITTED = 192
"""Images that the rungs of the ladder fit to: block reconstruction gains little from more."""

FEW = 16
"""Fewer calibration images than this are not split."""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Post-training quantization; train its result with `Distill`, and that is QAT.

    `precision`: int8 or float16. For int8, weights and activations have `weight_bits` and
    `activation_bits`, 2 to 8; with fewer (weights: fewer than 7) the first and the last layers keep
    8, and weights of up to 4 bits are stored two in a byte. `calibration` chooses the ranges of
    activations from `num_images` of the task's calibration images, `profile` says where quantizers
    stand (None: the target's own, or "onnxruntime-x86" without a target), `effort` says what is
    tried beyond ranges (see `quantize.ladder`), and layers whose name matches a glob of `exclude`
    stay in float.

    `max_error` is how far the outputs may lie from those of the float network, for how much they
    vary from image to image: 0.1 is a tenth. Where they lie farther, the layers that suffer most
    get 8 bits instead of fewer, or stay in float, until they do not; None: as many layers as can
    be are quantized.
    """

    precision: Literal["int8", "float16"] = "int8"
    weight_bits: int = 8
    activation_bits: int = 8
    calibration: Calibration = "mse"
    profile: str | None = None
    num_images: int = 256
    effort: Effort = "balanced"
    max_error: float | None = None
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
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
                raise RecipeError(
                    f"quantize.{name} must be a whole number from 2 to 8, got {bits!r}"
                )
        if self.effort not in EFFORTS:
            raise RecipeError(
                f"quantize.effort must be {' or '.join(EFFORTS)}, got {self.effort!r}"
            )
        if self.profile is not None:
            find_profile(self.profile)
        count = self.num_images
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise RecipeError(f"quantize.num_images must be at least 1, got {count!r}")
        is_list = isinstance(self.exclude, list | tuple)
        if not is_list or not all(isinstance(glob, str) for glob in self.exclude):
            raise RecipeError(
                f"quantize.exclude must be a list of globs such as ['features.0*'], "
                f"got {self.exclude!r}"
            )
        self._check_max_error()

    def _check_max_error(self) -> None:
        if self.max_error is None:
            return
        if isinstance(self.max_error, bool) or not 0 < self.max_error < float("inf"):
            raise RecipeError(
                "quantize.max_error is the error of the outputs over their spread and must be "
                f"above 0, got {self.max_error!r}: 0.1 is a tenth"
            )
        if self.precision != "int8":
            raise RecipeError(
                "quantize.max_error brings layers back from int8, and quantize.precision is "
                f"{self.precision}: leave one of them out"
            )

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
        plan = partial(self._plan, graph_module, profile)
        placement = plan({})
        if not placement.weights:
            raise BadInput(f"this model has no layer to quantize: {_explain(placement, labels)}")
        check_weights(graph_module, placement, labels)
        assemble = self._assembly(graph_module, placement, labels, task, context)
        network = assemble(graph_module)
        readers = integer_nodes(graph_module, profile, self.exclude)
        operations = count_operations(graph_module, readers)
        network, ladder, errors = self._improve(network, assemble, plan, operations, context)
        placement = network.placement
        facts = {
            "precision": "int8",
            "profile": profile.name,
            "calibration": self.calibration,
            "num_calibration_images": network.num_images,
            "effort": self.effort,
            "ladder": ladder,
            "quantized": [labels[name] for name in placement.weights],
            "weight_bits": {
                labels[name]: (high - low).bit_length()
                for name, (low, high) in placement.weight_ranges.items()
            },
            "kept_float": {labels[name]: why for name, why in placement.kept_float.items()},
            "layer_errors": {
                label: next(iter(by_bits.values())) for label, by_bits in errors.items()
            },
            "ranges": describe_ranges(network.quantized, placement, network.ranges, labels),
            "notes": find_crushed(network.quantized, placement, network.ranges, labels),
        }
        structure = {"precision": "int8", "profile": profile.name, **placement.to_json()}
        return StageResult(model=network.quantized, structure=structure, facts=facts)

    def rebuild(self, model: nn.Module, structure: Json, example_input: Tensor) -> nn.Module:
        """Put the saved placement in again; weights and grids come with the state."""
        graph_module = fold_batch_norms(capture(model, example_input))
        if structure["precision"] == "float16":
            return HalfPrecision(graph_module).eval()
        return insert_quantizers(graph_module, Placement.from_json(structure)).eval()

    def _assembly(
        self,
        graph_module: GraphModule,
        placement: Placement,
        labels: Mapping[str, str],
        task: Task,
        context: Context,
    ) -> Assembly:
        def images() -> Iterator[Tensor]:
            for batch in stream_images(task.calibration_batches(), self.num_images):
                yield as_calibration(batch, graph_module)

        def after_batch(num_images: int) -> None:
            context.show(Progress("calibrate", num_images, self.num_images))
            _stop_if_requested(context)

        return Assembly(
            placement=placement,
            labels=labels,
            calibration=self.calibration,
            images=images,
            after_batch=after_batch,
        )

    def _plan(
        self, graph_module: GraphModule, profile: Profile, bits_of: Mapping[str, int]
    ) -> Placement:
        """What the recipe asks for, but for the layers (by label) that have other bits."""
        kept_float = [escape(label) for label, bits in bits_of.items() if bits == FLOAT]
        return plan_placement(
            graph_module,
            profile,
            (*self.exclude, *kept_float),
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            bits_of={escape(label): bits for label, bits in bits_of.items() if bits != FLOAT},
        )

    def _improve(
        self,
        network: Network,
        assemble: Assembly,
        plan: Plan,
        operations: Mapping[str, int],
        context: Context,
    ) -> tuple[Network, list[Json], dict[str, dict[int, float]]]:
        """Climb the ladder, and bring layers back where the recipe limits the error.

        Returns the network, what came of each rung, and the errors of `measure_alone`; `operations`
        are those of what reads INT8.
        """
        rungs = EFFORTS[self.effort]
        if not rungs and self.max_error is None:
            return network, [], {}
        fitted, held_out = split_images(assemble.images())
        if not held_out:
            raise BadInput(
                "the task gave calibration images once, and none when asked again: "
                "calibration_batches must begin anew each time it is called"
            )
        judge = Judge(network.reference, held_out)

        def show(label: str, done: int, total: int) -> None:
            context.show(Progress(label, done, total))
            _stop_if_requested(context)

        network, ladder = climb(
            network,
            rungs,
            assemble=assemble,
            judge=judge,
            images=fitted,
            after=lambda rung: show(rung, rungs.index(rung), len(rungs)),
        )
        if self.max_error is None:
            return network, ladder, {}
        kept = [step for step in ladder if step["kept"]]
        mixer = Mixer(
            network=network,
            plan=plan,
            calibration=self.calibration,
            is_refined=any(step["rung"] in REFINEMENTS for step in kept),
            images=fitted,
        )
        errors = measure_alone(
            mixer,
            list(operations),
            judge,
            after=lambda done: show("sensitivity", done, len(operations)),
        )
        if kept[-1]["error"] <= self.max_error:
            return network, ladder, errors
        fall_back = Fallback(
            limit=self.max_error, labels=assemble.labels, mixer=mixer, judge=judge, after=show
        )
        network, step = fall_back(errors, operations)
        return network, [*ladder, step], errors


def split_images(batches: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Images to fit to, and every fourth of them held out; all in both where they are few.

    At most `MOST_FITTED` and a third of that, so that memory does not grow with their number.
    """
    fitted: list[Tensor] = []
    held_out: list[Tensor] = []
    seen = 0
    for batch in batches:
        is_held_out = torch.arange(seen, seen + len(batch)) % 4 == 3
        fitted.append(batch[~is_held_out])
        held_out.append(batch[is_held_out])
        seen += len(batch)
        if seen >= MOST_FITTED * 4 // 3:
            break
    if seen < FEW:
        both = [torch.cat([a, b]) for a, b in zip(fitted, held_out, strict=True)]
        return both, both
    return [x for x in fitted if len(x)], [x for x in held_out if len(x)]


def _stop_if_requested(context: Context) -> None:
    if context.stop_requested():
        raise Interrupted("stopped while quantizing; the next run begins this step anew")


def _to_half(graph_module: GraphModule, task: Task) -> StageResult:
    half = HalfPrecision(graph_module).eval()
    check_half(half, task.example_input.to(batch_device(graph_module)))
    facts: Json = {
        "precision": "float16",
        "profile": None,
        "calibration": None,
        "num_calibration_images": None,
        "effort": None,
        "ladder": [],
        "quantized": [],
        "weight_bits": {},
        "kept_float": {},
        "layer_errors": {},
        "ranges": [],
        "notes": [],
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
