"""ResNet-18 on ONNX Runtime: FP32, `quantize_dynamic`, and one `slimdown quantize` line.

    python benchmarks/tutorial_resnet18.py --out runs/tutorial-resnet18

Three files, timed in turns in one process, a batch of one on one thread:

- `float32`: torchvision's network, exported
- `dynamic`: `onnxruntime.quantization.quantize_dynamic` of that file, as ONNX Runtime's
  documentation shows it first; `dynamic-unsigned` with its `weight_type` QUInt8
- `static`: `quantize_static` after its preprocessing, which the documentation advises for
  convolutions: QDQ, weights per channel
- `slimdown`: what the printed command left in its folder

Weights and images are random: that is enough for times and sizes, which do not depend on them, and
says nothing of accuracy. `ratio` is the median over that of float32 in the same turns. The table
goes to stdout and, as tutorial.csv, into the folder.
"""

from __future__ import annotations

import argparse
import csv
import logging
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18

from slimdown.measure import MeasureSettings, measure_latencies

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from quantize_peers import open_in_ort, quantize_dynamically, quantize_with_ort  # noqa: E402

NUM_IMAGES = 32
SIZE = 224
COLUMNS = ("method", "ms", "p90_ms", "ratio", "bytes", "problem")


def prepare(folder: Path) -> None:
    """Write random weights and random images without labels, the same every time."""
    torch.manual_seed(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    save_file(resnet18().state_dict(), folder / "resnet18.safetensors")
    generator = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:02d}.png")


def run_slimdown(folder: Path) -> Path:
    """Run the command; the folder of what it deployed."""
    command = (
        f"slimdown quantize torchvision:resnet18 --weights {folder}/resnet18.safetensors "
        f"--data {folder}/images --target onnxruntime --out {folder}/run"
    )
    print(f"$ {command}", flush=True)
    arguments = shlex.split(command)[1:]
    subprocess.run([sys.executable, "-m", "slimdown", *arguments], check=True)
    return folder / "run" / "deploy" / "onnxruntime"


def peers(plain: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The other methods by name, each with what writes its file."""
    images = torch.randn(NUM_IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    yield "dynamic", lambda path: quantize_dynamically(plain, path)
    yield "dynamic-unsigned", lambda path: quantize_dynamically(plain, path, signed=False)
    yield "static", lambda path: quantize_with_ort(plain, path, images)


def compare(folder: Path, num_samples: int) -> list[dict[str, Any]]:
    """One row a method; those whose file cannot be made or run tell why."""
    deployed = run_slimdown(folder)
    files = {"float32": deployed / "00-original" / "model.onnx"}
    rows: list[dict[str, Any]] = []
    example = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    for method, write in peers(files["float32"]):
        path = folder / f"{method}.onnx"
        try:
            write(path)
            open_in_ort(path, 1)(example)
            files[method] = path
        except Exception as error:  # whatever a peer raises
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            rows.append({"method": method, "problem": problem})
    files["slimdown"] = deployed / "01-quantize-onnxruntime" / "model.onnx"
    settings = MeasureSettings(num_samples=num_samples)
    predicts = [open_in_ort(path, settings.num_threads) for path in files.values()]
    latencies = measure_latencies(predicts, example, settings, runtime="onnxruntime")
    for (method, path), latency in zip(files.items(), latencies, strict=True):
        rows.append(
            {
                "method": method,
                "ms": f"{latency.median_ms:.2f}",
                "p90_ms": f"{latency.p90_ms:.2f}",
                "ratio": f"{latency.median_ms / latencies[0].median_ms:.3f}",
                "bytes": path.stat().st_size,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--num-samples", type=int, default=100)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    prepare(options.out)
    rows = compare(options.out, options.num_samples)
    with (options.out / "tutorial.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(f"{name}={row[name]}" for name in COLUMNS if name in row), flush=True)


if __name__ == "__main__":
    main()
