"""The machine that a figure was measured on: no figure without its conditions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import torch

from slimdown.core import Json
from slimdown.version import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "timm",
    "transformers",
    "ultralytics",
)
"""The packages whose version can change a figure; named None where they are not installed."""

# Our name -> what /proc/cpuinfo and sysctl call it. Those that decide how fast INT8 and BF16 run.
_FEATURES: dict[str, tuple[str, ...]] = {
    "avx2": ("avx2",),
    "avx512f": ("avx512f",),
    "avx512_vnni": ("avx512_vnni", "avx512vnni"),
    "avx_vnni": ("avx_vnni",),
    "avx512_bf16": ("avx512_bf16", "avx512bf16"),
    "avx512_fp16": ("avx512_fp16",),
    "amx_int8": ("amx_int8",),
    "amx_bf16": ("amx_bf16",),
    "neon": ("asimd", "neon", "advsimd"),
    "dotprod": ("asimddp", "feat_dotprod"),
    "i8mm": ("i8mm", "feat_i8mm"),
    "bf16": ("bf16", "feat_bf16"),
    "fp16": ("asimdhp", "feat_fp16"),
    "sve": ("sve",),
}


def describe_environment() -> Json:
    """Software versions, the machine, its load and its threads, as JSON; None is "unknown"."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "slimdown": __version__,
        "python": platform.python_version(),
        "packages": {name: _version_of(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": cpu_name(),
        "cpu_features": sorted(cpu_features()),
        "physical_cores": count_physical_cores(),
        "logical_cores": os.cpu_count(),
        "usable_cores": _count_usable_cores(),
        "memory_bytes": _memory_bytes(),
        "gpu": gpu,
        "torch_threads": torch.get_num_threads(),
        "load_average": _load_average(),
    }


def cpu_features() -> frozenset[str]:
    """The instruction sets that matter for inference and that this CPU has: "avx512_vnni", …"""
    return select_features(_read_feature_names())


def select_features(names: Iterable[str]) -> frozenset[str]:
    """Our names of those among a kernel's names of CPU features that we have a use for."""
    lowered = {name.lower() for name in names}
    return frozenset(name for name, others in _FEATURES.items() if lowered.intersection(others))


def saturates_int8(environment: Json) -> bool:
    """Whether INT8 kernels add products in 16 bits on a machine as `describe_environment` told it.

    So they do on x86 without VNNI: two products of a u8 and an s8 are added with saturation, which
    values at their extremes exceed unless the weights have 7 bits (onnxruntime.ai, "Data type
    selection"; docs.openvino.ai, "Saturation issue workaround"). False where features are unknown,
    as on Windows.
    """
    features = set(environment.get("cpu_features") or ())
    is_x86 = environment.get("architecture") in ("x86_64", "AMD64", "i686", "i386")
    is_told = str(environment.get("system")).startswith(("Linux", "Darwin"))
    return is_x86 and is_told and not features & {"avx512_vnni", "avx_vnni"}


def cpu_name() -> str | None:
    """What the CPU calls itself, such as "AMD EPYC 9655"."""
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string")
    found = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or None


def count_physical_cores() -> int | None:
    """Cores, hyper-threads not counted twice."""
    if platform.system() == "Darwin":
        count = _sysctl("hw.physicalcpu")
        return int(count) if count else None
    return parse_physical_cores(_cpuinfo())


def parse_physical_cores(cpuinfo: str) -> int | None:
    """Count the distinct (socket, core) pairs of a /proc/cpuinfo; None where it tells none."""
    pairs = {
        (socket.group(1), core.group(1))
        for block in cpuinfo.split("\n\n")
        if (socket := re.search(r"^physical id\s*:\s*(\d+)", block, re.MULTILINE))
        and (core := re.search(r"^core id\s*:\s*(\d+)", block, re.MULTILINE))
    }
    return len(pairs) or None


def parse_feature_names(cpuinfo: str) -> set[str]:
    """The words of the first "flags" (x86) or "Features" (Arm) line of a /proc/cpuinfo."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def parse_sysctl_names(listed: str) -> set[str]:
    """The last parts of the keys that macOS answers 1 for: "hw.optional.arm.FEAT_I8MM: 1"."""
    names = {key.rsplit(".", 1)[-1] for key in re.findall(r"^(\S+): 1$", listed, re.MULTILINE)}
    return {name.removesuffix("_0") for name in names}  # "hw.optional.avx2_0"


def _read_feature_names() -> Iterable[str]:
    if platform.system() == "Linux":
        return parse_feature_names(_cpuinfo())
    if platform.system() == "Darwin":
        return parse_sysctl_names(_sysctl("hw.optional") or "")
    # Elsewhere torch at least tells which vector width it uses.
    return {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512f"]}.get(
        torch.backends.cpu.get_cpu_capability(), []
    )


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.is_file() else ""


def _sysctl(key: str) -> str | None:
    flags = [] if key == "hw.optional" else ["-n"]
    done = subprocess.run(["sysctl", *flags, key], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _count_usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _load_average() -> list[float] | None:
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):  # not on Windows
        return None
