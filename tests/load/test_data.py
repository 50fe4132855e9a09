from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from slimdown.core import Preprocess
from slimdown.errors import BadInput
from slimdown.load import (
    DataSource,
    DataWarning,
    ModelSource,
    check_model,
    load_model,
    load_task,
)
from slimdown.load.images import CachedImages, StreamedImages

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture
def source(image_folder: Path) -> DataSource:
    return DataSource(kind="folder", root=image_folder, calibration=8, batch_size=4)


def test_loads_a_folder(source: DataSource) -> None:
    task = load_task(source)
    assert task.labels == ("cat", "dog")
    assert task.preprocess == Preprocess(size=(16, 16), **IMAGENET)  # type: ignore[arg-type]
    assert task.train is not None
    assert task.validation is not None
    sizes = (len(task.train), len(task.validation), len(task.calibration), len(task.test))
    assert sizes == (18, 2, 8, 10)
    assert task.notes == ()


def test_the_digits_need_nothing() -> None:
    task = load_task(DataSource(kind="digits"))
    assert task.example_input.shape == (1, 1, 32, 32)
    assert not task.flip
    assert load_task(DataSource(kind="digits", flip=True)).flip


def test_images_without_labels_calibrate_and_do_not_judge(image_folder: Path) -> None:
    source = DataSource(kind="folder", train=image_folder / "train", calibration=8)
    with pytest.warns(DataWarning, match="no accuracy is judged"):
        task = load_task(source)
    assert task.train is not None
    assert (len(task.train), len(task.calibration)) == (20, 8)
    assert (task.test, task.validation, task.validate) == (None, None, None)
    assert all(batch.targets is None for batch in task.train_batches(0))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 7))
    check_model(model, task)  # how many classes there are is not known
    assert task.score(model) is None
    (first, *_) = task.calibration_batches()
    torch.testing.assert_close(task.example_input, first[:1])


def test_streamed_and_cached_tasks_are_equal(source: DataSource) -> None:
    cached, streamed = load_task(source), load_task(source, max_cached_bytes=1000)
    assert isinstance(cached.test.images, CachedImages)
    assert isinstance(streamed.test.images, StreamedImages)
    assert streamed.calibration_hash == cached.calibration_hash
    for ours, theirs in zip(streamed.train_batches(3), cached.train_batches(3), strict=True):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)


def test_streaming_draws_no_random_numbers(source: DataSource) -> None:
    task = load_task(source, max_cached_bytes=0)
    before = torch.get_rng_state()
    list(task.train_batches(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"calibration": 7},
        {"validation": 0.2},
        {"batch_size": 5},
        {"flip": False},
        {"preprocess": Preprocess(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)},
    ],
)
def test_settings_change_the_fingerprint(source: DataSource, change: dict[str, Any]) -> None:
    changed = load_task(dataclasses.replace(source, **change))
    assert changed.fingerprint != load_task(source).fingerprint


def test_the_number_of_workers_changes_nothing(source: DataSource) -> None:
    one = load_task(dataclasses.replace(source, num_workers=1))
    assert one.fingerprint == load_task(source).fingerprint


@pytest.mark.parametrize("max_cached_bytes", [0, 10**9])
def test_images_and_labels_change_the_fingerprint(
    source: DataSource, noise: Callable[..., Any], max_cached_bytes: int
) -> None:
    def fingerprint() -> str:
        return load_task(source, max_cached_bytes=max_cached_bytes).fingerprint

    assert source.root is not None
    first = fingerprint()
    assert fingerprint() == first
    Image.fromarray(noise(16, 16, 3)).save(source.root / "test" / "cat" / "000.png")
    second = fingerprint()
    assert second != first
    (source.root / "train" / "cat" / "000.png").rename(source.root / "train" / "dog" / "zzz.png")
    assert fingerprint() not in (first, second)


def test_the_choice_of_calibration_images_is_recorded(source: DataSource) -> None:
    assert load_task(source).calibration_hash == load_task(source).calibration_hash
    other = load_task(dataclasses.replace(source, seed=1))
    assert other.calibration_hash != load_task(source).calibration_hash


@pytest.mark.parametrize("max_cached_bytes", [0, 10**9])
def test_copies_of_test_images_do_not_calibrate(
    source: DataSource, noise: Callable[..., Any], max_cached_bytes: int
) -> None:
    assert source.root is not None
    test = (source.root / "test" / "cat" / "000.png").read_bytes()
    for path in (source.root / "train" / "cat").iterdir():
        path.write_bytes(test)
    with pytest.warns(DataWarning, match="test images too and are left out"):
        task = load_task(source, max_cached_bytes=max_cached_bytes)
    assert task.calibration.labels is not None
    assert set(task.calibration.labels[list(task.calibration.indices)].tolist()) == {1}


def test_a_few_broken_images_are_told(
    source: DataSource, write_images: Callable[..., None]
) -> None:
    assert source.root is not None
    write_images(source.root / "train" / "cat", 150)
    broken = source.root / "train" / "cat" / "077.png"
    broken.write_bytes(b"not an image")
    with pytest.warns(DataWarning, match=r"1 of 158 images \(0\.63%\) cannot be read"):
        task = load_task(source)
    assert str(broken) in task.notes[0]
    assert task.train is not None
    assert task.validation is not None
    assert len(task.train) + len(task.validation) == 157
    labels = torch.cat([batch.targets for batch in task.train_batches(0)])
    assert set(labels.tolist()) == {0, 1}


def test_more_broken_images_are_refused(source: DataSource) -> None:
    assert source.root is not None
    (source.root / "test" / "dog" / "000.png").write_bytes(b"not an image")
    with pytest.raises(BadInput, match=r"1 of 10 images \(10\.00%\)"):
        load_task(source)


def test_gray_images_for_a_color_network_are_told(
    source: DataSource, noise: Callable[..., Any]
) -> None:
    assert source.root is not None
    for path in source.root.rglob("*.png"):
        Image.fromarray(noise(16, 16)).save(path)
    with pytest.warns(DataWarning, match="gray and are fed to the network as three"):
        task = load_task(source)
    inputs = task.example_input * torch.tensor(IMAGENET["std"])[:, None, None]
    pixels = inputs + torch.tensor(IMAGENET["mean"])[:, None, None]
    torch.testing.assert_close(pixels[:, 0], pixels[:, 2])
    gray = Preprocess(size=(16, 16), mean=(0.5,), std=(0.5,), channels="L")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_task(dataclasses.replace(source, preprocess=gray)).notes == ()


@pytest.mark.data
def test_a_trained_network_scores_as_published(data_folder: Path) -> None:
    root = Path(__file__).parent.parent.parent
    weights = data_folder / "weights" / "cifar10_resnet20.safetensors"
    reference = f"{root / 'recipes' / 'models' / 'cifar_resnet.py'}:resnet20"
    model = load_model(ModelSource(reference, weights))
    task = load_task(
        DataSource(
            kind="npz",
            train=data_folder / "cifar10_train4000.npz",
            test=data_folder / "cifar10_test1000.npz",
        )
    )
    check_model(model, task)
    score = task.score(model)
    assert score.value == pytest.approx(91.5)
    assert task.preprocess == Preprocess(size=(32, 32), **IMAGENET)  # type: ignore[arg-type]
    assert len(task.calibration) == 256
    counts = np.bincount(
        [int(task.calibration.labels[i]) for i in task.calibration.indices]  # type: ignore[index]
    )
    assert counts.min() >= 20
    state = load_file(weights)
    torch.testing.assert_close(model.state_dict()["conv1.weight"], state["conv1.weight"])
