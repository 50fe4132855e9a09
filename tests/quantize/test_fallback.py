from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from slimdown.core import Context, Progress
from slimdown.errors import Interrupted, RecipeError
from slimdown.quantize import Quantize
from slimdown.quantize.fallback import shortest_beginning, without_spare
from slimdown.quantize.judge import Judge
from slimdown.quantize.mixing import FLOAT
from slimdown.quantize.stage import split_images
from slimdown.quantize.steps import Step


def poison_weights_(net: Any, size: float) -> Any:
    """Let every filter of conv2 hold one large weight, for a channel that is always zero."""
    with torch.no_grad():
        net.conv1.weight[0], net.conv1.bias[0] = 0.0, -1.0
        net.conv2.weight[:, 0] = size
    return net


def poison_values_(net: Any, size: float) -> Any:
    """Let a channel between conv1 and conv2 be large where conv2 does not look."""
    with torch.no_grad():
        net.conv1.bias[0] = size
        net.conv2.weight[:, 0] = 0.0
    return net


def changes(result: Any) -> dict[str, int]:
    step = result.facts["ladder"][-1]
    assert step["rung"] == "mixed_precision"
    return {change["layer"]: change["bits"] for change in step["changes"]}


def held_out_error(net: nn.Module, task: Any, quantized: nn.Module) -> float:
    return Judge(net, split_images(task.batches)[1]).error(quantized)


def test_a_layer_that_int8_ruins_stays_in_float(tiny_net: nn.Module, toy_task: Any) -> None:
    net = poison_weights_(tiny_net, 1e4)
    before = Quantize(effort="fast")(net, toy_task)
    result = Quantize(effort="fast", max_error=0.2)(net, toy_task)
    assert held_out_error(net, toy_task, before.model) > 0.2
    assert changes(result) == {"conv2": FLOAT}
    errors = result.facts["layer_errors"]
    assert max(errors, key=errors.__getitem__) == "conv2"
    assert result.facts["kept_float"] == {
        "conv2": f"too sensitive: error {errors['conv2']:.2g} alone"
    }
    first, last = result.facts["ladder"]
    assert first["error"] > 0.2 >= last["error"]
    assert last["error"] == pytest.approx(held_out_error(net, toy_task, result.model), rel=1e-4)
    assert json.loads(json.dumps(result.facts)) == result.facts


def test_what_is_made_is_what_excluding_these_layers_makes(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    net = poison_weights_(tiny_net, 1e4)
    states = [
        Quantize(effort="fast", **options)(net, toy_task).model.state_dict()
        for options in ({"max_error": 0.2}, {"exclude": ("conv2",)})
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_saved_run_rebuilds_the_same_module(tiny_net: nn.Module, toy_task: Any) -> None:
    net = poison_weights_(tiny_net, 1e4)
    stage = Quantize(max_error=0.05, weight_bits=4)
    result = stage(net, toy_task)
    assert {8, FLOAT} & set(changes(result).values())
    structure = json.loads(json.dumps(result.structure))
    rebuilt = stage.rebuild(net, structure, toy_task.example_input)
    rebuilt.load_state_dict(result.model.state_dict(), strict=True)
    x = torch.randn(5, 3, 16, 16)
    assert torch.equal(rebuilt(x), result.model(x))


def test_a_layer_that_4_bits_ruin_gets_8(tiny_net: nn.Module, toy_task: Any) -> None:
    net = poison_weights_(tiny_net, 3.0)
    result = Quantize(weight_bits=4, effort="fast", max_error=0.15)(net, toy_task)
    assert changes(result) == {"conv2": 8}
    bits = result.facts["weight_bits"]
    assert bits == {"stem": 8, "down": 4, "conv1": 4, "conv2": 8, "head": 8}
    assert result.facts["kept_float"] == {}
    assert result.facts["ladder"][-1]["error"] <= 0.15


def test_a_layer_that_8_bits_ruin_too_goes_right_to_float(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    net = poison_weights_(tiny_net, 1e4)
    result = Quantize(weight_bits=4, effort="fast", max_error=0.15)(net, toy_task)
    assert changes(result) == {"conv2": FLOAT}
    assert result.facts["weight_bits"]["conv1"] == 4


@pytest.mark.parametrize(
    ("profile", "kept"), [("openvino", {"conv2"}), ("onnxruntime-x86", {"conv1", "conv2"})]
)
def test_both_layers_of_a_value_that_int8_ruins_where_both_need_it(
    tiny_net: nn.Module, toy_task: Any, profile: str, kept: set[str]
) -> None:
    # On ONNX Runtime conv1 writes INT8 and conv2 reads it: either alone ruins the value.
    net = poison_values_(tiny_net, 1e6)
    result = Quantize(profile=profile, effort="fast", max_error=0.2, calibration="minmax")(
        net, toy_task
    )
    assert changes(result) == dict.fromkeys(kept, FLOAT)
    assert result.facts["ladder"][-1]["error"] <= 0.2


def test_what_was_refined_stays_where_the_bits_stay(tiny_net: nn.Module, toy_task: Any) -> None:
    net = poison_weights_(tiny_net, 3.0)
    settings: dict[str, Any] = {"weight_bits": 4, "effort": "best"}
    before = Quantize(**settings)(net, toy_task)
    limit = 0.9 * [s for s in before.facts["ladder"] if s["kept"]][-1]["error"]
    after = Quantize(max_error=limit, **settings)(net, toy_task)
    (adaround,) = (step for step in after.facts["ladder"] if step["rung"] == "adaround")
    assert adaround["kept"]
    same = {label for label, bits in after.facts["weight_bits"].items() if bits == 4}
    assert same
    for label in same:
        old, new = (r.model.get_parameter(f"{label}.weight") for r in (before, after))
        assert torch.equal(old, new)


def test_nothing_is_brought_back_where_the_limit_is_kept(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    limited, plain = (Quantize(max_error=m)(tiny_net, toy_task) for m in (10.0, None))
    assert [step["rung"] for step in limited.facts["ladder"]][-1] == "bias_correction"
    assert limited.structure == plain.structure
    assert len(limited.facts["layer_errors"]) >= 5


def test_a_limit_that_leaves_nothing_quantized_is_refused(
    tiny_net: nn.Module, toy_task: Any
) -> None:
    with pytest.raises(RecipeError, match=r"max_error is 1e-06, and with it every layer would"):
        Quantize(max_error=1e-6)(tiny_net, toy_task)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True])
def test_limits_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"quantize.max_error is the error of the outputs"):
        Quantize(max_error=value)


def test_half_precision_has_no_layers_to_bring_back() -> None:
    with pytest.raises(RecipeError, match="leave one of them out"):
        Quantize(max_error=0.1, precision="float16")


def test_progress_is_shown_and_a_stop_is_clean(tiny_net: nn.Module, toy_task: Any) -> None:
    shown: list[Progress] = []
    stage = Quantize(max_error=0.05, weight_bits=4)
    stage(tiny_net, toy_task, Context(show=shown.append))
    assert {"sensitivity", "mixed precision"} <= {each.label for each in shown}
    context = Context(
        show=shown.append, stop_requested=lambda: shown[-1].label == "mixed precision"
    )
    shown.clear()
    with pytest.raises(Interrupted):
        stage(tiny_net, toy_task, context)


@pytest.mark.parametrize("needed", range(1, 20))
def test_bisection_finds_the_shortest_beginning(needed: int) -> None:
    steps = [make_step(str(i)) for i in range(20)]
    tried = []

    def error_after(taken: Sequence[Step]) -> float:
        tried.append(len(taken))
        return 1.0 - len(taken) / 20

    assert shortest_beginning(steps, 1.0 - needed / 20, error_after) == steps[:needed]
    assert len(tried) <= 5
    assert shortest_beginning(steps, -1.0, error_after) is None


def test_small_steps_before_a_large_one_that_was_needed_are_taken_back() -> None:
    small, large = [make_step(str(i), gain=0.001) for i in range(4)], make_step("large", gain=0.9)

    def error_after(taken: Sequence[Step]) -> float:
        return (1.0 - sum(step.gain for step in taken)) ** 0.5

    assert without_spare([*small, large], 0.1001**0.5, error_after) == [large]
    kept = without_spare([*small, large], 0.0985**0.5, error_after)
    assert kept == [*small[:2], large]


def test_steps_that_turn_out_to_be_needed_stay() -> None:
    steps = [make_step(str(i), gain=0.01) for i in range(4)]
    errors = {4: 0.1, 3: 0.5, 2: 0.5, 1: 0.5}
    assert without_spare(steps, 0.4, lambda taken: errors[len(taken)]) == steps


def make_step(label: str, *, gain: float = 1.0) -> Step:
    return Step(label=label, bits=FLOAT, gain=gain, cost=1.0, error=1.0)
