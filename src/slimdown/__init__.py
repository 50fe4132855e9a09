"""Make a trained vision network small and fast, and prove it on the runtime where it will run.

load ──► capture ──► prune ──► distill ──► quantize ──► export ──► measure ──► report
"""

from slimdown.bench import bench_run
from slimdown.core import (
    Artifact,
    Batch,
    Budget,
    Context,
    Measurement,
    Preprocess,
    Progress,
    Report,
    Score,
    Stage,
    StageResult,
    Target,
    Task,
)
from slimdown.distill import Distill
from slimdown.errors import SlimdownError
from slimdown.load import ClassificationTask, DataSource, ModelSource, load_model, load_task
from slimdown.measure import MeasureSettings, clock_for
from slimdown.pipeline import compress, run_recipe
from slimdown.prune import Prune, find_groups
from slimdown.prune.verification import Verification, verify
from slimdown.quantize import Quantize
from slimdown.recipe import Recipe, iterate, load_recipe
from slimdown.report import read_results, write_report
from slimdown.saved import load, save
from slimdown.sparsify import Sparsify
from slimdown.version import __version__

__all__ = [
    "Artifact",
    "Batch",
    "Budget",
    "ClassificationTask",
    "Context",
    "DataSource",
    "Distill",
    "MeasureSettings",
    "Measurement",
    "ModelSource",
    "Preprocess",
    "Progress",
    "Prune",
    "Quantize",
    "Recipe",
    "Report",
    "Score",
    "SlimdownError",
    "Sparsify",
    "Stage",
    "StageResult",
    "Target",
    "Task",
    "Verification",
    "__version__",
    "bench_run",
    "clock_for",
    "compress",
    "find_groups",
    "iterate",
    "load",
    "load_model",
    "load_recipe",
    "load_task",
    "read_results",
    "run_recipe",
    "save",
    "verify",
    "write_report",
]
