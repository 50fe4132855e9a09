"""What is installed, what this machine can do, and the line that installs what is missing."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Group, RenderableType
from rich.table import Table

from slimdown.core import Json
from slimdown.measure import describe_environment

FAST_KERNELS = {
    "INT8": ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"),
    "BF16": ("avx512_bf16", "amx_bf16", "bf16"),
    "FP16": ("avx512_fp16", "fp16"),
}
"""The CPU features, any one of which makes a precision fast."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A dependency: what slimdown asks for, and what is there."""

    name: str
    wanted: str
    """The versions that will do, such as ">=1.22"; empty: any."""
    installed: str | None
    extra: str | None
    """The optional extra that it belongs to; None: slimdown cannot do without it."""
    is_fine: bool

    @property
    def install(self) -> str:
        """The line that installs it."""
        return (
            f"pip install '{f'slimdown[{self.extra}]' if self.extra else self.name + self.wanted}'"
        )


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """The packages, and the machine."""

    packages: tuple[Package, ...]
    environment: Json
    free_disk_bytes: int


def examine() -> Checkup:
    """Look at this installation and this machine; nothing is changed."""
    metadata = importlib.metadata.metadata("slimdown")
    extras = [name for name in metadata.get_all("Provides-Extra") or () if name != "dev"]
    requirements = metadata.get_all("Requires-Dist") or ()
    return Checkup(
        packages=tuple(check_packages(map(Requirement, requirements), extras=extras)),
        environment=describe_environment(),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
    )


def check_packages(
    requirements: Iterable[Requirement], *, extras: Iterable[str]
) -> Iterator[Package]:
    """Hold requirements against what is there: the core's first, then those of each extra."""
    requirements = list(requirements)
    core = [each for each in requirements if _applies(each, "")]
    yield from (_check_package(each, extra=None) for each in core)
    for extra in extras:
        for each in requirements:
            if each not in core and _applies(each, extra):
                yield _check_package(each, extra=extra)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _check_package(requirement: Requirement, *, extra: str | None) -> Package:
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return Package(
        name=requirement.name,
        wanted=str(requirement.specifier),
        installed=installed,
        extra=extra,
        is_fine=installed is not None
        and requirement.specifier.contains(installed, prereleases=True),
    )


def render_checkup(checkup: Checkup) -> RenderableType:
    """Draw a checkup for the terminal."""
    return Group(_render_packages(checkup.packages), "", _render_machine(checkup))


def _render_packages(packages: Iterable[Package]) -> Table:
    table = Table("package", "installed", "wanted", "for", "to do", box=None, pad_edge=False)
    for package in packages:
        table.add_row(
            package.name,
            package.installed or "-",
            package.wanted,
            f"the {package.extra} extra" if package.extra else "the core",
            "" if package.is_fine else package.install,
        )
    return table


def _render_machine(checkup: Checkup) -> Table:
    found = checkup.environment
    table = Table(box=None, pad_edge=False, show_header=False)
    memory = found["memory_bytes"]
    rows = {
        "slimdown": found["slimdown"],
        "Python": found["python"],
        "system": f"{found['system']} {found['architecture']}",
        "CPU": f"{found['cpu']} ({found['usable_cores']} of {found['logical_cores']} cores usable)",
        "CPU features": ", ".join(found["cpu_features"]) or "none known",
        **_fast_precisions(found["cpu_features"]),
        "torch threads": found["torch_threads"],
        "memory": "unknown" if memory is None else f"{memory / 2**30:.1f} GiB",
        "free disk": f"{checkup.free_disk_bytes / 2**30:.1f} GiB in {Path.cwd()}",
        "GPU": found["gpu"] or "none",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _fast_precisions(features: Iterable[str]) -> dict[str, str]:
    rows = {}
    for precision, able in FAST_KERNELS.items():
        found = sorted(set(able).intersection(features))
        rows[f"fast {precision}"] = f"yes ({', '.join(found)})" if found else "no"
    return rows
