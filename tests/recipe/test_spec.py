"""Recipes as values: equality, hashing, JSON, YAML and the published schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimdown.core import Budget, Preprocess
from slimdown.distill import Distill
from slimdown.errors import RecipeError
from slimdown.load import DataSource, ModelSource
from slimdown.measure import MeasureSettings
from slimdown.prune import Prune
from slimdown.quantize import Quantize
from slimdown.recipe import STAGES, Recipe, dump_recipe, load_recipe, recipe_schema, recipe_to_json
from slimdown.recipe.spec import schemas_at

ROOT = Path(__file__).resolve().parents[2]

shares = st.floats(min_value=0.01, max_value=1.0)
positive = st.floats(min_value=1e-6, max_value=1e6)
trainings = st.builds(
    Distill,
    epochs=st.integers(1, 100),
    alpha=st.floats(0, 1),
    temperature=positive,
    learning_rate=st.none() | positive,
    standardize=st.booleans(),
    optimizer=st.sampled_from(["sgd", "adamw"]),
)
quantizations = st.builds(
    Quantize,
    precision=st.sampled_from(["int8", "float16"]),
    num_images=st.integers(1, 1000),
    exclude=st.lists(st.text(), max_size=2).map(tuple),
)
stages = st.builds(
    list.__add__,
    st.lists(st.builds(Prune, macs=shares) | trainings, max_size=4),
    st.lists(quantizations, max_size=1),
)
paths = st.from_regex(r"/[\w .#:'\"-]{0,9}[a-z]", fullmatch=True).map(Path)
models = st.builds(
    ModelSource,
    reference=st.sampled_from(["torchvision:resnet18", "a.b:c", "/models/net.py:build"]),
    weights=st.none() | paths,
    options=st.dictionaries(st.text(), st.integers() | st.booleans() | st.text(), max_size=2),
)
data = st.one_of(
    st.builds(DataSource, kind=st.just("digits"), seed=st.integers(0, 9)),
    st.builds(
        DataSource,
        kind=st.just("folder"),
        root=paths,
        flip=st.none() | st.booleans(),
        preprocess=st.just(Preprocess(size=(8, 8), mean=(0.1, 0.2, 0.3), std=(1, 0.5, 1e-5))),
    ),
)
recipes = st.builds(
    Recipe,
    stages,
    name=st.from_regex(r"[\w][\w .+-]{0,9}", fullmatch=True),
    model=st.none() | models,
    data=st.none() | data,
    targets=st.sampled_from([("onnxruntime",), ("openvino", "onnxruntime")]),
    budget=st.builds(
        Budget,
        max_drop=st.none() | positive,
        min_speedup=st.none() | positive,
        max_size=st.none() | st.integers(1, 10**12),
    ),
    measure=st.builds(MeasureSettings, num_samples=st.integers(1, 999), memory=st.booleans()),
    seed=st.integers(0, 2**32 - 1),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(recipe=recipes)
def test_a_written_recipe_reads_back_equal(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert hash(load_recipe(path)) == hash(recipe)
    assert json.loads(json.dumps(recipe_to_json(recipe))) == recipe_to_json(recipe)


def test_a_written_recipe_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = ModelSource(reference="net.py:build", weights=Path("w.pt"))
    text = dump_recipe(Recipe([], model=model, data=DataSource(kind="folder", root=Path("images"))))
    moved = tmp_path / "elsewhere" / "recipe.yaml"
    moved.write_text(text)
    recipe = load_recipe(moved)
    assert recipe.model == ModelSource(
        reference=f"{tmp_path}/net.py:build", weights=tmp_path / "w.pt"
    )
    assert recipe.data == DataSource(kind="folder", root=tmp_path / "images")


def test_every_default_is_spelled_out() -> None:
    values = recipe_to_json(Recipe([Prune(macs=0.5), Quantize()]))
    assert values["stages"][0]["prune"]["macs"] == 0.5
    assert values["stages"][1]["quantize"]["precision"] == "int8"
    assert values["seed"] == 0
    assert values["schema_version"] == 1


def test_recipes_are_equal_by_value() -> None:
    first = Recipe([Prune(macs=0.5), Distill()])
    assert first == Recipe((Prune(macs=0.5), Distill()))
    assert hash(first) == hash(Recipe((Prune(macs=0.5), Distill())))
    assert first != Recipe([Distill(), Prune(macs=0.5)])
    assert len({first, Recipe([Prune(macs=0.5), Distill()]), Recipe([])}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe([Prune]), r"stages are such as Prune\(macs=0.5\), got <class"),
        (lambda: Recipe([Quantize(), Prune(macs=0.5), Quantize()]), "quantizes twice"),
        (lambda: Recipe([Quantize(precision="float16"), Distill()]), "distills a model in float16"),
        (lambda: Recipe(["prune"]), r"stages are such as Prune\(macs=0.5\), got 'prune'"),
        (lambda: Recipe([], targets=("openvion",)), "openvion"),
        (lambda: Recipe([], targets=()), "at least one target"),
        (lambda: Recipe([], seed=2**32), "seed must be"),
        (lambda: Recipe([], name="../elsewhere"), "name of a folder"),
    ],
)
def test_a_recipe_made_in_python_is_checked(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


# -------------------------------------------------------------------------------------- schema


def test_the_published_schema_is_the_one_in_use() -> None:
    published = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
    assert published == recipe_schema(), "run: slimdown schema > docs/recipe.schema.json"


def test_the_schema_knows_every_stage_and_setting() -> None:
    for kind in STAGES:
        assert schemas_at(["stages", 0, kind])
    assert schemas_at(["budget", "max_drop"])
    assert schemas_at(["data", "preprocess", "mean"])
    assert not schemas_at(["stages", 0, "prune", "nonsense"])


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_the_recipes_in_the_repository_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.model is not None
    assert recipe.data is not None
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=../docs/recipe.schema.json"
