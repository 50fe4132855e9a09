"""What was timed once on a machine, kept for the next time in the user's cache folder.

Times that were taken while the machine was busy are too long and are kept like others: remove the
folder, or set SLIMDOWN_CACHE to a new one, to have them taken again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from slimdown.files import write_bytes
from slimdown.measure.machine import cpu_features, cpu_name

VERSION = 1
"""Of what a figure means: another one makes all figures anew."""


def cache_folder() -> Path:
    """SLIMDOWN_CACHE where that is set, else slimdown's part of the user's cache folder."""
    if chosen := os.environ.get("SLIMDOWN_CACHE"):
        return Path(chosen)
    home = Path.home()
    usual = {"Darwin": home / "Library" / "Caches", "Windows": home / "AppData" / "Local"}
    folder = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(folder or usual.get(platform.system(), home / ".cache")) / "slimdown"


def conditions(runtime: str, num_threads: int) -> dict[str, object]:
    """What a latency depends on beside the operator: other conditions are another file."""
    return {
        "version": VERSION,
        "runtime": runtime,
        "cpu": cpu_name(),
        "cpu_features": sorted(cpu_features()),
        "num_threads": num_threads,
    }


def load_timings(where: Mapping[str, object]) -> dict[str, float]:
    """Operator -> milliseconds, as measured under these conditions before."""
    path = _file(where)
    try:
        saved = json.loads(path.read_text())
        return {str(name): float(ms) for name, ms in saved["milliseconds"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}  # what cannot be read is measured again, and written whole


def save_timings(where: Mapping[str, object], timings: Mapping[str, float]) -> None:
    """Add timings to those that are kept. Raises OutOfResources where the disk refuses."""
    together = {**load_timings(where), **timings}
    content = {"conditions": dict(where), "milliseconds": dict(sorted(together.items()))}
    write_bytes(_file(where), json.dumps(content, indent=1).encode() + b"\n")


def _file(where: Mapping[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]
    name = str(where["runtime"]).split()[0]
    return cache_folder() / f"operators-{name}-{digest}.json"
