"""Weights from a file, as tensors only: no file's code is ever run."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from slimdown.errors import BadInput, Unsafe

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
WRAPPINGS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Keys under which training scripts put the state dict of a model, the likeliest first."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before every name."""
NUM_SHOWN = 4


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load a file's weights into `model`, every one of them and no other.

    Usual wrappings and prefixes are taken off, and a `num_batches_tracked` may be missing. Raises
    BadInput where the weights do not fit, naming the first that do not, and Unsafe as
    `read_weights` does.
    """
    wanted = model.state_dict()
    state = _strip_prefixes(read_weights(path), wanted)
    wrong_shapes = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in state and isinstance(tensor, Tensor) and state[name].shape != tensor.shape
    ]
    if wrong_shapes:
        raise BadInput(
            f"the weights in {path} do not fit the model: {_first(wrong_shapes)}. "
            "Check model.options, such as num_classes, and that the weights are of this model"
        )
    broken = [name for name, tensor in state.items() if not _is_finite(tensor)]
    if broken:
        raise BadInput(f"the weights in {path} hold NaN or infinity: {_first(broken)}")
    # Not strict, because the model's own hooks may rename keys of older checkpoints.
    found = model.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    problems = []
    if missing:
        problems.append(f"the file lacks {_first(missing)}")
    if found.unexpected_keys:
        problems.append(f"the model has no {_first(found.unexpected_keys)}")
    if problems:
        raise BadInput(
            f"the weights in {path} do not fit the model: {'; '.join(problems)}. "
            "Check that the reference and its options are those that the weights were saved from"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from a torch file with `weights_only`.

    Raises BadInput where the file is missing, damaged or holds no state dict, and Unsafe where it
    holds Python objects: unpickling those would run code that the file brings along.
    """
    if not path.is_file():
        raise BadInput(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path} is damaged or no safetensors file: {error}") from error
    if path.suffix not in TORCH_SUFFIXES:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise BadInput(f"weights are read from {known}, got {path}")
    return _unwrap(_read_torch_file(path), path)


def _read_torch_file(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are refused in the next moment
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        if "TorchScript" in str(error):
            raise _refusal(path) from error
        raise BadInput(f"{path} is damaged or no torch file: {error}") from error


def _refusal(path: Path) -> Unsafe:
    return Unsafe(
        f"refused to read {path}: it holds more than tensors, and loading Python objects can run "
        "any code. Where you trust it, load it yourself and save its tensors alone: "
        "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
    )


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict in a checkpoint."""
    if isinstance(content, Mapping):
        for key in WRAPPINGS:
            if isinstance(content.get(key), Mapping):
                return _unwrap(content[key], path)
        if content and all(isinstance(value, Tensor) for value in content.values()):
            # Not copied: an OrderedDict also carries the version of each module's format.
            return content  # type: ignore[return-value]
    kind = type(content).__name__
    keys = f" with the keys {_first(list(map(str, content)))}" if isinstance(content, dict) else ""
    raise BadInput(
        f"{path} holds no state dict but a {kind}{keys}: save model.state_dict(), as it is or "
        f"under one of the keys {', '.join(WRAPPINGS)}"
    )


def _strip_prefixes(state: dict[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take off a prefix that all names in the file have and the model's own do not."""
    for prefix in PREFIXES:
        everywhere = all(name.startswith(prefix) for name in state)
        if everywhere and not all(name.startswith(prefix) for name in wanted):
            stripped = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            return _strip_prefixes(stripped, wanted)
    return state


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _first(items: Sequence[str]) -> str:
    rest = len(items) - NUM_SHOWN
    return ", ".join(items[:NUM_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
