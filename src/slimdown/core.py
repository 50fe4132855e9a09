"""The contracts that the rooms of slimdown share: nouns and protocols, no behavior beyond checks.

    load ──► capture ──► prune ──► distill ──► quantize ──► export ──► measure ──► report

A `Task` knows data, loss and score. A `Stage` turns a module into a smaller or faster one. A
`Target` turns a module into an `Artifact` and loads it back. A `Report` is what a run found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slimdown.errors import RecipeError

Json: TypeAlias = dict[str, Any]
"""What `json.dumps` takes: dictionaries with string keys, lists and plain values."""

Predict: TypeAlias = Callable[[Tensor], Any]
"""(N, C, H, W) float32 images, preprocessed -> outputs. A module and a loaded artifact both fit."""


# ---------------------------------------------------------------------------------------- task


class Batch(NamedTuple):
    """A training batch: inputs (N, C, H, W) float32, and targets (None: no labels)."""

    inputs: Tensor
    targets: Any = None


class Batches(Protocol):
    """Batches with a known number of them, such as a list or a `DataLoader`."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a predictor is: points from 0 to 100, higher is better.

    `outcomes` (N,) holds each sample's own outcome in [0, 1] and `predictions` (N,) what was
    predicted; with them two scores on the same samples can be compared sample by sample.
    """

    metric: str
    value: float
    num_samples: int
    outcomes: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    predictions: npt.NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_outcomes(
        cls, metric: str, outcomes: Tensor, *, predictions: Tensor | None = None
    ) -> Score:
        """Average (N,) outcomes in [0, 1], such as "was the top class right", into points."""
        values = outcomes.detach().cpu().double().numpy()
        if values.ndim != 1 or values.size == 0:
            raise ValueError(
                f"a score needs one outcome a sample, (N,) with N >= 1, got {values.shape}"
            )
        return cls(
            metric=metric,
            value=100.0 * float(values.mean()),
            num_samples=int(values.size),
            outcomes=values,
            predictions=None if predictions is None else predictions.detach().cpu().numpy(),
        )


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the network's input; saved with every artifact.

    An RGB (or, with `channels="L"`, gray) image is resized so that its shorter side is
    `resize` (None: no resizing), center-cropped to `size` (height, width), scaled to [0, 1] and
    normalized as `(x - mean) / std` with one value a channel, then laid out as (C, H, W).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    channels: Literal["RGB", "BGR", "L"] = "RGB"

    def __post_init__(self) -> None:
        wanted = 1 if self.channels == "L" else 3
        if len(self.mean) != wanted or len(self.std) != wanted:
            raise RecipeError(
                f"preprocess.mean and preprocess.std need {wanted} values for channels="
                f"{self.channels!r}, got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise RecipeError(f"preprocess.std must be positive, got {list(self.std)}")
        if min(self.size) < 1:
            raise RecipeError(f"preprocess.size must be positive, got {list(self.size)}")


@runtime_checkable
class Task(Protocol):
    """Data, loss and score: the only thing that knows what the network is for.

    A task may also have `preprocess: Preprocess`, `labels: Sequence[str]` and `fingerprint: str`
    (changes whenever its data do; without one, the calibration images, the first training batches
    and the original's score stand for it);
    `validate(predict) -> Score` on held-out training data, shown while training (or None);
    `flip: bool`, whether images may be mirrored in training (true without it), and
    `augments: bool`, whether `train_batches` augments them already (false without it).
    """

    @property
    def example_input(self) -> Tensor:
        """One preprocessed input, (1, C, H, W) float32."""
        ...

    def train_batches(self, epoch: int) -> Batches:
        """One epoch of `Batch`es; equal epochs under an equal torch seed give equal batches."""
        ...

    def calibration_batches(self) -> Iterable[Tensor]:
        """Preprocessed inputs, (N, C, H, W), never from the images that `score` judges on."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The supervised loss, a scalar with a gradient; called only where targets are known."""
        ...

    def score(self, predict: Predict) -> Score | None:
        """Judge a module or a deployed artifact on the test images, in their fixed order.

        None, for every one of them, where nothing is known to judge by.
        """
        ...


# -------------------------------------------------------------------------------------- clock


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operator at given sizes, for one sample: what a `Clock` times alone.

    The `shapes` of its operands, activations first, and the `settings` that torch's operator of
    that name has, each as one number an axis:

    - "convolution": input (1, G·C, …) and weight (G·K, C, …), with the groups in the shapes
    - "transposed_convolution": input (1, G·C, …), weight (G·C, K, …) and bias (G·K,)
    - "linear": input (…, C) and weight (K, C)
    - "matmul": (…, M, K) and (…, K, N), both of them activations
    - "attention": query (…, L, D), key (…, S, D) and value (…, S, E)
    """

    kind: Literal["convolution", "transposed_convolution", "linear", "matmul", "attention"]
    shapes: tuple[tuple[int, ...], ...]
    settings: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        """Equal operations read alike: "linear 1x197x192 576x192"."""
        shapes = " ".join("x".join(map(str, shape)) for shape in self.shapes)
        settings = "".join(f" {name}={','.join(map(str, v))}" for name, v in self.settings)
        return f"{self.kind} {shapes}{settings}"


class Clock(Protocol):
    """Times operators and networks on one runtime, with a batch of one on one thread."""

    @property
    def runtime(self) -> str:
        """Name and version, such as "onnxruntime 1.32.0"."""
        ...

    @property
    def round_to(self) -> int:
        """Channels in whole multiples of this are fast on this runtime."""
        ...

    def time_operations(self, operations: Sequence[Operation]) -> list[float]:
        """Milliseconds of each operator alone, measured once a machine and then remembered."""
        ...

    def deploy(self, model: nn.Module, example_input: Tensor) -> Predict:
        """The module as the runtime runs it. Raises BadInput for one that cannot be exported."""
        ...

    def time_networks(self, predicts: Sequence[Predict], example_input: Tensor) -> list[float]:
        """Milliseconds of a call of each of several deployed networks, measured in turns."""
        ...


# --------------------------------------------------------------------------------------- stage


class Progress(NamedTuple):
    """How far a stage has come: `done` of `total` steps of `label`, with its current figures."""

    label: str
    done: int
    total: int
    figures: Mapping[str, float] = {}


def _show_nothing(progress: Progress) -> None:
    pass


def _keep_nothing(state: dict[str, Any]) -> None:
    pass


def _find_nothing() -> dict[str, Any] | None:
    return None


def _go_on() -> bool:
    return False


def _lend_no_clock(target: str) -> Clock:
    raise RecipeError(
        f"a latency on {target!r} cannot be measured without a clock: run this stage as part of a "
        "recipe, or lend it one: stage(model, task, Context(find_clock=slimdown.clock_for))"
    )


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a run lends a stage beside the model and the task; every field has a quiet default."""

    original: nn.Module | None = None
    """The model that the user brought, in eval mode: the default teacher."""
    seed: int = 0
    show: Callable[[Progress], None] = _show_nothing
    save_checkpoint: Callable[[dict[str, Any]], None] = _keep_nothing
    """Keep a state of tensors and plain values that `torch.load(weights_only=True)` reads back."""
    load_checkpoint: Callable[[], dict[str, Any] | None] = _find_nothing
    stop_requested: Callable[[], bool] = _go_on
    """Asked at clean points; when true, the stage saves its checkpoint and raises Interrupted."""
    find_clock: Callable[[str], Clock] = _lend_no_clock
    """The clock of a target, by the target's name, for a stage that keeps to a latency."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A stage's new module, what rebuilds its structure, and what the report tells of it.

    `Stage.rebuild(stage_input, structure, example_input)` followed by `load_state_dict` of
    `model.state_dict()` gives `model` again: that is how a run is saved, without pickles.
    """

    model: nn.Module
    structure: Json = field(default_factory=dict)
    facts: Json = field(default_factory=dict)


class Stage(Protocol):
    """One step of a recipe: a frozen dataclass that is configuration, step and printed record."""

    @property
    def kind(self) -> str:
        """The name in recipes: "prune", "distill", "quantize"."""
        ...

    def for_target(self, target: Target) -> Stage:
        """This stage with what was left to the target filled in; itself where nothing was."""
        ...

    def __call__(self, model: nn.Module, task: Task, context: Context = Context()) -> StageResult:
        """Return a new module; `model` is left as it was."""
        ...

    def rebuild(self, model: nn.Module, structure: Json, example_input: Tensor) -> nn.Module:
        """Give a copy of `model` the structure that this stage once gave it, weights aside."""
        ...


# ------------------------------------------------------------------------------------- targets

Verified: TypeAlias = Literal["executed", "simulated", "compiled", "exported"]
"""How far an artifact was checked on this machine."""


@dataclass(frozen=True, kw_only=True)
class LayerAudit:
    """One layer of a quantized artifact, as its runtime really runs it."""

    name: str
    """The layer's path in the user's model; the node's name in the file where none is known."""
    operator: Literal["conv", "matmul"]
    precision: str
    """"int8", "float32", …; "unknown" where the runtime's graph does not name the layer."""
    reason: str | None
    """Why it does not run in INT8; None where it does."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A deployable file (with its companions) of one target.

    `path` is the file that the runtime opens, `files` all that belong together, `sha256` the hash
    of their contents in that order, `size_bytes` their sum. `precision` is the lowest in use.
    `kernels` counts the compute kernels by precision as the runtime really runs them, where known.
    `audit` tells it of each convolution and matrix product of an INT8 artifact; empty of others.
    """

    target: str
    path: Path
    files: tuple[Path, ...]
    sha256: str
    size_bytes: int
    precision: Literal["float32", "float16", "bfloat16", "int8"]
    verified: Verified = "exported"
    kernels: dict[str, int] | None = None
    audit: tuple[LayerAudit, ...] = ()

    def relative_to(self, folder: Path) -> Artifact:
        """This artifact with its paths told from `folder`, so that a run can be moved."""
        files = tuple(file.relative_to(folder) for file in self.files)
        return replace(self, path=self.path.relative_to(folder), files=files)

    def under(self, folder: Path) -> Artifact:
        """This artifact with its relative paths found under `folder`."""
        return replace(
            self, path=folder / self.path, files=tuple(folder / file for file in self.files)
        )


class Target(Protocol):
    """A runtime: exports a module for it, and loads the artifact back where the runtime exists."""

    @property
    def name(self) -> str: ...

    @property
    def profile(self) -> str:
        """The quantization placement profile that is fastest on this runtime."""
        ...

    def check(self) -> str:
        """Import the runtime and return its version.

        Raises MissingExtra with the line that installs it.
        """
        ...

    def export(self, model: nn.Module, task: Task, folder: Path) -> Artifact:
        """Write the artifact, its `preprocess.json` and `labels.json` into `folder`."""
        ...

    def load(self, artifact: Artifact, *, num_threads: int = 1) -> Predict:
        """(N, C, H, W) float32 tensor -> outputs, run by the runtime on `num_threads` threads."""
        ...


# ----------------------------------------------------------------------------------- findings


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A score with its 95 % interval, and its paired change against the user's own model."""

    metric: str
    value: float
    num_samples: int
    low: float | None = None
    """None, as `high`, for a score that is no mean over samples, such as a mAP."""
    high: float | None = None
    change: float | None = None
    """Points against the model that the user brought, on the same samples; negative is worse."""
    change_low: float | None = None
    change_high: float | None = None
    agreement: float | None = None
    """Percent of samples predicted as the torch module of the same step predicts them."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Wall-clock time of one call, with its conditions.

    Calls come in turns of ten, after a few that are not counted: see `measure.latency`.
    """

    median_ms: float
    p90_ms: float
    samples_ms: tuple[float, ...]
    batch_size: int
    num_threads: int
    num_warmup: int
    runtime: str
    """Name and version, such as "onnxruntime 1.32.0"."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one step's model in one runtime; None is "not measured"."""

    step: str
    runtime: str
    """"torch", or the name of a target."""
    accuracy: Accuracy | None = None
    latency: Latency | None = None
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    artifact: Artifact | None = None
    """Its paths are told from the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a run: "00-original", "01-prune", "03-quantize-onnxruntime-x86", …"""

    name: str
    kind: str
    parent: str | None
    """The step whose model this one started from."""
    settings: Json
    facts: Json
    num_parameters: int
    macs: int
    seconds: float | None
    """None where it was stopped and resumed, and for the original."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the result must keep to, against the model that the user brought, per target."""

    max_drop: float | None = None
    """Points of the task's score."""
    min_speedup: float | None = None
    """Median latency of the original over that of the result, in the same runtime."""
    max_size: int | None = None
    """Bytes of the deployed artifact."""

    def __post_init__(self) -> None:
        # "not >=" rather than "<": NaN is refused, too
        if self.max_drop is not None and not self.max_drop >= 0:
            raise RecipeError(f"budget.max_drop is in points and must be >= 0, got {self.max_drop}")
        if self.min_speedup is not None and not self.min_speedup > 0:
            raise RecipeError(
                f"budget.min_speedup is a ratio and must be > 0, got {self.min_speedup}"
            )
        if self.max_size is not None and not self.max_size > 0:
            raise RecipeError(f"budget.max_size is in bytes and must be > 0, got {self.max_size}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One line of the budget, judged on one target's deployed artifact."""

    target: str
    limit: Literal["max_drop", "min_speedup", "max_size"]
    allowed: float
    found: float | None
    """None where it was not measured, which counts as not met."""
    met: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a run found; `results.json` is this, and every page is drawn from it alone."""

    name: str
    recipe: Json
    environment: Json
    steps: tuple[Step, ...]
    measurements: tuple[Measurement, ...]
    verdicts: tuple[Verdict, ...] = ()
    schema_version: int = 1

    @property
    def budget_met(self) -> bool:
        return all(verdict.met for verdict in self.verdicts)

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def final_step(self, target: str) -> Step:
        """The last step that was deployed on `target`: what the user takes away."""
        deployed = [m.step for m in self.measurements if m.runtime == target]
        return self.step(deployed[-1])

    def measurement(self, step: str, runtime: str) -> Measurement | None:
        found = (m for m in self.measurements if m.step == step and m.runtime == runtime)
        return next(found, None)


def logits_of(outputs: Any) -> Any:
    """What a classifier says: its output, or the field `logits` of one that holds several."""
    return getattr(outputs, "logits", outputs)


def batch_device(model: nn.Module) -> torch.device:
    """The device that a model's inputs must be on: that of its first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
