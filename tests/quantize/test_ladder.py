from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimdown.core import Context, Progress
from slimdown.errors import Interrupted, RecipeError
from slimdown.quantize import Quantize, ladder
from slimdown.quantize.placement import Placement
from slimdown.quantize.stage import FEW, MOST_FITTED, split_images


def scale_conv1(graph_module: GraphModule, factor: float) -> GraphModule:
    rewritten = copy.deepcopy(graph_module)
    with torch.no_grad():
        rewritten.get_submodule("conv1").weight.mul_(factor)
    return rewritten


def break_it(
    graph_module: GraphModule, images: Sequence[Tensor], placement: Placement
) -> GraphModule:
    return scale_conv1(graph_module, 3.0)


def keep_it(
    graph_module: GraphModule, images: Sequence[Tensor], placement: Placement
) -> GraphModule:
    return scale_conv1(graph_module, 1.0)


def break_it_(quantized: GraphModule, *others: Any, after: Any) -> None:
    after()
    with torch.no_grad():
        quantized.get_submodule("conv1").weight.zero_()


@pytest.fixture
def rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "REWRITES", {"break": break_it, "keep": keep_it})
    monkeypatch.setattr(ladder, "REFINEMENTS", {"break_": break_it_})
    monkeypatch.setitem(ladder.EFFORTS, "best", ("break", "keep", "break_"))


def test_a_rung_that_does_not_help_is_taken_back(
    rungs: None, tiny_net: nn.Module, toy_task: Any
) -> None:
    plain = Quantize(effort="fast")(tiny_net, toy_task)
    tried = Quantize(effort="best")(tiny_net, toy_task)
    assert plain.facts["ladder"] == []
    assert [(step["rung"], step["kept"]) for step in tried.facts["ladder"]] == [
        ("ranges", True),
        ("break", False),
        ("keep", False),  # no worse, and no better
        ("break_", False),
    ]
    errors = [step["error"] for step in tried.facts["ladder"]]
    assert errors[0] == errors[2] < min(errors[1], errors[3])
    states = [result.model.state_dict() for result in (plain, tried)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_progress_tells_the_rung_and_a_stop_is_clean(
    rungs: None, tiny_net: nn.Module, toy_task: Any
) -> None:
    shown: list[Progress] = []
    Quantize(effort="best")(tiny_net, toy_task, Context(show=shown.append))
    assert {"calibrate", "break", "keep", "break_"} == {each.label for each in shown}

    def stop_at_last() -> bool:
        return shown[-1].label == "break_"

    context = Context(show=shown.append, stop_requested=stop_at_last)
    with pytest.raises(Interrupted):
        Quantize(effort="best")(tiny_net, toy_task, context)


def test_an_effort_that_does_not_exist() -> None:
    with pytest.raises(RecipeError, match="effort must be fast or balanced or best, got 'max'"):
        Quantize(effort="max")  # type: ignore[arg-type]


def test_every_fourth_image_is_held_out() -> None:
    images = torch.arange(40.0).view(40, 1, 1, 1)
    fitted, held_out = (torch.cat(part).flatten() for part in split_images(images.split(7)))
    assert held_out.tolist() == list(range(3, 40, 4))
    assert sorted([*fitted.tolist(), *held_out.tolist()]) == list(range(40))


def test_a_few_images_are_not_split() -> None:
    images = torch.arange(float(FEW - 1)).view(-1, 1, 1, 1)
    fitted, held_out = split_images(images.split(4))
    assert fitted is held_out
    assert torch.cat(fitted).numel() == FEW - 1


def test_no_more_images_are_kept_than_are_fitted_to() -> None:
    def endless() -> Any:
        while True:
            yield torch.zeros(32, 1, 1, 1)

    fitted, held_out = split_images(endless())
    assert sum(map(len, fitted)) == MOST_FITTED
    assert sum(map(len, held_out)) == MOST_FITTED // 3
