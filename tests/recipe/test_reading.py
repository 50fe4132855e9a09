"""Recipe files: what is read, and every mistake told with its key, its line and its mending."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimdown.core import Budget
from slimdown.distill import Distill
from slimdown.errors import RecipeError, SlimdownError, Unsafe
from slimdown.prune import Prune
from slimdown.quantize import Quantize
from slimdown.recipe import Recipe, load_recipe

TEXT = """\
model:
  reference: models/net.py:build
  weights: ${WEIGHTS_FOLDER:-weights}/net.safetensors
data: {kind: npz, root: ../data}
stages:
  - prune: {macs: 0.5}
  - distill:
      epochs: 3
  - quantize
budget:
  max_drop: 1
"""


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "small.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def mistake(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    return str(caught.value).replace(str(folder / "small.yaml"), "FILE")


def test_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = read(tmp_path, TEXT)
    assert recipe.stages == (Prune(macs=0.5), Distill(epochs=3), Quantize())
    assert recipe.budget == Budget(max_drop=1.0)
    assert recipe.name == "small"  # the file's
    assert recipe.targets == ("onnxruntime",)


def test_the_ways_to_write_a_stage_without_settings_mean_the_same(tmp_path: Path) -> None:
    for entry in ("quantize", "quantize: ", "{quantize: {}}"):
        assert read(tmp_path, f"stages: [{entry}]").stages == (Quantize(),)


def test_a_recipe_may_have_no_stages_but_must_say_so(tmp_path: Path) -> None:
    assert read(tmp_path, "stages: []").stages == ()
    assert "stages must be given" in mistake(tmp_path, "seed: 1")


# --------------------------------------------------------------------------------------- paths


def test_paths_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHTS_FOLDER", raising=False)
    monkeypatch.chdir("/")
    recipe = read(tmp_path, TEXT)
    assert recipe.model is not None
    assert recipe.data is not None
    assert recipe.model.reference == f"{tmp_path}/models/net.py:build"
    assert recipe.model.weights == tmp_path / "weights/net.safetensors"
    assert recipe.data.root == tmp_path.parent / "data"


def test_an_onnx_file_is_a_path(tmp_path: Path) -> None:
    text = TEXT.replace("models/net.py:build", "models/net.onnx")
    recipe = read(tmp_path, text)
    assert recipe.model is not None
    assert recipe.model.reference == f"{tmp_path}/models/net.onnx"


def test_paths_on_the_command_line_start_where_we_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = read(tmp_path, TEXT, "model.weights=net.pt", "model.reference=net.py:build")
    assert recipe.model is not None
    assert recipe.model.weights == here / "net.pt"
    assert recipe.model.reference == f"{here}/net.py:build"


@pytest.mark.parametrize("reference", ["torchvision:resnet18", "package.module:build"])
def test_references_that_name_no_file_stay(tmp_path: Path, reference: str) -> None:
    recipe = read(tmp_path, f"stages: []\nmodel: {{reference: '{reference}'}}")
    assert recipe.model is not None
    assert recipe.model.reference == reference


def test_variables_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTS_FOLDER", "/elsewhere")
    recipe = read(tmp_path, TEXT)
    assert recipe.model is not None
    assert recipe.model.weights == Path("/elsewhere/net.safetensors")


def test_a_variable_that_is_not_set_needs_a_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIGHTS_FOLDER", raising=False)
    message = mistake(tmp_path, TEXT.replace(":-weights", ""))
    assert message.startswith("FILE, line 3: the environment has no WEIGHTS_FOLDER")
    assert "${WEIGHTS_FOLDER:-path}" in message


def test_variables_are_filled_in_paths_only(tmp_path: Path) -> None:
    assert "name is also the name of a folder" in mistake(tmp_path, "name: ${HOME}\nstages: []")


# ------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        # unknown keys
        ("macs: 0.5", "mac: 0.5", 6, "unknown key 'mac' in stages.0.prune: did you mean 'macs'?"),
        (
            "epochs: 3",
            "epoch: 3",
            8,
            "unknown key 'epoch' in stages.1.distill: did you mean 'epochs'?",
        ),
        ("max_drop", "max_dorp", 11, "unknown key 'max_dorp' in budget: did you mean 'max_drop'?"),
        ("budget:", "bugdet:", 10, "unknown key 'bugdet' in the recipe: did you mean 'budget'?"),
        ("weights:", "wieghts:", 3, "unknown key 'wieghts' in model: did you mean 'weights'?"),
        ("root:", "rot:", 4, "unknown key 'rot' in data: did you mean 'root'?"),
        ("budget:", "xyz:", 10, "unknown key 'xyz' in the recipe: known are budget, data,"),
        # stages
        (
            "- quantize",
            "- quantise",
            9,
            "unknown stage 'quantise' in stages.2: did you mean 'quantize'?",
        ),
        (
            "- quantize",
            "- cluster",
            9,
            "unknown stage 'cluster' in stages.2: known are distill, iterate, prune, quantize, "
            "sparsify",
        ),
        (
            "      epochs",
            "    epochs",
            8,
            "unknown stage 'epochs' in stages.1: known are distill, iterate, prune, quantize, "
            "sparsify; the settings of a stage are indented below its name",
        ),
        ("- quantize", "- {}", 9, "an entry of stages names one stage, got none"),
        (
            "- quantize",
            "- {quantize: {}, prune: {macs: 0.5}}",
            9,
            "an entry of stages names one stage, got prune and quantize",
        ),
        ("- quantize", "- 5", 9, "stages.2 should be a mapping, got 5"),
        ("- quantize", "- quantize: int8", 9, 'stages.2.quantize should be a mapping, got "int8"'),
        (
            "stages:",
            "prune: {macs: 0.5}\nstages:",
            5,
            "unknown key 'prune' in the recipe: did you mean the stage 'prune'? "
            "Stages are listed below `stages`",
        ),
        # wrong types
        ("macs: 0.5", "macs: half", 6, 'stages.0.prune.macs should be a valid number, got "half"'),
        ("macs: 0.5", "macs: '0.5'", 6, 'stages.0.prune.macs should be a valid number, got "0.5"'),
        ("macs: 0.5", "macs: [0.5]", 6, "stages.0.prune.macs should be a valid number, got a list"),
        ("macs: 0.5", "macs: .nan", 6, "stages.0.prune.macs should be a finite number"),
        (
            "epochs: 3",
            "epochs: 3.5",
            8,
            "stages.1.distill.epochs should be a valid integer, got 3.5",
        ),
        (
            "epochs: 3",
            "epochs: true",
            8,
            "stages.1.distill.epochs should be a valid integer, got true",
        ),
        (
            "- quantize",
            "- quantize: {precision: int3}",
            9,
            "stages.2.quantize.precision should be 'int8' or 'float16', got \"int3\"",
        ),
        (
            "budget:",
            "measure: {memory: 1}\nbudget:",
            10,
            "measure.memory should be a valid boolean, got 1",
        ),
        ("budget:", "seed: 1e3\nbudget:", 10, "seed should be a valid integer, got 1000.0"),
        (
            "budget:",
            "targets: onnxruntime\nbudget:",
            10,
            'targets should be a list, got "onnxruntime"',
        ),
        ("budget:\n  max_drop: 1", "budget: 1", 10, "budget should be a mapping, got 1"),
        (
            "data: {kind: npz, root: ../data}",
            "data: {kind: csv}",
            4,
            "data.kind should be 'digits', ",
        ),
        ("  reference: models/net.py:build\n", "", 1, "model.reference must be given"),
        # out of range
        ("macs: 0.5", "macs: 50", 6, "prune.macs "),
        ("epochs: 3", "epochs: 0", 8, "distill.epochs "),
        (
            "max_drop: 1",
            "max_drop: -1",
            11,
            "budget.max_drop is in points and must be >= 0, got -1",
        ),
        ("budget:", "seed: -1\nbudget:", 10, "seed must be in [0, 2**32), got -1"),
        (
            "budget:",
            "measure: {batch_size: 0}\nbudget:",
            10,
            "measure.batch_size must be at least 1, got 0",
        ),
        (
            "budget:",
            "targets: []\nbudget:",
            10,
            "targets names at least one target, each once, got []",
        ),
        (
            "budget:",
            "targets: [openvino, openvino]\nbudget:",
            10,
            "targets names at least one target, each once",
        ),
        ("budget:", "name: a/b\nbudget:", 10, "name is also the name of a folder"),
        ("budget:", "name: ..\nbudget:", 10, "name is also the name of a folder"),
        ("budget:", "schema_version: 2\nbudget:", 10, "schema_version should be 1, got 2"),
        ("models/net.py:build", "resnet18", 2, "model.reference is "),
        # the file itself
        ("budget:", "model: {}\nbudget:", 10, "'model' is given twice, first in FILE, line 1"),
        ("budget:", "budget: [", 12, "not valid YAML"),
    ],
)
def test_mistakes_are_told_with_their_line(
    tmp_path: Path, before: str, after: str, line: int, message: str
) -> None:
    assert before in TEXT
    told = mistake(tmp_path, TEXT.replace(before, after))
    assert told.startswith(f"FILE, line {line}: {message}")


def test_an_unknown_target_is_told_with_its_line(tmp_path: Path) -> None:
    message = mistake(tmp_path, "stages: []\ntargets:\n  - onnxruntime\n  - openvion\n")
    assert message.startswith("FILE, line 4: ")
    assert "openvion" in message
    assert "did you mean" in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = TEXT.replace("macs: 0.5", "macs: half").replace("max_drop: 1", "max_dorp: 1")
    assert len(mistake(tmp_path, text).splitlines()) == 2


def test_mistakes_in_overrides_name_the_override(tmp_path: Path) -> None:
    assert mistake(tmp_path, TEXT, "prune.mac=1").startswith("-s prune.mac=1: unknown key 'mac'")
    assert mistake(tmp_path, TEXT, "seed=-1").startswith("-s seed=-1: seed must be")
    assert mistake(tmp_path, TEXT, "measure.x=1").startswith("-s measure.x=1: unknown key 'x'")
    message = mistake(tmp_path, TEXT, "distil.epochs=1")
    assert message.startswith("-s distil.epochs=1: unknown key 'distil'")
    assert "did you mean the stage 'distill'?" in message


def test_an_override_may_mend_the_file(tmp_path: Path) -> None:
    recipe = read(
        tmp_path, TEXT.replace("0.5", "half"), "prune.macs=0.25", "quantize.precision=float16"
    )
    assert recipe.stages == (Prune(macs=0.25), Distill(epochs=3), Quantize(precision="float16"))


def test_what_no_path_can_be_is_told(tmp_path: Path) -> None:
    message = mistake(tmp_path, TEXT.replace("../data", '"a\\0b"'))
    assert message.startswith("FILE, line 4: no path is 'a\\x00b'")
    assert "no path is" in mistake(tmp_path, TEXT.replace("../data", "~no-such-user/x"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    line=st.integers(0, TEXT.count("\n")),
    start=st.integers(0, 40),
    length=st.integers(0, 20),
    put=st.text(alphabet="[]{}:,-#&*!|>'\"%@`~. \n\t0123eE\\abmacs$\0\ud7ffé", max_size=8),
    option=st.text(alphabet="prune.macs[]=0123{}:!*- ", max_size=20),
)
def test_any_text_is_read_or_refused_in_words(
    tmp_path: Path, line: int, start: int, length: int, put: str, option: str
) -> None:
    lines = TEXT.splitlines()
    old = lines[line % len(lines)]
    lines[line % len(lines)] = old[:start] + put + old[start + length :]
    with suppress(SlimdownError):
        read(tmp_path, "\n".join(lines))
    with suppress(SlimdownError):
        read(tmp_path, TEXT, option)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "1e999", '"\\ud800"', "[" * 30 + "]" * 30, "é" * 1000, "2026-13-45"]
)
def test_monstrous_values_are_refused_in_words(tmp_path: Path, value: str) -> None:
    for key in ("seed", "name", "targets", "model", "schema_version"):
        mistake(tmp_path, f"stages: []\n{key}: {value}" + "/" * (key == "name"))


def test_a_missing_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*nowhere.yaml: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path)


def test_code_in_a_recipe_is_refused_and_not_run(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    with pytest.raises(Unsafe, match="line 2"):
        read(tmp_path, f"stages: []\nname: !!python/object/apply:os.mkdir ['{owned}']")
    assert not owned.exists()
