"""What a run would do and need is told without doing any of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from slimdown.core import Stage
from slimdown.distill import Distill
from slimdown.dry_run import look_ahead, needs_of, render_outlook
from slimdown.errors import MissingExtra
from slimdown.load import DataSource, ModelSource
from slimdown.prune import Prune
from slimdown.quantize import Quantize
from slimdown.recipe import Recipe
from slimdown.sparsify import Sparsify
from slimdown.targets import TARGETS, find_target

DIGITS = DataSource(kind="digits")
STAGES = [Prune(macs=0.5), Distill(), Quantize()]


def test_the_steps_and_their_needs() -> None:
    recipe = Recipe(STAGES, data=DIGITS, targets=("onnxruntime", "openvino"))
    outlook = look_ahead(recipe, folder=Path("runs/run"))
    assert [step.name for step in outlook.steps] == [
        "00-original",
        "01-prune",
        "02-distill",
        "03-quantize-onnxruntime",
        "03-quantize-openvino",
    ]
    assert outlook.steps[0].targets == ("onnxruntime", "openvino")
    assert outlook.steps[3].targets == ("onnxruntime",)
    assert outlook.steps[3].needs == ("256 calibration images",)


@pytest.mark.parametrize(
    ("stage", "needs"),
    [
        (Distill(alpha=0), ["training images", "the original as teacher"]),
        (Distill(alpha=0.5), ["training images with labels", "the original as teacher"]),
        (Distill(alpha=1), ["training images with labels"]),
        (Prune(macs=0.5), ["256 calibration images"]),
        (Prune(macs=0.5, importance="l2", compensate=False), ["one image"]),
        (
            Prune(macs=0.5, importance="l2", compensate=False, depth=0.1, num_images=9),
            ["9 calibration images"],
        ),
        (Prune(macs=0.5, importance="taylor"), ["256 training images with labels"]),
        (Sparsify(pattern="2:4"), ["64 calibration images"]),
        (Sparsify(pattern="2:4", method="magnitude"), ["one image"]),
        (Quantize(num_images=32), ["32 calibration images"]),
        (Quantize(precision="float16"), ["one image"]),
    ],
)
def test_what_each_stage_needs(stage: Stage, needs: list[str]) -> None:
    assert needs_of(stage) == needs


def test_disk_is_counted_from_the_weights_file(tmp_path: Path) -> None:
    weights = tmp_path / "net.safetensors"
    weights.write_bytes(b"0" * 1000)
    model = ModelSource(reference="nowhere.to:import", weights=weights)
    recipe = Recipe([Prune(macs=0.5), Quantize()], model=model, data=DIGITS)
    outlook = look_ahead(recipe, folder=tmp_path / "run")
    # Two steps with weights, and the original and both steps deployed on one target.
    assert outlook.disk_bytes == 5 * 1000
    assert list(tmp_path.iterdir()) == [weights]


def test_disk_is_counted_from_a_library_model_without_its_weights() -> None:
    model = ModelSource(reference="torchvision:squeezenet1_1", options={"pretrained": True})
    outlook = look_ahead(Recipe([], model=model, data=DIGITS), folder=Path("x"))
    assert outlook.disk_bytes == 4 * 1_235_496  # the artifact of the original


def test_disk_is_not_guessed_for_a_model_of_the_users() -> None:
    model = ModelSource(reference="nowhere.to:import")
    outlook = look_ahead(Recipe([], model=model, data=DIGITS), folder=Path("x"))
    assert outlook.disk_bytes is None
    assert outlook.runs_code_of == "nowhere.to:import"
    assert outlook.exit_code == 0


def test_missing_extras_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_missing(self: object) -> str:
        raise MissingExtra("openvino", "openvino")

    monkeypatch.setattr(type(find_target("openvino")), "check", is_missing)
    model = ModelSource(reference="a:b", weights=tmp_path / "none.safetensors")
    data = DataSource(kind="folder", root=tmp_path / "none")
    recipe = Recipe(STAGES, model=model, data=data, targets=tuple(TARGETS))
    outlook = look_ahead(recipe, folder=tmp_path / "run")
    assert [problem.exit_code for problem in outlook.problems] == [4, 5, 5]
    assert outlook.exit_code == 4
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render_outlook(outlook))
    assert "Missing: openvino is not installed: pip install 'slimdown[openvino]'" in captured.get()
    assert f"data.root: there is no {tmp_path / 'none'}" in captured.get()


def test_a_recipe_that_cannot_run_alone_says_so() -> None:
    assert look_ahead(Recipe(STAGES), folder=Path("x")).exit_code == 2


def test_the_plan_is_drawn() -> None:
    model = ModelSource(reference="slimdown.load.digits_net:digits_net")
    outlook = look_ahead(Recipe(STAGES, model=model, data=DIGITS), folder=Path("runs/x"))
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render_outlook(outlook))
    text = captured.get()
    assert "03-quantize-onnxruntime" in text
    assert "256 calibration images" in text
    assert "runs/x (nothing was written)" in text
    assert "Code:" not in text  # the demo's network is our own
