"""The one training loop: fine-tuning is distillation with α = 1, QAT that of a quantized student.

    train_batches ─► augment ─┬─► student ─► α · hard + (1 − α) · T² · KL ─► optimizer ─► average
                              └─► teacher ───────────────┘

A run can be stopped between any two steps and goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from slimdown.core import Batch, Context, Progress, Task, batch_device
from slimdown.distill.average import (
    clone_tensors,
    copy_tensors_,
    decay_at,
    tensors_of,
    update_average_,
)
from slimdown.distill.mode import set_mode_
from slimdown.distill.objective import Objective, make_objective
from slimdown.distill.optimizer import (
    choose_rate,
    learning_rate_at,
    make_optimizer,
    set_learning_rate_,
    trained_by,
)
from slimdown.distill.randomness import (
    borrowed_randomness,
    derive_seed,
    seed_everything,
    set_random_state,
)
from slimdown.distill.scales import Scales, free_scales_, settle_
from slimdown.distill.settings import TrainSettings
from slimdown.distill.state import EpochRecord, TrainState
from slimdown.distill.zeros import Zeros, find_zeros, gradients_of, grow_zeros, set_zero_
from slimdown.errors import BadInput, Diverged, Interrupted

SECONDS_BETWEEN_CHECKPOINTS = 30.0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training came to: the model in eval mode, and how it went, epoch by epoch."""

    model: nn.Module
    history: list[EpochRecord]
    num_steps: int
    seconds: float


def train(
    student: nn.Module,
    task: Task,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    context: Context = Context(),
) -> Trained:
    """Train a copy of `student` on `task.train_batches`; both models are left as they were.

    `teacher` defaults to `context.original` and is not used where alpha is 1. Goes on from the
    context's checkpoint where there is one, to the same result as a run that was never stopped.
    Raises BadInput where student, teacher, labels and settings do not fit together, Diverged on
    NaN or infinity (the last good checkpoint stays), and Interrupted once a stop is requested.
    """
    settings = choose_rate(student, settings)
    model = copy.deepcopy(student)  # of graphs, too: torch.export's own one refuses to be trained
    device = batch_device(model)
    teacher = context.original if teacher is None else teacher
    loop = _Loop(
        task=task,
        settings=settings,
        context=context,
        objective=make_objective(task, settings, teacher=teacher, device=device),
        device=device,
        zeros=_choose_zeros(model, task, settings),
        scales=free_scales_(model) if settings.learn_scales else Scales(),
    )
    state = TrainState(
        model=model,
        optimizer=make_optimizer(model, settings, scales=loop.scales.find(model)),
        average=None if settings.ema is None else clone_tensors(tensors_of(model)),
    )
    checkpoint = context.load_checkpoint()
    if checkpoint is not None:
        state.unpack_(checkpoint)
    with borrowed_randomness():
        while state.epoch < settings.epochs:
            loop.run_epoch_(state)
    return Trained(
        model=_result(state),
        history=state.history,
        num_steps=state.num_steps,
        seconds=state.seconds,
    )


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """What stays the same over a training run; `TrainState` is what changes."""

    task: Task
    settings: TrainSettings
    context: Context
    objective: Objective
    device: torch.device
    zeros: Zeros
    scales: Scales

    def run_epoch_(self, state: TrainState) -> None:
        """Do the steps of the epoch that are not done yet, then record and save it."""
        seed_everything(derive_seed(self.context.seed, state.epoch))
        batches = self.task.train_batches(state.epoch)
        remaining = _skip(iter(batches), state)
        set_mode_(state.model, training=True)
        clock = saved = time.monotonic()
        for item in remaining:
            self._step_(state, _to_batch(item, self.device), num_batches=len(batches))
            now = time.monotonic()
            state.epoch_seconds += now - clock
            clock = now
            self._show(state, num_batches=len(batches))
            # Between two steps and before the next batch is drawn: the point to come back to.
            if self.context.stop_requested():
                self._save(state)
                raise Interrupted(
                    f"stopped in epoch {state.epoch + 1} of {self.settings.epochs}, after step "
                    f"{state.step} of {len(batches)}; run again to go on from there"
                )
            if now - saved >= SECONDS_BETWEEN_CHECKPOINTS:
                self._save(state)
                saved = clock = time.monotonic()
        if state.step == 0:
            raise BadInput(
                f"the task gave no training batch in epoch {state.epoch + 1}: give it more images"
            )
        state.finish_epoch_(self._validate(state))
        self._save(state)

    def _step_(self, state: TrainState, batch: Batch, *, num_batches: int) -> None:
        step, num_steps = state.epoch * num_batches + state.step, self.settings.epochs * num_batches
        state.learning_rate = learning_rate_at(
            step,
            num_steps=num_steps,
            peak=self.settings.peak_rate,
            warmup=self.settings.warmup,
        )
        set_learning_rate_(state.optimizer, state.learning_rate)
        seed = derive_seed(self.context.seed, state.epoch, state.step)
        terms = self.objective.compute(state.model, batch, seed=seed)
        _backward(terms.loss)
        zeros = self.zeros.find(state.model)
        gradients = gradients_of(state.model, zeros)
        set_zero_(gradients, {name: zeros[name] for name in gradients})
        trained = [p for p in trained_by(state.optimizer) if p.grad is not None]
        norm = get_total_norm(p.grad for p in trained if p.grad is not None)
        # Before the optimizer's step, so that the weights are still good.
        if not (isfinite(float(terms.loss.detach())) and isfinite(float(norm))):
            raise Diverged(self._explain_divergence(state, batch))
        if self.settings.clip_norm is not None:
            clip_grads_with_norm_(trained, self.settings.clip_norm, norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        set_zero_(tensors_of(state.model), zeros)  # momentum would move them on
        self.scales.keep_positive_(state.model)
        self.zeros.grow_(state.model, step=step, num_steps=num_steps)
        if state.average is not None:
            assert self.settings.ema is not None
            decay = decay_at(state.num_steps, self.settings.ema)
            update_average_(state.average, tensors_of(state.model), decay=decay)
            set_zero_(state.average, self.zeros.find(state.model))
        state.count_step_(len(batch.inputs), terms._asdict())

    def _validate(self, state: TrainState) -> float | None:
        """Score held-out training data, for people to look at; nothing is chosen by it."""
        validate = getattr(self.task, "validate", None)
        if validate is None:
            return None
        with torch.no_grad():
            return float(validate(_result(state)).value)

    def _save(self, state: TrainState) -> None:
        """Keep a checkpoint, unless a finite gradient has led to weights that are not."""
        if not all(bool(p.isfinite().all()) for p in trained_by(state.optimizer)):
            raise Diverged(self._describe_divergence(state))
        self.context.save_checkpoint(state.pack())

    def _show(self, state: TrainState, *, num_batches: int) -> None:
        figures = {
            "epoch": state.epoch + 1,
            **state.averages(),
            "learning_rate": state.learning_rate,
            "images_per_second": state.num_images / max(state.epoch_seconds, 1e-9),
        }
        if state.history and state.history[-1]["validation"] is not None:
            figures["validation"] = state.history[-1]["validation"]
        done = state.epoch * num_batches + state.step
        self.context.show(Progress("distill", done, self.settings.epochs * num_batches, figures))

    def _explain_divergence(self, state: TrainState, batch: Batch) -> str:
        """Name the first thing that is not finite: the images, the teacher, or the training."""
        where = f"epoch {state.epoch + 1}, step {state.step + 1}"
        if not bool(batch.inputs.isfinite().all()):
            return f"the images of {where} hold NaN or infinity: mend the data or its preprocessing"
        if self.objective.teacher is not None:
            outputs = self.objective.ask_teacher(batch.inputs)
            if not bool(outputs.isfinite().all()):
                return f"the teacher's outputs are not finite in {where}: check its weights"
        return self._describe_divergence(state)

    def _describe_divergence(self, state: TrainState) -> str:
        settings = self.settings
        return (
            f"training met NaN or infinity in epoch {state.epoch + 1} of {settings.epochs}, step "
            f"{state.step + 1}, at learning rate {state.learning_rate:.3g}; the last good "
            "checkpoint is kept. Lower distill.learning_rate (its highest is "
            f"{settings.peak_rate:g}), set distill.clip_norm (now {settings.clip_norm}) or "
            f"lengthen distill.warmup (now {settings.warmup:g})"
        )


def _choose_zeros(model: nn.Module, task: Task, settings: TrainSettings) -> Zeros:
    """The zeros that training keeps, and those that it shall make."""
    if settings.sparsity is None:
        return find_zeros(model)
    return grow_zeros(model, task.example_input, settings.sparsity)


def _backward(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise BadInput(
            "the loss has no gradient, so nothing would be learned: the model detaches its outputs "
            "from its parameters"
        )
    loss.backward()  # type: ignore[no-untyped-call]


def _result(state: TrainState) -> nn.Module:
    """A copy of what training would return now: the average where there is one, in eval mode."""
    model = copy.deepcopy(state.model)
    if state.average is not None:
        copy_tensors_(model, state.average)
    set_mode_(model, training=False)
    settle_(model)
    return model


def _skip(iterator: Iterator[Any], state: TrainState) -> Iterator[Any]:
    """Pass over the batches that were done before a stop, and take up the draws from there."""
    if state.step > 0:
        assert state.random is not None
        for _ in range(state.step):
            next(iterator, None)
        set_random_state(state.random)
    return iterator


def _to_batch(item: Any, device: torch.device) -> Batch:
    """A Batch, a pair as a DataLoader gives, or inputs alone -> a Batch on `device`."""
    batch = Batch(item) if isinstance(item, Tensor) else Batch(*item)
    return Batch(_to_device(batch.inputs, device), _to_device(batch.targets, device))


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return [_to_device(item, device) for item in value] if isinstance(value, list) else value
