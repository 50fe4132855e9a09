"""Changing a quantized graph's weights and biases so that it imitates the float one better."""

from slimdown.quantize.refine.adaround import adaround_ as adaround_
from slimdown.quantize.refine.bias_correction import correct_biases_ as correct_biases_
from slimdown.quantize.refine.reconstruction import reconstruct_ as reconstruct_
