"""Models, images and settings at the edge: either they run as in float, or the error says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown.capture import capture
from slimdown.core import StageResult, Task
from slimdown.errors import BadInput, CannotCapture, RecipeError
from slimdown.quantize import Quantize
from slimdown.quantize.fold import fold_batch_norms
from slimdown.targets.onnxruntime import OnnxRuntime
from slimdown.targets.openvino import OpenVino

MakeTask = Callable[..., Any]


class Net(nn.Module):
    """(N, 3, 12, 12) -> (N, 4): two convolutions, pooling and a linear."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.mid = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.stem(x)).mean((2, 3)))

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.mid(F.relu(x)))


@pytest.fixture
def images() -> Tensor:
    """24 that differ in color and contrast."""
    noise, colors = torch.randn(24, 3, 12, 12), torch.randn(24, 3, 1, 1)
    return (0.2 + torch.rand(24, 1, 1, 1)) * noise + colors


@pytest.fixture
def net() -> Net:
    return Net().eval()


def quantize(model: nn.Module, task: Task, **settings: Any) -> StageResult:
    return Quantize(**{"effort": "fast", **settings})(model.eval(), task)


def check_deployed(model: nn.Module, result: StageResult, task: Any, folder: Path) -> float:
    """Assert that ONNX Runtime gives what the torch module gives; return its error.

    Both as shares of the largest output of the float model. A value between two levels may go to
    either one.
    """
    x = torch.cat(list(task.batches))
    target = OnnxRuntime()
    outputs = target.load(target.export(result.model, task, folder))(x)
    with torch.no_grad():
        floats, expected = model(x), result.model(x)
    assert bool(torch.isfinite(outputs).all())
    size = float(floats.abs().max())
    differences = (outputs - expected).abs() / size
    assert float(differences.quantile(0.8)) < 1e-4
    assert float(differences.max()) < 0.02
    return float((outputs - floats).abs().max()) / size


# ------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_batches_without_images_are_none_at_all(
    net: Net, images: Tensor, make_task: MakeTask, effort: str
) -> None:
    for batches in ([], [images[:0]], [images[:0], images[:0]]):
        with pytest.raises(BadInput, match=r"no calibration images: .*need a few dozen"):
            quantize(net, make_task(batches, images[:1]), effort=effort)


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_an_empty_batch_among_others_counts_for_nothing(
    net: Net, images: Tensor, make_task: MakeTask, effort: str
) -> None:
    plain = quantize(net, make_task(images.split(8)), effort=effort)
    batches = [images[:0], images[:8], images[:0], *images[8:].split(8)]
    mixed = quantize(net, make_task(batches, images[:1]), effort=effort)
    assert mixed.facts == plain.facts


def test_batches_that_come_only_once_are_named_as_such(
    net: Net, images: Tensor, make_task: MakeTask
) -> None:
    once: Iterator[Tensor] = iter(images.split(8))
    task = make_task([], images[:1])
    task.batches = once
    with pytest.raises(BadInput, match="none when asked again: calibration_batches must begin"):
        quantize(net, task, effort="balanced")


def test_one_image_is_enough_for_ranges_but_not_to_compare(
    net: Net, images: Tensor, make_task: MakeTask, tmp_path: Path
) -> None:
    task = make_task([images[:1]])
    with pytest.raises(BadInput, match=r"one calibration image .*effort: fast"):
        quantize(net, task, effort="balanced")
    assert check_deployed(net, quantize(net, task), task, tmp_path) < 0.02


@pytest.mark.parametrize("value", [0.0, 0.5, -2.0])
def test_constant_activations_get_grids_that_hold_them(
    net: Net, make_task: MakeTask, value: float, tmp_path: Path
) -> None:
    task = make_task([torch.full((16, 3, 12, 12), value)])
    result = quantize(net, task)
    (image,) = (row for row in result.facts["ranges"] if row["layer"] == "input")
    step = (image["clipped_high"] - image["clipped_low"]) / 255
    assert image["clipped_low"] - step <= value <= image["clipped_high"] + step
    assert check_deployed(net, result, task, tmp_path) < 0.02
    with pytest.raises(BadInput, match="the same for all calibration images"):
        quantize(net, task, effort="balanced")


def test_images_of_another_precision_are_read_as_the_model_reads_them(
    net: Net, images: Tensor, make_task: MakeTask
) -> None:
    single = quantize(net, make_task(images.split(8)))
    double = quantize(net, make_task(images.double().split(8), images[:1]))
    assert single.facts == double.facts


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(8, 3, 12, 12, dtype=torch.uint8), "are in uint8, and .* in float32: give"),
        (torch.zeros(8, 3, 16, 16), r"of shape \(3, 16, 16\), and .* \(3, 12, 12\): bring all"),
        (torch.zeros(8, 4, 12, 12), r"of shape \(4, 12, 12\), and .* \(3, 12, 12\)"),
        (torch.zeros(8, 432), r"of shape \(432,\), and .* \(3, 12, 12\)"),
    ],
)
@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_images_of_another_kind_are_refused(
    net: Net, images: Tensor, make_task: MakeTask, batch: Tensor, message: str, effort: str
) -> None:
    with pytest.raises(BadInput, match=message):
        quantize(net, make_task([images[:8], batch]), effort=effort)


class Bytes(Net):
    """Reads pixels as bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255 - 0.5)


@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino()], ids=lambda target: target.name)
def test_a_model_that_reads_bytes_is_fed_bytes(
    make_task: MakeTask, target: Any, tmp_path: Path
) -> None:
    model = Bytes().eval()
    x = (256 * torch.rand(24, 3, 12, 12)).to(torch.uint8)
    task = make_task(x.split(8))
    result = quantize(model, task, profile=target.profile)
    outputs = target.load(target.export(result.model, task, tmp_path))(x)
    with torch.no_grad():
        torch.testing.assert_close(outputs, result.model(x), rtol=1e-2, atol=2e-3)
        torch.testing.assert_close(outputs, model(x), rtol=0.05, atol=0.02)


def test_a_model_of_one_batch_size_is_refused(images: Tensor, make_task: MakeTask) -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(1, 3, 12, 12))

    with pytest.raises(CannotCapture, match="fixed to one batch size"):
        quantize(Fixed(), make_task(images.split(1)))


# ------------------------------------------------------------------------------ values and NaN


@pytest.mark.parametrize("name", ["stem.weight", "mid.bias", "head.weight", "head.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(
    net: Net, images: Tensor, make_task: MakeTask, name: str, value: float
) -> None:
    layer, kind = name.split(".")
    with torch.no_grad():
        net.get_parameter(name).view(-1)[0] = value
    with pytest.raises(BadInput, match=f"the {kind} of {layer} holds NaN or infinity"):
        quantize(net, make_task(images.split(8)))


def test_activations_that_are_no_numbers_are_named(images: Tensor, make_task: MakeTask) -> None:
    class Log(Net):
        def between(self, x: Tensor) -> Tensor:
            return self.mid(torch.log(x))

    with pytest.raises(BadInput, match=r"NaN or infinity in log \(.*\): look at the images"):
        quantize(Log(), make_task(images.split(8)))


def test_outputs_that_are_no_numbers_are_not_called_equal(
    images: Tensor, make_task: MakeTask
) -> None:
    class Log(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(super().forward(x) - 1e6)

    with pytest.raises(BadInput, match="NaN or infinity for calibration images, before any"):
        quantize(Log(), make_task(images.split(8)), effort="balanced")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_in_another_precision_are_refused(
    net: Net, images: Tensor, make_task: MakeTask, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(BadInput, match=rf"the weight of stem is in {name}: call .float\(\)"):
        quantize(net.to(dtype), make_task(images.to(dtype).split(8)))


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_dead_channels_change_nothing(
    net: Net, images: Tensor, make_task: MakeTask, effort: str, tmp_path: Path
) -> None:
    with torch.no_grad():
        net.mid.weight[:4] = 0  # constant, as their bias says
        net.head.weight[1] = 0  # an output that is its bias
        net.stem.weight[2] = 0
        net.stem.bias[2] = -1.0  # dead behind the ReLU
        net.stem.bias[3] = -1e3  # dead on all images
    task = make_task(images.split(8))
    result = quantize(net, task, effort=effort)
    assert check_deployed(net, result, task, tmp_path) < 0.03
    with torch.no_grad():
        outputs = result.model(images)[:, 1]
    np.testing.assert_allclose(outputs.numpy(), float(net.head.bias[1].detach()), atol=2e-3)


def test_a_network_that_is_dead_throughout_gives_its_bias(
    net: Net, images: Tensor, make_task: MakeTask, tmp_path: Path
) -> None:
    nn.init.zeros_(net.mid.weight)
    nn.init.constant_(net.mid.bias, -1.0)
    task = make_task(images.split(8))
    result = quantize(net, task)
    assert check_deployed(net, result, task, tmp_path) < 1e-3
    with torch.no_grad():
        expected = net.head.bias.expand(24, 4)
        torch.testing.assert_close(result.model(images), expected, rtol=1e-3, atol=1e-4)


def test_a_large_bias_on_tiny_weights_fits_its_grid(
    net: Net, images: Tensor, make_task: MakeTask, tmp_path: Path
) -> None:
    with torch.no_grad():
        net.mid.weight[0] *= 1e-12
        net.mid.bias[0] = 5.0
    task = make_task(images.split(8))
    result = quantize(net, task)
    assert float(result.model.get_parameter("mid.bias")[0].detach()) == pytest.approx(5.0, rel=1e-6)
    assert check_deployed(net, result, task, tmp_path) < 0.05


class Twice(Net):
    """One convolution run twice, on inputs of very different sizes."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.mid(100 * F.relu(self.mid(F.relu(x)))))


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_a_weight_that_two_layers_share_suits_the_grids_of_both(
    images: Tensor, make_task: MakeTask, effort: str, tmp_path: Path
) -> None:
    """The bias is rounded to two grids, a hundredfold apart: neither may be left with the other's.

    The steps of the bias are those of the finer input, or of nothing that is seen.
    """
    model, task = Twice().eval(), make_task(images.split(8))
    nn.init.normal_(model.mid.bias)
    result = quantize(model, task, effort=effort)
    scales = {
        name: float(tensor)
        for name, tensor in result.model.state_dict().items()
        if name.startswith("activation_quantizers") and name.endswith("scale")
    }
    readers = result.structure["weights"]
    inputs = [scales[f"activation_quantizers.{readers[node]}.scale"] for node in mids(model)]
    assert max(inputs) > 20 * min(inputs)
    assert check_deployed(model, result, task, tmp_path) < 0.05
    moved = (result.model.get_parameter("mid.bias") - model.mid.bias).detach()
    assert effort != "fast" or float(moved.abs().max()) < 1e-3


def mids(model: nn.Module) -> list[str]:
    """The names of the nodes that run `mid`."""
    graph = fold_batch_norms(capture(model, torch.randn(1, 3, 12, 12))).graph
    return [
        n.name
        for n in graph.nodes
        if any(str(a.target) == "mid.weight" for a in n.all_input_nodes if a.op == "get_attr")
    ]


# ------------------------------------------------------------------------------------ outliers


def snr_db(floats: Tensor, outputs: Tensor) -> float:
    floats, noise = floats.double(), (floats - outputs).double()
    signal = floats - floats.mean(0)
    return float(10 * torch.log10(signal.square().mean() / noise.square().mean()))


def test_one_value_of_a_million_is_told_and_a_percentile_passes_over_it(
    net: Net, make_task: MakeTask
) -> None:
    images = torch.randn(24, 3, 1, 1) + torch.randn(24, 3, 40, 40)
    spoiled = images.clone()
    spoiled[3, 0, 0, 0] = 1e6
    task = make_task(spoiled.split(8))
    # The mean of the spoiled image is one of 24, which no percentile passes over.
    wide, clipped = (
        quantize(net, task, calibration=name, exclude=("head",))
        for name in ("mse", "percentile_99.9")
    )
    first, *rest = wide.facts["notes"]
    assert first.startswith("input: 100 % of its values become zero in INT8, since others reach")
    assert "1e+06" in first
    assert "percentile" in first
    assert any(note.startswith("relu:") for note in rest)  # so it goes on behind the stem
    assert clipped.facts["notes"] == []
    good = images[4:]  # none of them spoiled
    with torch.no_grad():
        floats = net(good)
        assert snr_db(floats, wide.model(good)) < 3
        assert snr_db(floats, clipped.model(good)) > 20


def test_a_channel_of_a_million_is_evened_out(
    net: Net, images: Tensor, make_task: MakeTask
) -> None:
    """The next layer undoes it, which equalization finds; without it the note names the layer."""
    with torch.no_grad():
        net.stem.weight[0] *= 1e6
        net.stem.bias[0] *= 1e6
        net.mid.weight[:, 0] *= 1e-6
    task = make_task(images.split(8))
    told, mended = (quantize(net, task, effort=effort) for effort in ("fast", "balanced"))
    assert [note.split(":")[0] for note in told.facts["notes"]] == ["relu"]
    assert mended.facts["notes"] == []
    with torch.no_grad():
        assert snr_db(net(images), told.model(images)) < snr_db(net(images), mended.model(images))


@pytest.mark.parametrize("profile", ["onnxruntime-x86", "tensorrt"])
@pytest.mark.parametrize("bits", [8, 4])
def test_networks_without_outliers_are_told_nothing(
    net: Net, images: Tensor, make_task: MakeTask, profile: str, bits: int
) -> None:
    settings = {"profile": profile, "activation_bits": bits, "weight_bits": bits}
    assert quantize(net, make_task(images.split(8)), **settings).facts["notes"] == []


# ------------------------------------------------------------- operators and settings


class InDouble(Net):
    """Pools in float64, for which ONNX Runtime has no kernel."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.mid(F.avg_pool2d(x.double(), 2).float()))


class Bessel(Net):
    """Uses an operator that ONNX does not have."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.mid(torch.special.bessel_j0(x)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (InDouble(), "ONNX Runtime cannot run this model: .*AveragePool.*; keep the operator"),
        (Bessel(), "cannot be written as ONNX .*bessel_j0.*use operators that ONNX has"),
    ],
)
def test_operators_that_the_runtime_lacks_are_named_at_the_export(
    images: Tensor, make_task: MakeTask, model: nn.Module, message: str, tmp_path: Path
) -> None:
    task = make_task(images.split(8))
    result = quantize(model, task)  # calibrated all the same: torch has them
    with pytest.raises(BadInput, match=message):
        OnnxRuntime().export(result.model, task, tmp_path)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("stem", r"must be a list of globs such as \['features.0\*'\], got 'stem'"),
        ((None,), r"must be a list of globs .* got \(None,\)"),
        ((7,), "must be a list of globs"),
    ],
)
def test_globs_that_are_none_are_refused_where_they_are_given(exclude: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantize(exclude=exclude)


@pytest.mark.parametrize("exclude", [("",), ("stem", ""), ("[",), ("layer*",)])
def test_globs_that_match_nothing_are_named(
    net: Net, images: Tensor, make_task: MakeTask, exclude: Sequence[str]
) -> None:
    with pytest.raises(RecipeError, match=r"quantize\.exclude matches no layer: "):
        quantize(net, make_task(images.split(8)), exclude=exclude)


@pytest.mark.parametrize("exclude", [("*",), ("stem", "mid", "head"), ("[smh]*",)])
def test_excluding_every_layer_leaves_nothing_to_do(
    net: Net, images: Tensor, make_task: MakeTask, exclude: Sequence[str]
) -> None:
    with pytest.raises(BadInput, match="no layer to quantize: stem: excluded by the recipe"):
        quantize(net, make_task(images.split(8)), exclude=exclude)


@pytest.mark.parametrize("exclude", [(), []])
def test_an_empty_list_of_globs_excludes_nothing(
    net: Net, images: Tensor, make_task: MakeTask, exclude: Any
) -> None:
    result = quantize(net, make_task(images.split(8)), exclude=exclude)
    assert result.facts["quantized"] == ["stem", "mid", "head"]


@pytest.mark.parametrize("count", [0, -3, 2.5, True, "8"])
def test_a_number_of_images_is_a_whole_one(count: Any) -> None:
    with pytest.raises(RecipeError, match=r"quantize\.num_images must be at least 1"):
        Quantize(num_images=count)
