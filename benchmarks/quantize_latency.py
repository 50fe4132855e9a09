"""INT8 files of slimdown and of its peers, timed in turns on the runtime that each is made for.

    python benchmarks/quantize_latency.py --out runs/quantize-latency.csv [--nets resnet50 ...]

Networks with random weights (what is quantized where does not depend on them, nor do times),
calibrated on random images. Side by side in one process, a batch of one, one and two threads:

- `float32`: the network as slimdown exports it
- `slimdown`: the default `Quantize`, with the profile of the runtime
- `ort-unsigned`, `ort-signed`: `quantize_static` of ONNX Runtime after its preprocessing, as its
  documentation has it; QDQ, weights per channel, activations QUInt8 or QInt8
- `nncf`: NNCF's `quantize` with its preset "mixed", of the ONNX file on ONNX Runtime, and of
  OpenVINO's own model on OpenVINO
- `bfloat16`: OpenVINO's own, on float weights

NNCF must be installed beside slimdown[openvino,timm,ultralytics]; a peer that is missing or fails
has its reason in the CSV. `ratio` is its median over the median of float32 in the same turns.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from slimdown import Quantize
from slimdown.core import Predict
from slimdown.measure import MeasureSettings, measure_latencies
from slimdown.targets import find_target

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from quantize_peers import open_in_ort, quantize_with_nncf, quantize_with_ort  # noqa: E402

NETS = {
    "resnet50": "tv:resnet50",
    "mobilenet_v3_large": "tv:mobilenet_v3_large",
    "shufflenet_v2_x1_0": "tv:shufflenet_v2_x1_0",
    "deit_tiny": "timm:deit_tiny_patch16_224",
    "mobilevit_s": "timm:mobilevit_s",
    "yolov8n": "yolo:yolov8n.yaml",
}
RUNTIMES = ("onnxruntime", "openvino")
NUM_IMAGES = 16
COLUMNS = ("net", "runtime", "threads", "method", "ms", "p90_ms", "ratio", "bytes", "problem")

Made = tuple[Path, Callable[[int], Predict]]
"""A file, and what runs it on so many threads."""


def make_all(net: str, runtime: str, folder: Path) -> Iterator[tuple[str, Callable[[], Made]]]:
    """The methods by name, each with what makes its file."""
    from coverage import build

    model, example = build(NETS[net])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_IMAGES, *example.shape[1:], generator=generator)
    task: Any = SimpleNamespace(
        example_input=example, calibration_batches=lambda: list(images.split(4))
    )
    target = find_target(runtime)

    def ours(name: str, module: torch.nn.Module) -> Made:
        artifact = target.export(module, task, folder / name)
        return artifact.path, lambda threads: target.load(artifact, num_threads=threads)

    plain = folder / "float32" / "model.onnx"
    yield "float32", lambda: ours("float32", model)
    stage = Quantize().for_target(target)
    yield "slimdown", lambda: ours("slimdown", stage(model, task).model)
    if runtime == "onnxruntime":
        for signed in (False, True):
            name = "ort-signed" if signed else "ort-unsigned"
            yield name, lambda name=name, signed=signed: ort(plain, folder / name, images, signed)
        yield "nncf", lambda: nncf_onnx(plain, folder / "nncf", images)
    else:
        yield "nncf", lambda: nncf_openvino(plain, folder / "nncf", images)
        yield "bfloat16", lambda: (plain, lambda threads: openvino_of(plain, threads, "bf16"))


def ort(plain: Path, folder: Path, images: torch.Tensor, signed: bool) -> Made:
    folder.mkdir()
    path = folder / "model.onnx"
    quantize_with_ort(plain, path, images, signed=signed)
    return path, lambda threads: open_in_ort(path, threads)


def nncf_onnx(plain: Path, folder: Path, images: torch.Tensor) -> Made:
    folder.mkdir()
    path = folder / "model.onnx"
    quantize_with_nncf(plain, path, images)
    return path, lambda threads: open_in_ort(path, threads)


def nncf_openvino(plain: Path, folder: Path, images: torch.Tensor) -> Made:
    import nncf
    import openvino

    folder.mkdir()
    dataset = nncf.Dataset(list(images.split(1)), lambda image: image.numpy())
    quantized = nncf.quantize(
        openvino.Core().read_model(plain),
        dataset,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=NUM_IMAGES,
    )
    path = folder / "model.xml"
    openvino.save_model(quantized, path)
    return path, lambda threads: openvino_of(path, threads, "f32")


def openvino_of(path: Path, threads: int, precision: str) -> Predict:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda inputs: request.infer([inputs.numpy()], share_inputs=True)


def size_of(path: Path) -> int:
    """Bytes of a file; of OpenVINO's format, of both halves."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


def attempt(make: Callable[[], Made], example: torch.Tensor) -> Made | str:
    """What was made, or why it was not, or does not run."""
    try:
        made = make()
        made[1](1)(example)
        return made
    except Exception as error:  # whatever a peer raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def compare(net: str, runtime: str, num_samples: int, threads: list[int]) -> list[dict[str, Any]]:
    """The rows of one network on one runtime."""
    from coverage import build

    _, example = build(NETS[net])
    made: dict[str, Made] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for method, make in make_all(net, runtime, Path(folder)):
            result = attempt(make, example)
            if isinstance(result, str):
                rows.append({"method": method, "problem": result})
            else:
                made[method] = result
        for count in threads:
            settings = MeasureSettings(num_samples=num_samples, num_threads=count)
            predicts = [load(count) for _, load in made.values()]
            latencies = measure_latencies(predicts, example, settings, runtime=runtime)
            whole = latencies[list(made).index("float32")].median_ms
            for (method, (path, _)), latency in zip(made.items(), latencies, strict=True):
                rows.append(
                    {
                        "threads": count,
                        "method": method,
                        "ms": f"{latency.median_ms:.3f}",
                        "p90_ms": f"{latency.p90_ms:.3f}",
                        "ratio": f"{latency.median_ms / whole:.3f}",
                        "bytes": size_of(path),
                    }
                )
    return [{"net": net, "runtime": runtime, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a CSV file")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--num-samples", type=int, default=100)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for net in options.nets:
            for runtime in options.runtimes:
                for row in compare(net, runtime, options.num_samples, options.threads):
                    writer.writerow(row)
                    print(*(f"{name}={row[name]}" for name in COLUMNS if name in row), flush=True)
                file.flush()


if __name__ == "__main__":
    main()
