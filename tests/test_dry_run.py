"""What a run would do and need is told without doing any of it."""

from __future__ import annotations

import sys
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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("squeezenet1_1", {"weights": "DEFAULT"}),
        ("fcn_resnet50", {"weights": None, "weights_backbone": "DEFAULT"}),
        ("resnet18", {"pretrained": True}),
    ],
)
def test_nothing_is_fetched(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, object]
) -> None:
    def fetch(*args: object, **kwargs: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    model = ModelSource(reference=f"torchvision:{name}", options=options)
    outlook = look_ahead(Recipe([], model=model, data=DIGITS), folder=Path("x"))
    assert outlook.exit_code == 0
    assert outlook.disk_bytes is not None


def test_models_of_the_hub_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimdown.dry_run.load_model", lambda source: pytest.fail("made"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for reference in ("transformers:google/vit-base-patch16-224", "ultralytics:yolo11n.yaml"):
        recipe = Recipe([], model=ModelSource(reference=reference), data=DIGITS)
        outlook = look_ahead(recipe, folder=Path("x"))
        assert (outlook.disk_bytes, outlook.exit_code) == (None, 0)


def test_an_unknown_model_is_told(tmp_path: Path) -> None:
    weights = tmp_path / "net.safetensors"
    weights.write_bytes(b"0" * 1000)
    for options, said in (({}, "did you mean"), ({"nonsense": 1}, "nonsense")):
        name = "resnet18" if options else "resnet1O"
        model = ModelSource(reference=f"torchvision:{name}", options=options, weights=weights)
        outlook = look_ahead(Recipe([], model=model, data=DIGITS), folder=Path("x"))
        assert outlook.exit_code == 2
        assert said in str(outlook.problems[0])
        assert outlook.disk_bytes == 1000  # the artifact of the original


@pytest.mark.transformers
def test_an_unknown_type_of_transformers_is_told() -> None:
    pytest.importorskip("transformers", reason="needs the transformers extra")
    for name, codes in (("vti", [2]), ("vit", [])):
        recipe = Recipe([], model=ModelSource(reference=f"transformers:{name}"), data=DIGITS)
        outlook = look_ahead(recipe, folder=Path("x"))
        assert [problem.exit_code for problem in outlook.problems] == codes
        assert outlook.disk_bytes is None


@pytest.mark.parametrize(
    ("reference", "extra"),
    [
        ("timm:resnet18", "timm"),
        ("transformers:vit", "transformers"),
        ("transformers:owner/name", "transformers"),
        ("ultralytics:yolo11n.yaml", "ultralytics"),
    ],
)
def test_missing_libraries_of_models_are_told(
    monkeypatch: pytest.MonkeyPatch, reference: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    recipe = Recipe([], model=ModelSource(reference=reference), data=DIGITS)
    outlook = look_ahead(recipe, folder=Path("x"))
    assert [str(problem) for problem in outlook.problems] == [
        f"{extra} is not installed: pip install 'slimdown[{extra}]'"
    ]


def test_the_runtime_that_a_latency_is_measured_on_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_missing(self: object) -> str:
        raise MissingExtra("openvino", "openvino")

    monkeypatch.setattr(type(find_target("openvino")), "check", is_missing)
    model = ModelSource(reference="a:b")
    for target, said in (("openvino", "not installed: pip install"), ("openvion", "openvion")):
        stages = [Prune(latency=0.5, target=target), Prune(latency=0.5)]
        outlook = look_ahead(Recipe(stages, model=model, data=DIGITS), folder=Path("x"))
        assert len(outlook.problems) == 1
        assert said in str(outlook.problems[0])


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
