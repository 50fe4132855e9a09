"""Accuracy of quantized networks without training, beside five other tools.

    python benchmarks/quantize_accuracy.py --out runs/quantize-accuracy
    python benchmarks/quantize_accuracy.py --out runs/quick --nets resnet20 --held-out
    python benchmarks/quantize_accuracy.py --out runs/few-bits --bits 4/8 4/4 --peers peers

The trained networks of `prune_accuracy.py` (the same folder holds their weights), and each of them
made hard on purpose: channels between layers rescaled by factors of 2 to 64, so that the network
computes what it did. All are calibrated on the same 256 training images and judged as deployed on
ONNX Runtime:

- `slimdown-fast`, `-balanced`, `-best`: `Quantize` with that effort
- `ort-minmax`, `ort-entropy`, `ort-percentile`: ONNX Runtime's `quantize_static`, unsigned
  activations, weights per channel
- `nncf`: NNCF's `quantize` of the ONNX file with its preset "mixed" and its default calibration
- `aimet-ranges`, `-layers`, `-cle`, `-adaround`; `quark-xint8`, `-a8w8`, `-adaround`; `mct-ptq`,
  `-gptq`: see `peers/run_*.py`, and `quantize_peers.py` for how to install them. MCT's files hold
  weights as floats, so that their size is that of the float network

`--bits` are of weights and of activations. The first and the last layer keep 8 for all. A tool has
no row for bits that it does not offer. `seconds` are of the quantization; for peers with an
environment of their own the start of their program is among them. Peers' files with 4-bit
activations run without ONNX Runtime's graph optimizations, which spoil them.

`agreement` is the share of images that are classified as the float network classifies them. With
`--held-out`, on training images that calibration did not see; without, on the test images. Rows
that the output has are not made again. NNCF must be installed beside slimdown; what is not
installed has the reason in its row.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimdown import ClassificationTask, Quantize
from slimdown.core import Predict
from slimdown.images import take_images
from slimdown.targets import find_target

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from prune_accuracy import NETS, make_task, trained  # noqa: E402
from quantize_peers import (  # noqa: E402
    open_in_ort,
    quantize_elsewhere,
    quantize_with_nncf,
    quantize_with_ort,
)
from rows import fill  # noqa: E402

NUM_IMAGES = 256
ORT = {"ort-minmax": "MinMax", "ort-entropy": "Entropy", "ort-percentile": "Percentile"}
OURS = {"slimdown-fast": "fast", "slimdown-balanced": "balanced", "slimdown-best": "best"}
AIMET_ITERATIONS, QUARK_ITERATIONS, MCT_EPOCHS = 300, 1000, 20
ELSEWHERE = {
    "aimet-ranges": ["--method", "ranges"],
    "aimet-layers": ["--method", "layers"],
    "aimet-cle": ["--method", "cle"],
    "aimet-adaround": ["--method", "adaround", "--iterations", str(AIMET_ITERATIONS)],
    "quark-xint8": ["--method", "xint8"],
    "quark-a8w8": ["--method", "a8w8"],
    "quark-adaround": ["--method", "adaround", "--iterations", str(QUARK_ITERATIONS)],
    "mct-ptq": ["--method", "ptq"],
    "mct-gptq": ["--method", "gptq", "--epochs", str(MCT_EPOCHS)],
}
METHODS = (*OURS, *ORT, "nncf", *ELSEWHERE)
AIMET = tuple(method for method in ELSEWHERE if method.startswith("aimet"))
BITS = {
    "8/8": METHODS,
    "4/8": (*OURS, *ORT, *AIMET, "mct-ptq", "mct-gptq"),
    "4/4": (*OURS, *AIMET),
}
"""Of weights and of activations, with the methods that offer them."""
COLUMNS = (
    "net", "hard", "bits", "method", "accuracy", "dense", "agreement", "bytes", "seconds", "problem"
)  # fmt: skip


def rescale_(model: nn.Module) -> None:
    """Multiply channels by 2 to 64 where a layer's reader can divide by the same."""
    generator = torch.Generator().manual_seed(0)
    for norm, reader in rescalable(model):
        factors = 2 ** (1 + 5 * torch.rand(len(norm.weight), generator=generator))
        with torch.no_grad():
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
            shape = [1, -1] + [1] * (reader.weight.ndim - 2)
            reader.weight.div_(factors.view(shape))


def rescalable(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Norms with what alone reads them, through a ReLU at most."""
    for module in model.modules():
        kind = type(module).__name__
        if kind == "BasicBlock":
            yield module.bn1, module.conv2
        elif kind == "Block":
            yield module.norm1, module.attention.qkv
            yield module.norm2, module.fc1


def quantized(
    method: str, bits: str, model: nn.Module, task: ClassificationTask, folder: Path, peers: Path
) -> tuple[Predict, int]:
    """What runs the deployed network, and the bytes of its file."""
    target = find_target("onnxruntime")
    weight_bits, activation_bits = map(int, bits.split("/"))
    if method in OURS:
        effort: Any = OURS[method]
        stage = Quantize(
            num_images=NUM_IMAGES,
            effort=effort,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
        ).for_target(target)
        artifact = target.export(stage(model, task).model, task, folder)
        return target.load(artifact), artifact.size_bytes
    plain = target.export(model, task, folder / "plain").path
    images = torch.cat(take_images(task.calibration_batches(), NUM_IMAGES))
    path = folder / "model.onnx"
    if method == "nncf":
        quantize_with_nncf(plain, path, images)
    elif method in ORT:
        quantize_with_ort(plain, path, images, method=ORT[method], weight_bits=weight_bits)
    else:
        peer = method.split("-")[0]
        quantize_elsewhere(
            peer,
            model if peer == "mct" else plain,
            path,
            images,
            environments=peers,
            options=ELSEWHERE[method] + ([] if peer == "quark" else ["--bits", bits]),
        )
    # ONNX Runtime's optimizer spoils graphs with uint4 activations, or refuses them
    run = open_in_ort(path, 1, optimize=activation_bits == 8)
    return lambda inputs: torch.from_numpy(run(inputs)[0]), path.stat().st_size


def row_of(
    method: str, bits: str, model: nn.Module, task: ClassificationTask, peers: Path
) -> dict[str, Any]:
    dense = task.score(model)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            predict, size = quantized(method, bits, model, task, Path(folder), peers)
        except Exception as error:  # whatever a peer raises
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return {"dense": dense.value, "problem": problem}
        seconds = time.perf_counter() - start
        score = task.score(predict)
    assert score.predictions is not None
    assert dense.predictions is not None
    return {
        "accuracy": f"{score.value:.2f}",
        "dense": f"{dense.value:.2f}",
        "agreement": f"{100 * (score.predictions == dense.predictions).mean():.2f}",
        "bytes": size,
        "seconds": f"{seconds:.1f}",
    }


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """For each row its name, and what makes its figures."""
    for net in options.nets:
        task = make_task(net, options.out, seed=0, held_out=options.held_out)
        for hard in options.hard:
            model = trained(net, options.out, task)
            if hard == "yes":
                if not list(rescalable(model)):
                    continue
                rescale_(model)
            for bits, method in itertools.product(options.bits, options.methods):
                if method in BITS[bits]:
                    name = {"net": net, "hard": hard, "bits": bits, "method": method}
                    yield name, partial(row_of, method, bits, model, task, options.peers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--hard", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--bits", nargs="+", default=["8/8"], choices=list(BITS))
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="their environments")
    parser.add_argument("--held-out", action="store_true", help="training images, to choose by")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("held-out.csv" if options.held_out else "quantize.csv")
    fill(path, COLUMNS, cases(options))


if __name__ == "__main__":
    main()
