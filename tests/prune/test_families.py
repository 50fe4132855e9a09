"""torchvision's families at half of their MACs: right, exact, trainable, delivered as promised."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slimdown.prune import Prune

IN_PLACE = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "vgg11_bn",
    "densenet121",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "mnasnet0_5",
    "squeezenet1_0",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
]
AS_GRAPH = ["googlenet"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize("name", IN_PLACE + AS_GRAPH)
def test_half_of_the_macs(name, task_for, masked_outputs):
    torchvision = pytest.importorskip("torchvision")
    size = 224 if name.startswith("vit") else 64
    model = torchvision.models.get_model(name, weights=None).eval()
    task = task_for(3, size, size)
    # torchvision's ViTs begin with their last layer at zero: their outputs tell nothing yet
    importance = "l2" if name.startswith("vit") else "hessian"
    result = Prune(macs=0.5, importance=importance, compensate=False)(model, task)
    facts = result.facts

    assert facts["delivery"] == ("graph" if name in AS_GRAPH else "in_place"), facts["reason"]
    assert 0.48 < facts["macs"][1] / facts["macs"][0] <= 0.5
    assert facts["relative_error"] <= 1e-5
    assert all(0 < after <= before for before, after in facts["widths"].values())
    if not name.startswith(("vit", "swin")):  # attention on a CPU is no operator that it counts
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            result.model(task.example_input)
        assert counter.get_total_flops() == 2 * facts["macs"][1]

    x = torch.randn(2, 3, size, size)
    reference = masked_outputs(model, result.structure, x)
    spread = (reference - reference.mean(0)).norm()
    with torch.no_grad():
        error = (result.model.double()(x.double()) - reference).norm()
    if spread > 1e-9 * reference.norm():  # else: an untrained net whose outputs tell nothing
        assert error / spread < 1e-5

    model = result.model.float()
    outputs = model.train(facts["delivery"] == "in_place")(x)
    outputs.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    if facts["delivery"] == "graph":
        with torch.no_grad():
            assert model(torch.randn(3, 3, size, size)).shape == (3, 1000)
