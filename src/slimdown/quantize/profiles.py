"""Where a runtime wants its quantizers: one profile a runtime, as data."""

from __future__ import annotations

from dataclasses import dataclass

from slimdown.errors import RecipeError
from slimdown.suggest import advise


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Which families of operators read and write INT8 on a runtime, and on which grids."""

    name: str
    reads: frozenset[str]
    """Those whose activations are quantized where they are read."""
    writes: frozenset[str]
    """Those whose result is quantized too, behind the clip that the runtime fuses into them."""
    repeats: bool
    """Whether the quantizer stands again behind operators that only move values."""
    joins: bool
    """Whether parts that are quantized anyway are concatenated on one grid, in INT8."""
    activation_range: tuple[int, int] = (0, 255)
    weight_range: tuple[int, int] = (-128, 127)


PROFILES = {
    profile.name: profile
    for profile in (
        # A convolution runs in INT8 only where a quantizer follows it directly, or the clip it is
        # fused with; one float sum between two of them costs more than INT8 gains. A linear on a
        # sequence is fastest when it writes float, and a concatenation of floats is cheaper than
        # one that brings its parts onto one grid.
        Profile(
            name="onnxruntime-x86",
            reads=frozenset({"conv", "linear", "add"}),
            writes=frozenset({"conv", "add"}),
            repeats=True,
            joins=True,
        ),
        # Grids travel through the graph by themselves here; what is left float between two layers
        # (softmax, norms, products of activations) is fused into one kernel with its neighbors.
        Profile(
            name="openvino",
            reads=frozenset({"conv", "linear", "add"}),
            writes=frozenset(),
            repeats=False,
            joins=False,
        ),
    )
}
"""Name -> profile. A new runtime is a new entry: measure it against its neighbors' first."""


def find_profile(name: str) -> Profile:
    """The profile of that name. Raises RecipeError."""
    if name in PROFILES:
        return PROFILES[name]
    advice = advise(name, PROFILES, otherwise=f"choose among {', '.join(PROFILES)}")
    raise RecipeError(f"quantize.profile names no profile: {name!r}; {advice}")
