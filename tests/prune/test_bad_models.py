"""Models that are not made for being edited: each is pruned rightly, or refused clearly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown import verify
from slimdown.capture import analyze, capture
from slimdown.errors import BadInput, CannotCapture
from slimdown.prune import Prune
from slimdown.prune.probe import make_probe

X = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def prune(task_for):
    def run(model, **settings):
        plain = {"macs": 0.5, "round_to": 1, "compensate": False}
        return Prune(**{**plain, **settings})(model, task_for(8, 8, 8))

    return run


def check(result, model, masked_outputs):
    """The result is verified, right by the independent reference, and smaller."""
    verify(model, result, X[:1])
    reference = masked_outputs(model, result.structure, X)
    torch.testing.assert_close(result.model.double()(X.double()), reference)
    assert sum(p.numel() for p in result.model.parameters()) < sum(
        p.numel() for p in model.parameters()
    )


class Net(nn.Module):
    """Two convolutions, the second of which a test makes difficult."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.fixture
def net():
    return Net().eval()


def test_a_module_that_is_used_twice(prune, masked_outputs):
    class Twice(Net):
        def forward(self, x):
            x = torch.relu(self.second(torch.relu(self.first(x))))
            return self.head(torch.relu(self.second(x)).mean((2, 3)))

    model = Twice().eval()
    result = prune(model)
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    check(result, model, masked_outputs)


def test_tied_parameters_stay_tied(prune, masked_outputs):
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(24, 24, 3, padding=1)
            self.other.weight = self.second.weight

        def forward(self, x):
            x = torch.relu(self.other(torch.relu(self.first(x))))
            return self.head(torch.relu(self.second(x)).mean((2, 3)))

    model = Tied().eval()
    result = prune(model)
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    assert result.model.other.weight is result.model.second.weight
    check(result, model, masked_outputs)


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_as_wide_as_channels(prune, masked_outputs, persistent):
    class Buffered(Net):
        def forward(self, x):
            x = torch.relu(self.first(x) * self.factor)
            return self.head(torch.relu(self.second(x)).mean((2, 3)))

    model = Buffered()
    model.register_buffer("factor", torch.rand(24, 1, 1), persistent=persistent)
    result = prune(model.eval())
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    assert len(result.model.factor) == result.model.first.out_channels < 24
    assert ("factor" in result.model.state_dict()) == persistent
    check(result, model, masked_outputs)


def check_weight_norm(result, model):
    verify(model, result, X[:1])
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    pruned = result.model
    assert pruned.state_dict().keys() == model.state_dict().keys()
    pruned.train()(X).square().mean().backward()
    assert all(p.grad is not None for p in pruned.parameters())
    assert pruned.second.weight.shape[0] == pruned.second.out_channels < 24


def test_a_parametrized_weight(prune, net):
    nn.utils.parametrizations.weight_norm(net.second)
    check_weight_norm(prune(net), net)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_a_hook_computes(prune, net):
    nn.utils.weight_norm(net.second)
    with pytest.raises(CannotCapture, match=r"take torch\.nn\.utils\.parametrizations"):
        prune(net)
    with torch.no_grad():  # afterwards the weight has no history that forbids copies
        net(X)
    check_weight_norm(prune(net), net)


def test_hooks_stay(prune, net, masked_outputs):
    seen = []
    net.first.register_forward_hook(lambda module, args, output: output * 2)
    net.second.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    result = prune(net)
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    seen.clear()
    check(result, net, masked_outputs)
    assert {24, result.model.second.out_channels} <= set(seen)


def test_a_model_frozen_as_a_whole_comes_back_as_itself(prune, net):
    result = prune(net.requires_grad_(False))
    assert result.facts["delivery"] == "in_place"
    assert not any(parameter.requires_grad for parameter in result.model.parameters())


def test_frozen_parameters_stay_frozen(prune, net, masked_outputs):
    net.first.requires_grad_(False)
    result = prune(net)
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    frozen = {name for name, p in result.model.named_parameters() if not p.requires_grad}
    assert frozen == {"first.weight", "first.bias"}
    check(result, net, masked_outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision(net, dtype):
    class Task:
        example_input = X[:1].to(dtype)

        def calibration_batches(self):
            return [X.to(dtype)]

    model = net.to(dtype)
    result = Prune(macs=0.5, round_to=1, importance="l2", compensate=False)(model, Task())
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert verify(model, result, X[:1].to(dtype)).relative_error <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"sensitivity": True}, {"depth": 0.1}])
def test_images_are_given_in_the_precision_of_the_model(net, task_for, dtype, settings):
    model = net.to(dtype)
    result = Prune(macs=0.5, round_to=1, **settings)(model, task_for(8, 8, 8))
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    before, after = result.facts["compensation"]["output_error"]
    assert after < before


class Writes(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(2))


class WritesNot(Net):
    def forward(self, x):
        return super().forward((x - 0.5) * 2)


@pytest.mark.parametrize("settings", [{"sensitivity": True}, {"depth": 0.1, "importance": "wanda"}])
def test_an_input_that_is_written_into(task_for, settings):
    task = task_for(8, 8, 8)
    (images,) = task.calibration_batches()
    before = images.clone()
    writes, writes_not = Writes().eval(), WritesNot().eval()
    writes_not.load_state_dict(writes.state_dict())
    stage = Prune(macs=0.5, round_to=1, **settings)
    result, wanted = stage(writes, task), stage(writes_not, task)
    assert torch.equal(images, before)
    assert result.facts["delivery"] == "in_place", result.facts["reason"]
    assert result.structure == wanted.structure
    assert torch.equal(result.model(X.clone()), wanted.model(X))


OUTPUTS = {
    "a mean": lambda y: (y, y.square().mean()),
    "a constant": lambda y: (y, torch.arange(28.0).view(7, 4)),
    "another axis": lambda y: {"a": y.view(-1, 3, 5).transpose(0, 1), "b": [y, None]},
    "classes": lambda y: (y.argmax(1), y),
    "crops": lambda y: y.reshape(-1, 5),
}
NO_SAMPLES = {
    r"float32 \(\)": lambda y: y.mean(),
    r"float32 \(3, \d, 5\)": lambda y: y.view(-1, 3, 5).transpose(0, 1),
    r"int64 \(\d,\)": lambda y: y.argmax(1),
}


class Gives(Net):
    def __init__(self, outputs):
        super().__init__()
        self.head = nn.Linear(24, 15)
        self.outputs = outputs

    def forward(self, x):
        return self.outputs(super().forward(x))


SETTINGS = [
    {},
    {"importance": "l2", "compensate": False},
    {"importance": "l2"},
    {"importance": "wanda", "sensitivity": True},
    {"depth": 0.1},
]


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_beside_those_that_list_samples(name, task_for):
    model = Gives(OUTPUTS[name]).eval()
    for settings in SETTINGS:
        result = Prune(macs=0.5, round_to=1, **settings)(model, task_for(8, 8, 8))
        assert result.facts["delivery"] == "in_place", result.facts["reason"]
        verify(model, result, X[:1])


@pytest.mark.parametrize("given", NO_SAMPLES)
def test_outputs_that_list_no_samples_are_refused_by_what_they_are(given, task_for):
    model = Gives(NO_SAMPLES[given]).eval()
    for settings in SETTINGS:
        with pytest.raises(BadInput, match=f"for a batch of . this model gives {given}: wrap it"):
            Prune(macs=0.5, round_to=1, **settings)(model, task_for(8, 8, 8))


def test_dynamic_control_flow_is_refused_by_its_module(prune):
    class Gate(nn.Module):
        def forward(self, x):
            return x * 2 if x.mean() > 0 else x

    model = nn.Sequential(nn.Conv2d(8, 24, 1), Gate(), nn.Conv2d(24, 5, 1)).eval()
    with pytest.raises(CannotCapture, match=r"fails in 1 \(Gate\).*torch.where"):
        prune(model)


def test_no_layer_is_left_without_a_channel(prune, net):
    result = prune(net, macs=0.02, min_keep=0.0)
    assert min(after for _, after in result.facts["widths"].values()) >= 1
    assert result.model(X).shape == (3, 5)


def test_the_probe_is_on_the_models_device(net):
    probe = make_probe(analyze(capture(net, X[:1])))
    devices = {tensor.device for tensor in (*probe.inputs, *probe.state.values())}
    assert devices == {next(net.parameters()).device}
