"""How much memory a deployed artifact needs while it runs, beyond its runtime's own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from slimdown.core import Artifact
from slimdown.errors import BadInput, OutOfResources
from slimdown.measure.latency import repeat_to_batch
from slimdown.measure.settings import MeasureSettings

NUM_CALLS = 3
TIME_LIMIT_S = 600.0


def measure_peak_memory(
    target_name: str,
    artifact: Artifact,
    inputs: Tensor,
    settings: MeasureSettings,
    *,
    time_limit_s: float = TIME_LIMIT_S,
) -> int | None:
    """Peak resident bytes that loading and running `artifact` adds to its runtime, or None.

    A fresh process loads the artifact and runs it three times on `inputs` (N, C, H, W), repeated
    to the batch size. Counted is the highest resident set of that process from then on, weights
    mapped from the file included, less its resident set just before, when Python, torch and the
    runtime are in memory and no model is. None: the system does not tell, see `peak_added_by`.
    Raises OutOfResources where the process is killed or takes too long, BadInput where it fails.
    """
    request = _Request(target_name, artifact, settings)
    command = [sys.executable, "-c", f"import {__name__} as memory; memory.answer_request()"]
    shown = f"measuring the peak memory of {artifact.path} on {target_name}"
    try:
        done = subprocess.run(
            [*command, TypeAdapter(_Request).dump_json(request).decode()],
            input=_to_npy(inputs),
            capture_output=True,
            timeout=time_limit_s,
            start_new_session=True,  # Ctrl-C is for the run, which stops at a clean point
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OutOfResources(
            f"{shown} took longer than {time_limit_s:g} s: set measure.memory to false"
        ) from error
    if done.returncode < 0:
        raise OutOfResources(
            f"{shown} was killed by signal {-done.returncode}: free some memory, "
            "or set measure.memory to false"
        )
    if done.returncode > 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BadInput(f"{shown} failed: {''.join(reason)}")
    answer: int | None = json.loads(done.stdout.decode().splitlines()[-1])
    return answer


def peak_added_by(work: Callable[[], object]) -> int | None:
    """How many bytes the peak of this process's resident set during `work` lies above now.

    The kernel's high-water mark is set back first where it lets us (Linux). Where it does not
    (macOS), None if the process once stood higher than during `work`. None on other systems.
    """
    if platform.system() not in ("Linux", "Darwin"):
        return None
    _reset_peak()
    before, old_peak = _resident_bytes(), _peak_bytes()
    work()
    peak = _peak_bytes()
    was_hidden = peak <= old_peak and old_peak > before
    return None if was_hidden else max(0, peak - before)


class _Request(NamedTuple):
    target: str
    artifact: Artifact
    settings: MeasureSettings


def answer_request() -> None:
    """In the fresh process: take a request and inputs, and print the peak as JSON."""
    from slimdown.targets import find_target

    request = TypeAdapter(_Request).validate_json(sys.argv[1])
    inputs = torch.from_numpy(np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False))
    batch = repeat_to_batch(inputs, request.settings.batch_size)
    target = find_target(request.target)
    target.check()  # imports the runtime
    torch.set_num_threads(request.settings.num_threads)

    def load_and_run() -> None:
        predict = target.load(request.artifact, num_threads=request.settings.num_threads)
        for _ in range(NUM_CALLS):
            predict(batch)

    print(json.dumps(peak_added_by(load_and_run)))


def _reset_peak() -> None:
    # "5" sets VmHWM back to the present resident set: proc(5), /proc/pid/clear_refs.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident_bytes() -> int:
    if platform.system() == "Linux":
        return _read_status("VmRSS")
    shown = subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])
    return int(shown) * 1024


def _peak_bytes() -> int:
    # Not ru_maxrss on Linux: a process starts with that of the one it was forked from.
    if platform.system() == "Linux":
        return _read_status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _read_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024  # told in kB, which are KiB
    raise AssertionError(f"/proc/self/status has no {key}")


def _to_npy(inputs: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, inputs.detach().cpu().numpy())
    return buffer.getvalue()
