"""Where the model and the data come from, as a recipe writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from slimdown.core import Json, Preprocess
from slimdown.errors import RecipeError
from slimdown.load.reference import parse_reference

# As strict as the recipe that holds them: read from JSON, where a list may become a tuple.
_STRICT = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)


@dataclass(frozen=True)
class ModelSource:
    """Where the trained model comes from."""

    reference: str
    """A model of a library: `torchvision:NAME`, `timm:NAME`, `ultralytics:NAME.yaml` (a
    configuration that comes with it), or `transformers:NAME`, where NAME is OWNER/NAME on the hub,
    the folder of a checkpoint (safetensors only), or a model type such as `vit`, which is made with
    random weights. Or a function or class of the user's that makes the model:
    `package.module:factory` or `path/to/file.py:factory`. These two EXECUTE that module or file.
    Or a network in float32 with one input, an image: `path/to/model.onnx`."""
    weights: Path | None = None
    """A .safetensors file, or a torch file (.pt, .pth, …) that holds tensors only."""
    options: Json = field(default_factory=dict)
    """Arguments for what makes the model, such as `num_classes` (`num_labels` of transformers, `nc`
    of ultralytics). `pretrained: true` asks torchvision or timm for their own weights, which they
    fetch unless they have them."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    def __post_init__(self) -> None:
        _make_path_(self, "weights")
        parse_reference(self.reference)
        if self.weights is not None and self.options.get("pretrained"):
            raise RecipeError(
                "model.weights and model.options.pretrained exclude each other: "
                "take the file's weights or the official ones"
            )


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Images with class labels, and how they are fed to the network."""

    kind: Literal["digits", "folder", "npz", "torchvision"]
    """digits: the embedded handwritten digits, which need no path. folder: a folder of images a
    class. npz: archives of X, uint8 (N, H, W, 3) or (N, H, W), and Y, integers (N,). torchvision:
    a data set of torchvision.datasets that is on disk."""
    root: Path | None = None
    """The folder with train/<class>/… and test/<class>/… (or val/…), with train.npz and test.npz,
    or the one that torchvision was given."""
    train: Path | None = None
    """Instead of `root`: the training folder or archive; its images need no labels. Of a folder
    without `test`, labels are not read, and nothing is judged."""
    test: Path | None = None
    """Instead of `root`: the folder or archive of labeled images to judge on."""
    name: str | None = None
    """The data set's name in torchvision, such as FashionMNIST."""
    labels: tuple[str, ...] | None = None
    """Names of the classes of an npz, in the order of Y; counted from its labels where absent."""
    preprocess: Preprocess | None = None
    """None: images of one size up to 256 as they are, others resized to 256 and cropped to 224;
    normalized with ImageNet's mean and std, gray arrays with 0.5 and 0.5. Give what the model was
    trained with."""
    batch_size: int = 64
    """Images a training step."""
    flip: bool | None = None
    """Whether training may mirror the images. None: yes, but not characters and signs."""
    calibration: int = 256
    """How many training images calibrate the quantization."""
    calibration_from_test: bool = False
    """Without training images: take the calibration images out of the test images for good."""
    validation: float = 0.1
    """The share of the training images that is held out and judged while training."""
    seed: int = 0
    """Seeds the choice of calibration and validation images."""
    num_workers: int = 4
    """Threads that decode images; the result does not depend on it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    def __post_init__(self) -> None:
        for name in ("root", "train", "test"):
            _make_path_(self, name)
        self._check_places()
        if self.batch_size < 1:
            raise RecipeError(f"data.batch_size must be at least 1, got {self.batch_size}")
        if self.calibration < 1:
            raise RecipeError(
                f"data.calibration is a number of images and must be at least 1, "
                f"got {self.calibration}"
            )
        if not 0 <= self.validation <= 0.5:
            raise RecipeError(
                "data.validation is the share of training images that is held out and must be in "
                f"[0, 0.5], got {self.validation}"
            )
        if self.seed < 0:
            raise RecipeError(f"data.seed must be at least 0, got {self.seed}")
        if self.num_workers < 1:
            raise RecipeError(f"data.num_workers must be at least 1, got {self.num_workers}")
        if self.labels is not None and self.kind != "npz":
            raise RecipeError(f"data.labels names the classes of an npz, not of a {self.kind}")

    @property
    def is_unlabeled(self) -> bool:
        """Whether there are only images without labels, so that nothing is judged."""
        return self.train is not None and self.test is None

    def _check_places(self) -> None:
        """Each kind takes the paths that it reads, and no others."""
        in_files = [("root",), ("train", "test"), ("test",)]
        unlabeled = ("train",)
        allowed: dict[str, list[tuple[str, ...]]] = {
            "digits": [()],
            "folder": [*in_files, unlabeled],
            "npz": in_files,
            "torchvision": [("root", "name")],
        }
        names = ("root", "train", "test", "name")
        given = tuple(name for name in names if getattr(self, name) is not None)
        if given not in allowed[self.kind]:
            ways = ", or ".join(" and ".join(way) or "no path" for way in allowed[self.kind])
            raise RecipeError(
                f"data of the kind {self.kind} needs {ways}, got {' and '.join(given) or 'none'}"
            )


def _make_path_(source: ModelSource | DataSource, name: str) -> None:
    """Take text for a path, as Python's own functions do."""
    given = getattr(source, name)
    if given is not None:
        object.__setattr__(source, name, Path(given))
