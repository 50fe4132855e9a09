from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slimdown.errors import BadInput, Unsafe
from slimdown.load.weights import load_weights_, read_weights


@pytest.fixture
def saved(tiny_net: nn.Module) -> dict[str, Tensor]:
    return dict(tiny_net.state_dict())


@pytest.fixture
def fresh(tiny_net: nn.Module) -> nn.Module:
    """The same architecture, other weights."""
    model = copy.deepcopy(tiny_net)
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


def assert_loaded(model: nn.Module, saved: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)


def test_loads_safetensors(fresh: nn.Module, saved: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(saved, tmp_path / "a.safetensors")
    load_weights_(fresh, tmp_path / "a.safetensors")
    assert_loaded(fresh, saved)


def wrap_as(shape: str, saved: dict[str, Tensor]) -> Any:
    prefixed = OrderedDict((f"module.{name}", tensor) for name, tensor in saved.items())
    return {
        "plain": saved,
        "state_dict": {"state_dict": saved, "epoch": 3, "best": 0.9},
        "model": {"model": saved, "optimizer": {"lr": 0.1}},
        "nested": {"model": {"state_dict": saved}},
        "data parallel": prefixed,
        "both": {"state_dict": prefixed},
        "compiled": {f"_orig_mod.module.{name}": tensor for name, tensor in saved.items()},
        "lightning": {"state_dict": {f"model.{name}": tensor for name, tensor in saved.items()}},
    }[shape]


@pytest.mark.parametrize(
    "shape",
    [
        "plain",
        "state_dict",
        "model",
        "nested",
        "data parallel",
        "both",
        "compiled",
        "lightning",
    ],
)
def test_takes_off_usual_wrappings(
    fresh: nn.Module, saved: dict[str, Tensor], tmp_path: Path, shape: str
) -> None:
    torch.save(wrap_as(shape, saved), tmp_path / "a.pth")
    load_weights_(fresh, tmp_path / "a.pth")
    assert_loaded(fresh, saved)


def test_keeps_a_prefix_that_is_the_models_own(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(module=nn.Linear(2, 2)))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    load_weights_(model, tmp_path / "a.pt")


def test_num_batches_tracked_may_be_missing(
    fresh: nn.Module, saved: dict[str, Tensor], tmp_path: Path
) -> None:
    del saved["bn.num_batches_tracked"]
    save_file(saved, tmp_path / "a.safetensors")
    load_weights_(fresh, tmp_path / "a.safetensors")


def test_half_precision_weights_become_float32(
    fresh: nn.Module, saved: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file({name: tensor.half() for name, tensor in saved.items()}, tmp_path / "a.safetensors")
    load_weights_(fresh, tmp_path / "a.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in fresh.parameters())
    torch.testing.assert_close(fresh.head.weight, saved["head.weight"], rtol=1e-3, atol=1e-3)


def test_names_what_is_missing_and_what_is_too_much(
    fresh: nn.Module, saved: dict[str, Tensor], tmp_path: Path
) -> None:
    saved["extra.weight"] = torch.zeros(1)
    del saved["head.bias"]
    save_file(saved, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"lacks head\.bias; the model has no extra\.weight"):
        load_weights_(fresh, tmp_path / "a.safetensors")


def test_names_wrong_shapes_and_leaves_the_model_alone(
    fresh: nn.Module, saved: dict[str, Tensor], tmp_path: Path
) -> None:
    saved["head.weight"] = torch.zeros(9, 16)
    save_file(saved, tmp_path / "a.safetensors")
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(BadInput, match=r"head\.weight is \(9, 16\) in the file and \(4, 16\)"):
        load_weights_(fresh, tmp_path / "a.safetensors")
    assert_loaded(fresh, before)


def test_shows_only_the_first_of_many(fresh: nn.Module, tmp_path: Path) -> None:
    save_file({f"other.{i}": torch.zeros(1) for i in range(9)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="and 5 more"):
        load_weights_(fresh, tmp_path / "a.safetensors")


def test_refuses_weights_that_are_not_finite(
    fresh: nn.Module, saved: dict[str, Tensor], tmp_path: Path
) -> None:
    saved["head.bias"] = torch.full((4,), float("nan"))
    save_file(saved, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"NaN or infinity: head\.bias"):
        load_weights_(fresh, tmp_path / "a.safetensors")


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return Path.write_text, (self.victim, "pwned")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_never_runs_the_code_of_a_pickle(tmp_path: Path, suffix: str, legacy: bool) -> None:
    path, victim = tmp_path / f"a{suffix}", tmp_path / "victim"
    content = {"state_dict": {"weight": torch.zeros(1)}, "hook": Malicious(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(Unsafe, match=r"refused to read .* tensors") as refused:
        read_weights(path)
    assert refused.value.exit_code == 6
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists()  # the bait works where it is not refused


def test_never_runs_the_code_of_a_bare_pickle(tmp_path: Path) -> None:
    path, victim = tmp_path / "a.pt", tmp_path / "victim"
    path.write_bytes(pickle.dumps(Malicious(victim)))
    with pytest.raises(Unsafe):
        read_weights(path)
    assert not victim.exists()


def test_refuses_a_whole_module(tiny_net: nn.Module, tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(Unsafe, match="save_file"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch would rather see torch.export
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refuses_torchscript(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save(tmp_path / "a.pt")
    with pytest.raises(Unsafe):
        read_weights(tmp_path / "a.pt")


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no weights file .*nowhere\.pt"):
        read_weights(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("kept", [0, 100, 700])
def test_tells_damaged_files(
    saved: dict[str, Tensor], tmp_path: Path, name: str, kept: int
) -> None:
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(saved, path)
    else:
        torch.save(saved, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match="damaged"):
        read_weights(path)


def test_refuses_other_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"\.safetensors"):
        read_weights(tmp_path / "a.onnx")


@pytest.mark.parametrize("content", [torch.zeros(2), [1, 2], {}, {"epoch": 3}])
def test_refuses_what_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="no state dict"):
        read_weights(tmp_path / "a.pt")
