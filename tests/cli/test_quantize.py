"""`slimdown quantize`: the recipe that its options stand for, and its runs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import Result

from slimdown import DataSource, ModelSource, Quantize, Recipe
from slimdown.cli.quantize import describe_data
from slimdown.errors import Interrupted, MissingExtra
from slimdown.recipe import load_recipe
from slimdown.report import read_results

Slimdown = Callable[..., Result]
FAST = ("-s", "measure={num_samples: 3, num_warmup: 1, memory: false}")


def printed_recipe(result: Result, folder: Path) -> Recipe:
    """The recipe at the end of what a command printed, read from a file elsewhere."""
    path = folder / "elsewhere" / "printed.yaml"
    path.parent.mkdir()
    path.write_text(result.stdout.partition("this command as a recipe:\n")[2])
    return load_recipe(path)


def write_images(folder: Path, count: int, *, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{index}.png")


# ------------------------------------------------------------------------------ what it stands for


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        ([], Quantize()),
        (["--precision", "float16"], Quantize(precision="float16")),
        (
            ["--weight-bits", 4, "--activation-bits", 6, "--calibration", "entropy"],
            Quantize(weight_bits=4, activation_bits=6, calibration="entropy"),
        ),
        (
            ["--effort", "fast", "--num-images", 8, "--profile", "openvino"],
            Quantize(effort="fast", num_images=8, profile="openvino"),
        ),
        (["--exclude", "0", "--exclude", "6*"], Quantize(exclude=("0", "6*"))),
        (["-s", "quantize.weight_bits=5"], Quantize(weight_bits=5)),
    ],
    ids=str,
)
def test_options_are_the_settings_of_the_stage(
    slimdown: Slimdown, recipe: Path, tmp_path: Path, options: list[object], stage: Quantize
) -> None:
    result = slimdown("quantize", "net.py:build", "--data", "digits", "--dry-run", *options)
    assert result.exit_code == 0, result.output
    assert printed_recipe(result, tmp_path).stages == (stage,)


def test_the_rest_of_the_recipe(slimdown: Slimdown, recipe: Path, tmp_path: Path) -> None:
    options = ["--weights", "w.pt", "--target", "openvino", "--target", "onnxruntime", "--seed", 3]
    result = slimdown(
        *("quantize", "net.py:build", "--data", "digits", "--num-images", 9, "--dry-run", *options),
        *("-s", "budget.max_drop=1", "-s", "model.options.width=2"),
    )
    assert "there is no file" in result.stdout  # the weights
    found = printed_recipe(result, tmp_path)
    assert found.model == ModelSource(
        f"{tmp_path / 'net.py'}:build", tmp_path / "w.pt", {"width": 2}
    )
    assert found.data == DataSource(kind="digits", calibration=9)
    assert found.targets == ("openvino", "onnxruntime")
    assert (found.name, found.seed, found.budget.max_drop) == ("build-int8", 3, 1)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("torchvision:resnet18", "resnet18-int8"),
        ("timm:hf_hub:a/b.c_d", "b.c_d-int8"),
        ("transformers:owner/vit-tiny", "owner-vit-tiny-int8"),
        ("package.module:build", "build-int8"),
        ("nets/tiny.v2.onnx", "tiny.v2-int8"),
    ],
)
def test_the_name_is_that_of_the_model(
    slimdown: Slimdown, recipe: Path, tmp_path: Path, reference: str, name: str
) -> None:
    result = slimdown("quantize", reference, "--data", "digits", "--dry-run")
    assert printed_recipe(result, tmp_path).name.endswith(name)


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ([], True),
        (["--weights", "resnet18.pt"], False),
        (["-s", "model.options.pretrained=true"], False),
    ],
)
def test_random_weights_are_told(
    slimdown: Slimdown, recipe: Path, options: list[str], is_told: bool
) -> None:
    arguments = ("quantize", "torchvision:resnet18", "--data", "digits", "--dry-run")
    said = slimdown(*arguments, *options).stderr
    assert ("torchvision:resnet18 has random weights" in said) == is_told


def test_data_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "parts" / "train" / "cat", 1)
    write_images(tmp_path / "classes" / "cat", 1)
    write_images(tmp_path / "classes" / "dog", 1)
    write_images(tmp_path / "unlabeled" / "monday", 1)
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "test.npz").touch()
    both = {"calibration_from_test": True}
    assert describe_data("digits") == {"kind": "digits"}
    assert describe_data("parts") == {"kind": "folder", "root": "parts", **both}
    assert describe_data("classes") == {"kind": "folder", "test": "classes", **both}
    assert describe_data("unlabeled") == {"kind": "folder", "train": "unlabeled"}
    assert describe_data("arrays") == {"kind": "npz", "root": "arrays", **both}
    assert describe_data("some.npz") == {"kind": "npz", "test": "some.npz", **both}
    write_images(tmp_path / "digits", 1)
    assert describe_data("digits")["kind"] == "folder"  # the user's own come first


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--weight-bits", 1], 2, "--weight-bits: quantize.weight_bits must be a whole number"),
        (["--activation-bits", 9], 2, "--activation-bits: quantize.activation_bits must be"),
        (["--num-images", 0], 2, "must be at least 1, got 0"),
        (["--target", "onnxruntim"], 2, "--target: targets names no runtime: 'onnxruntim'; did"),
        (["--calibration", "mes"], 2, "--calibration: "),
        (["--precision", "int4"], 2, "--precision: "),
        (["--effort", "most"], 2, "--effort: "),
        (["--profile", "nvidia"], 2, "--profile: quantize.profile names no profile: 'nvidia'"),
        (["--weight-bits", "few"], 2, "--weight-bits"),
        (["-s", "prune.macs=0.5"], 2, "has no prune stage"),
        (["--weights", "none.safetensors"], 5, "there is no weights file"),
        (["--data", "nowhere"], 5, "there is no folder"),
        (["--data", "nowhere.npz"], 5, "there is no file"),
        (["--data", "empty"], 5, "empty holds no images"),
    ],
    ids=str,
)
def test_bad_input_ends_before_anything_is_written(
    slimdown: Slimdown, recipe: Path, options: list[object], code: int, message: str
) -> None:
    (recipe.parent / "empty").mkdir()
    data = () if "--data" in options else ("--data", "digits")
    result = slimdown("quantize", "net.py:build", *data, *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits"], "Missing argument"),
        (["net.py:build"], "Missing option '--data'"),
        (["resnet18", "--data", "digits"], "MODEL: model.reference is"),
    ],
)
def test_what_is_missing_is_2(
    slimdown: Slimdown, recipe: Path, arguments: list[str], message: str
) -> None:
    result = slimdown("quantize", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_layers_that_do_not_exist_are_2(slimdown: Slimdown, recipe: Path) -> None:
    result = slimdown("quantize", "net.py:build", "--data", "digits", "--exclude", "zzz", *FAST)
    assert result.exit_code == 2
    assert "quantize.exclude matches no layer: 'zzz'" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(MissingExtra("openvino", "openvino"), 4), (Interrupted("stopped before 01-quantize"), 130)],
    ids=["extra", "interrupted"],
)
def test_errors_of_the_run_have_their_exit_codes(
    slimdown: Slimdown,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        assert not options["stop_requested"]()
        raise error

    monkeypatch.setattr("slimdown.cli.app.run_recipe", fail)
    result = slimdown("quantize", "net.py:build", "--data", "digits")
    assert result.exit_code == code
    assert result.stdout == ""
    assert str(error) in result.stderr


# -------------------------------------------------------------------------------------- true runs


def test_a_run_is_that_of_its_recipe(slimdown: Slimdown, recipe: Path, tmp_path: Path) -> None:
    options = ("--data", "digits", "--num-images", 64, "--exclude", "6", *FAST)
    result = slimdown("quantize", "net.py:build", *options, "--out", "mine")
    assert result.exit_code == 0, result.output
    mine = tmp_path / "mine"
    model = mine / "deploy" / "onnxruntime" / "01-quantize-onnxruntime" / "model.onnx"
    assert "recipe: mine/recipe.yaml" in result.stdout
    assert f"onnxruntime: {model.relative_to(tmp_path)}" in result.stdout
    graph = onnx.load(model).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) > 0
    floats = {each.name for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT}
    assert "6.weight" in floats

    # Printed and written, it is one recipe; by itself it finds every step made.
    printed = printed_recipe(result, tmp_path)
    assert printed == load_recipe(mine / "recipe.yaml")
    made = {path: path.stat().st_mtime_ns for path in mine.rglob("DONE")}
    assert made
    again = slimdown("run", "elsewhere/printed.yaml", "--out", "mine")
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("DONE")} == made


def test_an_onnx_file(
    slimdown: Slimdown, recipe: Path, tiny_net: nn.Module, tmp_path: Path
) -> None:
    net = tmp_path / "tiny.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations in the exporter
        torch.onnx.export(tiny_net, (torch.randn(1, 3, 16, 16),), net, verbose=False)
    write_images(tmp_path / "images", 24)
    result = slimdown("quantize", "tiny.onnx", "--data", "images", *FAST)
    assert result.exit_code == 0, result.output
    assert "random weights" not in result.stderr
    assert "INT8 kernels: 5 of 5 layers" in result.stdout
    printed = printed_recipe(result, tmp_path)
    assert printed.model == ModelSource(reference=str(net))
    made = next((tmp_path / "runs" / "tiny-int8" / "deploy").rglob("*quantize*/model.onnx"))
    images = np.random.default_rng(1).normal(size=(8, 3, 16, 16)).astype(np.float32)
    before, after = (predict(path, images) for path in (net, made))
    assert np.abs(after - before).max() < 0.1 * np.abs(before).max()


def predict(path: Path, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0] for image in images])


def test_an_onnx_file_is_pruned_as_any_model(
    slimdown: Slimdown, recipe: Path, tiny_net: nn.Module, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations in the exporter
        torch.onnx.export(
            tiny_net, (torch.randn(1, 3, 16, 16),), tmp_path / "tiny.onnx", verbose=False
        )
    write_images(tmp_path / "images", 24)
    text = recipe.read_text().replace("net.py:build", "tiny.onnx")
    recipe.write_text(text.replace("{kind: digits}", "{kind: folder, train: images}"))
    assert slimdown("run", recipe, "--dry-run").exit_code == 0
    result = slimdown("run", recipe, "--out", "run")
    assert result.exit_code == 0, result.output
    report = read_results(tmp_path / "run")
    original, pruned, _ = report.steps
    assert pruned.num_parameters < 0.7 * original.num_parameters
    assert pruned.macs <= 0.5 * original.macs


def test_class_folders_calibrate_and_judge(slimdown: Slimdown, recipe: Path) -> None:
    for seed, name in enumerate(("cat", "dog")):
        write_images(recipe.parent / "images" / name, 10, seed=seed)
    net = (recipe.parent / "net.py").read_text()
    (recipe.parent / "net.py").write_text(
        net.replace("Conv2d(1,", "Conv2d(3,").replace("16, 10", "16, 2")
    )
    options = ("--data", "images", "--num-images", 12, *FAST)
    result = slimdown("quantize", "net.py:build", *options)
    assert result.exit_code == 0, result.output
    found = read_results(recipe.parent / "runs" / "build-int8").measurements[-1].accuracy
    assert found is not None
    assert (found.metric, found.num_samples) == ("top1", 8)
    assert "12 of 20 test images calibrate and are not judged on" in result.stderr


def test_images_without_labels_give_no_accuracy(slimdown: Slimdown, recipe: Path) -> None:
    write_images(recipe.parent / "images", 20)
    net = (recipe.parent / "net.py").read_text()
    (recipe.parent / "net.py").write_text(net.replace("Conv2d(1,", "Conv2d(3,"))
    command = ("quantize", "net.py:build", "--data", "images", *FAST)
    planned = slimdown(*command, "--dry-run")
    assert "test images" not in planned.stdout
    result = slimdown(*command)
    assert result.exit_code == 0, result.output
    assert "no accuracy is judged" in result.stderr
    assert re.search(r"accuracy +not measured +not measured", result.stdout)
    run = recipe.parent / "runs" / "build-int8"
    report = read_results(run)
    assert [each.accuracy for each in report.measurements] == [None] * 4
    assert report.measurements[-1].latency is not None
    assert report.steps[-1].facts["num_calibration_images"] == 20
    assert not list(run.rglob("labels.json"))

    made = {path: path.stat().st_mtime_ns for path in run.rglob("DONE")}
    again = slimdown(*command, "-s", "budget.max_drop=1")
    assert again.exit_code == 3  # a promise that nobody checked
    assert {path: path.stat().st_mtime_ns for path in run.rglob("DONE")} == made
    assert slimdown("bench", run).exit_code == 3


def test_a_budget_that_is_missed_is_3_and_still_tells_the_recipe(
    slimdown: Slimdown, recipe: Path
) -> None:
    options = ("--data", "digits", "--precision", "float16", *FAST, "-s", "budget.max_size=1")
    result = slimdown("quantize", "net.py:build", *options)
    assert result.exit_code == 3
    assert "this command as a recipe:" in result.stdout
    assert "budget not met: max_size on onnxruntime" in result.stderr
    assert (recipe.parent / "runs" / "build-float16" / "report.html").is_file()
