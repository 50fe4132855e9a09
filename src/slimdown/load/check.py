"""Whether a model and a task belong together, before any long work."""

from __future__ import annotations

from torch import Tensor, nn

from slimdown.core import Task, logits_of
from slimdown.errors import BadInput, SlimdownError
from slimdown.load.classification import ClassificationTask, as_logits, judging


def check_model(model: nn.Module, task: Task) -> None:
    """Run the task's example through the model. Raises BadInput where the two do not fit."""
    example = task.example_input
    with judging(model) as device:
        try:
            outputs = model(example.to(device))
        except SlimdownError:
            raise
        except Exception as error:  # whatever the user's model raises
            raise BadInput(
                f"the model cannot take an input of the data, {tuple(example.shape)}: "
                f"{type(error).__name__}: {error}. Check data.preprocess (size, channels) "
                "against what the model was trained with"
            ) from error
    logits = logits_of(outputs)
    if isinstance(logits, Tensor) and not logits.isfinite().all():
        raise BadInput("the model's output for an image of the data holds NaN or infinity")
    if isinstance(task, ClassificationTask) and task.test is not None:
        _check_classes(as_logits(outputs), task)


def _check_classes(logits: Tensor, task: ClassificationTask) -> None:
    if logits.shape[1] != task.num_classes:
        shown = ", ".join(task.labels[:5]) + (", …" if task.num_classes > 5 else "")
        raise BadInput(
            f"the model tells {logits.shape[1]} classes apart and the data have "
            f"{task.num_classes} ({shown}): set model.options.num_classes, or give the data that "
            "the model was trained for"
        )
