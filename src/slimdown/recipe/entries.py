"""The entries of a recipe's `stages`: one stage each, or several that are gone through in rounds.

Adding a stage is one line in `STAGES`: the recipe file, its schema and the overrides follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import ConfigDict, GetCoreSchemaHandler, GetPydanticSchema, create_model
from pydantic_core import CoreSchema, core_schema

from slimdown.core import Json, Stage
from slimdown.distill import Distill
from slimdown.errors import RecipeError
from slimdown.prune import Prune
from slimdown.prune.budget.allocation import BUDGETS
from slimdown.quantize import Quantize
from slimdown.sparsify import Sparsify
from slimdown.store import settings_of
from slimdown.zeros import SPARSE_FROM

STAGES: dict[str, type[Stage]] = {
    "prune": Prune,
    "sparsify": Sparsify,
    "distill": Distill,
    "quantize": Quantize,
}
ITERATE = "iterate"
"""The entry that holds stages of its own."""
MAX_ROUNDS = 100

# The nested dataclasses have no configuration of their own, so they take this one.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def iterate(stages: Sequence[Stage], *, rounds: int) -> list[Stage]:
    """Go through `stages` several times, each time a part of the way.

    What a pruning shall keep in the end, such as half of the MACs and a tenth of each layer, it
    keeps after all rounds together: in each, the same share of what is left. Each round may change
    the outputs by its part of `depth`, and the zeros of `Sparsify` and `Distill` become more.
    """
    if not 1 <= rounds <= MAX_ROUNDS:
        bound = "at least 1" if rounds < 1 else f"at most {MAX_ROUNDS}"
        raise RecipeError(f"iterate.rounds must be {bound}, got {rounds}")
    if not stages:
        raise RecipeError("iterate.stages has no stage to go through: list at least one")
    if rounds > 1 and any(isinstance(stage, Quantize) for stage in stages):
        raise RecipeError(
            f"iterate goes through quantize in each of its {rounds} rounds, but a model is "
            "quantized once: put quantize after iterate, not inside"
        )
    return [
        _part_of(stage, (index + 1) / rounds, share=1 / rounds)
        for index in range(rounds)
        for stage in stages
    ]


def _part_of(stage: Stage, progress: float, *, share: float) -> Stage:
    """A stage as one round does it, which is a `share` of the way and ends at `progress` of it."""
    if isinstance(stage, Prune):
        asked = {name: getattr(stage, name) for name in (*BUDGETS, "min_keep")}
        kept = {name: f**share for name, f in asked.items() if f is not None}
        return replace(stage, **kept, depth=stage.depth * share)
    if isinstance(stage, Sparsify | Distill) and stage.sparsity is not None:
        sparsity = 1 - (1 - stage.sparsity) ** progress
        if share < 1 and sparsity < SPARSE_FROM:
            raise RecipeError(
                f"iterate: {stage.kind}.sparsity={stage.sparsity:g} in {round(1 / share)} rounds "
                f"begins with {sparsity:.2g}, and fewer zeros than {SPARSE_FROM} are not kept from "
                "one stage to the next: take fewer rounds"
            )
        return replace(stage, sparsity=sparsity)
    return stage


def _read_stage(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Read and write a stage as the one-key mapping `{kind: settings}`."""
    return core_schema.no_info_after_validator_function(
        _stage_of, handler.generate_schema(_entry("StageEntry", STAGES)), serialization=_WRITTEN
    )


@dataclass(frozen=True, kw_only=True)
class Iterate:
    """Stages that are gone through in rounds, each a part of the way: see `iterate`."""

    rounds: int
    """How often, 1 to 100; what prune keeps in the end is spread over them."""
    stages: Sequence[Annotated[Stage, GetPydanticSchema(_read_stage)]]
    """The stages of each round, in their order."""

    def __post_init__(self) -> None:
        iterate(self.stages, rounds=self.rounds)


def read_stages(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Read a list of entries as the stages that they stand for; write each stage as its entry."""
    entry = _entry("Entry", {**STAGES, ITERATE: Iterate})
    item = core_schema.no_info_after_validator_function(_stages_of, handler.generate_schema(entry))
    return core_schema.no_info_after_validator_function(
        lambda lists: [stage for stages in lists for stage in stages],
        core_schema.list_schema(item),
        serialization=core_schema.plain_serializer_function_ser_schema(
            lambda stages: [stage_to_json(stage) for stage in stages]
        ),
    )


def _entry(name: str, kinds: dict[str, Any]) -> Any:
    fields: dict[str, Any] = {kind: (each | None, None) for kind, each in kinds.items()}
    config = ConfigDict(**STRICT, json_schema_extra={"minProperties": 1, "maxProperties": 1})
    return create_model(name, __config__=config, **fields)


def _stages_of(entry: Any) -> list[Stage]:
    kind = _kind_of(entry)
    if kind != ITERATE:
        return [_stage_of(entry)]
    rounds: Iterate | None = getattr(entry, kind)
    if rounds is None:
        raise RecipeError("iterate needs rounds and stages, such as {rounds: 3, stages: [...]}")
    return iterate(rounds.stages, rounds=rounds.rounds)


def _stage_of(entry: Any) -> Stage:
    kind = _kind_of(entry)
    stage: Stage | None = getattr(entry, kind)
    return STAGES[kind]() if stage is None else stage


def _kind_of(entry: Any) -> str:
    kinds = sorted(entry.model_fields_set)
    if len(kinds) != 1:
        given = " and ".join(kinds) or "none"
        raise RecipeError(
            f"an entry of stages names one stage, got {given}: give each its own dash, "
            "with its settings indented below it"
        )
    return str(kinds[0])


def stage_to_json(stage: Stage) -> Json:
    """A stage as its entry in a recipe, with every default spelled out."""
    return {stage.kind: settings_of(stage)}


_WRITTEN = core_schema.plain_serializer_function_ser_schema(stage_to_json)


def name_entries(entries: Any) -> Any:
    """Write `- quantize` as `- quantize: {}`, its meaning, also in rounds; a copy."""
    if not isinstance(entries, list):
        return entries
    return [_name_entry(entry) for entry in entries]


def _name_entry(entry: Any) -> Any:
    if isinstance(entry, str):
        return {entry: {}}
    if isinstance(entry, dict) and isinstance(entry.get(ITERATE), dict):
        rounds = entry[ITERATE]
        if "stages" in rounds:
            return {**entry, ITERATE: {**rounds, "stages": name_entries(rounds["stages"])}}
    return entry


def find_kind(entries: Any, kind: str) -> list[tuple[str | int, ...]]:
    """Where the entries of a kind are, in the order in which they come: (0,), (1, "iterate", …)."""
    found: list[tuple[str | int, ...]] = []
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        if isinstance(entry, dict) and kind in entry:
            found.append((index,))
        inside = entry.get(ITERATE) if isinstance(entry, dict) else None
        if isinstance(inside, dict):
            below = find_kind(inside.get("stages"), kind)
            found += [(index, ITERATE, "stages", *keys) for keys in below]
    return found
