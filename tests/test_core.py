"""The contracts check what they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimdown.core import Artifact, Budget, Preprocess, Score
from slimdown.errors import (
    BadInput,
    CannotCapture,
    Diverged,
    Interrupted,
    MissingExtra,
    OutOfResources,
    RecipeError,
    SlimdownError,
    Unsafe,
)


def test_a_score_is_the_mean_of_its_outcomes_in_points() -> None:
    score = Score.from_outcomes("top1", torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert score.value == 75.0
    assert score.num_samples == 4


@pytest.mark.parametrize("outcomes", [torch.ones(0), torch.ones(2, 2)])
def test_a_score_needs_one_outcome_a_sample(outcomes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one outcome a sample"):
        Score.from_outcomes("top1", outcomes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_drop": -1.0}, "max_drop is in points"),
        ({"max_drop": float("nan")}, "max_drop is in points"),
        ({"min_speedup": 0.0}, "min_speedup is a ratio"),
        ({"max_size": 0}, "max_size is in bytes"),
    ],
)
def test_a_budget_out_of_range_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Budget(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5,)}, "need 3 values"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be positive"),
        ({"size": (0, 4)}, "size must be positive"),
    ],
)
def test_a_preprocess_out_of_range_is_refused(change: dict[str, object], message: str) -> None:
    settings = {"size": (4, 4), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **change}
    with pytest.raises(RecipeError, match=message):
        Preprocess(**settings)  # type: ignore[arg-type]


def test_an_artifact_moves_with_its_run() -> None:
    path = Path("/runs/one/deploy/model.onnx")
    artifact = Artifact(
        target="onnxruntime",
        path=path,
        files=(path,),
        sha256="0",
        size_bytes=1,
        precision="int8",
    )
    told = artifact.relative_to(Path("/runs/one"))
    assert told.path == Path("deploy/model.onnx")
    assert told.under(Path("/moved")).files == (Path("/moved/deploy/model.onnx"),)


def test_the_documented_exit_codes() -> None:
    codes = {
        RecipeError: 2,
        MissingExtra: 4,
        BadInput: 5,
        CannotCapture: 5,
        Diverged: 5,
        Unsafe: 6,
        OutOfResources: 7,
        Interrupted: 130,
    }
    assert {error: error.exit_code for error in codes} == codes
    assert all(issubclass(error, ValueError) for error in codes if error is not Interrupted)
    assert issubclass(RecipeError, SlimdownError)
    assert not issubclass(Interrupted, Exception)  # `except Exception` must not swallow Ctrl-C


def test_a_missing_extra_prints_the_line_that_installs_it() -> None:
    assert str(MissingExtra("openvino", "openvino")) == (
        "openvino is not installed: pip install 'slimdown[openvino]'"
    )
