"""Accuracy right after pruning, and after a few epochs, beside Torch-Pruning.

    python benchmarks/prune_accuracy.py --out runs/prune-accuracy
    python benchmarks/prune_accuracy.py --out runs/quick --nets resnet20 --keep 0.5 --seeds 0 \
        --epochs 0 1 --held-out

Needs the folder of CIFAR-10 images and weights that SLIMDOWN_DATA names, and Torch-Pruning. Three
networks: a trained ResNet-20 (lossless images), and a small MobileNetV2 and a small ViT (JPEG
images), which are trained first; their weights and images stay in the output's folder. Each is
pruned to a share of its MACs by slimdown's default and by Torch-Pruning with group-L2 and group
Taylor importance, then trained by one loop: slimdown's distillation from the dense network, with
the same settings and the same order of images for all. Every number of epochs is a training of its
own, with its own schedule.

The seed chooses the calibration images and the order in training. Torch-Pruning's ratio is
searched so that its MACs agree with slimdown's within 2 %. With `--held-out`, accuracy is told on
training images that neither pruning nor training saw, so that one can choose by it; without, on
the test images. Rows that the output has are not made again.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from slimdown import ClassificationTask, Context, DataSource, Distill, Preprocess, Prune, load_task
from slimdown.measure import count_macs

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SLIMDOWN_DATA", HERE.parent.parent / "shared" / "data"))
sys.path[:0] = [str(HERE), str(HERE.parent / "recipes" / "models")]

from cifar_resnet import resnet20  # noqa: E402
from rows import Row, append, read  # noqa: E402
from small_networks import Attention, SmallMobileNet, SmallViT  # noqa: E402

PREPROCESS = Preprocess(size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NUM_TRAIN, NUM_HELD_OUT, NUM_TEST = 8_000, 1_000, 2_000
"""JPEG images of the two networks that are trained here."""
TRAINING = Distill(epochs=10, alpha=1.0)
"""How they are trained."""
TOLERANCE = 0.02
"""Of Torch-Pruning's MACs, relative to slimdown's."""
COLUMNS = (
    "net", "keep", "method", "seed", "epochs", "accuracy", "dense", "macs", "prune_s", "note"
)  # fmt: skip


# ----------------------------------------------------------------------------------- networks


@dataclass(frozen=True, kw_only=True)
class Net:
    """A network of the benchmark."""

    make: Callable[[], nn.Module]
    is_jpeg: bool
    weights: Path | None = None


NETS = {
    "resnet20": Net(
        make=resnet20, is_jpeg=False, weights=DATA / "weights" / "cifar10_resnet20.safetensors"
    ),
    "mobilenet": Net(make=SmallMobileNet, is_jpeg=True),
    "vit": Net(make=SmallViT, is_jpeg=True),
}


def trained(name: str, folder: Path, task: ClassificationTask) -> nn.Module:
    """The dense network; it is trained where its weights are not there yet."""
    torch.manual_seed(0)
    model = NETS[name].make().eval()
    path = NETS[name].weights or folder / f"{name}.safetensors"
    if not path.exists():
        start = time.perf_counter()
        model = TRAINING(model, task).model
        save_file(model.state_dict(), path)
        print(f"trained {name} in {time.perf_counter() - start:.0f} s", flush=True)
    model.load_state_dict(load_file(path))
    return model.eval()


# --------------------------------------------------------------------------------------- data


def make_task(name: str, folder: Path, *, seed: int, held_out: bool) -> ClassificationTask:
    """The task whose "test" images are what is judged on."""
    train, test = (jpeg_archives if NETS[name].is_jpeg else lossless_archives)(folder, held_out)
    source = DataSource(
        kind="npz", train=train, test=test, preprocess=PREPROCESS, seed=seed, validation=0.0
    )
    return load_task(source)


def lossless_archives(folder: Path, held_out: bool) -> tuple[Path, Path]:
    """The first 3,600 training images, and the last 400 or the test images."""
    train, rest = folder / "train3600.npz", folder / "held_out400.npz"
    if not rest.exists():
        with np.load(DATA / "cifar10_train4000.npz") as archive:
            x, y = archive["X"], archive["Y"]
        np.savez(train, X=x[:3600], Y=y[:3600])
        np.savez(rest, X=x[3600:], Y=y[3600:])
    return train, rest if held_out else DATA / "cifar10_test1000.npz"


def jpeg_archives(folder: Path, held_out: bool) -> tuple[Path, Path]:
    """Equally many images of each class; those held out follow the training images."""
    parts = {
        "train": ("train", 0, NUM_TRAIN),
        "held_out": ("train", NUM_TRAIN, NUM_HELD_OUT),
        "test": ("test", 0, NUM_TEST),
    }
    for name, (split, first, count) in parts.items():
        path = folder / f"jpeg_{name}.npz"
        if not path.exists():
            save_part(path, split, first // 10, count // 10)
    return folder / "jpeg_train.npz", folder / f"jpeg_{'held_out' if held_out else 'test'}.npz"


def save_part(path: Path, split: str, first: int, count: int) -> None:
    """`count` images of each class from the archive of JPEG files, from the `first` on."""
    images, labels = [], []
    with zipfile.ZipFile(DATA / "cifar10_jpeg.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{split}/"))
        classes = sorted({name.split("/")[1] for name in names})
        for label, kind in enumerate(classes):
            own = [name for name in names if name.split("/")[1] == kind and name[-1] != "/"]
            for name in own[first : first + count]:
                with Image.open(BytesIO(archive.read(name))) as image:
                    images.append(np.asarray(image.convert("RGB")))
                labels.append(label)
    np.savez(path, X=np.stack(images), Y=np.array(labels))


# ------------------------------------------------------------------------------------ methods


@dataclass(frozen=True, kw_only=True)
class Pruned:
    model: nn.Module
    macs: float
    """Of the dense network's."""
    note: str = ""


def by_slimdown(model: nn.Module, task: ClassificationTask, *, macs: float, seed: int) -> Pruned:
    result = Prune(macs=macs)(model, task, Context(seed=seed))
    before, after = (count_macs(each, task.example_input) for each in (model, result.model))
    return Pruned(model=result.model, macs=after / before)


def by_torch_pruning(
    model: nn.Module, task: ClassificationTask, *, importance: str, macs: float, seed: int
) -> Pruned:
    """Global pruning in five steps with the ratio that gives the MACs, at the coarsest rounding.

    Raises RuntimeError where no ratio gives the MACs.
    """
    example = task.example_input
    whole = count_macs(model, example)
    found: list[tuple[float, nn.Module]] = []
    for round_to in (8, 4, 2, 1):
        low, high = 0.0, 0.95
        for _ in range(9):
            ratio = (low + high) / 2
            smaller = prune_once(
                model, task, importance=importance, ratio=ratio, round_to=round_to, seed=seed
            )
            share = count_macs(smaller, example) / whole
            if abs(share / macs - 1) <= TOLERANCE:
                note = f"pruning_ratio {ratio:.3f}, round_to {round_to}"
                return Pruned(model=smaller, macs=share, note=note)
            found.append((share, smaller))
            low, high = (ratio, high) if share > macs else (low, ratio)
    raise RuntimeError(f"no ratio gives {macs:.3f} of the MACs, only {sorted(f[0] for f in found)}")


def prune_once(
    model: nn.Module,
    task: ClassificationTask,
    *,
    importance: str,
    ratio: float,
    round_to: int,
    seed: int,
) -> nn.Module:
    """A copy pruned by Torch-Pruning, as its examples do it."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    criterion = (
        tp.importance.GroupTaylorImportance()
        if importance == "taylor"
        else tp.importance.GroupMagnitudeImportance(p=2)
    )
    heads = {m.qkv: m.num_heads for m in model.modules() if isinstance(m, Attention)}
    steps = 5
    pruner = tp.pruner.BasePruner(
        model,
        task.example_input,
        importance=criterion,
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,  # as slimdown's min_keep
        iterative_steps=steps,
        round_to=round_to,
        ignored_layers=list(kept_whole(model)),
        num_heads=heads,
        prune_head_dims=True,
    )
    torch.manual_seed(seed)
    batches = [batch for batch, _ in zip(task.train_batches(0), range(4), strict=False)]
    for _ in range(steps):
        if importance == "taylor":  # on 256 images
            model.zero_grad()
            for batch in batches:
                F.cross_entropy(model(batch.inputs), batch.targets).backward()
        pruner.step()
        for module in model.modules():  # what its example for vision transformers mends by hand
            if isinstance(module, Attention):
                module.num_heads = pruner.num_heads[module.qkv]
                module.head_dim = module.qkv.out_features // (3 * module.num_heads)
    model.zero_grad()
    return model.eval()


def kept_whole(model: nn.Module) -> Iterator[nn.Module]:
    """What Torch-Pruning must be told to leave: the classifier and, of a CIFAR ResNet, the trunk.

    Its shortcuts pad with a fixed number of zeros, which only slimdown's surgery follows.
    """
    for name, module in model.named_modules():
        is_trunk = name == "conv1" or (name.startswith("layer") and name.endswith("conv2"))
        if is_trunk or name in ("head", "linear"):
            yield module


METHODS: dict[str, Callable[..., Pruned]] = {
    "slimdown": by_slimdown,
    "tp-l2": lambda *args, **settings: by_torch_pruning(*args, importance="l2", **settings),
    "tp-taylor": lambda *args, **settings: by_torch_pruning(*args, importance="taylor", **settings),
}


# ------------------------------------------------------------------------------------ results


def run(options: argparse.Namespace) -> None:
    """Make the rows that are missing."""
    path = options.out / "results.csv"
    for name in options.nets:
        for seed in options.seeds:
            task = make_task(name, options.out, seed=seed, held_out=options.held_out)
            dense = trained(name, options.out, task)
            common = {"net": name, "seed": seed, "dense": task.score(dense).value}
            for keep in options.keep:
                for row in compare(dense, task, options, common | {"keep": keep}, read(path)):
                    append(path, COLUMNS, row)
                    print(*(f"{row[column]}" for column in COLUMNS), flush=True)


def compare(
    dense: nn.Module,
    task: ClassificationTask,
    options: argparse.Namespace,
    common: Row,
    done: list[Row],
) -> Iterator[Row]:
    """The rows of one network, seed and share of the MACs that are not done yet."""
    share = common["keep"]
    for method in METHODS:
        row = common | {"method": method}
        missing = [
            e for e in options.epochs if not any(is_same(row | {"epochs": e}, d) for d in done)
        ]
        if not missing and method != "slimdown":
            continue
        start = time.perf_counter()
        pruned = METHODS[method](dense, task, macs=share, seed=row["seed"])
        row |= {"prune_s": f"{time.perf_counter() - start:.1f}", "note": pruned.note}
        row |= {"macs": f"{pruned.macs:.4f}"}
        if method == "slimdown":
            share = pruned.macs  # what the others are to agree with
        for epochs in missing:
            model = recover(pruned.model, dense, task, epochs=epochs, seed=row["seed"])
            yield row | {"epochs": epochs, "accuracy": round(task.score(model).value, 2)}


def recover(
    model: nn.Module, dense: nn.Module, task: ClassificationTask, *, epochs: int, seed: int
) -> nn.Module:
    """Distilled from the dense network for some epochs; as it is for none."""
    if epochs == 0:
        return model
    return Distill(epochs=epochs)(model, task, Context(original=dense, seed=seed)).model


def is_same(row: Row, other: Row) -> bool:
    """Whether two rows tell of the same run."""
    names = ("net", "keep", "method", "seed", "epochs")
    return all(str(row[name]) == str(other[name]) for name in names)


def table(rows: list[Row]) -> str:
    """Means over the seeds, as Markdown: one line a network, share and method."""
    epochs = sorted({int(row["epochs"]) for row in rows})
    names = ("net", "keep", "method")
    head = [*names, "macs", "dense", *(f"{n} epochs" for n in epochs)]
    lines = [head, ["---"] * len(head)]
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == key]
        cells = [f"{mean_of(own, 'macs'):.3f}", f"{mean_of(own, 'dense'):.1f}"]
        for number in epochs:
            seeds = [float(row["accuracy"]) for row in own if int(row["epochs"]) == number]
            spread = f" ± {statistics.stdev(seeds):.1f}" if len(seeds) > 1 else ""
            cells.append(f"{statistics.mean(seeds):.1f}{spread}" if seeds else "")
        lines.append([*key, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_of(rows: list[Row], column: str) -> float:
    return statistics.mean(float(row[column]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", nargs="+", type=int, default=[0, 1, 2, 5])
    parser.add_argument("--held-out", action="store_true", help="judge on training images")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run(options)
    print(table(read(options.out / "results.csv")))


if __name__ == "__main__":
    main()
