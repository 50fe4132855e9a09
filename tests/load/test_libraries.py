"""Models of transformers and ultralytics, without a network."""

from __future__ import annotations

import builtins
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimdown.errors import BadInput, MissingExtra, RecipeError, Unsafe
from slimdown.load import ModelSource, load_model

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}
X = torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("library", ["transformers", "ultralytics"])
def test_says_how_to_install_a_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=rf"pip install 'slimdown\[{library}\]'"):
        load_model(ModelSource(f"{library}:some.yaml"))


# ------------------------------------------------------------------------------ transformers


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """A folder with a small ViT, as `save_pretrained` writes it."""
    pytest.importorskip("transformers", reason="needs the transformers extra")
    from transformers.utils import logging as their_logging

    model = load_model(ModelSource("transformers:vit", options=TINY))
    model.save_pretrained(tmp_path / "vit")
    before = their_logging.get_verbosity()
    their_logging.set_verbosity(logging.CRITICAL)  # the refusals are the test's
    yield tmp_path / "vit"
    their_logging.set_verbosity(before)


@pytest.mark.transformers
def test_makes_a_model_type_of_transformers() -> None:
    pytest.importorskip("transformers", reason="needs the transformers extra")
    model = load_model(ModelSource("transformers:vit", options=TINY))
    assert type(model).__name__ == "ViTForImageClassification"
    assert not model.training
    assert model(X).logits.shape == (2, 3)


@pytest.mark.transformers
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vitt", {}, "transformers has no model type 'vitt': did you mean .*'vit'"),
        ("vit", {"hiden_size": 16}, "no 'hiden_size': did you mean 'hidden_size'"),
        ("vit", {"hidden_size": "wide"}, "options do not suit transformers:vit"),
    ],
)
def test_tells_a_wrong_name_or_option_of_transformers(
    name: str, options: dict[str, Any], message: str
) -> None:
    pytest.importorskip("transformers", reason="needs the transformers extra")
    with pytest.raises(RecipeError, match=message):
        load_model(ModelSource(f"transformers:{name}", options=options))


@pytest.mark.transformers
def test_loads_a_checkpoint_of_a_folder_as_the_class_that_was_saved(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["classifier.bias"] += 5
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    model = load_model(ModelSource(f"transformers:{checkpoint}"))
    assert type(model).__name__ == "ViTForImageClassification"
    torch.testing.assert_close(model.classifier.bias, weights["classifier.bias"])


@pytest.mark.transformers
def test_refuses_a_checkpoint_that_is_pickled(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(Unsafe, match="no safetensors"):
        load_model(ModelSource(f"transformers:{checkpoint}"))


@pytest.mark.transformers
def test_refuses_a_checkpoint_without_the_weights_of_its_task(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "classifier" not in name}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks weights .* classifier\.bias"):
        load_model(ModelSource(f"transformers:{checkpoint}"))


@pytest.mark.transformers
def test_runs_no_code_of_a_checkpoint(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises((RecipeError, BadInput)):
        load_model(ModelSource(f"transformers:{checkpoint}"))


@pytest.mark.transformers
def test_says_so_when_a_checkpoint_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the transformers extra")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="cannot get the official weights of transformers:a/b"):
        load_model(ModelSource("transformers:a/b"))


# ------------------------------------------------------------------------------- ultralytics


@pytest.mark.ultralytics
def test_ultralytics_leaves_pillow_and_torch_as_they_are() -> None:
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("needs the ultralytics extra")
    program = (  # in a process of its own: here, another test may have imported ultralytics itself
        "import PIL.Image, torch; own = PIL.Image.open, torch.save\n"
        "from slimdown import ModelSource, load_model\n"
        "load_model(ModelSource('ultralytics:yolov8n.yaml'))\n"
        "assert (PIL.Image.open, torch.save) == own"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.ultralytics
def test_makes_a_configuration_of_ultralytics() -> None:
    pytest.importorskip("ultralytics", reason="needs the ultralytics extra")
    model = load_model(ModelSource("ultralytics:yolov8n.yaml", options={"nc": 3}))
    assert type(model).__name__ == "DetectionModel"
    assert not model.training
    decoded, _ = model(torch.zeros(1, 3, 32, 32))
    assert decoded.shape == (1, 4 + 3, 21)
    assert "YOLO_OFFLINE" not in os.environ


@pytest.mark.ultralytics
def test_reads_the_size_and_the_task_of_a_configuration() -> None:
    pytest.importorskip("ultralytics", reason="needs the ultralytics extra")
    small = load_model(ModelSource("ultralytics:yolov8n-cls.yaml"))
    assert type(small).__name__ == "ClassificationModel"
    wide = load_model(ModelSource("ultralytics:yolov8s-cls.yaml"))
    assert sum(p.numel() for p in wide.parameters()) > 2 * sum(
        p.numel() for p in small.parameters()
    )


@pytest.mark.ultralytics
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("yolov8q.yaml", {}, "ultralytics has no configuration 'yolov8q.yaml': did you mean"),
        ("./own.yaml", {}, "write a function that makes the model"),
        ("yolov8n.yaml", {"classes": 3}, "options do not suit ultralytics:yolov8n.yaml.*classes"),
    ],
)
def test_tells_a_wrong_name_or_option_of_ultralytics(
    name: str, options: dict[str, Any], message: str
) -> None:
    pytest.importorskip("ultralytics", reason="needs the ultralytics extra")
    with pytest.raises(RecipeError, match=message):
        load_model(ModelSource(f"ultralytics:{name}", options=options))


def test_refuses_the_pickles_of_ultralytics() -> None:
    with pytest.raises(Unsafe, match=r"\.state_dict\(\), 'model\.safetensors'"):
        load_model(ModelSource("ultralytics:yolo11n.pt"))
