"""Who is called when, with what, and what is made of the samples."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from torch import Tensor

from slimdown.measure import MeasureSettings, measure_latencies
from slimdown.measure.latency import repeat_to_batch

IMAGE = torch.randn(1, 3, 4, 4)


class Recorder:
    """A predictor that notes its calls in a list shared with the others."""

    def __init__(self, name: str, calls: list[str], seconds: float = 0.0) -> None:
        self.name, self.calls, self.seconds = name, calls, seconds
        self.shapes: set[tuple[int, ...]] = set()
        self.threads: set[int] = set()
        self.collecting: list[bool] = []

    def __call__(self, batch: Tensor) -> Tensor:
        self.calls.append(self.name)
        self.shapes.add(tuple(batch.shape))
        self.threads.add(torch.get_num_threads())
        self.collecting.append(gc.isenabled())
        time.sleep(self.seconds)
        return batch


def test_rounds_begin_with_another_predictor_each() -> None:
    calls: list[str] = []
    settings = MeasureSettings(num_warmup=0, num_samples=25)
    measure_latencies([Recorder(name, calls) for name in "abc"], IMAGE, settings, runtime="torch")
    # three untimed calls before the ten, ten and five timed ones
    rounds = [("abc", 3 + 10), ("bca", 3 + 10), ("cab", 3 + 5)]
    assert "".join(calls) == "".join(name * length for names, length in rounds for name in names)


def test_warm_up_comes_first_and_is_not_timed() -> None:
    calls: list[str] = []
    settings = MeasureSettings(num_warmup=4, num_samples=2)
    predicts = [Recorder(name, calls) for name in "ab"]
    latencies = measure_latencies(predicts, IMAGE, settings, runtime="torch")
    assert "".join(calls) == "aaaabbbb" + "aaa" + "aa" + "bbb" + "bb"
    assert [len(latency.samples_ms) for latency in latencies] == [2, 2]


def test_conditions_are_kept_and_recorded() -> None:
    recorder = Recorder("a", [])
    settings = MeasureSettings(batch_size=5, num_threads=1, num_warmup=1, num_samples=3)
    torch.set_num_threads(2)
    (latency,) = measure_latencies([recorder], IMAGE, settings, runtime="torch 1.2.3")
    assert recorder.shapes == {(5, 3, 4, 4)}
    assert recorder.threads == {1}
    assert recorder.collecting == [True] + 6 * [False]
    assert torch.get_num_threads() == 2
    assert gc.isenabled()
    assert (latency.batch_size, latency.num_threads, latency.num_warmup) == (5, 1, 1)
    assert latency.runtime == "torch 1.2.3"


def test_settings_come_back_when_a_predictor_fails() -> None:
    torch.set_num_threads(2)
    calls: list[Tensor] = []

    def fail_when_timed(batch: Tensor) -> None:
        calls.append(batch)
        if len(calls) > 1:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure_latencies([fail_when_timed], IMAGE, MeasureSettings(num_warmup=1), runtime="torch")
    assert gc.isenabled()
    assert torch.get_num_threads() == 2


def test_times_are_those_of_the_clock() -> None:
    predicts = [Recorder("slow", [], 0.008), Recorder("fast", [], 0.002)]
    settings = MeasureSettings(num_warmup=1, num_samples=9)
    slow, fast = measure_latencies(predicts, IMAGE, settings, runtime="torch")
    assert 8.0 <= slow.median_ms < 1000.0  # milliseconds, and a busy machine is let be
    assert 2.0 <= fast.median_ms < slow.median_ms
    assert slow.median_ms == sorted(slow.samples_ms)[4]
    assert slow.median_ms <= slow.p90_ms <= max(slow.samples_ms)


def test_inputs_are_repeated_or_cut_to_the_batch() -> None:
    images = torch.arange(3.0).reshape(3, 1, 1, 1)
    assert repeat_to_batch(images, 5).flatten().tolist() == [0, 1, 2, 0, 1]
    assert repeat_to_batch(images, 2).flatten().tolist() == [0, 1]


def test_no_predictors_give_no_latencies() -> None:
    assert measure_latencies([], IMAGE, MeasureSettings(), runtime="torch") == []
