"""What training minimizes: the student against the labels and the teacher on one batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_map

from slimdown.core import Batch, Task, logits_of
from slimdown.distill.augment import Augmentation, augment, mix_up, neighbors
from slimdown.distill.losses import distillation_loss, mix_terms
from slimdown.distill.settings import TrainSettings
from slimdown.errors import BadInput, RecipeError


class Terms(NamedTuple):
    """The loss of one batch and its two terms; None where a term has no weight."""

    loss: Tensor
    hard: Tensor | None
    soft: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """α · hard + (1 − α) · soft of augmented batches; `make_objective` checks its parts."""

    task: Task
    settings: TrainSettings
    teacher: nn.Module | None
    """None where alpha is 1."""
    augmentation: Augmentation
    device: torch.device
    use_bf16: bool

    def compute(self, student: nn.Module, batch: Batch, *, seed: int) -> Terms:
        """The loss of `student` on a batch; `seed` alone decides its crops, flips and blends.

        Raises BadInput where labels are needed and missing, or outputs cannot be compared.
        """
        inputs = augment(batch.inputs, self.augmentation, Generator().manual_seed(seed))
        share, mixup = 1.0, self.settings.mixup
        if mixup > 0:
            share = Random(seed).betavariate(mixup, mixup)
            inputs = mix_up(inputs, share)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16):
            outputs = _in_float32(student(inputs))
        hard = self._compare_with_labels(outputs, batch._replace(inputs=inputs), share)
        soft = self._compare_with_teacher(outputs, inputs)
        return Terms(mix_terms(hard, soft, alpha=self.settings.alpha), hard, soft)

    @torch.no_grad()
    def ask_teacher(self, inputs: Tensor) -> Any:
        """The teacher's outputs, without a gradient."""
        assert self.teacher is not None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16):
            return _in_float32(self.teacher(inputs))

    def _compare_with_labels(self, outputs: Any, batch: Batch, share: float) -> Tensor | None:
        if self.settings.alpha == 0:
            return None
        if batch.targets is None:
            raise BadInput(
                f"distill.alpha is {self.settings.alpha}, which needs labels, and the task has "
                "none: set distill.alpha to 0 to learn from the teacher alone"
            )
        hard = self.task.loss(outputs, batch)
        if share == 1.0:
            return hard
        if not isinstance(batch.targets, Tensor):
            raise BadInput(
                "distill.mixup blends the labels of two images, which needs targets in one tensor, "
                f"got {type(batch.targets).__name__}: set distill.mixup to 0 or distill.alpha to 0"
            )
        other = batch._replace(targets=neighbors(batch.targets))
        return share * hard + (1 - share) * self.task.loss(outputs, other)

    def _compare_with_teacher(self, outputs: Any, inputs: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        outputs, expected = logits_of(outputs), logits_of(self.ask_teacher(inputs))
        _check_logits(outputs, expected)
        return distillation_loss(
            outputs,
            expected,
            temperature=self.settings.temperature,
            standardize=self.settings.standardize,
        )


def make_objective(
    task: Task, settings: TrainSettings, *, teacher: nn.Module | None, device: torch.device
) -> Objective:
    """Fit the settings to task, teacher and device. Raises BadInput without a needed teacher."""
    return Objective(
        task=task,
        settings=settings,
        teacher=_prepare_teacher(teacher, settings, device),
        augmentation=choose_augmentation(task, settings),
        device=device,
        use_bf16=_choose_bf16(settings, device),
    )


def choose_augmentation(task: Task, settings: TrainSettings) -> Augmentation:
    """What "auto" means for a task; anything else is obeyed."""
    if settings.augment != "auto":
        return settings.augment
    if getattr(task, "augments", False):
        return "none"  # its train_batches did it
    return "flip-crop" if getattr(task, "flip", True) else "crop"


def _prepare_teacher(
    teacher: nn.Module | None, settings: TrainSettings, device: torch.device
) -> nn.Module | None:
    if settings.alpha == 1:
        return None
    if teacher is None:
        raise BadInput(
            f"distill.alpha is {settings.alpha}, which needs a teacher, and there is none: give "
            "Context(original=...) the model to learn from, or set distill.alpha to 1"
        )
    return copy.deepcopy(teacher).to(device).eval()  # a copy: its mode and device are the user's


def _choose_bf16(settings: TrainSettings, device: torch.device) -> bool:
    if device.type != "cuda":
        # auto leaves it off: 1.3 times faster with AVX512-BF16, but not measured without
        return settings.amp == "bf16"
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.amp == "bf16" and not supported:
        raise RecipeError("distill.amp is bf16, which this GPU cannot do: set it to auto or off")
    return supported and settings.amp != "off"


def _check_logits(outputs: Any, expected: Any) -> None:
    for who, logits in (("student", outputs), ("teacher", expected)):
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise BadInput(
                f"distillation compares logits of shape (N, num_classes), the {who} gives {given}: "
                "set distill.alpha to 1 to train with the task's own loss"
            )
    if outputs.shape != expected.shape:
        raise BadInput(
            f"the student has {outputs.shape[1]} classes and the teacher {expected.shape[1]}: "
            "choose a teacher for the same classes, or set distill.alpha to 1"
        )


def _in_float32(outputs: Any) -> Any:
    """Losses are computed in float32, whatever precision autocast left the outputs in."""
    return tree_map(
        lambda x: x.float() if torch.is_tensor(x) and x.is_floating_point() else x, outputs
    )
