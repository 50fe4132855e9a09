"""Prune every architecture of a list, each in a process of its own, and write what came of it.

    python benchmarks/coverage.py --out coverage.csv [--keep 0.5] [--jobs 1] [--onnx]
    python benchmarks/coverage.py --out peers.csv --only 'tv:*' --peer    # Torch-Pruning beside it

`architectures.txt` names them: "tv:NAME", "tvseg:NAME", "tvdet:NAME" (torchvision), "timm:NAME",
"yolo:NAME.yaml" (ultralytics) and "hf:TYPE" (transformers), all made with random weights. A model
that the output already has is skipped, so a run that was cut short goes on.

Status: `ok` (at least 40 % of the MACs gone, verified), `less` (verified, but not as much could be
removed: see reason), `refused` (a clear error of ours), `wrong` (verification failed), `crashed`.
Seconds are wall clock of one thread; `peak_mb` is resident memory from capture to surgery, beyond
the model. With `--onnx` the result is also run in ONNX Runtime: `onnx_error`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

COLUMNS = (
    "model",
    "status",
    "reason",
    "delivery",
    "parameters_before",
    "parameters_after",
    "macs_before",
    "macs_after",
    "relative_error",
    "frozen",
    "capture_s",
    "analyze_s",
    "choose_s",
    "surgery_s",
    "verify_s",
    "deliver_s",
    "peak_mb",
    "onnx_error",
    "peer_status",
    "peer_reason",
    "peer_macs_after",
    "peer_s",
)
MODELS = Path(__file__).with_name("architectures.txt")
CORE_STEPS = ("analyze", "choose", "surgery")
LESS_THAN = 0.6
"""A model that keeps more of its MACs than this was not really pruned."""


def build(spec: str) -> tuple[Any, Any]:
    """A model with random weights and one input, (1, 3, H, W)."""
    import torch

    kind, _, name = spec.partition(":")
    torch.manual_seed(0)
    if kind in ("tv", "tvseg", "tvdet"):
        import torchvision

        options: dict[str, Any] = {"weights": None}
        if kind != "tv":
            options["weights_backbone"] = None
        if kind == "tv" and name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        size = {"tvseg": 224, "tvdet": 320}.get(kind, 299 if name == "inception_v3" else 224)
        model = torchvision.models.get_model(name, **options)
    elif kind == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
        size = model.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    elif kind == "yolo":
        from slimdown.load import ModelSource, load_model

        model, size = load_model(ModelSource(f"ultralytics:{name}")), 320
    elif kind == "hf":
        from slimdown.load import ModelSource, load_model

        model, size = load_model(ModelSource(f"transformers:{name}")), 224
    else:
        raise SystemExit(f"no such kind of model: {spec}")
    return model.eval(), torch.randn(1, 3, size, size)


def prune_one(spec: str, keep: float, *, with_onnx: bool) -> dict[str, Any]:
    """Build and prune one model, step by step, timed."""
    import torch

    from slimdown.capture import analyze, capture
    from slimdown.errors import SlimdownError
    from slimdown.prune import Prune
    from slimdown.prune.delivery.deliver import deliver
    from slimdown.prune.probe import make_probe
    from slimdown.prune.surgery import prune_graph
    from slimdown.prune.verify import Unverified, check_surgery

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"model": spec}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        row[f"{step}_s"] = round(time.perf_counter() - start, 2)

    try:
        model, example = build(spec)
        if with_onnx:
            revive_(model, example)
        base = _reset_peak()
        with timed("capture"):
            graph = capture(model, example)
        with timed("analyze"):
            analysis = analyze(graph)
        row["frozen"] = json.dumps({k: round(v, 3) for k, v in analysis.frozen_shares().items()})
        with timed("choose"):
            stage = Prune(macs=keep, importance="l2")  # which looks at no images
            kept = stage.choose(analysis, stage.score(analysis, SimpleNamespace()))
        with timed("surgery"):
            oracle = prune_graph(analysis, kept)
        row["peak_mb"] = round((_peak() - base) / 2**20)
        with timed("verify"):
            probe = make_probe(analysis)
            row["relative_error"] = f"{check_surgery(analysis, kept, oracle, probe):.1e}"
        with timed("deliver"):
            delivered = deliver(model, analysis, kept, oracle=oracle, probe=probe)
        widths = {leaf: int(chosen.sum()) for leaf, chosen in kept.items()}
        row["parameters_before"] = analysis.count_parameters({})
        row["parameters_after"] = analysis.count_parameters(widths)
        row["macs_before"], row["macs_after"] = analysis.count_macs({}), analysis.count_macs(widths)
        row["delivery"], row["reason"] = delivered.plan.delivery, delivered.reason
        row["status"] = "ok" if row["macs_after"] <= LESS_THAN * row["macs_before"] else "less"
        if with_onnx:
            row["onnx_error"] = _compare_with_onnx(delivered.module, example)
    except SlimdownError as error:
        row["status"], row["reason"] = "refused", str(error)
    except Unverified as error:
        row["status"], row["reason"] = "wrong", str(error)
    except Exception as error:
        row["status"], row["reason"] = "crashed", f"{type(error).__name__}: {error}"
    row["reason"] = " ".join(str(row.get("reason", "")).split())[:400]
    return row


def revive_(model: Any, example: Any) -> None:
    """Give batch norms the statistics of random images, and weights of zeros random values.

    The outputs of a fresh network hardly depend on the input or, behind a head of zeros, not at
    all; what two runtimes differ by is rounding then.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    if norms:
        with torch.no_grad():
            model(torch.randn(4, *example.shape[1:]))
    model.eval()


def _compare_with_onnx(model: Any, example: Any) -> str:
    """The error as a number, or why there is none."""
    from slimdown.errors import SlimdownError

    try:
        return f"{_onnx_error(model, example):.1e}"
    except SlimdownError as error:
        return " ".join(str(error).split())[:200]


def _onnx_error(model: Any, example: Any) -> float:
    """Relative error of ONNX Runtime against torch on two inputs, centered over them."""
    import numpy as np
    import onnxruntime
    import torch

    from slimdown.capture import traceable
    from slimdown.prune.probe import relative_error
    from slimdown.targets.onnx import Dialect, to_onnx

    model = traceable(model)  # a detector takes one tensor then
    plain = Dialect(int32_biases=False, weight_zero_points=True, fences=False, least_channels=0)
    inputs = torch.cat([example, torch.randn_like(example)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        to_onnx(model, example, plain).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    name = session.get_inputs()[0].name
    deployed = [torch.from_numpy(np.array(x)) for x in session.run(None, {name: inputs.numpy()})]
    with torch.no_grad():
        return relative_error([deployed], [model(inputs)])


def peer_one(spec: str, keep: float) -> dict[str, Any]:
    """The same model pruned by Torch-Pruning, as its own recipe does it."""
    import torch
    import torch_pruning

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"model": spec}
    try:
        model, example = build(spec)
        ignored = [m for m in model.modules() if getattr(m, "out_features", None) == 1000]
        heads = {
            m.qkv: m.num_heads
            for m in model.modules()
            if hasattr(m, "qkv") and hasattr(m, "num_heads")
        }
        start = time.perf_counter()
        before, _ = torch_pruning.utils.count_ops_and_params(model, example)
        pruner = torch_pruning.pruner.MetaPruner(
            model,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - keep**0.5,
            global_pruning=False,
            round_to=8,
            ignored_layers=ignored,
            num_heads=heads,
        )
        pruner.step()
        with torch.no_grad():
            model(example)
        after, _ = torch_pruning.utils.count_ops_and_params(model, example)
        row["peer_s"] = round(time.perf_counter() - start, 2)
        row["peer_status"] = "ok" if after <= LESS_THAN * before else "less"
        row["peer_macs_after"] = int(after)
    except Exception as error:
        row["peer_status"] = "fail"
        row["peer_reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return row


def _reset_peak() -> int:
    """Forget the process's peak of resident memory; return what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _in_process(spec: str, options: argparse.Namespace, timeout: int) -> dict[str, Any]:
    row: dict[str, Any] = {"model": spec}
    for mode in ("slimdown", "peer") if options.peer else ("slimdown",):
        command = [sys.executable, __file__, "--one", spec, "--mode", mode]
        command += ["--keep", str(options.keep), *(["--onnx"] if options.onnx else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "YOLO_OFFLINE": "true"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env=environment
            )
            row |= json.loads(done.stdout.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            prefix = "peer_" if mode == "peer" else ""
            row |= {f"{prefix}status": "crashed", f"{prefix}reason": f"more than {timeout} s"}
        except (IndexError, ValueError):
            prefix = "peer_" if mode == "peer" else ""
            reason = f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
            row |= {f"{prefix}status": "crashed", f"{prefix}reason": reason}
    return row


def summarize(rows: list[dict[str, str]]) -> str:
    """The table of a finished run: how many of what, and how long it took."""
    count = Counter(row["status"] for row in rows)
    done = [row for row in rows if row["status"] in ("ok", "less")]
    lines = [f"{len(rows)} models: " + ", ".join(f"{n} {status}" for status, n in count.items())]
    if done:
        in_place = sum(row["delivery"] == "in_place" for row in done)
        lines.append(f"in the user's own module: {in_place} of {len(rows)}")
        lines += [_spread(done, steps) for steps in (CORE_STEPS, ("verify",), ("deliver",))]
        peaks = [int(row["peak_mb"]) for row in done]
        lines.append(f"memory beyond the model: median {median(peaks):.0f} MB, max {max(peaks)} MB")
    compared = [row for row in rows if row["onnx_error"]]
    if compared:
        equal = sum(_is_small(row["onnx_error"]) for row in compared)
        lines.append(f"ONNX Runtime equals torch: {equal} of {len(compared)}")
    if any(row["peer_status"] for row in rows):
        peer = Counter(row["peer_status"] for row in rows)
        lines.append("Torch-Pruning: " + ", ".join(f"{n} {status}" for status, n in peer.items()))
    return "\n".join(lines)


def _is_small(error: str) -> bool:
    try:
        return float(error) < 1e-3
    except ValueError:  # it tells why there is none
        return False


def _spread(rows: list[dict[str, str]], steps: tuple[str, ...]) -> str:
    seconds = {row["model"]: sum(float(row[f"{step}_s"]) for step in steps) for row in rows}
    slowest = max(seconds, key=lambda model: seconds[model])
    return (
        f"{' + '.join(steps)}: median {median(seconds.values()):.1f} s, "
        f"max {seconds[slowest]:.1f} s ({slowest})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="?", type=Path, default=MODELS, help="one a line")
    parser.add_argument("--out", type=Path, default=Path("coverage.csv"))
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the MACs")
    parser.add_argument("--only", default="*", help="a glob over the models")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one model")
    parser.add_argument("--onnx", action="store_true", help="compare ONNX Runtime with torch, too")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning beside it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="slimdown", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        row = (
            peer_one(options.one, options.keep)
            if options.mode == "peer"
            else prune_one(options.one, options.keep, with_onnx=options.onnx)
        )
        print(json.dumps(row))
        return
    specs = options.models.read_text().split()
    known = set()
    if options.out.exists():
        known = {row["model"] for row in csv.DictReader(options.out.open())}
    todo = [s for s in specs if fnmatchcase(s, options.only) and s not in known]
    with options.out.open("a", newline="") as file, ThreadPoolExecutor(options.jobs) as pool:
        writer = csv.DictWriter(file, COLUMNS)
        if not known:
            writer.writeheader()
        for row in pool.map(lambda spec: _in_process(spec, options, options.timeout), todo):
            writer.writerow(row)
            file.flush()
            print(f"{row['model']:45} {row['status']:8} {row.get('reason', '')[:80]}", flush=True)
    print(summarize(list(csv.DictReader(options.out.open()))))


if __name__ == "__main__":
    main()
