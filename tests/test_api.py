"""What `import slimdown` gives, and what it costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import slimdown

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_public_names() -> None:
    assert slimdown.__all__ == [
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
    assert all(hasattr(slimdown, name) for name in slimdown.__all__)


def test_importing_slimdown_imports_no_runtime_and_no_extra() -> None:
    heavy = ["onnx", "onnxscript", "onnxruntime", "openvino", "timm", "torchvision", "matplotlib"]
    command = f"import sys, slimdown; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_readmes_python_is_python_that_knows_our_names() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, str(README), "exec")
        assert set(re.findall(r"\bsd\.(\w+)", block)) <= set(slimdown.__all__)
