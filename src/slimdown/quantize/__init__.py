"""From float32 to INT8 or FP16, on one graph."""

from slimdown.quantize.fake_quantize import PER_CHANNEL as PER_CHANNEL
from slimdown.quantize.fake_quantize import PER_TENSOR as PER_TENSOR
from slimdown.quantize.fake_quantize import FakeQuantizePerChannel as FakeQuantizePerChannel
from slimdown.quantize.fake_quantize import FakeQuantizePerTensor as FakeQuantizePerTensor
from slimdown.quantize.fake_quantize import is_fake_quantized as is_fake_quantized
from slimdown.quantize.half import HalfPrecision as HalfPrecision
from slimdown.quantize.profiles import PROFILES as PROFILES
from slimdown.quantize.profiles import Profile as Profile
from slimdown.quantize.stage import Quantize as Quantize
