"""Timing single operators and whole networks on the runtime of a target.

What a network's widths are chosen by must be measured, since no count of operations tells how fast
a runtime runs a convolution of 24 channels. Here is the `Clock` of every target that opens ONNX
files; a target that does not brings its own and a line in `CLOCKS`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from slimdown.core import Artifact, Clock, Operation, Predict, Target
from slimdown.errors import BadInput, RecipeError
from slimdown.files import hash_files
from slimdown.measure.clock_cache import conditions, load_timings, save_timings
from slimdown.measure.machine import cpu_features
from slimdown.measure.operators import build_operator, input_shape, num_copies, num_weights
from slimdown.targets import find_target

NUM_THREADS = 1
OPERATORS_AT_ONCE = 16
WEIGHTS_AT_ONCE = 2**25
"""Operators that take turns are open at the same time: so many of them, or so many weights."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How calls alternate: each of `rounds` gives everyone a turn of about `turn_ms`."""

    rounds: int
    turn_ms: float
    fewest_calls: int = 3
    most_calls: int = 50


OPERATORS = Turns(rounds=5, turn_ms=8.0)
NETWORKS = Turns(rounds=15, turn_ms=100.0)


def clock_for(target: str) -> Clock:
    """The clock of a target, such as `clock_for("openvino")`. Raises RecipeError, MissingExtra."""
    found = find_target(target)
    found.check()
    if target not in CLOCKS:
        raise RecipeError(
            f"there is no clock for {target!r} yet: ask for a latency on {' or '.join(CLOCKS)}"
        )
    return CLOCKS[target](found)


@dataclass(frozen=True)
class OnnxClock:
    """Times what a target opens as an ONNX file, batch 1 on one thread.

    Of all calls the quickest counts, so that what the machine does beside is left out; they come in
    turns, so that none of them has the quiet minutes for itself.
    """

    target: Target

    @property
    def runtime(self) -> str:
        return f"{self.target.name} {self.target.check()}"

    @property
    def round_to(self) -> int:
        """The channels that fill a vector register: convolutions are computed in such blocks.

        On a CPU with AVX-512, both runtimes take as long for 36 channels as for 48.
        """
        return 16 if "avx512f" in cpu_features() else 8

    def time_operations(self, operations: Sequence[Operation]) -> list[float]:
        """Milliseconds of each operator; those that this machine has timed before are looked up."""
        where = conditions(self.runtime, NUM_THREADS)
        known = load_timings(where)
        missing = [each for each in dict.fromkeys(operations) if str(each) not in known]
        for some in _split(missing):
            timed = dict(zip(map(str, some), self._time(some), strict=True))
            save_timings(where, timed)  # at once: a run that is stopped goes on from there
            known.update(timed)
        return [known[str(each)] for each in operations]

    def deploy(self, model: nn.Module, example_input: Tensor) -> Predict:
        """The module exported and opened by the target; its files go when it does.

        Raises BadInput for one that cannot be exported, or that takes other than float32 images.
        """
        if example_input.dtype != torch.float32:
            raise BadInput(
                "a latency budget needs a model with float32 weights that takes float32 images, "
                f"got {str(example_input.dtype).removeprefix('torch.')}: prune model.float(), and "
                "let Quantize(precision='float16') be the stage after it"
            )
        folder = Path(tempfile.mkdtemp(prefix="slimdown-clock-"))
        try:
            task: Any = SimpleNamespace(example_input=example_input)
            artifact = self.target.export(model, task, folder)
            predict = self.target.load(artifact, num_threads=NUM_THREADS)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(predict, shutil.rmtree, folder, ignore_errors=True)
        return predict

    def time_networks(self, predicts: Sequence[Predict], example_input: Tensor) -> list[float]:
        calls = [(predict, example_input[:1]) for predict in predicts]
        return time_in_turns(calls, NETWORKS)

    def _time(self, operations: Sequence[Operation]) -> list[float]:
        generator = torch.Generator().manual_seed(0)  # the global one is the user's
        with tempfile.TemporaryDirectory(prefix="slimdown-clock-") as folder:
            calls = []
            for index, operation in enumerate(operations):
                path = Path(folder) / f"{index}.onnx"
                path.write_bytes(build_operator(operation).SerializeToString())
                predict = self.target.load(self._artifact(path), num_threads=NUM_THREADS)
                calls.append((predict, torch.rand(input_shape(operation), generator=generator)))
            times_ms = time_in_turns(calls, OPERATORS)
        return [ms / num_copies(each) for ms, each in zip(times_ms, operations, strict=True)]

    def _artifact(self, path: Path) -> Artifact:
        return Artifact(
            target=self.target.name,
            path=path,
            files=(path,),
            sha256=hash_files([path]),
            size_bytes=path.stat().st_size,
            precision="float32",
        )


def _split(operations: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Parts that may be open at the same time, in their order."""
    part: list[Operation] = []
    for operation in operations:
        held = sum(map(num_weights, [*part, operation]))
        if part and (len(part) == OPERATORS_AT_ONCE or held > WEIGHTS_AT_ONCE):
            yield part
            part = []
        part.append(operation)
    if part:
        yield part


def time_in_turns(calls: Sequence[tuple[Predict, Tensor]], turns: Turns) -> list[float]:
    """Milliseconds of the quickest of each predictor's calls."""
    counts = []
    for predict, inputs in calls:
        _time_call(predict, inputs)  # the first one allocates
        expected_ms = _time_call(predict, inputs)
        count = round(turns.turn_ms / max(expected_ms, 1e-3))
        counts.append(min(max(count, turns.fewest_calls), turns.most_calls))
    quickest_ms = [math.inf] * len(calls)
    for turn in range(turns.rounds):
        for offset in range(len(calls)):
            index = (turn + offset) % len(calls)
            predict, inputs = calls[index]
            predict(inputs)  # brings the caches back from the turns of the others
            for _ in range(counts[index]):
                quickest_ms[index] = min(quickest_ms[index], _time_call(predict, inputs))
    return quickest_ms


def _time_call(predict: Predict, inputs: Tensor) -> float:
    start = time.perf_counter_ns()
    predict(inputs)
    return (time.perf_counter_ns() - start) / 1e6


CLOCKS: dict[str, Callable[[Target], Clock]] = {
    "onnxruntime": OnnxClock,
    "openvino": OnnxClock,
}
"""How each target is timed."""
