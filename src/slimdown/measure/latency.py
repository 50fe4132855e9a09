"""How long one call takes, measured so that a comparison of predictors is fair."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from slimdown.core import Latency, Predict
from slimdown.measure.settings import MeasureSettings

# In turns of one call, a predictor finds its caches full of its neighbor's weights and its cores
# still busy with its neighbor's threads: a small net beside a ResNet-18 took 0.93 ms a call
# instead of the 0.41 ms it takes alone. In turns of this length it took 0.41 ms too.
CALLS_A_TURN = 10
SETTLING_CALLS = 3


def measure_latencies(
    predicts: Sequence[Predict], inputs: Tensor, settings: MeasureSettings, *, runtime: str
) -> list[Latency]:
    """Time predictors of one `runtime` in turns; one `Latency` each, in the order given.

    `inputs` (N, C, H, W) are repeated to the batch size. In every round each predictor has a turn
    of ten timed calls after three untimed ones, and every round begins with another predictor, so
    that a machine that slows down slows all of them alike. A predictor must return no sooner than
    its output is ready, and run on `settings.num_threads` threads by itself; torch is set to that
    number meanwhile.
    """
    batch = repeat_to_batch(inputs, settings.batch_size)
    samples_ms: list[list[float]] = [[] for _ in predicts]
    with torch.inference_mode(), _torch_threads(settings.num_threads):
        for predict in predicts:
            _call(predict, batch, times=settings.num_warmup)
        with _no_garbage_collection():
            for turn, count in enumerate(_split_into_turns(settings.num_samples)):
                for index in _rotated(len(predicts), turn):
                    _call(predicts[index], batch, times=SETTLING_CALLS)
                    samples_ms[index] += [_time_call(predicts[index], batch) for _ in range(count)]
    return [_summarize(each, settings, runtime) for each in samples_ms]


def repeat_to_batch(inputs: Tensor, batch_size: int) -> Tensor:
    """Repeat or cut (N, C, H, W) inputs to (batch_size, C, H, W)."""
    times = -(-batch_size // inputs.shape[0])
    return inputs.repeat(times, *([1] * (inputs.ndim - 1)))[:batch_size].contiguous()


def _split_into_turns(num_samples: int) -> list[int]:
    """How many timed calls each turn has: 25 -> [10, 10, 5]."""
    whole, rest = divmod(num_samples, CALLS_A_TURN)
    return [CALLS_A_TURN] * whole + [rest] * (rest > 0)


def _call(predict: Predict, batch: Tensor, *, times: int) -> None:
    for _ in range(times):
        predict(batch)


def _time_call(predict: Predict, batch: Tensor) -> float:
    start = time.perf_counter_ns()
    predict(batch)
    return (time.perf_counter_ns() - start) / 1e6


def _rotated(count: int, turn: int) -> list[int]:
    return [(turn + offset) % count for offset in range(count)]


def _summarize(samples_ms: list[float], settings: MeasureSettings, runtime: str) -> Latency:
    return Latency(
        median_ms=statistics.median(samples_ms),
        p90_ms=float(np.percentile(samples_ms, 90)),
        samples_ms=tuple(samples_ms),
        batch_size=settings.batch_size,
        num_threads=settings.num_threads,
        num_warmup=settings.num_warmup,
        runtime=runtime,
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _torch_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
