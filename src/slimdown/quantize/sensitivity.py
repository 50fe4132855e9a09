"""How much the outputs suffer when one layer alone is quantized.

Label-free, in a network in which only the quantizers of that one layer stand: of its weight, of
what it reads, and of what it writes where the runtime wants that. Squares of such errors nearly
add up to that of the whole network, so that they tell what is gained by giving a layer more bits.
The error of a network in which all but one layer are quantized ranks worse where more than a few
are brought back: that of the others drowns it, and a value that two layers keep in INT8 is as bad
when one of them is left out. After Wu 2020, arXiv:2004.09602, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from slimdown.images import take_images
from slimdown.quantize.judge import Judge
from slimdown.quantize.mixing import FLOAT, Mixer
from slimdown.quantize.placement import Placement

MOST_IMAGES = 32
"""The error is a mean over all outputs of all images, so that few are enough."""


def measure_alone(
    mixer: Mixer,
    labels: Sequence[str],
    judge: Judge,
    *,
    after: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[int, float]]:
    """For each label the error of the outputs at the bits it has and, below 8, also at 8 bits.

    `labels` are all that reads INT8. Both the mixer and the judge look at no more than
    `MOST_IMAGES` images: up to six forward passes over them a label, and `after` gets the number of
    labels done.
    """
    mixer = replace(mixer, images=take_images(mixer.images, MOST_IMAGES))
    judge = Judge(mixer.network.reference, take_images(judge.images, MOST_IMAGES))
    found = {}
    for done, label in enumerate(labels, 1):
        others = {other: FLOAT for other in labels if other != label}
        as_asked = mixer(others)
        found[label] = {fewest_bits(as_asked.placement): judge.error(as_asked.quantized)}
        at_8_bits = {**others, label: 8}
        if mixer.plan(at_8_bits) != as_asked.placement:
            found[label][8] = judge.error(mixer(at_8_bits).quantized)
        after(done)
    return found


def fewest_bits(placement: Placement) -> int:
    """The bits of the coarsest quantizer."""
    ranges = (*placement.weight_ranges.values(), *placement.activation_ranges.values())
    return min((high - low).bit_length() for low, high in ranges)
