"""What a training run can be told, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, TypeAlias, get_args

from slimdown.errors import RecipeError
from slimdown.zeros import SPARSE_FROM

Optimizer: TypeAlias = Literal["sgd", "adamw"]
Augment: TypeAlias = Literal["auto", "none", "crop", "flip-crop"]
Amp: TypeAlias = Literal["auto", "bf16", "off"]

DEFAULT_RATES: dict[Optimizer, float] = {"sgd": 0.02, "adamw": 0.002}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The loss is α · hard + (1 − α) · T² · KL(teacher ‖ student); α = 1 is fine-tuning."""

    epochs: int = 10
    alpha: float = 0.0
    """The weight of the labels; 0 needs no labels, 1 needs no teacher."""
    temperature: float = 4.0
    standardize: bool = False
    """Z-score the logits first: the student copies their order and spread, not their scale."""
    optimizer: Optimizer = "adamw"
    learning_rate: float | None = None
    """The highest of the schedule; None: 0.002 for AdamW, 0.02 for SGD, and a twentieth of that for
    a quantized model."""
    weight_decay: float = 5e-4
    """Not for norms and biases."""
    momentum: float = 0.9
    """Of SGD, with Nesterov's correction; AdamW has its own."""
    warmup: float = 0.05
    """The share of all steps over which the learning rate rises; a cosine to 0 follows."""
    ema: float | None = None
    """The decay of the moving average of the weights that is the result; None: the last ones."""
    clip_norm: float | None = 5.0
    """The largest norm of the whole gradient; None: unlimited."""
    augment: Augment = "auto"
    """auto: crop, and flip where `task.flip` allows it; nothing where `task.augments` is true."""
    mixup: float = 0.0
    """a of the Beta(a, a) that blends each image with another one; 0: no blending."""
    amp: Amp = "auto"
    """Mixed precision in bfloat16; auto: on GPUs that have it."""
    learn_scales: bool = True
    """Train the scales of quantizers with fewer than 8 bits too (LSQ, arXiv:1902.08153)."""
    sparsity: float | None = None
    """The share of each layer's weights that training sets to zero by and by, the least first, over
    the first half of its steps; None: it only keeps the zeros that are there."""

    def __post_init__(self) -> None:
        _check_choice("optimizer", self.optimizer, get_args(Optimizer))
        _check_choice("augment", self.augment, get_args(Augment))
        _check_choice("amp", self.amp, get_args(Amp))
        rate, ema, clip, zeros = self.learning_rate, self.ema, self.clip_norm, self.sparsity
        _check("epochs", self.epochs, self.epochs >= 1, "counts passes over the data: >= 1")
        _check("alpha", self.alpha, 0 <= self.alpha <= 1, "is the weight of the labels: 0 to 1")
        _check("temperature", self.temperature, 0 < self.temperature < inf, "must be > 0")
        _check("learning_rate", rate, rate is None or 0 < rate < inf, "must be > 0")
        _check("weight_decay", self.weight_decay, 0 <= self.weight_decay < inf, "must be >= 0")
        _check("momentum", self.momentum, 0 <= self.momentum < 1, "must be in [0, 1)")
        _check("warmup", self.warmup, 0 <= self.warmup < 1, "is a share of the steps: [0, 1)")
        _check("ema", ema, ema is None or 0 < ema < 1, "is a decay in (0, 1), such as 0.999")
        _check("clip_norm", clip, clip is None or clip > 0, "must be > 0, or null for no limit")
        enough = zeros is None or SPARSE_FROM <= zeros < 1
        _check("sparsity", zeros, enough, f"is a share of zeros in [{SPARSE_FROM}, 1)")
        _check("mixup", self.mixup, 0 <= self.mixup < inf, "is a of Beta(a, a) and must be >= 0")

    @property
    def peak_rate(self) -> float:
        """The highest learning rate of the schedule."""
        chosen = self.learning_rate
        return DEFAULT_RATES[self.optimizer] if chosen is None else chosen


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    _check(name, repr(given), given in choices, f"is one of {', '.join(choices)}")


def _check(name: str, given: object, is_good: bool, rule: str) -> None:
    if not is_good:
        raise RecipeError(f"distill.{name} {rule}; got {given}")
