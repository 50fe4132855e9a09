"""Accuracy of networks that are trained while quantized, with fixed and with learned scales.

    python benchmarks/quantize_training.py --out runs/quantize-training
    python benchmarks/quantize_training.py --out runs/quick --bits 4,4 --seeds 0 --held-out

The trained networks of `prune_accuracy.py` (the same folder holds their weights), quantized with
default settings but for the bits, and distilled from the float network with default settings but
for the number of epochs. The seed chooses the calibration images and the order in training.

`ptq` is the accuracy before training, `accuracy` after it; `agreement` is the share of images that
are classified as the float network classifies them, `divergence` the mean KL divergence from its
answers, `deployed` the accuracy of the trained network on ONNX Runtime. With `--held-out`, on
training images that neither calibration nor training saw; without, on the test images. Rows that
the output has are not made again.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimdown import ClassificationTask, Context, Distill, Quantize
from slimdown.core import Score
from slimdown.targets import find_target

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from prune_accuracy import NETS, make_task, trained  # noqa: E402
from rows import fill  # noqa: E402

COLUMNS = (
    "net", "weight_bits", "activation_bits", "scales", "seed", "epochs", "dense", "ptq", "accuracy",
    "agreement", "divergence", "deployed", "seconds",
)  # fmt: skip


def judge(model: nn.Module, task: ClassificationTask) -> tuple[Score, Tensor]:
    """The score of a module, and its logits on the images, (N, num_classes)."""
    answers = []

    def predict(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            answers.append(model(inputs))
        return answers[-1]

    return task.score(predict), torch.cat(answers)


def row_of(name: dict[str, Any], folder: Path, *, held_out: bool) -> dict[str, Any]:
    task = make_task(name["net"], folder, seed=name["seed"], held_out=held_out)
    dense = trained(name["net"], folder, task)
    target = find_target("onnxruntime")
    bits = {key: name[key] for key in ("weight_bits", "activation_bits")}
    quantized = Quantize(**bits).for_target(target)(dense, task).model
    stage = Distill(epochs=name["epochs"], learn_scales=name["scales"] == "learned")
    start = time.perf_counter()
    model = stage(quantized, task, Context(original=dense, seed=name["seed"])).model
    seconds = time.perf_counter() - start
    (expected, logits), (score, answers) = judge(dense, task), judge(model, task)
    with tempfile.TemporaryDirectory() as place:
        deployed = task.score(target.load(target.export(model, task, Path(place))))
    assert score.predictions is not None
    assert expected.predictions is not None
    divergence = F.kl_div(
        answers.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True
    )
    return {
        "dense": f"{expected.value:.2f}",
        "ptq": f"{judge(quantized, task)[0].value:.2f}",
        "accuracy": f"{score.value:.2f}",
        "agreement": f"{100 * (score.predictions == expected.predictions).mean():.2f}",
        "divergence": f"{float(divergence):.4f}",
        "deployed": f"{deployed.value:.2f}",
        "seconds": f"{seconds:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--nets", nargs="+", default=["resnet20"], choices=list(NETS))
    parser.add_argument("--bits", nargs="+", default=["4,4", "4,8"], help="weights,activations")
    parser.add_argument("--scales", nargs="+", default=["fixed", "learned"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--held-out", action="store_true", help="training images, to choose by")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("training-held-out.csv" if options.held_out else "training.csv")
    names = [
        {
            "net": net,
            "weight_bits": int(bits.split(",")[0]),
            "activation_bits": int(bits.split(",")[1]),
            "scales": scales,
            "seed": seed,
            "epochs": options.epochs,
        }
        for net in options.nets
        for bits in options.bits
        for seed in options.seeds
        for scales in options.scales
    ]
    rows = partial(row_of, folder=options.out, held_out=options.held_out)
    fill(path, COLUMNS, ((name, partial(rows, name)) for name in names))


if __name__ == "__main__":
    main()
