"""Whole networks, as both exporters of torch write them, against ONNX Runtime on the file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

from slimdown.capture import capture, has_dynamic_batch
from slimdown.load import ModelSource, load_model

TOLERANCE = 1e-4


def export(model: nn.Module, path: Path, *, size: int, opset: int, dynamic: bool) -> Path:
    """Write a file as torch's users do: opset 18 and newer by its newer exporter."""
    image = torch.randn(2 if dynamic else 1, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations in the exporters
        if opset >= 18:
            torch.onnx.export(
                model,
                (image,),
                path,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if dynamic else None,
                external_data=False,
                verbose=False,
            )
        else:
            torch.onnx.export(
                model,
                (image,),
                path,
                dynamo=False,
                opset_version=opset,
                input_names=["x"],
                dynamic_axes={"x": {0: "n"}} if dynamic else None,
            )
    return path


def runtime(path: Path, images: Tensor) -> list[Tensor]:
    """What ONNX Runtime says; image by image where the file has room for one."""
    session = onnxruntime.InferenceSession(path)
    (spec,) = session.get_inputs()
    step = spec.shape[0] if isinstance(spec.shape[0], int) else len(images)
    runs = [session.run(None, {spec.name: part.numpy()}) for part in images.split(step)]
    return [torch.from_numpy(np.concatenate(parts)) for parts in zip(*runs, strict=True)]


def worst_error(ours: Any, theirs: list[Tensor]) -> float:
    ours = ours if isinstance(ours, tuple) else (ours,)
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _revive_(model: nn.Module) -> None:
    """Give weights that begin as zeros, such as heads and scales, values of a usual size."""
    for parameter in model.parameters():
        if float(parameter.detach().abs().max()) < 1e-3:
            nn.init.normal_(parameter, std=0.1)


def check(model: nn.Module, folder: Path, *, size: int, opset: int, dynamic: bool) -> None:
    _revive_(model)
    path = export(model.eval(), folder / "net.onnx", size=size, opset=opset, dynamic=dynamic)
    imported = load_model(ModelSource(str(path)))
    images = torch.randn(3, 3, size, size)
    for batch in (images[:1], images):
        with torch.no_grad():
            assert worst_error(imported(batch), runtime(path, batch)) < TOLERANCE
    graph = capture(imported, images[:1])
    assert has_dynamic_batch(graph)
    with torch.no_grad():
        assert worst_error(graph(images), runtime(path, images)) < TOLERANCE


EXPORTERS = pytest.mark.parametrize(
    ("opset", "dynamic"),
    [(11, True), (17, False), (18, False), (20, True)],
    ids=["11", "17-fixed", "18-fixed", "20"],
)


@EXPORTERS
def test_a_network_is_the_same_as_in_the_runtime(
    tiny_net: nn.Module, tmp_path: Path, opset: int, dynamic: bool
) -> None:
    check(tiny_net, tmp_path, size=16, opset=opset, dynamic=dynamic)


@EXPORTERS
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (torchvision.models.resnet18, 64),
        (torchvision.models.mobilenet_v3_large, 64),
        (torchvision.models.shufflenet_v2_x1_0, 64),
        (torchvision.models.efficientnet_b0, 64),
        (torchvision.models.convnext_tiny, 64),
        (torchvision.models.swin_t, 64),
    ],
    ids=["resnet", "mobilenet", "shufflenet", "efficientnet", "convnext", "swin"],
)
def test_torchvisions_networks(
    make: Callable[[], nn.Module], size: int, tmp_path: Path, opset: int, dynamic: bool
) -> None:
    check(make(), tmp_path, size=size, opset=opset, dynamic=dynamic)


@pytest.mark.parametrize(("opset", "dynamic"), [(14, True), (17, False), (18, False), (20, True)])
def test_a_transformer(tmp_path: Path, opset: int, dynamic: bool) -> None:
    transformer = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128)
    check(transformer, tmp_path, size=32, opset=opset, dynamic=dynamic)


@EXPORTERS
@pytest.mark.slow
@pytest.mark.timm
@pytest.mark.parametrize(
    ("name", "size"), [("deit_tiny_patch16_224", 32), ("mobilevit_s", 64), ("convnext_atto", 64)]
)
def test_timms_networks(name: str, size: int, tmp_path: Path, opset: int, dynamic: bool) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": size, "depth": 2} if name.startswith("deit") else {}
    opset = 14 if opset == 11 else opset  # the older exporter knows attention from then on
    check(timm.create_model(name, **options), tmp_path, size=size, opset=opset, dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.ultralytics
@pytest.mark.parametrize("opset", [11, 17])
def test_a_detector(tmp_path: Path, opset: int) -> None:
    pytest.importorskip("ultralytics")
    detector = load_model(ModelSource("ultralytics:yolov8n.yaml"))
    detector.model[-1].export = True  # as its own exporter does, for one tensor as the output
    check(detector, tmp_path, size=64, opset=opset, dynamic=False)
