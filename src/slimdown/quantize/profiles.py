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
    fuses_sums: bool = False
    """Whether a convolution adds what a sum reads beside it: what it writes itself stays float."""
    grouped: bool = True
    """Whether convolutions of several channels a group read INT8; depthwise ones do everywhere."""
    symmetric: bool = False
    """Whether the zero point of an activation is 0, as that of a weight is everywhere."""
    activation_range: tuple[int, int] = (0, 255)
    weight_range: tuple[int, int] = (-128, 127)
    winograd_weight_range: tuple[int, int] | None = None
    """That of 3x3 convolutions of stride 1, where the runtime needs fewer levels for them."""


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
        # (softmax, norms, products of activations) is fused into one kernel with its neighbors. A
        # sum is done in float behind the convolution that alone writes an operand: a quantizer
        # there is dropped, and torch would compute something else (34 instead of 47 dB on a
        # ResNet-20).
        Profile(
            name="openvino",
            reads=frozenset({"conv", "linear", "add"}),
            writes=frozenset(),
            repeats=False,
            joins=False,
            fuses_sums=True,
        ),
        # The same kernels as on x86, but on Arm those of a signed activation and a signed weight
        # are at least as fast, by SDOT; an unsigned one has its sign bits flipped on the way
        # (microsoft/onnxruntime pull requests 9902, 9655 and 9772; onnxruntime.ai, "Data type
        # selection"). Read, not timed on an Arm machine.
        Profile(
            name="onnxruntime-arm",
            reads=frozenset({"conv", "linear", "add"}),
            writes=frozenset({"conv", "add"}),
            repeats=True,
            joins=True,
            activation_range=(-128, 127),
        ),
        # Signed levels and a zero point of 0 are all it reads, and it moves quantizers through the
        # graph by itself (docs.nvidia.com, TensorRT, "Working with Quantized Types" and "Explicit
        # Quantization"). A convolution takes the sum behind it into its kernel, and writes INT8
        # only where the residual operand is INT8; a quantizer between the two would part them
        # (TensorFlow Quantization Toolkit, "Add Custom QDQ Insertion Case"). TensorRT-RTX 1.7.1
        # builds an engine of such a file and refuses any other zero point; not run.
        Profile(
            name="tensorrt",
            reads=frozenset({"conv", "linear", "add"}),
            writes=frozenset(),
            repeats=False,
            joins=False,
            fuses_sums=True,
            symmetric=True,
            activation_range=(-128, 127),
            weight_range=(-127, 127),
        ),
        # INT8 are Convolution, ConvolutionDepthWise and InnerProduct, a scale each for what they
        # read, without zero points; sums are float. Grouped weights have a scale a group and not a
        # channel. Its Winograd kernels for 3x3 overflow with more than 6 bits: with 64 channels at
        # their extremes ncnn 1.0.20261020 is wrong by 80 % with 8 bits, by 160 % with 7, and right
        # with 6, which its own tool takes for these layers (Tencent/ncnn, tools/quantize/
        # ncnn2table.cpp and pull request 891). On these grids it gives what torch gives, to 1e-4.
        Profile(
            name="ncnn",
            reads=frozenset({"conv", "linear"}),
            writes=frozenset(),
            repeats=False,
            joins=False,
            grouped=False,
            symmetric=True,
            activation_range=(-127, 127),
            weight_range=(-127, 127),
            winograd_weight_range=(-31, 31),
        ),
        # Layers and sums run in INT8 between a quantizer before and one behind, which pooling has
        # on both sides, too; activations are per tensor and symmetric in -127..127
        # (apple/coremltools, optimize/coreml/experimental/_quantization_passes.py, and
        # CoreMLQuantizer). Read, not run.
        Profile(
            name="coreml",
            reads=frozenset({"conv", "linear", "add"}),
            writes=frozenset({"conv", "add"}),
            repeats=True,
            joins=False,
            symmetric=True,
            activation_range=(-127, 127),
            weight_range=(-127, 127),
        ),
        # The least that any runtime reads: one scale before each layer, no zero point to be
        # understood, no sum, and levels that fill their type, so that nothing else clips them.
        Profile(
            name="generic",
            reads=frozenset({"conv", "linear"}),
            writes=frozenset(),
            repeats=False,
            joins=False,
            symmetric=True,
            activation_range=(-128, 127),
            weight_range=(-127, 127),
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
