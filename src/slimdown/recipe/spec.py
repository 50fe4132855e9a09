"""What a recipe is: stages, targets and a budget; in Python, as JSON, and as a JSON Schema.

Adding a stage is one line in `STAGES`: the recipe file, its schema and the overrides follow.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    TypeAdapter,
    create_model,
)
from pydantic_core import CoreSchema, core_schema

from slimdown.core import Budget, Json, Stage
from slimdown.distill import Distill
from slimdown.errors import RecipeError
from slimdown.load import DataSource, ModelSource
from slimdown.measure import MeasureSettings
from slimdown.prune import Prune
from slimdown.quantize import Quantize
from slimdown.store import settings_of
from slimdown.targets import TARGETS, find_target

STAGES: dict[str, type[Stage]] = {"prune": Prune, "distill": Distill, "quantize": Quantize}

# The nested dataclasses have no configuration of their own, so they take this one.
_STRICT = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)


def _read_entry(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Read and write a stage as the one-key mapping `{kind: settings}`."""
    fields: dict[str, Any] = {kind: (stage | None, None) for kind, stage in STAGES.items()}
    config = ConfigDict(**_STRICT, json_schema_extra={"minProperties": 1, "maxProperties": 1})
    entry = create_model("StageEntry", __config__=config, **fields)
    return core_schema.no_info_after_validator_function(
        _stage_of,
        handler.generate_schema(entry),
        serialization=core_schema.plain_serializer_function_ser_schema(stage_to_json),
    )


def _stage_of(entry: Any) -> Stage:
    kinds = sorted(entry.model_fields_set)
    if len(kinds) != 1:
        given = " and ".join(kinds) or "none"
        raise RecipeError(
            f"an entry of stages names one stage, got {given}: give each its own dash, "
            "with its settings indented below it"
        )
    stage: Stage | None = getattr(entry, kinds[0])
    return STAGES[kinds[0]]() if stage is None else stage


def stage_to_json(stage: Stage) -> Json:
    """A stage as its entry in a recipe, with every default spelled out."""
    return {stage.kind: settings_of(stage)}


def _check_target(name: str) -> str:
    find_target(name)
    return name


TargetName = Annotated[
    str, AfterValidator(_check_target), Field(json_schema_extra={"enum": list(TARGETS)})
]


@dataclass(frozen=True)
class Recipe:
    """What to do to a model, where it will run, and what the result must keep to."""

    stages: Sequence[Annotated[Stage, GetPydanticSchema(_read_entry)]]
    """The steps in their order; each may come often, or not at all."""
    _: KW_ONLY
    name: str = "run"
    """Also the name of the run's folder; without it, that of the recipe's file."""
    model: ModelSource | None = None
    """The trained model; needed where no model is handed over in Python."""
    data: DataSource | None = None
    """The images; needed where no task is handed over in Python."""
    targets: tuple[TargetName, ...] = ("onnxruntime",)
    """The runtimes to deploy on and to measure with."""
    budget: Budget = field(default_factory=Budget)
    """What each deployed result must keep to, against the model that went in."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """How latency and memory are measured."""
    seed: int = 0
    """Seeds every step; equal seeds give equal results on the CPU."""
    schema_version: Literal[1] = 1
    """The version of this format."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "targets", tuple(self.targets))
        for stage in self.stages:
            if isinstance(stage, type) or not hasattr(stage, "kind"):
                raise RecipeError(f"stages are such as Prune(macs=0.5), got {stage!r}")
        _check_order([stage for stage in self.stages if isinstance(stage, Quantize | Distill)])
        if not re.fullmatch(r"\w[\w .+-]*", self.name):
            raise RecipeError(
                "name is also the name of a folder: a letter or digit, then letters, digits, "
                f"spaces and . + - _ only, got {self.name!r}"
            )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise RecipeError(
                f"targets names at least one target, each once, got {list(self.targets)}"
            )
        for target in self.targets:
            _check_target(target)
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed must be in [0, 2**32), got {self.seed}")

    def __hash__(self) -> int:
        return hash(RECIPE.dump_json(self))  # the options of a model are a dictionary


def _check_order(stages: Sequence[Quantize | Distill]) -> None:
    """Refuse an order that a stage would refuse only when its turn comes, hours later."""
    quantized: Quantize | None = None
    for stage in stages:
        if isinstance(stage, Quantize) and quantized is not None:
            raise RecipeError("stages quantizes twice: a model is quantized once, keep one of them")
        if isinstance(stage, Quantize):
            quantized = stage
        elif quantized is not None and quantized.precision == "float16":
            raise RecipeError(
                "stages distills a model in float16, which training does not survive: "
                "put distill before quantize"
            )


RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)
"""Reads and writes recipes as JSON."""


def recipe_to_json(recipe: Recipe) -> Json:
    """A recipe as plain values, with every default spelled out."""
    values: Json = RECIPE.dump_python(recipe, mode="json")
    return values


def recipe_schema() -> Json:
    """The JSON Schema of recipe files, for editors and other tools."""
    return copy.deepcopy(_schema())


@cache
def _schema() -> Json:
    schema = RECIPE.json_schema()
    stages = schema["properties"]["stages"]
    # A stage that needs no settings is also read as its name alone: `- quantize`.
    stages["items"] = {"anyOf": [{"enum": list(STAGES)}, stages["items"]]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "slimdown recipe",
    }


def schemas_at(keys: Sequence[str | int]) -> list[Json]:
    """The alternatives that the schema allows for the value at `keys`; none for unknown keys."""
    schemas = _alternatives(_schema())
    for key in keys:
        inside = [
            schema.get("items", {})
            if isinstance(key, int)
            else schema.get("properties", {}).get(key)
            for schema in schemas
        ]
        schemas = [each for schema in inside if schema for each in _alternatives(schema)]
    return schemas


def _alternatives(schema: Json) -> list[Json]:
    if "$ref" in schema:
        return _alternatives(_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return [each for choice in schema["anyOf"] for each in _alternatives(choice)]
    return [schema]
