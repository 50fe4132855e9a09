"""What is installed is held against what is asked for."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from slimdown.doctor import Package, check_packages, examine, render_checkup

INSTALLED = {"torch": "2.14.1+cpu", "numpy": "1.26.0", "openvino": "2026.4.1"}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Package]:
    def version(name: str) -> str:
        if name not in INSTALLED:
            raise importlib.metadata.PackageNotFoundError(name)
        return INSTALLED[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    requirements = [
        "torch>=2.10",
        "numpy>=2.0",
        "tomli>=2; python_version < '3.0'",
        "openvino>=2025.2; extra == 'openvino'",
        "timm>=1.0.15; extra == 'timm'",
        "pytest; extra == 'dev'",
    ]
    found = check_packages(map(Requirement, requirements), extras=["openvino", "timm"])
    return {package.name: package for package in found}


def test_what_does_not_apply_here_is_left_out(packages: dict[str, Package]) -> None:
    assert list(packages) == ["torch", "numpy", "openvino", "timm"]


def test_what_is_there_is_fine(packages: dict[str, Package]) -> None:
    assert packages["torch"].is_fine
    assert packages["torch"].installed == "2.14.1+cpu"
    assert packages["torch"].extra is None
    assert packages["openvino"].is_fine
    assert packages["openvino"].extra == "openvino"


def test_what_is_missing_or_too_old_comes_with_its_line(packages: dict[str, Package]) -> None:
    assert not packages["numpy"].is_fine
    assert packages["numpy"].install == "pip install 'numpy>=2.0'"
    assert not packages["timm"].is_fine
    assert packages["timm"].installed is None
    assert packages["timm"].install == "pip install 'slimdown[timm]'"


def test_this_installation_is_examined() -> None:
    checkup = examine()
    by_name = {package.name: package for package in checkup.packages}
    assert by_name["torch"].is_fine
    assert by_name["openvino"].extra == "openvino"
    assert "pytest" not in by_name
    assert checkup.free_disk_bytes > 0


def test_the_checkup_is_drawn() -> None:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(render_checkup(examine()))
    text = captured.get()
    for word in (
        "onnxruntime",
        "openvino",
        "CPU features",
        "fast INT8",
        "memory",
        "free disk",
        "GPU",
    ):
        assert word in text
