"""What a model is made of."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from slimdown.errors import BadInput, RecipeError
from slimdown.inspect import inspect_model, parse_shape, render_inspection
from slimdown.load import ModelSource, load_model
from slimdown.measure import count_macs, count_parameters

DIGITS_NET = ModelSource(reference="slimdown.load.digits_net:digits_net")


def test_a_model_is_inspected() -> None:
    inspection = inspect_model(DIGITS_NET, shape=(1, 32, 32))
    model = load_model(DIGITS_NET)
    assert inspection.num_parameters == count_parameters(model)
    assert inspection.macs == count_macs(model, torch.zeros(1, 1, 32, 32))
    assert inspection.size_bytes == sum(t.nbytes for t in model.state_dict().values())
    by_name = {group.name: group for group in inspection.groups}
    assert by_name["linear"].frozen  # the classes
    assert not by_name["block2.conv1"].frozen
    # A residual sum ties the layers on both its sides.
    assert by_name["conv1"].layers == ("conv1", "block1.conv2")
    assert json.loads(json.dumps(inspection.to_json()))["macs"] == inspection.macs

    console = Console(width=120)
    with console.capture() as captured:
        console.print(render_inspection(inspection))
    assert "M MACs at 1x32x32" in captured.get()
    assert "frozen: output" in captured.get()


def test_a_wrong_input_is_told() -> None:
    with pytest.raises(BadInput, match=r"takes no input of 3x32x32: .* --input"):
        inspect_model(DIGITS_NET, shape=(3, 32, 32))


def test_shapes_are_read() -> None:
    assert parse_shape("3x224x224") == (3, 224, 224)
    assert parse_shape("1X8x16") == (1, 8, 16)


@pytest.mark.parametrize("text", ["", "224", "3x224", "1x3x224x224", "3x0x3", "axbxc", "3,4,5"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--input is CxHxW, such as 3x224x224, got"):
        parse_shape(text)
