"""What a recipe is: stages, targets and a budget; in Python, as JSON, and as a JSON Schema."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, GetPydanticSchema, TypeAdapter

from slimdown.core import Budget, Json, Stage
from slimdown.distill import Distill
from slimdown.errors import RecipeError
from slimdown.load import DataSource, ModelSource
from slimdown.measure import MeasureSettings
from slimdown.prune import Prune
from slimdown.quantize import Quantize
from slimdown.recipe.entries import STAGES as STAGES
from slimdown.recipe.entries import STRICT, read_stages
from slimdown.sparsify import Sparsify
from slimdown.targets import TARGETS, find_target


def _check_target(name: str) -> str:
    find_target(name)
    return name


TargetName = Annotated[
    str, AfterValidator(_check_target), Field(json_schema_extra={"enum": list(TARGETS)})
]


@dataclass(frozen=True)
class Recipe:
    """What to do to a model, where it will run, and what the result must keep to."""

    stages: Annotated[Sequence[Stage], GetPydanticSchema(read_stages)]
    """The steps in their order; each may come often, or not at all. `iterate` goes through stages
    of its own in several rounds, each a part of the way."""
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
    keep_slower: bool = False
    """Take an INT8 artifact that is not faster than the float one before it, and say nothing."""
    seed: int = 0
    """Seeds every step; equal seeds give equal results on the CPU."""
    schema_version: Literal[1] = 1
    """The version of this format."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "targets", tuple(self.targets))
        for stage in self.stages:
            if isinstance(stage, type) or not hasattr(stage, "kind"):
                raise RecipeError(f"stages are such as Prune(macs=0.5), got {stage!r}")
        _check_order(self.stages)
        _check_patterns(self.stages)
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


def _check_order(stages: Sequence[Stage]) -> None:
    """Refuse an order that a stage would refuse only when its turn comes, hours later."""
    quantized: Quantize | None = None
    for stage in stages:
        if isinstance(stage, Quantize) and quantized is not None:
            raise RecipeError("stages quantizes twice: a model is quantized once, keep one of them")
        if isinstance(stage, Quantize):
            quantized = stage
        elif isinstance(stage, Sparsify) and quantized is not None:
            raise RecipeError(
                "stages sparsifies a quantized model, whose weights are rounded already: "
                "put sparsify before quantize, which keeps the zeros"
            )
        elif isinstance(stage, Distill) and quantized and stage.sparsity is not None:
            raise RecipeError(
                f"stages distills to sparsity={stage.sparsity:g} after quantize, whose weights can "
                "get no more zeros: put that distill before quantize, which keeps them"
            )
        elif isinstance(stage, Distill) and quantized and quantized.precision == "float16":
            raise RecipeError(
                "stages distills a model in float16, which training does not survive: "
                "put distill before quantize"
            )


def _check_patterns(stages: Sequence[Stage]) -> None:
    """Refuse to end with a pattern that a pruning broke: it moves the channels next to others."""
    pattern, broken = None, False
    for stage in stages:
        if isinstance(stage, Sparsify) and stage.pattern is not None:
            pattern, broken = stage.pattern, False
        elif isinstance(stage, Prune):
            broken = pattern is not None
    if broken:
        raise RecipeError(
            f"stages prunes after sparsify.pattern={pattern}, which is lost where channels go: "
            "put prune before sparsify, or sparsify to the pattern once more after it"
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
    for owner in (schema, schema["$defs"]["Iterate"]):
        stages = owner["properties"]["stages"]
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
