"""Both runtimes, judged by the same tests: torch is the reference."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from slimdown.core import Artifact, Batch, Context, Target
from slimdown.distill import Distill
from slimdown.errors import MissingExtra
from slimdown.quantize import Quantize
from slimdown.targets import find_target

RUNTIMES = [
    pytest.param("onnxruntime", id="onnxruntime"),
    pytest.param("openvino", id="openvino", marks=pytest.mark.openvino),
]


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Target:
    pytest.importorskip(request.param)
    return find_target(request.param)


def centered_snr_db(reference: Tensor, outputs: Tensor) -> float:
    """Signal to noise of outputs (N, K) around their mean, which untrained networks hide in."""
    signal, noise = reference - reference.mean(0), (reference - outputs).square().mean()
    return float(10 * torch.log10(signal.square().mean() / noise))


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
@pytest.mark.parametrize(("precision", "least_snr_db"), [(None, 90), ("float16", 40), ("int8", 30)])
def test_runtime_computes_what_torch_does(
    target: Target,
    precision: Literal["int8", "float16"] | None,
    least_snr_db: float,
    tiny_net: nn.Module,
    toy_task: Any,
    tmp_path: Path,
) -> None:
    model = tiny_net
    if precision is not None:
        model = Quantize(precision=precision).for_target(target)(tiny_net, toy_task).model
    artifact = target.export(model, toy_task, tmp_path)
    predict = target.load(artifact)
    images = torch.cat(list(toy_task.batches))
    with torch.no_grad():
        expected = model(images)
    outputs = predict(images)
    assert outputs.dtype == torch.float32
    assert centered_snr_db(expected, outputs) > least_snr_db
    shuffled = predict(images.flip(0))
    assert centered_snr_db(expected, shuffled) < 10  # the comparison can fail
    assert artifact.precision == (precision or "float32")
    assert artifact.verified == "executed"


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_any_batch_size_on_any_number_of_threads(
    target: Target, tiny_net: nn.Module, toy_task: Any, tmp_path: Path
) -> None:
    model = Quantize().for_target(target)(tiny_net, toy_task).model
    artifact = target.export(model, toy_task, tmp_path)
    images = torch.cat([*toy_task.batches, *toy_task.batches, *toy_task.batches])[:64]
    outputs = [target.load(artifact, num_threads=threads)(images) for threads in (1, 2)]
    assert torch.equal(outputs[0], outputs[1])
    predict = target.load(artifact)
    for size in (1, 3, 64):
        torch.testing.assert_close(predict(images[:size]), outputs[0][:size])


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_outputs_outlive_the_next_call(
    target: Target, tiny_net: nn.Module, toy_task: Any, tmp_path: Path
) -> None:
    predict = target.load(target.export(tiny_net, toy_task, tmp_path))
    first = predict(toy_task.batches[0])
    kept = first.clone()
    predict(toy_task.batches[1])
    assert torch.equal(first, kept)


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_several_outputs_come_as_a_tuple(target: Target, toy_task: Any, tmp_path: Path) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.conv(x).relu()
            return self.head(features.mean((2, 3))), features

    model, images = Heads().eval(), toy_task.batches[0]
    outputs = target.load(target.export(model, toy_task, tmp_path))(images)
    assert isinstance(outputs, tuple)
    for output, expected in zip(outputs, model(images), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_every_convolution_runs_in_int8(
    target: Target, tiny_net: nn.Module, toy_task: Any, tmp_path: Path
) -> None:
    model = Quantize().for_target(target)(tiny_net, toy_task).model
    quantized = target.export(model, toy_task, tmp_path / "int8")
    kept = target.export(tiny_net, toy_task, tmp_path / "float32")
    assert quantized.kernels is not None
    assert kept.kernels is not None
    assert quantized.kernels["int8"] >= 5  # four convolutions and the head
    assert "float32" not in quantized.kernels
    assert set(kept.kernels) == {"float32"}


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_an_excluded_layer_shows_in_the_audit(
    target: Target, tiny_net: nn.Module, toy_task: Any, tmp_path: Path
) -> None:
    model = Quantize(exclude=("conv1",)).for_target(target)(tiny_net, toy_task).model
    artifact = target.export(model, toy_task, tmp_path)
    assert artifact.kernels is not None
    assert artifact.kernels["float32"] >= 1


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_exporting_again_gives_the_same_hash(
    target: Target, tiny_net: nn.Module, toy_task: Any, tmp_path: Path
) -> None:
    model = Quantize().for_target(target)(tiny_net, toy_task).model
    hashes = {target.export(model, toy_task, tmp_path / name).sha256 for name in ("a", "b")}
    assert len(hashes) == 1


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_an_artifact_that_was_moved_loads(
    target: Target, tiny_net: nn.Module, toy_task: Any, tmp_path: Path
) -> None:
    artifact = target.export(tiny_net, toy_task, tmp_path / "run" / "step")
    (tmp_path / "run").rename(tmp_path / "moved")
    moved: Artifact = artifact.relative_to(tmp_path / "run").under(tmp_path / "moved")
    assert target.load(moved)(toy_task.example_input).shape == (1, 4)


@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
def test_tells_its_version(target: Target) -> None:
    version = target.check()
    assert version[0].isdigit()
    assert "-" not in version


def test_a_missing_openvino_prints_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(wanted: str, package: str | None = None) -> object:
        raise ImportError(wanted)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(MissingExtra, match=r"openvino is not installed: pip install 'slimdown\["):
        find_target("openvino").check()


DEPLOYED = {
    "float16": Quantize(precision="float16"),
    "W8A8": Quantize(),
    "W4A8": Quantize(weight_bits=4),
    "W4A4": Quantize(weight_bits=4, activation_bits=4),
}


@pytest.mark.data
@pytest.mark.parametrize("target", RUNTIMES, indirect=True)
@pytest.mark.parametrize("name", list(DEPLOYED))
@pytest.mark.parametrize("is_trained", [False, True])
def test_the_trained_network_is_deployed_as_torch_judged_it(
    target: Target,
    name: str,
    is_trained: bool,
    resnet20: nn.Module,
    cifar_task: Any,
    cifar_test: tuple[Tensor, Tensor],
    tmp_path: Path,
) -> None:
    images, classes = cifar_test
    if is_trained and name == "float16":
        pytest.skip("half precision is not trained")
    model = DEPLOYED[name].for_target(target)(resnet20, cifar_task).model
    if is_trained:
        cifar_task.train_batches = lambda epoch: [Batch(x) for x in cifar_task.batches]
        settings = Distill(epochs=3, augment="none")
        model = settings(model, cifar_task, Context(original=resnet20)).model
    predict = target.load(target.export(model, cifar_task, tmp_path), num_threads=2)
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in images.split(100)])
    outputs = torch.cat([predict(batch) for batch in images.split(100)])
    right = [100 * float((o.argmax(1) == classes).float().mean()) for o in (expected, outputs)]
    assert right[0] > (85 if name == "W4A4" else 90.5)
    assert abs(right[1] - right[0]) < 0.15
    assert float((expected.argmax(1) == outputs.argmax(1)).float().mean()) >= 0.985
    assert centered_snr_db(expected, outputs) > 30


@pytest.mark.data
def test_residual_sums_of_the_trained_network_run_in_int8(
    resnet20: nn.Module, cifar_task: Any, tmp_path: Path
) -> None:
    target = find_target("onnxruntime")
    model = Quantize().for_target(target)(resnet20, cifar_task).model
    artifact = target.export(model, cifar_task, tmp_path)
    assert artifact.kernels == {"int8": 29}  # 19 convolutions, 9 sums, the head
