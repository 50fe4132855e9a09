"""A made-up report that looks like a real one: three stages, two targets, thirty layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slimdown.core import (
    Accuracy,
    Artifact,
    Json,
    Latency,
    LayerAudit,
    Measurement,
    Report,
    Step,
    Verdict,
)

RNG = np.random.default_rng(0)
LAYERS = [
    "conv1",
    *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in range(5) for c in (1, 2)),
    "linear",
]
WIDTHS = [16] + [16] * 10 + [32] * 10 + [64] * 10 + [10]


@pytest.fixture
def report() -> Report:
    return make_report()


def make_report() -> Report:
    """A run of prune, distill and quantize for two targets; openvino breaks its budget."""
    steps = (
        _step("00-original", "original", None, {}, num_parameters=465_274, macs=69_480_000),
        _step("01-prune", "prune", "00-original", _prune_facts(), seconds=3.1),
        _step("02-distill", "distill", "01-prune", _distill_facts(), seconds=187.4),
        _step("03-quantize-onnxruntime", "quantize", "02-distill", _quantize_facts(True)),
        _step("03-quantize-openvino", "quantize", "02-distill", _quantize_facts(False)),
    )
    return Report(
        name="cifar10-resnet32",
        recipe=_recipe(),
        environment=_environment(),
        steps=steps,
        measurements=(
            _torch("00-original", 92.4, 0.0),
            _torch("01-prune", 88.1, -4.3),
            _torch("02-distill", 91.6, -0.8),
            _torch("03-quantize-onnxruntime", 91.4, -1.0),
            _torch("03-quantize-openvino", 90.9, -1.5),
            _deployed("00-original", "onnxruntime", 92.4, 0.0, 1_884_213, 2.41, "float32"),
            _deployed("01-prune", "onnxruntime", 88.1, -4.3, 962_880, 1.38, "float32"),
            _deployed("02-distill", "onnxruntime", 91.6, -0.8, 962_880, 1.37, "float32"),
            _deployed("03-quantize-onnxruntime", "onnxruntime", 91.5, -0.9, 287_104, 0.62, "int8"),
            _deployed("00-original", "openvino", 92.4, 0.0, 1_921_448, 2.12, "float32"),
            _deployed("01-prune", "openvino", 88.1, -4.3, 987_310, 1.21, "float32"),
            _deployed("02-distill", "openvino", 91.6, -0.8, 987_310, 1.22, "float32"),
            _deployed("03-quantize-openvino", "openvino", 90.6, -1.8, 301_990, 0.71, "int8"),
        ),
        verdicts=(
            _verdict("onnxruntime", "max_drop", 1.5, 0.9, True),
            _verdict("onnxruntime", "min_speedup", 2.0, 2.41 / 0.62, True),
            _verdict("onnxruntime", "max_size", 300_000, 287_104, True),
            _verdict("openvino", "max_drop", 1.5, 1.8, False),
            _verdict("openvino", "min_speedup", 2.0, 2.12 / 0.71, True),
            _verdict("openvino", "max_size", 300_000, 301_990, False),
        ),
    )


def _step(
    name: str,
    kind: str,
    parent: str | None,
    facts: Json,
    *,
    num_parameters: int = 236_410,
    macs: int = 34_120_000,
    seconds: float = 6.2,
) -> Step:
    settings = {"importance": "l2", "macs": 0.5} if kind == "prune" else {}
    return Step(
        name=name,
        kind=kind,
        parent=parent,
        settings=settings,
        facts=facts,
        num_parameters=num_parameters,
        macs=macs,
        seconds=seconds,
    )


def _prune_facts() -> Json:
    kept = RNG.choice([0.375, 0.5, 0.625, 0.75, 1.0], size=len(LAYERS) - 1)
    after = [max(8, int(8 * round(w * k / 8))) for w, k in zip(WIDTHS, kept, strict=False)]
    return {
        "delivery": "in_place",
        "reason": "the edited module equals the graph",
        "widths": {
            name: [before, now]
            for name, before, now in zip(LAYERS, WIDTHS, [*after, 10], strict=True)
        },
        "macs": [69_480_000, 34_120_000],
        "parameters": [465_274, 236_410],
        "relative_error": 3.1e-7,
        "frozen": {"aten.constant_pad_nd": 0.031, "the classes of the output": 0.002},
    }


def _distill_facts() -> Json:
    history = []
    for epoch in range(12):
        soft = 0.2 + 1.9 * float(np.exp(-epoch / 2.5)) + float(RNG.normal(0, 0.02))
        hard = 0.15 + 0.9 * float(np.exp(-epoch / 3)) + float(RNG.normal(0, 0.02))
        history.append(
            {
                "epoch": epoch + 1,
                "loss": 0.1 * hard + 0.9 * soft,
                "hard": hard,
                "soft": soft,
                "learning_rate": 0.01 * (1 + float(np.cos(np.pi * epoch / 12))) / 2,
                "validation": 91.8 - 4 * float(np.exp(-epoch / 2)) if epoch % 2 else None,
            }
        )
    return {
        "history": history,
        "alpha": 0.1,
        "temperature": 4.0,
        "seconds_per_epoch": 15.6,
        "teacher": "original",
        "num_steps": 756,
    }


def _quantize_facts(is_onnxruntime: bool) -> Json:
    ranges = []
    for name in LAYERS:
        spread = float(RNG.uniform(0.2, 1.4))
        ranges.append(_range(name, "weight", -spread, spread * 0.9, spread))
        high = float(RNG.uniform(2, 14))
        ranges.append(_range(name, "activation", 0.0, high, high * float(RNG.uniform(0.6, 1))))
    return {
        "precision": "int8",
        "profile": "onnxruntime-x86" if is_onnxruntime else "openvino",
        "calibration": "mse",
        "num_calibration_images": 512,
        "quantized": LAYERS[:-1] if is_onnxruntime else LAYERS[1:-1],
        "kept_float": {"linear": "the last layer"}
        if is_onnxruntime
        else {"conv1": "the first layer", "linear": "the last layer"},
        "ranges": ranges,
    }


def _range(layer: str, kind: str, low: float, high: float, clip: float) -> Json:
    return {
        "layer": layer,
        "kind": kind,
        "low": low,
        "high": high,
        "clipped_low": 0.0 if low == 0 else -clip,
        "clipped_high": clip,
    }


def _torch(step: str, value: float, change: float) -> Measurement:
    return Measurement(step=step, runtime="torch", accuracy=_accuracy(value, change))


def _deployed(
    step: str, target: str, value: float, change: float, size: int, median: float, precision: str
) -> Measurement:
    path = Path("deploy", target, step, "model.onnx" if target == "onnxruntime" else "model.xml")
    samples = median * (1 + RNG.gamma(1.5, 0.03, size=100))
    runtime = {"onnxruntime": "onnxruntime 1.32.0", "openvino": "openvino 2026.4.1"}[target]
    return Measurement(
        step=step,
        runtime=target,
        accuracy=_accuracy(value, change, agreement=99.3 if precision == "int8" else 100.0),
        latency=Latency(
            median_ms=float(np.median(samples)),
            p90_ms=float(np.percentile(samples, 90)),
            samples_ms=tuple(samples.tolist()),
            batch_size=1,
            num_threads=1,
            num_warmup=10,
            runtime=runtime,
        ),
        size_bytes=size,
        peak_memory_bytes=size * 4 + 3_000_000 if target == "onnxruntime" else None,
        artifact=Artifact(
            target=target,
            path=path,
            files=(path,),
            sha256="9f2c" * 16,
            size_bytes=size,
            precision=precision,  # type: ignore[arg-type]
            verified="executed",
            kernels={"int8": 30, "float32": 1} if precision == "int8" else {"float32": 32},
            audit=_audit() if precision == "int8" else (),
        ),
    )


def _audit() -> tuple[LayerAudit, ...]:
    convs = (
        LayerAudit(name=name, operator="conv", precision="int8", reason=None)
        for name in LAYERS[:-1]
    )
    last = LayerAudit(
        name=LAYERS[-1], operator="matmul", precision="float32", reason="excluded by the recipe"
    )
    return (*convs, last)


def _accuracy(value: float, change: float, agreement: float | None = None) -> Accuracy:
    return Accuracy(
        metric="top1",
        value=value,
        low=value - 1.8,
        high=value + 1.5,
        num_samples=1000,
        change=change,
        change_low=change - 0.9,
        change_high=change + 0.9,
        agreement=agreement,
    )


def _verdict(target: str, limit: str, allowed: float, found: float | None, met: bool) -> Verdict:
    return Verdict(target=target, limit=limit, allowed=allowed, found=found, met=met)  # type: ignore[arg-type]


def _recipe() -> Json:
    return {
        "schema_version": 1,
        "name": "cifar10-resnet32",
        "model": {
            "reference": "models/cifar_resnet.py:resnet32",
            "weights": "weights/cifar10_resnet32.safetensors",
        },
        "data": {"train": "cifar10_train4000.npz", "test": "cifar10_test1000.npz"},
        "stages": [
            {"prune": {"macs": 0.5, "importance": "l2"}},
            {"distill": {"epochs": 12, "alpha": 0.1, "temperature": 4.0}},
            {"quantize": {"precision": "int8", "calibration": "mse"}},
        ],
        "targets": ["onnxruntime", "openvino"],
        "budget": {"max_drop": 1.5, "min_speedup": 2.0, "max_size": 300_000},
        "measure": {"batch_size": 1, "num_threads": 1, "num_warmup": 10, "num_samples": 100},
        "seed": 0,
    }


def _environment() -> Json:
    return {
        "date": "2026-11-24T22:10:31+00:00",
        "slimdown": "0.1.0",
        "python": "3.11.7",
        "packages": {"torch": "2.14.1", "onnxruntime": "1.32.0", "openvino": "2026.4.1"},
        "system": "Linux 6.18.44",
        "architecture": "x86_64",
        "cpu": "AMD EPYC 9655 96-Core Processor",
        "cpu_features": ["avx2", "avx512_bf16", "avx512_vnni", "avx512f"],
        "physical_cores": 2,
        "logical_cores": 2,
        "usable_cores": 2,
        "memory_bytes": 25_276_510_208,
        "gpu": None,
        "torch_threads": 2,
        "load_average": [0.35, 0.41, 0.38],
    }
