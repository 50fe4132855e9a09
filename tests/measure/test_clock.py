"""Clocks: operators are what they say, timings are kept, and larger layers take longer."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimdown.core import Operation
from slimdown.errors import BadInput, RecipeError
from slimdown.measure import clock_cache, clock_for
from slimdown.measure.clock import OnnxClock, Turns, _split, time_in_turns
from slimdown.measure.operators import NUM_COPIES, build_operator, input_shape, num_copies

RUNTIMES = [
    pytest.param("onnxruntime", id="onnxruntime"),
    pytest.param("openvino", id="openvino", marks=pytest.mark.openvino),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMDOWN_CACHE", str(tmp_path / "cache"))


def convolution(channels: int, size: int = 14) -> Operation:
    window = (("stride", (1, 1)), ("padding", (1, 1)), ("dilation", (1, 1)))
    shapes = ((1, channels, size, size), (channels, channels, 3, 3))
    return Operation(kind="convolution", shapes=shapes, settings=window)


WINDOW = (("stride", (2, 1)), ("padding", (1, 0)), ("dilation", (1, 2)))
OPERATIONS = [
    Operation(kind="convolution", shapes=((1, 8, 9, 11), (6, 4, 3, 2)), settings=WINDOW),
    Operation(
        kind="transposed_convolution",
        shapes=((1, 8, 5, 6), (8, 3, 3, 2), (6,)),
        settings=(*WINDOW, ("output_padding", (1, 0))),
    ),
    Operation(kind="linear", shapes=((1, 12), (7, 12))),
    Operation(kind="linear", shapes=((1, 5, 12), (7, 12))),
    Operation(kind="matmul", shapes=((1, 2, 5, 4), (1, 2, 4, 6))),
    Operation(kind="attention", shapes=((1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 3))),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_a_model_computes_its_operator_with_different_operands_each_time(
    operation: Operation,
) -> None:
    import onnxruntime
    from onnx import numpy_helper

    model = build_operator(operation)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = torch.randn(input_shape(operation))
    outputs = session.run(None, {"input": inputs.numpy()})
    constants = [torch.tensor(numpy_helper.to_array(each)) for each in model.graph.initializer]
    expected = reference(operation, inputs, constants)
    assert len(outputs) == len(expected) == NUM_COPIES
    for output, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output.ravel(), wanted.ravel(), rtol=1e-4, atol=1e-5)
    assert len({output.tobytes() for output in outputs}) == NUM_COPIES


def reference(
    operation: Operation, inputs: torch.Tensor, constants: list[torch.Tensor]
) -> list[np.ndarray[Any, Any]]:
    """The means that torch computes."""
    if operation.kind in ("matmul", "attention"):
        shapes = list(operation.shapes)
        first = shapes[:1] if operation.kind == "matmul" else [shapes[0], shapes[2]]
        all_shapes = [*first, *[shapes[1]] * NUM_COPIES]
        parts = inputs.flatten().split([int(np.prod(shape)) for shape in all_shapes])
        operands = [part.view(shape) for part, shape in zip(parts, all_shapes, strict=True)]
        if operation.kind == "matmul":
            products = [operands[0] @ other for other in operands[1:]]
        else:
            query, value, *keys = operands
            products = [F.scaled_dot_product_attention(query, k, value, scale=1.0) for k in keys]
        return [each.mean().numpy() for each in products]
    settings: dict[str, Any] = dict(operation.settings)
    weights = [each for each in constants if each.ndim > 1]
    biases = [each for each in constants if each.ndim == 1]
    means = []
    for weight, bias in zip(weights, biases, strict=True):
        if operation.kind == "linear":
            matrix = weight if inputs.ndim == 2 else weight.T
            means.append(F.linear(inputs, matrix, bias).mean())
        elif operation.kind == "convolution":
            groups = inputs.shape[1] // weight.shape[1]
            output = F.conv2d(inputs, weight, bias, groups=groups, **settings)
            means.append(output.mean((2, 3)))
        else:
            groups = len(bias) // weight.shape[1]
            output = F.conv_transpose2d(inputs, weight, bias, groups=groups, **settings)
            means.append(output.mean((2, 3)))
    return [mean.numpy() for mean in means]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_takes_longer_for_a_larger_layer(runtime: str) -> None:
    pytest.importorskip(runtime)
    clock = clock_for(runtime)
    small, large = clock.time_operations([convolution(32), convolution(128)])
    assert 0 < 2 * small < large  # sixteen times the work
    assert clock.runtime.startswith(runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_takes_longer_for_a_larger_network(
    runtime: str, tiny_net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(runtime)
    monkeypatch.setattr("slimdown.measure.clock.NETWORKS", Turns(rounds=4, turn_ms=5.0))
    clock = clock_for(runtime)
    example = torch.randn(1, 3, 16, 16)
    large = nn.Sequential(nn.Conv2d(3, 256, 3), nn.Conv2d(256, 128, 3)).eval()
    predicts = [clock.deploy(model, example) for model in (tiny_net, large)]
    small_ms, large_ms = clock.time_networks(predicts, example)
    assert 0 < 2 * small_ms < large_ms


def test_timing_leaves_the_global_generator_as_it_was() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    clock_for("onnxruntime").time_operations([convolution(8)])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_refused_with_the_reason(
    tiny_net: nn.Module, dtype: torch.dtype
) -> None:
    model, example = copy.deepcopy(tiny_net).to(dtype), torch.randn(1, 3, 16, 16, dtype=dtype)
    with pytest.raises(BadInput, match="latency budget needs a model with float32 weights"):
        clock_for("onnxruntime").deploy(model, example)


def test_what_was_timed_is_looked_up_by_the_next_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[str] = []

    def time(self: OnnxClock, operations: Any) -> list[float]:
        timed.extend(map(str, operations))
        return [float(len(timed) + index) for index in range(len(operations))]

    monkeypatch.setattr(OnnxClock, "_time", time)
    a, b, c = (convolution(channels) for channels in (8, 16, 24))
    first = clock_for("onnxruntime").time_operations([a, b, a])
    assert first[0] == first[2] != first[1]
    again = clock_for("onnxruntime").time_operations([b, c, a])
    assert again[::2] == [first[1], first[0]]
    assert timed == [str(a), str(b), str(c)]


def test_a_few_operators_are_open_at_a_time_and_fewer_with_many_weights() -> None:
    small, large = [convolution(8)] * 20, [Operation(kind="linear", shapes=((1, 1), (4096, 4096)))]
    assert [len(part) for part in _split([*small, *large * 3])] == [16, 4 + 1, 2]
    assert num_copies(small[0]) == NUM_COPIES
    assert num_copies(large[0]) == 1


def test_other_conditions_are_another_file() -> None:
    here = clock_cache.conditions("onnxruntime 1", 1)
    clock_cache.save_timings(here, {"a": 1.0})
    clock_cache.save_timings(here, {"b": 2.0})
    assert clock_cache.load_timings(here) == {"a": 1.0, "b": 2.0}
    for other in ("onnxruntime 2", 1), ("openvino 1", 1), ("onnxruntime 1", 2):
        assert clock_cache.load_timings(clock_cache.conditions(*other)) == {}
    (file,) = clock_cache.cache_folder().glob("*.json")
    assert json.loads(file.read_text())["conditions"] == here
    file.write_text("{")  # measured again rather than trusted or fatal
    assert clock_cache.load_timings(here) == {}


def test_the_cache_is_where_the_user_keeps_caches(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clock_cache.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SLIMDOWN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert clock_cache.cache_folder() == tmp_path / "xdg" / "slimdown"


def test_calls_come_in_turns_and_the_quickest_counts() -> None:
    order: list[str] = []

    def call(name: str) -> Any:
        return lambda inputs: order.append(name)

    calls = [(call("a"), torch.zeros(1)), (call("b"), torch.zeros(1))]
    times = time_in_turns(calls, Turns(rounds=2, turn_ms=1e-9, fewest_calls=2, most_calls=2))
    assert all(ms > 0 for ms in times)
    assert order == [*"aabb", *"aaabbb", *"bbbaaa"]  # two to settle, then turns with one untimed


def test_a_target_without_a_clock_is_an_error() -> None:
    with pytest.raises(RecipeError, match="did you mean 'openvino'"):
        clock_for("openvin")
