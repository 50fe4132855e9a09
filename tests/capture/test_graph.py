from __future__ import annotations

import builtins

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from slimdown.capture import capture, has_dynamic_batch
from slimdown.errors import CannotCapture


class Wrapped(nn.Module):
    """A module somewhere inside of a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 4, 1), inner)

    def forward(self, x):
        return self.blocks(x)


class Branch(nn.Module):
    def forward(self, x):
        return 2 * x if x.mean() > 0 else x


class Item(nn.Module):
    def forward(self, x):
        return x[:, : int(x.sum().item())]


class Numpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(2 * x.detach().numpy())


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(1, 32, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(8)
        self.constant = torch.randn(8)

    def forward(self, x):
        return {"y": self.norm(self.b(self.a(x))) + self.constant, "flat": x.view(x.shape[0], -1)}


def test_the_graph_computes_what_the_model_computes_at_any_batch_size(tiny_net):
    graph = capture(tiny_net, torch.zeros(1, 3, 16, 16))
    assert has_dynamic_batch(graph)
    for batch_size in (1, 2, 5):
        x = torch.randn(batch_size, 3, 16, 16)
        assert torch.equal(graph(x), tiny_net(x))


def test_the_model_is_left_as_it_was_and_shares_nothing(tiny_net):
    tiny_net.train()
    before = {name: tensor.clone() for name, tensor in tiny_net.state_dict().items()}
    graph = capture(tiny_net, torch.zeros(1, 3, 16, 16))
    assert tiny_net.training
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[name]) for name, t in tiny_net.state_dict().items())


def test_the_state_has_the_names_of_the_model(tiny_net):
    graph = capture(tiny_net, torch.zeros(1, 3, 16, 16))
    assert graph.state_dict().keys() == tiny_net.state_dict().keys()
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    assert read <= tiny_net.state_dict().keys()


def test_nodes_know_the_modules_they_come_from(tiny_net):
    graph = capture(tiny_net, torch.zeros(1, 3, 16, 16))
    convolutions = [n for n in graph.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    paths = [list(node.meta["nn_module_stack"].values())[-1][0] for node in convolutions]
    assert sorted(paths) == ["conv1", "conv2", "down", "stem"]


def test_a_graph_can_be_trained_and_captured_again(tiny_net):
    graph = capture(tiny_net, torch.zeros(1, 3, 16, 16)).train()
    x = torch.randn(4, 3, 16, 16)
    graph(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in graph.parameters())
    again = capture(graph, torch.zeros(1, 3, 16, 16))
    assert not torch.equal(again.bn.running_mean, tiny_net.bn.running_mean)
    assert torch.equal(again(x), graph.eval()(x))
    assert again.state_dict().keys() == tiny_net.state_dict().keys()


def test_tied_weights_constants_and_several_outputs():
    model = Tied().eval()
    graph = capture(model, torch.zeros(1, 8))
    x = torch.randn(3, 8)
    assert torch.equal(graph(x)["y"], model(x)["y"])
    assert len(list(graph.parameters())) == len(list(model.parameters()))


def test_a_model_with_a_fixed_batch_is_captured_at_that_of_the_example():
    graph = capture(Wrapped(FixedBatch()), torch.zeros(1, 3, 4, 4))
    assert not has_dynamic_batch(graph)
    assert graph(torch.zeros(1, 3, 4, 4)).shape == (1, 32, 2)


@pytest.mark.parametrize("inner", [Branch(), Item()])
def test_control_flow_on_data_names_the_module(inner):
    with pytest.raises(CannotCapture, match=r"fails in blocks\.1 \((Branch|Item)\)") as caught:
        capture(Wrapped(inner), torch.zeros(1, 3, 4, 4))
    assert "control flow depends on the values of tensors" in str(caught.value)


def test_leaving_torch_names_the_module_and_the_reason():
    with pytest.raises(CannotCapture, match=r"fails in blocks\.1 \(Numpy\): RuntimeError: .*numpy"):
        capture(Wrapped(Numpy()), torch.zeros(1, 3, 4, 4))


def test_a_model_that_fails_on_its_own_input_says_so():
    with pytest.raises(CannotCapture, match=r"fails on an input of shape \(1, 3, 4, 4\)") as caught:
        capture(Wrapped(nn.Conv2d(5, 2, 1)), torch.zeros(1, 3, 4, 4))
    assert "blocks.1 (Conv2d)" in str(caught.value)


def test_a_failure_prints_nothing(capfd):
    with pytest.raises(CannotCapture):
        capture(Wrapped(Branch()), torch.zeros(1, 3, 4, 4))
    out, err = capfd.readouterr()
    assert out == ""
    assert "aten" not in err


class Length(nn.Module):
    def forward(self, x):
        return x.reshape(len(x), -1)


def test_len_of_a_tensor_leaves_the_batch_free():
    graph = capture(Wrapped(Length()), torch.zeros(1, 3, 4, 4))
    assert has_dynamic_batch(graph)
    assert graph(torch.zeros(5, 3, 4, 4)).shape == (5, 64)
    assert len is builtins.len
    assert type(len).__name__ == "builtin_function_or_method"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_any_precision_is_captured_in_its_own(tiny_net, dtype):
    model = tiny_net.to(dtype)
    graph = capture(model, torch.zeros(1, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16, dtype=dtype)
    assert torch.equal(graph(x), model(x))


def test_a_model_on_the_meta_device_is_captured(tiny_net):
    graph = capture(tiny_net.to("meta"), torch.zeros(1, 3, 16, 16))
    assert {parameter.device.type for parameter in graph.parameters()} == {"meta"}


def test_hooks_and_parametrizations_are_part_of_the_graph(tiny_net):
    parametrizations.weight_norm(tiny_net.conv1)
    tiny_net.stem.register_forward_hook(lambda module, args, output: 2 * output)
    tiny_net.conv2.register_full_backward_hook(lambda module, gradients, outer: None)
    graph = capture(tiny_net, torch.zeros(1, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(graph(x), tiny_net(x))
    assert graph.state_dict().keys() == tiny_net.state_dict().keys()


@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (nn.DataParallel, r"give its \.module"),
        (torch.compile, r"give its \._orig_mod"),
        (lambda model: torch.jit.trace(model, torch.zeros(1, 3, 16, 16)), "that it was made from"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)
def test_wrapped_models_are_refused_with_advice(tiny_net, wrap, advice):
    with pytest.raises(CannotCapture, match=advice):
        capture(wrap(tiny_net), torch.zeros(1, 3, 16, 16))


def test_a_model_that_cannot_be_copied_says_so(tiny_net):
    tiny_net.conv1.computed = tiny_net.conv1.weight * 2
    with pytest.raises(CannotCapture, match=r"cannot be copied.*parametrizations\.weight_norm"):
        capture(tiny_net, torch.zeros(1, 3, 16, 16))
