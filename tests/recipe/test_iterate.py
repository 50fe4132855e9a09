"""Rounds: what a recipe's `iterate` stands for, in the file, in Python and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimdown.core import Stage
from slimdown.distill import Distill
from slimdown.dry_run import look_ahead
from slimdown.errors import RecipeError
from slimdown.prune import Prune
from slimdown.quantize import Quantize
from slimdown.recipe import Recipe, dump_recipe, iterate, load_recipe
from slimdown.recipe.spec import schemas_at
from slimdown.sparsify import Sparsify

TEXT = """\
stages:
  - iterate:
      rounds: 3
      stages:
        - prune: {macs: 0.5}
        - distill
  - quantize
"""


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "small.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def macs_of(stage: Stage) -> float | None:
    assert isinstance(stage, Prune)
    return stage.macs


def mistake(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    return str(caught.value).replace(str(folder / "small.yaml"), "FILE")


def test_rounds_together_keep_what_was_asked(tmp_path: Path) -> None:
    recipe = read(tmp_path, TEXT)
    assert [stage.kind for stage in recipe.stages] == [*["prune", "distill"] * 3, "quantize"]
    kept = 1.0
    for stage in recipe.stages:
        if isinstance(stage, Prune):
            assert stage.macs == pytest.approx(0.5 ** (1 / 3))
            kept *= stage.macs
    assert kept == pytest.approx(0.5)


def test_python_and_the_file_say_the_same(tmp_path: Path) -> None:
    recipe = Recipe([*iterate([Prune(macs=0.5), Distill()], rounds=3), Quantize()], name="small")
    assert read(tmp_path, TEXT) == recipe
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_each_round_is_steps_of_its_own(tmp_path: Path) -> None:
    outlook = look_ahead(read(tmp_path, TEXT), folder=tmp_path)
    assert [step.name for step in outlook.steps] == [
        "00-original",
        "01-prune",
        "02-distill",
        "03-prune",
        "04-distill",
        "05-prune",
        "06-distill",
        "07-quantize-onnxruntime",
    ]


def test_rounds_share_what_a_pruning_may_do() -> None:
    stages = iterate([Prune(macs=0.125, min_keep=0.001, depth=0.06)], rounds=3)
    assert len(stages) == 3
    for stage in stages:
        assert isinstance(stage, Prune)
        assert (stage.macs, stage.min_keep, stage.depth) == pytest.approx((0.5, 0.1, 0.02))
    assert iterate([Prune(macs=0.25, min_keep=0)], rounds=2) == [Prune(macs=0.5, min_keep=0)] * 2


def test_zeros_approach_their_share_and_patterns_stay() -> None:
    grown = iterate([Distill(sparsity=0.875), Distill()], rounds=3)
    assert [stage.sparsity for stage in grown[::2]] == pytest.approx([0.5, 0.75, 0.875])
    assert grown[1::2] == [Distill()] * 3
    sparse = iterate([Sparsify(sparsity=0.875)], rounds=3)
    assert [stage.sparsity for stage in sparse] == pytest.approx([0.5, 0.75, 0.875])
    assert iterate([Sparsify(pattern="2:4")], rounds=2) == [Sparsify(pattern="2:4")] * 2
    assert iterate([Prune(macs=0.5)], rounds=1) == [Prune(macs=0.5)]


def test_overrides_reach_into_rounds(tmp_path: Path) -> None:
    recipe = read(tmp_path, TEXT, "iterate.rounds=2", "prune.macs=0.25", "distill.epochs=7")
    assert macs_of(recipe.stages[0]) == pytest.approx(0.5)
    assert recipe.stages[1] == Distill(epochs=7)
    assert len(recipe.stages) == 5
    twice = TEXT + "  - prune: {macs: 0.9}\n"
    recipe = read(tmp_path, twice, "prune[0].macs=0.125", "prune[1].macs=0.8")
    assert macs_of(recipe.stages[0]) == pytest.approx(0.5)
    assert recipe.stages[-1] == Prune(macs=0.8)
    recipe = read(tmp_path, TEXT, "stages.0.iterate.stages.0.prune.macs=0.125")
    assert macs_of(recipe.stages[0]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("rounds: 3", "rounds: 0", "FILE, line 3: iterate.rounds must be at least 1, got 0"),
        ("rounds: 3", "rounds: half", "FILE, line 3: stages.0.iterate.rounds should be a valid"),
        ("rounds: 3", "times: 3", "FILE, line 3: unknown key 'times' in stages.0.iterate"),
        ("macs: 0.5", "macs: 2", "FILE, line 5: prune.macs is the fraction"),
        ("macs: 0.5", "mac: 2", "FILE, line 5: unknown key 'mac' in stages.0.iterate.stages.0"),
        ("- prune", "- prone", "FILE, line 5: unknown stage 'prone' in stages.0.iterate.stages.0"),
        ("- iterate", "- iterative", "FILE, line 2: unknown stage 'iterative' in stages.0: did"),
        ("        - distill\n", "        - quantize\n", "put quantize after iterate"),
        ("rounds: 3", "rounds: 20000", "FILE, line 3: iterate.rounds must be at most 100, got"),
    ],
)
def test_mistakes_are_told_with_their_line(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    assert before in TEXT
    assert message in mistake(tmp_path, TEXT.replace(before, after))


def test_empty_rounds_are_refused(tmp_path: Path) -> None:
    assert "iterate needs rounds and stages" in mistake(tmp_path, "stages: [iterate: ]")
    text = "stages: [iterate: {rounds: 2, stages: []}]"
    assert "iterate.stages has no stage" in mistake(tmp_path, text)
    assert "iterate.rounds and" in mistake(tmp_path, "stages: [iterate]")
    with pytest.raises(RecipeError, match="got 0"):
        iterate([Distill()], rounds=0)
    with pytest.raises(
        RecipeError, match=r"sparsity=0.02 in 4 rounds begins with 0.005, and fewer"
    ):
        iterate([Sparsify(sparsity=0.02)], rounds=4)
    assert iterate([Quantize()], rounds=1) == [Quantize()]


def test_sparsify_comes_before_quantize() -> None:
    with pytest.raises(RecipeError, match="put sparsify before quantize"):
        Recipe([Quantize(), Sparsify(sparsity=0.5)])
    with pytest.raises(RecipeError, match="put that distill before quantize"):
        Recipe([Quantize(), Distill(sparsity=0.5)])
    Recipe([Sparsify(sparsity=0.5), Distill(sparsity=0.6), Quantize(), Distill()])


def test_prune_comes_before_a_pattern() -> None:
    pattern, prune = Sparsify(pattern="2:4"), Prune(macs=0.5)
    for stages in ([pattern, prune], [pattern, prune, Sparsify(sparsity=0.5)]):
        with pytest.raises(RecipeError, match=r"pattern=2:4, .* put prune before sparsify"):
            Recipe(stages)
    with pytest.raises(RecipeError, match="put prune before sparsify"):
        Recipe(iterate([pattern, prune], rounds=2))
    Recipe([prune, pattern])
    Recipe([Sparsify(sparsity=0.5), prune])
    Recipe(iterate([prune, pattern], rounds=2))


def test_the_schema_knows_rounds() -> None:
    assert schemas_at(["stages", 0, "iterate", "rounds"])
    assert schemas_at(["stages", 0, "iterate", "stages", 0, "prune", "macs"])
    assert not schemas_at(["stages", 0, "iterate", "stages", 0, "iterate"])
