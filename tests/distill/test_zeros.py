"""Zeros outlive training, whatever the optimizer; and they become more as the schedule says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimdown.capture import capture
from slimdown.core import Context
from slimdown.distill import Distill, TrainSettings, train
from slimdown.distill.average import tensors_of
from slimdown.distill.zeros import RAMP, find_zeros, sparsity_at
from slimdown.errors import BadInput, Interrupted, RecipeError
from slimdown.prune import Prune
from slimdown.quantize import Quantize
from slimdown.sparsify import Sparsify

SETTINGS = [
    TrainSettings(epochs=2, optimizer="sgd", learning_rate=0.05),
    TrainSettings(epochs=2, optimizer="adamw", learning_rate=0.01, weight_decay=0.1),
    TrainSettings(epochs=2, optimizer="adamw", ema=0.9, clip_norm=0.1),
    TrainSettings(epochs=1, alpha=1.0, amp="bf16"),
]
IDS = ["momentum", "weight decay", "average", "bfloat16"]


@pytest.fixture
def sparse(tiny_net: nn.Module, toy_task: Any) -> nn.Module:
    return Sparsify(pattern="2:4")(tiny_net, toy_task).model


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim > 1}


def same_zeros(first: nn.Module, second: nn.Module) -> bool:
    other = zeros_of(second)
    return all(torch.equal(zeros, other[name]) for name, zeros in zeros_of(first).items())


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_zeros_stay_and_the_rest_moves(
    sparse: nn.Module, tiny_net: nn.Module, toy_task: Any, settings: TrainSettings
) -> None:
    trained = train(sparse, toy_task, settings, teacher=tiny_net).model
    assert same_zeros(sparse, trained)
    assert (zeros_of(trained)["conv1.weight"]).double().mean() == 0.5
    for name, parameter in sparse.named_parameters():
        assert not torch.equal(parameter, trained.get_parameter(name))


def test_zeros_stay_in_captured_graphs_and_when_resumed(
    sparse: nn.Module, tiny_net: nn.Module, toy_task: Any, recorder: Any
) -> None:
    graph, settings = capture(sparse, toy_task.example_input), SETTINGS[0]
    whole = train(graph, toy_task, settings, teacher=tiny_net, context=Context(seed=5)).model
    assert same_zeros(graph, whole)
    stopped = recorder(stop_after=3)
    with pytest.raises(Interrupted):
        train(graph, toy_task, settings, teacher=tiny_net, context=stopped.context())
    context = recorder().context(resume=stopped.saved[-1])
    resumed = train(graph, toy_task, settings, teacher=tiny_net, context=context).model
    other = tensors_of(whole)
    assert all(torch.equal(t, other[name]) for name, t in tensors_of(resumed).items())


def test_zeros_stay_in_quantized_students(
    sparse: nn.Module, tiny_net: nn.Module, toy_task: Any
) -> None:
    quantized = Quantize()(sparse, toy_task).model
    trained = train(quantized, toy_task, TrainSettings(epochs=1), teacher=tiny_net).model
    assert same_zeros(quantized, trained)
    assert float(zeros_of(trained)["conv2.weight"].double().mean()) == 0.5


def test_zeros_stay_through_pruning_and_training(
    sparse: nn.Module, tiny_net: nn.Module, toy_task: Any
) -> None:
    pruned = Prune(macs=0.6)(sparse, toy_task).model
    trained = train(pruned, toy_task, SETTINGS[1], teacher=tiny_net).model
    assert same_zeros(pruned, trained)


def test_what_is_no_sparse_weight(tiny_net: nn.Module) -> None:
    assert find_zeros(tiny_net).kept == ()
    with torch.no_grad():
        tiny_net.head.weight.zero_()  # a start, such as that of a classifier
        tiny_net.conv1.weight[0, 0, 0, 0] = 0
        tiny_net.conv1.bias.zero_()
        tiny_net.conv1.weight[:10] = 0  # the start of a part
        tiny_net.conv2.weight[:, :4, 0] = 0
        tiny_net.down.weight[:8, :4] = 0
    tiny_net.down.weight.requires_grad_(False)
    assert find_zeros(tiny_net).kept == ("conv2.weight",)


def test_a_weight_of_zeros_only_is_trained(tiny_net: nn.Module, toy_task: Any) -> None:
    nn.init.zeros_(tiny_net.head.weight)
    for sparsity in (None, 0.5):
        settings = TrainSettings(epochs=1, alpha=1.0, sparsity=sparsity)
        trained = train(tiny_net, toy_task, settings).model
        assert (trained.head.weight != 0).double().mean() > 0.9  # some features are always zero


def test_a_start_with_zeros_is_trained(tiny_net: nn.Module, toy_task: Any) -> None:
    nn.init.dirac_(tiny_net.conv2.weight)
    nn.init.zeros_(tiny_net.down.weight[:8])
    trained = train(tiny_net, toy_task, TrainSettings(epochs=1, alpha=1.0)).model
    for layer in (trained.down, trained.conv2):
        assert (layer.weight == 0).double().mean() < 0.05


@pytest.mark.parametrize("sparsity", [0.02, 0.05])
def test_few_zeros_are_kept_like_many(tiny_net: nn.Module, toy_task: Any, sparsity: float) -> None:
    result = Sparsify(sparsity=sparsity, method="magnitude", exclude=("head",))(tiny_net, toy_task)
    assert result.facts["not_kept"] == []
    trained = train(result.model, toy_task, TrainSettings(epochs=1, alpha=1.0)).model
    assert same_zeros(result.model, trained)


# ------------------------------------------------------------------------------------- schedule


class Tied(nn.Module):
    """Two layers of one weight, which the graph knows by the name of the first that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).mean((2, 3))
        return self.head(self.a(torch.relu(self.b(x))))


def test_zeros_grow_in_weights_that_layers_share(toy_task: Any) -> None:
    stage = Distill(epochs=1, alpha=1.0, sparsity=0.5)
    trained = stage(Tied(), toy_task).model
    assert trained.b.weight is trained.a.weight
    assert int((trained.a.weight == 0).sum()) == 128
    assert int((trained.head.weight == 0).sum()) == 32


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=IDS[:3])
def test_zeros_grow_to_the_share_that_was_asked(
    tiny_net: nn.Module, toy_task: Any, settings: TrainSettings
) -> None:
    before = copy.deepcopy(tiny_net)
    stage = Distill(**{**vars(settings), "sparsity": 0.75})
    result = stage(tiny_net, toy_task, Context(original=before))
    for name, zeros in zeros_of(result.model).items():
        assert int(zeros.sum()) == round(0.75 * zeros.numel()), name
    assert result.facts["zeros"] == pytest.approx(0.75, abs=0.01)


def test_a_resumed_schedule_ends_with_the_same_bits(
    tiny_net: nn.Module, toy_task: Any, recorder: Any
) -> None:
    settings = TrainSettings(epochs=3, alpha=1.0, sparsity=0.8, ema=0.5)
    whole = train(tiny_net, toy_task, settings, context=Context(seed=5)).model
    for stop in (2, 7):  # on the way up, and after it
        stopped = recorder(stop_after=stop)
        with pytest.raises(Interrupted):
            train(tiny_net, toy_task, settings, context=stopped.context())
        resumed = train(
            tiny_net, toy_task, settings, context=recorder().context(resume=stopped.saved[-1])
        ).model
        other = tensors_of(whole)
        assert all(torch.equal(t, other[name]) for name, t in tensors_of(resumed).items())


def test_the_schedule_is_cubic() -> None:
    assert sparsity_at(0, 0.9) == 0
    assert sparsity_at(0.5, 0.8) == pytest.approx(0.8 * (1 - 0.125))
    assert sparsity_at(1, 0.9) == sparsity_at(2, 0.9) == 0.9
    assert 0 < RAMP < 1


def test_what_cannot_grow_is_refused(tiny_net: nn.Module, toy_task: Any) -> None:
    for share in (0.0, 0.005, 1.0, -1, float("nan")):
        with pytest.raises(RecipeError, match=r"sparsity is a share of zeros in \[0.01, 1\)"):
            TrainSettings(sparsity=share)
    quantized = Quantize()(tiny_net, toy_task).model
    with pytest.raises(BadInput, match=r"distill.sparsity: .* frozen or quantized"):
        train(quantized, toy_task, TrainSettings(sparsity=0.5, alpha=1.0))
