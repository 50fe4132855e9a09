from __future__ import annotations

import pytest

from slimdown.errors import RecipeError
from slimdown.load import runs_user_code
from slimdown.load.reference import parse_reference


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("torchvision:resnet50", ("torchvision", "torchvision", "resnet50")),
        ("timm:vit_tiny_patch16_224", ("timm", "timm", "vit_tiny_patch16_224")),
        ("package.module:factory", ("module", "package.module", "factory")),
        ("models/net.py:make", ("file", "models/net.py", "make")),
        ("C:/models/net.py:make", ("file", "C:/models/net.py", "make")),
        ("nets/net.onnx", ("onnx", "nets/net.onnx", "")),
        ("C:/nets/net.onnx", ("onnx", "C:/nets/net.onnx", "")),
    ],
)
def test_takes_a_reference_apart(reference: str, parts: tuple[str, str, str]) -> None:
    assert parse_reference(reference) == parts
    assert str(parse_reference(reference)) == reference


@pytest.mark.parametrize("reference", ["", "resnet50", ":x", "torchvision:", "a b:c", "a/net.pt:x"])
def test_refuses_other_forms(reference: str) -> None:
    with pytest.raises(RecipeError, match="torchvision:resnet50"):
        parse_reference(reference)


def test_tells_which_references_run_user_code() -> None:
    assert runs_user_code("package.module:factory")
    assert runs_user_code("models/net.py:make")
    assert runs_user_code("slimdown_extras.nets:make")
    assert not runs_user_code("torchvision:resnet50")
    assert not runs_user_code("timm:resnet50")
    assert not runs_user_code("nets/net.onnx")
    assert not runs_user_code("slimdown.load.digits_net:digits_net")


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("transformers:vit", "vit"),
        ("transformers:google/vit-base-patch16-224", "google/vit-base-patch16-224"),
        ("transformers:C:/models/vit", "C:/models/vit"),
        ("ultralytics:yolo11n.yaml", "yolo11n.yaml"),
    ],
)
def test_names_of_libraries_may_be_paths(reference: str, name: str) -> None:
    library = reference.partition(":")[0]
    assert parse_reference(reference) == (library, library, name)
    assert not runs_user_code(reference)
