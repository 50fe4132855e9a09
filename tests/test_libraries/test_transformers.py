from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.capture import capture, has_dynamic_batch
from slimdown.core import Batch, logits_of
from slimdown.distill.objective import make_objective
from slimdown.distill.settings import TrainSettings
from slimdown.load import ModelSource, load_model
from slimdown.load.classification import score_top1

pytestmark = pytest.mark.transformers
pytest.importorskip("transformers", reason="needs the transformers extra")

TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [16, 16, 24, 24],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
DETECTOR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
TINY: dict[str, dict[str, Any]] = {
    "vit": TRANSFORMER,
    "deit": TRANSFORMER,
    "beit": {**TRANSFORMER, "use_mean_pooling": False},
    "clip_vision_model": TRANSFORMER,
    "swin": {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
    | {"depths": [1, 1], "num_heads": [2, 4]},
    "convnext": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "image_size": 32},
    "segformer": {"num_encoder_blocks": 2, "hidden_sizes": [16, 32], "depths": [1, 1]}
    | {"num_attention_heads": [1, 2], "sr_ratios": [2, 1], "patch_sizes": [7, 3]}
    | {"strides": [4, 2], "mlp_ratios": [2, 2]},
    "mobilevit": {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8] * 7}
    | {"num_attention_heads": 2},
    "detr": {**DETECTOR, "backbone_config": RESNET, "num_queries": 8},
}
"""Model type -> options that make it small; 32x32 pixels where they tell no size."""


def make(name: str) -> nn.Module:
    """A small model whose every value counts: all zeros and ones become random."""
    model = load_model(ModelSource(f"transformers:{name}", options=TINY[name]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                noise = 0.3 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + noise.abs() if key.endswith(("var", "weight")) else noise)
            elif tensor.is_floating_point():
                tensor.mul_(8)
    return model


def first_tensor(outputs: Any) -> Tensor:
    logits = logits_of(outputs)
    return logits if isinstance(logits, Tensor) else outputs[0]


SLOW = {"detr", "mobilevit"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in TINY]
)
def test_a_small_one_of_each_family_is_pruned(name, prune, masked, differ):
    model, size = make(name), TINY[name].get("image_size", 32)
    assert has_dynamic_batch(capture(model, torch.zeros(1, 3, size, size)))
    result = prune(model, size, macs=0.75)
    before, after = result.facts["macs"]
    assert after <= 0.75 * before
    assert type(result.model) is type(model)

    x = torch.randn(2, 3, size, size).double()
    pruned = copy.deepcopy(result.model).double().eval()
    with torch.no_grad():
        ours, theirs = pruned(x), masked(model, result)(x)
    assert type(ours) is type(theirs)
    assert differ(first_tensor(ours), first_tensor(theirs)) < 1e-6


def test_a_structured_output_is_judged_and_trained_by_its_logits():
    model = make("vit")
    batch = Batch(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]))
    with torch.no_grad():
        expected = model(batch.inputs).logits.argmax(1)
    score = score_top1(model, [batch])
    assert score.predictions.tolist() == expected.tolist()

    task: Any = SimpleNamespace(loss=lambda outputs, b: F.cross_entropy(outputs.logits, b.targets))
    settings = TrainSettings(alpha=0.5, augment="none", amp="bf16")
    objective = make_objective(task, settings, teacher=make("vit"), device=torch.device("cpu"))
    terms = objective.compute(model.train(), batch, seed=0)
    assert terms.loss.dtype == torch.float32
    assert terms.soft is not None
    terms.loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
