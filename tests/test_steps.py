"""What a run lends its stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimdown import steps
from slimdown.core import Context, Operation, Score
from slimdown.measure import count_parameters
from slimdown.plan import plan_steps
from slimdown.prune import Prune
from slimdown.steps import Run
from slimdown.targets import TARGETS


class ParameterClock:
    """As if a network took a millisecond a parameter."""

    runtime, round_to = "fake 1", 4

    def __init__(self) -> None:
        self.num_deployed = 0

    def time_operations(self, operations: Sequence[Operation]) -> list[float]:
        return [float(torch.Size(each.shapes[1]).numel()) for each in operations]

    def deploy(self, model: nn.Module, example_input: Tensor) -> Any:
        self.num_deployed += 1
        return lambda inputs: count_parameters(model)

    def time_networks(self, predicts: Sequence[Any], example_input: Tensor) -> list[float]:
        return [float(predict(example_input)) for predict in predicts]


def test_a_latency_is_kept_to_on_each_target_and_measured_once(
    tiny_net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = ParameterClock(), list[str]()
    monkeypatch.setattr(steps, "clock_for", lambda target: asked.append(target) or clock)
    task: Any = SimpleNamespace(
        example_input=torch.randn(1, 3, 16, 16),
        fingerprint="data",
        score=lambda predict: Score.from_outcomes("top1", torch.ones(4)),
    )
    stage = Prune(latency=0.6, importance="l2", compensate=False)
    planned = plan_steps([stage], list(TARGETS.values()))
    assert [plan.name for plan in planned[1:]] == ["01-prune-onnxruntime", "01-prune-openvino"]
    for _ in range(2):  # the second time, steps are whole
        run = Run(folder=tmp_path, task=task, context=Context())
        made = {planned[0].name: run.take(tiny_net)}
        facts = [run.make(plan, made).step.facts["latency"] for plan in planned[1:]]
        assert asked == ["onnxruntime", "openvino"]
    before, after = count_parameters(tiny_net), run.make(planned[1], made).step.num_parameters
    assert after / before == pytest.approx(0.6, rel=0.05)
    assert [each["measured"] for each in facts] == pytest.approx([after / before] * 2)
