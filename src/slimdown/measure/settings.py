"""Under which conditions latency and memory are measured."""

from __future__ import annotations

from dataclasses import dataclass, fields

from slimdown.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How deployed artifacts are timed: one image on one thread unless told otherwise."""

    batch_size: int = 1
    num_threads: int = 1
    num_warmup: int = 10
    """Calls of each artifact that are not timed, before the first that is."""
    num_samples: int = 100
    """Timed calls of each artifact."""
    memory: bool = True
    """Also measure peak memory, in a fresh process for each artifact."""

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "num_threads": 1, "num_warmup": 0, "num_samples": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "memory":
                if not isinstance(value, bool):
                    raise RecipeError(f"measure.memory must be true or false, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int):
                raise RecipeError(f"measure.{field.name} must be a whole number, got {value!r}")
            elif value < least[field.name]:
                raise RecipeError(
                    f"measure.{field.name} must be at least {least[field.name]}, got {value}"
                )
