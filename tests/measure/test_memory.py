"""Peak memory: of known allocations here, and of a known artifact in a fresh process."""

from __future__ import annotations

import mmap
import platform
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from slimdown.core import Artifact
from slimdown.errors import BadInput, OutOfResources
from slimdown.files import hash_files
from slimdown.measure import MeasureSettings, measure_peak_memory
from slimdown.measure.memory import peak_added_by

MIB = 1 << 20
WEIGHT_BYTES = 24 * MIB
INPUTS = torch.zeros(1, 1024)

pytestmark = pytest.mark.skipif(
    platform.system() not in ("Linux", "Darwin"), reason="this system does not tell its peak"
)


def allocate(num_bytes: int) -> None:
    """Touch fresh pages and give them back; malloc might hand out pages that it had kept."""
    with mmap.mmap(-1, num_bytes) as pages:
        for start in range(0, num_bytes, mmap.PAGESIZE):
            pages[start] = 1


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """One matrix product with a weight of 24 MiB, as an ONNX file."""
    weight = np.zeros((1024, WEIGHT_BYTES // 4096), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["output"])],
        "matmul",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1024])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return Artifact(
        target="onnxruntime",
        path=path,
        files=(path,),
        sha256=hash_files([path]),
        size_bytes=path.stat().st_size,
        precision="float32",
    )


def test_an_allocation_is_seen_even_when_it_is_gone() -> None:
    added = peak_added_by(lambda: allocate(64 * MIB))
    assert added is None or 60 * MIB < added < 80 * MIB


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux sets its mark back")
def test_an_earlier_peak_hides_nothing_on_linux() -> None:
    allocate(256 * MIB)
    added = peak_added_by(lambda: allocate(32 * MIB))
    assert added is not None
    assert 28 * MIB < added < 48 * MIB


def test_nothing_adds_next_to_nothing() -> None:
    added = peak_added_by(lambda: None)
    assert added is None or added < 4 * MIB


def test_an_artifact_needs_at_least_its_weights(artifact: Artifact) -> None:
    peak = measure_peak_memory("onnxruntime", artifact, INPUTS, MeasureSettings())
    assert peak is not None
    # The weights stand in memory, and while loading perhaps the file and a packed copy beside.
    assert WEIGHT_BYTES < peak < 5 * WEIGHT_BYTES


def test_an_artifact_that_does_not_load_is_an_error(artifact: Artifact) -> None:
    artifact.path.write_bytes(b"not a model")
    with pytest.raises(BadInput, match=r"measuring the peak memory of .*model\.onnx.* failed: \S"):
        measure_peak_memory("onnxruntime", artifact, INPUTS, MeasureSettings())


def test_a_slow_artifact_meets_the_time_limit(artifact: Artifact) -> None:
    with pytest.raises(OutOfResources, match=r"took longer than 0\.05 s"):
        measure_peak_memory("onnxruntime", artifact, INPUTS, MeasureSettings(), time_limit_s=0.05)


def test_a_killed_process_means_too_little_memory(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.CompletedProcess(args=[], returncode=-9, stdout=b"", stderr=b"")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(OutOfResources, match="killed by signal 9: free some memory"):
        measure_peak_memory("onnxruntime", artifact, INPUTS, MeasureSettings())
