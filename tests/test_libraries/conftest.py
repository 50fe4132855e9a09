"""What every library's models have to pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimdown.core import StageResult
from slimdown.prune import Prune
from slimdown.prune.plan import Plan


@pytest.fixture
def prune() -> Callable[..., StageResult]:
    """`prune(model, 64, macs=0.6)`: by the sizes of the weights, for images of 64x64 pixels."""

    def run(model: nn.Module, size: int, *, macs: float) -> StageResult:
        task: Any = SimpleNamespace(
            example_input=torch.randn(1, 3, size, size),
            calibration_batches=lambda: [torch.randn(2, 3, size, size)],
        )
        stage = Prune(macs=macs, round_to=2, importance="l2", compensate=False)
        return stage(model, task)

    return run


@pytest.fixture
def masked() -> Callable[[nn.Module, StageResult], nn.Module]:
    """The model in float64 with zeros in the place of all that a pruning removed.

    The independent reference: the library's own modules, no graph.
    """

    def run(model: nn.Module, result: StageResult) -> nn.Module:
        twin = copy.deepcopy(model).double().eval()
        slices = Plan.from_json(result.structure).slices
        assert slices
        with torch.no_grad():
            for name, weight in twin.named_parameters():
                for axis, kept in slices.get(name, {}).items():
                    gone = torch.ones(weight.shape[axis], dtype=torch.bool)
                    gone[list(kept)] = False
                    weight.index_fill_(axis, gone.nonzero().flatten(), 0)
        return twin

    return run


@pytest.fixture
def differ() -> Callable[[Any, Any], float]:
    """Largest difference of two tensors, over the spread of the second over the batch."""

    def compare(ours: Tensor, theirs: Tensor) -> float:
        spread = (theirs - theirs.mean(0)).abs().max()
        assert spread > 0
        return float((ours - theirs).abs().max() / spread)

    return compare
