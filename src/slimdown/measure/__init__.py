"""What a model is worth and what it costs, measured; never estimated."""

from slimdown.measure.accuracy import measure_accuracy as measure_accuracy
from slimdown.measure.clock import clock_for as clock_for
from slimdown.measure.counting import count_macs as count_macs
from slimdown.measure.counting import count_parameters as count_parameters
from slimdown.measure.latency import measure_latencies as measure_latencies
from slimdown.measure.machine import cpu_features as cpu_features
from slimdown.measure.machine import describe_environment as describe_environment
from slimdown.measure.machine import saturates_int8 as saturates_int8
from slimdown.measure.memory import measure_peak_memory as measure_peak_memory
from slimdown.measure.settings import MeasureSettings as MeasureSettings
