"""What a model is made of: its cost, its size, and the channels that go together."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from slimdown.core import Json
from slimdown.errors import BadInput, RecipeError, SlimdownError
from slimdown.load import ModelSource, load_model
from slimdown.measure import count_macs, count_parameters
from slimdown.prune import ChannelGroup, find_groups


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model's figures, for one input of `input_shape` (C, H, W)."""

    reference: str
    input_shape: tuple[int, int, int]
    num_parameters: int
    macs: int
    size_bytes: int
    """Of all parameters and buffers, as they are."""
    groups: tuple[ChannelGroup, ...]

    def to_json(self) -> Json:
        """Plain values, for `json.dumps`."""
        return asdict(self)


def inspect_model(source: ModelSource, *, shape: tuple[int, int, int]) -> Inspection:
    """Load a model and look at it. Raises what `load_model` and `find_groups` raise.

    Raises BadInput for a model that takes no input of (1, *shape).
    """
    model = load_model(source)
    # Noise rather than zeros: models may look at their input.
    example = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    try:
        macs = count_macs(model, example)
    except SlimdownError:
        raise
    except Exception as error:  # whatever the user's model raises
        raise BadInput(
            f"{source.reference} takes no input of {'x'.join(map(str, shape))}: "
            f"{type(error).__name__}: {error}. Give the one that it was made for, such as "
            "--input 3x32x32"
        ) from error
    return Inspection(
        reference=source.reference,
        input_shape=shape,
        num_parameters=count_parameters(model),
        macs=macs,
        size_bytes=_count_bytes(model),
        groups=find_groups(model, example),
    )


def _count_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def parse_shape(text: str) -> tuple[int, int, int]:
    """Read "3x224x224" as (C, H, W)."""
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)[xX]([1-9]\d*)", text)
    if match is None:
        raise RecipeError(f"--input is CxHxW, such as 3x224x224, got {text!r}")
    channels, height, width = map(int, match.groups())
    return channels, height, width


def render_inspection(inspection: Inspection) -> RenderableType:
    """Draw an inspection for the terminal."""
    table = Table("group", "channels", "layers", "parameters", "", box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for group in inspection.groups:
        table.add_row(
            Text(group.name),
            str(group.size),
            str(len(group.layers)),
            f"{group.num_parameters:,}",
            Text(f"frozen: {group.reason}" if group.frozen else ""),
            style="dim" if group.frozen else None,
        )
    free = sum(not group.frozen for group in inspection.groups)
    shape = "x".join(map(str, inspection.input_shape))
    heading = (
        f"{inspection.reference}\n"
        f"{inspection.num_parameters / 1e6:,.2f} M parameters  "
        f"{inspection.macs / 1e6:,.1f} M MACs at {shape}  "
        f"{inspection.size_bytes / 1e6:,.1f} MB\n"
        f"{len(inspection.groups)} groups of channels that go together, {free} can be pruned"
    )
    return Group(Text(heading), table)
