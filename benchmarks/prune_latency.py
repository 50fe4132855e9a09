"""Ask for a share of the latency, and see what comes; then latency against MACs as what to save.

    python benchmarks/prune_latency.py reach --out runs/latency.csv [--nets resnet50 deit_tiny]
    python benchmarks/prune_latency.py accuracy --out runs/latency-accuracy.csv [--held-out]

`reach`: networks with random weights, pruned to 0.7, 0.5 and 0.35 of their latency on each
runtime, with a batch of one on one thread. `got` is measured anew when pruning is done: the
network that it returned against the one that went in, exported, in turns. Importance is "l2", as
random weights tell no more.

`accuracy`: the trained CIFAR-10 ResNet-20, pruned to the same shares of its latency by choosing
widths by latency and by MACs; the goal of the latter is corrected, too, until the measured latency
is the same. Then the accuracy as it is, and after a short distillation from the network that went
in. With `--held-out` on training images that neither pruning nor training saw, without it on test
images. Needs the folder that SLIMDOWN_DATA names.

Run it on an idle machine. Rows that the output has are not made again. How it came out is printed
at the end: a share is reached where it is within 5 % of what was asked for.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import slimdown
from slimdown import Context, Distill, Prune
from slimdown.capture.dims import Kept
from slimdown.core import Clock
from slimdown.prune.budget.pace import Attempt, Chosen, approach

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from rows import Row, fill, read  # noqa: E402

TOLERANCE = 0.05
ASKED = (0.7, 0.5, 0.35)
TARGETS = ("onnxruntime", "openvino")
NETS = {
    "resnet50": "tv:resnet50",
    "mobilenet_v3_large": "tv:mobilenet_v3_large",
    "deit_tiny": "timm:deit_tiny_patch16_224",
    "yolov8n": "yolo:yolov8n.yaml",
}
EPOCHS = 2
REACH = (
    "net", "target", "asked", "got", "predicted", "attempts", "macs", "original_ms", "seconds",
    "problem",
)  # fmt: skip
ACCURACY = (
    "target", "asked", "by", "seed", "got", "macs", "epochs", "accuracy", "dense", "problem",
)  # fmt: skip


# --------------------------------------------------------------------------------------- reach


def reach(options: argparse.Namespace) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """For each case its name, and how to make its row."""
    for net in options.nets:
        for target in options.targets:
            for asked in options.asked:
                row = {"net": net, "target": target, "asked": asked}
                yield row, lambda net=net, target=target, asked=asked: reach_one(net, target, asked)


def reach_one(net: str, target: str, asked: float) -> Row:
    from coverage import build

    model, example = build(NETS[net])
    clock = slimdown.clock_for(target)
    stage = Prune(latency=asked, target=target, importance="l2", compensate=False)
    task: Any = SimpleNamespace(example_input=example)
    start = time.perf_counter()
    try:
        result = stage(model, task, Context(find_clock=lambda name: clock))
    except slimdown.SlimdownError as error:
        return {"problem": " ".join(str(error).split())}
    seconds = time.perf_counter() - start
    facts, (before, after) = result.facts["latency"], result.facts["macs"]
    return {
        "got": f"{measure(clock, model, result.model, example):.4f}",
        "predicted": f"{facts['predicted']:.4f}",
        "attempts": len(facts["attempts"]),
        "macs": f"{after / before:.4f}",
        "original_ms": f"{facts['original_ms']:.3f}",
        "seconds": f"{seconds:.0f}",
    }


def measure(clock: Clock, before: nn.Module, after: nn.Module, example: torch.Tensor) -> float:
    """The latency of one module over that of another."""
    predicts = [clock.deploy(module, example) for module in (before, after)]
    before_ms, after_ms = clock.time_networks(predicts, example)
    return after_ms / before_ms


# ------------------------------------------------------------------------------------ accuracy


def accuracy(options: argparse.Namespace) -> Iterator[tuple[Row, Callable[[], Row]]]:
    from prune_accuracy import make_task, trained

    for seed in options.seeds:
        task = make_task("resnet20", options.out.parent, seed=seed, held_out=options.held_out)
        dense = trained("resnet20", options.out.parent, task)
        for target in options.targets:
            for asked in options.asked:
                for by in ("latency", "macs"):
                    common = {"target": target, "asked": asked, "by": by, "seed": seed}
                    for epochs in options.epochs:
                        row = common | {"epochs": epochs}
                        yield (
                            row,
                            lambda row=row, task=task, dense=dense: accuracy_of(dense, task, row),
                        )


def accuracy_of(dense: nn.Module, task: Any, row: Row) -> Row:
    clock = slimdown.clock_for(row["target"])
    context = Context(original=dense, seed=row["seed"], find_clock=lambda name: clock)
    if row["by"] == "latency":
        stage = Prune(latency=row["asked"], target=row["target"])
    else:
        stage = Prune(macs=macs_for_latency(dense, task, clock, row["asked"], context))
    try:
        result = stage(dense, task, context)
    except slimdown.SlimdownError as error:
        return {"problem": " ".join(str(error).split())}
    before, after = result.facts["macs"]
    model = result.model
    if row["epochs"]:
        model = Distill(epochs=row["epochs"])(model, task, context).model
    return {
        "got": f"{measure(clock, dense, result.model, task.example_input):.4f}",
        "macs": f"{after / before:.4f}",
        "accuracy": task.score(model).value,
        "dense": task.score(dense).value,
    }


def macs_for_latency(
    dense: nn.Module, task: Any, clock: Clock, asked: float, context: Context
) -> float:
    """The budget of MACs with which pruning comes nearest to a share of the latency."""
    from slimdown.capture import analyze, capture
    from slimdown.prune.surgery import prune_graph

    analysis = analyze(capture(dense, task.example_input))
    scores = Prune(macs=0.5).score(analysis, task, context)

    def choose(goal: float) -> Chosen:
        share = max(goal, 0.1)
        kept = Prune(macs=share).choose(analysis, scores)
        return Chosen(kept=kept, predicted=share)

    def measured(kept: Kept) -> float:
        return measure(clock, dense, prune_graph(analysis, kept), task.example_input)

    def distance(attempt: Attempt) -> float:
        return abs(attempt.measured - asked)

    return min(approach(asked, choose, measured), key=distance).predicted


# ------------------------------------------------------------------------------------- results


def run(options: argparse.Namespace) -> None:
    """Make the rows that are missing."""
    columns = {"reach": REACH, "accuracy": ACCURACY}[options.what]
    cases = {"reach": reach, "accuracy": accuracy}[options.what]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fill(options.out, columns, cases(options))


def summarize(what: str, rows: list[dict[str, str]]) -> str:
    """The outcome as a table in Markdown."""
    if what == "reach":
        lines = [
            "| network | runtime | asked | got | attempts | MACs |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            got = row["got"] or row["problem"]
            lines.append(
                f"| {row['net']} | {row['target']} | {row['asked']} | {got} "
                f"| {row['attempts']} | {row['macs']} |"
            )
        near = [r for r in rows if r["got"] and is_near(float(r["got"]), float(r["asked"]))]
        return "\n".join([*lines, f"within 5 %: {len(near)} of {len(rows)}"])
    lines = [
        "| runtime | asked | by | got | MACs | epochs | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = ("target", "asked", "by", "got", "macs", "epochs", "accuracy")
        lines.append(f"| {' | '.join(row[name] for name in names)} |")
    return "\n".join(lines)


def is_near(got: float, asked: float) -> bool:
    return abs(got / asked - 1) <= TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("reach", "accuracy"))
    parser.add_argument("--out", type=Path, required=True, help="a CSV file")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--asked", nargs="+", type=float, default=list(ASKED))
    parser.add_argument("--epochs", nargs="+", type=int, default=[0, EPOCHS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--held-out", action="store_true", help="training images, to choose by")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run(options)
    print(summarize(options.what, read(options.out)))


if __name__ == "__main__":
    main()
