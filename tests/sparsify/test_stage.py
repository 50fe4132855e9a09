"""The stage: what it makes zero, leaves dense, refuses and tells."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import TypeAdapter
from torch import Tensor, nn

from slimdown.capture import capture
from slimdown.core import Context, Stage
from slimdown.errors import BadInput, Interrupted, RecipeError
from slimdown.prune import Prune
from slimdown.quantize import Quantize
from slimdown.sparsify import Sparsify
from slimdown.targets.onnx import Dialect, to_onnx

METHODS = ["sparsegpt", "wanda", "magnitude"]
DENSE = {"stem"}  # 3 inputs


def groups_of(weight: Tensor, group: int = 4) -> Tensor:
    """Zeros in each group of neighboring input channels."""
    return (weight.movedim(1, -1).unflatten(-1, (-1, group)) == 0).sum(-1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_n_of_every_m_stay(tiny_net: nn.Module, task: Any, method: Any, pattern: str) -> None:
    result = Sparsify(pattern=pattern, method=method)(tiny_net, task)
    zeros = 4 - int(pattern[0])
    for name, weight in result.model.named_parameters():
        layer = name.removesuffix(".weight")
        if weight.ndim > 1 and layer not in DENSE:
            assert (groups_of(weight.detach()) == zeros).all()
            assert result.facts["sparsity"][layer] == pytest.approx(zeros / 4)
        elif weight.ndim <= 1 or layer in DENSE:
            assert torch.equal(weight, tiny_net.get_parameter(name))
    assert result.facts["dense"] == {"stem": "its 3 inputs are no multiple of 4"}
    assert result.facts["pattern"] == pattern


@pytest.mark.parametrize("method", METHODS)
def test_shares_of_zeros(tiny_net: nn.Module, task: Any, method: Any) -> None:
    before = copy.deepcopy(tiny_net.state_dict())
    result = Sparsify(sparsity=0.6, method=method, exclude=("head",))(tiny_net, task)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_net.state_dict().items())
    assert result.facts["dense"] == {"head": "excluded"}
    assert set(result.facts["sparsity"]) == {"stem", "conv1", "conv2", "down"}
    for share in result.facts["sparsity"].values():
        assert share == pytest.approx(0.6, abs=0.04)
    before_bytes, after_bytes = result.facts["compressed_bytes"]
    assert after_bytes < 0.65 * before_bytes
    assert set(result.facts["runtimes"]) == {"onnxruntime", "openvino", "tensorrt", "torch"}
    assert json.loads(json.dumps(result.facts)) == result.facts


def test_images_help(tiny_net: nn.Module, task: Any, images: Tensor) -> None:
    """The better a method knows the inputs, the closer the outputs stay."""
    errors = []
    for method in METHODS:
        model = Sparsify(sparsity=0.6, method=method)(tiny_net, task).model
        with torch.no_grad():
            errors.append(float((model(images) - tiny_net(images)).norm()))
    assert errors[0] < errors[1] < errors[2]


def test_later_layers_see_the_sparse_ones_before(tiny_net: nn.Module, task: Any) -> None:
    """Wanda of `head` alone, on the sparse network's features, chooses the same zeros."""
    stage = Sparsify(sparsity=0.5, method="wanda")
    model = stage(tiny_net, task).model
    partial = copy.deepcopy(model)
    partial.head.weight.data.copy_(tiny_net.head.weight)
    alone = Sparsify(sparsity=0.5, method="wanda", include=("head",))(partial, task).model
    assert torch.equal(alone.head.weight, model.head.weight)


def test_global_magnitude_is_one_threshold(tiny_net: nn.Module, task: Any) -> None:
    stage = Sparsify(sparsity=0.5, method="magnitude", scope="global")
    result = stage(tiny_net, task)
    pairs = [
        (tiny_net.get_parameter(name), weight)
        for name, weight in result.model.named_parameters()
        if weight.ndim > 1
    ]
    gone = torch.cat([before[after == 0].abs() for before, after in pairs])
    left = torch.cat([before[after != 0].abs() for before, after in pairs])
    assert gone.max() <= left.min()
    assert len(gone) == round(0.5 * (len(gone) + len(left)))
    assert len({round(share, 2) for share in result.facts["sparsity"].values()}) > 1


def test_layers_with_too_few_zeros_are_told(tiny_net: nn.Module, task: Any) -> None:
    tiny_net.conv2.weight.data.mul_(100)
    result = Sparsify(sparsity=0.1, method="magnitude", scope="global")(tiny_net, task)
    assert result.facts["sparsity"]["conv2"] < 0.01
    assert result.facts["not_kept"] == ["conv2"]


def test_captured_graphs_and_models_with_one_batch_size(
    tiny_net: nn.Module, task: Any, images: Tensor
) -> None:
    stage = Sparsify(pattern="2:4")
    own, graph = stage(tiny_net, task), stage(capture(tiny_net, images[:1]), task)
    assert all(
        torch.equal(own.model.state_dict()[name], tensor)
        for name, tensor in graph.model.state_dict().items()
    )

    class OneImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).view(1, 4)

    fixed = stage(OneImage().eval(), task).model
    torch.testing.assert_close(fixed.net.head.weight, own.model.head.weight, rtol=0.02, atol=0.02)
    assert torch.equal(fixed.net.head.weight == 0, own.model.head.weight == 0)


def test_the_result_can_be_rebuilt(tiny_net: nn.Module, task: Any, images: Tensor) -> None:
    stage: Stage = Sparsify(sparsity=0.5)
    result = stage(tiny_net, task)
    rebuilt = stage.rebuild(tiny_net, result.structure, task.example_input)
    rebuilt.load_state_dict(result.model.state_dict())
    assert torch.equal(rebuilt(images), result.model(images))
    assert stage.kind == "sparsify"
    assert stage.for_target(object()) is stage  # type: ignore[arg-type]
    kind = TypeAdapter(Sparsify)
    assert kind.validate_json(kind.dump_json(Sparsify(pattern="2:4"))) == Sparsify(pattern="2:4")


def test_no_random_number_is_drawn_and_equal_runs_are_equal(tiny_net: nn.Module, task: Any) -> None:
    before = torch.get_rng_state()
    first, second = (Sparsify(pattern="2:4")(tiny_net, task).model for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(tensor, second.state_dict()[name])
        for name, tensor in first.state_dict().items()
    )


# ----------------------------------------------------------------------------- with other stages


def test_pruning_keeps_the_zeros_of_what_stays(tiny_net: nn.Module, task: Any) -> None:
    sparse = Sparsify(sparsity=0.5)(tiny_net, task).model
    result = Prune(macs=0.6)(sparse, task)
    sliced = Prune(macs=0.6, compensate=False)(sparse, task).model
    pruned = result.model
    assert "it is sparse" in result.facts["compensation"]["skipped"]["conv2"]
    for layer in ("conv1", "conv2"):
        zeros = pruned.get_submodule(layer).weight == 0
        assert zeros.double().mean() > 0.1
        assert torch.equal(zeros, sliced.get_submodule(layer).weight == 0)
    again = Sparsify(pattern="2:4")(pruned, task)
    assert all(share >= 0.5 for share in again.facts["sparsity"].values())


def test_a_pattern_holds_in_the_int8_levels_of_the_file(tiny_net: nn.Module, task: Any) -> None:
    sparse = Sparsify(pattern="2:4")(tiny_net, task).model
    quantized = Quantize()(sparse, task).model
    dialect = Dialect(int32_biases=True, weight_zero_points=True, fences=True, least_channels=1)
    file = to_onnx(quantized, task.example_input, dialect)
    onnx.checker.check_model(file)
    levels = [
        torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in file.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    sparse_levels = [level for level in levels if level.shape[1] % 4 == 0]
    assert len(sparse_levels) == 3
    for level in sparse_levels:
        assert (groups_of(level) >= 2).all()


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of sparsity, such as 0.5, and pattern"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one of sparsity"),
        ({"sparsity": 0.0}, r"must be in \[0.01, 1\), got 0"),
        ({"sparsity": 0.009}, r"must be in \[0.01, 1\), got 0.009: later stages do not keep"),
        ({"sparsity": 1.0}, r"must be in \[0.01, 1\), got 1"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"pattern": "4:4"}, "1 <= N < M"),
        ({"pattern": "half"}, "written N:M"),
        ({"sparsity": 0.5, "method": "l0"}, "must be one of sparsegpt, wanda, magnitude"),
        ({"sparsity": 0.5, "scope": "all"}, "must be one of layer, global"),
        ({"sparsity": 0.5, "scope": "global"}, "only method=magnitude"),
        ({"pattern": "2:4", "scope": "global", "method": "magnitude"}, "only method=magnitude"),
        ({"sparsity": 0.5, "num_images": 0}, "at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Sparsify(**settings)


def test_globs_that_match_nothing_are_refused(tiny_net: nn.Module, task: Any) -> None:
    with pytest.raises(RecipeError, match=r"sparsify.exclude: 'nothing\*' matches no layer"):
        Sparsify(sparsity=0.5, exclude=("nothing*",))(tiny_net, task)


def test_what_cannot_be_sparse_is_bad_input(
    tiny_net: nn.Module, task: Any, task_of: Callable[[Tensor], Any], images: Tensor
) -> None:
    with pytest.raises(BadInput, match="no layer of this model can be made sparse: stem: its 3"):
        Sparsify(pattern="2:4", include=("stem",))(tiny_net, task)
    with pytest.raises(BadInput, match="neither convolutions nor linear layers"):
        Sparsify(sparsity=0.5)(nn.ReLU(), task)
    task.calibration_batches = list
    with pytest.raises(BadInput, match="the task has none"):
        Sparsify(sparsity=0.5)(tiny_net, task)
    assert Sparsify(sparsity=0.5, method="magnitude")(tiny_net, task).facts["zeros"] > 0.4
    quantized = Quantize()(tiny_net, task_of(images)).model
    with pytest.raises(BadInput, match="its weight is computed, such as a quantized one"):
        Sparsify(sparsity=0.5)(quantized, task_of(images))


def test_it_stops_when_asked_to(tiny_net: nn.Module, task: Any) -> None:
    with pytest.raises(Interrupted):
        Sparsify(sparsity=0.5)(tiny_net, task, Context(stop_requested=lambda: True))
