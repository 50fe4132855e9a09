from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from slimdown.core import Preprocess
from slimdown.errors import RecipeError
from slimdown.load import DataSource, ModelSource


def read(kind: type[Any], values: dict[str, Any]) -> Any:
    return TypeAdapter(kind).validate_json(json.dumps(values))


def test_reads_a_data_source() -> None:
    source = read(
        DataSource,
        {
            "kind": "folder",
            "root": "images",
            "preprocess": {"size": [8, 8], "mean": [0.5], "std": [0.5], "channels": "L"},
        },
    )
    assert source.root == Path("images")
    assert source.preprocess == Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,), channels="L")


@pytest.mark.parametrize("kind", [DataSource, ModelSource])
def test_writes_what_it_reads(kind: type[Any]) -> None:
    source = (
        DataSource(kind="npz", test=Path("a.npz"), labels=("a", "b"))
        if kind is DataSource
        else ModelSource("torchvision:resnet18", Path("a.pt"), {"num_classes": 3})
    )
    assert read(kind, TypeAdapter(kind).dump_python(source, mode="json")) == source


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "digits", "batchsize": 3},
        {"kind": "digits", "batch_size": "3"},
        {"kind": "digits", "flip": "yes"},
        {"kind": "photos"},
        {"kind": "digits", "preprocess": {"size": [8, 8], "mean": [0], "std": [1], "crop": 3}},
        {"kind": "digits", "validation": "0.1"},
    ],
)
def test_refuses_unknown_keys_and_wrong_types(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read(DataSource, values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"calibration": 0}, "calibration .* at least 1, got 0"),
        ({"validation": 0.8}, "validation .* got 0.8"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_workers": 0}, "num_workers"),
        ({"labels": ("a", "b")}, "labels names the classes of an npz"),
        ({"root": Path("x")}, "needs no path, got root"),
        ({"kind": "folder"}, "needs root, or train and test, or test, or train, got none"),
        ({"kind": "npz", "train": Path("x")}, "got train"),
        ({"kind": "torchvision", "root": Path("x")}, "needs root and name, got root"),
    ],
)
def test_refuses_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DataSource(**{"kind": "digits", **settings})


def test_refuses_two_kinds_of_weights() -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        ModelSource("torchvision:resnet18", Path("a.pt"), {"pretrained": True})
