"""The recipe that `slimdown quantize` stands for: one model, one stage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from slimdown.core import Json
from slimdown.dry_run import FETCHING_OPTIONS, MADE_TO_COUNT
from slimdown.load import ModelSource
from slimdown.load.folder import find_layout
from slimdown.load.reference import parse_reference
from slimdown.quantize import Quantize
from slimdown.recipe.document import Document, Keys

STAGE: Keys = ("stages", 0, "quantize")


def choices(names: Iterable[str]) -> str:
    """`mse, minmax or entropy.`"""
    *some, last = names
    return f"{', '.join(some)} or {last}."


def quantize_document(
    model: str,
    data: str,
    *,
    weights: Path | None = None,
    targets: Sequence[str] | None = None,
    settings: Json,
) -> Document:
    """Write a recipe of what the options say, each value placed at its option.

    `settings` are of `Quantize`; None is what was not given, and keeps its default.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    source: Json = {"reference": model}
    if weights is not None:
        source["weights"] = str(weights)
    images = describe_data(data)
    if "num_images" in given:
        images["calibration"] = given["num_images"]  # as many as are looked at are set aside
    values: Json = {
        "name": _name(model, given.get("precision", Quantize.precision)),
        "model": source,
        "data": images,
        "stages": [{"quantize": given}],
    }
    if targets:
        values["targets"] = list(targets)
    places: dict[Keys, str] = {
        ("model",): "MODEL",
        ("model", "weights"): "--weights",
        ("data",): "--data",
        ("data", "calibration"): "--num-images",
        ("targets",): "--target",
        **{(*STAGE, name): f"--{name.replace('_', '-')}" for name in given},
    }
    return Document(name="slimdown quantize", values=values, places=places)


def describe_data(data: str) -> Json:
    """What `--data` names, as the recipe's `data`: a folder, an archive, or the digits.

    Where there are only test images, some of them calibrate and the others judge; where no image
    has a label, all calibrate and nothing is judged.
    """
    path = Path(data)
    if data == "digits" and not path.exists():
        return {"kind": "digits"}
    both = {"calibration_from_test": True}
    if path.suffix == ".npz":
        return {"kind": "npz", "test": data, **both}
    if (path / "test.npz").is_file():
        return {"kind": "npz", "root": data, **both}
    layout = find_layout(path)
    return {"kind": "folder", layout: data, **({} if layout == "train" else both)}


def has_random_weights(source: ModelSource) -> bool:
    """Whether a library makes this model untrained, which is seldom meant."""
    origin = parse_reference(source.reference).origin
    is_made = origin in MADE_TO_COUNT and origin != "onnx"
    return is_made and source.weights is None and not FETCHING_OPTIONS & source.options.keys()


def _name(model: str, precision: str) -> str:
    """`resnet18-int8` of torchvision:resnet18, or of nets/resnet18.onnx: also the run's folder."""
    plain = Path(model).stem if model.endswith(".onnx") else model.rpartition(":")[2]
    own = re.sub(r"[^\w.+-]+", "-", plain).strip("-.+")
    return f"{own or 'model'}-{precision}"
