"""What layers and weights of a file are called: as in the code that it was exported from."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

_MADE_UP = re.compile(
    r"\d+|_?val_?\d*|onnx::.*|node_.*|.*_output_\d+|.*constant.*|lifted_tensor.*|scalar_tensor.*"
    r"|t\d+|tmp.*",
    re.IGNORECASE,
)


def is_made_up(name: str) -> bool:
    """Whether an exporter counted a tensor, rather than naming it after the user's own."""
    return not name or _MADE_UP.fullmatch(name) is not None


def layer_path(op: str, node_name: str, weight_name: str, *, scope: str = "") -> str:
    """The dotted path of a layer: its weight's without the last part, its scope, or its node's.

    The TorchScript exporter calls nodes "/layer1/layer1.0/conv1/Conv", a container's name before
    each of its members.
    """
    if not is_made_up(weight_name):
        stem, _, last = _clean(weight_name).rpartition(".")
        return stem or last
    if scope:
        return _clean(scope)
    *scopes, last = [part for part in node_name.split("/") if part] or [op.lower()]
    if not scopes:
        return _clean(last)
    inner = [*scopes[1:], ""]
    own = [scope for scope, after in zip(scopes, inner, strict=True) if not _is_in(after, scope)]
    return _clean(".".join(own))


def _is_in(scope: str, container: str) -> bool:
    return scope.startswith(f"{container}.")


def _clean(name: str) -> str:
    dotted = re.sub(r"[/:]+", ".", name)
    parts = [re.sub(r"\W", "_", part) for part in dotted.split(".") if part]
    return ".".join(parts) or "value"


def place_(root: nn.Module, path: str, item: nn.Module | Tensor) -> str:
    """Put a layer, a parameter or a buffer into a tree of modules; return the path it has there.

    A name that is taken gets a number, and one that every module needs for itself an underscore.
    """
    reserved = nn.Module()
    parts = (f"{part}_" if hasattr(reserved, part) else part for part in _clean(path).split("."))
    *around, last = parts
    owner, place = root, []
    for part in around:
        child = owner._modules.get(part)
        if child is None:
            part = _free(owner, part)
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
        place.append(part)
    last = _free(owner, last)
    _attach_(owner, last, item)
    return ".".join([*place, last])


def _free(owner: nn.Module, name: str) -> str:
    number, free = 1, name
    while hasattr(owner, free):
        number += 1
        free = f"{name}_{number}"
    return free


def _attach_(owner: nn.Module, name: str, item: Any) -> None:
    if isinstance(item, nn.Module):
        owner.add_module(name, item)
    elif isinstance(item, nn.Parameter):
        owner.register_parameter(name, item)
    else:
        owner.register_buffer(name, item)
