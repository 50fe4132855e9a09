from __future__ import annotations

import builtins
import os
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slimdown.errors import BadInput, MissingExtra, RecipeError, Unsafe
from slimdown.load import ModelSource, load_model

NET = """
from torch import nn
from blocks import make_head

class Net(nn.Module):
    def __init__(self, num_classes=4, dropout=0.5):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Dropout(dropout))
        self.head = make_head(num_classes).double()

    def forward(self, x):
        return self.head(self.body(x))

def make_nothing():
    return {"a": 1}

def fail():
    raise KeyError("no such layer")

ready = Net()
width = 3
"""


@pytest.fixture
def net_file(tmp_path: Path) -> Iterator[Path]:
    """A user's file that imports another one beside it."""
    (tmp_path / "blocks.py").write_text(
        "from torch import nn\ndef make_head(n): return nn.Linear(8, n)\n"
    )
    (tmp_path / "net.py").write_text(NET)
    yield tmp_path / "net.py"
    sys.modules.pop("blocks", None)


# ------------------------------------------------------------------------------ the user's own


def test_makes_a_users_model_in_eval_mode_and_float32(net_file: Path) -> None:
    path_before = list(sys.path)
    model = load_model(ModelSource(f"{net_file}:Net", options={"num_classes": 3}))
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(torch.zeros(2, 8)).shape == (2, 3)
    assert sys.path == path_before


def test_loads_weights_from_a_file(net_file: Path, tmp_path: Path) -> None:
    weights = {"head.weight": torch.ones(4, 8), "head.bias": torch.arange(4.0)}
    save_file(weights, tmp_path / "w.safetensors")
    model = load_model(ModelSource(f"{net_file}:Net", tmp_path / "w.safetensors"))
    torch.testing.assert_close(model.head.bias, torch.arange(4.0))


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for name, width in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.py").write_text(
            f"from torch import nn\ndef make(): return nn.Linear(1, {width})\n"
        )
    first = load_model(ModelSource(f"{tmp_path}/a/net.py:make"))
    second = load_model(ModelSource(f"{tmp_path}/b/net.py:make"))
    assert (first.out_features, second.out_features) == (2, 3)


def test_finds_modules_in_the_current_folder(
    net_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = net_file.parent / "mynets"
    package.mkdir()
    (package / "small.py").write_text("from torch import nn\ndef make(): return nn.Linear(1, 2)\n")
    monkeypatch.chdir(net_file.parent)
    assert load_model(ModelSource("mynets.small:make")).out_features == 2
    sys.modules.pop("mynets.small")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("Nett", {}, RecipeError, "did you mean 'Net'"),
        ("Net", {"num_class": 3}, RecipeError, r"options do not suit .*num_classes.*num_class"),
        ("make_nothing", {}, BadInput, r"must return a torch\.nn\.Module, got dict"),
        ("fail", {}, BadInput, r"calling it: KeyError.*no such layer"),
        ("ready", {}, BadInput, "name the function or class"),
        ("width", {}, BadInput, "is a int"),
    ],
)
def test_tells_what_is_wrong_with_a_factory(
    net_file: Path, name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(ModelSource(f"{net_file}:{name}", options=options))


@pytest.mark.parametrize("line", ["1 / 0", "import nowhere_at_all", "def", "raise SystemExit(0)"])
def test_tells_a_file_that_fails(tmp_path: Path, line: str) -> None:
    (tmp_path / "broken.py").write_text(line)
    with pytest.raises(BadInput, match=r"broken\.py:make failed, running it"):
        load_model(ModelSource(f"{tmp_path}/broken.py:make"))


def test_tells_a_missing_file_and_a_missing_module(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no file .*nowhere\.py"):
        load_model(ModelSource(f"{tmp_path}/nowhere.py:make"))
    with pytest.raises(RecipeError, match="no module 'nowhere_at_all'"):
        load_model(ModelSource("nowhere_at_all.nets:make"))
    with pytest.raises(RecipeError, match=r"no module 'slimdown\.nowhere'"):
        load_model(ModelSource("slimdown.nowhere:make"))


# ------------------------------------------------------------------------------- torchvision


def test_makes_a_torchvision_model() -> None:
    model = load_model(ModelSource("torchvision:shufflenet_v2_x0_5", options={"num_classes": 7}))
    assert not model.training
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_suggests_a_torchvision_name() -> None:
    with pytest.raises(RecipeError, match=r"'resnet51': did you mean .*resnet50"):
        load_model(ModelSource("torchvision:resnet51"))


def test_tells_options_that_torchvision_does_not_know() -> None:
    with pytest.raises(RecipeError, match=r"options do not suit torchvision:resnet18.*num_class"):
        load_model(ModelSource("torchvision:resnet18", options={"num_class": 7}))


def test_segmentation_models_fetch_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse_to_connect)
    load_model(ModelSource("torchvision:lraspp_mobilenet_v3_large"))


def refuse_to_connect(*args: Any, **kwargs: Any) -> None:
    raise urllib.error.URLError("no network")


@pytest.fixture
def official_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision looks for the fetched weights of squeezenet1_1."""
    from torchvision.models import SqueezeNet1_1_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder / SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]


PRETRAINED = ModelSource("torchvision:squeezenet1_1", options={"pretrained": True})


def test_loads_official_weights_that_are_there(official_weights: Path) -> None:
    state = load_model(ModelSource("torchvision:squeezenet1_1")).state_dict()
    state["features.0.bias"] += 5
    torch.save(state, official_weights)
    loaded = load_model(PRETRAINED).state_dict()
    torch.testing.assert_close(loaded["features.0.bias"], state["features.0.bias"])
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_refuses_official_weights_that_are_more_than_tensors(official_weights: Path) -> None:
    torch.save({"model": nn.Linear(1, 1)}, official_weights)
    with pytest.raises(Unsafe):
        load_model(PRETRAINED)


def test_says_so_when_official_weights_cannot_be_fetched(
    official_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse_to_connect)
    with pytest.raises(BadInput, match=r"cannot get the official weights .* model\.weights"):
        load_model(PRETRAINED)


# -------------------------------------------------------------------------------------- timm


@pytest.mark.timm
def test_makes_a_timm_model() -> None:
    pytest.importorskip("timm")
    model = load_model(ModelSource("timm:test_resnet", options={"num_classes": 5}))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(RecipeError, match="timm has no model 'resnet5o': did you mean"):
        load_model(ModelSource("timm:resnet5o"))


@pytest.mark.timm
def test_says_so_when_timms_weights_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=r"cannot get the official weights of timm:test_resnet"):
        load_model(ModelSource("timm:test_resnet", options={"pretrained": True}))


def test_says_how_to_install_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = builtins.__import__

    def without_timm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(MissingExtra, match=r"pip install 'slimdown\[timm\]'"):
        load_model(ModelSource("timm:resnet50"))
