"""A run on disk: one folder a step, whole or absent.

runs/<name>/01-prune/
    KEY                what the step was made from, one hash
    plan.json          what rebuilds the module's structure
    model.safetensors  its weights
    step.json          settings, facts and counts, as in results.json
    score.npz          the score, sample by sample
    DONE               written last: the step is whole
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimdown.core import Json, Score, Task
from slimdown.distill import seed_everything
from slimdown.errors import BadInput
from slimdown.files import disk_errors, remove_temporaries, write_bytes

T = TypeVar("T")

NUM_HASHED_BATCHES = 32
"""How much of a task's training data is looked at where it has no fingerprint of its own."""


def settings_of(config: Any) -> Json:
    """A frozen dataclass as JSON, with every default spelled out."""
    settings: Json = TypeAdapter(type(config)).dump_python(config, mode="json")
    return settings


def key_of(*parts: Any) -> str:
    """Hash JSON-able parts into the key of what is made from them."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_model(model: nn.Module) -> str:
    """Hash a model's structure, the source of its classes and every tensor of its state."""
    digest = hashlib.sha256(f"{type(model).__qualname__}\n{model}".encode())
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        with suppress(OSError, TypeError):  # a class made at run time has no source
            digest.update(inspect.getsource(kind).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def fingerprint_task(task: Task) -> str:
    """The task's own fingerprint, or a hash of its class, its calibration and first training data.

    Of the test images nothing can be told without a model: see `steps.Run.take`.
    """
    own = getattr(task, "fingerprint", None)
    if isinstance(own, str):
        return own
    seed_everything(0)
    digest = hashlib.sha256(type(task).__qualname__.encode())
    for tensor in tree_leaves([task.example_input, *task.calibration_batches()]):
        digest.update(_bytes(tensor))
    for batch in islice(task.train_batches(0), NUM_HASHED_BATCHES):
        for leaf in tree_leaves(batch):
            digest.update(_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return digest.hexdigest()


def fingerprint_score(score: Score | None) -> str:
    """Hash what was found of each sample, or the score itself where that is all there is."""
    if score is None:
        return "none"
    parts = [array.tobytes() for array in (score.outcomes, score.predictions) if array is not None]
    told = f"{score.metric} {score.value!r} {score.num_samples}".encode()
    return hashlib.sha256(b"".join([told, *parts])).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@dataclass(frozen=True)
class StepFolder:
    """One folder that is made whole from `key`, or made again."""

    path: Path
    key: str

    @property
    def is_done(self) -> bool:
        """Whether the folder holds everything that this key stands for."""
        done = self.path / "DONE"
        return done.is_file() and done.read_text() == self.key

    def begin(self) -> None:
        """Make the folder ready: kept where this key began it before, emptied otherwise."""
        key = self.path / "KEY"
        with disk_errors(self.path):
            remove_temporaries(self.path)
            if key.is_file() and key.read_text() == self.key:
                return
            if key.is_file():
                self._empty(key)
            elif self.path.exists() and any(self.path.iterdir()):
                raise BadInput(
                    f"{self.path} is in the way: it was not written by slimdown; "
                    "move it or choose another run folder"
                )
        write_bytes(key, self.key.encode())

    def _empty(self, key: Path) -> None:
        """Remove the contents so that a kill in between leaves a folder that is ours and not whole.

        DONE goes first, since a folder that is half removed must not look whole, and KEY last,
        since without it the folder would not be known as ours.
        """
        (self.path / "DONE").unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path != key:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        key.unlink()

    def finish(self) -> None:
        """Mark the folder whole and drop the checkpoint that is not needed any more."""
        write_bytes(self.path / "DONE", self.key.encode())
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def save_record(self, name: str, record: object) -> None:
        """Save a dataclass or JSON value as `name`."""
        content = TypeAdapter(type(record)).dump_json(record, indent=1)
        write_bytes(self.path / name, content + b"\n")

    def load_record(self, name: str, kind: type[T]) -> T:
        """Load what `save_record` saved."""
        return TypeAdapter(kind).validate_json(self._whole(name).read_bytes())

    def save_tensors(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Save a state dict as `name`.safetensors; tensors that share storage are all written."""
        whole = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
        write_bytes(self.path / f"{name}.safetensors", save(whole))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Load what `save_tensors` saved."""
        return load_file(self._whole(f"{name}.safetensors"))

    def save_score(self, score: Score | None) -> None:
        """Save a score with its outcome and prediction of each sample; None is an empty archive."""
        arrays: dict[str, Any] = (
            {}
            if score is None
            else {
                "metric": np.array(score.metric),
                "value": np.array(score.value),
                "num_samples": np.array(score.num_samples),
                "outcomes": score.outcomes,
                "predictions": score.predictions,
            }
        )
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, **{name: array for name, array in arrays.items() if array is not None}
        )
        write_bytes(self.path / "score.npz", buffer.getvalue())

    def load_score(self) -> Score | None:
        """Load what `save_score` saved."""
        with np.load(self._whole("score.npz"), allow_pickle=False) as arrays:
            if "metric" not in arrays:
                return None
            return Score(
                metric=str(arrays["metric"]),
                value=float(arrays["value"]),
                num_samples=int(arrays["num_samples"]),
                outcomes=arrays.get("outcomes"),
                predictions=arrays.get("predictions"),
            )

    def _whole(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise BadInput(f"{path} is missing: remove {self.path} and run again to make it anew")
        return path

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Keep a stage's state between its clean points."""
        buffer = io.BytesIO()  # written by us, because torch hides a full disk in a RuntimeError
        torch.save(state, buffer)
        write_bytes(self.path / "checkpoint.pt", buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state that was kept last, or None."""
        path = self.path / "checkpoint.pt"
        if not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
