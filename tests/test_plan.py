"""Targets share steps for as long as they agree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from slimdown.plan import ORIGINAL, plan_steps


@dataclass(frozen=True)
class FakeTarget:
    name: str

    @property
    def profile(self) -> str:
        return f"profile of {self.name}"


@dataclass(frozen=True)
class FakeStage:
    kind: str
    profile: str | None = None
    fills: bool = False

    def for_target(self, target: FakeTarget) -> FakeStage:
        unfilled = self.fills and self.profile is None
        return replace(self, profile=target.profile) if unfilled else self


PRUNE = FakeStage("prune")
QUANTIZE = FakeStage("quantize", fills=True)
ONE, TWO = FakeTarget("one"), FakeTarget("two")


def names(stages: list[Any], targets: list[Any]) -> dict[str, str | None]:
    return {step.name: step.parent for step in plan_steps(stages, targets)}


def test_a_common_way_is_laid_once() -> None:
    assert names([PRUNE, PRUNE], [ONE, TWO]) == {
        ORIGINAL: None,
        "01-prune": ORIGINAL,
        "02-prune": "01-prune",
    }


def test_ways_part_at_the_first_stage_that_a_target_fills_in() -> None:
    assert names([PRUNE, QUANTIZE, PRUNE], [ONE, TWO]) == {
        ORIGINAL: None,
        "01-prune": ORIGINAL,
        "02-quantize-one": "01-prune",
        "03-prune-one": "02-quantize-one",
        "02-quantize-two": "01-prune",
        "03-prune-two": "02-quantize-two",
    }


def test_a_stage_that_is_filled_in_already_is_shared() -> None:
    fixed = replace(QUANTIZE, profile="mine")
    assert list(names([fixed], [ONE, TWO])) == [ORIGINAL, "01-quantize"]


@pytest.mark.parametrize("stages", [[], [PRUNE], [QUANTIZE, PRUNE]])
def test_parents_come_first_and_every_target_has_its_way(stages: list[Any]) -> None:
    steps = plan_steps(stages, [ONE, TWO])
    seen: set[str] = set()
    for step in steps:
        assert step.parent is None or step.parent in seen
        seen.add(step.name)
    for target in (ONE, TWO):
        assert sum(target.name in step.targets for step in steps) == len(stages) + 1
