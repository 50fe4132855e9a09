from __future__ import annotations

import pytest
import torch
from torch import nn

from slimdown.capture import capture
from slimdown.errors import BadInput
from slimdown.quantize import HalfPrecision
from slimdown.quantize.fold import fold_batch_norms
from slimdown.quantize.half import check_half


def halved(model: nn.Module) -> HalfPrecision:
    graph_module = fold_batch_norms(capture(model, torch.randn(1, 3, 16, 16)))
    return HalfPrecision(graph_module).eval()


def test_stores_float16_and_takes_and_gives_float32(tiny_net: nn.Module) -> None:
    half = halved(tiny_net)
    x = torch.randn(5, 3, 16, 16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}
    assert half(x).dtype == torch.float32
    torch.testing.assert_close(half(x), tiny_net(x), rtol=0.02, atol=0.02)
    assert next(tiny_net.parameters()).dtype == torch.float32


def test_on_a_cpu_it_computes_in_float32_from_the_same_weights(tiny_net: nn.Module) -> None:
    half = halved(tiny_net)
    x = torch.randn(5, 3, 16, 16)
    exact = half.compute_in_float16(x)
    assert torch.equal(exact, exact.half().float())
    assert not torch.equal(half(x), half(x).half().float())
    torch.testing.assert_close(half(x), exact, rtol=0.01, atol=0.01)


def test_what_is_exported_computes_in_float16(tiny_net: nn.Module) -> None:
    graph_module = capture(halved(tiny_net), torch.randn(1, 3, 16, 16))
    kinds = {
        node.meta["val"].dtype for node in graph_module.graph.nodes if "conv2d" in str(node.target)
    }
    assert kinds == {torch.float16}


def test_a_network_that_overflows_is_refused(tiny_net: nn.Module) -> None:
    half = halved(tiny_net)
    check_half(half, torch.randn(1, 3, 16, 16))
    with torch.no_grad():
        half.model.get_submodule("head").weight.fill_(60_000.0)
    with pytest.raises(BadInput, match="overflows in float16"):
        check_half(half, 100 * torch.ones(1, 3, 16, 16))


def test_a_network_that_makes_float32_tensors_is_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x + torch.ones(16, dtype=torch.float32))

    with pytest.raises(BadInput, match="does not run in float16"):
        check_half(halved(Mixed()), torch.randn(1, 3, 16, 16))
