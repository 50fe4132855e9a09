"""Time and memory of calibration: slimdown's beside ONNX Runtime's min-max, whatever the images.

    python benchmarks/quantize_calibration.py --out runs/quantize-calibration.csv

A torchvision network with random weights and random images of 224 pixels, which take the time and
the room of real ones. Each case is a process of its own with one thread: `wall_s` and `cpu_s` are
those of quantizing (for slimdown with the export to ONNX, for ONNX Runtime with its preprocessing),
`peak_mb` is the most memory that the process had, `before_mb` what it had before.

- `forward`: the float network run on the images, batch by batch, and nothing else
- `slimdown-fast`: `Quantize(effort="fast")`, exported
- `ort-minmax`: `quantize_static` of the exported network, unsigned activations, per channel
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent)]

METHODS = ("forward", "slimdown-fast", "ort-minmax")
COLUMNS = ("net", "method", "images", "wall_s", "cpu_s", "before_mb", "peak_mb", "problem")


class Batches:
    """Random images, made when they are read: no more than one batch is in memory."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.count, self.size):
            yield torch.randn(min(self.size, self.count - start), 3, 224, 224, generator=generator)

    def split(self, size: int) -> Batches:
        return Batches(self.count, size)


def work_of(method: str, net: str, num_images: int, folder: Path) -> Callable[[], object]:
    """What is to be timed; what it needs beforehand is made here."""
    import torchvision

    from slimdown import Quantize
    from slimdown.targets import find_target

    torch.manual_seed(0)
    model = getattr(torchvision.models, net)(weights=None).eval()
    images, target = Batches(num_images, 16), find_target("onnxruntime")
    task: Any = SimpleNamespace(
        example_input=torch.randn(1, 3, 224, 224), calibration_batches=lambda: images
    )
    if method == "forward":
        return lambda: [model(batch).sum().item() for batch in images]
    if method == "slimdown-fast":
        stage = Quantize(num_images=num_images, effort="fast").for_target(target)
        return lambda: target.export(stage(model, task).model, task, folder / "ours")
    from quantize_peers import quantize_with_ort

    plain = target.export(model, task, folder / "plain").path
    peer: Any = images
    return lambda: quantize_with_ort(plain, folder / "model.onnx", peer)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(method: str, net: str, num_images: int) -> dict[str, Any]:
    """Time one case in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        work = work_of(method, net, num_images, Path(folder))
        before, wall, cpu = peak_mb(), time.perf_counter(), time.process_time()
        work()
        return {
            "wall_s": f"{time.perf_counter() - wall:.1f}",
            "cpu_s": f"{time.process_time() - cpu:.1f}",
            "before_mb": f"{before:.0f}",
            "peak_mb": f"{peak_mb():.0f}",
        }


def measure_apart(method: str, net: str, num_images: int) -> dict[str, Any]:
    """Time one case in a process of its own."""
    command = [sys.executable, __file__, "--case", method, net, str(num_images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        ending = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"problem": ending[0][:200]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a CSV file")
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--images", nargs="+", type=int, default=[32, 300, 1024])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.case:
        method, net, num_images = options.case
        print(json.dumps(measure(method, net, int(num_images))))
        return
    if options.out is None:
        parser.error("--out names the CSV file to write")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for count in options.images:
            for method in options.methods:
                row = {"net": options.net, "method": method, "images": count}
                row |= measure_apart(method, options.net, count)
                writer.writerow(row)
                file.flush()
                print(*(f"{name}={row[name]}" for name in COLUMNS if name in row), flush=True)


if __name__ == "__main__":
    main()
